"""Home on scripted runs: each state, filter, sort, commands, hostile names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.run.directory import RunInfo
from lumina_tui.application import LuminaApp
from lumina_tui.runs import RunList, preview
from lumina_tui.screens.home import HomeScreen, matches
from lumina_tui.screens.monitor import MonitorScreen
from lumina_tui.terminal import Look

from .fake_engine import FakeEngine
from .helpers import screen_text, until


@contextlib.asynccontextmanager
async def home(root: Path, size: tuple[int, int] = (80, 24), **kwargs) -> AsyncIterator[tuple]:
    app = LuminaApp(root, look=Look(), **kwargs)
    async with app.run_test(size=size) as pilot:
        screen = app.screen
        assert isinstance(screen, HomeScreen)
        await until(pilot, lambda: screen._list is not None and not screen._busy)
        yield app, pilot, screen


async def test_c127_empty_names_the_key(tmp_path):
    async with home(tmp_path / "none") as (app, _, _):
        text = screen_text(app)
        assert "No runs in" in text and "a starts one" in text


async def test_c127_states_in_one_list(tmp_path):
    async with (
        FakeEngine(tmp_path, "alive") as alive,
        FakeEngine(tmp_path, "over") as over,
        FakeEngine(tmp_path, "dead") as dead,
    ):
        for engine in (alive, over, dead):
            engine.state("running")
            engine.steps(30)
        await over.finish()
        await dead.crash()
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "run.json").write_text("{")
        (tmp_path / "no-run").mkdir()
        async with home(tmp_path, (120, 30)) as (app, pilot, screen):
            await until(pilot, lambda: len(screen.rows) == 4)
            lines = screen_text(app).split("\n")
            row = {
                word: next(text for text in lines if f" {word} " in text or f"{word}:" in text)
                for word in ("alive", "over", "dead", "broken")
            }
            assert "running" in row["alive"] and "30" in row["alive"] and "1,000" in row["alive"]
            assert "finished" in row["over"] and "crashed" in row["dead"]
            assert "unreadable" in row["broken"] and "damaged" in row["broken"]
            assert "1 live" in lines[0] and "no-run" not in "\n".join(lines)


async def test_mx10_a_crash_shows_by_itself(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(3)
        async with home(tmp_path) as (app, pilot, _):
            await until(pilot, lambda: "running" in screen_text(app))
            await engine.crash()
            await until(pilot, lambda: "crashed" in screen_text(app))


async def test_filter_sort_and_open(tmp_path):
    async with FakeEngine(tmp_path, "aaa", preset="b1") as first, FakeEngine(tmp_path, "zzz") as second:
        for engine in (first, second):
            engine.state("running")
            engine.steps(2)
        async with home(tmp_path) as (app, pilot, screen):
            await until(pilot, lambda: len(screen.rows) == 2)
            screen.filter = "preset:b1"
            screen.show_rows()
            await until(pilot, lambda: "zzz" not in screen_text(app))
            screen.filter = "nothing"
            screen.show_rows()
            await until(pilot, lambda: "No run matches nothing" in screen_text(app))
            screen.filter = ""
            screen.action_sort()
            await until(pilot, lambda: "by name" in screen_text(app))
            screen.table.move_to("zzz")
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.feed is not None)
            assert app.screen.feed.run.name == "zzz"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", True),
        ("oas", True),
        ("state:run", True),
        ("state:failed", False),
        ("preset:b1 oasst", True),
        ("x:y", False),
        ("OASST", True),
    ],
)
def test_filter_words(words, found):
    assert matches(RunInfo("b1-oasst", "running", Path("r"), preset="b1"), words) is found


async def test_c134_stop_is_asked_for_and_sent(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("lumina_engine.run.client.send_command", lambda run, cmd, args: sent.append((run.name, cmd, args)))
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        async with home(tmp_path) as (app, pilot, screen):
            await until(pilot, lambda: screen.chosen is not None)
            assert "is running" in screen.why_not("home.resume")
            await pilot.press("X")
            await until(pilot, lambda: "Stop demo?" in screen_text(app))
            await pilot.press("s")
            await until(pilot, lambda: sent)
            assert sent == [("demo", "stop", {"save": True})]
            await until(pilot, lambda: any("stop accepted" in notice.text for notice in app.notices))


async def test_resume_starts_the_engine_on_that_run(tmp_path, monkeypatch):
    started = []

    async def start(self, arguments):
        from lumina_tui.launching import LaunchError

        started.append(list(arguments))
        raise LaunchError("no checkpoint \x1b[2J[/x]")

    monkeypatch.setattr(LuminaApp, "start_run", start)
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        await engine.crash()
        async with home(tmp_path) as (app, pilot, screen):
            await until(pilot, lambda: screen.chosen is not None)
            await pilot.press("R")
            await until(pilot, lambda: any("no checkpoint" in notice.text for notice in app.notices))
            assert started == [["--run", "demo", "--resume"]]
            assert "is not running" in screen.why_not("home.stop")


async def test_readonly_refuses_changes(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        async with home(tmp_path, readonly=True) as (_, pilot, screen):
            await until(pilot, lambda: screen.chosen is not None)
            for verb in ("new", "stop", "resume"):
                assert "readonly" in screen.why_not(f"home.{verb}")


async def test_se01_hostile_names_and_reasons(tmp_path):
    for i, name in enumerate(["\x1b]0;x\x07", "[@click=app.leave]z", "[bold", "‮evil", "a\nb", "漢" * 60]):
        path = tmp_path / name
        path.mkdir()
        bad = {"format": 1, "id": "x", "name": "n", "state": "failed", "reason": f"\x1b[2J[/x] {i}", "pid": None}
        (path / "run.json").write_text(json.dumps(bad))
    async with home(tmp_path, (160, 45)) as (app, pilot, screen):
        await until(pilot, lambda: len(screen.rows) == 6)
        for _ in range(6):
            await pilot.press("j")
            await pilot.pause()
            text = screen_text(app)
            assert all(c.isprintable() or c == "\n" for c in text)
        assert "[/x]" in text and "[@click=app.leave]z" in text


async def test_wide_shows_the_chosen_run(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(80)
        engine.emit(rec.Alert(severity="warning", code="loss_spike", message="6.3 sigma"))
        engine.emit(rec.Checkpoint(step=50, bytes=12_000_000, best=True))
        async with home(tmp_path, (160, 45)) as (app, pilot, _):
            await until(pilot, lambda: "step 50, best, 12.0 MB" in screen_text(app))
            text = screen_text(app)
            assert "loss_spike" in text and "left" in text and "█" in text


def test_mx05_unchanged_dead_runs_are_not_read_again(tmp_path, monkeypatch):
    from lumina_engine.run.directory import RunDirectory

    now = [1e9]
    for i in range(5):
        engine = FakeEngine(tmp_path, f"r{i}")
        engine.emit(rec.Run(state="finished"))
        engine.run.update_identity(state="finished", pid=2**22 + 1, start_time=1)
    runs = RunList(tmp_path, clock=lambda: now[0])
    assert len(runs.refresh()) == 5
    read = []
    original = RunDirectory.info
    monkeypatch.setattr(RunDirectory, "info", lambda self: read.append(self.name) or original(self))
    now[0] += 10
    again = runs.refresh()
    assert not read and all(row.age_s >= 10 for row in again)
    FakeEngine.steps(engine, 1)
    runs.refresh()
    assert read == ["r4"]
    assert len(preview(tmp_path / "r4").losses) == 1 and preview(tmp_path / "none").losses == ()
