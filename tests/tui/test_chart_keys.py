"""Charts by key: axes, bases, tails, read-outs, memory, export; hidden and tiny ones."""

from __future__ import annotations

import csv
import io
import math
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lumina_engine.monitoring import record as rec
from lumina_tui.chart_export import copied, csv_text, picture_text, svg_text
from lumina_tui.series import RunStore
from lumina_tui.terminal import NAMED, Look
from lumina_tui.widgets.line_chart import Cursor, LineChart
from lumina_tui.widgets.picture import TAIL, Curve, Limits, Options
from lumina_tui.widgets.plot import build

from .helpers import screen_text, until
from .stage import Stage

T0 = 1_764_000_000.0  # 24 Nov 2025, 16:00 UTC


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def run_of(*records: rec.Record) -> RunStore:
    store = RunStore()
    for seq, record in enumerate(records, 1):
        record.seq, record.inc = seq, record.inc or 1
        record.t = record.t or T0 + seq
    store.apply(records)
    return store


def steps(count: int, start: int = 1, **fixed) -> list[rec.Record]:
    values = {"loss": 3.0, "step_time": 1.0, "lr": 1e-3, "grad_norm": 0.5, **fixed}
    return [rec.Step(step=i, tokens=100 * i, **values) for i in range(start, start + count)]


def text_of(plot) -> list[str]:
    return ["".join(text for text, _ in plot.frame.runs(y)) for y in range(plot.frame.height)]


# axes


def test_log_x_leaves_out_what_it_cannot_show_and_says_so():
    store = RunStore()
    n = 1000
    at = np.arange(n)  # a step 0, as some logs have
    columns = {name: np.linspace(5, 2, n).astype(np.float32) for name in store.steps.metrics}
    store.steps.extend(at, at * 10.0, at / 3600, columns, T0 + at)
    plot = build([Curve(store)], Options(log_x=True, weight=0.0), 80, 20, "braille", Limits())
    text = text_of(plot)
    assert "1 not above 0" in plot.notes
    assert plot.axis.log and (plot.axis.low, plot.axis.high) == (1.0, 999.0)
    labels = text[-1].split()
    assert labels[:3] == ["1", "10", "100"]
    places = [text[-1].index(label) for label in ("10", "100")]
    assert abs((places[1] - places[0]) - (places[0] - text[-1].index("1"))) <= 2  # decades are equally long
    linear = build([Curve(store)], Options(weight=0.0), 80, 20, "braille", Limits())
    assert not linear.axis.log and linear.notes == []


def test_log_y_counts_what_is_not_above_0():
    store = run_of(*steps(10), *steps(3, 11, loss=-1.0), *steps(10, 14))
    plot = build([Curve(store)], Options(log_y=True), 80, 20, "braille", Limits())
    assert "3 not above 0" in plot.notes


def test_clock_time_on_the_x_axis():
    store = run_of(*steps(7200))
    plot = build([Curve(store)], Options(base="clock"), 100, 20, "braille", Limits())
    assert "16:30" in text_of(plot)[-1] and "17:00" in text_of(plot)[-1] and "clock" in text_of(plot)[-1]
    assert plot.axis.low >= T0
    logged = build([Curve(store)], Options(base="clock", log_x=True), 100, 20, "braille", Limits())
    assert not logged.axis.log


def test_a_clock_that_was_set_back_stands_still():
    records = steps(20)
    for i, record in enumerate(records):
        record.t = T0 + (i if i < 10 else i - 3600)
    times = run_of(*records).steps.x("clock")
    assert (np.diff(times) >= 0).all() and times[-1] == T0 + 9


@pytest.mark.parametrize("base", ["step", "tokens", "hours", "clock"])
def test_abandoned_tails_on_every_x_base(base):
    store = run_of(*steps(60), *steps(20, 61, loss=6.0), rec.Rewind(to_step=60), *steps(40, 61))
    assert len(store.tails) == 1 and len(store.steps) == 100
    options = Options(base=base, weight=0.0, outliers=False)
    hidden, shown = (
        build([Curve(store)], replace(options, abandoned=on), 80, 20, "ascii", Limits()).frame for on in (False, True)
    )
    assert (shown.style_HW == TAIL).sum() > 3 and not (hidden.style_HW == TAIL).any()


def test_events_pile_up_as_digits_and_gaps_are_marked():
    many = [rec.Checkpoint(step=50) for _ in range(3)]
    store = run_of(
        *steps(49),
        rec.Step(step=50, loss=math.nan),
        *steps(50, 51),
        *many,
        rec.Alert(severity="info", code="a", message="m", step=20),
    )
    text = text_of(build([Curve(store)], Options(), 80, 16, "braille", Limits()))
    assert "3" in text[-2] and "!" in text[-2] and any("×" in row for row in text[:-2])


