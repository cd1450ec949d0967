"""How many bytes go to the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from textual.driver import Driver


class Wire:
    """Counts what the driver that it makes sends. Until one was made, `sent` is None."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self.sent: int | None = None

    @property
    def seconds(self) -> float:
        """Since when it counts."""
        return self._clock() - self._began

    def counting(self, base: type[Driver]) -> type[Driver]:
        """A driver like `base` that is counted here."""
        wire = self

        class Counting(base):  # type: ignore[valid-type, misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                wire.sent = 0
                super().__init__(*args, **kwargs)

            def write(self, data: str) -> None:
                wire.sent = (wire.sent or 0) + len(data.encode(errors="replace"))
                super().write(data)

        return Counting
