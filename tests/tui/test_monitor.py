"""Monitor on a scripted run: start, live, stale, dead, over; commands; layers; hostile records; several viewers."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec
from lumina_tui.application import LuminaApp, Start
from lumina_tui.ending import Footprint
from lumina_tui.feed import Mode
from lumina_tui.requests import Phase
from lumina_tui.screens import run_commands
from lumina_tui.screens.alerts import AlertSheet
from lumina_tui.screens.base import State
from lumina_tui.screens.dialogs import Prompt, Question
from lumina_tui.screens.monitor import MonitorScreen
from lumina_tui.screens.run_commands import check_lr
from lumina_tui.terminal import Look

from .fake_engine import FakeEngine
from .helpers import screen_text, until
from .test_frame import HOSTILE_TEXT


@contextlib.asynccontextmanager
async def monitor(root: Path, size: tuple[int, int] = (80, 24), run: str = "demo", **kwargs) -> AsyncIterator[tuple]:
    app = LuminaApp(root, look=kwargs.pop("look", Look()), start=Start(run=root / run), **kwargs)
    async with app.run_test(size=size) as pilot:
        screen = app.screen
        assert isinstance(screen, MonitorScreen)
        await until(pilot, lambda: screen.feed is not None and screen.feed.mode is not Mode.LOADING)
        yield app, pilot, screen


@contextlib.asynccontextmanager
async def live(root: Path, size: tuple[int, int] = (80, 24), steps: int = 60, **kwargs) -> AsyncIterator[tuple]:
    async with FakeEngine(root) as engine:
        engine.state("running")
        engine.steps(steps)
        async with monitor(root, size, **kwargs) as (app, pilot, screen):
            await until(pilot, lambda: screen.feed.mode is Mode.LIVE)
            yield engine, app, pilot, screen


async def test_c131_everything_at_80x24(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, _screen):
        engine.experts(2, 8, hot=3, dead=5)
        engine.hardware()
        engine.emit(rec.Eval(step=60, loss=2.0))
        engine.emit(
            rec.Alert(severity="warning", code="loss_spike", message="6.3 sigma", recommendation="Nothing to do.", step=50)
        )
        await until(pilot, lambda: "loss_spike" in screen_text(app) and "max/mean" in screen_text(app))
        text = screen_text(app)
        for part in (
            "RUNNING", "LIVE", "!1", "step 60 of 1,000", "123 k tokens", "left", "loss  EMA 0.9", "o eval", "60: ",
            "tokens/s", "grad norm", "lr", "experts 2 x 8", "1 dead", "cpu", "disk 1.1 TB free", "Nothing to do.", "? help",
        ):  # fmt: skip
            assert part in text, f"{part}\n{text}"
        assert "C checkpoint" in text.split("\n")[-1]


async def test_c131_wide_shows_charts_devices_and_log(tmp_path):
    async with live(tmp_path, (160, 45)) as (engine, app, pilot, _):
        engine.hardware(2)
        engine.log("hello from the rank", "WARNING: something")
        await until(pilot, lambda: "gpu1" in screen_text(app) and "hello from the rank" in screen_text(app))
        text = screen_text(app)
        for part in ("learning rate", "grad norm  EMA", "71 of 80 GB", "688 W", "74 C", "engine.log"):
            assert part in text, part


async def test_start_phase_shows_state_and_log(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("preparing", "building the token store")
        engine.log("reading data", "[/x] \x1b[2J")
        async with monitor(tmp_path) as (app, pilot, screen):
            await until(pilot, lambda: "BUSY preparing" in screen_text(app) and "reading data" in screen_text(app))
            text = screen_text(app)
            assert "building the token store" in text and "ok supervisor" in text and "first step" in text
            assert "[/x] ␛[2J" in text
            engine.state("running")
            engine.steps(2)
            await until(pilot, lambda: "loss  EMA" in screen_text(app) and not screen.has_class("-starting"))
            await until(pilot, lambda: screen.focused is screen.loss)  # chart keys work at once


async def test_failed_before_the_first_step(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("preparing")
        engine.log("train.jsonl:3: no assistant turn")
        await engine.finish("failed", "train.jsonl:3: no assistant turn", 65)
        async with monitor(tmp_path) as (app, pilot, _):
            await until(pilot, lambda: "failed before the first step" in screen_text(app))
            assert "FAILED" in screen_text(app) and "FILE" in screen_text(app)


async def test_mx10_crash_is_dead_and_a_restart_revives_it(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, screen):
        await engine.crash()
        await until(pilot, lambda: "CRASHED" in screen_text(app) and "DEAD" in screen_text(app))
        assert "left" not in screen_text(app).split("\n")[1]
        assert "its supervisor is gone" in screen.why_not("monitor.checkpoint")
        await engine.restart(40)
        engine.steps(5)
        await until(pilot, lambda: "RUNNING" in screen_text(app) and "step 45" in screen_text(app))
        assert screen.store.step == 45 and [len(tail.step) for tail in screen.store.tails] == [20]


async def test_finished_run_is_read_from_the_file(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(100)
        engine.emit(rec.Checkpoint(step=100, bytes=5))
        (engine.run.reports / "sample_eval.json").write_text('{"overall": 0.824, "skills": {}}')
        await engine.finish()
        async with monitor(tmp_path) as (app, pilot, screen):
            await until(pilot, lambda: "FINISHED" in screen_text(app) and "FILE" in screen_text(app))
            text = screen_text(app)
            assert "step 100" in text and "of training" in text
            assert "held-out questions right: 82 %" in text and "T chats" in text
            assert screen.summary().startswith("step 100, loss")


async def test_empty_and_wrong_run(tmp_path):
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await until(pilot, lambda: "No runs in" in screen_text(app) and "trend" not in screen_text(app))
        app.open_monitor("nonexistent[/x]")
        await until(pilot, lambda: "no run" in screen_text(app))


async def test_c134_commands_end_with_their_record(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, _screen):
        await pilot.press("C")
        await until(pilot, lambda: "checkpoint now: applied at step 60" in screen_text(app))
        await pilot.press("P")
        await until(pilot, lambda: "PAUSED" in screen_text(app) and "P resume" in screen_text(app))
        await pilot.press("P")
        await until(pilot, lambda: "RUNNING" in screen_text(app))
        await pilot.press("S")
        await until(pilot, lambda: isinstance(app.screen, Prompt))
        for key in ("ctrl+u", *"2e-4"):
            await pilot.press("minus" if key == "-" else key)
        await pilot.press("enter")
        await until(pilot, lambda: "learning rate 2.00e-4" in screen_text(app) or "learning rate 2e-4" in screen_text(app))
        await pilot.press("X")
        await until(pilot, lambda: isinstance(app.screen, Question) and "Stop demo?" in screen_text(app))
        await pilot.press("s")
        await until(pilot, lambda: "STOPPING" in screen_text(app))
        assert [(c["cmd"], c["args"]) for c in engine.commands] == [
            ("checkpoint", {}), ("pause", {}), ("resume", {}), ("set_lr", {"lr": 2e-4}), ("stop", {"save": True})
        ]  # fmt: skip
        assert len({c["id"] for c in engine.commands}) == 5


async def test_c134_refused_and_waiting_commands_say_so(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, screen):
        engine.refuse["checkpoint"] = "disk full \x1b[2J [/x]"
        await pilot.press("C")
        await until(pilot, lambda: "refused: disk full ␛[2J [/x]" in screen_text(app))
        engine.silent_to_commands = True
        await pilot.press("P")
        await until(pilot, lambda: "pause: sent" in screen_text(app))
        screen.feed.clock = lambda t=screen.feed.requests[-1].sent: t + 30
        await until(pilot, lambda: "waits for a step boundary (30 s)" in screen_text(app))


async def test_readonly_viewer_sends_nothing(tmp_path):
    async with live(tmp_path, readonly=True) as (engine, app, pilot, _):
        for key in "CPSX":
            await pilot.press(key)
        await until(pilot, lambda: len(app.notices) == 4)
        assert not engine.commands and "--readonly" in app.notices[-1].text


async def test_kill_asks_twice(tmp_path, monkeypatch):
    killed: list[str] = []
    held = [Footprint((7, 4242), 3_000_000_000, 71_000_000_000), Footprint((4242,), 1_000_000_000, 0)]
    monkeypatch.setattr(run_commands, "kill_run", lambda run: killed.append(run.name))
    monkeypatch.setattr(run_commands, "footprint", lambda run: held.pop(0))
    async with live(tmp_path) as (_, app, pilot, _):
        await pilot.press("X")
        await until(pilot, lambda: isinstance(app.screen, Question))
        await pilot.press("k")
        await until(pilot, lambda: "Kill every process of demo?" in screen_text(app))
        assert not killed
        await pilot.press("K")
        await until(pilot, lambda: any("still alive: process 4242" in notice.text for notice in app.notices))
        assert killed == ["demo"]
        said = app.notices[-1]
        assert said.severity == "error" and "71 GB of device memory freed, 2.00 GB of host memory freed" in said.text


async def test_layers_maximise_log_filter_alerts(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, screen):
        engine.log("one", "two words", "three")
        engine.emit(
            rec.Alert(severity="critical", code="nan_loss", message="loss is nan", recommendation="Lower the rate.", step=7)
        )
        await pilot.press("t")
        await until(pilot, lambda: "two words" in screen_text(app))
        await pilot.press("slash")
        await until(pilot, lambda: isinstance(app.screen, Prompt))
        for key in "words":
            await pilot.press(key)
        await pilot.press("enter")
        await until(pilot, lambda: "/words" in screen_text(app) and "three" not in screen_text(app))
        await pilot.press("t")
        await until(pilot, lambda: "engine.log" not in screen_text(app))
        await pilot.press("m")
        await until(pilot, lambda: screen.maximized is screen.loss and "trend" not in screen_text(app))
        await pilot.press("escape")
        await until(pilot, lambda: screen.maximized is None and "trend" in screen_text(app))
        assert "!1" in screen_text(app)
        await pilot.press("A")
        await until(pilot, lambda: isinstance(app.screen, AlertSheet) and "Lower the rate." in screen_text(app))
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is screen and "!1" not in screen_text(app))


async def test_below_60x15_three_lines_remain(tmp_path):
    async with live(tmp_path, (40, 10)) as (_, app, pilot, _):
        await until(pilot, lambda: "60 / 1,000" in screen_text(app))
        text = screen_text(app)
        assert ("running" in text and "loss 3." in text) or "loss" in text
        assert "┌" not in text


async def test_c133_two_viewers_agree_and_a_second_one_sees_the_whole_curve(tmp_path):
    async with live(tmp_path, steps=300) as (engine, _app, pilot, screen):
        engine.steps(20)
        await until(pilot, lambda: screen.store.step == 320)
        async with monitor(tmp_path) as (_, other_pilot, other):
            await until(other_pilot, lambda: other.feed.mode is Mode.LIVE)
            engine.steps(10)
            await until(pilot, lambda: screen.store.step == 330)
            await until(other_pilot, lambda: other.store.step == 330)
            a, b = screen.store.steps, other.store.steps
            assert a.step.values.tolist() == b.step.values.tolist() == list(range(1, 331))
            assert a.metrics["loss"].values.tolist() == b.metrics["loss"].values.tolist()


async def test_switching_runs_closes_the_old_feed(tmp_path):
    async with FakeEngine(tmp_path, "other") as other, live(tmp_path) as (engine, app, pilot, screen):
        other.state("running")
        other.steps(5)
        old = screen.feed
        app.open_monitor("other")
        await until(pilot, lambda: screen.feed is not None and screen.feed is not old and screen.store.step == 5)
        assert old._task.done() and "other" in screen_text(app).split("\n")[0]
        await until(pilot, lambda: not engine._clients)


async def test_se01_hostile_text_in_every_record_and_line(tmp_path):
    async with live(tmp_path, (160, 45)) as (engine, app, pilot, screen):
        engine.emit(
            rec.Alert(severity="critical", code=HOSTILE_TEXT, message=HOSTILE_TEXT, recommendation=HOSTILE_TEXT, step=3)
        )
        engine.emit(rec.Run(state="running", reason=HOSTILE_TEXT))
        engine.emit(rec.Change(what=HOSTILE_TEXT, before=HOSTILE_TEXT, after=HOSTILE_TEXT, step=4))
        engine.emit(rec.Checkpoint(step=5, failed=HOSTILE_TEXT))
        engine.emit(rec.Rewind(to_step=59, reason=HOSTILE_TEXT))
        engine.emit(rec.Hardware(devices=[rec.Device(index=0, name=HOSTILE_TEXT)], cpu=math.nan))
        engine.log(HOSTILE_TEXT, "\x1b[31mred", "a\rb\rc")
        engine.emit(rec.Run(state=HOSTILE_TEXT))
        await until(pilot, lambda: screen.store.state == HOSTILE_TEXT and "red" in screen_text(app))
        for keys in ("c", "left_curly_bracket", "left_curly_bracket", "A", "j", "escape", "question_mark", "escape", "1", "5"):
            await pilot.press(keys)
            await pilot.pause()
            assert all(c.isprintable() or c == "\n" for c in screen_text(app)), keys


async def test_values_without_meaning_do_not_break_the_screen(tmp_path):
    async with live(tmp_path, (120, 40)) as (engine, app, pilot, screen):
        for value in (math.nan, math.inf, -math.inf, 1e308, 1e-45, -5.0, 0.0):
            engine.steps(3, loss=value, grad_norm=value, lr=value, tokens_per_s=value, step_time=value)
            engine.emit(rec.Eval(step=engine.step_number, loss=value))
        engine.emit(rec.Experts(step=1, layers=[0, 1], load=[[0, 0], []], imbalance=[math.nan], dead=[2]))
        engine.emit(rec.Hardware(memory_used=5, memory_total=0))
        last = engine.step_number
        await until(pilot, lambda: screen.store.step == last)
        for key in (
            "i",
            "v",
            "s",
            "b",
            "b",
            "right_square_bracket",
            "plus",
            "plus",
            "minus",
            "f",
            "c",
            "h",
            "H",
            "0",
            "$",
            "enter",
            "l",
        ):
            await pilot.press("dollar_sign" if key == "$" else key)
            await pilot.pause()
        assert "step 81" in screen_text(app)


async def test_quiet_is_stale_and_says_since_when(tmp_path):
    async with live(tmp_path) as (_, app, pilot, screen):
        screen.feed.clock = lambda t=screen.feed.arrived: t + 42
        await until(pilot, lambda: "QUIET 42 s" in screen_text(app))
        assert screen.loss.has_class("-stale")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("3e-4", None), ("x", "number"), ("0", "above 0"), ("-1", "above 0"), ("nan", "above 0"), ("2", "at most 1")],
)
def test_learning_rate_is_checked(text, wrong):
    assert (check_lr(text) is None) if wrong is None else wrong in check_lr(text)


async def test_damaged_log_is_named(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(10)
        with engine.run.metrics_path.open("ab") as file:
            file.write(b"garbage\n")
        engine._next_inc()
        engine.steps(5)
        async with monitor(tmp_path) as (app, pilot, screen):
            await until(pilot, lambda: "unreadable place" in screen_text(app))
            assert screen.store.step == 15


async def test_a_lost_connection_marks_open_commands(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, screen):
        engine.silent_to_commands = True
        await pilot.press("C")
        await until(pilot, lambda: engine.commands)
        await engine.crash()
        await until(pilot, lambda: screen.feed.requests[-1].phase is Phase.REFUSED)
        await until(pilot, lambda: any("connection was lost" in notice.text for notice in app.notices))
        await asyncio.sleep(0)


SIZES = [(80, 24), (160, 45), (200, 60)]


def box_of(screen, name: str):
    """Left, top, width, height of a panel; None while it is hidden."""
    widget = screen.query_one(name)
    return widget.region if widget.region.width and widget.is_on_screen else None


@pytest.mark.parametrize("size", SIZES)
async def test_c131_layout_of_each_size(tmp_path, size):
    async with live(tmp_path, size) as (engine, app, pilot, screen):
        engine.experts(4, 8)
        engine.hardware(2)
        engine.log("a line")
        await until(pilot, lambda: (box_of(screen, "#experts") and "trend" not in screen_text(app)) or size == (80, 24))
        await until(pilot, lambda: "experts 4 x 8" in screen_text(app))
        boxes = {name: box_of(screen, f"#{name}") for name in ("loss", "experts", "tokens_per_s", "devices", "log", "alerts")}
        shown = {name for name, box in boxes.items() if box is not None}
        if size == (80, 24):
            assert shown == {"loss", "experts"} and "trend" in screen_text(app)
            return
        assert shown >= {"loss", "experts", "tokens_per_s", "devices", "log"}
        assert boxes["loss"].bottom == boxes["tokens_per_s"].y
        if size == (200, 60):
            assert boxes["alerts"] and boxes["log"].height == 14, "12 lines of log"
            assert boxes["experts"].bottom == boxes["tokens_per_s"].bottom, "the map has full height"
            assert boxes["loss"].width == sum(box_of(screen, f"#{n}").width for n in ("tokens_per_s", "grad_norm", "lr"))
        else:
            assert boxes["alerts"] is None and boxes["experts"].bottom == boxes["loss"].bottom
        for panel in (screen.loss, screen.experts, screen.devices, screen.log_view):
            panel.focus()
            await until(pilot, lambda panel=panel: app.focused is panel)
            app.action_maximise()
            await until(pilot, lambda panel=panel: screen.maximized is panel and panel.region.width == size[0])
            app.action_maximise()


@pytest.mark.parametrize("size", SIZES)
async def test_each_state_at_each_size(tmp_path, size):
    """Empty, loading, start phase, live, stale, error: each says so, and none raises."""
    async with FakeEngine(tmp_path) as engine:
        engine.state("preparing", "building the token store")
        async with monitor(tmp_path, size) as (app, pilot, screen):
            await until(pilot, lambda: "ok supervisor" in screen_text(app) and "BUSY preparing" in screen_text(app))
            engine.state("running")
            engine.steps(20)
            engine.experts(2, 8)
            engine.hardware(1)
            await until(pilot, lambda: "LIVE" in screen_text(app) and "loss  EMA" in screen_text(app))
            screen.feed.clock = lambda t=screen.store.t: t + 300
            await until(pilot, lambda: "QUIET" in screen_text(app) and "5 m old" in screen_text(app))
            assert screen.experts.has_class("-stale") and "loss  EMA" in screen_text(app), "values stay, dimmed"
            screen.feed.clock = lambda t=screen.store.t: t
            await until(pilot, lambda: "m old" not in screen_text(app))
            screen.feed.error = "metrics.jsonl: Permission denied"
            await until(pilot, lambda: "Permission denied" in screen_text(app) and "loss  EMA" in screen_text(app))
            screen.feed.error = ""
            for chart in screen.charts:
                chart.set_state(State.LOADING, "reading the run's file: 63 %")
            for small in ((20, 6), (10, 3), (1, 1), size):
                await pilot.resize_terminal(*small)
                await pilot.pause()
            await until(pilot, lambda: "loss  EMA" in screen_text(app))


async def test_c131_ranks_live_and_one_that_hangs(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.beat(0, "forward")
        engine.state("running")
        engine.steps(30)
        engine.hardware(2)
        async with monitor(tmp_path, (160, 45)) as (app, pilot, screen):
            await until(pilot, lambda: "rank 0  forward of step" in screen_text(app))
            engine.beat(0, "forward", 812, 3.0)
            engine.beat(1, "backward", 812, 90.0)
            screen.feed._asked = 0.0
            await until(pilot, lambda: "LATE backward of step 812" in screen_text(app))
            await until(pilot, lambda: "rank 1 is 1 m 30 s in backward of step 812" in screen_text(app))
            engine.beat(1, HOSTILE_TEXT, 812, 90.0, connected=False)
            screen.feed._asked = 0.0
            await until(pilot, lambda: "DEAD has ended without a word" in screen_text(app))
            assert all(c.isprintable() or c == "\n" for c in screen_text(app))
            await engine.crash()
            await until(pilot, lambda: "CRASHED" in screen_text(app) and "rank 1" not in screen_text(app))


async def test_an_older_supervisor_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeEngine, "_ranks", lambda engine: {"asks": []})
    async with live(tmp_path, (160, 45)) as (engine, app, pilot, screen):
        sent = []
        monkeypatch.setattr(screen.feed, "_send", sent.append)
        before = screen.store.step
        engine.steps(5)
        await until(pilot, lambda: screen.store.step == before + 5)
        assert sent == [] and screen.feed.ranks.beats == [] and "rank" not in screen_text(app)


async def test_c131_where_a_step_goes(tmp_path):
    async with live(tmp_path) as (_, app, pilot, screen):
        engine_line = "step          120 ms d"
        await until(pilot, lambda: engine_line in screen_text(app))
        screen.loss.action_previous_metric()  # around the end: what experts have is not known here
        await until(pilot, lambda: "optimizer time" in screen_text(app))
        screen.action_devices()
        await until(pilot, lambda: "backward 48 %" in screen_text(app) and "data 3 %" in screen_text(app))


async def test_c132_figures_of_the_experts_as_charts(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, screen):
        for _ in range(3):
            engine.steps(5)
            engine.experts(2, 8, hot=3)
        await until(pilot, lambda: len(screen.store.experts) == 3)
        for title in ("dropped share", "routing entropy", "imbalance"):
            screen.loss.action_previous_metric()
            await until(pilot, lambda title=title: f"{title}  EMA" in screen_text(app))
        assert f"75: {screen.store.experts.last('imbalance'):.2f}" in screen_text(app)


async def test_enter_on_an_alert_moves_the_crosshair(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, screen):
        for step, code in ((7, "loss_spike"), (31, "nan_loss")):
            engine.emit(rec.Alert(severity="critical", code=code, message="m", recommendation="Lower it.", step=step))
        await until(pilot, lambda: "!2" in screen_text(app))
        for _ in range(3):
            screen.loss.action_zoom_in()
        await until(pilot, lambda: "zoomed" in screen_text(app))
        screen.action_alerts()
        await until(pilot, lambda: isinstance(app.screen, AlertSheet) and "Lower it." in screen_text(app))
        app.screen.table.action_down()
        await until(pilot, lambda: "loss_spike  at step 7" in screen_text(app))
        app.screen.table.action_choose()
        await until(pilot, lambda: app.screen is screen and screen.cursor.step == 7)
        await until(pilot, lambda: "─ 7: " in screen_text(app) and "!2" not in screen_text(app))
        view = screen.loss.options.view
        assert view is not None and view[0] <= 7 <= view[1], "it comes into view"
        screen.action_alerts()
        await until(pilot, lambda: isinstance(app.screen, AlertSheet))
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is screen)
        assert screen.cursor.step == 7
    async with monitor(tmp_path) as (again, pilot, _):
        await until(pilot, lambda: "step 60" in screen_text(again))
        assert "!2" not in screen_text(again).split("\n")[0], "opened stays opened, also in the next session"


async def test_panels_that_were_chosen_are_there_in_the_next_session(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, screen):
        engine.hardware()
        screen.action_devices()
        await until(pilot, lambda: "─ devices" in screen_text(app) and "trend" not in screen_text(app))
        assert app.focused is screen.devices
        screen.action_log()
        await until(pilot, lambda: "engine.log" in screen_text(app) and "─ devices" not in screen_text(app))
        async with monitor(tmp_path) as (other, other_pilot, _):
            app.memory.flush()
        async with monitor(tmp_path) as (other, other_pilot, _):
            await until(other_pilot, lambda: "engine.log" in screen_text(other))
        screen.action_log()
        await until(pilot, lambda: "engine.log" not in screen_text(app) and "trend" in screen_text(app))


async def test_panels_are_exported_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with live(tmp_path, (160, 45)) as (engine, app, pilot, screen):
        engine.experts(2, 8, dead=5)
        engine.hardware(1)
        engine.log("one line", "another \x1b[2J")
        await until(pilot, lambda: "gpu0" in screen_text(app) and "one line" in screen_text(app))
        await until(pilot, lambda: "1 dead" in screen_text(app))
        for panel in (screen.experts, screen.devices, screen.log_view):
            await panel.action_do(f"{panel.scope}.export")
        files = {path.name.split("-2")[0]: path.read_text() for path in (tmp_path / "exports").iterdir()}
        assert files.keys() == {"experts", "devices", "engine-log"}
        rows = [line.split("\t") for line in files["experts"].splitlines()]
        assert rows[0][:4] == ["step", "layer", "imbalance", "entropy"] and rows[2][rows[0].index("expert_5")] == "0"
        assert files["devices"].lstrip().startswith("gpu0") and files["engine-log"] == "one line\nanother ␛[2J\n"


async def test_the_command_of_the_run_can_be_copied(tmp_path, monkeypatch):
    async with live(tmp_path) as (engine, app, _, screen):
        engine.run.update_identity(argv=["lumina-engine", "train", "--run", "a b"])
        copied = []
        monkeypatch.setattr(app, "copy_text", lambda text, name="": copied.append(text))
        await screen.action_do("monitor.command")
        assert copied == ["lumina-engine train --run 'a b'"]


async def test_c134_the_present_rate_is_shown_and_a_wrong_one_refused(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, screen):
        screen.action_set_lr()
        await until(pilot, lambda: "The schedule stands at 9.9" in screen_text(app) and "(step 60)" in screen_text(app))
        for key in ("ctrl+u", "2", "enter"):
            await pilot.press(key)
        await until(pilot, lambda: "must be at most 1" in screen_text(app))
        assert not engine.commands and isinstance(app.screen, Prompt)


async def test_c134_a_stop_reports_what_it_freed(tmp_path, monkeypatch):
    held = [Footprint((7, 8), 3_000_000_000, None), Footprint()]
    monkeypatch.setattr(run_commands, "footprint", lambda run: held.pop(0))
    async with live(tmp_path) as (engine, app, pilot, screen):
        screen._stop("save")
        await until(pilot, lambda: "STOPPING" in screen_text(app))
        await engine.finish()
        await until(pilot, lambda: any("all 2 processes are gone, 3.00 GB" in notice.text for notice in app.notices))


async def test_c134_two_viewers_command_one_run(tmp_path):
    async with live(tmp_path) as (engine, app, pilot, screen), monitor(tmp_path) as (other_app, other_pilot, other):
        await until(other_pilot, lambda: other.feed.mode is Mode.LIVE)
        screen.action_pause()
        await until(pilot, lambda: "PAUSED" in screen_text(app))
        await until(other_pilot, lambda: "PAUSED" in screen_text(other_app) and "P resume" in screen_text(other_app))
        other.action_pause()
        await until(other_pilot, lambda: "RUNNING" in screen_text(other_app))
        await until(pilot, lambda: "RUNNING" in screen_text(app))
        assert [c["cmd"] for c in engine.commands] == ["pause", "resume"]


async def test_c134_commands_to_a_run_that_is_over_are_refused_with_the_reason(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(5)
        await engine.finish()
        async with monitor(tmp_path) as (app, pilot, screen):
            await until(pilot, lambda: "FINISHED" in screen_text(app))
            for name in ("checkpoint", "pause", "set_lr", "stop"):
                await screen.action_do(f"monitor.{name}")
                assert "the run is finished" in app.notices[-1].text, name


@pytest.mark.parametrize("size", [*SIZES, (120, 40)])
async def test_c014_a_dense_run_has_no_map(tmp_path, size):
    async with live(tmp_path, size) as (engine, _, pilot, screen):
        engine.hardware()
        await until(pilot, lambda: screen.has_class("-dense") and box_of(screen, "#loss"))
        await until(pilot, lambda: box_of(screen, "#experts") is None and box_of(screen, "#loss").width == size[0])
        if size[0] >= 160:
            assert sum(box_of(screen, f"#{name}").width for name in ("tokens_per_s", "grad_norm", "lr")) == size[0]
        assert screen.experts.why_not("map.over_time")


async def test_help_explains_the_signs_of_the_panel(tmp_path):
    async with live(tmp_path, (160, 45)) as (engine, app, pilot, screen):
        engine.experts(2, 8)
        for panel, words in ((screen.experts, "no token at all"), (screen.devices, "o optimizer")):
            panel.focus()
            await until(pilot, lambda panel=panel: app.focused is panel)
            app.action_help()
            await until(pilot, lambda words=words: words in screen_text(app))
            await pilot.press("escape")
            await until(pilot, lambda: app.screen is screen)
