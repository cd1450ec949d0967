"""Charts against brute force: which sample lies in which column, what a column shows, what is repainted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lumina_tui.series import RunStore
from lumina_tui.widgets.axis import Scale
from lumina_tui.widgets.canvas import DOTS, SPACE, Frame, cells, changed_regions, dots, joined
from lumina_tui.widgets.picture import LETTERS, RUN, Along, Curve, Limits, Options
from lumina_tui.widgets.plot import _edges, build
from lumina_tui.widgets.readings import column_range, edges_of, read

values = st.floats(-1e6, 1e6, width=32) | st.sampled_from([math.nan, math.inf, -math.inf])
series = st.lists(values, min_size=1, max_size=300)


def store_of(losses, stride: int = 1, per_step: float = 100.0) -> RunStore:
    store, n = RunStore(), len(losses)
    steps = np.arange(1, n + 1) * stride
    columns = {name: np.asarray(losses, np.float32) for name in store.steps.metrics}
    store.steps.extend(steps, steps * per_step, steps / 3600, columns, 1.7e9 + steps)
    return store


def wide(low: float, high: float, columns: int, log: bool) -> Along:
    return Along(low, high, columns, log)


@given(
    st.lists(st.integers(0, 2**40), max_size=200),
    st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=50),
    st.sampled_from([np.int64, np.float64]),
)
def test_places_in_whole_numbers_are_those_in_floats(xs, bounds, kind):
    xs = np.array(sorted(xs), kind)
    bounds = np.array(bounds)
    np.testing.assert_array_equal(edges_of(xs, bounds), np.searchsorted(xs.astype(np.float64), bounds, side="left"))


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 10**7), min_size=1, max_size=200, unique=True),
    st.integers(1, 90),
    st.booleans(),
    st.sampled_from([np.int64, np.float64]),
)
def test_every_sample_lies_in_exactly_one_column_linear_and_logarithmic(xs, columns, log, kind):
    xs = np.array(sorted(xs), kind)
    low, high = float(xs[0]), float(max(xs[-1], xs[0] + 1))
    bounds = wide(low, high, columns, log).bounds(2 * columns)
    edges = _edges(xs, bounds)
    assert (np.diff(edges) >= 0).all()
    for column in range(2 * columns):
        inside = xs[edges[column] : edges[column + 1]]
        below, above = bounds[column] * (1 - 1e-9), bounds[column + 1] * (1 + 1e-9)
        assert ((inside >= below) & (inside <= above)).all()
    missed = len(xs) - (edges[-1] - edges[0])
    assert missed <= 2 * log  # 10**log10(x) may miss the outermost sample by a rounding


@given(st.floats(1e-3, 1e9), st.floats(1.001, 1e6), st.integers(1, 300), st.booleans(), st.data())
def test_columns_and_x_values_are_each_others_inverse(low, span, columns, log, data):
    axis = wide(low, low * span, columns, log)
    column = data.draw(st.integers(0, columns - 1))
    assert axis.column_of(axis.x_at(column)) == column
    begin, end = axis.around(column)
    assert begin < axis.x_at(column) < end
    moved = wide(*axis.moved(5), columns, log)
    assert moved.column_of(axis.x_at(column)) in (column - 5, column - 4, column - 6)
    about = axis.x_at(column)
    near = wide(*axis.zoomed(about, 0.5), columns, log)
    assert near.low < about < near.high and near.column_of(about) in (column - 1, column, column + 1)
    assert near.low >= axis.low * (1 - 1e-9) - 1e-9 and near.high <= axis.high * (1 + 1e-9)


@settings(max_examples=80)
@given(series, st.integers(1, 5), st.data())
def test_range_of_a_column_is_that_of_its_samples(losses, stride, data):
    store = store_of(losses, stride)
    xs = store.steps.step.values
    a = data.draw(st.floats(-1, float(xs[-1]) + 2))
    b = data.draw(st.floats(a, float(xs[-1]) + 3))
    inside = np.asarray(losses, np.float32)[(xs >= a) & (xs < b)]
    inside = inside[np.isfinite(inside)]
    found = column_range(store, Options(), (a, b))
    assert found == ((float(inside.min()), float(inside.max()), len(inside)) if len(inside) else None)


@settings(max_examples=80)
@given(series, st.integers(1, 5), st.floats(-10, 2_000), st.floats(0, 50))
def test_the_sample_read_is_the_nearest(losses, stride, x, within):
    store = store_of(losses, stride)
    xs = store.steps.step.values
    at = read(store, Options(weight=0.0), x, within)
    if x < xs[0] - within or x > xs[-1] + within:
        assert at is None
    else:
        assert at is not None and abs(at.x - x) == np.abs(xs - x).min()


def brute_grid(losses, plot, options, glyphs, rows) -> np.ndarray:
    """The dots of a series, column by column from its samples: what a chart without shortcuts would draw."""
    across, down = DOTS[glyphs]
    bounds = plot.axis.bounds(plot.across * across)
    scale = Scale(*plot.limits.y, rows * down, options.log_y)
    xs = np.arange(1, len(losses) + 1, dtype=np.float64)
    low, high = np.full(len(bounds) - 1, np.nan), np.full(len(bounds) - 1, np.nan)
    middle = (bounds[:-1] + bounds[1:]) / 2
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        last = i == len(bounds) - 2
        inside = np.asarray(losses, np.float64)[(xs >= a) & ((xs <= b) if last else (xs < b))]
        good = scale.at(inside)[np.isfinite(scale.at(inside))]
        if len(good):
            low[i], high[i] = good.min(), good.max()
        elif not len(inside):  # between two samples: the straight line
            k = int(np.searchsorted(xs, b if last else a, side="left"))
            if 0 < k < len(xs):
                share = (middle[i] - xs[k - 1]) / (xs[k] - xs[k - 1])
                low[i] = high[i] = scale.at(np.array([losses[k - 1] + share * (losses[k] - losses[k - 1])]))[0]
    return cells(dots(joined(low, high), rows * down), glyphs)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.5, 100, width=16), min_size=2, max_size=400),
    st.sampled_from(["braille", "block", "ascii"]),
    st.booleans(),
    st.booleans(),
)
def test_the_dots_of_a_line_are_those_of_its_samples(losses, glyphs, log_x, log_y):
    options = Options(weight=0.0, outliers=False, log_x=log_x, log_y=log_y)
    plot = build([Curve(store_of(losses))], options, 60, 14, glyphs, Limits())
    want = brute_grid(losses, plot, options, glyphs, 12)
    got = plot.frame.code_HW[:-2, plot.left :]
    assert (
        (got == want) | ((want == SPACE) & (got == SPACE))
    ).mean() > 0.995  # log10 and back may round one sample over a bound
    if not log_x:
        assert (got == want).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(series, min_size=2, max_size=8), st.sampled_from(["braille", "block", "ascii"]), st.booleans())
def test_overlay_columns_of_every_run_come_from_its_own_samples(runs, glyphs, log_x):
    """The focused line is what it is alone; every run that can be drawn has its letter, in its own colour."""
    curves = [Curve(store_of(losses, stride=i + 1), f"r{i}", i, LETTERS[i]) for i, losses in enumerate(runs)]
    options = Options(weight=0.0, outliers=False, log_x=log_x)
    many = build(curves, options, 70, 20, glyphs, Limits())
    if many.frame.height and many.across:
        body = np.s_[:-2, many.left :]
        for curve, losses in zip(curves, runs, strict=True):
            if not np.isfinite(np.asarray(losses, np.float32)).any():
                continue
            at = (many.frame.code_HW[body] == ord(curve.letter)) & (many.frame.style_HW[body] == RUN + curve.slot)
            assert at.sum() >= 1 or "not finite" in " ".join(many.notes), curve.letter


@settings(max_examples=100)
@given(st.integers(1, 60), st.integers(1, 30), st.lists(st.tuples(st.integers(0, 59), st.integers(0, 29)), max_size=60))
def test_repainted_rectangles_hold_every_change_and_are_few(width, height, spots):
    old, new = Frame(width, height), Frame(width, height)
    for x, y in spots:
        new.put(x, y, "x", 1)
    regions = changed_regions(new, old)
    if regions is None:
        return
    assert len(regions) <= 8
    covered = np.zeros((height, width), bool)
    for x, y, w, h in regions:
        covered[y : y + h, x : x + w] = True
    assert covered[new.code_HW != old.code_HW].all()


@given(st.floats(-1e300, 1e300), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.booleans())
def test_place_of_one_value_is_that_of_an_array(value, low, span, log):
    assume(not log or low > 1e-3)
    scale = Scale(low, low + span, 97, log)
    assert scale.place(value) == pytest.approx(float(scale.at(np.array([value]))[0]), abs=1e-6, nan_ok=True)
    assert math.isnan(scale.place(math.nan))


@settings(deadline=None)
@given(
    st.floats(1e-3, 1e6), st.floats(1e-3, 1e9), st.integers(1, 300), st.booleans(), st.lists(st.floats(-1e9, 1e12), max_size=20)
)
def test_columns_of_many_places_are_those_of_each(low, span, columns, log, places):
    axis = Along(low, low + span, columns, log)
    many = axis.columns_of(np.array(places))
    for place, column in zip(places, many.tolist(), strict=True):
        assert axis.column_of(place) == pytest.approx(column, abs=1)  # log10 of numpy and of math may round apart


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=60, unique=True).map(sorted),
    st.lists(st.integers(-5, 10**6 + 5), min_size=1),
)
def test_places_of_steps_on_an_axis_are_interpolated(known, asked):
    store = RunStore()
    steps = np.array(known)
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.random(len(steps)) * 1e6)
    store.steps.extend(steps, tokens, tokens / 1e9, {name: np.zeros(len(steps)) for name in store.steps.metrics})
    np.testing.assert_allclose(store.xs_of(np.array(asked), "tokens"), np.interp(asked, steps, tokens), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5_000), st.sampled_from(["step", "tokens", "hours", "clock"]), st.integers(30, 200), st.floats(1, 1e6))
def test_the_word_under_the_x_axis_stands_apart_from_the_labels(size, base, width, per_step):
    plot = build([Curve(store_of([1.0] * size, 1, per_step))], Options(base=base), width, 10, "braille", Limits())
    row = "".join(map(chr, plot.frame.code_HW[-1].tolist()))
    if base != "step" or row.endswith(base):
        assert row.endswith("  " + base)
