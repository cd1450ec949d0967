"""Jump mode: a letter on everything that can have the focus; typing it moves there."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from textual import events
from textual.content import Content
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Static

from .layer import Layer

if TYPE_CHECKING:
    from textual.app import ComposeResult

LETTERS = "asdfghjklqwertyuiopzxcvbnm"


def labels(count: int) -> list[str]:
    """`count` different labels, all of one length: one letter, or two if there are too many."""
    length = 1
    while len(LETTERS) ** length < count:
        length += 1
    return ["".join(letters) for letters in itertools.islice(itertools.product(LETTERS, repeat=length), count)]


class Jump(Layer[Widget]):
    """Gives the chosen widget, or None. Lies over `below` without hiding it."""

    DEFAULT_CSS = """
    Jump Static { position: absolute; width: auto; height: 1; text-style: bold reverse; }
    """

    def __init__(self, below: Screen) -> None:
        super().__init__()
        seen = [widget for widget in below.focus_chain if widget.region.area and widget.is_on_screen]
        self.targets = dict(zip(labels(len(seen)), seen, strict=True))
        self.typed = ""

    def compose(self) -> ComposeResult:
        for label, widget in self.targets.items():
            tag = Static(Content(f" {label} "), markup=False)
            tag.styles.offset = (widget.region.x + 2, widget.region.y)
            yield tag

    def on_key(self, event: events.Key) -> None:
        if event.character is None or event.key == "escape":
            return
        event.stop()
        self.typed += event.character
        if self.typed in self.targets:
            self.dismiss(self.targets[self.typed])
        elif not any(label.startswith(self.typed) for label in self.targets):
            self.dismiss(None)
