"""What the keys of a chart do: crosshair, zoom, smoothing, axes, metric, run, export. `LineChart` paints the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..history import BASES, CHART_METRICS, METRICS
from ..series import RunStore
from .acts import Acts
from .picture import Curve, Options, Plot
from .readings import label_of, read

WEIGHTS = (0.0, 0.6, 0.9, 0.98, 0.995)
KINDS = {"csv": "CSV: every value, evaluation and event", "svg": "SVG: a picture of everything", "txt": "text"}


@dataclass
class Cursor:
    """A crosshair that several charts share: the step it stands on, and the pinned one."""

    step: int | None = None
    pin: int | None = None


def habits(name: str, weight: float = 0.9) -> dict[str, Any]:
    """Smoothing and range that suit a metric; `weight` is that of a noisy one."""
    return {"weight": weight, "outliers": True} if METRICS[name].noisy else {"weight": 0.0, "outliers": False}


class ChartKeys(Acts):
    """Mixin of a chart with `curves` (the last one is focused), `options` and `cursor`."""

    options: Options
    cursor: Cursor
    curves: tuple[Curve, ...]
    memory_scope = "chart"
    _plot: Plot

    if TYPE_CHECKING:  # of the chart

        def sync(self) -> None: ...

        def want_run(self, direction: int) -> None: ...

    @property
    def store(self) -> RunStore:
        """The focused run."""
        return self.curves[-1].store

    @property
    def leader(self) -> RunStore:
        """The run that reaches furthest: the crosshair's steps are its steps."""
        base = self.options.base
        return max((curve.store for curve in self.curves), key=lambda s: float(s.steps.x(base)[-1]) if len(s.steps) else -1.0)

    # remembered settings

    def remembered(self, name: str) -> dict[str, Any]:
        """The settings that the user chose last for a metric, else what suits it."""
        memory, scope, habit = self.lumina.memory, self.memory_scope, habits(name, self.lumina.settings.smoothing)
        weight = memory.get(f"{scope}.weight", {"": 0.9}).get(name, habit["weight"])
        base = memory.get(f"{scope}.base", {"": ""}).get(name, self.options.base)
        return {
            "weight": weight if 0.0 <= weight <= 0.999 else habit["weight"],
            "outliers": memory.get(f"{scope}.outliers", {"": True}).get(name, habit["outliers"]),
            "log_y": memory.get(f"{scope}.log_y", {"": True}).get(name, False),
            "log_x": memory.get(f"{scope}.log_x", {"": True}).get(name, False),
            "base": base if base in BASES else self.options.base,
        }

    def _remember(self, changes: dict[str, object]) -> None:
        memory, name = self.lumina.memory, self.options.metric
        for key in ("weight", "outliers", "log_y", "log_x", "base"):
            if key in changes:
                default: dict[str, Any] = {"": {"weight": 0.9, "base": ""}.get(key, True)}
                kept = {metric: value for metric, value in memory.get(f"{self.memory_scope}.{key}", default).items() if metric}
                memory.set(f"{self.memory_scope}.{key}", {**kept, name: changes[key]})

    def _set(self, **changes: object) -> None:
        self.options = replace(self.options, **changes)  # type: ignore[arg-type]
        self._remember(changes)
        self.sync()

    # what can be done

    def why_not(self, action_id: str) -> str | None:
        verb = action_id.rpartition(".")[2]
        if not any(len(curve.store.steps) for curve in self.curves):
            return "there are no steps yet"
        switches = verb in ("next_metric", "previous_metric", "next_run", "previous_run")
        if not switches and not any(len(curve.history(self.options.metric)) for curve in self.curves):
            return f"there is no {label_of(self.options.metric)} yet"
        if verb == "pin" and self.cursor.step is None:
            return "c sets the crosshair first"
        if verb == "abandoned" and not self.store.tails:
            return "no rewind has cut anything off"
        if verb in ("event_back", "event_next") and not self.store.events:
            return "there are no events yet"
        if verb in ("next_run", "previous_run") and len(self.curves) < 2:
            return "there is only one run in this chart"
        if verb == "log_x" and self.options.base == "clock":
            return "clock time has no logarithmic axis; b changes the X base"
        return None

    # crosshair

    def action_crosshair(self) -> None:
        self.cursor.step = None if self.cursor.step is not None else self.leader.step
        self.cursor.pin = None
        self.sync()

    def action_pin(self) -> None:
        self.cursor.pin = None if self.cursor.pin is not None else self.cursor.step
        self.sync()

    def cross_x(self, step: int) -> float:
        """The X value of a step of the crosshair."""
        return self.leader.x_of(step, self.options.base)

    def _move(self, columns: int) -> None:
        if self.cursor.step is None:
            self._set(view=self._plot.axis.moved(columns))
            return
        leader = self.leader
        here = self._plot.axis.column_of(self.cross_x(self.cursor.step))
        at = read(leader, self.options, self._plot.axis.x_at(here + columns))
        if at is not None and (at.step == self.cursor.step or (at.step > self.cursor.step) != (columns > 0)):
            steps = leader.history(self.options.metric).step.values  # sparse: the neighbour, however far it is
            self.cursor.step = int(steps[min(max(0, at.index + (1 if columns > 0 else -1)), len(steps) - 1)])
        elif at is not None:
            self.cursor.step = at.step
        self._keep_in_view()
        self.sync()

    def show_step(self) -> None:
        """Bring the shared crosshair into view, after somebody else has set it."""
        self._keep_in_view()
        self.sync()

    def _keep_in_view(self) -> None:
        if self.options.view is None or self.cursor.step is None:
            return
        axis = self._plot.axis
        column = axis.column_of(self.cross_x(self.cursor.step))
        if not 0 <= column < axis.columns:
            self.options = replace(self.options, view=axis.moved(column - axis.columns // 2))

    def action_left(self) -> None:
        self._move(-1)

    def action_right(self) -> None:
        self._move(1)

    def action_far_left(self) -> None:
        self._move(-10)

    def action_far_right(self) -> None:
        self._move(10)

    def _to(self, step: int | None) -> None:
        self.cursor.step = step
        self._keep_in_view()
        self.sync()

    def action_first(self) -> None:
        self._to(int(self.leader.steps.step.values[0]))

    def action_last(self) -> None:
        self._to(self.leader.step)

    def _event(self, direction: int) -> None:
        """To the nearest event of the focused run; its steps are turned into the crosshair's through the X axis."""
        base, leader = self.options.base, self.leader
        here = self.cross_x(self.cursor.step) if self.cursor.step is not None else float("inf")
        places = [(self.store.x_of(event.step, base), event.step) for event in self.store.events]
        found = [place for place in places if (place[0] > here if direction > 0 else place[0] < here)]
        if found:
            x, step = min(found) if direction > 0 else max(found)
            if leader is not self.store and base != "step":
                at = read(leader, self.options, x)
                step = at.step if at is not None else step
            self._to(step)

    def action_event_back(self) -> None:
        self._event(-1)

    def action_event_next(self) -> None:
        self._event(1)

    # view

    def _zoom(self, factor: float) -> None:
        axis, base = self._plot.axis, self.options.base
        columns = [curve.store.steps.x(base) for curve in self.curves if len(curve.store.steps)]
        first, newest = min(float(xs[0]) for xs in columns), max(float(xs[-1]) for xs in columns)
        anchor = self.cross_x(self.cursor.step) if self.cursor.step is not None else min(newest, axis.high)
        view = axis.zoomed(anchor, factor)
        if view[0] <= (first if axis.log or base == "clock" else min(0.0, first)) and view[1] >= newest:
            self._set(view=None)
        elif view[1] - view[0] > max((newest - first) * 1e-7, abs(anchor) * 1e-12):
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

    def action_log_x(self) -> None:
        self._set(log_x=not self.options.log_x, view=None)

    def action_base(self) -> None:
        self._set(base=BASES[(BASES.index(self.options.base) + 1) % len(BASES)], view=None)

    def action_abandoned(self) -> None:
        self._set(abandoned=not self.options.abandoned)

    # metric and run

    def metrics_known(self) -> list[str]:
        """Names of the metrics of which some run has a value."""

        def has(name: str) -> bool:
            return any(curve.history(name).metrics[name].extremes()[2] for curve in self.curves)

        return [metric.name for metric in CHART_METRICS if has(metric.name)] or [CHART_METRICS[0].name]

    def _metric(self, direction: int) -> None:
        known = self.metrics_known()
        index = known.index(self.options.metric) if self.options.metric in known else 0
        self.set_metric(known[(index + direction) % len(known)])

    def set_metric(self, name: str) -> None:
        """Show another metric with the settings that belong to it; the X base and the view stay."""
        self.options = replace(self.options, metric=name, **{**self.remembered(name), "base": self.options.base})
        self.sync()

    def action_next_metric(self) -> None:
        self._metric(1)

    def action_previous_metric(self) -> None:
        self._metric(-1)

    def action_next_run(self) -> None:
        self.want_run(1)

    def action_previous_run(self) -> None:
        self.want_run(-1)

    # export

    def export_stem(self) -> str:
        """The beginning of an exported file's name."""
        names = "-".join(curve.name for curve in self.curves if curve.name) if len(self.curves) < 3 else "runs"
        return "-".join(part for part in (names, self.options.metric) if part)

    def extra_text(self) -> Sequence[str]:
        """Lines that belong to the chart in a text export: what stands beside it on the screen."""
        return ()

    def action_export(self) -> None:
        from ..screens.dialogs import Choice

        choices = [Choice(kind[0], text, kind) for kind, text in KINDS.items()]
        self.lumina.ask(f"Export {label_of(self.options.metric)}", choices, self._export, ["Full series, not what is in view."])

    def _export(self, kind: str) -> None:
        from .. import chart_export as export

        curves, options, glyphs, extra = self.curves, self.options, self.lumina.look.glyphs, list(self.extra_text())

        def make() -> str:
            if kind == "txt":
                return "\n".join([export.picture_text(curves, options, glyphs), *extra]).rstrip("\n") + "\n"
            runs = [export.copied(curve, options) for curve in curves]
            return export.csv_text(runs) if kind == "csv" else export.svg_text(runs, options)

        self.lumina.spawn(self.lumina.export(self.export_stem(), kind, make))
