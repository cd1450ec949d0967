"""The tail of a growing text file: follow, filter, search; paints only what is in view."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from rich.style import Style
from textual.binding import BindingType
from textual.events import MouseScrollDown, MouseScrollUp

from ..actions import bindings
from ..log_tail import Matches, TextTail
from ..paint import Piece
from .acts import Finds
from .panel import Drawn

SIDEWAYS = 16  # columns a step


class LogView(Finds, Drawn):
    """Shows a `TextTail`. Call `sync()` on each tick.

    `/` asks for words: then only lines with all of them are shown, or (`&`) all lines with the words marked. `n` and `N` go
    through the matches in both. Places are numbers of lines, which stay the same while old lines are forgotten.
    """

    scope = "log"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("log"))

    def __init__(self, *, title: str = "engine.log", id: str | None = None) -> None:
        super().__init__(title=title, id=id)
        self._base_title = title
        self.tail: TextTail | None = None
        self.only = True  # show only the matches
        self._matches: Matches | None = None
        self._pattern: re.Pattern[str] | None = None
        self._top: int | None = None  # number of the first line in view; None: follows the newest
        self._mark: int | None = None  # number of the match that was gone to
        self._column = 0  # columns scrolled away

    def show(self, path: Path) -> None:
        """Show another file."""
        if self.tail is not None:
            self.tail.close()
        self.tail = TextTail(path)
        self._top = self._mark = None
        self._column = 0
        self.set_filter(self.needle)
        self.sync()
        self.refresh()

    def sync(self) -> None:
        """Read what is new and repaint if it is in view."""
        if self.tail is None:
            return
        fresh = self.tail.poll()
        if self._matches is not None:
            before = len(self._matches.numbers)
            self._matches.advance(self.tail)
            fresh = fresh or len(self._matches.numbers) != before
        if fresh:
            self._titles()
            self.refresh()

    # which lines

    @property
    def filter(self) -> str:
        """The words that are searched for; empty without any."""
        return self.needle

    @property
    def _filtered(self) -> Matches | None:
        return self._matches if self.only else None

    def __len__(self) -> int:
        """Lines that can be shown."""
        if self._filtered is not None:
            return len(self._filtered.numbers)
        return len(self.tail.lines) if self.tail is not None else 0

    def _number(self, row: int) -> int:
        if self._filtered is not None:
            return self._filtered.numbers[row]
        return row + (self.tail.dropped if self.tail is not None else 0)

    def _row(self, number: int) -> int:
        if self._filtered is not None:
            return bisect.bisect_left(self._filtered.numbers, number)
        return max(0, number - (self.tail.dropped if self.tail is not None else 0))

    def _first(self) -> int:
        last = max(0, len(self) - self.inner[1])
        return last if self._top is None else min(self._row(self._top), last)

    def lines(self) -> list[str]:
        """All lines that can be shown, as text."""
        return [] if self.tail is None else [self.tail.text(self._number(row)) for row in range(len(self))]

    # painting

    def _titles(self) -> None:
        words = ""
        if self._matches is not None:
            words = f"/{self.needle}  {len(self._matches.numbers):,} lines" + ("" if self.only else " of all")
        self.set_title(self._base_title, words)
        below = len(self) - self._first() - self.inner[1]
        self.set_foot("" if self._top is None else f"f follows: {max(0, below):,} lines below", self._place())

    def _place(self) -> str:
        if self._matches is not None and self._mark in self._matches.numbers:
            return f"match {self._matches.numbers.index(self._mark) + 1:,} of {len(self._matches.numbers):,}"
        return f"from column {self._column + 1}" if self._column else ""

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        row = self._first() + y
        if self.tail is None or row >= len(self):
            if y == 0 and not len(self):
                text = self.tail.error if self.tail is not None and self.tail.error else "nothing was written yet"
                text = f"no line with {self.needle}" if self._matches is not None and self.tail and self.tail.lines else text
                return [(" " + text, self.palette.dim)]
            return ()
        number = self._number(row)
        line = self.tail.text(number)
        style = self._style(line, row)
        shown = line[self._column : self._column + width]  # a character has at least one cell
        mark: Piece = (">", self.palette.accent) if number == self._mark else (" ", None)
        return [mark, *self._marked(shown, style)]

    def _style(self, line: str, row: int) -> Style:
        lowered = line[:200].lower()
        if "error" in lowered or "traceback" in lowered or "critical" in lowered:
            return self.palette.bad
        if "warn" in lowered:
            return self.palette.warn
        return self.palette.text if row >= len(self) - 1 else self.palette.dim

    def _marked(self, text: str, style: Style) -> list[Piece]:
        """The text with the searched words reversed."""
        if self._pattern is None:
            return [(text, style)]
        pieces: list[Piece] = []
        for at, part in enumerate(self._pattern.split(text)):  # every second part is a match
            if part:
                pieces.append((part, style + Style(reverse=True) if at % 2 else style))
        return pieces or [("", style)]

    # actions

    def why_not(self, action_id: str) -> str | None:
        if self.tail is None:
            return "there is no log yet"
        return "nothing was searched for yet: / does" if action_id == "log.only" and self._matches is None else None

    def _scroll(self, lines: int) -> None:
        first = self._first() + lines
        last = max(0, len(self) - self.inner[1])
        self._top = None if first >= last else self._number(max(0, first))
        self._titles()
        self.refresh()

    def action_down(self) -> None:
        self._scroll(1)

    def action_up(self) -> None:
        self._scroll(-1)

    def action_page_down(self) -> None:
        self._scroll(self.inner[1])

    def action_page_up(self) -> None:
        self._scroll(-self.inner[1])

    def action_top(self) -> None:
        self._scroll(-len(self))

    def action_bottom(self) -> None:
        self._scroll(len(self))

    def action_follow(self) -> None:
        self._mark = None
        self._column = 0
        self.action_bottom()

    def _sideways(self, columns: int) -> None:
        self._column = max(0, self._column + columns)
        self._titles()
        self.refresh()

    def action_left(self) -> None:
        self._sideways(-SIDEWAYS)

    def action_right(self) -> None:
        self._sideways(SIDEWAYS)

    def action_filter(self) -> None:
        lines = ["All words must occur; empty shows every line. n and N go through the matches, & shows the lines around them."]
        self.lumina.prompt("Lines with", self.set_filter, value=self.needle, lines=lines)

    def set_filter(self, text: str) -> None:
        """Look for lines with all these words."""
        self.needle = " ".join(text.split())
        self._matches = Matches(self.needle) if self.needle else None
        words = sorted(self.needle.split(), key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, words)) + ")", re.IGNORECASE) if words else None
        self._top = self._mark = None
        if self._matches is not None and self.tail is not None:
            self._matches.advance(self.tail)
        self._titles()
        self.refresh()

    def action_only(self) -> None:
        """Only the matches, or all lines with the matches marked; what was in view stays in view."""
        place = self._mark if self._mark is not None else self._number(self._first()) if len(self) else None
        follows = self._top is None and self._mark is None
        self.only = not self.only
        if place is not None and not follows:
            self._go(place)
        self._titles()
        self.refresh()

    def _find(self, step: int) -> None:
        if self._matches is None or self.tail is None:
            self.lumina.notice("nothing was searched for yet: / does", "warning")
            return
        here = self._mark
        if here is None:  # forwards from what is in view; from the newest line when that is followed
            row = self._first() if step > 0 and self._top is not None else min(len(self), self._first() + self.inner[1])
            here = self._number(row) - 1 if row < len(self) else self.tail.end
        found = self._matches.beside(here, step)
        if found is None:
            self.lumina.notice(f"no line with {self.needle}", "warning")
            return
        self._mark = found
        self._go(found)
        self._titles()
        self.refresh()

    def _go(self, number: int) -> None:
        """Bring a line into view."""
        row, first, height = self._row(number), self._first(), self.inner[1]
        if not first <= row < first + height:
            first = max(0, row - height // 2)
        self._top = self._number(min(first, max(0, len(self) - 1))) if len(self) else None

    def action_export(self) -> None:
        self.lumina.save_export("engine-log", "txt", "".join(line + "\n" for line in self.lines()))

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        event.stop()
        self._scroll(3)

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        event.stop()
        self._scroll(-3)

    def on_resize(self) -> None:
        self._titles()
