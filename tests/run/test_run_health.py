"""The health monitor beside the supervisor: alerts in the log, the report, restarts, its own failure."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog, read_records
from lumina_engine.run import launch
from lumina_engine.run.alarm import AlertCommand
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.health import RunHealth
from lumina_engine.run.process import descendants
from tests.waiting import until

from .conftest import Runs


def alerts(run: RunDirectory) -> list[rec.Alert]:
    return [record for record in read_records(run.metrics_path) if isinstance(record, rec.Alert)]


def test_c093_a_run_that_diverges_says_so_in_its_log_and_in_its_report(runs: Runs) -> None:
    run = runs.start(runs.make(steps=400, diverge=200, pace=0.001))
    assert launch.wait(run, 30) == 0
    found = alerts(run)
    assert [(alert.code, alert.severity) for alert in found] == [("divergence", "critical")] and found[0].recommendation
    assert 200 <= (found[0].step or 0) <= 220 and "lumina-engine runs stop r --no-save" in (found[0].recommendation or "")
    report = json.loads((run.reports / "health.json").read_text())
    assert report["steps_seen"] == 400 and [a["code"] for a in report["alerts"]] == ["divergence"]
    assert report["open_alerts"] == ["divergence"] and report["scores"]["numerics"]["value"] == 1.0


def test_c093_what_came_just_before_a_crash_is_told_behind_the_restart(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor looks once a second, and a restart may come sooner."""
    plan = {"steps": 400, "diverge": 200, "crash": {"1": "1"}, "crash_after": 250, "checkpoint_every": 240, "pace": 0.0}
    run = runs.start(runs.make(**plan), restart_pause_s=0.0)
    assert launch.wait(run, 30) == 0 and run.info().inc == 2
    assert [alert.code for alert in alerts(run)].count("divergence") == 1


def test_c093_an_alert_that_rank_0_took_to_its_death_is_told_again(runs: Runs) -> None:
    """Taken between two steps, the second of which never ends."""
    heard = runs.root / "heard"
    argv = [sys.executable, "-c", f"import sys; open({str(heard)!r}, 'a').write(sys.stdin.read())"]
    plan = {"steps": 400, "pace": 0.0, "diverge": 205, "diverge_in": 1, "checkpoint_every": 200}
    plan |= {"crash": {"1": "1"}, "crash_after": 224, "hold": 2.5}
    run = runs.start(runs.make(**plan), restart_pause_s=0.0, alert_command=argv)
    assert launch.wait(run, 60) == 0 and run.info().inc == 2
    assert [alert.code for alert in alerts(run)].count("divergence") == 1
    until(heard.exists, "the command to be run")
    assert '"divergence"' in heard.read_text()


def test_c093_an_alert_is_taken_for_written_when_the_log_has_it(tmp_path: Path) -> None:
    path, told = tmp_path / "metrics.jsonl", list[rec.Alert]()
    log_of(path, (1, 1, 200, 1.0), (1, 200, 220, 5.0))
    health = RunHealth(path, tmp_path / "health.json", lambda alert: not told.append(alert))
    health.inc = 1
    health.look()
    (alert,) = told
    health.renew()  # that rank 0 is gone, and has written nothing
    health.look()
    assert [one.code for one in told] == ["divergence"] * 2
    with MetricLog(path, 2, sync_interval=0) as log:
        log.emit(rec.Alert(severity="critical", code=alert.code, message=alert.message))
    health.renew()
    health.look()
    assert len(told) == 2 and health.finish() == []


def test_c093_old_trouble_of_this_supervisor_is_news_however_late_it_is_read(tmp_path: Path) -> None:
    path, told = tmp_path / "metrics.jsonl", list[rec.Alert]()
    log_of(path, (1, 1, 220, 1.0), (2, 220, 520, 1.0), (2, 520, 540, 5.0), (3, 540, 545, 1.0))
    health = RunHealth(path, tmp_path / "health.json", lambda alert: not told.append(alert))
    health.inc = 1
    while health.look():
        pass
    assert [alert.step and alert.step > 500 for alert in told] == [True]


def test_c093_a_report_of_half_a_log_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, where = tmp_path / "metrics.jsonl", tmp_path / "health.json"
    log_of(path, (1, 1, 2000, 1.0))
    where.write_text("the earlier one")
    monkeypatch.setattr("lumina_engine.run.health.LAST_TIME", 0.0)
    monkeypatch.setattr("lumina_engine.run.health.TURN_BYTES", 1 << 10)
    monkeypatch.setattr("lumina_engine.monitoring.log.MAX_LINE", 1 << 10)
    assert RunHealth(path, where, lambda alert: True).finish() == []
    assert where.read_text() == "the earlier one" and "not written" in capsys.readouterr().err


def log_of(path: Path, *inc_steps: tuple[int, int, int, float]) -> None:
    """Steps of several incarnations: (inc, first, last, loss)."""
    for inc, first, last, loss in inc_steps:
        with MetricLog(path, inc, sync_interval=0) as log:
            for step in range(first, last):
                log.emit(rec.Step(step=step, loss=loss + 0.01 * (step % 5)))


def test_c093_a_restart_keeps_the_windows_and_tells_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_of(path, (1, 1, 200, 1.0), (1, 200, 220, 5.0))
    told: list[rec.Alert] = []
    health = RunHealth(path, tmp_path / "health.json", lambda alert: not told.append(alert))
    health.inc = 2
    while health.look():
        pass
    assert told == [] and list(health.watch.open) == ["divergence"], "the first start has told it"
    log_of(path, (2, 220, 330, 1.0), (2, 330, 350, 5.0))
    assert [alert.code for alert in health.finish()] == [alert.code for alert in told] == ["divergence"]


