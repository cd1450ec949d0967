"""Compare: up to eight runs over each other. Layout and routing; `comparing` has the figures, the chart draws."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from textual.containers import Horizontal, Vertical
from textual.widget import Widget

from ..actions import Action
from ..comparing import COLUMNS, PINNED, Compared, as_text, exists, metrics_beside, opened, side_by_side, table_rows
from ..feed import Feed
from ..widgets.compare_parts import CompareChart, RunChooser, SidePanel
from ..widgets.line_chart import Cursor, LineChart
from ..widgets.picture import MOST_RUNS
from ..widgets.readings import label_of, x_text
from ..widgets.table import Row, Table
from .base import LuminaScreen, State

LOOK_S = 1.0  # between two looks whether the folders are still there, and at the results


class CompareScreen(LuminaScreen):
    """Compares `runs` (paths of run directories); without any it offers those below the root."""

    scope = "compare"
    number = 6
    heading = "Compare"
    smallest = (40, 12)
    DEFAULT_CSS = """
    CompareScreen #body, CompareScreen #left, CompareScreen #lay { height: 1fr; width: 1fr; }
    CompareScreen #body { layout: vertical; }
    CompareScreen #small { display: none; height: 40%; }
    CompareScreen #small LineChart { width: 1fr; height: 1fr; }
    CompareScreen #right { height: 14; width: 100%; layout: horizontal; }
    CompareScreen #table { width: 3fr; height: 1fr; }
    CompareScreen #side { width: 2fr; height: 1fr; }
    CompareScreen.-compact #right { height: 9; }
    CompareScreen.-compact #table { width: 1fr; }
    CompareScreen.-compact #side { width: 0; }
    CompareScreen.-compact.-reading #side { width: 1fr; }
    CompareScreen.-compact.-reading #table { display: none; }
    CompareScreen.-compact.-reading #right { height: 14; }
    CompareScreen.-wide #body { layout: horizontal; }
    CompareScreen.-wide #small { display: block; }
    CompareScreen.-wide #right { width: 45%; height: 1fr; layout: vertical; }
    CompareScreen.-wide #table { width: 100%; height: 11; }
    CompareScreen.-wide #side { width: 100%; }
    CompareScreen #choose { display: none; height: 1fr; }
    CompareScreen.-choosing #choose { display: block; }
    CompareScreen.-choosing #body { display: none; }
    CompareScreen.-tiny #body, CompareScreen.-tiny #choose { display: none; }
    """

    def __init__(self, *, runs: Sequence[Path] | None = None) -> None:
        super().__init__()
        self.runs: list[Compared] = []
        self.focus_on: Compared | None = None
        self.baseline: Compared | None = None
        self._wanted = tuple(runs or ())
        self._looked = 0.0
        self._shown: tuple[object, ...] = ()
        self._beside: list[str] = []  # metrics of the small charts
        self._words: list[str] = []
        self._turn = 0
        self._moved: tuple[int | None, int | None] = (None, None)
        cursor = Cursor()
        self.chart = CompareChart("loss", cursor=cursor, id="chart")
        self.small = [CompareChart(name, cursor=cursor) for name in ("tokens_per_s", "grad_norm", "lr", "aux_loss")]
        self.table = Table(COLUMNS, title="runs", id="table")
        self.table.can_focus = False
        self.side = SidePanel(title="differences and results", id="side")
        self.choose = RunChooser(id="choose")

    def content(self) -> Iterable[Widget]:
        left = Vertical(self.chart, Horizontal(*self.small, id="small"), id="left")
        yield Vertical(left, Widget(self.table, self.side, id="right"), id="body", classes="content")
        yield self.choose

    # which runs

    def on_mount(self) -> None:
        self.chart.extra = self._as_text
        if self._wanted:
            self.lumina.spawn(self._open(self._wanted))
        else:
            self.lumina.spawn(self._offer())

    def retarget(self, *, runs: Sequence[Path] = ()) -> bool:  # type: ignore[override]
        self.lumina.spawn(self._open(tuple(runs)))
        return True

    def place(self) -> dict[str, str | list[str]] | None:
        return {"runs": [str(path.absolute()) for path in self._wanted]} if self._wanted else {}

    async def _open(self, paths: Sequence[Path]) -> None:
        """Show these runs instead of those before."""
        self._wanted = tuple(paths)
        if len(dict.fromkeys(paths)) > MOST_RUNS:
            self.lumina.notice(f"{MOST_RUNS} runs can be compared; the first {MOST_RUNS} are shown", "warning")
        runs = await asyncio.to_thread(opened, paths)
        await self._close()
        if self._wanted != tuple(paths) or self not in self.app.screen_stack:
            return  # others were asked for meanwhile, or the screen was left
        for run in runs:
            if not run.error:
                run.feed = Feed(run.run, hz=self.lumina.rate, together=len(runs), caching=not self.lumina.readonly)
                run.feed.start()
        self.runs = runs
        self.baseline = self.focus_on = next((run for run in runs if not run.error), None)
        self.remove_class("-choosing")
        self.lumina.memory.set("compare.runs", [str(run.run.path) for run in runs])
        self.chart.focus()
        self._lay()
        self.tick()

    async def _close(self) -> None:
        """Let go of every run. They do not notice."""
        runs, self.runs = self.runs, []
        for run in runs:
            if run.feed is not None:
                await run.feed.close()

    async def on_unmount(self) -> None:
        await self._close()

    def on_screen_suspend(self) -> None:
        if self not in self.app.screen_stack:  # another screen, not a layer over this one
            self.lumina.spawn(self._close())

    def on_screen_resume(self) -> None:
        if self._wanted and not self.runs and self.is_mounted:
            self.lumina.spawn(self._open(self._wanted))
        self.tick()

    async def _offer(self) -> None:
        """Let the user choose among the runs below the root."""
        self.add_class("-choosing")
        self.choose.focus()
        self.set_frame(subject="choose runs", badge="")
        before = [str(run.run.path) for run in self.runs] or self.lumina.memory.get("compare.runs", [""])
        await self.choose.offer(self.lumina.runs_root, before)
        self.refresh_keys()

    # each tick

    def tick(self) -> None:
        if not self.is_attached or not self.runs:
            return
        now = time.monotonic()
        words = [run.badge()[0] for run in self.runs]
        if now - self._looked >= LOOK_S or words != self._words:
            self._looked, self._words = now, words
            self.lumina.spawn(self._look())
            self.side.show(side_by_side(self.runs, self.side.room))
            self._beside = metrics_beside(self.chart.metrics_known(), self.chart.options.metric)
        if self._drawn() != self._shown:
            self._lay()
        moved = (self.chart.cursor.step, self.chart.cursor.pin)
        self._turn = (self._turn + 1) % len(self.small)  # the small charts take turns, unless the crosshair moves
        for chart in (self.chart, *(self.small if moved != self._moved else [self.small[self._turn]])):
            chart.sync()
        self._moved = moved
        options = self.chart.options
        columns = COLUMNS if options.pin is None else PINNED
        if self.table.columns != columns:
            self.table.columns = columns
            self.table.refresh()
        self.table.set_rows(self._rows())
        at = f"at {x_text(options.base, options.cross)}" if options.cross is not None else "newest values"
        self.table.set_title(
            f"runs  {at}", f"{label_of(options.metric)} | base {self.baseline.letter if self.baseline else '-'}"
        )
        live = sum(run.feed is not None and run.feed.alive for run in self.runs)
        badge = f"{live} live" if live else ""
        self.set_frame(subject=f"{len(self.runs)} runs by {options.base}", badge=badge, badge_role="good")
        self._states()

    def _rows(self) -> list[Row]:
        return table_rows(self.runs, self.baseline, self.chart.options, self.chart.reach)

    async def _look(self) -> None:
        runs = self.runs
        for run in runs:
            if run.feed is not None and not run.gone and not await asyncio.to_thread(exists, run.run):
                run.gone, run.error = True, f"{run.run.path} was deleted; what was read of it stays here"
                await run.feed.close()

    def _drawn(self) -> tuple[object, ...]:
        stores = tuple((run.letter, id(run.feed.store) if run.feed is not None else 0, run.drawn) for run in self.runs)
        main = self.chart.options
        axis = (main.metric, main.base, main.log_x, main.view)
        return stores, id(self.focus_on), id(self.baseline), axis, tuple(self._beside)

    def _lay(self) -> None:
        """Give the charts their curves: hidden runs are left out, the focused one comes last."""
        self._shown = self._drawn()
        shown = [run for run in self.runs if run.drawn and run is not self.focus_on]
        if self.focus_on is not None and self.focus_on.drawn:
            shown.append(self.focus_on)
        curves = [curve for run in shown if (curve := run.curve) is not None]
        base = self.baseline.curve if self.baseline is not None else None
        self.chart.lay(curves, base)
        main = self.chart.options
        for chart, name in zip(self.small, [*self._beside, *[""] * 4], strict=False):
            chart.display = bool(name)
            if name:
                if chart.options.metric != name:
                    chart.set_metric(name)
                chart.options = replace(chart.options, base=main.base, log_x=main.log_x, view=main.view)
                chart.lay(curves, base)
        if self.focus_on is not None:
            self.table.move_to(self.focus_on.letter)
        self.refresh_keys()

    def _states(self) -> None:
        """What the chart says while there is nothing to draw."""
        drawn = [run for run in self.runs if run.drawn]
        if any(len(run.feed.store.steps) for run in drawn if run.feed is not None):
            self.chart.set_state(State.LIVE)
        elif not drawn:
            why = "every run is hidden; Space shows one" if any(run.curve for run in self.runs) else "no run can be read"
            self.chart.set_state(State.EMPTY, f"{why}; a chooses others")
        elif any(run.badge()[0].startswith("loading") for run in drawn):
            self.chart.set_state(State.LOADING, "reading the runs …")
        else:
            self.chart.set_state(State.EMPTY, "no run has a step yet")

    # actions

    def on_line_chart_run_wanted(self, event: LineChart.RunWanted) -> None:
        order = [run for run in self.runs if run.drawn] or self.runs
        at = order.index(self.focus_on) if self.focus_on in order else 0
        self.focus_on = order[(at + event.direction) % len(order)]
        self.tick()

    def on_table_moved(self, event: Table.Moved) -> None:
        found = next((run for run in self.runs if run.letter == event.key), None)
        if event.table is self.table and found is not None and found is not self.focus_on:
            self.focus_on = found
            self.tick()

    def on_run_chooser_confirmed(self, event: RunChooser.Confirmed) -> None:
        self.lumina.spawn(self._open(event.paths))

    def on_descendant_focus(self) -> None:
        super().on_descendant_focus()
        self.set_class(self.focused is self.side, "-reading")

    def footer_text(self, action: Action) -> str:
        if action.id == "compare.hide":
            return "mark" if self.choosing else "show" if self.focus_on is not None and self.focus_on.hidden else "hide"
        return super().footer_text(action)

    @property
    def choosing(self) -> bool:
        return self.has_class("-choosing")

    def why_not(self, action_id: str) -> str | None:
        verb = action_id.rpartition(".")[2]
        if verb == "hide":
            return self.choose.why_not_mark() if self.choosing else None if self.focus_on is not None else "no run is open"
        if verb in ("baseline", "diff") and (self.choosing or not self.runs):
            return "no runs are open; Space marks, Enter compares"
        if verb == "baseline" and (self.focus_on is None or self.focus_on.curve is None):
            return "this run cannot be read"
        return None

    def action_hide(self) -> None:
        if self.choosing:
            self.choose.mark()
        elif self.focus_on is not None:
            self.focus_on.hidden = not self.focus_on.hidden
            self.tick()

    def action_baseline(self) -> None:
        self.baseline = self.focus_on
        self.tick()

    def action_diff(self) -> None:
        (self.chart if self.focused is self.side else self.side).focus()

    def action_choose(self) -> None:
        if self.choosing and self.runs:
            self.remove_class("-choosing")
            self.chart.focus()
        else:
            self.lumina.spawn(self._offer())

    def action_reload(self) -> None:
        self.lumina.spawn(self._offer() if self.choosing or not self._wanted else self._open(self._wanted))

    def _as_text(self) -> list[str]:
        return as_text(self._rows(), side_by_side(self.runs, 110))
