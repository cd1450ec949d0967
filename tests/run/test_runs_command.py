"""`lumina-engine runs`: rows, records, stop, hostile names."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_engine.commands import runs as command
from lumina_engine.commands.common import UserError
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.adaptive import RateController, Rules
from lumina_engine.monitoring.log import MetricLog, last_records
from lumina_engine.run import client, launch
from lumina_engine.run.directory import RunDirectory, RunError
from tests.waiting import until

from .conftest import Runs
from .looks import LAUNCHER_OF_TWO, ranks_of


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(words)))


def filled(root: Path, name: str = "r") -> RunDirectory:
    run = RunDirectory.create(root, name, preset="debug")
    run.update_identity(state="finished", exit_code=0, total_steps=3, pid=1, inc=1, world=1)
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        log.emit(rec.Run(state="running", total_steps=3))
        for step in range(1, 4):
            log.emit(rec.Step(step=step, loss=1.0 / step, tokens_per_s=50.0))
        log.emit(rec.Alert(severity="warning", code="c", message="a \x1b[2J b\nc"))
        log.emit(rec.Run(state="finished", exit_code=0))
    return run


def test_list_json_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    assert call("list", "--runs", str(tmp_path), "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"name", "state", "step", "total_steps", "loss", "tokens_per_s", "age_s", "path"} <= set(rows["r"])
    assert (rows["r"]["state"], rows["r"]["step"], rows["r"]["total_steps"], rows["r"]["tokens_per_s"]) == (
        "finished",
        3,
        3,
        50.0,
    )
    assert rows["bad"]["state"] == "unreadable" and "damaged" in rows["bad"]["reason"]


def test_list_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", "--runs", str(tmp_path)) == 0
    assert "no runs in" in capsys.readouterr().out
    filled(tmp_path)
    assert call("list", "--runs", str(tmp_path)) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["name", "state", "step"] and row.split()[:3] == ["r", "finished", "3/3"]


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = filled(tmp_path)
    for folder in ("checkpoints/step-000003", "checkpoints/step-000002.corrupt", "emergency/step-000004"):
        (run.path / folder).mkdir()
    assert call("show", "r", "--runs", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "step-000003, step-000004 (emergency)\n" in text and "3/3" in text and "a \\x1b[2J b␊c" in text
    assert call("show", str(run.path), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["checkpoints"] == ["step-000003", "step-000004"] and shown["alerts"][0]["code"] == "c"


def test_show_tells_where_each_rank_is(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.make(ranks=["preempt", "preempt"])
    launch.start(run, [sys.executable, LAUNCHER_OF_TWO, str(run.path)], world=2)
    until(lambda: [rank["step"] for rank in ranks_of(run)] == [1, 1], "both ranks")
    assert call("show", str(run.path)) == 0
    lines = dict(line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("rank "))
    assert sorted(lines) == ["0", "1"]
    for rank in ranks_of(run):
        assert re.fullmatch(rf"\d+\.\d s in step of step 1, process {rank['pid']}", lines[str(rank["rank"])]), lines
    assert call("show", str(run.path), "--json") == 0
    assert [rank["section"] for rank in json.loads(capsys.readouterr().out)["ranks"]] == ["step", "step"]


def test_c36_show_tells_how_far_a_rank_is_that_tokenises() -> None:
    rank = {"pid": 12, "step": 1_248_000, "section": "tokenise", "age_s": 3.0, "connected": True, "exit_code": None}
    assert command.place(rank) == "3.0 s in tokenising: 1,248,000 conversations so far, process 12"


def test_show_names_ranks_elsewhere_and_those_that_are_gone() -> None:
    rank = {
        "rank": 1,
        "host": "node-7",
        "pid": 5,
        "step": None,
        "section": None,
        "age_s": 2.0,
        "connected": True,
        "exit_code": None,
    }
    assert command.place(rank) == "starting, process 5 on node-7"
    assert command.place({**rank, "connected": False, "exit_code": 75}) == "gone, process 5 on node-7, exit code 75"


def test_unknown_names(tmp_path: Path) -> None:
    filled(tmp_path, "debug-1")
    for action in ("show", "tail", "stop"):
        with pytest.raises(RunError, match="did you mean debug-1"):
            call(action, "debug-2", "--runs", str(tmp_path))


def test_tail_of_a_run_that_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    assert call("tail", "r", "--runs", str(tmp_path), "--json", "--lines", "all") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["seq"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert call("tail", "r", "--runs", str(tmp_path), "--json", "--type", "step,alert", "--lines", "2") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["seq"] for record in records] == [4, 5]
    assert call("tail", "r", "--runs", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 6 and "\x1b" not in text and "loss 0.33333" in text


def test_tail_refuses_what_is_not_there(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(UserError, match=r"--type steps: .*types: alert, change"):
        call("tail", "r", "--runs", str(tmp_path), "--type", "steps")
    with pytest.raises(UserError, match="--lines x"):
        call("tail", "r", "--runs", str(tmp_path), "--lines", "x")


def test_c146_tail_follows_to_the_end_and_stop_waits_for_it(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.running()
    follower = subprocess.Popen(
        [sys.executable, "-m", "lumina_engine.cli", "runs", "tail", "r", "--json", "--lines", "all", "--type", "run,step"],
        stdout=subprocess.PIPE,
        env={**os.environ, "LUMINA_RUNS": str(runs.root)},
    )
    assert follower.stdout is not None
    assert json.loads(follower.stdout.readline())["state"] == "preparing"
    assert call("stop", "r", "--no-save", "--json") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
    lines = [json.loads(line) for line in follower.stdout]
    follower.stdout.close()
    assert follower.wait(20) == 0 and lines[-1]["state"] == "finished"
    steps = [line["step"] for line in lines if line["type"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert run.newest_step() is None, "--no-save"
    with pytest.raises(RunError, match="is not running"):
        call("stop", "r")


def test_c098_set_lr_goes_to_the_living_run_and_nowhere_else(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.running()
    assert call("set-lr", "r", "2e-4", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"run": "r", "learning_rate": 2e-4}
    seen = until(lambda: [c for c in last_records(run.metrics_path, None, ["change"]) if c.what == "learning_rate"])
    assert seen[0].after == 2e-4
    with pytest.raises(UserError, match="at most 1"):
        call("set-lr", "r", "2")
    assert call("stop", "r", "--no-save") == 0
    with pytest.raises(RunError, match="is not running"):
        call("set-lr", "r", "2e-4")


def decided(root: Path, steps: int) -> RunDirectory:
    """A run whose loss jumps at step 101, and what the controller decided in it."""
    run = RunDirectory.create(root, "r", preset="debug")
    config = Config(adaptive="act", adaptive_cooldown_steps=20)
    config.save(run.config_path)
    controller = RateController(Rules.from_config(config))
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        for step in range(1, steps + 1):
            level = 2.0 if step <= 100 else 5.0
            record = rec.Step(step=step, loss=level * (1 + 0.03 * (step * 7 % 11 - 5) / 5), grad_norm=1.0, lr=1e-3)
            log.emit(record)
            for decision in controller.observe(record):
                log.emit(decision.record)
    return run


def test_c100_decisions_are_shown_with_evidence_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = decided(tmp_path, 150)
    assert call("decisions", "r", "--runs", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "cut: factor 1 to 0.5: the loss went from" in text and "outcome of step" in text and "not recovered" in text
    assert "loss_level" in text and "the log alone gives the same decisions" in text
    assert call("decisions", "r", "--runs", str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] and found["factor"] == 0.25 and found["decisions"][0]["evidence"]["cooldown"] == 20
    Config(adaptive="act", adaptive_cooldown_steps=50).save(run.config_path)
    assert call("decisions", "r", "--runs", str(tmp_path)) == 1
    assert "differs: step" in capsys.readouterr().err


def test_c100_a_log_of_a_version_without_the_controller_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, mode, code in (("old", None, 0), ("new", "act", 1)):
        run = RunDirectory.create(tmp_path, name, preset="debug")
        Config(adaptive="act", adaptive_cooldown_steps=20).save(run.config_path)
        with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
            log.emit(rec.Run(state="running", adaptive=mode))
            for step in range(1, 151):
                log.emit(rec.Step(step=step, loss=(2.0 if step <= 100 else 5.0) + 0.01 * (step * 7 % 11), grad_norm=1.0))
        assert call("decisions", name, "--runs", str(tmp_path)) == code
        shown = capsys.readouterr()
        assert ("written without the controllers" in shown.out, "differs" in shown.err) == (not code, bool(code))


def test_c100_a_run_without_decisions_or_without_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = filled(tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml is not there"):
        call("decisions", "r", "--runs", str(tmp_path))
    Config().save(run.config_path)
    assert call("decisions", "r", "--runs", str(tmp_path)) == 0 and "no decision" in capsys.readouterr().out


def test_stop_without_waiting(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.running()
    assert call("stop", "r", "--no-wait") == 0
    assert launch.wait(run, 20) == 0 and run.newest_step() is not None


def test_ps14_a_second_stop_waits_for_the_same_end(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.running(gathers=2)
    assert call("stop", "r", "--no-wait") == 0
    capsys.readouterr()
    assert call("stop", "r", "--no-save", "--json") == 0, "the second command that the worker gets"
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
    assert not run.alive


def test_ps14_a_stop_of_a_run_that_ends_before_it_answers_reports_that_end(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, send_command = runs.running(), client.send_command

    def ended_first(directory: RunDirectory, cmd: str, args: dict[str, bool]) -> None:
        send_command(directory, cmd, args)
        until(lambda: not directory.alive, "its end")
        raise RunError("run r does not answer (finished)", 1)

    monkeypatch.setattr(client, "send_command", ended_first)
    assert call("stop", "r", "--json") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished" and not run.alive


def test_se04_hostile_names_on_a_terminal_and_in_a_pipe(tmp_path: Path) -> None:
    import pty

    folder = tmp_path / "\x1b]0;owned\x07\u202e"
    folder.mkdir()
    (folder / "run.json").write_text('{"id": "a", "format": 1, "state": "\\u001b[2J"}')
    argv = [sys.executable, "-m", "lumina_engine.cli", "runs", "list", "--runs", str(tmp_path)]
    piped = subprocess.run(argv, capture_output=True, check=True).stdout.decode()
    assert "\x1b" not in piped and "\\x1b]0;owned\\x07\\u202e" in piped
    data = subprocess.run([*argv, "--json"], capture_output=True, check=True).stdout
    assert b"\x1b" not in data and json.loads(data)[0]["name"] == folder.name
    master, slave = pty.openpty()
    with subprocess.Popen(argv, stdout=slave, stdin=subprocess.DEVNULL) as shown:
        os.close(slave)
        output = b""
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:
                break
            output += piece
        shown.wait(20)
    os.close(master)
    assert b"\x1b" not in output and b"\x07" not in output and "␛]0;owned␇\ufffd".encode() in output


def test_durations() -> None:
    assert [command.duration(value) for value in (None, 3, 90, 7200, 200_000)] == ["-", "3 s", "2 m", "2 h", "2 d"]


def test_the_module_is_cheap_to_load() -> None:
    heavy = ("torch", "numpy", "pydantic", "msgspec", "psutil")
    script = f"import sys, lumina_engine.commands.runs; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
