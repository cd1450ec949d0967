"""The alerts of a run as a table."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lumina_engine.monitoring import record as rec

from ..paint import whole
from ..series import RunStore
from .panel import State
from .table import Column, Row, Table
from .text_panel import Line

COLUMNS = (
    Column("t", "time", 5),
    Column("severity", "severity", 8),
    Column("step", "step", 8, "right", rank=1),
    Column("code", "code", 16, rank=2),
    Column("message", "what", 12, grow=True),
)
ROLES = {"info": "accent", "warning": "warn"}
SHOWN = 500  # alerts, the newest


class AlertTable(Table):
    """Newest first. Enter posts `Chosen` with the place of the alert in the store's list as key."""

    def __init__(self, *, id: str | None = None, advice: bool = True) -> None:
        super().__init__(COLUMNS, title="alerts", id=id)
        self.advice = advice  # a line below each with what to do
        self.store = RunStore()
        self._seen: tuple[object, ...] = ()

    def show(self, store: RunStore) -> None:
        """Show another run."""
        self.store, self._seen = store, ()
        self.sync()

    def sync(self) -> None:
        """Take what is new."""
        now = (len(self.store.alerts), id(self.store))
        if now != self._seen:
            self._seen = now
            self.set_rows(alert_rows(self.store.alerts, self.advice))
            count = len(self.store.alerts)
            self.set_state(State.LIVE if count else State.EMPTY, "" if count else "No alerts in this run.")
            self.set_title(f"alerts  {count}" if count else "alerts", "Enter goes there" if count else "")


def message_of(alert: rec.Alert) -> str:
    """The message where the step stands beside it: without the step with which some begin."""
    return alert.message.removeprefix(f"step {alert.step}: ")


def alert_rows(alerts: Sequence[rec.Alert], advice: bool) -> list[Row]:
    """Rows of the newest alerts, newest first; each may have its advice below it."""
    rows: list[Row] = []
    for index in range(len(alerts) - 1, max(-1, len(alerts) - 1 - SHOWN), -1):
        alert = alerts[index]
        role = ROLES.get(alert.severity, "bad")
        clock = time.strftime("%H:%M", time.localtime(alert.t)) if alert.t else "-"
        cells = (
            (clock, "dim"),
            (alert.severity, role),
            (whole(alert.step), "text"),
            (alert.code, role),
            (message_of(alert), "text"),
        )
        rows.append(Row(str(index), cells))
        if advice and alert.recommendation:
            rows.append(Row(f"{index}+", ((alert.recommendation, "dim"),), rule=True, note=True))
    return rows


def alert_lines(alert: rec.Alert | None) -> list[Line]:
    """One alert in full: what, where, what to do."""
    if alert is None:
        return [[("No alerts in this run.", "dim")]]
    where = f"at step {whole(alert.step)}" if alert.step is not None else ""
    role = ROLES.get(alert.severity, "bad")
    return [
        [(f"{alert.severity} ", role), (alert.code, role), (f"  {where}", "dim")],
        [(message_of(alert), "text")],
        [(alert.recommendation or "No advice came with it.", "accent" if alert.recommendation else "dim")],
    ]
