"""C130: the review before a start, the start in four steps, and what a start that fails leaves behind."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config.machine import GB, Machine
from lumina_engine.config.presets import ConfigPresets
from lumina_engine.config.schema import Config
from lumina_engine.monitoring.record import Run, Step, encode
from lumina_engine.run.directory import RunDirectory
from lumina_tui.form import Form
from lumina_tui.launching import Launched, LaunchError
from lumina_tui.review import Row, review
from lumina_tui.screens.dialogs import Question
from lumina_tui.screens.launch import LaunchScreen
from lumina_tui.starting import Failure, Progress, Start, end_run, failure_lines

from .config_app import LAPTOP, App, Holder, place, ready  # noqa: F401
from .helpers import screen_text, until

LINE = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n"


def record(path: Path, *records: Any) -> None:
    with (path / "metrics.jsonl").open("ab") as file:
        for number, item in enumerate(records):
            item.seq, item.t, item.inc = number + 1, time.time(), 1
            file.write(encode(item))


async def reviewed(pilot: Any, **arguments: Any) -> LaunchScreen:
    pilot.app.open_launch(**arguments)
    screen = await ready(pilot, LaunchScreen)
    await until(pilot, lambda: screen.review is not None and not screen.reviewing, what="a review")
    return screen


# the review


def rows_of(form: Form, machine: Machine = LAPTOP, root: str = "runs") -> dict[str, Row]:
    return {row.label: row for row in review(form, machine, Path(root)).rows}


def test_c130_a_review_has_every_row_of_the_list() -> None:
    Path("d.jsonl").write_text(LINE * 40)
    form = Form.from_config(Config(train_data_path="d.jsonl", tokenizer="lumina-1k", hidden_size=128, num_layers=2))
    rows = rows_of(form)
    wanted = (
        "configuration, run name, runs folder, devices, ranks, data, evaluation, fingerprint, tokens, memory, host memory, "
    )
    assert [*rows] == [*wanted.rstrip(", ").split(", "), "disk", "data cache", "checkpoints", "sockets"]
    assert {row.status for row in rows.values()} == {"ok"}
    assert "d.jsonl: 1 file" in rows["data"].text and "sha256" in rows["fingerprint"].text and "guessed" in rows["tokens"].text
    assert "2.00% held out" in rows["evaluation"].text and "every 500 steps" in rows["checkpoints"].text


def test_c130_rows_come_as_they_are_found_and_a_later_one_takes_the_place() -> None:
    seen: list[tuple[str, str]] = []
    review(Form.from_preset("debug"), LAPTOP, Path("runs"), lambda row: seen.append((row.label, row.status)))
    assert seen[0] == ("configuration", "ok") and seen.index(("fingerprint", "wait")) + 1 == seen.index(("fingerprint", "ok"))


def test_c130_tokens_are_measured_where_a_start_has_counted_them() -> None:
    from lumina_engine.data.store import open_data
    from lumina_engine.data.tokenizer import ConversationTokenizer

    Path("d.jsonl").write_text(LINE * 40)
    config = Config(train_data_path="d.jsonl", tokenizer="lumina-1k", eval_split=0.0, num_epochs=3)
    store = open_data(config, ConversationTokenizer("lumina-1k")).train
    found = review(Form.from_config(config), LAPTOP, Path("runs"))
    row = next(row for row in found.rows if row.label == "tokens")
    assert f"{store.num_tokens:,} in 40 conversations (measured" in row.text
    assert found.figures is not None and "measured" in found.figures["basis"]["steps"] and found.figures["steps"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "empty"), ("{}\n", "no known layout"), (LINE + "broken\n", "d.jsonl:2"), ("[" + LINE, "not closed")],
)
def test_c130_data_that_training_could_not_read_blocks(text: str, words: str) -> None:
    Path("d.jsonl").write_text(text)
    found = review(Form.from_config(Config(train_data_path="d.jsonl")), LAPTOP, Path("runs"))
    row = next(row for row in found.rows if row.label == "data")
    assert found.blocked and row.status == "fail" and words in row.text


def test_c130_places_that_cannot_be_used_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("runs/taken").mkdir(parents=True)
    rows = rows_of(Form.from_config(Config(experiment_name="taken", backup_path="/proc/none")))
    assert rows["run name"].status == "fail" and "exists in runs" in rows["run name"].text
    (tmp_path / "sockets").chmod(0o777)
    assert "chmod 700" in rows_of(Form.from_preset("debug"))["sockets"].text
    small = Machine([], 16 * GB, 4, GB // 100)
    assert rows_of(Form.from_preset("debug"), small)["disk"].status == "fail"
    monkeypatch.setattr("lumina_tui.review.free_space", lambda path: (Path(), 5))
    assert rows_of(Form.from_preset("debug"))["data cache"].status == "warn"


def test_c130_two_ranks_say_where_they_meet() -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        rows = rows_of(Form.from_config(Config(num_gpus=2, master_port=port, hidden_size=128, num_layers=2)))
    assert f"({port} is taken)" in rows["port"].text and "2 ranks" in rows["ranks"].text


def test_c130_the_name_is_made_once_and_is_in_the_command() -> None:
    found = review(Form.from_preset("debug"), LAPTOP, Path("runs"))
    assert found.arguments == ("--preset", "debug", "--run", found.name) and found.name.startswith("debug-")
    named = review(Form.from_config(Config(experiment_name="mine")), LAPTOP, Path("runs"))
    assert named.name == "mine" and "--run" not in named.arguments and "experiment_name=mine" in named.arguments


# the screen


async def test_c130_review_then_four_stages_then_monitor() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await reviewed(pilot, preset="debug")
        text = screen_text(pilot.app)
        assert "ready" in text.splitlines()[0] and "built-in corpus" in text and "3.25 M (494 K active)" in text
        assert json.loads(screen.review.in_force.deepspeed)["train_batch_size"] == 8
        await pilot.press("enter")
        await until(pilot, lambda: screen.start is not None and "supervisor" in screen.start.progress.reached)
        assert pilot.app.starts == [["--preset", "debug", "--run", screen.review.name]]
        path = screen.start.path
        assert "ok  supervisor" in screen_text(pilot.app)
        await pilot.press("w", "r")
        assert sum("it is starting" in n.text for n in pilot.app.notices) == 2
        record(path, Run(state="preparing"), Run(state="running"))
        await until(pilot, lambda: "ok  ranks" in screen_text(pilot.app))
        assert pilot.app.watched == []
        record(path, Step(step=1, loss=5.0))
        await until(pilot, lambda: pilot.app.watched == [path])
        assert screen.start is None


async def test_c130_a_run_that_fails_shows_step_cause_log_and_what_to_do() -> None:
    async with App().run_test(size=(100, 40)) as pilot:
        screen = await reviewed(pilot, preset="debug")
        await pilot.press("enter")
        await until(pilot, lambda: screen.start is not None and "supervisor" in screen.start.progress.reached)
        path = screen.start.path
        (path / "engine.log").write_text("".join(f"line {n}\n" for n in range(40)) + "the disk [/x] \x1b[2J went away\n")
        pilot.app.lock.release()
        record(path, Run(state="failed", reason="no room", exit_code=2))
        await until(pilot, lambda: "failed" in screen_text(pilot.app).splitlines()[0])
        text = screen_text(pilot.app)
        assert "!   ranks" in text and "no room" in text and "went away" in text and "\x1b" not in text
        assert "last 20 lines" in text and "line 22" in text and "line 20 " not in text
        assert "nothing is left running" in text and "E opens the fields" in text and pilot.app.watched == []
        await pilot.press("enter")
        assert len(pilot.app.starts) == 1 and any("this start failed" in n.text for n in pilot.app.notices)
        await pilot.press("r")
        await until(pilot, lambda: "configuration" in screen_text(pilot.app))


async def test_c130_a_supervisor_that_is_killed_is_noticed() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await reviewed(pilot, preset="debug")
        await pilot.press("enter")
        await until(pilot, lambda: screen.start is not None and "supervisor" in screen.start.progress.reached)
        pilot.app.lock.release()
        await until(pilot, lambda: screen.start is not None and screen.start.failure is not None)
        assert "supervisor is gone" in screen.start.failure.cause and screen.start.failure.step == "ranks"


async def test_c130_a_restart_by_the_supervisor_is_no_failure() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await reviewed(pilot, preset="debug")
        await pilot.press("enter")
        await until(pilot, lambda: screen.start is not None and "supervisor" in screen.start.progress.reached)
        path = screen.start.path
        record(path, Run(state="preparing"), Run(state="crashed", reason="signal 9"))
        await until(pilot, lambda: "crashed: signal 9" in screen_text(pilot.app))
        assert screen.starting
        record(path, Run(state="running"), Step(step=1, loss=1.0))
        await until(pilot, lambda: pilot.app.watched == [path])


async def test_c130_a_refused_start_shows_the_engines_reason() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.fails = LaunchError("run debug exists: choose another", 2, "run debug exists: choose another")
        screen = await reviewed(pilot, preset="debug")
        await pilot.press("enter")
        await until(pilot, lambda: screen.start is not None and screen.start.failure is not None)
        assert "run debug exists" in screen_text(pilot.app) and "!   run directory" in screen_text(pilot.app)


async def test_c130_a_run_of_somebody_else_is_never_ended() -> None:
    other = RunDirectory.create("runs", "mine")
    lock = Holder(other)
    record(other.path, Run(state="running"), Step(step=9, loss=1.0))

    async def refuse(arguments: Any) -> Launched:
        raise LaunchError("run mine exists", 1, "run mine exists")

    start = Start(["--run", "mine"], other.path, refuse, lambda: None)
    await start.run()
    assert start.failure is not None and start.failure.step == "run directory" and not start.progress.reached
    assert other.alive and other.identity()["state"] == "preparing"
    lock.release()


def test_c130_what_does_not_end_is_named() -> None:
    text = "".join(t for line in failure_lines(Failure("ranks", "why", (), (4711,)), Progress()) for t, _ in line)
    assert "4711" in text and "kill -9" in text and "nothing is left" not in text
    assert end_run(Path("runs/never")) == []


async def test_c130_warnings_ask_once_and_errors_block() -> None:
    Path("d.jsonl").write_text(LINE)
    config = ConfigPresets.debug()
    config.train_data_path, config.eval_data_path = "d.jsonl", "d.jsonl"
    async with App().run_test(size=(160, 45)) as pilot:
        await reviewed(pilot, config=config, preset="debug")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, Question))
        assert "will flatter" in screen_text(pilot.app) and pilot.app.starts == []
        await pilot.press("y")
        await until(pilot, lambda: pilot.app.starts != [])
        pilot.app.lock.release()
    config.train_data_path = "missing.jsonl"
    async with App().run_test(size=(160, 45)) as pilot:
        screen = await reviewed(pilot, config=config, preset="debug")
        assert screen.review.blocked
        await pilot.press("enter", "]")
        assert pilot.app.starts == [] and any("missing.jsonl" in n.text for n in pilot.app.notices)


async def test_c130_a_review_of_other_data_is_stale() -> None:
    Path("d.jsonl").write_text(LINE)
    config = ConfigPresets.debug()
    config.train_data_path = "d.jsonl"
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await reviewed(pilot, config=config, preset="debug")
        Path("d.jsonl").write_text(LINE * 2)
        await pilot.press("enter")
        await until(pilot, lambda: screen.stale)
        assert pilot.app.starts == [] and any("changed since this review" in n.text for n in pilot.app.notices)
        assert "stale: r reviews again" in screen_text(pilot.app).splitlines()[0]
        await pilot.press("enter")
        assert pilot.app.starts == []
        before = screen.review
        await pilot.press("r")
        await until(pilot, lambda: screen.review is not before and not screen.stale)
        await pilot.press("enter")
        await until(pilot, lambda: pilot.app.starts != [])
        pilot.app.lock.release()


async def test_c130_stale_shows_by_itself() -> None:
    Path("my.yaml").write_text("# preset: debug\nmodel:\n  hidden_size: 128\n")
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await reviewed(pilot, path=Path("my.yaml"))
        os.utime("my.yaml", (1, 1))
        screen._looked = 0.0
        await until(pilot, lambda: "stale" in screen_text(pilot.app).splitlines()[0])


async def test_c130_existing_name_and_readonly_block() -> None:
    Path("runs/taken").mkdir(parents=True)
    config = ConfigPresets.debug()
    config.experiment_name = "taken"
    async with App(readonly=True).run_test(size=(80, 24)) as pilot:
        screen = await reviewed(pilot, config=config, preset="debug")
        assert screen.review.blocked and "taken exists in runs" in screen_text(pilot.app)
        await pilot.press("enter", "w")
        assert pilot.app.starts == [] and sum("--readonly" in n.text for n in pilot.app.notices) == 2


async def test_c130_a_path_that_cannot_be_looked_at_is_an_error_with_a_key() -> None:
    rows = rows_of(Form.from_config(Config(train_data_path="~nobody-of-this-name/x.jsonl")))
    assert rows["data"].status == "fail" and "no such home folder" in rows["data"].text
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.open_launch(config=Config(data_cache_dir="~nobody-of-this-name/cache"))
        await until(pilot, lambda: "r checks again" in screen_text(pilot.app))
        await pilot.press("enter")
        assert pilot.app.starts == [] and any("review is not ready" in n.text for n in pilot.app.notices)


async def test_c130_empty_says_what_to_press() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.open_launch()
        await until(pilot, lambda: "2 picks a preset" in screen_text(pilot.app))
        await pilot.press("enter")
        assert pilot.app.starts == []


async def test_c130_200x60_shows_list_differences_and_command_side_by_side() -> None:
    async with App().run_test(size=(200, 60)) as pilot:
        screen = await reviewed(pilot, preset="b1")
        edges = [screen.query_one(f"#{name}").region for name in ("left", "middle", "right")]
        assert edges[0].right <= edges[1].x and edges[1].right <= edges[2].x and len({r.y for r in edges}) == 1
