"""Monitor: one run, live. Layout and routing; the feed, the store and the panels do the work."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from textual.containers import Grid, Horizontal
from textual.widget import Widget

from lumina_engine.run.directory import RunError

from ..actions import Action
from ..feed import Feed, Mode
from ..paint import age, clean, duration, number, whole
from ..runs import identity_of, watched_run
from ..series import RunStore
from ..widgets.alert_table import AlertTable
from ..widgets.device_panel import DevicePanel
from ..widgets.expert_map import ExpertMap
from ..widgets.line_chart import Cursor, LineChart
from ..widgets.log_view import LogView
from ..widgets.run_panels import ProgressLine, StatusLine
from ..widgets.run_start import StartPanel, Ticker
from ..widgets.trend_panel import TrendPanel
from .base import LuminaScreen, State
from .run_alerts import RunAlerts
from .run_commands import RunCommands

CHARTS = ("loss", "tokens_per_s", "grad_norm", "lr")
HUGE = (200, 60)  # from this size on: the map at full height, alerts, 12 lines of log


class MonitorScreen(RunCommands, RunAlerts, LuminaScreen):
    """Watches `run` (a name below the root or a path); without one, the run that was active last."""

    scope = "monitor"
    number = 5
    heading = "Monitor"
    ALLOW_IN_MAXIMIZED_VIEW: ClassVar[str] = "TitleBar, KeyBar, ProgressLine, StatusLine"
    DEFAULT_CSS = """
    MonitorScreen #top { height: 1fr; grid-size: 2 1; grid-columns: 1fr 30; grid-rows: 1fr; }
    MonitorScreen #top LineChart, MonitorScreen #experts { width: 100%; height: 100%; }
    MonitorScreen .small { display: none; }
    MonitorScreen.-dense #experts { display: none; }
    MonitorScreen.-dense #top { grid-size: 1 1; grid-columns: 1fr; }
    MonitorScreen.-wide #top { grid-size: 3 2; grid-columns: 1fr 1fr 52; grid-rows: 1fr 12; }
    MonitorScreen.-wide #loss { column-span: 2; }
    MonitorScreen.-wide .small { display: block; }
    MonitorScreen.-wide.-dense #top { grid-columns: 1fr 1fr 1fr; }
    MonitorScreen.-wide.-dense #loss { column-span: 3; }
    MonitorScreen.-huge #top { grid-size: 4 2; grid-columns: 1fr 1fr 1fr 56; grid-rows: 1fr 13; }
    MonitorScreen.-huge #loss { column-span: 3; }
    MonitorScreen.-huge #experts { row-span: 2; }
    MonitorScreen.-huge.-dense #top { grid-size: 3 2; grid-columns: 1fr 1fr 1fr; }
    MonitorScreen #trend { height: 6; }
    MonitorScreen #bottom { height: 10; display: none; }
    MonitorScreen #devices, MonitorScreen #alerts { width: 1fr; height: 1fr; display: none; }
    MonitorScreen #log { width: 2fr; height: 1fr; display: none; }
    MonitorScreen.-logging #bottom, MonitorScreen.-logging #log { display: block; }
    MonitorScreen.-devices #bottom, MonitorScreen.-devices #devices { display: block; }
    MonitorScreen.-compact.-logging #bottom, MonitorScreen.-compact.-devices #bottom { height: 1fr; }
    MonitorScreen.-compact.-logging #trend, MonitorScreen.-compact.-devices #trend { display: none; }
    MonitorScreen.-wide #trend { display: none; }
    MonitorScreen.-wide #bottom { height: 11; }
    MonitorScreen.-huge #bottom { height: 14; }
    MonitorScreen.-huge #alerts { display: block; }
    MonitorScreen #start { display: none; height: 8; }
    MonitorScreen.-starting #start, MonitorScreen.-starting #bottom, MonitorScreen.-starting #log { display: block; }
    MonitorScreen.-starting #top, MonitorScreen.-starting #trend, MonitorScreen.-starting #devices,
    MonitorScreen.-starting #alerts { display: none; }
    MonitorScreen.-starting #bottom { height: 1fr; }
    MonitorScreen.-empty #experts, MonitorScreen.-empty .small, MonitorScreen.-empty #trend,
    MonitorScreen.-empty #bottom { display: none; }
    MonitorScreen.-empty #top { grid-size: 1 1; grid-columns: 1fr; }
    MonitorScreen Ticker { display: none; }
    MonitorScreen.-tiny Ticker { display: block; }
    MonitorScreen.-tiny #top, MonitorScreen.-tiny #bottom, MonitorScreen.-tiny #trend, MonitorScreen.-tiny #start,
    MonitorScreen.-tiny ProgressLine, MonitorScreen.-tiny StatusLine, MonitorScreen.-tiny TooSmall { display: none; }
    """

    def __init__(self, *, run: str | Path | None = None) -> None:
        super().__init__()
        self.feed: Feed | None = None
        self._wanted = run
        self._mode: Mode | None = None
        self.cursor = Cursor()
        self.charts = [LineChart(metric=name, cursor=self.cursor, id=name) for name in CHARTS]
        self.loss = self.charts[0]
        for chart in self.charts[1:]:
            chart.add_class("small")
        self.experts = ExpertMap(id="experts")
        self.trend, self.devices = TrendPanel(id="trend"), DevicePanel(id="devices")
        self.alert_table, self.log_view = AlertTable(id="alerts"), LogView(id="log")
        self.progress, self.status = ProgressLine(), StatusLine()
        self.start, self.ticker = StartPanel(id="start"), Ticker()

    def content(self) -> Iterable[Widget]:
        yield self.progress
        yield self.ticker
        yield self.start
        yield Grid(self.loss, self.experts, *self.charts[1:], id="top")
        yield self.trend
        yield Horizontal(self.devices, self.alert_table, self.log_view, id="bottom")
        yield self.status

    def on_resize(self) -> None:
        self.set_class(self.size.width >= HUGE[0] and self.size.height >= HUGE[1], "-huge")

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
            run = await asyncio.to_thread(watched_run, wanted, root)
        except RunError as error:
            self._nothing(str(error))
            return
        if run is None:
            self._nothing(f"No runs in {root}. 1 Home starts one.")
            return
        old, self.feed = self.feed, None
        if old is not None:
            await old.close()
        feed = Feed(run, hz=self.look.hz, caching=not self.lumina.readonly)
        self.expect_alerts(await asyncio.to_thread(identity_of, run))
        self.remove_class("-empty")
        for chart in self.charts:
            chart.set_state(State.LIVE)
            chart.show(feed.store, run.name)
        self.devices.feed = feed
        for panel in (self.experts, self.trend, self.devices, self.alert_table):
            panel.show(feed.store)
        for part in (self.progress, self.status, self.start, self.ticker):
            part.show(feed)
        self.log_view.show(run.log_path)
        feed.start()
        self.feed = feed
        self.tick()
        self.lumina.spawn(self._first_look(feed))

    async def _first_look(self, feed: Feed) -> None:
        """Show a log as soon as there is something of it, and again when all of it is there: not at the next tick."""
        for event in (feed.shown, feed.opened):
            await event.wait()
            if self.feed is feed:
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

    def place(self) -> dict[str, str | list[str]] | None:
        return {"run": str(self.feed.run.path.absolute())} if self.feed is not None else None

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
        feed.ask_ranks()
        self._frame(feed)
        panels: list[Any] = [*self.charts, self.experts, self.trend, self.devices, self.alert_table, self.log_view]
        for panel in panels:
            if panel.is_on_screen:
                panel.sync()
        for part in (self.progress, self.status, self.start, self.ticker):
            part.sync()

    def _frame(self, feed: Feed) -> None:
        feed.hz = self.lumina.rate
        store, badge = feed.store, feed.badge()
        state = "crashed" if feed.mode is Mode.DEAD else store.state or ("" if feed.mode is Mode.LOADING else "preparing")
        alerts, critical = self.count_alerts(store.alerts)
        before = (self.state_word, self._mode)
        self._mode = feed.mode
        self.set_frame(
            subject=feed.run.name,
            state=state,
            badge=badge.text,
            badge_role=badge.role,
            alerts=alerts,
            critical=critical,
        )
        if before != (state, feed.mode):
            self.refresh_keys()
        empty = not len(store.steps)
        starting = empty and feed.mode is not Mode.LOADING
        if self.has_class("-starting") and not starting and self.focused in (None, self.log_view):
            self.call_after_refresh(self.loss.focus)  # the first step: chart keys work at once
        self.set_class(starting, "-starting")
        self.set_class(not store.layers, "-dense")
        self._lay_out()
        stale = badge.text.startswith(("QUIET", "DEAD"))
        old = f"{age(feed.clock() - store.t)} old" if stale else ""
        for chart in self.charts:
            if feed.mode is Mode.LOADING and empty:
                chart.set_state(State.LOADING, f"reading the run's file: {100 * feed.progress:.0f} %")
            elif feed.error and empty:
                chart.set_state(State.ERROR, f"{feed.error}\nr reads it again")
            else:
                chart.set_state(State.STALE if stale else State.LIVE)
        for panel in (self.experts, self.trend, self.devices):
            panel.set_state(State.STALE if stale else State.LIVE, old)

    # which panels

    def _shown(self, name: str) -> bool:
        """Whether `log` or `devices` is wanted: as the user chose last, else as the size suggests."""
        chosen = self.lumina.memory.get(f"monitor.{name}", None)
        if isinstance(chosen, bool):
            return chosen
        if self.has_class("-wide"):
            return True
        return name == "log" and not self.has_class("-compact") and self.size.height >= 36

    def _lay_out(self) -> None:
        log, devices = self._shown("log"), self._shown("devices")
        if self.has_class("-compact") and log and devices:
            devices = self.focused is self.devices
            log = not devices
        self.set_class(log, "-logging")
        self.set_class(devices, "-devices")

    def _toggle(self, name: str, panel: Widget) -> None:
        shown = self.has_class("-logging" if name == "log" else "-devices")
        self.lumina.memory.set(f"monitor.{name}", not shown)
        if not shown and self.has_class("-compact"):  # there is room for one of them
            self.lumina.memory.set("monitor.devices" if name == "log" else "monitor.log", False)
        self._lay_out()
        if not shown:
            panel.focus()
        elif self.focused is panel:
            self.loss.focus()

    # actions; those that change the run are in run_commands

    def why_not(self, action_id: str) -> str | None:
        if self.feed is None and action_id != "monitor.reload":
            return "no run is open; 1 lists the runs" if self.has_class("-empty") else "the run is still being opened"
        return super().why_not(action_id)

    def footer_text(self, action: Action) -> str:
        if action.id == "monitor.pause" and self.state_word == "paused":
            return "resume"
        return super().footer_text(action)

    def action_log(self) -> None:
        self._toggle("log", self.log_view)

    def action_devices(self) -> None:
        self._toggle("devices", self.devices)

    def action_reload(self) -> None:
        self.lumina.spawn(self._watch(self.feed.run.path if self.feed is not None else self._wanted))

    def action_copy(self) -> None:
        assert self.feed is not None
        self.lumina.copy_text(str(self.feed.run.path))

    async def action_command(self) -> None:
        assert self.feed is not None
        identity = await asyncio.to_thread(self.feed.run.identity)
        self.lumina.copy_text(shlex.join(map(str, identity.get("argv") or [])), "command.txt")

    def summary(self) -> str:
        """What the run came to, for notices and the end of the program."""
        store = self.store
        if store is None or store.step is None:
            return ""
        loss = store.steps.smooth("loss", 0.9).values[-1]
        return f"step {whole(store.step)}, loss {number(float(loss))}, {duration(float(store.steps.hours.values[-1]) * 3600)}"
