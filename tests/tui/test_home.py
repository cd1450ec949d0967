"""Home on scripted runs: each state, filter, sort, commands, hostile names."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lumina_engine.chat.card import own_card, write_card
from lumina_engine.config.loading import to_yaml
from lumina_engine.config.presets import ConfigPresets
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.run.directory import RunDirectory, RunInfo
from lumina_engine.run.listing import Tail, matches
from lumina_engine.run.process import boot_id, myself, process
from lumina_tui import runs as runs_module
from lumina_tui.application import LuminaApp
from lumina_tui.runs import RunList
from lumina_tui.screens.home import LOCKS_S, REFRESH_S, HomeScreen
from lumina_tui.terminal import Look
from lumina_tui.widgets.bars import KeyBar
from lumina_tui.widgets.table import Row

from .fake_engine import FakeEngine
from .helpers import screen_text, until


@contextlib.asynccontextmanager
async def home(root: Path, size: tuple[int, int] = (80, 24), **kwargs) -> AsyncIterator[tuple]:
    app = LuminaApp(root, look=Look(), **kwargs)
    async with app.run_test(size=size) as pilot:
        screen = app.screen
        assert isinstance(screen, HomeScreen)
        await until(pilot, lambda: screen._seen is not None and not screen._busy)
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
            await until(pilot, lambda: app.screen.number == 5 and app.screen.feed is not None)
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
            for verb in ("stop", "resume", "export"):
                assert "readonly" in screen.refusal(f"home.{verb}")


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


def finished_runs(root: Path, count: int, steps: int = 30) -> None:
    """Runs that ended, the first one most recently."""
    for index in range(count):
        engine = FakeEngine(root, f"r{index:03d}")
        engine.emit(rec.Run(state="running"))
        engine.steps(steps)
        engine.emit(rec.Run(state="finished"))
        engine.run.update_identity(state="finished", pid=2**22 + 1, start_time=1)
        engine._log.close()
        moment = 1.7e9 - index
        os.utime(engine.run.metrics_path, (moment, moment))


@pytest.fixture
def reads(monkeypatch):
    """What the list reads: run.json files and logs, by name of the run."""
    seen: dict[str, list[str]] = {"head": [], "log": []}
    head, figures = RunDirectory.head, Tail.figures

    def read_head(self):
        seen["head"].append(self.name)
        return head(self)

    def read_log(self):
        seen["log"].append(self._path.parent.name)
        return figures(self)

    monkeypatch.setattr(RunDirectory, "head", read_head)
    monkeypatch.setattr(Tail, "figures", read_log)
    return seen


def test_mx05_only_what_can_have_changed_is_read(tmp_path, reads):
    now = [1.7e9 + 1000]
    finished_runs(tmp_path, 40, steps=2)
    runs = RunList(tmp_path, clock=lambda: now[0])
    assert len(runs.refresh()) == 40
    assert len(reads["head"]) == 40 and not reads["log"], "the names cost no log"
    runs.refresh(["r000", "r001"])
    assert len(reads["head"]) == 40 and sorted(reads["log"]) == ["r000", "r001"]
    now[0] += 10
    again = runs.refresh(["r000", "r001"])
    assert len(reads["head"]) == 40 and len(reads["log"]) == 2, "nothing has changed"
    assert all(row.age_s >= 10 for row in again)
    with MetricLog(tmp_path / "r001" / "metrics.jsonl", 1, sync_interval=0) as log:
        log.emit(rec.Step(step=3, loss=1.0))
    rows = {row.name: row for row in runs.refresh(["r000", "r001"])}
    assert reads["head"][40:] == ["r001"] and reads["log"][2:] == ["r001"]
    assert rows["r001"].step == 3 and rows["r000"].step == 2 and rows["r002"].step is None


def test_mx05_two_hundred_runs_of_which_twenty_live_cost_less_than_thirty_polls_a_second(tmp_path, reads, monkeypatch, figure):
    """Counted over 20 s as Home looks: a poll is a look at a run's two files, a reading of either, a test of its lock."""
    polls = []
    signature, alive = runs_module._signature, RunDirectory.alive
    monkeypatch.setattr(runs_module, "_signature", lambda path: polls.append(path.name) or signature(path))
    monkeypatch.setattr(RunDirectory, "alive", property(lambda self: polls.append(self.name) or alive.fget(self)))
    finished_runs(tmp_path, 180, steps=2)
    me = myself()
    living = []
    for index in range(20):
        run = RunDirectory.create(tmp_path, f"live{index:02d}")
        run.update_identity(state="running", pid=me.pid, start_time=me.start, boot_id=boot_id())
        living.append(run)
    now = [1.7e9 + 1000]
    runs = RunList(tmp_path, clock=lambda: now[0])
    names = [run.name for run in living]
    assert sum(row.alive for row in runs.refresh(names)) == 20
    polls.clear()
    reads["head"].clear(), reads["log"].clear()
    looks = round(REFRESH_S / LOCKS_S)
    for step in range(1, round(20 / REFRESH_S) + 1):
        for run in living:
            with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
                log.emit(rec.Step(step=step, loss=1.0))
        for _ in range(looks):
            now[0] += LOCKS_S
            assert not runs.look_at_living()
        assert {row.step for row in runs.refresh(names) if row.alive} == {step}
    found = (len(polls) + len(reads["head"]) + len(reads["log"])) / 20
    figure("polls a second", found)
    assert found <= 30


