"""How often panels are painted: less while painting takes long or the terminal does not keep up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textual.app import App

BUSY_SHARE = 0.3  # of a tick's time, from which on the rate is halved
BUSY_QUEUE = 10  # writes waiting for the terminal (Textual holds 30 at most, then its loop stops)
CALM_S = 10.0  # until the rate is doubled back
SLOWEST_HZ = 1.0


class Pace:
    """Takes `hz` ticks a second and lets every n-th do its work.

    Args:
        hz: ticks a second; the rate when all is calm.
        clock: seconds, monotonic.
    """

    def __init__(self, hz: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.hz, self.clock = hz, clock
        self.stride, self._skipped, self._calm_since = 1, 0, clock()

    @property
    def rate(self) -> float:
        """Repaints a second at present."""
        return self.hz / self.stride

    def due(self) -> bool:
        """Whether this tick does its work."""
        self._skipped += 1
        if self._skipped < self.stride:
            return False
        self._skipped = 0
        return True

    def note(self, spent: float, queued: int | None) -> None:
        """After a tick: the seconds it took, and the writes that wait for the terminal (None: not known)."""
        now = self.clock()
        if spent > BUSY_SHARE / self.rate or (queued is not None and queued > BUSY_QUEUE):
            self._calm_since = now
            if self.rate / 2 >= SLOWEST_HZ:
                self.stride *= 2
        elif self.stride > 1 and now - self._calm_since >= CALM_S:
            self.stride //= 2
            self._calm_since = now


def queued_writes(app: App[Any]) -> int | None:
    """Writes that wait for the terminal; None where that cannot be told.

    The one place that looks at Textual's private writer thread; without it the rule is skipped.
    """
    thread = getattr(app._driver, "_writer_thread", None)
    size = getattr(getattr(thread, "_queue", None), "qsize", None)
    return int(size()) if callable(size) else None
