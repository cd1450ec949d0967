"""Notices, the bell, and the user's own command for critical alerts; and what --readonly refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina_engine.monitoring import record as rec
from lumina_tui import actions
from lumina_tui.alarms import INTERVAL_S, Alarms, run_command
from lumina_tui.application import LuminaApp
from lumina_tui.places import config_dir
from lumina_tui.screens.dialogs import Sheet
from lumina_tui.settings import Settings
from lumina_tui.terminal import Look

from .fake_engine import FakeEngine
from .helpers import screen_text, until
from .test_actions import nodes


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def alert(seq: int, severity: str = "critical", t: float = 2000.0, code: str = "nan_loss") -> rec.Alert:
    return rec.Alert(seq=seq, t=t, severity=severity, code=code, message="m", step=seq)  # type: ignore[arg-type]


def test_alerts_are_new_once_and_only_critical_ones_ring():
    alarms, run = Alarms(["x"], Clock()), Path("a")
    alerts = [alert(1, "warning"), alert(2), alert(3, "info")]
    assert [a.seq for a in alarms.look(run, alerts)] == [2]
    assert alarms.look(run, alerts) == []
    assert alarms.look(run, alerts[2:]) == []  # the others were opened
    assert [a.seq for a in alarms.look(run, [*alerts, alert(5), alert(6)])] == [5, 6]
    assert [a.seq for a in alarms.look(Path("b"), [alert(1)])] == [1]


def test_alert_command_runs_for_what_comes_while_watching_and_is_rate_limited():
    clock = Clock()
    alarms, run = Alarms(["x"], clock), Path("a")
    alarms.look(run, [alert(1, t=900.0)])
    assert alarms.due() is None  # it was there before the run was opened
    alarms.look(run, [alert(2, t=1001.0), alert(3, t=1001.0)])
    first = alarms.due()
    assert first is not None and (first["step"], first["others"], first["run"], first["code"]) == (3, 1, "a", "nan_loss")
    for seq in range(4, 50):
        alarms.look(run, [alert(seq, t=1002.0)])
        assert alarms.due() is None
    clock.now += INTERVAL_S
    second = alarms.due()
    assert second is not None and (second["step"], second["others"]) == (49, 45)
    clock.now += INTERVAL_S
    assert alarms.due() is None
    silent = Alarms((), clock)
    assert silent.look(run, [alert(1, t=5000.0)]) and silent.due() is None


async def test_alert_command_gets_json_and_no_shell(tmp_path):
    out = tmp_path / "out; touch pwned"
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read() + '|' + '|'.join(sys.argv[2:]))"
    hostile = {"message": "$(touch pwned) \x1b[2J `id` \n; rm"}
    assert await run_command([sys.executable, "-c", script, str(out), "$HOME", "*"], hostile) == ""
    text = out.read_text()
    assert json.loads(text.split("|")[0]) == hostile and text.endswith("|$HOME|*")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["/no/such/program"], ("No such file", "settings.yaml")),
        ([sys.executable, "-c", "import sys; print('it broke', file=sys.stderr); sys.exit(3)"], ("exit code 3", "it broke")),
        ([sys.executable, "-c", "import time; time.sleep(60)"], ("not done after 0.5 s",)),
        ([sys.executable, "-c", "pass"], ("",)),
        (["a\0b"], ("alert_command",)),
    ],
)
async def test_alert_command_that_fails_is_said(command: list[str], words: tuple[str, ...]):
    said = await run_command(command, {"a": "x" * 100_000}, 0.5 if "sleep" in command[-1] else 20)
    assert all(word in said for word in words) and bool(said) == bool(words[0])


async def test_critical_alert_rings_once_is_kept_and_runs_the_command_on_any_screen(tmp_path, monkeypatch):
    out = tmp_path / "alert.json"
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read()); sys.exit(4)"
    settings = Settings(alert_command=(sys.executable, "-c", script, str(out)))
    rings: list[int] = []
    async with FakeEngine(tmp_path / "runs") as engine:
        engine.state("running")
        engine.steps(3)
        app = LuminaApp(tmp_path / "runs", look=Look(), settings=settings)
        monkeypatch.setattr(app, "bell", lambda: rings.append(1))
        async with app.run_test(size=(100, 30)) as pilot:
            app.open_monitor("demo")
            await until(pilot, lambda: getattr(app.screen, "feed", None) is not None and app.screen.store.step == 3)
            app.open_home()
            await until(pilot, lambda: app.screen.number == 1)
            engine.emit(rec.Alert(t=4e9, severity="warning", code="loss_spike", message="w", step=3))
            engine.emit(rec.Alert(t=4e9, severity="critical", code="nan_loss", message="loss is [/x] \x1b[2J", step=3))
            await until(pilot, lambda: "!1 on 5" in screen_text(app).split("\n")[0])
            await until(pilot, out.exists)
            await until(pilot, lambda: any("exit code 4" in notice.text for notice in app.notices))
            assert json.loads(out.read_text())["code"] == "nan_loss"
            app.open_screen(5)
            await until(pilot, lambda: app.screen.number == 5 and "!2" in screen_text(app).split("\n")[0])
            await app.screen.action_do("monitor.alerts")
            await pilot.press("escape")
            await until(pilot, lambda: getattr(app.screen, "number", 0) == 5 and "!" not in screen_text(app).split("\n")[0])
            app.open_home()
            await until(pilot, lambda: app.screen.number == 1 and "!" not in screen_text(app).split("\n")[0])
        assert rings == [1]
        assert sum("nan_loss" in notice.text for notice in app.notices) == 1


async def test_three_toasts_at_most_and_all_are_kept(tmp_path):
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(100, 40), notifications=True) as pilot:
        for i in range(9):
            app.notice(f"notice number {i}")
        await until(pilot, lambda: "notice number 8" in screen_text(app))
        await until(pilot, lambda: screen_text(app).count("notice number") == 3)
        app.action_notices()
        await until(pilot, lambda: isinstance(app.screen, Sheet) and screen_text(app).count("notice number") >= 9)


# --readonly

CHANGES = {
    "home.resume", "home.stop", "monitor.checkpoint", "monitor.pause", "monitor.stop", "monitor.set_lr",
    "config.write", "launch.start", "launch.write", "chat.export",
}  # fmt: skip


def test_every_action_that_changes_something_says_so():
    marked = {action.id for action in actions.ACTIONS if action.changes}
    assert marked >= CHANGES
    verbs = (
        "write",
        "export",
        "stop",
        "resume",
        "start",
        "prepare",
        "convert",
        "checkpoint",
        "pause",
        "set_lr",
        "save",
        "delete",
        "unload",
    )
    for action in actions.ACTIONS:
        name = action.id.rpartition(".")[2]
        if name in verbs and action.id not in (
            "config.start",
            "presets.start",
            "chat.write",
        ):  # these open the review, the field
            assert action.changes, f"{action.id} sounds as if it changed something: declare changes=True"


@pytest.mark.parametrize("action", [a for a in actions.ACTIONS if a.changes], ids=lambda a: a.id)
async def test_readonly_refuses_each_changing_action_with_a_reason(action: actions.Action):
    """One mechanism for all: the node's own method is never reached."""
    said: list[str] = []
    cls: Any = nodes()[action.scope]

    class Node(cls):  # type: ignore[misc]
        lumina = SimpleNamespace(readonly=True, notice=lambda text, severity: said.append(text))

        def __init__(self) -> None:
            pass

        def __getattribute__(self, name: str) -> Any:
            assert name != action.call, "the action was run"
            return super().__getattribute__(name)

    await Node().action_do(action.id)
    assert len(said) == 1 and said[0].startswith("--readonly: ")


async def test_readonly_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    app = LuminaApp(tmp_path / "runs", look=Look(), readonly=True)
    async with app.run_test(size=(100, 30)) as pilot:
        await until(pilot, lambda: "No runs" in screen_text(app))
        app.choose_theme("light")
        app.copy_text("x" * 100)
        assert "readonly" in app.notices[-1].text
        app.copy_text("x" * 10_000)
        assert "too long" in app.notices[-1].text
        with pytest.raises(PermissionError):
            app.save_export("a", "csv", "x")
        for number in range(1, 10):
            if app.has_screen(number):
                app.open_screen(number)
                await until(pilot, lambda number=number: getattr(app.screen, "number", 0) == number)
        await pilot.pause()
    assert not config_dir().exists()
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == set()
