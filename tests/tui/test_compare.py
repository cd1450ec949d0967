"""Compare: known curves, every state of a run, every size, keys, export, and that no run notices."""

from __future__ import annotations

import asyncio
import csv
import itertools
import math
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from lumina_engine.config.loading import write_config
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.run.directory import RunDirectory
from lumina_tui import comparing
from lumina_tui.application import LuminaApp
from lumina_tui.comparing import Compared, as_text, differing, opened, results, side_by_side, table_rows
from lumina_tui.feed import Feed, Mode
from lumina_tui.paint import fit_ends
from lumina_tui.screens.compare import CompareScreen
from lumina_tui.series import RunStore
from lumina_tui.terminal import NAMED, Look, to_ascii
from lumina_tui.widgets.picture import MOST_RUNS, RUN, Curve, Limits, Options, colour_slots
from lumina_tui.widgets.plot import build

from .fake_engine import FakeEngine
from .helpers import screen_text, until
from .pane import Pane

LOOKS = {
    "braille": Look(hz=10),
    "block16": Look(glyphs="block", palette=NAMED, ansi=True, hz=10),
    "ascii": Look(glyphs="ascii", palette=NAMED, ansi=True, hz=10),
}


def filled(tokens_per_step: float = 100.0, seconds: float = 36.0, start: float = 0.0, losses=()) -> RunStore:
    """A store with a known loss at each step, a known number of tokens and seconds a step."""
    store, losses = RunStore(), np.asarray(losses, np.float32)
    n = len(losses)
    steps = np.arange(1, n + 1)
    columns = {name: np.full(n, np.nan, np.float32) for name in store.steps.metrics}
    columns["loss"] = losses
    store.steps.extend(steps, steps * tokens_per_step, steps * seconds / 3600, columns, start + steps * seconds)
    store.state = "finished"
    return store


def compared(letter: str, store: RunStore, config: dict | None = None) -> Compared:
    run = RunDirectory(Path("/nowhere") / f"run-{letter}")
    feed = Feed(run, store=store, mode=Mode.FILE)
    return Compared(run, f"id-{letter}", letter, "abcdefgh".index(letter), feed, config or {})


def cells_of(rows, letter: str) -> dict[str, str]:
    row = next(row for row in rows if row.key == letter)
    return {column.key: cell for column, (cell, _) in zip(comparing.COLUMNS, row.cells, strict=True)}


# known curves


@pytest.mark.parametrize(
    ("base", "x", "step_a", "step_b"),
    [
        ("step", 40.0, 40, 40),
        ("tokens", 4_000.0, 40, 20),  # b takes twice the tokens a step
        ("hours", 0.4, 40, 40 / 3),  # b takes three times the time
        ("clock", 1_000_000.0 + 36 * 40, 40, None),  # b began when a was over
    ],
)
def test_c135_known_curves_at_the_crosshair_of_every_x_base(base, x, step_a, step_b):
    a = compared("a", filled(losses=[5 - 0.01 * i for i in range(1, 101)], start=1_000_000.0))
    b = compared("b", filled(200.0, 108.0, 2_000_000.0, losses=[6 - 0.02 * i for i in range(1, 101)]))
    options = Options(weight=0.0, base=base, cross=x)
    rows = table_rows([a, b], a, options, reach=0.5 if base == "step" else 60.0 if base == "clock" else x / 50)
    one, other = cells_of(rows, "a"), cells_of(rows, "b")
    assert one["value"] == f"{5 - 0.01 * step_a:.3f}" and one["base"] == "base" and one["last"] == "4.000"
    if step_b is None:
        assert other["value"] == "-" and other["base"] == "-"
    else:
        value = 6 - 0.02 * round(step_b)
        assert other["value"] == f"{value:.3f}"
        assert float(other["base"]) == pytest.approx(value - (5 - 0.01 * step_a), abs=0.0011)
    assert other["best"] == "4.000"


def test_c135_pinned_difference_and_baseline():
    a, b = compared("a", filled(losses=np.linspace(4, 2, 101))), compared("b", filled(losses=np.linspace(5, 1, 101)))
    options = Options(weight=0.0, cross=101.0, pin=51.0)
    rows = table_rows([a, b], b, options, reach=1.0)
    assert cells_of(rows, "a")["pin"] == "-1.000" and cells_of(rows, "b")["pin"] == "-2.000"
    assert cells_of(rows, "a")["base"] == "+1.000" and cells_of(rows, "b")["base"] == "base"