# the widget


def chart_of(store: RunStore, **look) -> tuple[LineChart, Stage]:
    chart = LineChart(store)
    return chart, Stage(chart, Look(hz=10, **look))


async def test_keys_of_axes_and_bases():
    chart, app = chart_of(run_of(*steps(300)))
    async with app.run_test(size=(100, 24)) as pilot:
        chart.focus()
        await until(pilot, lambda: "300: " in screen_text(app))
        await pilot.press("V")
        await until(pilot, lambda: "log X" in screen_text(app) and chart._plot.axis.log)
        await pilot.press("c", "H", "plus")
        await until(pilot, lambda: chart.options.view is not None and chart._plot.axis.log)
        low, high = chart.options.view
        assert low > 0 and low < chart.options.cross < high
        await pilot.press("minus", "minus")
        await until(pilot, lambda: chart.options.view is None)
        for base in ("tokens", "hours", "clock"):
            await pilot.press("b")
            await until(pilot, lambda base=base: chart.options.base == base)
        assert not chart._plot.axis.log  # of local time there is no logarithm
        await pilot.press("V")
        await until(pilot, lambda: any("no logarithmic axis" in notice.text for notice in app.notices))


async def test_column_range_and_pinned_difference_in_the_read_out():
    losses = [3.0] * 2000
    losses[1000] = 7.0
    store = run_of(*(rec.Step(step=i, loss=loss, tokens=i, step_time=1.0) for i, loss in enumerate(losses, 1)))
    chart, app = chart_of(store)
    async with app.run_test(size=(100, 24)) as pilot:
        chart.focus()
        await until(pilot, lambda: "2,000: " in screen_text(app))
        chart.cursor.step = 1001
        chart.sync()
        await until(pilot, lambda: "3.000 to 7.000" in screen_text(app))
        await pilot.press("enter")
        chart.cursor.step = 1500
        chart.sync()
        await until(pilot, lambda: "over 499 steps" in screen_text(app))


async def test_the_crosshair_is_linked_across_charts_of_one_cursor():
    store, cursor = run_of(*steps(100)), Cursor()
    one, two = LineChart(store, cursor=cursor), LineChart(store, "lr", cursor=cursor)
    app = Stage(one)
    async with app.run_test(size=(80, 24)) as pilot:
        await app.screen.mount(two)
        one.styles.height = two.styles.height = 10
        one.focus()
        await until(pilot, lambda: two.is_on_screen and one.has_focus)
        await pilot.press("c", "h")
        two.sync()
        assert two.options.cross == one.options.cross is not None


async def test_a_hidden_chart_is_not_drawn():
    store = run_of(*steps(50))
    chart, app = chart_of(store)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "50: " in screen_text(app))
        chart.display = False
        await until(pilot, lambda: not chart.is_on_screen)
        before = chart._plot
        store.apply([rec.Step(seq=1000, inc=1, t=T0, step=51, loss=2.0)])
        chart.sync()
        assert chart._plot is before
        chart.display = True
        await until(pilot, lambda: chart.is_on_screen)
        chart.sync()
        await until(pilot, lambda: "51: " in screen_text(app))


@pytest.mark.parametrize("size", [(13, 8), (40, 5), (12, 12)])
async def test_under_12x4_a_sparkline_that_follows(size):
    store = run_of(*steps(50, loss=2.0))
    chart, app = chart_of(store)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: any(c in screen_text(app) for c in "▁▂▃▄▅▆▇█"))
        before = screen_text(app)
        store.apply([rec.Step(seq=1000 + i, inc=1, t=T0, step=51 + i, loss=9.0) for i in range(20)])
        chart.sync()
        await until(pilot, lambda: screen_text(app) != before)


async def test_settings_of_a_chart_are_remembered_for_each_metric():
    chart, app = chart_of(run_of(*steps(50)))
    async with app.run_test(size=(80, 24)) as pilot:
        chart.focus()
        await until(pilot, lambda: "50: " in screen_text(app))
        await pilot.press("s", "v", "b")
        await until(pilot, lambda: chart.options.base == "tokens")
    again, app = chart_of(run_of(*steps(50)))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "50 at 5.00 k tokens: " in screen_text(app))
        assert (again.options.weight, again.options.log_y, again.options.base) == (0.98, True, "tokens")
        again.set_metric("lr")
        assert (again.options.weight, again.options.log_y) == (0.0, False)
        again.set_metric("loss")
        assert again.options.log_y


