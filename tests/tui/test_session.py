"""A session begins where the one before ended; the rate follows the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina_tui import session
from lumina_tui.application import LuminaApp, Start
from lumina_tui.memory import Memory
from lumina_tui.pace import BUSY_QUEUE, Pace, queued_writes
from lumina_tui.places import state_dir
from lumina_tui.screens.base import LuminaScreen
from lumina_tui.terminal import Look

from .fake_engine import FakeEngine
from .helpers import until


def make_run(root: Path, name: str = "demo") -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "run.json").write_text("{}")
    return root / name


def test_restores_a_place_only_while_its_subject_is_there(tmp_path):
    memory = Memory(tmp_path / "s.json")
    assert session.restored(memory, tmp_path) is None
    run = make_run(tmp_path)
    session.remember(memory, tmp_path, 5, {"run": str(run)})
    assert session.restored(memory, tmp_path) == session.Place(5, {"run": run})
    assert session.restored(memory, tmp_path / "other") is None
    session.remember(memory, tmp_path, 6, {"runs": [str(run)]})
    assert session.restored(memory, tmp_path) == session.Place(6, {"runs": [run]})
    session.remember(memory, tmp_path, 6, {"runs": [str(run), str(tmp_path / "gone")]})
    assert session.restored(memory, tmp_path) is None
    (run / "run.json").unlink()
    session.remember(memory, tmp_path, 5, {"run": str(run)})
    assert session.restored(memory, tmp_path) is None
    session.remember(memory, tmp_path, 3, {"path": str(tmp_path / "gone.yaml")})
    assert session.restored(memory, tmp_path) is None
    session.remember(memory, tmp_path, 3, {})
    assert session.restored(memory, tmp_path) == session.Place(3, {})


@pytest.mark.parametrize(
    "kept",
    [1, "x", [], {"root": 1}, {"root": "R", "screen": 5, "subject": {}}, {"root": "R", "screen": "5", "subject": []},
     {"root": "R", "screen": "-1", "subject": {}}, {"root": "R", "screen": "5", "subject": {"run": 3}},
     {"root": "R", "screen": "5", "subject": {"evil": "x"}}, {"root": "R", "screen": "6", "subject": {"runs": []}},
     {"root": "R", "screen": "5", "subject": {"run": "a\0b"}}],
)  # fmt: skip
def test_a_place_of_another_form_is_no_place(tmp_path, kept):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({session.KEY: kept}).replace('"R"', json.dumps(str(tmp_path))))
    assert session.restored(Memory(path), tmp_path) is None


async def test_restores_its_layout_last_screen_and_subject(tmp_path):
    async with FakeEngine(tmp_path, name="other") as other, FakeEngine(tmp_path) as engine:
        for one in (other, engine):
            one.state("running")
            one.steps(3)
        app = LuminaApp(tmp_path, look=Look())
        async with app.run_test(size=(100, 30)) as pilot:
            app.open_monitor("other")
            await until(pilot, lambda: app.memory.get(session.KEY, {}).get("screen") == "5")
        app = LuminaApp(tmp_path, look=Look(), start=Start(resume=True))
        async with app.run_test(size=(100, 30)) as pilot:
            await until(pilot, lambda: app.screen.number == 5 and app.screen.subject == "other")
            await app.action_back()  # the session began here: back is Home
            await until(pilot, lambda: app.screen.number == 1)
        app = LuminaApp(tmp_path, look=Look(), start=Start(run=tmp_path / "demo"))  # a subject wins
        async with app.run_test(size=(100, 30)) as pilot:
            await until(pilot, lambda: app.screen.number == 5 and app.screen.subject == "demo")


async def test_what_is_gone_or_of_a_missing_screen_opens_home(tmp_path):
    for place in ({"screen": "77", "subject": {}}, {"screen": "5", "subject": {"run": str(tmp_path / "x")}}):
        memory = Memory(state_dir() / "session.json")
        memory.set(session.KEY, {"root": str(tmp_path.absolute()), **place})
        memory.flush()
        app = LuminaApp(tmp_path, look=Look(), start=Start(resume=True))
        async with app.run_test(size=(80, 24)) as pilot:
            assert isinstance(app.screen, LuminaScreen) and app.screen.number == 1
            await pilot.pause()


def test_plain_lumina_resumes_and_a_subject_does_not(tmp_path):
    from lumina_tui.app import start_from

    run = make_run(tmp_path)
    assert start_from(None, None, tmp_path) == Start(resume=True)
    assert start_from("demo", None, tmp_path) == Start(run=run)
    assert start_from(None, "debug", tmp_path) == Start(preset="debug")


# rate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_is_halved_while_busy_and_doubled_back_when_calm():
    clock = Clock()
    pace = Pace(8.0, clock)
    for rate in (4.0, 2.0, 1.0, 1.0):
        pace.note(0.31 / pace.rate, None)
        assert pace.rate == rate
    for rate in (1.0, 2.0, 4.0, 8.0, 8.0):
        pace.note(0.0, 0)
        assert pace.rate == rate
        clock.now += 10.0
    pace.note(0.29 / pace.rate, BUSY_QUEUE)
    assert pace.rate == 8.0


def test_rate_follows_the_terminals_queue_and_skips_the_rule_where_it_is_not_known():
    pace = Pace(10.0, Clock())
    pace.note(0.0, None)
    assert pace.rate == 10.0
    pace.note(0.0, BUSY_QUEUE + 1)
    assert pace.rate == 5.0
    assert [Pace(4.0, Clock()).due() for _ in range(3)] == [True] * 3
    assert [pace.due() for _ in range(4)] == [False, True, False, True]


async def test_writer_queue_is_read_in_one_guarded_place(tmp_path):
    from textual.drivers._writer_thread import MAX_QUEUED_WRITES, WriterThread

    class Driver:
        _writer_thread = WriterThread(None)  # type: ignore[arg-type]

    class App:
        _driver = Driver()

    assert MAX_QUEUED_WRITES == 30
    assert queued_writes(App()) == 0  # type: ignore[arg-type]
    for _ in range(11):
        Driver._writer_thread.write("x")
    assert queued_writes(App()) == 11  # type: ignore[arg-type]
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(80, 24)):
        assert queued_writes(app) is None  # a driver without that thread