def test_ten_steps_beside_a_million():
    short, long = compared("a", filled(losses=np.full(10, 3.0))), compared("b", filled(losses=np.full(1_000_000, 2.0)))
    rows = table_rows([short, long], short, Options(weight=0.9, cross=500_000.0), reach=9_000.0)
    assert cells_of(rows, "a")["value"] == "-" and cells_of(rows, "a")["last"] == "3.000"
    assert cells_of(rows, "b")["value"] == "2.000" and cells_of(rows, "b")["base"] == "-"
    curves = [run.curve for run in (long, short)]
    plot = build(curves, Options(weight=0.0), 120, 30, "braille", Limits())
    text = ["".join(part for part, _ in plot.frame.runs(y)) for y in range(30)]
    assert any("a" in row for row in text[:-2]) and any("b" in row for row in text[:-2])
    assert plot.axis.high >= 1_000_000


def test_values_that_are_not_numbers_have_no_difference():
    a, b = compared("a", filled(losses=[2.0, math.nan])), compared("b", filled(losses=[2.0, 1.0]))
    rows = table_rows([a, b], b, Options(weight=0.0), reach=1.0)
    assert (
        cells_of(rows, "a")["value"] == "nan" and cells_of(rows, "a")["base"] == "-" and cells_of(rows, "a")["best"] == "2.000"
    )


def test_a_run_without_steps_and_one_that_cannot_be_read():
    empty = compared("a", RunStore())
    broken = Compared(RunDirectory("/nowhere/b"), "b", "b", error="run.json is damaged: no JSON")
    rows = table_rows([empty, broken], None, Options(), reach=1.0)
    assert cells_of(rows, "a")["value"] == "-" and cells_of(rows, "b")["state"] == "unreadable"
    assert rows[1].cells[0][1] == "struck"
    lines = "\n".join("".join(text for text, _ in line) for line in side_by_side([empty, broken], 100))
    assert "has no step yet" in lines and "run.json is damaged" in lines


def test_runs_that_part_at_a_resume():
    """The second goes on from step 50 of the first with another rate: equal up to there, different after."""
    store, other = RunStore(), RunStore()
    for target, slope in ((store, 0.01), (other, 0.02)):
        records = [rec.Step(step=i, loss=4.0 - 0.01 * i, step_time=1.0) for i in range(1, 71)]
        records.append(rec.Rewind(to_step=50))
        records += [rec.Step(step=i, loss=3.5 - slope * (i - 50), step_time=1.0) for i in range(51, 101)]
        for seq, record in enumerate(records, 1):
            record.seq, record.inc, record.t = seq, 1, float(seq)
        target.apply(records)
    a, b = compared("a", store), compared("b", other)
    at = {
        x: cells_of(table_rows([a, b], a, Options(weight=0.0, cross=x), reach=1.0), "b")["base"]
        for x in (10.0, 50.0, 60.0, 100.0)
    }
    assert (at[10.0], at[50.0], at[60.0], at[100.0]) == ("0.000", "0.000", "-0.100", "-0.500")
    plot = build([a.curve, b.curve], Options(abandoned=True), 80, 20, "braille", Limits())
    assert "<" in "".join(text for text, _ in plot.frame.runs(18))


def test_c135_differing_keys_side_by_side():
    runs = [
        compared("a", filled(losses=[1.0]), {"learning_rate": 1e-3, "seed": 1, "only_here": True, "tags": [1, 2], "same": 5}),
        compared("b", filled(losses=[1.0]), {"learning_rate": 1e-3, "seed": 2, "tags": [1, 3], "same": 5}),
        compared("c", filled(losses=[1.0])),
    ]
    found = {entry.name: entry.values for entry in differing(runs)}
    assert found == {"seed": ("1", "2", "-"), "only_here": ("yes", "-", "-"), "tags": ("1, 2", "1, 3", "-")}
    wide, narrow = side_by_side(runs, 100), side_by_side(runs, 24)
    assert any([text.strip() for text, _ in line] == ["seed", "1", "2", "-"] for line in wide)
    assert any("".join(text for text, _ in line) == "seed  a 1  b 2  c -" for line in narrow)
    assert {entry.name: entry.values for entry in results(runs)}["steps"] == ("1", "1", "1")
    assert {entry.name: entry.values for entry in results(runs)}["best eval"] == ("-", "-", "-")  # without evaluations


