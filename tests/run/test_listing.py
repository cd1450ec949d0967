"""Figures from the end of a log, and the list that command line and terminal share."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.cli import main
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog, read_records, surviving
from lumina_engine.run import listing
from lumina_engine.run.directory import RunDirectory, RunInfo
from lumina_engine.run.listing import SORTS, Tail, listed, matches, ordered, smoothed, with_figures


@pytest.fixture
def log(tmp_path):
    with MetricLog(tmp_path / "metrics.jsonl", 1, sync_interval=0) as log:
        yield log


def test_smoothed_is_the_debiased_mean_of_the_chart():
    import numpy as np

    from lumina_engine.monitoring import reduce

    values = [3.0, 2.5, math.nan, 2.0, math.inf, 1.0, 7.0]
    expected = reduce.smooth(np.array(values), 0.9)[-1]
    assert smoothed(values) == pytest.approx(float(expected), rel=1e-6)
    assert smoothed([]) is None and smoothed([math.nan]) is None and smoothed([2.0] * 9) == pytest.approx(2.0)


parts = st.lists(
    st.one_of(
        st.integers(1, 30).map(lambda n: ("steps", n)),
        st.integers(0, 60).map(lambda n: ("rewind", n)),
        st.sampled_from([("alert", 0), ("checkpoint", 0)]),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(parts, st.integers(0, 11))
def test_following_a_log_is_as_reading_it_again(tmp_path_factory, story, looked):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    follower, step = Tail(path), 0
    with MetricLog(path, 1, sync_interval=0) as log:
        for index, (what, amount) in enumerate(story):
            if what == "steps":
                for _ in range(amount):
                    step += 1
                    log.emit(rec.Step(step=step, loss=1.0 / step, step_time=0.1, tokens_per_s=step))
            elif what == "rewind":
                step = min(step, amount)
                log.emit(rec.Rewind(to_step=step))
            elif what == "alert":
                log.emit(rec.Alert(severity="warning", code="x", message="y"))
            else:
                log.emit(rec.Checkpoint(step=step, bytes=1))
            if index >= looked:
                follower.figures()
    assert follower.figures() == Tail(path).figures()
    last = follower.figures().last
    assert (last.step if last else 0) == step
    kept = [record for record in surviving(read_records(path)) if isinstance(record, rec.Step)]
    assert list(follower.figures().losses) == [record.loss for record in kept]


def test_only_new_bytes_are_read(log, monkeypatch):
    for step in range(1, 50):
        log.emit(rec.Step(step=step, loss=2.0))
    tail = Tail(log.path)
    assert tail.figures().last.step == 49
    monkeypatch.setattr(listing, "last_records", None)  # the end of the log is looked at once
    log.emit(rec.Step(step=50, loss=1.0))
    assert tail.figures().last.step == 50 and len(tail.figures().losses) == 50


def test_a_log_that_was_replaced_is_read_again(log, tmp_path):
    for step in range(1, 50):
        log.emit(rec.Step(step=step, loss=2.0))
    tail = Tail(log.path)
    tail.figures()
    os.truncate(log.path, 0)
    with MetricLog(log.path, 2, sync_interval=0) as other:
        other.emit(rec.Step(step=1, loss=9.0))
    assert tail.figures().losses == (9.0,)


def test_the_newest_step_is_found_behind_long_records(log):
    log.emit(rec.Step(step=7, loss=2.0))
    for _ in range(12):
        log.emit(rec.Experts(step=7, layers=[0], load=[[1.5] * 8000]))
    assert Tail(log.path).figures().last.step == 7


def test_time_left_and_alerts():
    row = RunInfo("a", "running", RunDirectory("a").path, alive=True, total_steps=100)
    alerts = (rec.Alert(severity="critical", code="c", message=""), rec.Alert(severity="warning", code="w", message=""))
    figures = listing.Figures(last=rec.Step(step=40, loss=2.0), step_time=0.5, alerts=alerts)
    full = with_figures(row, figures)
    assert (full.left_s, full.alerts, full.critical) == (30.0, 2, 1)
    assert with_figures(RunInfo("a", "finished", row.path, total_steps=100), figures).left_s is None


def make(root, name, *, preset="debug", loss=None, state="finished"):
    run = RunDirectory.create(root, name, preset=preset)
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        if loss is not None:
            log.emit(rec.Step(step=5, loss=loss, tokens_per_s=10.0))
    run.update_identity(state=state, pid=2**22 + 1, start_time=1)
    return run


def test_orders(tmp_path):
    for index, (name, loss, state) in enumerate([("b", 2.0, "failed"), ("a", None, "finished"), ("c", 1.0, "finished")]):
        run = make(tmp_path, name, loss=loss, state=state)
        os.utime(run.metrics_path, (1e9 + index, 1e9 + index))
    rows = listed(tmp_path)
    names = {order: "".join(row.name for row in ordered(rows, order)) for order in SORTS}
    assert names == {"age": "cab", "name": "abc", "state": "bac", "loss": "cba", "alerts": "abc"}
    assert [matches(row, "state:failed") for row in ordered(rows, "name")] == [False, True, False]


def test_c127_the_command_filters_and_sorts_as_home_does(tmp_path, capsys):
    make(tmp_path, "one", preset="b1", loss=3.0)
    make(tmp_path, "two", loss=1.0, state="failed")
    make(tmp_path, "three", loss=2.0)
    arguments = ["runs", "list", "--runs", str(tmp_path), "--json"]
    assert main([*arguments, "--sort", "loss"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["two", "three", "one"]
    assert {"name", "state", "step", "total_steps", "loss", "tokens_per_s", "age_s", "path"} <= set(rows[0])
    assert main([*arguments, "--filter", "preset:b1"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["one"]
    assert main(["runs", "list", "--runs", str(tmp_path), "--filter", "zzz"]) == 0
    assert "no run matches zzz" in capsys.readouterr().out
    assert main([*arguments, "--sort", "size"]) == 2
    assert "orders: age, name" in capsys.readouterr().err


def test_a_log_that_cannot_be_read_is_a_reason(tmp_path):
    run = make(tmp_path, "one", loss=1.0)
    run.metrics_path.unlink()
    run.metrics_path.mkdir()
    (row,) = listed(tmp_path)
    assert row.step is None and "metrics.jsonl" in (row.reason or "")