def test_mx05_a_run_that_ends_out_of_sight_comes_with_its_last_figures(tmp_path, reads):
    """A filter may hide a living run and show it once it is over."""
    run = RunDirectory.create(tmp_path, "demo")
    me = myself()
    run.update_identity(state="running", pid=me.pid, start_time=me.start, boot_id=boot_id())
    runs = RunList(tmp_path)
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        log.emit(rec.Step(step=1, loss=5.0))
        (row,) = runs.refresh(["demo"])
        assert row.alive and row.step == 1
        log.emit(rec.Step(step=2, loss=4.0))
        assert runs.refresh([])[0].step == 1
        log.emit(rec.Run(state="finished"))
    run.update_identity(state="finished", pid=2**22 + 1, start_time=1)
    (row,) = runs.refresh([])
    assert not row.alive and row.step == 2 and row.state == "finished"


def test_mx10_a_killed_supervisor_changes_no_file_and_is_seen(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    run.update_identity(state="running", pid=2**22 + 1, start_time=1)
    code = f"from lumina_engine.run.directory import *; RunDirectory({str(run.path)!r}).lock(); print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        runs = RunList(tmp_path)
        assert runs.refresh()[0].alive and not runs.look_at_living()
    finally:
        holder.kill()
        holder.communicate()
    assert runs.refresh()[0].alive, "no file has changed, and this looks at files only"
    assert runs.look_at_living()
    assert runs.refresh()[0].state == "crashed" and not runs.look_at_living()


@pytest.mark.row("MX05")
async def test_c127_two_hundred_runs_read_only_what_is_seen(tmp_path, reads):
    finished_runs(tmp_path, 180, steps=2)
    async with contextlib.AsyncExitStack() as stack:
        for index in range(20):
            engine = await stack.enter_async_context(FakeEngine(tmp_path, f"live{index:02d}"))
            engine.state("running")
            engine.steps(2)
        async with home(tmp_path) as (app, pilot, screen):
            await until(pilot, lambda: len(screen.rows) == 200 and all(r.alerts is not None for r in screen.shown_rows))
            seen = {row.name for row in screen.shown_rows}
            assert len(seen) < 20 and set(reads["log"]) <= seen
            assert len(reads["head"]) <= 200 + 20, "each run.json once, those of living runs perhaps again"
            await pilot.press("G")
            await until(pilot, lambda: "r179" in screen_text(app) and all(r.alerts is not None for r in screen.shown_rows))
            assert len(set(reads["log"])) <= 3 * len(seen)


async def test_c127_marks_lead_to_compare(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        LuminaApp, "open_compare", lambda self, runs: opened.append([path.name for path in runs]), raising=False
    )
    finished_runs(tmp_path, 10, steps=2)
    async with home(tmp_path) as (app, pilot, screen):
        await until(pilot, lambda: len(screen.rows) == 10)
        assert "Space" in screen.why_not("home.compare")
        screen.table.move_to("r003")
        screen.action_mark()
        await until(pilot, lambda: "*r003" in screen_text(app))
        screen.table.move_to("r001")
        assert screen.why_not("home.compare") is None, "one mark and the chosen run are two"
        screen.action_mark()
        await pilot.press("equals_sign")
        await until(pilot, lambda: opened == [["r003", "r001"]])
        screen.action_mark()
        assert screen.marked == ["r003"]
        for index in range(10):
            screen.table.move_to(f"r{index:03d}")
            if f"r{index:03d}" not in screen.marked:
                screen.action_mark()
        assert len(screen.marked) == 8 and any("8 runs" in notice.text for notice in app.notices)


@pytest.mark.parametrize("kind", ["csv", "json"])
async def test_export_writes_what_the_command_prints(tmp_path, kind, monkeypatch, capsys):
    from lumina_engine.cli import main

    monkeypatch.chdir(tmp_path)
    finished_runs(tmp_path / "runs", 12)
    async with home(tmp_path / "runs") as (app, pilot, screen):
        await until(pilot, lambda: len(screen.rows) == 12)
        screen.filter = "r00"
        screen.action_export()
        await until(pilot, lambda: "Export the list" in screen_text(app))
        await pilot.press(kind[0])
        await until(
            pilot, lambda: list((tmp_path / "exports").glob(f"runs-*.{kind}")) if (tmp_path / "exports").exists() else 0
        )
        shown = {row.name: row for row in screen.rows}
    (path,) = (tmp_path / "exports").glob(f"runs-*.{kind}")
    assert main(["runs", "list", "--runs", str(tmp_path / "runs"), "--json", "--filter", "r00"]) == 0
    expected = json.loads(capsys.readouterr().out)
    found = json.loads(path.read_text()) if kind == "json" else list(csv.DictReader(path.open()))
    assert [row["name"] for row in found] == [row["name"] for row in expected] and len(found) == 10
    assert [str(row["smoothed_loss"]) for row in found] == [str(row["smoothed_loss"]) for row in expected]
    assert shown["r000"].smoothed_loss == expected[0]["smoothed_loss"] and shown["r000"].step == expected[0]["step"]


async def test_filter_and_order_are_remembered(tmp_path):
    finished_runs(tmp_path, 3)
    async with home(tmp_path) as (_, pilot, screen):
        await until(pilot, lambda: len(screen.rows) == 3)
        await pilot.press("o", "slash")
        await pilot.press(*"r001")
        await pilot.press("enter")
        await until(pilot, lambda: screen.filter == "r001")
    async with home(tmp_path) as (app, pilot, screen):
        await until(pilot, lambda: "1 of 3" in screen_text(app))
        assert (screen.filter, screen.order) == ("r001", "name")


async def test_order_by_loss_reads_every_log(tmp_path, reads):
    finished_runs(tmp_path, 40, steps=1)
    with MetricLog(tmp_path / "r039" / "metrics.jsonl", 1, sync_interval=0) as log:
        log.emit(rec.Step(step=2, loss=0.001))
        for step in range(3, 30):
            log.emit(rec.Step(step=step, loss=0.001))
    async with home(tmp_path) as (_, pilot, screen):
        await until(pilot, lambda: len(screen.rows) == 40)
        while screen.order != "loss":
            screen.action_sort()
        await until(pilot, lambda: set(reads["log"]) == {row.name for row in screen.rows})
        await until(pilot, lambda: screen.table.rows[0].key == "r039")


@contextlib.contextmanager
def loaded_server(folder: Path, **known):
    """A process that counts as a chat server."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    try:
        found = process(child.pid)
        assert found is not None
        socket = folder / f"{child.pid}.chat.sock"
        socket.touch()
        card = {"state": "ready", "checkpoint": "/x/demo/checkpoints/step-000100", "name": "demo step-000100", "device": "cpu"}
        write_card(socket, own_card(pid=child.pid, start=found.start, **{**card, **known}))
        yield child
    finally:
        child.kill()
        child.wait()


async def test_c127_chat_servers_are_listed_and_unloaded(tmp_path, monkeypatch):
    folder = tmp_path / "sockets"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("LUMINA_SOCKETS", str(folder))
    finished_runs(tmp_path / "runs", 2)
    with loaded_server(folder, active=time.time() - 300, idle_timeout_s=1800.0) as child:
        async with home(tmp_path / "runs") as (app, pilot, screen):
            await until(pilot, lambda: "demo step-000100" in screen_text(app))
            row = next(text for text in screen_text(app).split("\n") if "demo step-000100" in text)
            assert " cpu " in row and "5 m" in row and "MB" in row, row
            await pilot.press("tab")
            await until(pilot, lambda: "X unload" in screen_text(app))
            await pilot.press("X")
            await until(pilot, lambda: "Unload demo step-000100?" in screen_text(app))
            await pilot.press("x")
            await until(pilot, lambda: child.poll() is not None)
            screen.action_reload()
            await until(pilot, lambda: "chat servers" not in screen_text(app))
            assert screen.table.has_focus


async def test_a_readonly_home_unloads_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "sockets"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("LUMINA_SOCKETS", str(folder))
    with loaded_server(folder) as child:
        async with home(tmp_path / "runs", readonly=True) as (app, pilot, screen):
            await until(pilot, lambda: "demo step-000100" in screen_text(app))
            screen.server_table.focus()
            await pilot.press("X")
            await until(pilot, lambda: any("readonly" in notice.text for notice in app.notices))
            assert child.poll() is None


async def test_200x60_shows_all_columns_and_the_difference_to_the_preset(tmp_path):
    async with FakeEngine(tmp_path, total_steps=2000) as engine:
        engine.state("running")
        engine.steps(200)
        alert = rec.Alert(severity="critical", code="loss_spike", message="6.3 sigma", recommendation="Lower the rate.")
        engine.emit(alert)
        config = ConfigPresets.get("debug")
        config.learning_rate = 0.25
        config.data_cache_dir = f"/somewhere/{config.data_cache_dir.removeprefix('./')}"  # as every start does
        engine.run.config_path.write_text(to_yaml(config))
        async with home(tmp_path, (200, 60)) as (app, pilot, screen):
            await until(pilot, lambda: "against preset debug" in screen_text(app))
            text = screen_text(app)
            head = next(line for line in text.split("\n") if "tokens/s" in line)
            assert all(column.title in head for column in screen.table.columns)
            assert "learning_rate" in text and "0.25" in text and "data_cache_dir" not in text
            assert "! loss_spike" in text and "Lower the rate." in text and "!!1" in text


async def test_se01_names_that_are_long_or_no_text(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = [b"x" * 255, b"bad-\xff\xfe-name", b"tab\tname", b"[red]a[bold"]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118  bytes that no Path of text has
        os.mkdir(path)  # noqa: PTH102
        with open(os.path.join(path, b"run.json"), "w") as file:  # noqa: PTH118, PTH123
            json.dump({"format": 1, "id": "x", "name": "n", "state": "failed", "pid": None, "reason": "r"}, file)
    for size in ((80, 24), (200, 60)):
        async with home(tmp_path, size) as (app, pilot, screen):
            await until(pilot, lambda: len(screen.rows) == 4 and all(row.alerts is not None for row in screen.rows))
            text = screen_text(app)
            assert all(c.isprintable() or c == "\n" for c in text)
            assert "[red]a[bold" in text and "xxxx" in text
            for row in screen.rows:
                screen.table.move_to(row.name)
                await pilot.pause()
            await screen._export("csv")
            await screen._export("json")
            assert not any("not written" in notice.text for notice in app.notices)


async def test_an_unreadable_root_names_the_cause_and_the_key(tmp_path, monkeypatch):
    def refuse(root):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lumina_tui.runs.run_names", refuse)
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "Permission" in screen_text(app) and "r reads it again" in screen_text(app))


async def test_home_opens_no_socket(tmp_path, monkeypatch):
    import socket

    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(3)
        refused = []
        monkeypatch.setattr(socket.socket, "connect", lambda self, address: refused.append(address))
        async with home(tmp_path) as (app, pilot, screen):
            await until(pilot, lambda: "running" in screen_text(app) and screen.shown_rows[0].step == 3)
        assert refused == [] and engine.hellos == 0


async def test_a_refresh_without_news_repaints_nothing(tmp_path, monkeypatch):
    finished_runs(tmp_path, 5)
    async with home(tmp_path, (160, 45)) as (_, pilot, screen):
        await until(pilot, lambda: len(screen.rows) == 5 and all(row.alerts is not None for row in screen.rows))
        await until(pilot, lambda: screen._seen is not None and screen._seen.hardware is not None and not screen._busy)
        hardware = screen._seen.hardware
        monkeypatch.setattr(screen.reader, "_hardware", lambda live: hardware)
        screen.show_rows()
        await pilot.pause()
        painted = []
        for widget in screen.query("*"):
            monkeypatch.setattr(widget, "refresh", lambda *regions, who=widget, **kwargs: painted.append((who, regions)))
        await screen._refresh()
        assert [who for who, _ in painted if not isinstance(who, KeyBar)] == []


async def test_only_changed_cells_are_repainted(tmp_path, monkeypatch):
    finished_runs(tmp_path, 3)
    async with home(tmp_path, (120, 30)) as (_, pilot, screen):
        await until(pilot, lambda: len(screen.rows) == 3 and all(row.alerts is not None for row in screen.rows))
        table = screen.table
        regions = []
        monkeypatch.setattr(table, "refresh", lambda *found, **kwargs: regions.extend(found))
        row = table.rows[1]
        index = [column.key for column in table.columns].index("loss")
        cells = (*row.cells[:index], ("9.999", "text"), *row.cells[index + 1 :])
        table.set_rows([table.rows[0], Row(row.key, cells), table.rows[2]])
        (region,) = regions
        assert (region.y, region.height, region.width) == (1 + 1 + 1, 1, table.columns[index].width)
        shown = table.render_line(region.y).text[region.x : region.right]
        assert shown.strip() == "9.999"