def test_colours_do_not_depend_on_the_order_and_never_collide():
    names = [f"run-{i}" for i in range(MOST_RUNS)]
    wanted = colour_slots(names)
    assert sorted(wanted.values()) == list(range(MOST_RUNS))
    for order in itertools.islice(itertools.permutations(names), 0, 40_000, 997):
        assert colour_slots(order) == wanted


@given(st.sets(st.text(max_size=12), max_size=MOST_RUNS))
def test_colours_of_any_runs_differ(names):
    slots = colour_slots(names)
    assert set(slots) == names and len(set(slots.values())) == len(names) and all(0 <= s < MOST_RUNS for s in slots.values())


# the screen


def runs_in(root: Path, *shapes: tuple[str, int]) -> list[FakeEngine]:
    """Run directories of fake engines, not alive yet."""
    made = []
    for seed, (name, steps) in enumerate(shapes):
        engine = FakeEngine(root, name)
        write_config(Config(learning_rate=1e-3 / (seed + 1), seed=7), engine.run.config_path)
        engine.t = 1_764_000_000.0 + 3600 * seed
        engine.state("running")
        engine.steps(steps)
        if steps:
            engine.emit(rec.Eval(step=steps, loss=2.0 + seed))
        made.append(engine)
    return made


async def ended(*engines: FakeEngine) -> list[Path]:
    for engine in engines:
        await engine.serve(socket=False)
        await engine.finish()
    return [engine.run.path for engine in engines]


def loaded(app: LuminaApp, *steps: int) -> bool:
    screen = app.screen
    if not isinstance(screen, CompareScreen) or len(screen.runs) < len(steps):
        return False
    return all(
        run.feed is not None and run.feed.mode is not Mode.LOADING and len(run.feed.store.steps) == n
        for run, n in zip(screen.runs, steps, strict=False)
    )


@pytest.mark.parametrize(
    ("size", "look"),
    [*(((80, 24), look) for look in LOOKS), ((160, 45), "braille"), ((160, 45), "ascii"), ((200, 60), "block16")],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}x{value[1]}",
)
async def test_c135_every_panel_at_every_size_and_look(tmp_path, size, look):
    paths = await ended(*runs_in(tmp_path, ("one", 120), ("two", 60)))
    app = LuminaApp(tmp_path, look=LOOKS[look])
    async with app.run_test(size=size) as pilot:
        app.open_compare(paths)
        await until(pilot, lambda: loaded(app, 120, 60) and "to base" in screen_text(app) and "one" in screen_text(app))
        screen = app.screen
        screen.action_diff()
        await until(pilot, lambda: "learning_rate" in screen_text(app) and "results" in screen_text(app))
        screen.action_diff()
        await until(pilot, lambda: app.focused is screen.chart and "finished" in screen_text(app))
        if size == (80, 24):
            assert (screen.chart.size.height, screen.table.size.height) == (13, 9)
        if size[0] >= 160:
            await until(pilot, lambda: "learning rate" in screen_text(app) and "grad norm" in screen_text(app))
        text = screen_text(app)
        assert "loss  EMA" in text
        if look == "ascii":
            assert to_ascii(text).isascii()


async def test_sizes_down_to_one_cell(tmp_path):
    paths = await ended(*runs_in(tmp_path, ("one", 50), ("two", 5)))
    app = LuminaApp(tmp_path, look=Look(hz=10))
    async with app.run_test(size=(200, 60)) as pilot:
        app.open_compare(paths)
        await until(pilot, lambda: loaded(app, 50, 5))
        for size in ((20, 6), (10, 3), (1, 1), (39, 40), (160, 10), (41, 13), (100, 30)):
            await pilot.resize_terminal(*size)
            app.screen.tick()
            await pilot.pause()
        await until(pilot, lambda: "to base" in screen_text(app))