def test_c093_alerts_wait_for_a_rank_that_takes_them(tmp_path: Path) -> None:
    path, there = tmp_path / "metrics.jsonl", [False]
    log_of(path, (1, 1, 200, 1.0), (1, 200, 220, 5.0))
    health = RunHealth(path, tmp_path / "reports" / "health.json", lambda alert: there[0])
    health.inc = 1
    assert health.look() and [alert.code for alert in health.finish()] == ["divergence"] and health.finish() == []


def test_c093_a_monitor_that_fails_says_so_and_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    log_of(path, (1, 1, 5, 1.0))
    health = RunHealth(path, tmp_path / "health.json", lambda alert: True)
    monkeypatch.setattr(health.watch, "observe", lambda record: 1 / 0)
    assert not health.look() and not health.look()
    assert capsys.readouterr().err.count("the health monitor is switched off: ZeroDivisionError") == 1


def test_c093_the_user_s_command_is_told_of_alerts(runs: Runs) -> None:
    heard = runs.root / "heard"
    argv = [sys.executable, "-c", f"import sys; open({str(heard)!r}, 'a').write(sys.stdin.read())", "$(touch x)"]
    run = runs.start(runs.make(steps=400, diverge=200, pace=0.001), alert_command=argv)
    assert launch.wait(run, 30) == 0
    until(heard.exists, "the command to be run")
    told = [json.loads(line) for line in heard.read_text().splitlines()]
    assert [(item["code"], item["run"], item["others"]) for item in told] == [("divergence", "r", 0)]
    assert not (run.path / "x").exists()


def test_c093_a_command_is_run_once_a_minute_ended_when_late_and_outlives_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alert = rec.Alert(severity="warning", code="x", message="m", t=1.0)
    out = tmp_path / "out"
    command = AlertCommand([sys.executable, "-c", f"import sys; open({str(out)!r}, 'a').write(sys.stdin.read())"], tmp_path)
    command.take(rec.Alert(severity="info", code="i", message="m"))
    command.tick(0.0)
    assert command._child is None
    command.take(alert)
    command.finish()
    for _ in range(3):
        command.take(alert)
    command.tick(command._started + 59)
    assert command._child is None and len(out.read_text().splitlines()) == 1
    command.tick(command._started + 61)
    assert command._child is not None
    command.ended(command._child.pid, command._child.wait(20))
    assert json.loads(out.read_text().splitlines()[1])["others"] == 2
    late = AlertCommand([sys.executable, "-c", "import threading; threading.Event().wait()"], tmp_path)
    late.take(alert)
    late.tick(0.0)
    assert late._child is not None and late.without(descendants(os.getpid())) == []
    late.tick(10.1)
    assert late.ended(late._child.pid, late._child.wait(20)) and "not done after 10 s" in capsys.readouterr().err
    missing = AlertCommand(["/no/such/program"], tmp_path)
    missing.take(alert)
    missing.tick(0.0)
    assert "No such file" in capsys.readouterr().err


def writing(out: Path, tmp_path: Path, **times: float) -> AlertCommand:
    return AlertCommand(
        [sys.executable, "-c", f"import sys; open({str(out)!r}, 'a').write(sys.stdin.read())"], tmp_path, **times
    )


def told(out: Path) -> list[tuple[str, str, int]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [(row["severity"], row["code"], row["others"]) for row in rows]


def test_c093_of_several_alerts_the_command_is_told_the_worst(tmp_path: Path) -> None:
    command = writing(tmp_path / "out", tmp_path)
    given = ("warning a", "critical b", "critical c", *(f"warning {n}" for n in range(1_500)))
    for severity, code in (words.split() for words in given):
        command.take(rec.Alert(severity=severity, code=code, message="m"))  # type: ignore[arg-type]
    command.finish()
    for code in ("d", "e"):
        command.take(rec.Alert(severity="warning", code=code, message="m"))
    command.tick(command._started + 61)
    command.finish()
    assert told(tmp_path / "out") == [("critical", "c", 1_502), ("warning", "e", 1)], "the newest of the worst"


def test_c093_what_waits_when_the_run_ends_is_told_whatever_the_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind the command that runs, also where that one has to be ended."""
    out, gate = tmp_path / "out", tmp_path / "gate"
    command = writing(out, tmp_path)
    command.take(rec.Alert(severity="warning", code="first", message="m"))
    command.tick(time.monotonic())
    assert command._child is not None
    command.take(rec.Alert(severity="critical", code="last", message="m"))
    command.finish()
    command.finish()
    assert told(out) == [("warning", "first", 0), ("critical", "last", 0)] and command._child is None
    stuck = f"""
import pathlib, sys, threading
text = sys.stdin.read()
if "first" in text:
    threading.Event().wait()
pathlib.Path({str(gate)!r}).write_text(text)
"""
    late = AlertCommand([sys.executable, "-c", stuck], tmp_path)
    late.take(rec.Alert(severity="warning", code="first", message="m"))
    late.tick(time.monotonic() - late.patience)
    late.take(rec.Alert(severity="warning", code="last", message="m"))
    late.finish()
    assert json.loads(gate.read_text())["code"] == "last" and capsys.readouterr().err.count("not done after 10 s") == 1
