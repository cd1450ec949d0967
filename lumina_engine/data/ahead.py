"""Processes that tokenise, started before it is known what: they load while their parent loads and reads the source's digest.

Only light modules are imported here, so that they can start before the parent has imported what it needs itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

from .files import Paths, expand, total_bytes

PIECE_BYTES = 8 << 20
PIECES_FROM = 8 * PIECE_BYTES  # of a source; below, starting processes costs more than they save


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Ahead:
    """Processes of `piece_worker`: those that were started ahead, then new ones."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def expect(self, paths: Paths, key: str, cache: Path, workers: int, most: float = math.inf) -> None:
        """Start up to `workers` for a large source of at most `most` bytes, if no store in `cache` is of that name.

        Raises `DataError` for paths that name nothing.
        """
        files = expand(paths, key)
        size = total_bytes(files)
        if workers > 1 and PIECES_FROM <= size <= most and not _has(cache, label_of(files)):
            with contextlib.suppress(OSError):  # no room for more: who needs one is told
                for _ in range(min(workers, size // PIECE_BYTES)):
                    self._started.append(_piece_worker())

    def take(self) -> subprocess.Popen[str]:
        """One that was started, else a new one."""
        try:
            return self._started.pop()
        except IndexError:
            return _piece_worker()

    def close(self) -> None:
        """End those that nobody took."""
        while self._started:
            end_worker(self._started.pop())


def label_of(files: list[Path]) -> str:
    """What notes and stores call these files."""
    return str(files[0]) if len(files) == 1 else f"{len(files)} files"


def end_worker(process: subprocess.Popen[str]) -> None:
    """End a process of `piece_worker`, whatever it does: its piece is written again from its start."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what it was not told any more
            assert pipe is not None
            pipe.close()


def _piece_worker() -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "lumina_engine.data.piece_worker"]
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a worker inherits it: the parent decides
    try:
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _has(cache: Path, label: str) -> bool:
    """Whether a store in the cache comes from a source of this name. What cannot be read is none."""
    for meta in cache.glob("*/meta.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(meta.read_text(encoding="utf-8"))["source"]["label"] == label:
                return True
    return False