async def test_keys_hide_baseline_focus_and_x_base(tmp_path):
    paths = await ended(*runs_in(tmp_path, ("one", 40), ("two", 40), ("three", 20)))
    app = LuminaApp(tmp_path, look=Look(hz=10))
    async with app.run_test(size=(120, 40)) as pilot:
        app.open_compare(paths)
        await until(pilot, lambda: loaded(app, 40, 40, 20))
        screen = app.screen
        assert [curve.letter for curve in screen.chart.curves][-1] == "a"
        await pilot.press("j")
        await until(pilot, lambda: [curve.letter for curve in screen.chart.curves] == ["a", "c", "b"])
        await pilot.press("B")
        await until(pilot, lambda: "base b" in screen_text(app))
        await pilot.press("space")
        await until(pilot, lambda: "two (hidden)" in screen_text(app) and len(screen.chart.curves) == 2)
        await pilot.press("space")
        await until(pilot, lambda: len(screen.chart.curves) == 3)
        for base in ("tokens", "hours", "clock", "step"):
            await pilot.press("b")
            await until(pilot, lambda base=base: f"by {base}" in screen_text(app))
        await pilot.press("right_square_bracket")
        await until(pilot, lambda: screen.chart.options.metric != "loss" and "tokens/s" in screen_text(app))
        await pilot.press("left_square_bracket", "c", "H")
        await until(pilot, lambda: "runs  at step" in screen_text(app))
        assert all(chart.cursor.step == screen.chart.cursor.step for chart in screen.small)
        await pilot.press("enter", "H")
        await until(pilot, lambda: "to pin" in screen_text(app) and screen.chart.cursor.pin is not None)


async def test_hiding_all_says_how_to_come_back(tmp_path):
    paths = await ended(*runs_in(tmp_path, ("one", 10), ("two", 10)))
    app = LuminaApp(tmp_path, look=Look(hz=10))
    async with app.run_test(size=(80, 24)) as pilot:
        app.open_compare(paths)
        await until(pilot, lambda: loaded(app, 10, 10))
        for run in app.screen.runs:
            run.hidden = True
        await until(pilot, lambda: "every run is hidden" in screen_text(app))
        app.screen.action_hide()
        await until(pilot, lambda: "every run is hidden" not in screen_text(app))


