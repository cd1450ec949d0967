"""Leaving when the terminal goes: a hang-up, a kill, or a terminal that has simply gone.

The event loop may be blocked by then: Textual's writer thread dies with the terminal, its queue fills, and the next write waits
for ever. So the watching is done in a thread and in a plain signal handler; they ask the loop to end, and end the process if it
does not answer. Nothing is lost by that: a viewer owns nothing, runs go on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

PATIENCE_S = 2.0  # for the loop to end by itself


class Departure:
    """Calls `leave` (safe from any thread) when the terminal is gone or the process is asked to end.

    `keep` (safe from any thread; may raise OSError) writes what must not be lost if the loop is stuck.
    """

    def __init__(self, leave: Callable[[], object], keep: Callable[[], object] = lambda: None) -> None:
        self._leave, self._keep = leave, keep
        self._leaving = threading.Event()

    def install(self) -> None:
        """Begin to watch. Call it in the main thread, after the driver has set its own handlers."""
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch_terminal, name="terminal-watch", daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._go()

    def _watch_terminal(self) -> None:
        """Sleeps in the kernel until the terminal hangs up."""
        try:
            poll = select.poll()
            poll.register(sys.__stdin__.fileno(), 0)  # type: ignore[union-attr]
            while not any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in poll.poll()):
                pass
        except (OSError, ValueError):
            pass  # no terminal at all: the same as a lost one
        self._go()

    def _go(self) -> None:
        if not self._leaving.is_set():
            self._leaving.set()
            threading.Thread(target=self._insist, name="departure", daemon=True).start()

    def _insist(self) -> None:
        self._leave()
        with contextlib.suppress(OSError):  # nobody is there any more who could be told
            self._keep()
        time.sleep(PATIENCE_S)
        os._exit(0)  # the loop is stuck in a write to a terminal that is not there
