"""A chart of one metric of one run, or of up to eight, with smoothing, crosshair and zoom.

It repaints only the rectangles that changed, and nothing while it is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from textual.binding import BindingType
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip

from lumina_engine.monitoring.task_words import task_losses

from ..actions import bindings
from ..history import METRICS
from ..paint import Piece, line, whole
from ..series import RunStore
from . import plot as plotting
from .canvas import Frame, changed_regions
from .chart_keys import WEIGHTS, ChartKeys, Cursor, habits
from .panel import Drawn
from .picture import STYLE_ROLES, Curve, Limits, Options, Plot
from .readings import Reading, column_range, difference_text, evaluation, label_of, read, value_text, x_text
from .sparkline import spark

__all__ = ["WEIGHTS", "Cursor", "LineChart"]
SMALLEST = (12, 4)  # cells; below, a sparkline


class LineChart(ChartKeys, Drawn):
    """Shows a metric of `store`, or of several runs after `lay`. Call `sync()` on each tick: it does nothing while nothing has
    changed."""

    scope = "chart"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("chart"))

    class RunWanted(Message):
        """Another of the chart's runs should be the focused one: the next (1) or the one before (-1)."""

        def __init__(self, chart: LineChart, direction: int) -> None:
            super().__init__()
            self.chart, self.direction = chart, direction

    def __init__(
        self, store: RunStore | None = None, metric: str = "loss", *, cursor: Cursor | None = None, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self.curves = (Curve(store or RunStore()),)
        self.baseline: Curve | None = None
        self.cursor = cursor or Cursor()
        self.options = Options(metric=metric, **habits(metric))
        self._plot = Plot(Frame(0, 0))
        self._limits = Limits()
        self._seen: tuple[object, ...] = ()

    def on_mount(self) -> None:
        self.options = replace(self.options, **self.remembered(self.options.metric))

    def show(self, store: RunStore, name: str = "") -> None:
        """Draw another run."""
        self.curves, self.baseline, self._limits = (Curve(store, name),), None, Limits()
        self.options = replace(self.options, view=None, cross=None, pin=None)
        self._seen = ()
        self.sync()

    def lay(self, curves: Sequence[Curve], baseline: Curve | None = None) -> None:
        """Draw these runs over each other, the last one focused; without any, an empty one. View and crosshair stay."""
        self.curves, self.baseline = tuple(curves) or (Curve(RunStore()),), baseline
        self._seen = ()
        self.sync()

    def want_run(self, direction: int) -> None:
        """Ask whoever laid the runs for the next one (1) or the one before (-1)."""
        self.post_message(self.RunWanted(self, direction))

    # painting

    def _now(self) -> tuple[object, ...]:
        stores = [curve.store for curve in self.curves]
        versions = tuple(
            (id(s), s.steps.version, s.evals.version, s.experts.version, s.event_version, s.preview) for s in stores
        )
        return (versions, self.inner, self.options, self.cursor.step, self.cursor.pin, self.look.glyphs)

    def sync(self) -> None:
        """Repaint what has changed since the last call."""
        if not self.is_attached or not self.is_on_screen or self._now() == self._seen:
            return
        old, size = self._plot.frame, (self._plot.frame.width, self._plot.frame.height)
        self._rebuild()
        regions = changed_regions(self._plot.frame, old) if size == self.inner else None
        if regions is None or self._blocking or self._too_small(*self.inner):
            self.refresh()
            return
        if regions:
            self.refresh(*[Region(x + 1, y + 1, width, height) for x, y, width, height in regions])

    def _rebuild(self) -> None:
        cross = None if self.cursor.step is None else self.cross_x(self.cursor.step)
        pin = None if self.cursor.pin is None else self.cross_x(self.cursor.pin)
        self.options = replace(self.options, cross=cross, pin=pin)
        self._plot = plotting.build(self.curves, self.options, *self.inner, self.look.glyphs, self._limits)
        self._limits = self._plot.limits
        self._titles()
        self._seen = self._now()

    def _titles(self) -> None:
        options = self.options
        settings = ["preview"] if any(curve.store.preview for curve in self.curves) else []
        settings += [f"EMA {options.weight:g}"] if options.weight else []
        settings += ["5-95"] if options.outliers else []
        settings += ["log X"] if self._plot.axis.log else []
        settings += ["log Y"] if options.log_y else []
        settings += self._plot.notes
        right = "zoomed, f follows" if options.view else ""
        if options.metric == "loss" and len(self.store.evals):
            right = (right + "  " if right else "") + "o eval"
        self.set_title("  ".join([label_of(options.metric), " | ".join(settings)]).rstrip(), right)
        self.set_foot(*self._foot())

    def _foot(self) -> tuple[str, str]:
        """The values of the focused run at the crosshair, and the difference to the pinned place, or the event there."""
        options, store = self.options, self.store
        at = read(store, options, options.cross, self.reach)
        if at is None:
            name = f"{self.curves[-1].name} " if len(self.curves) > 1 else ""
            return (f"{name}has nothing at {x_text(options.base, options.cross)}" if options.cross is not None else ""), ""
        place = "" if options.base == "step" else f" at {x_text(options.base, at.x)}"
        text = f"{whole(at.step)}{place}: {value_text(options.metric, at.value)}"
        if at.smooth is not None:
            text += f" (EMA {value_text(options.metric, at.smooth)})"
        if len(self.curves) > 1:
            text = f"{self.curves[-1].letter} {text}{self._against_baseline(at)}"
        right = self._foot_note(at)
        score = evaluation(store, at.step) if options.metric == "loss" else None
        more = [f"  eval {value_text('loss', score[1])} at {whole(score[0])}"] if score is not None else []
        if score is not None and store.task_losses and score[0] == int(store.evals.step.values[-1]):
            more.append(f" ({task_losses(store.task_losses)})")
        for part in (self._column_text(at), *more):  # as far as there is room beside the note
            if len(text) + len(part) + len(right) <= self.inner[0] - 8 or not right:
                text += part
        return text, right

    def _column_text(self, at: Reading) -> str:
        """Lowest and highest value in the crosshair's column, where it holds more than one."""
        if self.options.cross is None:
            return ""
        ends = self._plot.axis.around(self._plot.axis.column_of(self.options.cross))
        found = column_range(self.store, self.options, ends)
        if found is None or found[2] < 2:
            return ""
        return f" {value_text(self.options.metric, found[0])} to {value_text(self.options.metric, found[1])}"

    def _against_baseline(self, at: Reading) -> str:
        if self.baseline is None or self.baseline.store is self.store:
            return ""
        other = read(self.baseline.store, self.options, at.x, self.reach)
        change = None if other is None else at.shown - other.shown
        return f"  {difference_text(self.options.metric, change)} to {self.baseline.letter}"

    def _foot_note(self, at: Reading) -> str:
        if self.options.pin is not None:
            other = read(self.store, self.options, self.options.pin, self.reach)
            if other is None:
                return ""
            return f"{at.shown - other.shown:+.4g} over {whole(at.step - other.step)} steps"
        if self.cursor.step is None:
            return ""
        axis, column = self._plot.axis, self._plot.axis.column_of(self.options.cross or 0.0)
        store = self.store
        step_N = np.array([event.step for event in store.events], np.int64)
        near_N = np.flatnonzero(axis.columns_of(store.xs_of(step_N, self.options.base)) == column)
        return store.events[int(near_N[-1])].text if len(near_N) else ""

    @property
    def reach(self) -> float:
        """How far beside its samples a run still has a value, in X: one column of cells. Endless with one run."""
        if len(self.curves) < 2 or self.options.cross is None:
            return float("inf")
        low, high = self._plot.axis.around(self._plot.axis.column_of(self.options.cross))
        return high - low

    @staticmethod
    def _too_small(width: int, height: int) -> bool:
        return width < SMALLEST[0] or height < SMALLEST[1]

    def _inside(self, y: int, width: int, height: int) -> Strip:
        if self._blocking:
            return self._message_line(y, width, height)
        if (self._plot.frame.width, self._plot.frame.height) != (width, height):
            self._rebuild()
        if self._too_small(width, height):
            return line(width, self._small(y, width, height), base=self.rich_style)
        palette = self.palette
        styles = [palette.of(role) for role in STYLE_ROLES]
        dimmed = self.has_class("-stale")
        pieces = [(text, palette.dim if dimmed and style else styles[style]) for text, style in self._plot.frame.runs(y)]
        return line(width, pieces, base=self.rich_style)

    def _small(self, y: int, width: int, height: int) -> Sequence[Piece]:
        if y != height // 2:
            return ()
        metric = METRICS[self.options.metric]
        pyramid = self.curves[-1].history(metric.name).metrics[metric.name]
        return [(spark(pyramid, width, metric.keep, self.look.ascii), self.palette.curve)]

    def on_resize(self) -> None:
        self._seen = ()