async def test_a_live_run_grows_one_is_deleted_one_is_broken_one_is_empty(tmp_path):
    over, gone, empty = runs_in(tmp_path, ("over", 30), ("gone", 20), ("empty", 0))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{oops")
    await ended(over, gone)
    await empty.serve(socket=False)
    await empty.crash()
    async with FakeEngine(tmp_path, "live") as live:
        live.state("running")
        live.steps(5)
        app = LuminaApp(tmp_path, look=Look(hz=10))
        async with app.run_test(size=(160, 45)) as pilot:
            app.open_compare([tmp_path / name for name in ("over", "gone", "empty", "broken", "live")])
            await until(pilot, lambda: loaded(app, 30, 20, 0) and app.screen.runs[4].feed.mode is Mode.LIVE)
            words = ("unreadable", "damaged", "has no step yet", "1 live")
            await until(pilot, lambda: all(word in screen_text(app) for word in words))
            screen = app.screen
            assert len(screen.chart.curves) == 4
            struck = [run.letter for run in screen.runs if run.error]
            assert struck == ["d"]
            live.steps(40)
            await until(pilot, lambda: len(screen.runs[4].feed.store.steps) == 45 and "45" in screen_text(app))
            shutil.rmtree(gone.run.path)
            screen._looked = 0.0
            await until(pilot, lambda: "gone gone" not in screen_text(app) and "was deleted" in screen_text(app))
            assert len(screen.runs[1].feed.store.steps) == 20 and screen.runs[1].drawn  # what was read stays
            feeds = [run.feed for run in screen.runs if run.feed is not None]
            app.open_home()
            await until(pilot, lambda: not screen.runs and all(feed._task.done() for feed in feeds))
            app.open_screen(6)
            await until(pilot, lambda: len(screen.runs) == 5 and len(screen.runs[4].feed.store.steps) == 45)
            feeds = [run.feed for run in screen.runs if run.feed is not None]
        assert all(feed._task.done() for feed in feeds)


async def test_what_is_asked_for_last_is_shown(tmp_path):
    one, two, three = await ended(*runs_in(tmp_path, ("one", 10), ("two", 12), ("three", 5)))
    app = LuminaApp(tmp_path, look=Look(hz=10))
    async with app.run_test(size=(80, 24)) as pilot:
        app.open_compare([one, two])
        app.open_compare([three, two])
        await until(pilot, lambda: loaded(app, 5, 12))
        app.open_compare([one, three])
        app.open_home()
        await until(pilot, lambda: not any(task.get_coro().__qualname__ == "CompareScreen._open" for task in app._tasks))
        assert not app._screens[6].runs  # nothing is watched behind another screen
        app.open_screen(6)
        await until(pilot, lambda: loaded(app, 10, 5))


async def test_a_layer_over_the_screen_does_not_let_go_of_the_runs(tmp_path):
    paths = await ended(*runs_in(tmp_path, ("one", 10), ("two", 10)))
    app = LuminaApp(tmp_path, look=Look(hz=10))
    async with app.run_test(size=(80, 24)) as pilot:
        app.open_compare(paths)
        await until(pilot, lambda: loaded(app, 10, 10))
        screen = app.screen
        app.action_help()
        await pilot.pause()
        assert app.screen is not screen and len(screen.runs) == 2
        app.screen.dismiss(None)
        await until(pilot, lambda: app.screen is screen)
        assert loaded(app, 10, 10)


async def test_choosing_among_the_runs_of_the_root(tmp_path):
    await ended(*runs_in(tmp_path, ("one", 10), ("two", 12), ("three", 5)))
    app = LuminaApp(tmp_path, look=Look(hz=10))
    async with app.run_test(size=(80, 24)) as pilot:
        app.open_screen(6)
        await until(pilot, lambda: "choose runs" in screen_text(app) and "three" in screen_text(app))
        screen = app.screen
        screen.choose.move_to("one")
        await pilot.press("enter")
        await until(pilot, lambda: any("two runs make" in notice.text for notice in app.notices))
        await pilot.press("space")
        screen.choose.move_to("two")
        await pilot.press("enter")
        await until(pilot, lambda: loaded(app, 10, 12))
        assert [run.name for run in screen.runs] == ["one", "two"]
        await pilot.press("a")
        await until(pilot, lambda: "2 marked" in screen_text(app))
        await pilot.press("a")
        await until(pilot, lambda: not screen.choosing)


async def test_empty_root_names_the_keys(tmp_path):
    app = LuminaApp(tmp_path / "nothing", look=Look(hz=10))
    async with app.run_test(size=(80, 24)) as pilot:
        app.open_screen(6)
        await until(pilot, lambda: "Mark runs in Home with Space, then =" in screen_text(app))
        assert app.screen.why_not("compare.baseline") and app.screen.why_not("compare.hide")


async def test_more_than_eight_are_refused_with_a_word(tmp_path):
    paths = await ended(*runs_in(tmp_path, *((f"r{i}", 3) for i in range(10))))
    app = LuminaApp(tmp_path, look=Look(hz=10))
    async with app.run_test(size=(80, 24)) as pilot:
        app.open_compare(paths)
        await until(pilot, lambda: loaded(app, *[3] * 8))
        assert len(app.screen.runs) == 8 and any("first 8" in notice.text for notice in app.notices)
        assert len({run.slot for run in app.screen.runs}) == 8


async def test_c135_export_of_all_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = await ended(*runs_in(tmp_path / "runs", ("one", 30), ("two", 20)))
    app = LuminaApp(tmp_path / "runs", look=Look(hz=10))
    async with app.run_test(size=(120, 40)) as pilot:
        app.open_compare(paths)
        await until(pilot, lambda: loaded(app, 30, 20))
        for kind in ("csv", "svg", "txt"):
            app.screen.chart._export(kind)
            await until(pilot, lambda kind=kind: list(Path("exports").glob(f"*.{kind}")))
        rows = list(csv.DictReader(next(Path("exports").glob("*.csv")).open()))
        assert [sum(r["run"] == name and r["kind"] == "step" for r in rows) for name in ("one", "two")] == [30, 20]
        assert [r["value"] for r in rows if r["kind"] == "eval"] == ["3", "2"]
        root = ET.parse(next(Path("exports").glob("*.svg"))).getroot()
        assert {"one", "two"} <= {node.text for node in root.iter()}
        text = next(Path("exports").glob("*.txt")).read_text()
        assert "learning_rate" in text and "to base" in text and "b two" in text
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in Path("exports").iterdir())


async def test_readonly_exports_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = await ended(*runs_in(tmp_path / "runs", ("one", 3), ("two", 3)))
    app = LuminaApp(tmp_path / "runs", look=Look(hz=10), readonly=True)
    async with app.run_test(size=(80, 24)) as pilot:
        app.open_compare(paths)
        await until(pilot, lambda: loaded(app, 3, 3))
        await pilot.press("e")
        await until(pilot, lambda: any("--readonly" in notice.text for notice in app.notices))
        assert not Path("exports").exists()


