"""Charts, maps, tables and logs as plain widgets: every size, spikes, gaps, marks, what is repainted."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from textual.app import App

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.ticks import ticks, value_labels
from lumina_tui.memory import Memory
from lumina_tui.places import state_dir
from lumina_tui.series import RunStore
from lumina_tui.settings import Settings
from lumina_tui.terminal import Look
from lumina_tui.themes import DEFAULT, SKINS
from lumina_tui.widgets.axis import Scale, x_labels, x_limit, y_limits
from lumina_tui.widgets.canvas import DOTS, SPACE, Frame, cells, changed_regions, dots, joined
from lumina_tui.widgets.expert_map import ExpertMap, level_of
from lumina_tui.widgets.line_chart import LineChart
from lumina_tui.widgets.picture import Curve, Limits, Options, Plot
from lumina_tui.widgets.plot import build
from lumina_tui.widgets.readings import read, value_text
from lumina_tui.widgets.sparkline import bars, spark, spark_values
from lumina_tui.widgets.table import Column, Row, Table

from .helpers import until

GLYPHS = ("braille", "block", "ascii")


def store_of(losses: list[float], evals: dict[int, float] | None = None, **extra) -> RunStore:
    store, records = RunStore(), []
    for i, loss in enumerate(losses, 1):
        records.append(rec.Step(step=i, loss=loss, tokens=100 * i, step_time=0.5, **extra))
    records += [rec.Eval(step=step, loss=loss) for step, loss in (evals or {}).items()]
    for seq, record in enumerate(records, 1):
        record.seq, record.t, record.inc = seq, float(seq), 1
    store.apply(records)
    return store


def curve(n: int = 500) -> list[float]:
    rng = random.Random(1)
    return [1.7 + 4 * math.exp(-i / (n / 6)) + rng.gauss(0, 0.05) for i in range(n)]


def text_of(plot: Plot) -> list[str]:
    return ["".join(text for text, _ in plot.frame.runs(y)) for y in range(plot.frame.height)]


@pytest.mark.parametrize("glyphs", GLYPHS)
@pytest.mark.parametrize("losses", [[], [2.0], [2.0, 3.0], curve(), [math.nan] * 20, [1.0] * 50, [0.0, -1.0, 5e300, math.inf]])
def test_c131_every_size_from_0(glyphs, losses):
    store = store_of(losses, {1: 2.0} if losses else None)
    for width, height in itertools.product((0, 1, 5, 11, 12, 13, 40, 81), (0, 1, 3, 4, 5, 17)):
        for options in (
            Options(),
            Options(log_y=True, base="tokens"),
            Options(base="hours", outliers=False, cross=1.0, pin=2.0),
        ):
            plot = build([Curve(store)], options, width, height, glyphs, Limits())
            assert plot.frame.code_HW.shape == (max(0, height), max(0, width))
            build([Curve(store)], options, width, height, glyphs, plot.limits)


def test_mx06_one_spike_is_drawn_at_every_zoom():
    store = RunStore()
    n = 200_000
    loss = np.full(n, 2.0, np.float32)
    loss[123_456] = 9.0
    steps = np.arange(1, n + 1)
    columns = dict.fromkeys(store.steps.metrics, loss)
    store.steps.extend(steps, steps * 10.0, steps / 3600, columns)
    for view in (None, (100_000.0, 150_000.0), (123_400.0, 123_500.0)):
        plot = build([Curve(store)], Options(view=view, weight=0.0, outliers=False), 80, 20, "braille", Limits())
        column = plot.left + plot.axis.column_of(123_457)
        assert plot.frame.code_HW[:-2, column - 1 : column + 2].max() > 0x2800
        top = plot.frame.code_HW[: (plot.frame.height - 2) // 2, plot.left :]
        assert (top != SPACE).any()


@pytest.mark.parametrize(("steps", "cut"), [(3, False), (40, False), (200, True)])
def test_c131_the_beginning_of_a_short_run_is_no_outlier(steps, cut):
    losses = [7.0 - 4.0 * math.sqrt(step / steps) for step in range(steps)]
    plot = build([Curve(store_of(losses))], Options(weight=0.0, outliers=True), 80, 16, "braille", Limits())
    assert ("^" in "\n".join(text_of(plot))) == cut


def test_line_has_no_holes_and_gaps_stay_gaps():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 60))
        low = rng.integers(0, 40, n).astype(float)
        high = low + rng.integers(0, 5, n)
        low[rng.random(n) < 0.2] = np.nan
        high[np.isnan(low)] = np.nan
        spans = joined(low, high)
        assert np.array_equal(np.isnan(spans.low_D), np.isnan(low))
        for i in range(n - 1):
            a, b = (spans.low_D[i], spans.high_D[i]), (spans.low_D[i + 1], spans.high_D[i + 1])
            if not math.isnan(a[0] + b[0]):
                assert b[0] <= a[1] + 1 and a[0] <= b[1] + 1
        ok = ~np.isnan(low)
        assert (spans.low_D[ok] <= low[ok]).all() and (spans.high_D[ok] >= high[ok]).all()


@pytest.mark.parametrize("glyphs", GLYPHS)
def test_cells_hold_their_dots(glyphs):
    across, down = DOTS[glyphs]
    for x, y in itertools.product(range(3 * across), range(2 * down)):
        grid = np.zeros((2 * down, 3 * across), bool)
        grid[y, x] = True
        code = cells(grid, glyphs)
        assert np.argwhere(code != SPACE).tolist() == [[y // down, x // across]]
    full = cells(np.ones((down, across), bool), "braille") if glyphs == "braille" else None
    assert full is None or full[0, 0] == 0x28FF
    spans = joined(np.array([1.0]), np.array([2.0]))
    assert dots(spans, 4)[:, 0].tolist() == [False, True, True, False]


def test_marks_for_missing_outside_events_and_evaluations():
    losses = curve(100)
    losses[40] = math.nan
    store = store_of(losses, {20: 3.0, 60: 2.2})
    store.apply(
        [
            rec.Checkpoint(seq=1000, inc=1, step=30),
            rec.Alert(seq=1001, inc=1, severity="warning", code="x", message="m", step=80),
            rec.Change(seq=1002, inc=1, what="lr", step=80),
        ]
    )
    plot = build([Curve(store)], Options(), 80, 16, "braille", Limits())
    text = text_of(plot)
    assert any("×" in row for row in text) and plot.notes == ["1 not finite"]
    axis = text[-2]
    assert "C" in axis and "2" in axis and sum(row.count("o") for row in text[:-2]) == 2
    assert "^" in text[0]  # the steep beginning lies above the 5-95 range
    whole = build([Curve(store)], Options(outliers=False), 80, 16, "braille", Limits())
    assert "^" not in text_of(whole)[0]


def test_values_at_the_crosshair():
    store = store_of([4.0, 3.0, 2.0])
    assert read(store, Options(weight=0.0)).value == 2.0
    at = read(store, Options(weight=0.5), 1.6)
    assert (at.step, at.value) == (2, 3.0) and at.smooth == pytest.approx((0.25 * 4 + 0.5 * 3) / 0.75)
    assert read(RunStore(), Options()) is None
    assert value_text("lr", 2.1e-4) == "2.10e-4" and value_text("mfu", 0.41) == "41.0 %" and value_text("loss", None) == "-"


def test_axes_are_round_and_hold_still():
    assert ticks(0, 48_210, 5) == [0, 10_000, 20_000, 30_000, 40_000]
    assert ticks(1e-5, 1e-2, 5, log=True) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert ticks(0, 3, 10, whole=True) == [0, 1, 2, 3] and ticks(math.nan, 1, 3) == [] and ticks(5, 1, 3) == []
    assert x_labels([0, 10_000, 2_500_000], "step") == ["0", "10k", "2.5M"] and x_labels([0.5], "hours") == ["30m"]
    assert value_labels([1.5, 2.0, 2.5]) == ["1.5", "2.0", "2.5"] and value_labels([0.0, 2.5e-4, 5e-4])[1] == "2.5e-4"
    limit, changes = None, 0
    for newest in range(10, 5_000):
        new = x_limit(float(newest), 0.0, limit)
        assert newest <= new <= 1.4 * newest + 2
        changes += new != limit
        limit = new
    assert changes < 110  # each makes room for 5 % more
    before, changes, rng = None, 0, random.Random(0)
    for _ in range(500):
        new = y_limits(1.9 + rng.gauss(0, 0.01), 2.6 + rng.gauss(0, 0.01), 12, False, before)
        changes += new != before
        before = new
    assert changes <= 3
    assert y_limits(2.0, 2.0, 10, False, None)[0] < 2.0 < y_limits(2.0, 2.0, 10, False, None)[1]
    scale = Scale(0.0, 10.0, 101)
    assert scale.at(np.array([0.0, 5.0, 10.0])).tolist() == [0.0, 50.0, 100.0] and scale.back(50) == 5.0
    log = Scale(0.1, 10.0, 3, log=True)
    assert log.at(np.array([1.0]))[0] == pytest.approx(1.0) and log.back(1.0) == pytest.approx(1.0)


def test_only_changed_rectangles_are_named():
    a, b = Frame(40, 10), Frame(40, 10)
    assert changed_regions(b, a) == [] and changed_regions(b, None) is None and changed_regions(Frame(41, 10), a) is None
    b.put(30, 2, "xyz", 1)
    assert changed_regions(b, a) == [(30, 2, 3, 1)]
    b.put(0, 9, "q", 1)
    assert changed_regions(b, a) == [(30, 2, 3, 1), (0, 9, 1, 1)]
    b.code_HW[:] = 65
    assert changed_regions(b, a) is None


def test_sparklines():
    assert (
        bars(np.array([0.0, 7.0]), 4) == "▁█  "
        and bars(np.array([math.nan, 1.0, 1.0]), 3) == " ▄▄"
        and bars(np.array([]), 3) == "   "
    )
    assert spark_values([0, 50, 100], 3, ascii_only=True, low=0, high=100).isascii()
    store = store_of(curve(1000))
    pyramid = store.steps.metrics["loss"]
    one = spark(pyramid, 20, "max", last=600)
    pyramid.extend(np.array([1.7], np.float32))
    two = spark(pyramid, 20, "max", last=600)
    assert len(one) == 20 and sum(x != y for x, y in zip(one, two, strict=True)) <= 1  # one more sample moves one cell


def test_c132_levels_of_the_expert_map():
    assert [level_of(x) for x in (0.0, 0.2, 0.25, 0.7, 0.8, 1.0, 1.3, 1.9, 2.0, 9.0)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


class Stage(App[None]):
    """One widget in an app that has a look."""

    def __init__(self, widget, look: Look | None = None) -> None:
        self.look = look or Look()
        super().__init__()
        self.widget = widget
        self.memory = Memory(state_dir() / "session.json")
        self.settings = Settings()

    def get_theme_variable_defaults(self):
        return SKINS[DEFAULT].variables()

    def compose(self):
        yield self.widget

    def notice(self, text, severity="information"):
        self.said = text


def shown(app) -> str:
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


def experts(layers: int, count: int, seed: int = 0) -> RunStore:
    rng = random.Random(seed)
    store = RunStore()
    load = [[float(rng.randint(50, 150)) for _ in range(count)] for _ in range(layers)]
    load[-1][1] = 0.0
    load[0][2] = 1000.0
    store.apply([rec.Experts(seq=1, inc=1, step=9, layers=list(range(layers)), load=load, dead=[0] * (layers - 1) + [1])])
    return store


@pytest.mark.parametrize(("layers", "count"), [(1, 4), (2, 8), (16, 8), (64, 32), (6, 300)])
@pytest.mark.parametrize("size", [(30, 15), (52, 20), (80, 10), (20, 4), (3, 3), (1, 1)])
async def test_c132_expert_map_of_any_shape_in_any_size(layers, count, size):
    app = Stage(ExpertMap(experts(layers, count)))
    async with app.run_test(size=size) as pilot:
        app.widget.sync()
        app.widget.focus()
        for key in "jllkhj":
            await pilot.press(key)
        text = shown(app)
        lines = [row for row in text.split("\n")[1:-1] if "L" in row]
        if size == (52, 20):
            assert any("x" in row.replace("max", "") for row in text.split("\n")[2:-1]), text
            if layers == 64:
                assert "worst of 4" in text and len(lines) == 16
        if size == (80, 10) and layers == 16:
            assert "worst of" in text and "x fair" in text


async def test_c099_the_expert_map_of_a_run_that_grew_follows_the_number_of_experts():
    store = experts(2, 4)
    app = Stage(ExpertMap(store))
    async with app.run_test(size=(52, 20)) as pilot:
        app.widget.sync()
        app.widget.focus()
        for key in "lll":
            await pilot.press(key)
        assert "experts 2 x 4" in shown(app) and "E3" in shown(app)
        load = [[50.0, 60.0, 70.0, 80.0, 90.0], [90.0, 80.0, 70.0, 60.0, 50.0]]
        store.apply([rec.Experts(seq=2, inc=2, step=19, layers=[0, 1], load=load, dead=[0, 0])])
        app.widget.sync()
        await pilot.press("l")
        assert "experts 2 x 5" in shown(app) and "E4" in shown(app)
        await pilot.press("enter")
        assert "over time" in shown(app)
        four = rec.Experts(seq=4, inc=3, step=10, layers=[0, 1], load=[[5.0] * 4] * 2)
        store.apply([rec.Rewind(seq=3, inc=3, to_step=9), four])
        app.widget.sync()
        await pilot.pause()
        assert "over time" in shown(app)
        await pilot.press("enter")
        assert "experts 2 x 4" in shown(app)


async def test_chart_keys_and_region_refresh():
    store = store_of(curve(300), {100: 2.5, 200: 2.0})
    chart = LineChart(store)
    app = Stage(chart)
    async with app.run_test(size=(80, 20)) as pilot:
        chart.focus()
        await until(pilot, lambda: "300: " in shown(app))
        await pilot.press("c")
        for _ in range(3):
            await pilot.press("H")
        here = chart.cursor.step
        assert here is not None and here < 300
        await pilot.press("enter")
        await pilot.press("l")
        await pilot.pause()
        assert "over" in shown(app) and chart.cursor.pin == here and chart.cursor.step > here
        await pilot.press("plus")
        assert chart.options.view is not None and chart.options.view[0] < chart.cursor.step < chart.options.view[1]
        await pilot.press("f")
        assert chart.options.view is None
        for key, check in (
            ("s", lambda: chart.options.weight != 0.9),
            ("i", lambda: not chart.options.outliers),
            ("v", lambda: chart.options.log_y),
            ("b", lambda: chart.options.base == "tokens"),
        ):
            await pilot.press(key)
            assert check(), key
        await pilot.press("right_square_bracket")
        assert chart.options.metric != "loss"
        regions = []
        chart.refresh = lambda *args, **kwargs: regions.append(args)  # type: ignore[method-assign]
        chart.sync()
        assert regions == []  # nothing has changed
        store.apply([rec.Step(seq=2000, inc=1, step=301, loss=1.8, tokens=30_100, step_time=0.5)])
        chart.sync()
        assert regions and all(args for args in regions)  # rectangles, never the whole widget


async def test_table_keeps_the_cursor_and_repaints_changed_rows():
    table = Table(
        [Column("a", "name", 6, grow=True), Column("b", "value", 6, "right", rank=1), Column("c", "extra", 30, rank=2)],
        title="t",
    )
    app = Stage(table)
    rows = [Row(f"r{i}", ((f"row {i}", "text"), (str(i), "dim"), ("[/x]\x1b[2J", "text"))) for i in range(50)]
    async with app.run_test(size=(60, 10)) as pilot:
        table.set_rows(rows)
        table.focus()
        await pilot.press("j", "j")
        assert table.cursor_key == "r2"
        await until(pilot, lambda: "[/x]␛[2J" in shown(app))
        table.set_rows(rows[1:])
        assert table.cursor_key == "r2"
        painted = []
        original = table.refresh
        table.refresh = lambda *args, **kwargs: painted.append(args) or original(*args, **kwargs)  # type: ignore[method-assign]
        changed = [*rows[1:3], Row("r3", (("changed", "text"), ("3", "dim"), ("", "text"))), *rows[4:]]
        table.set_rows(changed)
        assert painted and all(args[0].y == painted[0][0].y and args[0].height == 1 for args in painted)
        await pilot.press("G")
        assert table.cursor_key == "r49"
        await pilot.press("g")
        assert table.cursor_key == "r1"
        await pilot.resize_terminal(20, 5)
        await until(pilot, lambda: "extra" not in shown(app))
        table.set_rows([Row("h", (("head", "text"),), rule=True), *rows[:2]])
        assert table.cursor_key == "r1"
        table.set_rows(())
        assert table.cursor_key is None
