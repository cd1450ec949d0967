"""The conversation as it is read: wrapped lines, follows the newest while one is at the bottom. Text is never markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from rich.cells import cell_len, get_character_cell_size
from textual.binding import BindingType
from textual.events import Key, MouseScrollDown, MouseScrollUp
from textual.message import Message

from lumina_engine.text import safe_text

from ..actions import bindings
from ..paint import Piece
from .panel import Drawn

GUTTER = 5  # cells before the text, for who speaks
_LABELS = {"user": "You", "assistant": "A", "note": "", "error": "!"}
_ROLES = {"user": "accent", "assistant": "text", "note": "dim", "error": "bad"}


def wrap(text: str, width: int) -> list[str]:
    """One paragraph (no newline) in lines of at most `width` cells, broken at spaces where there are any."""
    if width < 1:
        return []
    lines: list[str] = []
    start = cells = 0
    space = -1  # index behind the last space of this line
    for index, letter in enumerate(text):
        size = 1 if letter < "\x7f" else get_character_cell_size(letter)
        if cells + size > width:
            if letter == " ":  # the space that would stand at the edge is the break
                lines.append(text[start:index])
                start, cells, space = index + 1, 0, -1
                continue
            cut = space if space > start else index
            lines.append(text[start:cut].rstrip(" ") if cut == space else text[start:cut])
            start, space = cut, -1
            cells = cell_len(text[start:index])
        cells += size
        if letter == " ":
            space = index + 1
    lines.append(text[start:])
    return lines


@dataclass
class Item:
    """Something that was said. Lines of whole paragraphs are kept; only the last paragraph is wrapped again when text comes."""

    kind: str  # user | assistant | note | error
    text: str = ""
    foot: str = ""  # figures below a reply
    _width: int = -1
    _done: int = 0  # characters whose lines are in _lines
    _lines: list[str] = field(default_factory=list)

    def lines(self, width: int) -> list[tuple[str, str]]:
        """(line, role) in `width` cells."""
        if width != self._width:
            self._width, self._done, self._lines = width, 0, []
        end = self.text.rfind("\n") + 1
        if end > self._done:
            for paragraph in self.text[self._done : end - 1].split("\n"):
                self._lines += wrap(_clean(paragraph), width)
            self._done = end
        rest = wrap(_clean(self.text[self._done :]), width) if self._done < len(self.text) or not self._lines else []
        role = _ROLES[self.kind]
        found = [(line, role) for line in (*self._lines, *rest)]
        return found + [(line, "dim") for line in wrap(_clean(self.foot), width)] if self.foot else found


def _clean(text: str) -> str:
    return safe_text(text.expandtabs(4)).replace("\r", "␍")


class Transcript(Drawn):
    """Paints items; `changed()` after editing the last one."""

    scope = "transcript"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("transcript"))

    class Escaped(Message):
        """Esc was pressed here."""

    def __init__(self, *, title: str = "", id: str | None = None, classes: str | None = None) -> None:
        super().__init__(title=title, id=id, classes=classes)
        self.items: list[Item] = []
        self._top = 0
        self._follows = True
        self._seen = 0  # number of lines when the reader left the bottom
        self._lines: list[tuple[str, str, str]] = []  # label, text, role

    # content

    def add(self, kind: str, text: str) -> Item:
        """Append an item."""
        item = Item(kind, text)
        self.items.append(item)
        self.changed()
        return item

    def clear(self) -> None:
        self.items.clear()
        self._follows, self._top = True, 0
        self.changed()

    def changed(self) -> None:
        """Wrap what is new and repaint."""
        width = self.inner[0] - GUTTER - 1
        lines: list[tuple[str, str, str]] = []
        for item in self.items:
            for number, (text, role) in enumerate(item.lines(width)):
                lines.append((_LABELS[item.kind] if number == 0 else "", text, role))
        self._lines = lines
        self._place()
        self.refresh()

    def _place(self) -> None:
        bottom = max(0, len(self._lines) - self.inner[1])
        if self._follows or self._top >= bottom:
            self._follows, self._top = True, bottom
            self.set_foot(self._foot_left, "")
        else:
            new = max(0, len(self._lines) - self._seen)
            self.set_foot(self._foot_left, f"G {new} new lines" if new else "G newest")

    def on_resize(self) -> None:
        self.changed()

    # scrolling

    def _scroll(self, top: int) -> None:
        bottom = max(0, len(self._lines) - self.inner[1])
        if self._follows:
            self._seen = len(self._lines)
        self._top = max(0, min(top, bottom))
        self._follows = self._top >= bottom
        self._place()
        self.refresh()

    def action_down(self) -> None:
        self._scroll(self._top + 1)

    def action_up(self) -> None:
        self._scroll(self._top - 1)

    def action_top(self) -> None:
        self._scroll(0)

    def action_bottom(self) -> None:
        self._scroll(len(self._lines))

    def action_page_down(self) -> None:
        self._scroll(self._top + max(1, self.inner[1] - 1))

    def action_page_up(self) -> None:
        self._scroll(self._top - max(1, self.inner[1] - 1))

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
        if not 0 <= index < len(self._lines):
            return ()
        label, text, role = self._lines[index]
        return [(f" {label:<{GUTTER - 1}}", self.palette.dim), (text, self.palette.of(role))]