async def test_se01_hostile_configuration_and_reasons(tmp_path):
    one, two = runs_in(tmp_path, ("one", 5), ("two", 5))
    evil = "[/x]\x1b]0;t\x07\x1b[2J\u202e[@click=app.quit]x[/]"
    for engine in (one, two):
        await engine.serve(socket=False)
        engine.emit(rec.Alert(severity="critical", code=evil, message=evil, step=3))
        await engine.finish("failed", evil)
    one.run.config_path.write_text('seed: "' + "".join(f"\\u{ord(c):04x}" for c in evil) + '"\n')
    app = LuminaApp(tmp_path, look=Look(hz=10))
    async with app.run_test(size=(160, 45)) as pilot:
        app.open_compare([one.run.path, two.run.path])
        await until(pilot, lambda: loaded(app, 5, 5) and "seed" in screen_text(app))
        await pilot.press("c", "{")
        await pilot.pause()
        text = screen_text(app)
        assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text and "[/x]" in text
        assert "\x1b" not in "\n".join(as_text(app.screen.table.rows, side_by_side(app.screen.runs, 100))).replace(evil, "")


def test_a_run_given_twice_is_one(tmp_path):
    (engine,) = runs_in(tmp_path, ("one", 3))
    assert [run.letter for run in opened([engine.run.path, engine.run.path])] == ["a"]
    engine._log.close()


def test_the_focused_line_owns_its_cells():
    """A cell of the focused line shows its dots only, whatever lies below."""
    rng = np.random.default_rng(0)
    stores = [filled(losses=2 + rng.normal(0, 0.3, 400)) for _ in range(4)]
    curves = [Curve(store, f"r{i}", i, "abcd"[i]) for i, store in enumerate(stores)]
    options = Options(weight=0.0, outliers=False)
    many = build(curves, options, 80, 24, "braille", Limits())
    key = build(curves[-1:], options, 80, 24, "braille", Limits()).limits.key
    alone = build(curves[-1:], options, 80, 24, "braille", replace(many.limits, key=key))
    assert (alone.limits.y, alone.left, alone.axis) == (many.limits.y, many.left, many.axis)
    body = np.s_[:-2, many.left : many.left + many.across - 1]
    mine = alone.frame.code_HW[body] > 0x2800
    mine &= ~np.isin(many.frame.code_HW[body], [ord(c) for c in "abcd"])
    assert mine.sum() > 200 and (many.frame.code_HW[body][mine] == alone.frame.code_HW[body][mine]).all()
    assert (many.frame.style_HW[body][mine] == RUN + 3).all()


def test_what_is_stale_looks_stale():
    live, dead = compared("a", filled(losses=[2.0])), compared("b", filled(losses=[2.0]))
    dead.feed.mode, dead.feed.store.state = Mode.DEAD, "running"
    rows = table_rows([live, dead], live, Options(weight=0.0), reach=1.0)
    assert [row.cells[2] for row in rows] == [("2.000", "text"), ("2.000", "dim")] and rows[1].cells[1] == ("dead", "bad")
    assert "it was killed" in dead.why()


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_c138_compare_by_keys_in_a_real_tmux(tmp_path):
    asyncio.run(ended(*runs_in(tmp_path / "runs", ("one", 60), ("two", 30))))
    with Pane(tmp_path, NO_COLOR="1") as pane:
        pane.start("--runs", str(tmp_path / "runs"), "--ascii")
        pane.see("one", "two")
        pane.press("6")
        pane.see("choose runs", "finished")
        pane.press("Space", "j", "Space", "Enter")
        pane.see("to base", "2 runs by step", "loss  EMA")
        pane.press("c", "H", "B")
        pane.see("runs  at step")
        pane.press("Tab")
        assert "learning_rate" in pane.see("differences and results", "configuration key")
        pane.tmux("resize-window", "-t", "a", "-x", "30", "-y", "8")
        pane.see("needs 40x12")
        pane.tmux("resize-window", "-t", "a", "-x", "160", "-y", "45")
        pane.see("to base", "grad norm", "learning_rate")
        pane.press("q")
        assert pane.ended() == 0 and "Traceback" not in pane.text()


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Mn", "Cf")), max_size=60), st.integers(0, 40))
def test_names_that_are_cut_keep_both_ends_and_their_room(text, width):
    shown = fit_ends(text, width)
    assert cell_len(shown) == width
    if cell_len(text) <= width:
        assert shown.rstrip() == text.rstrip()
    elif width >= 12 and text.isascii():
        assert shown[:4] == text[:4] and shown[-4:] == text[-4:] and "…" in shown


def test_names_of_one_family_stay_apart_in_a_narrow_table():
    assert fit_ends("a sample-seed-1", 13) != fit_ends("a sample-seed-2", 13)
