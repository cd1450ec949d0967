"""One widget on a screen of the real program, for tests of panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textual.widget import Widget

import lumina_tui
from lumina_tui.application import LuminaApp
from lumina_tui.screens.base import LuminaScreen
from lumina_tui.terminal import Look


class Alone(LuminaScreen):
    """Nothing but the widget between first and last line; works at every size."""

    smallest = (0, 0)

    def __init__(self, widget: Widget) -> None:
        super().__init__()
        self.widget = widget

    def content(self) -> list[Widget]:
        return [self.widget]


class Stage(LuminaApp):
    """The program with one panel on its first screen."""

    CSS_PATH = Path(lumina_tui.__file__).with_name("app.tcss")

    def __init__(self, widget: Widget, look: Look | None = None) -> None:
        super().__init__(Path("/nonexistent"), look=look or Look())
        self.widget = widget

    def get_default_screen(self) -> Any:
        return Alone(self.widget)
