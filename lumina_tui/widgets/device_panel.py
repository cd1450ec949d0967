"""Devices, host, ranks, and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Sequence

from ..facts import Words, device_title, hardware_lines, rank_lines, split_bar, split_help, split_words, step_split
from ..feed import Feed
from ..paint import Piece, duration
from ..ranks import Ranks
from .run_panel import RunPanel
from .text_panel import Line


class DevicePanel(RunPanel):
    """What the machine does for the run. Ranks that are late or dead come first."""

    stem = "devices"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(title="devices", id=id)
        self.feed: Feed | None = None
        self._lines: list[Words] = []

    @property
    def ranks(self) -> Ranks:
        return self.feed.ranks if self.feed is not None else Ranks([])

    def versions(self) -> tuple[object, ...]:
        store = self.store
        told = tuple(map(tuple, rank_lines(self.ranks, self.inner[1])))
        return (store.hardware_version, store.steps.version // 5, told)

    def prepare(self) -> None:
        width, height = self.inner
        self._lines = self._all(width - 2, height)
        self.set_title("devices", self.aged(device_title(self.store.hardware)))

    def _all(self, width: int, height: int) -> list[Words]:
        ranks = self.ranks
        room = max(1, height // 3) if ranks.worst() is None else max(2, height // 2)
        beats = rank_lines(ranks, room)
        split = self._split(width)
        machine = hardware_lines(self.store, width, self.look.ascii, max(1, height - len(beats) - len(split)), sparks=True)
        first, last = (beats, []) if ranks.worst() is not None else ([], beats)
        lines = [*first, *machine, *split, *last]
        if len(lines) > height:
            lines = [*first, *machine, *last]
        return lines[:height]

    def _split(self, width: int) -> list[Words]:
        history = self.store.steps
        parts = step_split(history)
        if not parts:
            return []
        head = f"step {duration(history.last('step_time'))}  "
        return [[(head, "dim"), *split_bar(parts, min(60, width - len(head)))], split_words(parts, width)]

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        if not self._lines:
            return [(" no figures yet", self.palette.dim)] if y == 0 else ()
        if y >= len(self._lines):
            return ()
        return [(" ", None), *((text, self.palette.of(role)) for text, role in self._lines[y])]

    def explain(self) -> Sequence[Line]:
        """For the help: the signs of this panel."""
        return split_help()
