"""Ends what tests start: runs with every process that carries their mark, and the short folders that hold their sockets."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lumina_engine.run.directory import RunDirectory, RunError
from lumina_engine.run.process import marked, send_all

from .waiting import until


def end_runs(runs: Iterable[RunDirectory]) -> None:
    """Kill the supervisors of these runs and whatever they left behind; returns when nothing is left."""
    for run in runs:
        owner = run.owner()
        if owner is not None:
            send_all([owner], signal.SIGKILL)
        try:
            nonce = run.identity().get("nonce")
        except RunError:  # never made, or damaged by the test
            continue
        if nonce:
            until(partial(_nothing_left, nonce), "the run's processes to end", 60)


def _nothing_left(nonce: str) -> bool:
    return send_all(marked(nonce), signal.SIGKILL) == 0


@contextmanager
def socket_place(name: str) -> Iterator[Path]:
    """A path under /tmp that is short enough for sockets and this process's own; removed in the end."""
    place = Path(f"/tmp/l{name}-{os.getpid()}")
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
