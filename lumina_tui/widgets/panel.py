"""Panels: framed parts of a screen that say what they are doing (empty, loading, stale, error).

`Panel` holds other widgets; `Drawn` paints its own lines and is what charts, tables and maps derive from. Both have the same
titles and states.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.style import Style
from textual.content import Content
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from ..paint import Piece, clean, fit, line
from .acts import Acts

if TYPE_CHECKING:
    from ..terminal import Look, Palette


class State(Enum):
    """What a panel can show."""

    LIVE = "live"
    EMPTY = "empty"  # one sentence and a key
    LOADING = "loading"  # what, and how far
    STALE = "stale"  # content stays, dimmed, with its age
    ERROR = "error"  # cause, file, and r to retry


class Panel(Acts, Widget):
    """A framed container. Children are hidden while the state is empty or error, and the message stands in their place."""

    DEFAULT_CSS = """
    Panel { border: solid $line; layout: vertical; overflow: hidden; height: 1fr; border-title-color: $text-dim;
            border-subtitle-color: $text-dim; border-title-style: none; border-subtitle-style: none; }
    Panel:focus, Panel:focus-within { border: solid $focus; border-title-color: $foreground; }
    .-ascii Panel { border: ascii $line; }
    .-ascii Panel:focus, .-ascii Panel:focus-within { border: ascii $focus; }
    Panel.-message > * { display: none; }
    """
    ALLOW_MAXIMIZE = True

    def __init__(self, *children: Widget, title: str = "", id: str | None = None, classes: str | None = None) -> None:
        super().__init__(*children, id=id, classes=classes)
        self._left, self._right = title, ""
        self._foot_left, self._foot_right = "", ""
        self.state = State.LIVE
        self.message = ""

    @property
    def look(self) -> Look:
        return self.lumina.look

    @property
    def palette(self) -> Palette:
        return self.look.palette

    def set_title(self, left: str, right: str = "") -> None:
        """The text in the upper frame line: outside text is made safe here and never parsed as markup."""
        if (left, right) != (self._left, self._right):
            self._left, self._right = left, right
            self._titles_changed(top=True)

    def set_foot(self, left: str, right: str = "") -> None:
        """The text in the lower frame line."""
        if (left, right) != (self._foot_left, self._foot_right):
            self._foot_left, self._foot_right = left, right
            self._titles_changed(top=False)

    def set_state(self, state: State, message: str = "") -> None:
        """Show a state; for empty, loading and error `message` says what, why and which key helps."""
        if (state, message) == (self.state, self.message):
            return
        self.state, self.message = state, message
        self.set_class(self._blocking, "-message")
        self.set_class(state is State.STALE, "-stale")
        self.set_class(state is State.ERROR, "-error")
        self.refresh()

    @property
    def _blocking(self) -> bool:
        return bool(self.message) and self.state in (State.EMPTY, State.ERROR, State.LOADING)

    # frame

    def on_mount(self) -> None:
        self._titles_changed(top=True)
        self._titles_changed(top=False)

    def on_resize(self) -> None:
        self._titles_changed(top=True)
        self._titles_changed(top=False)

    def _titles_changed(self, top: bool) -> None:
        if not self.is_attached:
            return
        room = self.outer_size.width - 4
        text = frame_text(
            self._left if top else self._foot_left, self._right if top else self._foot_right, room, self.look.box[4]
        )
        content = Content(text) if text else None
        if top:
            self.border_title = content
        else:
            self.border_subtitle = content

    # content

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        if self._blocking:
            lines = message_lines(self.message, width)
            start = max(0, (self.size.height - len(lines)) // 2) if self.state is not State.ERROR else 0
            text = lines[y - start] if start <= y < start + len(lines) else ""
            style = self.palette.bad if self.state is State.ERROR else self.palette.dim
            return line(width, [(text, style)], base=self.rich_style)
        return Strip.blank(width, self.rich_style)


class Drawn(Panel, can_focus=True):
    """A panel that paints itself: override `draw(y, width, height)`, which gives one line inside the frame."""

    DEFAULT_CSS = """
    Drawn { border: none; }
    Drawn:focus, Drawn:focus-within { border: none; }
    .-ascii Drawn, .-ascii Drawn:focus, .-ascii Drawn:focus-within { border: none; }
    """
    framed = True

    def __init__(self, *children: Widget, title: str = "", id: str | None = None, classes: str | None = None) -> None:
        super().__init__(*children, title=title, id=id, classes=classes)
        self._drawn: list[Sequence[Piece]] = []

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        """The pieces of line `y` (0 … height-1) inside the frame."""
        return ()

    @property
    def inner(self) -> tuple[int, int]:
        """Columns and lines inside the frame; never negative."""
        width, height = self.size
        border = 2 if self.framed else 0
        return max(0, width - border), max(0, height - border)

    def refresh_lines_inside(self, y: int, count: int = 1) -> None:
        """Repaint lines inside the frame only."""
        self.refresh(Region(0, y + (1 if self.framed else 0), self.size.width, count))

    def repaint_changed(self) -> None:
        """Draw every line and repaint those that differ from the last call, from the first piece that differs."""
        width, height = self.inner
        lines = [self.draw(y, width, height) for y in range(height)]
        before, self._drawn = self._drawn, lines
        if len(before) != len(lines) or self._blocking:
            self.refresh()
            return
        edge = 1 if self.framed else 0
        for y, (old, new) in enumerate(zip(before, lines, strict=True)):
            if old != new:
                same = 0
                for a, b in zip(old, new, strict=False):
                    if a != b:
                        break
                    same += cell_len(a[0])
                self.refresh(Region(edge + min(same, width - 1), edge + y, max(1, width - same), 1))

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()

    def _titles_changed(self, top: bool) -> None:
        if self.is_attached and self.framed:
            height = self.size.height
            if height > 0:
                self.refresh(Region(0, 0 if top else height - 1, self.size.width, 1))

    def frame_style(self) -> Style:
        return self.palette.accent if self.has_focus else self.palette.faint

    def render_line(self, y: int) -> Strip:
        width, height = self.size
        if not self.framed:
            return self._inside(y, width, height)
        tl, tr, bl, br, horizontal, vertical = self.look.box
        edge = self.frame_style()
        if width < 3 or height < 3:
            return self._inside(y, width, height)
        if y in (0, height - 1):
            left, right = (self._left, self._right) if y == 0 else (self._foot_left, self._foot_right)
            a, b = (tl, tr) if y == 0 else (bl, br)
            style = self.palette.title if y == 0 and self.has_focus else self.palette.dim
            return line(width, self._edge(a, left, right, b, horizontal, width, edge, style), base=self.rich_style)
        inside = self._inside(y - 1, width - 2, height - 2)
        side = line(1, [(vertical, edge)], base=self.rich_style)
        return Strip.join([side, inside, side])

    @staticmethod
    def _edge(a: str, left: str, right: str, b: str, dash: str, width: int, edge: Style, style: Style) -> list[Piece]:
        room = width - 6
        left, right = clean(left), clean(right)
        if cell_len(left) + cell_len(right) + (3 if right else 0) > room:
            right = right if cell_len(right) <= room - cell_len(left) - 3 else ""
            left = fit(left, min(room, cell_len(left)))
        pieces: list[Piece] = [(a, edge)]
        used = 2
        if left and room > 0:
            pieces += [(dash, edge), (f" {left} ", style)]
            used += 3 + cell_len(left)
        tail = 3 + cell_len(right) if right else 0
        pieces.append((dash * max(0, width - used - tail), edge))
        if right:
            pieces += [(f" {right} ", style), (dash, edge)]
        pieces.append((b, edge))
        return pieces

    def _inside(self, y: int, width: int, height: int) -> Strip:
        if self._blocking:
            return self._message_line(y, width, height)
        return line(width, self.draw(y, width, height), base=self.rich_style)

    def _message_line(self, y: int, width: int, height: int) -> Strip:
        lines = message_lines(self.message, width - 2)
        start = max(0, (height - len(lines)) // 2)
        text = lines[y - start] if start <= y < start + len(lines) else ""
        style = self.palette.bad if self.state is State.ERROR else self.palette.dim
        return line(width, [(" " + text, style)], base=self.rich_style)


def message_lines(message: str, width: int) -> list[str]:
    """`message` wrapped at words; newlines stay."""
    import textwrap

    if width < 1:
        return []
    lines: list[str] = []
    for part in message.split("\n"):
        lines += textwrap.wrap(clean(part), width) or [""]
    return lines


def frame_text(left: str, right: str, room: int, dash: str) -> str:
    """Title text with an optional right part, joined by the frame's own line."""
    left, right = clean(left), clean(right)
    if room <= 0 or not (left or right):
        return ""
    gap = room - cell_len(left) - cell_len(right) - 2
    if not right:
        return left if cell_len(left) <= room - 2 else fit(left, max(0, room - 2))
    if gap < 3:
        return left if cell_len(left) <= room - 2 else fit(left, max(0, room - 2))
    return f"{left} {dash * (gap - 2)} {right}"
