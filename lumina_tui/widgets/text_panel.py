"""A framed text of styled lines: wrapped at words, scrolled with the keys of every list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from textual.binding import BindingType
from textual.events import MouseScrollDown, MouseScrollUp

from ..actions import bindings
from ..paint import Piece, clean
from .panel import Drawn

Part = tuple[str, str]  # text (made safe when painted), role of the palette
Line = Sequence[Part]


def wrapped(parts: Line, width: int, indent: int = 2) -> list[list[Part]]:
    """A line of parts broken at words into lines of at most `width` cells; later lines are indented."""
    if width < 4:
        return [[(clean(text), role) for text, role in parts]]
    lines: list[list[Part]] = [[]]
    used = 0
    for text, role in parts:
        for word in _words(clean(text)):
            cells = cell_len(word)
            if used + cells > width and used > indent and word.strip():
                lines.append([(" " * indent, role)])
                used = indent
            if word.isspace() and used + cells > width:
                continue
            for piece in _pieces(word, max(1, width - used), width - indent):
                if used + cell_len(piece) > width:
                    lines.append([(" " * indent, role)])
                    used = indent
                lines[-1].append((piece, role))
                used += cell_len(piece)
    return [_joined(parts) for parts in lines]


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one role as one part: fewer styles on the wire."""
    out: list[Part] = []
    for text, role in parts:
        if out and out[-1][1] == role:
            out[-1] = (out[-1][0] + text, role)
        else:
            out.append((text, role))
    return out


def _words(text: str) -> list[str]:
    """Words and the spaces between them."""
    import re

    return re.findall(r"\s+|\S+", text)


def _pieces(word: str, first: int, rest: int) -> list[str]:
    """A word that is longer than a line, cut to fit."""
    if cell_len(word) <= max(first, rest):
        return [word]
    out, part, room = [], "", first
    for character in word:
        if cell_len(part + character) > room:
            out.append(part)
            part, room = "", max(1, rest)
        part += character
    return [*out, part]


class TextPanel(Drawn):
    """Lines of text in a frame. `focusable=False` makes it a display that is never stopped at."""

    scope = "text"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("text"))

    def __init__(
        self, *, title: str = "", id: str | None = None, classes: str | None = None, focusable: bool = True, indent: int = 2
    ) -> None:
        super().__init__(title=title, id=id, classes=classes)
        self.can_focus = focusable
        self._text: list[Line] = []
        self._indent = indent
        self._top = 0
        self._about: object = None
        self._wrapped: tuple[int, list[list[Part]]] = (-1, [])

    def set_lines(self, lines: Sequence[Line], about: object = None) -> None:
        """Show these lines; nothing is repainted if they are the same. A text `about` something else begins at its top."""
        if about != self._about:
            self._about, before = about, self._top
            self._scroll(-before)
        if list(lines) == self._text:
            return
        self._text = list(lines)
        self._wrapped = (-1, [])
        self._scroll(0)
        self.refresh()

    def lines_at(self, width: int) -> list[list[Part]]:
        """The wrapped lines for a width in cells."""
        if self._wrapped[0] != width:
            self._wrapped = (width, [part for parts in self._text for part in wrapped(parts, width, self._indent)])
        return self._wrapped[1]

    def natural_height(self, width: int) -> int:
        """Lines that the whole text takes at a width inside the frame."""
        return len(self.lines_at(width - 2))

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        lines = self.lines_at(width - 2)
        at = y + self._top
        if at >= len(lines):
            return ()
        return [(" ", None), *((text, self.palette.of(role)) for text, role in lines[at])]

    def _scroll(self, step: int) -> None:
        width, height = self.inner
        most = max(0, len(self.lines_at(width - 2)) - height) if width > 2 else 0
        before, self._top = self._top, max(0, min(self._top + step, most))
        hidden = most - self._top
        self.set_foot(self._foot_left, f"{hidden} more line{'s' if hidden > 1 else ''}" if hidden > 0 else "")
        if before != self._top:
            self.refresh()

    def on_resize(self) -> None:
        self._scroll(0)

    def action_down(self) -> None:
        self._scroll(1)

    def action_up(self) -> None:
        self._scroll(-1)

    def action_page_down(self) -> None:
        self._scroll(max(1, self.inner[1] - 1))

    def action_page_up(self) -> None:
        self._scroll(-max(1, self.inner[1] - 1))

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        event.stop()
        self._scroll(3)

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        event.stop()
        self._scroll(-3)
