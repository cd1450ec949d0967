"""A picture of one metric of a run, or of several runs: which dots, which labels, which marks. No Textual in here;
`line_chart` shows it.

Shape suffixes: D dot columns, H rows and W columns of cells, E evaluations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lumina_engine.monitoring.reduce import SAMPLE, Columns, Pyramid, percentile_range
from lumina_engine.monitoring.ticks import clock_ticks, ticks, value_labels

from ..history import History
from ..series import Event
from ..terminal import Glyphs
from .axis import Scale, x_labels, x_limit, y_limits
from .canvas import DOTS, SPACE, Frame, Spans, cells, dots, joined
from .picture import (
    ACCENT,
    BAD,
    CROSS,
    CURVE,
    EVAL,
    FAINT,
    GOOD,
    LABEL,
    RAW,
    RUN,
    TAIL,
    WARN,
    Along,
    Curve,
    Limits,
    Options,
    Plot,
)
from .readings import edges_of

EVAL_GAP = 4  # columns between two evaluations
MANY = 100  # values of which the outer 10 % are outliers: of fewer, a range would only cut off the beginning of a run
_SIGN_STYLES = {"C": GOOD, "!": WARN, "D": ACCENT, "<": WARN, "|": LABEL}


@dataclass
class _Laid:
    """A curve on the X axis: `edges_D` are the samples at which the dot columns begin."""

    curve: Curve
    history: History
    raw: Pyramid
    edges_D: np.ndarray


def build(curves: Sequence[Curve], options: Options, width: int, height: int, glyphs: Glyphs, before: Limits) -> Plot:
    """Paint `width` x `height` cells. The last of `curves` is the focused one: it lies on top, and the marks are its."""
    plot = Plot(Frame(max(0, width), max(0, height)))
    found = [(curve, curve.history(options.metric)) for curve in curves]
    shown = [(curve, history) for curve, history in found if len(history)]
    if width < 12 or height < 4 or not shown:
        return plot
    log_x = options.log_x and options.base != "clock"
    switches = (options.log_y, log_x, options.outliers, options.abandoned)
    key = (options.metric, options.base, switches, options.view, height, len(shown))
    if before.key != key:
        before = replace(Limits(key=key), x_end=before.x_end if before.key[1:2] == key[1:2] else None)
    rows = height - 2
    x, x_end = _x_range([history.x(options.base) for _, history in shown], options, log_x, before)
    gutter = max(before.gutter, 4)
    for _ in range(2):  # the labels' width decides how many dots there are, and the dots the labels
        plot.left = gutter + 1
        plot.axis = Along(*x, width - gutter - 1, log_x)
        bounds_D = plot.axis.bounds(plot.across * DOTS[glyphs][0])
        laid = [
            _Laid(curve, history, history.metrics[options.metric], _edges(history.x(options.base), bounds_D))
            for curve, history in shown
        ]
        low, high = _y_range(laid, options, x)
        if options.abandoned:
            low, high = _with_tails(low, high, laid[-1].curve, options, x)
        y = y_limits(low, high, rows, options.log_y, before.y)
        marks = ticks(y[0], y[1], min(8, max(2, rows // 2)), options.log_y)
        labels = value_labels(marks, options.log_y)
        need = max((len(label) for label in labels), default=1)
        if need <= gutter:
            break
        gutter = min(need, width - 8)
    plot.limits = Limits(x_end, y, gutter, key)
    scale = Scale(y[0], y[1], rows * DOTS[glyphs][1], options.log_y)
    painter = _Painter(laid, options, plot, glyphs, rows, bounds_D, scale)
    painter.curves()
    painter.axes(marks, labels)
    painter.evaluations()
    painter.crosshair()
    return plot


def _x_range(
    columns: Sequence[np.ndarray], options: Options, log: bool, before: Limits
) -> tuple[tuple[float, float], float | None]:
    if options.view is not None and (options.view[0] > 0 or not log):
        return options.view, None
    newest = max(float(xs[-1]) for xs in columns)
    if log:
        above = [float(xs[at]) for xs in columns if (at := int(np.searchsorted(xs, 0, side="right"))) < len(xs)]
        start = min(above, default=0.1)
        if newest <= start:
            return (start / 2, start * 2), None
        return (start, newest), None
    first = min(float(xs[0]) for xs in columns)
    start = 0.0 if first <= 0.1 * newest and options.base != "clock" else first
    end = x_limit(newest, start, before.x_end)
    return (start, end), end


def _edges(xs: np.ndarray, bounds_D: np.ndarray) -> np.ndarray:
    edges = edges_of(xs, bounds_D)
    last = float(bounds_D[-1])
    if np.issubdtype(xs.dtype, np.integer):
        last = math.floor(min(last, 9e18))
    edges[-1] = np.searchsorted(xs, last, side="right")  # the last column has its right end too
    return np.maximum.accumulate(edges)


def _y_range(laid: Sequence[_Laid], options: Options, x: tuple[float, float]) -> tuple[float, float]:
    """Lowest and highest value to show, over all curves."""
    found = [limits for one in laid if (limits := _range_of(one, options, x, len(laid))) is not None]
    if not found:
        return (0.1, 1.0) if options.log_y else (0.0, 1.0)
    return min(low for low, _ in found), max(high for _, high in found)


def _with_tails(low: float, high: float, curve: Curve, options: Options, x: tuple[float, float]) -> tuple[float, float]:
    """Limits that also hold what rewinds cut off within `x`."""
    for tail in curve.store.tails:
        if options.metric in tail.metrics:
            inside = (tail.x[options.base] >= x[0]) & (tail.x[options.base] <= x[1])
            found = percentile_range(tail.metrics[options.metric][inside], 0, 100, positive=options.log_y)
            if found is not None:
                low, high = min(low, found[0]), max(high, found[1])
    return low, high


def _range_of(one: _Laid, options: Options, x: tuple[float, float], share: int) -> tuple[float, float] | None:
    """Of the middle 90 %, or of everything; evaluations and the newest value always fit. `share` runs share the samples."""
    a, b = int(one.edges_D[0]), int(one.edges_D[-1])
    values = one.raw.values[max(0, a - 1) : b + 1]
    middle = options.outliers and len(values) >= MANY
    if middle or options.log_y:
        sample = values[:: max(1, len(values) * share // SAMPLE)] if share > 1 else values
        found = percentile_range(sample, *((5, 95) if middle else (0, 100)), positive=options.log_y)
    else:
        reduced = one.raw.columns(np.array([max(0, a - 1), min(b + 1, len(one.raw))]))
        found = (float(reduced.low_C[0]), float(reduced.high_C[0])) if reduced.count_C[0] else None
    if found is None:
        return None
    low, high = found
    if middle:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        if options.log_y:
            low = max(low, found[0] / 1.2)
    always = [float(value) for value in values[-1:]]
    if options.metric == "loss" and one.curve.letter == "":
        evals = one.curve.store.evals
        inside_E = (evals.x(options.base) >= x[0]) & (evals.x(options.base) <= x[1])
        always += percentile_range(evals.metrics["loss"].values[inside_E], 0, 90) or ()
    for value in always:
        if math.isfinite(value) and not (options.log_y and value <= 0):
            low, high = min(low, value), max(high, value)
    return low, high


class _Painter:
    def __init__(
        self,
        laid: Sequence[_Laid],
        options: Options,
        plot: Plot,
        glyphs: Glyphs,
        rows: int,
        bounds_D: np.ndarray,
        scale: Scale,
    ) -> None:
        self.laid, self.options, self.plot, self.glyphs = laid, options, plot, glyphs
        self.rows, self.bounds_D, self.scale = rows, bounds_D, scale
        self.middle_D = (bounds_D[:-1] + bounds_D[1:]) / 2
        self.focused = laid[-1]
        self.store = self.focused.curve.store
        self.many = bool(self.focused.curve.letter)

    # curves

    def curves(self) -> None:
        options, focused = self.options, self.focused
        if options.abandoned:
            for tail in self.store.tails:
                if options.metric in tail.metrics:
                    self._layer(self._tail(tail.x[options.base], tail.metrics[options.metric]), TAIL)
        reduced = focused.raw.columns(focused.edges_D)
        spans = self._spans(focused, focused.raw, reduced)
        missing = int(reduced.missing_C.sum())
        if self.many:  # the noise of eight runs would hide their lines: raw values only without smoothing
            spans, others = self._overlay(spans)
            missing += others
        else:
            self._layer(spans, RAW if options.weight else CURVE)
            if options.weight:
                self._layer(self._smooth(focused)[0], CURVE)
        self._outside(spans)
        if reduced.missing_C.any():
            self._missing(reduced)
        self._count_left_out(missing, reduced)

    def _smooth(self, one: _Laid) -> tuple[Spans, int]:
        """The smoothed line of a run, and how many of its values are not finite."""
        smooth = one.history.smooth(self.options.metric, self.options.weight)
        reduced = smooth.columns(one.edges_D)
        return self._spans(one, smooth, reduced), int(reduced.missing_C.sum())

    def _overlay(self, focused: Spans) -> tuple[Spans, int]:
        """The lines of several runs, the focused one on top, then their letters.

        Gives the focused line (`focused` are its raw values), and how many values of the others are missing.
        """
        missing, ends, spans = 0, [], focused
        for one in self.laid:
            if one is self.focused and not self.options.weight:
                spans, count = focused, 0
            elif self.options.weight:
                spans, count = self._smooth(one)
            else:
                reduced = one.raw.columns(one.edges_D)
                spans, count = self._spans(one, one.raw, reduced), int(reduced.missing_C.sum())
            missing += count if one is not self.focused else 0
            self._layer(spans, RUN + one.curve.slot)
            drawn_D = np.flatnonzero(np.isfinite(spans.low_D))
            if len(drawn_D):
                last = int(drawn_D[-1])
                row = self._row_at(float(spans.low_D[last] + spans.high_D[last]) / 2)
                ends.append((min(last // DOTS[self.glyphs][0] + 1, self.plot.across - 1), row, one.curve))
        self._letters(ends)
        return spans, missing

    def _letters(self, ends: Sequence[tuple[int, int, Curve]]) -> None:
        """A letter where each line ends, the nearest free row where two end together: colour alone says nothing."""
        taken: set[tuple[int, int]] = set()
        for column, row, curve in reversed(ends):
            near = sorted(range(self.rows), key=lambda r: abs(r - row))
            free = next((r for r in near if (column, r) not in taken), row)
            taken.add((column, free))
            self.plot.frame.put(self.plot.left + column, free, curve.letter, RUN + curve.slot)

    def _count_left_out(self, missing: int, focused: Columns) -> None:
        """Values that the axes cannot show are left out, and counted in the title."""
        not_above = 0
        for one in self.laid:
            a, b = int(one.edges_D[0]), int(one.edges_D[-1])
            reduced = focused if one is self.focused or not self.options.log_y else one.raw.columns(np.array([a, b]))
            if self.options.log_y and np.fmin.reduce(reduced.low_C) <= 0:
                not_above += int(np.count_nonzero(one.raw.values[a:b] <= 0))
            if self.plot.axis.log:
                not_above += int(np.searchsorted(one.history.x(self.options.base), 0, side="right"))
        self.plot.notes += [f"{missing} not finite"] if missing else []
        self.plot.notes += [f"{not_above} not above 0"] if not_above else []

    def _layer(self, spans: Spans, style: int) -> None:
        grid_RD = dots(spans, self.rows * DOTS[self.glyphs][1])
        self.plot.frame.layer(cells(grid_RD, self.glyphs), style, x=self.plot.left)

    def _spans(self, one: _Laid, pyramid: Pyramid, reduced: Columns) -> Spans:
        low_D, high_D = self.scale.at(reduced.low_C), self.scale.at(reduced.high_C)
        empty_D = (reduced.count_C == 0) & (reduced.missing_C == 0)
        if empty_D.any():  # between two samples: the straight line from one to the other
            between_D = self.scale.at(self._between(one, pyramid.values))
            low_D = np.where(empty_D, between_D, low_D)
            high_D = np.where(empty_D, between_D, high_D)
        return joined(low_D, high_D)

    def _between(self, one: _Laid, values: np.ndarray) -> np.ndarray:
        xs = one.history.x(self.options.base)
        after_D = one.edges_D[:-1]
        inside_D = (after_D > 0) & (after_D < len(xs))
        after = np.where(inside_D, after_D, 1 if len(xs) > 1 else 0)
        before = np.maximum(after - 1, 0)
        x0, x1 = xs[before].astype(np.float64), xs[after].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            share_D = np.where(x1 > x0, (self.middle_D - x0) / (x1 - x0), 0.0)
            line_D = values[before] + share_D * (values[after].astype(np.float64) - values[before])
        return np.where(inside_D, line_D, np.nan)

    def _tail(self, xs: np.ndarray, values: np.ndarray) -> Spans:
        good = np.isfinite(values)
        if good.sum() < 2:
            nothing = np.full(len(self.middle_D), np.nan)
            return Spans(nothing, nothing)
        at_D = self.scale.at(np.interp(self.middle_D, xs[good], values[good], left=np.nan, right=np.nan))
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
        for row, mark, outside_W in ((0, "^", above_W), (self.rows - 1, "v", below_W)):
            frame.code_HW[row, self.plot.left :][outside_W] = ord(mark)
            frame.style_HW[row, self.plot.left :][outside_W] = RAW

    def _missing(self, reduced: Columns) -> None:
        """`x` in each column that holds a value that is not finite, at the height of the values around it."""
        known_D = np.where(reduced.count_C > 0, np.arange(len(reduced.count_C)), -1)
        before_D = np.maximum.accumulate(known_D)
        first = int(np.argmax(known_D >= 0)) if (known_D >= 0).any() else -1
        for column in np.flatnonzero(reduced.missing_C).tolist():
            at = int(before_D[column]) if before_D[column] >= 0 else first
            row = self.row_of(float(reduced.mean_C[at])) if at >= 0 else None
            cell = self.plot.left + column // DOTS[self.glyphs][0]
            self.plot.frame.put(cell, row if row is not None else self.rows - 1, "×", BAD)

    def row_of(self, value: float) -> int | None:
        """The row of cells of a value, clipped to the picture; None for what has no place."""
        position = self.scale.place(value)
        if not math.isfinite(position):
            return None
        return self._row_at(position)

    def _row_at(self, position: float) -> int:
        row = self.rows - 1 - math.floor(position / DOTS[self.glyphs][1])
        return min(max(row, 0), self.rows - 1)

    # frame

    def axes(self, marks: list[float], labels: list[str]) -> None:
        frame, left = self.plot.frame, self.plot.left
        frame.code_HW[: self.rows, left - 1] = ord("│")
        frame.style_HW[: self.rows, left - 1] = FAINT
        used: set[int] = set()
        for value, label in sorted(zip(marks, labels, strict=True), reverse=True):
            row = self.row_of(value)
            if row is None or row in used:
                continue
            used |= {row, row + 1}
            frame.put(left - 1 - len(label), row, label, LABEL)
            frame.put(left - 1, row, "┤", FAINT)
        frame.code_HW[self.rows, left - 1 :] = ord("─")
        frame.code_HW[self.rows, left - 1] = ord("└")
        frame.style_HW[self.rows, left - 1 :] = FAINT
        self._x_axis()
        self._events()

    def _x_axis(self) -> None:
        frame, left, axis, base = self.plot.frame, self.plot.left, self.plot.axis, self.options.base
        room = max(1, self.plot.across // 9)
        if base == "clock":
            values = clock_ticks(axis.low, axis.high, room)
        else:
            values = ticks(axis.low, axis.high, room, log=axis.log, whole=base == "step")
        end, last = 0, frame.width if base == "step" else frame.width - len(base) - 2  # another base than usual is always named
        for value, label in zip(values, x_labels(values, base), strict=True):
            column = axis.column_of(value)
            if not 0 <= column < self.plot.across:
                continue
            frame.put(left + column, self.rows, "┬", FAINT)
            start = max(0, left + column - len(label) // 2)
            if start >= end and start + len(label) <= last:
                frame.put(start, self.rows + 1, label, LABEL)
                end = start + len(label) + 2
        if end + len(base) <= frame.width:
            frame.put(frame.width - len(base), self.rows + 1, base, FAINT)

    def _events(self) -> None:
        events = self.store.events
        step_N = np.fromiter((event.step for event in events), np.int64, len(events))
        column_N = self.plot.axis.columns_of(self.store.xs_of(step_N, self.options.base))
        piled: defaultdict[int, list[Event]] = defaultdict(list)
        for at in np.flatnonzero((column_N >= 0) & (column_N < self.plot.across)).tolist():
            piled[int(column_N[at])].append(events[at])
        for column, events in piled.items():
            style = max((_SIGN_STYLES.get(event.sign, LABEL) for event in events), key=lambda s: (s == WARN, s))
            sign = events[0].sign if len(events) == 1 else str(len(events)) if len(events) < 10 else "+"
            self.plot.frame.put(self.plot.left + column, self.rows, sign, style)

    def evaluations(self) -> None:
        if self.options.metric != "loss":
            return
        history: History = self.store.evals
        values = history.metrics["loss"].values
        column_E = self.plot.axis.columns_of(history.x(self.options.base))
        room = self.plot.across + EVAL_GAP
        for at in reversed(np.flatnonzero((column_E >= 0) & (column_E < self.plot.across)).tolist()):
            column = int(column_E[at])  # the newest first; those that would hide the curve are left to the crosshair
            row = self.row_of(float(values[at])) if column <= room - EVAL_GAP else None
            if row is not None:
                self.plot.frame.put(self.plot.left + column, row, "o", EVAL)
                room = column

    def crosshair(self) -> None:
        frame = self.plot.frame
        for x, style in ((self.options.pin, ACCENT), (self.options.cross, CROSS)):
            if x is None:
                continue
            column = self.plot.left + self.plot.axis.column_of(x)
            if not self.plot.left <= column < frame.width:
                continue
            for y in range(self.rows):
                if frame.code_HW[y, column] == SPACE:
                    frame.put(column, y, "│", style)
                else:
                    frame.style_HW[y, column] = style
            frame.put(column, self.rows, "┼", style)
