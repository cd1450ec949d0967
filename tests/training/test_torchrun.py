"""Ranks under torchrun: the launcher ends as they did, so that a TERM before they listen is told from a crash (FT03)."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_engine.run.interface import free_port
from lumina_engine.run.launchers import torchrun_argv
from tests.waiting import until

RANK = """
import os, sys, threading
target = os.path.join(sys.argv[1], os.environ["RANK"])
with open(target + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(target + ".new", target)
threading.Event().wait(600)
"""


def ended(folder: Path, strike: Callable[[subprocess.Popen[bytes], int], None]) -> int:
    """Start two ranks that do not listen, strike (launcher, pid of rank 1) once both are there; how the launcher ended."""
    (folder / "rank.py").write_text(RANK)
    place = {"nodes": 1, "ranks": 2, "node_rank": 0, "address": "127.0.0.1", "port": free_port(0)}
    launcher = subprocess.Popen(
        torchrun_argv([str(folder / "rank.py"), str(folder)], **place), env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        until(lambda: (folder / "0").exists() and (folder / "1").exists(), "both ranks", 120)
        strike(launcher, int((folder / "1").read_text()))
        return launcher.wait(120)
    finally:
        launcher.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, 1)], ids=["term", "kill"])
def test_ft03_torchrun_ends_by_term_where_a_rank_was_told_and_by_1_where_it_crashed(
    tmp_path: Path, number: int, code: int
) -> None:
    """The other rank ends by torchrun's own TERM in either case."""
    assert ended(tmp_path, lambda _, rank: os.kill(rank, number)) == code


def test_ft03_torchrun_told_to_leave_ends_by_term(tmp_path: Path) -> None:
    assert ended(tmp_path, lambda launcher, _: launcher.terminate()) == -signal.SIGTERM
