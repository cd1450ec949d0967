"""A chart of one metric with smoothing, crosshair and zoom. It repaints only the rectangles that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from textual.binding import BindingType
from textual.geometry import Region
from textual.strip import Strip

from ..actions import bindings
from ..history import BASES, CHART_METRICS, METRICS
from ..paint import Piece, line, whole
from ..series import RunStore
from . import plot as plotting
from .canvas import Frame, changed_regions
from .panel import Drawn
from .plot import Limits, Options, Plot, label_of, value_text
from .sparkline import spark

WEIGHTS = (0.0, 0.6, 0.9, 0.98, 0.995)


@dataclass
class Cursor:
    """A crosshair that several charts share: the step it stands on, and the pinned one."""

    step: int | None = None
    pin: int | None = None


class LineChart(Drawn):
    """Shows one metric of `store.history(metric)`. Call `sync()` on each tick: it does nothing while nothing has changed."""

    scope = "chart"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("chart"))

    def __init__(
        self, store: RunStore | None = None, metric: str = "loss", *, cursor: Cursor | None = None, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self.store = store or RunStore()
        self.cursor = cursor or Cursor()
        self.options = Options(metric=metric, **_habits(metric))
        self._plot = Plot(Frame(0, 0))
        self._limits = Limits()
        self._seen: tuple[object, ...] = ()

    def show(self, store: RunStore) -> None:
        """Draw another run."""
        self.store, self._seen, self._limits = store, (), Limits()
        self.options = replace(self.options, view=None, cross=None, pin=None)
        self.sync()

    # painting

    def _now(self) -> tuple[object, ...]:
        store = self.store
        versions = (store.steps.version, store.experts.version, store.evals.version, store.event_version)
        return (*versions, self.inner, self.options, self.cursor.step, self.cursor.pin, id(store))

    def sync(self) -> None:
        """Repaint what has changed since the last call."""
        if not self.is_attached or self._now() == self._seen:
            return
        old, size = self._plot.frame, (self._plot.frame.width, self._plot.frame.height)
        self._rebuild()
        regions = changed_regions(self._plot.frame, old) if size == self.inner else None
        if regions is None or self._blocking:
            self.refresh()
            return
        if regions:
            self.refresh(*[Region(x + 1, y + 1, width, height) for x, y, width, height in regions])

    def _rebuild(self) -> None:
        cross = None if self.cursor.step is None else self.store.x_of(self.cursor.step, self.options.base)
        pin = None if self.cursor.pin is None else self.store.x_of(self.cursor.pin, self.options.base)
        self.options = replace(self.options, cross=cross, pin=pin)
        width, height = self.inner
        self._plot = plotting.build(self.store, self.options, width, height, self.look.glyphs, self._limits)
        self._limits = self._plot.limits
        self._titles()
        self._seen = self._now()

    def _titles(self) -> None:
        options = self.options
        parts = [label_of(options.metric)]
        settings = [f"EMA {options.weight:g}"] if options.weight else []
        settings += ["5-95"] if options.outliers else []
        settings += ["log"] if options.log_y else []
        settings += self._plot.notes
        right = "zoomed, f follows" if options.view else ""
        if options.metric == "loss" and len(self.store.evals):
            right = (right + "  " if right else "") + "o eval"
        self.set_title("  ".join([*parts, " | ".join(settings)]).rstrip(), right)
        self.set_foot(*self._foot())

    def _foot(self) -> tuple[str, str]:
        options = self.options
        at = plotting.read(self.store, options, options.cross)
        if at is None:
            return "", ""
        text = f"{whole(at.step)}: {value_text(options.metric, at.value)}"
        if at.smooth is not None:
            text += f" (EMA {value_text(options.metric, at.smooth)})"
        evals = self.store.evals
        if options.metric == "loss" and len(evals):
            index = max(0, int(evals.step.values.searchsorted(at.step, side="right")) - 1)
            value = float(evals.metrics["loss"].values[index])
            text += f"  eval {value_text('loss', value)} at {whole(int(evals.step.values[index]))}"
        right = ""
        if options.pin is not None:
            other = plotting.read(self.store, options, options.pin)
            if other is not None:
                change = (at.smooth if at.smooth is not None else at.value) - (
                    other.smooth if other.smooth is not None else other.value
                )
                right = f"{change:+.4g} over {whole(at.step - other.step)} steps"
        elif self.cursor.step is not None:
            near = [event for event in self.store.events if abs(event.step - at.step) <= self._column_steps()]
            right = near[-1].text if near else ""
        return text, right

    def _column_steps(self) -> float:
        """Steps in one column of cells."""
        if self.options.base != "step":
            return 0.5
        return max(0.5, (self._plot.x[1] - self._plot.x[0]) / max(1, self._plot.across) / 2)

    def _inside(self, y: int, width: int, height: int) -> Strip:
        if self._blocking:
            return self._message_line(y, width, height)
        if (self._plot.frame.width, self._plot.frame.height) != (width, height):
            self._rebuild()
        if width < 12 or height < 4:
            return line(width, self._small(y, width, height), base=self.rich_style)
        palette = self.palette
        styles = [palette.of(role) for role in plotting.STYLE_ROLES]
        dimmed = self.has_class("-stale")
        pieces = [(text, palette.dim if dimmed and style else styles[style]) for text, style in self._plot.frame.runs(y)]
        return line(width, pieces, base=self.rich_style)

    def _small(self, y: int, width: int, height: int) -> Sequence[Piece]:
        if y != height // 2:
            return ()
        pyramid = self.store.history(self.options.metric).metrics[self.options.metric]
        return [(spark(pyramid, width, "mean", self.look.ascii), self.palette.curve)]

    def on_resize(self) -> None:
        self._seen = ()

    # actions

    def why_not(self, action_id: str) -> str | None:
        if not len(self.store.steps):
            return "there are no steps yet"
        if action_id == "chart.pin" and self.cursor.step is None:
            return "c sets the crosshair first"
        if action_id == "chart.abandoned" and not self.store.tails:
            return "no rewind has cut anything off"
        if action_id in ("chart.event_back", "chart.event_next") and not self.store.events:
            return "there are no events yet"
        return None

    def _set(self, **changes: object) -> None:
        self.options = replace(self.options, **changes)  # type: ignore[arg-type]
        self.sync()

    def action_crosshair(self) -> None:
        self.cursor.step = None if self.cursor.step is not None else self.store.step
        self.cursor.pin = None
        self.sync()

    def action_pin(self) -> None:
        self.cursor.pin = None if self.cursor.pin is not None else self.cursor.step
        self.sync()

    def _move(self, columns: int) -> None:
        if self.cursor.step is None:
            x0, x1 = self._plot.x
            shift = columns * (x1 - x0) / max(1, self._plot.across)
            self._set(view=(x0 + shift, x1 + shift))
            return
        here = self._plot.column_of(self.store.x_of(self.cursor.step, self.options.base))
        at = plotting.read(self.store, self.options, self._plot.x_at(here + columns))
        if at is not None and at.step == self.cursor.step:  # sparse: the neighbour, however far it is
            steps = self.store.history(self.options.metric).step.values
            index = min(max(0, at.index + (1 if columns > 0 else -1)), len(steps) - 1)
            self.cursor.step = int(steps[index])
        elif at is not None:
            self.cursor.step = at.step
        self._keep_in_view()
        self.sync()

    def _keep_in_view(self) -> None:
        if self.options.view is None or self.cursor.step is None:
            return
        x, (x0, x1) = self.store.x_of(self.cursor.step, self.options.base), self.options.view
        if not x0 <= x <= x1:
            shift = x - (x0 + x1) / 2
            self.options = replace(self.options, view=(x0 + shift, x1 + shift))

    def action_left(self) -> None:
        self._move(-1)

    def action_right(self) -> None:
        self._move(1)

    def action_far_left(self) -> None:
        self._move(-10)

    def action_far_right(self) -> None:
        self._move(10)

    def action_first(self) -> None:
        self.cursor.step = int(self.store.steps.step.values[0])
        self._keep_in_view()
        self.sync()

    def action_last(self) -> None:
        self.cursor.step = self.store.step
        self._keep_in_view()
        self.sync()

    def _event(self, direction: int) -> None:
        here = self.cursor.step if self.cursor.step is not None else (self.store.step or 0) + 1
        steps = [event.step for event in self.store.events]
        found = [s for s in steps if s > here] if direction > 0 else [s for s in steps if s < here]
        if found:
            self.cursor.step = min(found) if direction > 0 else max(found)
            self._keep_in_view()
            self.sync()

    def action_event_back(self) -> None:
        self._event(-1)

    def action_event_next(self) -> None:
        self._event(1)

    def _zoom(self, factor: float) -> None:
        x0, x1 = self._plot.x
        newest = float(self.store.steps.x(self.options.base)[-1])
        anchor = self.store.x_of(self.cursor.step, self.options.base) if self.cursor.step is not None else min(newest, x1)
        view = (anchor - (anchor - x0) * factor, anchor + (x1 - anchor) * factor)
        first = float(self.store.steps.x(self.options.base)[0])
        if view[0] <= min(0.0, first) and view[1] >= newest:
            self._set(view=None)
        elif view[1] - view[0] > (newest - first) * 1e-7:
            self._set(view=view)

    def action_zoom_in(self) -> None:
        self._zoom(0.5)

    def action_zoom_out(self) -> None:
        self._zoom(2.0)

    def action_follow(self) -> None:
        self._set(view=None)

    def action_smoothing(self) -> None:
        index = WEIGHTS.index(self.options.weight) if self.options.weight in WEIGHTS else 0
        self._set(weight=WEIGHTS[(index + 1) % len(WEIGHTS)])

    def action_outliers(self) -> None:
        self._set(outliers=not self.options.outliers)

    def action_log_y(self) -> None:
        self._set(log_y=not self.options.log_y)

    def action_base(self) -> None:
        self._set(base=BASES[(BASES.index(self.options.base) + 1) % len(BASES)], view=None)

    def action_abandoned(self) -> None:
        self._set(abandoned=not self.options.abandoned)

    def _metric(self, direction: int) -> None:
        import numpy as np

        names = [metric.name for metric in CHART_METRICS]
        known = [name for name in names if np.isfinite(self.store.history(name).metrics[name].values).any()] or names[:1]
        index = known.index(self.options.metric) if self.options.metric in known else 0
        name = known[(index + direction) % len(known)]
        self._set(metric=name, **_habits(name))

    def action_next_metric(self) -> None:
        self._metric(1)

    def action_previous_metric(self) -> None:
        self._metric(-1)


def _habits(name: str) -> dict[str, Any]:
    """Smoothing and range that suit a metric."""
    return {"weight": 0.9, "outliers": True} if METRICS[name].noisy else {"weight": 0.0, "outliers": False}
