"""All alerts of a run with what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.containers import Vertical

from lumina_engine.monitoring import record as rec

from ..paint import clean
from ..series import RunStore
from ..widgets.alert_table import AlertTable, alert_lines
from ..widgets.table import Table
from ..widgets.text_panel import Line, TextPanel
from .layer import Layer

if TYPE_CHECKING:
    from textual.app import ComposeResult


class AlertSheet(Layer[int]):
    """All alerts; the chosen one in full below. Enter gives its step, Esc nothing."""

    scope = "alerts"
    DEFAULT_CSS = """
    AlertSheet { align: center middle; background: $background 60%; }
    AlertSheet > Vertical { width: 96%; max-width: 120; height: 80%; background: $surface; }
    AlertSheet AlertTable { height: 1fr; }
    AlertSheet TextPanel { height: 8; }
    """

    def __init__(self, store: RunStore, note: str = "") -> None:
        super().__init__()
        self.store, self.note = store, note
        self.table = AlertTable(advice=False)
        self.detail = TextPanel(title="what to do", focusable=False)

    def compose(self) -> ComposeResult:
        yield Vertical(self.table, self.detail)

    def on_mount(self) -> None:
        self.table.show(self.store)
        self.table.focus()
        self._detail(self.table.cursor_key)
        self.set_interval(0.5, self.table.sync)

    def _alert(self, key: str | None) -> rec.Alert | None:
        return self.store.alerts[int(key)] if key is not None and int(key) < len(self.store.alerts) else None

    def _detail(self, key: str | None) -> None:
        head: list[Line] = [[(clean(self.note), "warn")]] if self.note else []
        self.detail.set_lines([*head, *alert_lines(self._alert(key))])

    def on_table_moved(self, event: Table.Moved) -> None:
        self._detail(event.key)

    def on_table_chosen(self, event: Table.Chosen) -> None:
        event.stop()
        alert = self._alert(event.key)
        self.dismiss(alert.step if alert is not None else None)

    def action_copy(self) -> None:
        alert = self._alert(self.table.cursor_key)
        if alert is not None:
            self.lumina.copy_text("\n".join("".join(clean(text) for text, _ in line) for line in alert_lines(alert)))
