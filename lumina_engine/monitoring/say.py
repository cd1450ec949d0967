"""What a run's own processes say in engine.log, which is their stderr."""

from __future__ import annotations

import contextlib
import sys
import traceback


def say(text: str) -> None:
    """Print a line. A full disk costs the line, not the process that says it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def print_error(error: BaseException) -> None:
    """Print the traceback; a full disk costs it, and nothing that is done after it."""
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
