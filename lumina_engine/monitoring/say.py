"""What a run's own processes say in engine.log, which is their stderr."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """Print a line. A full disk costs the line, not the process that says it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
