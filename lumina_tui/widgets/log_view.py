"""The tail of a growing text file: ring of lines, follow, filter; paints only what is in view."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from textual.binding import BindingType
from textual.events import MouseScrollDown, MouseScrollUp

from lumina_engine.text import safe_text

from ..actions import bindings
from ..paint import Piece
from .panel import Drawn

KEEP = 20_000  # lines
FIRST = 1 << 20  # bytes read from the end at first
SLICE = 1 << 18  # bytes read at once afterwards
LINE = 16_384  # characters of a line that are kept


class TextTail:
    """Lines of a file as it grows. A file that shrinks or is replaced is read again from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        self.dropped = 0  # lines forgotten at the front
        self.error = ""
        self._offset = -1
        self._inode = 0
        self._rest = b""

    def poll(self) -> bool:
        """Read what is new, at most a slice; True if there is something."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self.error = "" if isinstance(error, FileNotFoundError) else f"{self.path}: {error.strerror}"
            return False
        try:
            status = os.fstat(descriptor)
            self.error = ""
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._offset = max(0, status.st_size - FIRST) if self._offset < 0 else 0
                self._inode, self._rest = status.st_ino, b""
                cut = self._offset > 0
            else:
                cut = False
            data = os.pread(descriptor, FIRST if cut else SLICE, self._offset)
        finally:
            os.close(descriptor)
        if not data:
            return False
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > 1 << 20:
            whole, self._rest = [*whole, self._rest], b""
        fresh = [_text(line) for line in (whole[1:] if cut else whole)]
        self.lines += fresh
        if len(self.lines) > KEEP:
            self.dropped += len(self.lines) - KEEP
            del self.lines[: len(self.lines) - KEEP]
        return bool(fresh)


def _text(line: bytes) -> str:
    text = line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")  # a progress bar shows its last state
    return safe_text(text[:LINE]).replace("\t", "    ")


class LogView(Drawn):
    """Shows a `TextTail`. Call `sync()` on each tick."""

    scope = "log"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("log"))

    def __init__(self, *, title: str = "engine.log", id: str | None = None) -> None:
        super().__init__(title=title, id=id)
        self._base_title = title
        self.tail: TextTail | None = None
        self.filter = ""
        self._shown: list[str] = []
        self._top: int | None = None  # None: follows the newest line
        self._forgotten = 0

    def show(self, path: Path) -> None:
        """Show another file."""
        self.tail = TextTail(path)
        self._shown, self._top, self._forgotten = [], None, 0
        self.sync()
        self.refresh()

    def sync(self) -> None:
        """Read what is new and repaint if it is in view."""
        if self.tail is None or not self.tail.poll():
            return
        dropped, self._forgotten = self.tail.dropped - self._forgotten, self.tail.dropped
        self._select()
        if self._top is not None and not self.filter:
            self._top = max(0, self._top - dropped)
        self._titles()
        self.refresh()

    def _select(self) -> None:
        lines = self.tail.lines if self.tail is not None else []
        words = self.filter.lower().split()
        self._shown = [line for line in lines if all(word in line.lower() for word in words)] if words else lines

    def _titles(self) -> None:
        self.set_title(self._base_title, f"/{self.filter}  {len(self._shown)} lines" if self.filter else "")
        below = len(self._shown) - self._first() - self.inner[1]
        self.set_foot("" if self._top is None else f"f follows: {max(0, below):,} lines below")

    def _first(self) -> int:
        height = self.inner[1]
        last = max(0, len(self._shown) - height)
        return last if self._top is None else min(self._top, last)

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        index = self._first() + y
        if index >= len(self._shown):
            if y == 0 and not self._shown:
                text = self.tail.error if self.tail is not None and self.tail.error else "nothing was written yet"
                return [(" " + text, self.palette.dim)]
            return ()
        line = self._shown[index]
        lowered = line[:200].lower()
        if "error" in lowered or "traceback" in lowered or "critical" in lowered:
            style = self.palette.bad
        elif "warn" in lowered:
            style = self.palette.warn
        else:
            style = self.palette.text if index >= len(self._shown) - 1 else self.palette.dim
        return [(" ", None), (line, style)]

    # actions

    def why_not(self, action_id: str) -> str | None:
        return "there is no log yet" if self.tail is None else None

    def _scroll(self, lines: int) -> None:
        first = self._first() + lines
        last = max(0, len(self._shown) - self.inner[1])
        self._top = None if first >= last else max(0, first)
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
        self._scroll(-len(self._shown))

    def action_bottom(self) -> None:
        self._scroll(len(self._shown))

    def action_follow(self) -> None:
        self.action_bottom()

    def action_filter(self) -> None:
        self.lumina.prompt(
            "Show lines with", self.set_filter, value=self.filter, lines=["All words must occur; empty shows every line."]
        )

    def set_filter(self, text: str) -> None:
        """Show only lines with all these words."""
        self.filter = " ".join(text.split())
        self._top = None
        self._select()
        self._titles()
        self.refresh()

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        event.stop()
        self._scroll(3)

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        event.stop()
        self._scroll(-3)

    def on_resize(self) -> None:
        self._titles()
