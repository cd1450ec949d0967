"""Signals as events of a selector: handlers only note the number, the loop takes it up."""

from __future__ import annotations

import selectors
import signal
import socket
from collections.abc import Iterable


class SignalQueue:
    """Catches signals from now on. Main thread only.

    Args:
        selector: woken by a caught signal.
        caught: what is queued.
        ignored: what is ignored, here and in processes started from here.
    """

    def __init__(self, selector: selectors.BaseSelector, caught: Iterable[int], ignored: Iterable[int]) -> None:
        self._numbers: list[int] = []
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in caught:
            signal.signal(number, lambda number, _: self._numbers.append(number))
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        selector.register(self._reader, selectors.EVENT_READ, lambda: self._reader.recv(4096))

    def take(self) -> list[int]:
        """The signals since the last call, in order."""
        count = len(self._numbers)  # a handler may append in between: what comes later stays for the next call
        taken, self._numbers[:count] = self._numbers[:count], []
        return taken
