"""Home: all runs below the root."""

from __future__ import annotations

from collections.abc import Iterable

from textual.widget import Widget

from .base import Drawn, LuminaScreen, State


class HomeScreen(LuminaScreen):
    scope = "home"
    number = 1
    heading = "Home"

    def content(self) -> Iterable[Widget]:
        yield Drawn(title="runs", id="runs")

    def on_mount(self) -> None:
        self.query_one("#runs", Drawn).set_state(State.EMPTY, "No runs in ./runs. a starts one from a preset.")
