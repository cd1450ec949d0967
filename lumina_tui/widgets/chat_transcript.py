"""The conversation as it is read: wrapped lines, follows the newest while one is at the bottom. Text is never markup."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar

from textual.binding import BindingType
from textual.events import Key, MouseScrollDown, MouseScrollUp
from textual.message import Message

from ..actions import bindings
from ..markdown import Layout, Markdown, Plain
from ..paint import Piece
from ..wrapping import Line
from .acts import Finds
from .panel import Drawn

GUTTER = 5  # cells before the text, for who speaks
_LABELS = {"user": "You", "assistant": "A", "note": "", "error": "!"}
_ROLES = {"user": "accent", "assistant": "text", "note": "dim", "error": "bad"}


class Item:
    """Something that was said. Only what is new is laid out when its text grows.

    kind: user | assistant | note | error. `foot`: figures below a reply. `finished`: no more text will come.
    """

    def __init__(self, kind: str, text: str = "", foot: str = "", *, finished: bool = True) -> None:
        self.kind, self.text, self.foot, self.finished = kind, text, foot, finished
        self._layout: tuple[bool, Layout] | None = None
        self._seen: tuple[object, ...] = ()
        self._lines: list[Line] = []

    def lines(self, width: int, raw: bool = False) -> list[Line]:
        """Lines of at most `width` cells; `raw` shows Markdown as it was written."""
        seen = (width, raw, len(self.text), self.finished, self.foot)
        if seen != self._seen:
            self._seen = seen
            plain = raw or self.kind != "assistant"
            if self._layout is None or self._layout[0] != plain:
                self._layout = plain, Plain(_ROLES[self.kind]) if plain else Markdown()
            found = self._layout[1].lines(self.text, width, self.finished)
            self._lines = [*found, *Plain("dim").lines(self.foot, width)] if self.foot else found
        return self._lines


class Transcript(Finds, Drawn):
    """Paints items; `changed()` after editing the last one."""

    scope = "transcript"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("transcript"))

    class Escaped(Message):
        """Esc was pressed here."""

    def __init__(self, *, title: str = "", id: str | None = None, classes: str | None = None) -> None:
        super().__init__(title=title, id=id, classes=classes)
        self.items: list[Item] = []
        self.raw = False  # Markdown as it was written
        self._top = 0
        self._follows = True
        self._seen = 0  # number of lines when the reader left the bottom
        self._ends: list[int] = []  # lines up to the end of each item
        self._width = 0

    # content

    def add(self, kind: str, text: str, foot: str = "", *, finished: bool = True) -> Item:
        """Append an item."""
        item = Item(kind, text, foot, finished=finished)
        self.items.append(item)
        self.changed()
        return item

    def clear(self) -> None:
        self.items.clear()
        self._follows, self._top = True, 0
        self.changed()

    def changed(self) -> None:
        """Lay out what is new and repaint the lines that differ."""
        self._width = self.inner[0] - GUTTER - 1
        self._ends = list(accumulate(len(item.lines(self._width, self.raw)) for item in self.items))
        self._place()
        self.repaint_changed()

    @property
    def _count(self) -> int:
        return self._ends[-1] if self._ends else 0

    def toggle_raw(self) -> None:
        """Markdown as it was written, or laid out; the reader stays about where he was."""
        share = self._top / self._count if self._count else 0.0
        self.raw = not self.raw
        self._top = 0
        self.changed()
        if not self._follows:
            self._scroll(round(share * self._count))

    def _place(self) -> None:
        bottom = max(0, self._count - self.inner[1])
        if self._follows or self._top >= bottom:
            self._follows, self._top = True, bottom
            self.set_foot(self._foot_left, "")
        else:
            new = max(0, self._count - self._seen)
            self.set_foot(self._foot_left, f"G {new} new line{'s' if new > 1 else ''}" if new else "G newest")

    def on_resize(self) -> None:
        self.changed()

    # scrolling

    def _scroll(self, top: int) -> None:
        bottom = max(0, self._count - self.inner[1])
        if self._follows:
            self._seen = self._count
        self._top = max(0, min(top, bottom))
        self._follows = self._top >= bottom
        self._place()
        self.repaint_changed()

    def action_down(self) -> None:
        self._scroll(self._top + 1)

    def action_up(self) -> None:
        self._scroll(self._top - 1)

    def action_top(self) -> None:
        self._scroll(0)

    def action_bottom(self) -> None:
        self._scroll(self._count)

    def action_page_down(self) -> None:
        self._scroll(self._top + max(1, self.inner[1] - 1))

    def action_page_up(self) -> None:
        self._scroll(self._top - max(1, self.inner[1] - 1))

    # searching

    def find_lines(self) -> list[str]:
        return ["".join(text for text, _ in line) for item in self.items for line in item.lines(self._width, self.raw)]

    def find_at(self) -> int:
        return self._top

    def find_show(self, index: int) -> None:
        self._scroll(index)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        event.stop()
        self._scroll(self._top + 3)

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        event.stop()
        self._scroll(self._top - 3)

    def on_key(self, event: Key) -> None:
        if event.key == "escape":
            event.stop()
            self.post_message(self.Escaped())

    # painting

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        index = self._top + y
        if not 0 <= index < self._count:
            return ()
        at = bisect_right(self._ends, index)
        lines = self.items[at].lines(self._width, self.raw)
        number = index - (self._ends[at] - len(lines))
        label = _LABELS[self.items[at].kind] if number == 0 else ""
        return [
            (f" {label:<{GUTTER - 1}}", self.palette.dim),
            *((text, self.palette.of(role)) for text, role in lines[number]),
        ]
