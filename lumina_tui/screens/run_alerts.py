"""Alerts of the run that is watched: counted in the first line until they are opened, gone to from a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumina_engine.monitoring import record as rec

from ..feed import Feed
from ..paint import clean
from ..widgets.acts import Acts
from ..widgets.alert_table import AlertTable
from ..widgets.line_chart import Cursor
from ..widgets.table import Table
from .alerts import AlertSheet

REMEMBERED = 50  # runs of which is kept how many alerts were opened


class RunAlerts(Acts):
    """Mixin of a screen with a `feed`, a `cursor` that its charts share, and an `alert_table`."""

    feed: Feed | None
    cursor: Cursor
    alert_table: AlertTable
    _opened = 0  # alerts of this run that were opened
    _identity = ""  # of the run

    def expect_alerts(self, identity: str) -> None:
        """Another run is watched."""
        self._identity = identity
        opened: dict[str, int] = self.lumina.memory.get("monitor.opened_alerts", {"": 0})
        self._opened = opened.get(identity, 0)

    def count_alerts(self, alerts: list[rec.Alert]) -> tuple[int, bool]:
        """How many were not opened yet, and whether a critical one is among them."""
        fresh = alerts[min(self._opened, len(alerts)) :]
        return len(fresh), any(alert.severity == "critical" for alert in fresh)

    def watched(self) -> tuple[Path, Sequence[rec.Alert]] | None:
        if self.feed is None:
            return None
        alerts = self.feed.store.alerts
        return self.feed.run.path, alerts[min(self._opened, len(alerts)) :]

    def action_alerts(self) -> None:
        assert self.feed is not None
        store = self.feed.store
        self._opened = len(store.alerts)
        known: dict[str, int] = dict(self.lumina.memory.get("monitor.opened_alerts", {"": 0}))
        known.pop(self._identity, None)
        kept = dict(list(known.items())[-(REMEMBERED - 1) :])
        self.lumina.memory.set("monitor.opened_alerts", {**kept, self._identity: self._opened})
        badge = self.feed.badge()
        note = f"{badge.text}: {clean(badge.why)}" if badge.why and badge.role in ("warn", "bad") else ""
        self.lumina.push_screen(AlertSheet(store, note), self.go_to_step)

    def on_table_chosen(self, event: Table.Chosen) -> None:
        """Enter in the panel of alerts."""
        event.stop()
        if self.feed is not None and event.table is self.alert_table:
            alert = self.feed.store.alerts[int(event.key)]
            self.go_to_step(alert.step)

    def go_to_step(self, step: int | None) -> None:
        """Set the crosshair of all charts on a step, and bring it into view."""
        if step is None:
            return
        self.cursor.step = step
        charts: Any = getattr(self, "charts", [])
        for chart in charts:
            chart.show_step()
