"""`health_cost.py` measures: with the monitor and without it are two different things, and its figures are of the records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lumina_engine.bench.flooder import RESULT
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.health.watch import HealthWatch
from lumina_engine.run.directory import RunDirectory

from .health_cost import ARMS, LONG, LOOKS, WARM, measured, processor_share, records_per_s, spread, throughput


@pytest.mark.parametrize("arm", ARMS)
def test_the_monitor_looks_at_a_run_of_one_arm_only(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    run = RunDirectory.create(tmp_path / "runs", arm)
    measured(run, [sys.executable, "-m", "lumina_engine.bench.flooder", str(run.path), "0.5", "200"], arm)
    written = json.loads((run.path / RESULT).read_text())["records"]
    assert written > 0 and run.info().state == "finished"
    report = run.reports / "health.json"
    assert report.exists() == (arm == "with")
    if arm == "with":
        assert json.loads(report.read_text())["steps_seen"] == written
    looks = json.loads((run.path / LOOKS).read_text())
    assert (bool(looks) and looks[-1][1] > 0) == (arm == "with")


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    run = RunDirectory.create(tmp_path / "runs", "fails")
    with pytest.raises(RuntimeError, match=r"(?s)fails ended with 1.*no such thing"):
        measured(run, [sys.executable, "-c", "raise SystemExit('no such thing')"], "without", settings={"max_restarts": 0})


def test_throughput_begins_behind_the_warm_up() -> None:
    slow = [rec.Step(step=n, tokens=100 * n, t=10.0 * n) for n in range(1, WARM + 1)]
    fast = [rec.Step(step=n, tokens=100 * n, t=10.0 * WARM + n - WARM) for n in range(WARM + 1, 31)]
    assert throughput([rec.Run(state="running"), *slow, *fast]) == 100.0
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "q1": 1.0, "q3": 3.0, "min": 1.0, "max": 3.0}


def test_the_share_is_of_the_seconds_behind_the_warm_up() -> None:
    steps = [rec.Step(step=n, tokens=n, t=float(n)) for n in range(1, WARM + 21)]
    looks = [(0.5, 4.0), (WARM - 0.5, 5.0), (WARM + 9.0, 5.2), (WARM + 19.5, 5.5), (WARM + 21.0, 9.0)]
    assert processor_share(steps, looks) == pytest.approx(0.5 / 20)
    assert processor_share(steps, []) == 0.0


def test_the_monitor_reads_the_whole_of_a_long_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = HealthWatch.observe
    monkeypatch.setattr(
        HealthWatch, "observe", lambda self, record: (seen.append(getattr(record, "step", 0)), real(self, record))[1]
    )
    records = [rec.Step(step=1, loss=2.0, t=1.0), rec.Hardware(rss=5, t=1.5), rec.Step(step=2, loss=2.0, t=2.0)]
    assert records_per_s(records, tmp_path, count=30) > 0 and LONG >= 50_000
    assert [step for step in seen if step] == list(range(1, 21))
