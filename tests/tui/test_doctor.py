"""The Doctor screen: rows as they come, every state, skipping, sizes, hostile rows; and the rows about the terminal itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.doctor.row import GROUPS, Row
from lumina_engine.doctor.system import Output
from lumina_tui import jobs
from lumina_tui.application import LuminaApp
from lumina_tui.checkup import OLD_S, Checkup
from lumina_tui.screens.doctor import DoctorScreen
from lumina_tui.terminal import NAMED, Look
from lumina_tui.terminal_check import Terminal, key_row, sent_row, terminal_rows
from lumina_tui.wire import Wire

from .helpers import screen_text, until

PLAN = [
    {"id": "python", "group": "python", "slow": False, "about": "Python's version."},
    {"id": "torch", "group": "python", "slow": True, "about": "Imports torch."},
    {"id": "runs", "group": "disk", "slow": False, "about": "The folder of the runs."},
    {"id": "deepspeed", "group": "deepspeed", "slow": True, "about": "Imports DeepSpeed."},
]
ROWS = [
    Row("python", "python", "ok", "3.11.7"),
    Row("runs", "disk", "fail", "0.1 GB free", "free space there, or set LUMINA_RUNS"),
    Row("torch", "python", "warn", "imports in 80 s", "a local disk is faster"),
    Row("deepspeed", "deepspeed", "ok", "0.19.8"),
]


class FakeJob:
    """An engine that says what a test wants: a line is told when its gate opens."""

    made: list[FakeJob] = []
    failure = ""

    def __init__(self, arguments: Sequence[str], *, changed: Any = None, told: Any = None, **_: Any) -> None:
        self.arguments, self.changed, self.told = list(arguments), changed, told
        self.state, self.error, self.words = jobs.JobState.WAITING, "", []
        self.gate, self.cancelled = asyncio.Event(), False
        FakeJob.made.append(self)

    def tell(self, **line: Any) -> None:
        self.told(line)
        self.changed(self)

    def rows(self, *ids: str) -> None:
        for row in ROWS:
            if row.id in ids:
                self.tell(progress="row", row=row.to_dict())

    async def run(self) -> None:
        self.state = jobs.JobState.RUNNING
        self.tell(progress="checks", checks=PLAN)
        await self.gate.wait()
        if self.failure and not self.cancelled:
            self.error, self.state = self.failure, jobs.JobState.FAILED
            self.words = ["Traceback (most recent call last):", "ImportError: \x1b[2Jno numpy [/x]"]
        else:
            self.state = jobs.JobState.CANCELLED if self.cancelled else jobs.JobState.DONE

    async def cancel(self) -> None:
        self.cancelled = True
        self.gate.set()


@pytest.fixture(autouse=True)
def fake_jobs(monkeypatch):
    FakeJob.made = []
    monkeypatch.setattr(FakeJob, "failure", "")
    monkeypatch.setattr("lumina_tui.screens.doctor.Job", FakeJob)


@contextlib.asynccontextmanager
async def doctor(root: Path, size: tuple[int, int] = (80, 24), **kwargs: Any) -> AsyncIterator[tuple]:
    app = LuminaApp(root, look=kwargs.pop("look", Look()), **kwargs)
    async with app.run_test(size=size) as pilot:
        screen = app.open_screen(9)
        assert isinstance(screen, DoctorScreen)
        await until(pilot, lambda: FakeJob.made and screen.checkup.planned)
        yield app, pilot, screen, FakeJob.made[0]


async def test_c137_rows_come_one_by_one(tmp_path):
    async with doctor(tmp_path) as (app, pilot, screen, job):
        await until(pilot, lambda: "running torch, deepspeed" in screen_text(app))
        assert "Terminal" in screen_text(app) and "glyphs" in screen_text(app)
        job.rows("python")
        await until(pilot, lambda: screen.checkup.found.get("python"))
        assert [planned.id for planned in screen.checkup.pending] == ["torch", "runs", "deepspeed"]
        job.rows("runs")
        await until(pilot, lambda: "1 failed" in screen_text(app).split("\n")[0])
        lines = screen_text(app).split("\n")
        assert "fail" in lines[2] and "0.1 GB free" in lines[2], "what failed comes first"
        assert "-> free space there" in lines[3], "its fix on the second line"
        job.rows("torch", "deepspeed")
        job.gate.set()
        await until(pilot, lambda: "checked " in screen_text(app) and not screen.checkup.running)
        assert screen.why_not("doctor.skip") == "no check is running"


async def test_c137_the_engine_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeJob, "failure", "the engine did not start: no numpy")
    async with doctor(tmp_path) as (app, pilot, screen, job):
        job.gate.set()
        await until(pilot, lambda: "only this terminal was checked" in screen_text(app))
        lines = screen_text(app).split("\n")
        assert "fail" in lines[2] and "no numpy" in lines[2]
        screen.tables[0].move_to("engine")
        await pilot.press("enter")
        await until(pilot, lambda: "What the engine said" in screen_text(app))
        text = screen_text(app)
        assert "Traceback (most recent call last):" in text and "[/x]" in text and "\x1b" not in text


async def test_c137_skip_ends_the_process_and_the_rest_goes_on(tmp_path):
    async with doctor(tmp_path) as (_, pilot, screen, job):
        job.rows("python", "runs")
        await until(pilot, lambda: len(screen.checkup.pending) == 2)
        screen.tables[0].move_to("torch")
        await pilot.press("X")
        await until(pilot, lambda: len(FakeJob.made) == 2)
        assert job.cancelled
        second = FakeJob.made[1]
        assert second.arguments[-1] == "--skip=python,runs,torch"
        second.tell(progress="row", row=Row("torch", "python", "skipped", "skipped on request").to_dict())
        second.rows("python", "deepspeed")
        second.gate.set()
        await until(pilot, lambda: not screen.checkup.running)
        assert screen.checkup.found["torch"].row.value == "skipped by you; r runs it again"
        assert screen.checkup.found["runs"].row.status == "fail" and "deepspeed" in screen.checkup.found


async def test_skip_takes_the_slow_one_when_none_is_chosen(tmp_path):
    async with doctor(tmp_path) as (_, pilot, screen, job):
        job.rows("python", "torch")
        screen.tables[0].move_to("term")
        screen.action_skip()
        await until(pilot, lambda: len(FakeJob.made) == 2)
        assert screen.checkup.found["deepspeed"].row.status == "skipped"


async def test_filter_detail_copy_and_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with doctor(tmp_path) as (app, pilot, screen, job):
        job.rows("python", "runs", "torch", "deepspeed")
        job.gate.set()
        await until(pilot, lambda: not screen.checkup.running)
        await pilot.press("slash", *"fail", "enter")
        await until(pilot, lambda: "1 shown of" in screen_text(app))
        assert "0.1 GB free" in screen_text(app) and "glyphs" not in screen_text(app)
        await pilot.press("enter")
        await until(pilot, lambda: "What to do:" in screen_text(app) and "The folder of the runs." in screen_text(app))
        await pilot.press("escape", "y")
        await until(pilot, lambda: any("copied" in notice.text for notice in app.notices))
        await pilot.press("e")
        await until(pilot, lambda: list(tmp_path.glob("exports/doctor-*.json")))
        (path,) = tmp_path.glob("exports/doctor-*.json")
        assert json.loads(path.read_text()) == [ROWS[1].to_dict()]
        screen.checkup.words = "zzz"
        screen.show_rows()
        await until(pilot, lambda: "No row matches zzz" in screen_text(app))


async def test_r_checks_again_but_not_while_it_runs(tmp_path):
    async with doctor(tmp_path) as (_, pilot, screen, job):
        assert "is running" in screen.why_not("doctor.reload")
        job.gate.set()
        await until(pilot, lambda: not screen.checkup.running)
        await pilot.press("r")
        await until(pilot, lambda: len(FakeJob.made) == 2)


async def test_readonly_saves_nothing(tmp_path):
    async with doctor(tmp_path, readonly=True) as (_, _, screen, _):
        assert "readonly" in screen.refusal("doctor.export")


async def test_leaving_ends_the_engine(tmp_path, monkeypatch):
    """The real process, which waits for a slow import, is gone soon after lumina is."""
    monkeypatch.setattr("lumina_tui.screens.doctor.Job", jobs.Job)
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(80, 24)) as pilot:
        screen = app.open_screen(9)
        await until(pilot, lambda: screen.checkup.planned, 60)
        process = screen._job._process
        assert process.returncode is None
    assert await asyncio.wait_for(process.wait(), 20) != 0


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60), (40, 8), (20, 6), (3, 2), (1, 1)])
@pytest.mark.parametrize("look", [Look(), Look(glyphs="ascii", palette=NAMED, ansi=True)], ids=["braille", "ascii"])
async def test_c138_sizes_and_hostile_rows(tmp_path, size, look):
    evil = Row("runs\x1b[2J", "disk", "fail", "[@click=app.leave]x[/] \x1b]0;t\x07‮ " + "漢" * 90, "[bold \x9b31m \n fix")
    async with doctor(tmp_path, look=look) as (app, pilot, _, job):
        job.rows("python", "torch")
        job.tell(progress="row", row=evil.to_dict())
        job.tell(progress="row", row={"id": 3})
        job.tell(progress="row", row={"id": "x", "group": "no group", "status": "ok", "value": "v", "fix": ""})
        await pilot.resize_terminal(*size)
        await pilot.pause()
        text = screen_text(app)
        assert len(text.split("\n")) == size[1]
        assert all(c.isprintable() or c == "\n" for c in text)
        if size[0] >= 80:
            assert "[@click=app.leave]x" in text


async def test_200x60_all_groups_in_three_columns(tmp_path):
    async with doctor(tmp_path, (200, 60)) as (app, pilot, screen, job):
        for number, group in enumerate(GROUPS):
            for part in range(4):
                row = Row(f"c{number}.{part}", group, "ok" if part else "fail", "v", "do it")
                job.tell(progress="row", row=row.to_dict())
        job.gate.set()
        await until(pilot, lambda: not screen.checkup.running)
        text = screen_text(app)
        assert all(title in text for title in GROUPS.values())
        counts = [len(table.rows) for table in screen.tables]
        assert min(counts) > 0.4 * max(counts), counts


async def test_an_old_result_is_dim_and_waiting_costs_nothing(tmp_path, monkeypatch):
    async with doctor(tmp_path) as (_, pilot, screen, job):
        job.rows("python", "runs", "torch", "deepspeed")
        job.gate.set()
        await until(pilot, lambda: not screen.checkup.running)
        painted = []
        monkeypatch.setattr(DoctorScreen, "show_rows", lambda self: painted.append(1))
        for _ in range(50):
            screen.tick()
        assert not painted
        monkeypatch.setattr("lumina_tui.screens.doctor.time.time", lambda: 1e12)
        screen.tick()
        assert painted


def test_rows_older_than_an_hour_are_dim():
    now = [1000.0]
    checkup = Checkup(clock=lambda: now[0])
    checkup.begin([Row("a", "disk", "fail", "v", "f")])
    checkup.end()
    assert checkup.columns(1, 80)[0][0].cells[0] == ("fail", "bad") and checkup.old_at == 1000.0 + OLD_S
    now[0] += OLD_S
    assert {role for _, role in checkup.columns(1, 80)[0][0].cells} == {"dim"} and checkup.old_at is None


async def test_a_key_without_a_meaning_is_named(tmp_path):
    async with doctor(tmp_path) as (app, pilot, screen, _):
        await pilot.press("f7")
        await until(pilot, lambda: "arrived as f7" in screen_text(app))
        await pilot.press("j")
        assert screen.checkup.found["keys"].row.value.endswith("f7"), "j has a meaning"


# the terminal itself


def terminal(
    look: Look | None = None, size=(80, 24), encoding="UTF-8", sent=None, seconds=0.0, answer=None, **environ
) -> Terminal:
    def call(argv, limit):
        if answer is None:
            raise OSError(2, "No such file or directory")
        return answer

    return Terminal({"TERM": "xterm-256color", **environ}, look or Look(), size, encoding, sent, seconds, call)


def rows_of(found: Terminal) -> dict[str, Row]:
    return {row.id: row for row in terminal_rows(found)}


def test_a_good_terminal():
    rows = rows_of(terminal())
    assert {row.status for row in rows.values()} <= {"ok", "skipped"}
    assert "⣿" in rows["glyphs"].value and rows["colours"].value == "256" and "80x24" in rows["size"].value
    assert rows_of(terminal(COLORTERM="truecolor"))["colours"].value.startswith("RGB")


@pytest.mark.parametrize(
    ("found", "id", "word"),
    [
        (terminal(Look(palette=NAMED, ansi=True)), "colours", "16"),
        (terminal(size=(50, 10)), "size", "50x10"),
        (terminal(encoding="ANSI_X3.4-1968"), "locale", "ASCII"),
        (terminal(TMUX="/tmp/x"), "tmux", "cannot be asked"),
        (terminal(TMUX="/tmp/x", answer=Output(0, "external\n", "")), "tmux", "external"),
        (terminal(TMUX="/tmp/x", answer=Output(None, "", "no end after 2 s")), "tmux", "no end"),
        (terminal(sent=1 << 20, seconds=10.0, SSH_CONNECTION="a b c d"), "sent", "102.4 KiB/s"),
    ],
)
def test_what_is_wrong_with_a_terminal(found, id, word):
    row = rows_of(found)[id]
    assert row.status == "warn" and word in row.value and row.fix


def test_what_is_right_with_a_terminal():
    assert rows_of(terminal(TMUX="/tmp/x", answer=Output(0, "on\n", "")))["tmux"].status == "ok"
    assert rows_of(terminal(NO_COLOR="1"))["colours"].value == "none: NO_COLOR is set"
    assert rows_of(terminal(Look(glyphs="ascii")))["glyphs"].value.isascii()
    assert "ssh -C" in rows_of(terminal(SSH_CONNECTION="10.0.0.1 1 2 3"))["ssh"].fix
    assert sent_row(terminal(sent=1 << 20, seconds=10.0)).status == "ok", "a local terminal may be sent anything"
    assert sent_row(terminal()).status == "skipped" and "ctrl+j" in key_row("ctrl+j").value


def test_the_wire_counts_bytes():
    class Base:
        out: list[str] = []

        def write(self, data: str) -> None:
            self.out.append(data)

    wire = Wire()
    assert wire.sent is None
    driver = wire.counting(Base)()  # type: ignore[arg-type]
    driver.write("aé⣿")
    driver.write("")
    assert wire.sent == 6 and Base.out == ["aé⣿", ""] and wire.seconds >= 0


async def test_c137_a_real_engine_fills_the_screen(tmp_path, monkeypatch):
    """The engine's own words, without the slow imports."""
    monkeypatch.setattr("lumina_tui.screens.doctor.Job", jobs.Job)
    monkeypatch.setattr(Checkup, "arguments", lambda self, runs: ["doctor", f"--runs={runs}", "--quick"])
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(80, 24)) as pilot:
        screen = app.open_screen(9)
        await until(pilot, lambda: "torch" in screen.checkup.found and not screen.checkup.running, 60)
        assert screen.checkup.found["torch"].row.status == "skipped" and "engine" not in screen.checkup.found
        assert {planned.group for planned in screen.checkup.planned.values()} <= set(GROUPS)
        assert all(
            id.partition(".")[0] in screen.checkup.planned or row.row.group in ("terminal", "ssh")
            for id, row in screen.checkup.found.items()
        )


async def test_c137_an_engine_that_dies_is_the_first_row_with_its_own_words(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Traceback (most recent call last):' >&2\necho 'ImportError: no numpy' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("lumina_tui.screens.doctor.Job", jobs.Job)
    monkeypatch.setattr(jobs.sys, "executable", str(python))
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(80, 24)) as pilot:
        screen = app.open_screen(9)
        await until(pilot, lambda: "engine" in screen.checkup.found and "ImportError" in screen_text(app))
        lines = screen_text(app).split("\n")
        assert "fail" in lines[2] and "ImportError: no numpy" in lines[2] and "1 failed" in lines[0]
        assert "Traceback (most recent call last):" in screen.checkup.engine_words
        assert "glyphs" in screen.checkup.found, "the terminal was checked all the same"