async def test_a_spoilt_memory_is_no_harm():
    chart, app = chart_of(run_of(*steps(5)))
    app.memory.set("chart.weight", {"loss": 7.0})
    app.memory.set("chart.base", {"loss": "fortnights"})
    app.memory.set("chart.log_y", "yes")
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "5: " in screen_text(app))
        assert (chart.options.weight, chart.options.base, chart.options.log_y) == (0.9, "step", False)


async def test_c138_without_colours_and_in_ascii():
    stores = [run_of(*steps(50, loss=2.0 + i)) for i in range(3)]
    chart = LineChart(stores[0])
    app = Stage(chart, Look(glyphs="ascii", palette=NAMED, ansi=True, hz=10))
    async with app.run_test(size=(80, 24)) as pilot:
        chart.lay([Curve(store, f"r{i}", i, "abc"[i]) for i, store in enumerate(stores)], None)
        await until(pilot, lambda: "c 50: " in screen_text(app))
        ends = [row for row in screen_text(app).split("\n")[1:] if row.rstrip(" |│").endswith(("a", "b", "c"))]
        assert len(ends) == 3


# export


def hostile() -> RunStore:
    return run_of(
        *steps(5),
        rec.Step(step=6, loss=math.nan, tokens=600, step_time=1.0),
        rec.Eval(step=5, loss=2.5),
        rec.Alert(severity="info", code="x", message='=cmd("x"), "\x1b[2J"\nsecond', step=4),
    )


def test_csv_has_every_sample_evaluation_and_event():
    store = hostile()
    text = csv_text([copied(Curve(store, "a,b"), Options(weight=0.5)), copied(Curve(store, "=evil"), Options(weight=0.0))])
    assert "\x1b" not in text
    rows = list(csv.DictReader(io.StringIO(text)))
    first = [row for row in rows if row["run"] == "a,b"]
    assert [row["kind"] for row in first] == ["step"] * 6 + ["eval", "event"]
    assert [row["step"] for row in first[:6]] == ["1", "2", "3", "4", "5", "6"] and first[5]["value"] == "nan"
    assert [float(row["ema"]) for row in first[:5]] == [3.0] * 5 and first[5]["ema"] == ""
    assert first[6]["value"] == "2.5" and float(first[0]["time"]) == T0 + 1 and first[1]["tokens"] == "200"
    assert first[7]["text"].startswith("! =cmd") and "second" in first[7]["text"]
    second = [row for row in rows if row["run"] == "'=evil"]
    assert len(second) == 8 and second[0]["ema"] == ""


def test_csv_of_a_long_run_is_complete():
    n = 45_000
    store = RunStore()
    columns = {name: np.arange(n, dtype=np.float32) for name in store.steps.metrics}
    store.steps.extend(np.arange(1, n + 1), np.arange(n) * 1.0, np.arange(n) / 3600, columns, T0 + np.arange(n))
    lines = csv_text([copied(Curve(store, "r"), Options())]).splitlines()
    assert len(lines) == n + 1 and lines[-1].startswith(f"r,step,{n},")


@pytest.mark.parametrize("base", ["step", "tokens", "hours", "clock"])
def test_svg_and_text_of_every_base(base):
    runs = [hostile(), run_of(*steps(40))]
    curves = [Curve(store, f"run <{i}>", i, "ab"[i]) for i, store in enumerate(runs)]
    options = Options(base=base, log_x=True, cross=None)
    root = ET.fromstring(svg_text([copied(curve, options) for curve in curves], options))
    assert {"run <0>", "run <1>"} <= {node.text for node in root.iter()}
    text = picture_text(curves, options, "ascii")
    assert "a run <0>" in text and "eval 2.500 at 5" in text and "\x1b" not in text and len(text.splitlines()) >= 32


def test_export_of_nothing_is_empty_not_an_error():
    curve = Curve(RunStore(), "r")
    assert csv_text([copied(curve, Options())]).count("\n") == 1
    ET.fromstring(svg_text([copied(curve, Options())], Options()))
    assert "no values" in picture_text([curve], Options(), "braille")


async def test_export_key_asks_and_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chart, app = chart_of(run_of(*steps(50)))
    async with app.run_test(size=(80, 24)) as pilot:
        chart.focus()
        await until(pilot, lambda: "50: " in screen_text(app))
        await pilot.press("e")
        await until(pilot, lambda: "Export loss" in screen_text(app))
        await pilot.press("c")
        await until(pilot, lambda: list(Path("exports").glob("loss-*.csv")))
        await until(pilot, lambda: any("written to" in notice.text for notice in app.notices))


async def test_export_into_a_full_or_forbidden_place_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("exports").write_text("a file where the folder should be")
    chart, app = chart_of(run_of(*steps(5)))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "5: " in screen_text(app))
        chart._export("svg")
        await until(pilot, lambda: any("not exported" in notice.text for notice in app.notices))
