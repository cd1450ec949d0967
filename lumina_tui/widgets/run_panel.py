"""What panels about a run share: they read a store, repaint what has changed, grow dim with age, and export as text."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import BindingType
from textual.strip import Strip

from ..actions import bindings
from ..paint import line
from ..series import RunStore
from .panel import Drawn, State


class RunPanel(Drawn):
    """Shows a `RunStore`. Call `sync()` on each tick: it does nothing while `versions()` are the same."""

    scope = "facts"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("facts"))
    stem = "panel"  # name of an exported file

    def __init__(self, store: RunStore | None = None, *, title: str = "", id: str | None = None) -> None:
        super().__init__(title=title, id=id)
        self.store = store or RunStore()
        self._seen: tuple[object, ...] = ()

    def show(self, store: RunStore) -> None:
        """Show another run."""
        self.store, self._seen = store, ()
        self.sync()

    def versions(self) -> tuple[object, ...]:
        """What the picture depends on, besides store, size and state."""
        return ()

    def prepare(self) -> None:
        """Prepare a new picture: what `draw` needs, titles."""

    def sync(self) -> None:
        """Repaint what has changed since the last call."""
        now = (self.versions(), self.inner, self.state, self.message, self.has_focus, id(self.store))
        if now == self._seen or not self.is_attached:
            return
        self._seen = now
        self.prepare()
        self.repaint_changed()

    def aged(self, right: str) -> str:
        """The right part of the title: how old the values are while they are stale."""
        return self.message if self.state is State.STALE and self.message else right

    def _inside(self, y: int, width: int, height: int) -> Strip:
        if self._blocking or self.state is not State.STALE:
            return super()._inside(y, width, height)
        return line(width, [(text, self.palette.dim) for text, _ in self.draw(y, width, height)], base=self.rich_style)

    def on_focus(self) -> None:
        self.sync()

    def on_blur(self) -> None:
        self.sync()

    def on_resize(self) -> None:
        self.sync()

    def on_show(self) -> None:
        self.sync()

    def text(self) -> str:
        """What the panel shows, as text."""
        width, height = self.inner
        lines = ["".join(text for text, _ in self.draw(y, width, height)).rstrip() for y in range(height)]
        while lines and not lines[-1]:
            lines.pop()
        return "".join(line + "\n" for line in lines)

    def action_export(self) -> None:
        self.lumina.save_export(self.stem, "txt", self.text())
