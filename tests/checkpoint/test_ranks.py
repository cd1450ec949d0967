"""CK04: two ranks save together and one is killed: a committed folder always holds the files of both.

Over a socket pair, which costs nothing, and (nightly) over gloo as in training.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.checkpoint.commit import list_steps, newest_valid, verify
from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.checkpoint.payload import required_files
from tests.checkpoint import gloo
from tests.checkpoint.helpers import kill_at, names_in, payload, settings


class SocketComm:
    """Collectives between two processes over a socket pair; a dead peer ends the call with EOFError."""

    world_size = 2

    def __init__(self, rank: int, peer: socket.socket) -> None:
        self.rank, self.stream = rank, peer.makefile("rwb")

    def all_gather(self, value: Any) -> list[Any]:
        self.stream.write(json.dumps(value).encode() + b"\n")
        self.stream.flush()
        line = self.stream.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the other rank is gone")
        values = [json.loads(json.dumps(value)), json.loads(line)]
        return values if self.rank == 0 else values[::-1]

    def barrier(self) -> None:
        self.all_gather(None)


def both(run: Path, step: int, victim: int | None = None, number: int = 0, blocking: bool = True) -> list[int]:
    """Save on two forked ranks, one of which dies at its `number`-th durability call; exit codes (3: the peer was gone)."""
    pair = socket.socketpair()
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                pair[1 - rank].close()
                signal.alarm(15)  # a survivor must not wait for ever
                if rank == victim:
                    kill_at(number)
                made = CheckpointManager(settings(), run, SocketComm(rank, pair[rank]))
                results = (
                    made.save(payload(step, model=payload(step).model if rank == 0 else {}), blocking=blocking) or made.wait()
                )
                code = 0 if results[0].failed is None else 1
            except (EOFError, BrokenPipeError, ConnectionResetError):
                code = 3
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    for end in pair:
        end.close()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize(
    ("victim", "numbers"),
    [
        pytest.param(0, range(1, 80, 7), marks=[pytest.mark.slow, pytest.mark.fast]),
        (1, range(1, 20, 2)),
        pytest.param(0, range(1, 80), marks=pytest.mark.slow),
    ],
    ids=["rank0", "rank1", "rank0_every_call"],
)
def test_ck04_kill_one_of_two_ranks(fresh: Callable[[], Path], victim: int, numbers: range) -> None:
    killed(fresh, both, victim, numbers)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "numbers"), [(0, range(1, 80, 3)), (1, range(1, 22))], ids=["rank0", "rank1"])
def test_ck04_kill_one_of_two_ranks_of_a_gloo_group(
    fresh: Callable[[], Path], victim: int, numbers: range, figure: Callable[[str, object], None]
) -> None:
    """A survivor whose collective ends with the other rank leaves by itself: none is ended by its alarm."""
    killed(fresh, gloo.both, victim, numbers)
    figure("kill points over gloo", len(numbers))


def killed(fresh: Callable[[], Path], both: Callable[..., list[int]], victim: int, numbers: range) -> None:
    template = fresh() / "run"
    assert both(template, 1) == [0, 0]
    outcomes = set()
    for number in numbers:
        run = fresh() / "run"
        shutil.copytree(template, run)
        codes = both(run, 2, victim, number, blocking=bool(number % 2))
        assert codes[victim] in (-signal.SIGKILL, 0) and codes[1 - victim] in (0, 3), (number, codes)
        for name in list_steps(run / "checkpoints"):
            report = verify(run / "checkpoints" / name)
            assert report.ok and {entry.path for entry in report.files} >= required_files(2), number
        found = newest_valid(run / "checkpoints")
        assert found.path is not None and not found.rejected, number
        outcomes.add(found.path.name)
        if found.path.name == "step-000001":
            CheckpointManager(settings(), run).recover()
            assert not [name for name in names_in(run / "checkpoints") if name.startswith(".")]
            assert both(run, 2) == [0, 0], number
    assert outcomes == {"step-000001", "step-000002"}
