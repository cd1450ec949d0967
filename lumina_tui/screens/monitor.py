"""Monitor: one run, live. Layout and routing; the feed, the store and the panels do the work."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from textual.containers import Horizontal
from textual.content import Content
from textual.widget import Widget

from lumina_engine.run.directory import RunDirectory, RunError, find, list_runs

from ..actions import Action
from ..feed import Feed, Mode
from ..paint import clean, duration, number, whole
from ..series import RunStore
from ..widgets.expert_map import ExpertMap
from ..widgets.line_chart import Cursor, LineChart
from ..widgets.log_view import LogView
from ..widgets.run_panels import HardwarePanel, ProgressLine, StatusLine, TrendPanel
from ..widgets.run_start import StartPanel, Ticker
from .base import LuminaScreen, State
from .run_commands import RunCommands

CHARTS = ("loss", "tokens_per_s", "grad_norm", "lr")


class MonitorScreen(RunCommands, LuminaScreen):
    """Watches `run` (a name below the root or a path); without one, the run that was active last."""

    scope = "monitor"
    number = 5
    heading = "Monitor"
    ALLOW_IN_MAXIMIZED_VIEW: ClassVar[str] = "TitleBar, KeyBar, ProgressLine, StatusLine"
    DEFAULT_CSS = """
    MonitorScreen #top { height: 1fr; }
    MonitorScreen #loss { width: 1fr; height: 1fr; }
    MonitorScreen #experts { width: 30; height: 1fr; }
    MonitorScreen.-dense #experts { display: none; }
    MonitorScreen #charts { height: 12; display: none; }
    MonitorScreen #charts LineChart { width: 1fr; height: 1fr; }
    MonitorScreen #trend { height: 6; }
    MonitorScreen #bottom { height: 9; display: none; }
    MonitorScreen #devices { width: 1fr; height: 1fr; display: none; }
    MonitorScreen #log { width: 2fr; height: 1fr; }
    MonitorScreen.-logging #bottom { display: block; }
    MonitorScreen.-logging.-compact #bottom { height: 1fr; }
    MonitorScreen.-logging.-compact #trend { display: none; }
    MonitorScreen #start { display: none; height: 8; }
    MonitorScreen.-wide #experts { width: 52; }
    MonitorScreen.-wide #charts { display: block; }
    MonitorScreen.-wide #trend { display: none; }
    MonitorScreen.-wide #bottom { display: block; height: 11; }
    MonitorScreen.-wide #devices { display: block; }
    MonitorScreen.-starting #start { display: block; }
    MonitorScreen.-starting #top, MonitorScreen.-starting #charts, MonitorScreen.-starting #trend { display: none; }
    MonitorScreen.-starting #bottom { display: block; height: 1fr; }
    MonitorScreen.-starting #devices { display: none; }
    MonitorScreen.-empty #experts, MonitorScreen.-empty #charts, MonitorScreen.-empty #trend,
    MonitorScreen.-empty #bottom { display: none; }
    MonitorScreen Ticker { display: none; }
    MonitorScreen.-tiny Ticker { display: block; }
    MonitorScreen.-tiny #top, MonitorScreen.-tiny #charts, MonitorScreen.-tiny #bottom, MonitorScreen.-tiny #trend,
    MonitorScreen.-tiny #start, MonitorScreen.-tiny ProgressLine, MonitorScreen.-tiny StatusLine,
    MonitorScreen.-tiny TooSmall { display: none; }
    """

    def __init__(self, *, run: str | Path | None = None) -> None:
        super().__init__()
        self.feed: Feed | None = None
        self._wanted = run
        self._log_chosen: bool | None = None  # None: as the size suggests
        self._seen_alerts = 0
        self._rung = 0
        self._mode: Mode | None = None
        cursor = Cursor()
        self.charts = [LineChart(metric=name, cursor=cursor, id=name) for name in CHARTS]
        self.loss = self.charts[0]
        self.experts = ExpertMap(id="experts")
        self.trend, self.devices = TrendPanel(id="trend"), HardwarePanel(id="devices")
        self.log_view = LogView(id="log")
        self.progress, self.status = ProgressLine(), StatusLine()
        self.start, self.ticker = StartPanel(id="start"), Ticker()

    def content(self) -> Iterable[Widget]:
        yield self.progress
        yield self.ticker
        yield self.start
        yield Horizontal(self.loss, self.experts, id="top")
        yield Horizontal(*self.charts[1:], id="charts")
        yield self.trend
        yield Horizontal(self.devices, self.log_view, id="bottom")
        yield self.status

    # choosing a run

    async def on_mount(self) -> None:
        self.loss.set_state(State.LOADING, "opening the run …")
        self.loss.focus()
        self.lumina.spawn(self._watch(self._wanted))

    def retarget(self, *, run: str | Path | None = None) -> bool:  # type: ignore[override]
        self.lumina.spawn(self._watch(run))
        return True

    async def _watch(self, wanted: str | Path | None) -> None:
        root = self.lumina.runs_root
        try:
            run = await asyncio.to_thread(_find, wanted, root)
        except RunError as error:
            self._nothing(str(error))
            return
        if run is None:
            self._nothing(f"No runs in {root}. 1 Home starts one.")
            return
        old, self.feed = self.feed, None
        if old is not None:
            await old.close()
        feed = Feed(run, hz=self.look.hz)
        self._seen_alerts = self._rung = 0
        self.remove_class("-empty")
        for chart in self.charts:
            chart.set_state(State.LIVE)
            chart.show(feed.store)
        self.experts.show(feed.store)
        self.trend.show(feed.store)
        self.devices.show(feed.store)
        self.progress.show(feed)
        self.status.show(feed)
        self.start.show(feed)
        self.ticker.show(feed)
        self.log_view.show(run.log_path)
        feed.start()
        self.feed = feed
        self.tick()

    def _nothing(self, message: str) -> None:
        if self.feed is None:
            self.add_class("-empty")
            self.loss.set_state(State.EMPTY, clean(message))
        else:
            self.lumina.notice(message, "error")

    async def on_unmount(self) -> None:
        if self.feed is not None:
            await self.feed.close()

    @property
    def store(self) -> RunStore | None:
        return self.feed.store if self.feed is not None else None

    # each tick

    def tick(self) -> None:
        feed = self.feed
        if feed is None or not self.is_attached:
            return
        if feed.store is not self.loss.store:  # the file was replaced
            self.lumina.spawn(self._watch(feed.run.path))
            return
        self._frame(feed)
        for chart in self.charts:
            if chart.is_on_screen:
                chart.sync()
        for panel in (self.experts, self.trend, self.devices, self.log_view):
            if panel.is_on_screen:
                panel.sync()
        for part in (
            self.progress,
            self.status,
            self.start,
            self.ticker,
        ):
            part.sync()

    def _frame(self, feed: Feed) -> None:
        feed.hz = self.lumina.rate
        store, badge = feed.store, feed.badge()
        state = "crashed" if feed.mode is Mode.DEAD else store.state or ("" if feed.mode is Mode.LOADING else "preparing")
        fresh = store.alerts[self._seen_alerts :]
        critical = sum(alert.severity == "critical" for alert in fresh)
        if critical > self._rung:
            self.app.bell()
        self._rung = critical
        before = (self.state_word, self._mode)
        self._mode = feed.mode
        self.set_frame(
            subject=feed.run.name,
            state=state,
            badge=badge.text,
            badge_role=badge.role,
            alerts=len(fresh),
            critical=critical > 0,
        )
        if before != (state, feed.mode):
            self.refresh_keys()
        empty = not len(store.steps)
        self.set_class(empty and feed.mode is not Mode.LOADING, "-starting")
        self.set_class(not store.layers, "-dense")
        self.set_class(self._log_shown, "-logging")
        stale = badge.text.startswith(("QUIET", "DEAD"))
        for chart in self.charts:
            if feed.mode is Mode.LOADING and empty:
                chart.set_state(State.LOADING, f"reading the run's file: {100 * feed.progress:.0f} %")
            elif feed.error and empty:
                chart.set_state(State.ERROR, f"{feed.error}\nr reads it again")
            else:
                chart.set_state(State.STALE if stale else State.LIVE)

    @property
    def _log_shown(self) -> bool:
        if self._log_chosen is not None:
            return self._log_chosen
        return not self.has_class("-compact") and self.size.height >= 36

    # actions; those that change the run are in run_commands

    def why_not(self, action_id: str) -> str | None:
        if self.feed is None and action_id != "monitor.reload":
            return "no run is open; 1 lists the runs"
        return super().why_not(action_id)

    def footer_text(self, action: Action) -> str:
        if action.id == "monitor.pause" and self.state_word == "paused":
            return "resume"
        return super().footer_text(action)

    def action_log(self) -> None:
        self._log_chosen = not self._log_shown
        self.set_class(self._log_shown, "-logging")
        if self._log_chosen:
            self.log_view.focus()
        elif self.focused is self.log_view:
            self.loss.focus()

    def action_reload(self) -> None:
        self.lumina.spawn(self._watch(self.feed.run.path if self.feed is not None else self._wanted))

    def action_copy(self) -> None:
        assert self.feed is not None
        self.lumina.copy_text(str(self.feed.run.path))

    def action_alerts(self) -> None:
        from .dialogs import Sheet

        assert self.feed is not None
        store = self.feed.store
        self._seen_alerts = len(store.alerts)
        self._rung = 0
        blocks = []
        for alert in reversed(store.alerts):
            at = f" at step {whole(alert.step)}" if alert.step is not None else ""
            words = [f"{alert.severity}  {clean(alert.code)}{at}", clean(alert.message), clean(alert.recommendation or "")]
            blocks.append("\n  ".join(word for word in words if word))
        badge = self.feed.badge()
        head = f"{badge.text}: {clean(badge.why)}\n\n" if badge.why else ""
        self.lumina.push_screen(Sheet("Alerts", Content(head + ("\n\n".join(blocks) or "No alerts in this run."))))

    def summary(self) -> str:
        """What the run came to, for notices and the end of the program."""
        store = self.store
        if store is None or store.step is None:
            return ""
        loss = store.steps.smooth("loss", 0.9).values[-1]
        return f"step {whole(store.step)}, loss {number(float(loss))}, {duration(float(store.steps.hours.values[-1]) * 3600)}"


def _find(wanted: str | Path | None, root: Path) -> RunDirectory | None:
    """The run that is meant; None if there is none at all."""
    if wanted is None:
        rows = list_runs(root)
        return RunDirectory(rows[0].path) if rows else None
    if isinstance(wanted, Path) and (wanted / "run.json").exists():
        return RunDirectory(wanted)
    return find(str(wanted), root)
