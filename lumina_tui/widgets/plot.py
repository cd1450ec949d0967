"""A picture of one metric of a run: which dots, which labels, which marks. No Textual in here; `line_chart` shows it.

Shape suffixes: D dot columns, H rows and W columns of cells, E evaluations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np

from lumina_engine.monitoring.reduce import Columns, Pyramid, percentile_range
from lumina_engine.monitoring.ticks import ticks, value_labels

from ..history import METRICS, Base, History
from ..paint import number
from ..series import Event, RunStore
from ..terminal import Glyphs
from .axis import Scale, x_labels, x_limit, y_limits
from .canvas import DOTS, SPACE, Frame, Spans, cells, dots, joined

# style numbers of a frame, in the order of STYLE_ROLES
NONE, FAINT, LABEL, RAW, CURVE, EVAL, GOOD, WARN, BAD, CROSS, TAIL, ACCENT = range(12)
STYLE_ROLES = ("text", "faint", "dim", "raw", "curve", "second", "good", "warn", "bad", "title", "faint", "accent")
EVAL_GAP = 4  # columns between two evaluations
_SIGN_STYLES = {"C": GOOD, "!": WARN, "D": ACCENT, "<": WARN, "|": LABEL}


@dataclass(frozen=True)
class Options:
    """What the user chose for a chart. `view` None: everything, following the newest point; x values in `base`."""

    metric: str = "loss"
    base: Base = "step"
    weight: float = 0.9
    outliers: bool = True
    log_y: bool = False
    view: tuple[float, float] | None = None
    abandoned: bool = False
    cross: float | None = None
    pin: float | None = None


@dataclass(frozen=True)
class Limits:
    """The axes of the picture before, so that the next one does not tremble."""

    x_end: float | None = None
    y: tuple[float, float] | None = None
    gutter: int = 0
    key: tuple[object, ...] = ()


@dataclass
class Plot:
    """A finished picture."""

    frame: Frame
    left: int = 0  # cells before the first column of dots
    across: int = 0  # columns of cells with dots
    x: tuple[float, float] = (0.0, 1.0)
    limits: Limits = field(default_factory=Limits)
    notes: list[str] = field(default_factory=list)

    def x_at(self, column: int) -> float:
        """The X value in the middle of a column of cells."""
        return self.x[0] + (column + 0.5) / max(1, self.across) * (self.x[1] - self.x[0])

    def column_of(self, x: float) -> int:
        """The column of cells of an X value; may lie outside."""
        return math.floor((x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0) * self.across)


@dataclass(frozen=True)
class Reading:
    """The values at one place of a chart."""

    index: int
    x: float
    step: int
    value: float
    smooth: float | None


def read(store: RunStore, options: Options, x: float | None = None) -> Reading | None:
    """The sample nearest to `x` (None: the newest); None without samples."""
    history = store.history(options.metric)
    if not len(history):
        return None
    xs = history.x(options.base)
    index = len(xs) - 1
    if x is not None:
        index = int(np.clip(np.searchsorted(xs, x), 0, len(xs) - 1))
        if index and x - xs[index - 1] < xs[index] - x:
            index -= 1
    smooth = history.smooth(options.metric, options.weight).values[index] if options.weight else None
    value = float(history.metrics[options.metric].values[index])
    return Reading(index, float(xs[index]), int(history.step.values[index]), value, None if smooth is None else float(smooth))


def build(store: RunStore, options: Options, width: int, height: int, glyphs: Glyphs, before: Limits) -> Plot:
    """Paint `width` x `height` cells."""
    plot = Plot(Frame(max(0, width), max(0, height)))
    if width < 12 or height < 4 or not len(store.history(options.metric)):
        return plot
    key = (options.metric, options.base, options.log_y, options.view, options.outliers, height)
    if before.key != key:
        before = replace(Limits(key=key), x_end=before.x_end if before.key[1:2] == key[1:2] else None)
    rows = height - 2
    x, x_end = _x_range(store, options, before)
    gutter = max(before.gutter, 4)
    for _ in range(2):  # the labels' width decides how many dots there are, and the dots the labels
        plot.left, plot.across = gutter + 1, width - gutter - 1
        bounds_D = np.linspace(x[0], x[1], plot.across * DOTS[glyphs][0] + 1)
        edges_D = _edges(store.history(options.metric).x(options.base), bounds_D)
        low, high = _y_range(store, options, edges_D, x)
        y = y_limits(low, high, rows, options.log_y, before.y)
        marks = ticks(y[0], y[1], min(8, max(2, rows // 2)), options.log_y)
        labels = value_labels(marks, options.log_y)
        need = max((len(label) for label in labels), default=1)
        if need <= gutter:
            break
        gutter = need
    plot.x = x
    plot.limits = Limits(x_end, y, gutter, key)
    scale = Scale(y[0], y[1], rows * DOTS[glyphs][1], options.log_y)
    painter = _Painter(store, options, plot, glyphs, rows, edges_D, bounds_D, scale)
    painter.curves()
    painter.axes(marks, labels)
    painter.evaluations()
    painter.crosshair()
    return plot


def _x_range(store: RunStore, options: Options, before: Limits) -> tuple[tuple[float, float], float | None]:
    if options.view is not None:
        return options.view, None
    xs = store.history(options.metric).x(options.base)
    first, newest = float(xs[0]), float(xs[-1])
    start = 0.0 if first <= 0.1 * newest else first
    end = x_limit(newest, start, before.x_end)
    return (start, end), end


def _edges(xs: np.ndarray, bounds_D: np.ndarray) -> np.ndarray:
    edges = np.searchsorted(xs, bounds_D, side="left")
    edges[-1] = np.searchsorted(xs, bounds_D[-1], side="right")
    return np.maximum.accumulate(edges)


def _y_range(store: RunStore, options: Options, edges_D: np.ndarray, x: tuple[float, float]) -> tuple[float, float]:
    """Lowest and highest value to show: of the middle 90 %, or of everything; evaluations and the newest value always fit."""
    history = store.history(options.metric)
    a, b = int(edges_D[0]), int(edges_D[-1])
    values = history.metrics[options.metric].values[max(0, a - 1) : b + 1]
    if options.log_y:
        values = values[values > 0]
    found = percentile_range(values, 5, 95) if options.outliers else percentile_range(values, 0, 100)
    if not options.outliers:
        reduced = history.metrics[options.metric].columns(np.array([a, b]))
        if reduced.count_C[0] and not options.log_y:
            found = float(reduced.low_C[0]), float(reduced.high_C[0])
    if found is None:
        return (0.1, 1.0) if options.log_y else (0.0, 1.0)
    low, high = found
    if options.outliers:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        if options.log_y:
            low = max(low, found[0] / 1.2)
    always = [float(value) for value in values[-1:]]
    if options.metric == "loss":
        evals_E = store.evals.metrics["loss"].values
        inside_E = (store.evals.x(options.base) >= x[0]) & (store.evals.x(options.base) <= x[1])
        always += percentile_range(evals_E[inside_E], 0, 90) or ()
    for value in always:
        if math.isfinite(value) and not (options.log_y and value <= 0):
            low, high = min(low, value), max(high, value)
    return low, high


class _Painter:
    def __init__(
        self,
        store: RunStore,
        options: Options,
        plot: Plot,
        glyphs: Glyphs,
        rows: int,
        edges_D: np.ndarray,
        bounds_D: np.ndarray,
        scale: Scale,
    ) -> None:
        self.store, self.options, self.plot, self.glyphs = store, options, plot, glyphs
        self.rows, self.edges_D, self.bounds_D, self.scale = rows, edges_D, bounds_D, scale
        self.middle_D = (bounds_D[:-1] + bounds_D[1:]) / 2

    # curves

    def curves(self) -> None:
        history, options = self.store.history(self.options.metric), self.options
        if options.abandoned:
            for tail in (item for item in self.store.tails if options.metric in item.metrics):
                self._layer(self._tail(tail.x[options.base], tail.metrics[options.metric]), TAIL)
        raw = history.metrics[options.metric]
        reduced = raw.columns(self.edges_D)
        spans = self._spans(raw, reduced)
        self._layer(spans, RAW if options.weight else CURVE)
        if options.weight:
            smooth = history.smooth(options.metric, options.weight)
            self._layer(self._spans(smooth, smooth.columns(self.edges_D)), CURVE)
        self._outside(spans)
        if reduced.missing_C.any():
            self._missing(raw, int(reduced.missing_C.sum()))
        if options.log_y:
            dropped = int((raw.values[int(self.edges_D[0]) : int(self.edges_D[-1])] <= 0).sum())
            self.plot.notes += [f"{dropped} not above 0"] if dropped else []

    def _layer(self, spans: Spans, style: int) -> None:
        grid_RD = dots(spans, self.rows * DOTS[self.glyphs][1])
        self.plot.frame.layer(cells(grid_RD, self.glyphs), style, x=self.plot.left)

    def _spans(self, pyramid: Pyramid, reduced: Columns) -> Spans:
        low_D, high_D = self.scale.at(reduced.low_C), self.scale.at(reduced.high_C)
        empty_D = (reduced.count_C == 0) & (reduced.missing_C == 0)
        if empty_D.any():  # between two samples: the straight line from one to the other
            between_D = self.scale.at(self._between(pyramid.values))
            low_D = np.where(empty_D, between_D, low_D)
            high_D = np.where(empty_D, between_D, high_D)
        return joined(low_D, high_D)

    def _between(self, values: np.ndarray) -> np.ndarray:
        xs = self.store.history(self.options.metric).x(self.options.base)
        after_D = self.edges_D[:-1]
        inside_D = (after_D > 0) & (after_D < len(xs))
        after = np.where(inside_D, after_D, 1 if len(xs) > 1 else 0)
        before = np.maximum(after - 1, 0)
        x0, x1 = xs[before].astype(np.float64), xs[after].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            share_D = np.where(x1 > x0, (self.middle_D - x0) / (x1 - x0), 0.0)
            line_D = values[before] + share_D * (values[after].astype(np.float64) - values[before])
        return np.where(inside_D, line_D, np.nan)

    def _tail(self, steps: np.ndarray, values: np.ndarray) -> Spans:
        good = np.isfinite(values)
        if good.sum() < 2:
            nothing = np.full(len(self.middle_D), np.nan)
            return Spans(nothing, nothing)
        at_D = self.scale.at(np.interp(self.middle_D, steps[good], values[good], left=np.nan, right=np.nan))
        return joined(at_D, at_D.copy())

    def _by_cell(self, values_D: np.ndarray) -> np.ndarray:
        return values_D.reshape(self.plot.across, -1)

    def _outside(self, spans: Spans) -> None:
        """Marks at the edge where a column lies wholly outside the Y range: clipped, not lost."""
        top = self.rows * DOTS[self.glyphs][1] - 1
        with np.errstate(invalid="ignore"):
            above_W = self._by_cell((spans.low_D > top) | np.isnan(spans.low_D)).all(axis=1)
            above_W &= self._by_cell(spans.low_D > top).any(axis=1)
            below_W = self._by_cell((spans.high_D < 0) | np.isnan(spans.high_D)).all(axis=1)
            below_W &= self._by_cell(spans.high_D < 0).any(axis=1)
        frame = self.plot.frame
        for column in np.flatnonzero(above_W).tolist():
            frame.put(self.plot.left + column, 0, "^", RAW)
        for column in np.flatnonzero(below_W).tolist():
            frame.put(self.plot.left + column, self.rows - 1, "v", RAW)

    def _missing(self, raw: Pyramid, count: int) -> None:
        """`x` where a value is not finite, at the height of the value before."""
        self.plot.notes.append(f"{count} not finite")
        a, b = int(self.edges_D[0]), int(self.edges_D[-1])
        finite = np.isfinite(raw.values[:b])
        good, bad = np.flatnonzero(finite), np.flatnonzero(~finite[a:]) + a
        xs = self.store.history(self.options.metric).x(self.options.base)
        columns = [self.plot.column_of(float(x)) for x in xs[bad[-2000:]].tolist()]
        for column, index in dict(zip(columns, bad[-2000:].tolist(), strict=True)).items():
            if 0 <= column < self.plot.across:
                at = int(np.searchsorted(good, index)) - 1
                row = self.row_of(float(raw.values[good[at]])) if at >= 0 else None
                self.plot.frame.put(self.plot.left + column, row if row is not None else self.rows - 1, "×", BAD)

    def row_of(self, value: float) -> int | None:
        """The row of cells of a value, clipped to the picture; None for what has no place."""
        position = float(self.scale.at(np.array([value]))[0])
        if not math.isfinite(position):
            return None
        down = DOTS[self.glyphs][1]
        return int(np.clip(self.rows - 1 - math.floor(position / down), 0, self.rows - 1))

    # frame

    def axes(self, marks: list[float], labels: list[str]) -> None:
        frame, left = self.plot.frame, self.plot.left
        for y in range(self.rows):
            frame.put(left - 1, y, "│", FAINT)
        used: set[int] = set()
        for value, label in sorted(zip(marks, labels, strict=True), reverse=True):
            row = self.row_of(value)
            if row is None or row in used:
                continue
            used |= {row, row + 1}
            frame.put(left - 1 - len(label), row, label, LABEL)
            frame.put(left - 1, row, "┤", FAINT)
        frame.put(left - 1, self.rows, "└" + "─" * self.plot.across, FAINT)
        self._x_axis()
        self._events()

    def _x_axis(self) -> None:
        frame, left, (x0, x1) = self.plot.frame, self.plot.left, self.plot.x
        values = ticks(x0, x1, max(1, self.plot.across // 9), whole=self.options.base == "step")
        end = 0
        for value, label in zip(values, x_labels(values, self.options.base), strict=True):
            column = self.plot.column_of(value)
            if not 0 <= column < self.plot.across:
                continue
            frame.put(left + column, self.rows, "┬", FAINT)
            start = max(0, left + column - len(label) // 2)
            if start >= end and start + len(label) <= frame.width:
                frame.put(start, self.rows + 1, label, LABEL)
                end = start + len(label) + 2
        word = self.options.base
        if end + len(word) <= frame.width:
            frame.put(frame.width - len(word), self.rows + 1, word, FAINT)

    def _events(self) -> None:
        piled: defaultdict[int, list[Event]] = defaultdict(list)
        for event in self.store.events:
            column = self.plot.column_of(self.store.x_of(event.step, self.options.base))
            if 0 <= column < self.plot.across:
                piled[column].append(event)
        for column, events in piled.items():
            style = max((_SIGN_STYLES.get(event.sign, LABEL) for event in events), key=lambda s: (s == WARN, s))
            sign = events[0].sign if len(events) == 1 else str(len(events)) if len(events) < 10 else "+"
            self.plot.frame.put(self.plot.left + column, self.rows, sign, style)

    def evaluations(self) -> None:
        if self.options.metric != "loss":
            return
        history: History = self.store.evals
        points = list(zip(history.x(self.options.base).tolist(), history.metrics["loss"].values.tolist(), strict=True))
        room = self.plot.across + EVAL_GAP
        for x, value in reversed(points):  # the newest first; those that would hide the curve are left to the crosshair
            column, row = self.plot.column_of(x), self.row_of(value)
            if row is not None and 0 <= column < self.plot.across and column <= room - EVAL_GAP:
                self.plot.frame.put(self.plot.left + column, row, "o", EVAL)
                room = column

    def crosshair(self) -> None:
        frame = self.plot.frame
        for x, style in ((self.options.pin, ACCENT), (self.options.cross, CROSS)):
            if x is None:
                continue
            column = self.plot.left + self.plot.column_of(x)
            if not self.plot.left <= column < frame.width:
                continue
            for y in range(self.rows):
                if frame.code_HW[y, column] == SPACE:
                    frame.put(column, y, "│", style)
                else:
                    frame.style_HW[y, column] = style
            frame.put(column, self.rows, "┼", style)


def value_text(metric: str, value: float | None) -> str:
    """A value of a metric for a person."""
    if value is None:
        return "-"
    if metric in ("loss", "aux_loss", "z_loss", "grad_norm"):
        return f"{value:.3f}" if math.isfinite(value) and abs(value) < 1000 else number(value)
    if metric == "lr":
        return number(value) if not math.isfinite(value) or value == 0 or value >= 0.01 else f"{value:.2e}".replace("e-0", "e-")
    if metric == "mfu":
        return f"{100 * value:.1f} %" if math.isfinite(value) else number(value)
    if metric == "tokens_per_s":
        from ..paint import count

        return count(value)
    return number(value)


def label_of(metric: str) -> str:
    """The name of a metric on the screen."""
    return METRICS[metric].label
