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
from lumina_engine.run.health import RunHealth

from . import health_cost
from .health_cost import LONG, LOOKS, TURN, WARM, its_turn, measured, processor_share, ratios, records_per_s, spread, turns


def test_a_run_leaves_the_looks_of_its_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    run = RunDirectory.create(tmp_path / "runs", "r")
    measured(run, [sys.executable, "-m", "lumina_engine.bench.flooder", str(run.path), "0.5", "200"])
    written = json.loads((run.path / RESULT).read_text())["records"]
    assert written > 0 and run.info().state == "finished" and json.loads((run.path / LOOKS).read_text()) is not None


def test_a_turn_without_the_monitor_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "metrics.jsonl", [2 * TURN]
    path.write_bytes(b"".join(rec.encode(rec.Step(step=n, seq=n, loss=2.0, t=float(n), inc=1)) for n in range(1, 20)))
    monkeypatch.setattr(health_cost.time, "time", lambda: now[0])
    health, other = (RunHealth(path, tmp_path / "health.json", lambda alert: True) for _ in range(2))
    looks = health_cost.taking_turns(health, [other])
    now[0] = 3 * TURN + 1
    assert not health.look() and not health.behind and looks == [] and other.watch.summary()["steps_seen"] == 0
    now[0] = 4 * TURN + 1
    assert health.look() and len(looks) == 1 and looks[0][0] == now[0] and looks[0][1] > 0
    assert other.watch.summary()["steps_seen"] == 19


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    run = RunDirectory.create(tmp_path / "runs", "fails")
    with pytest.raises(RuntimeError, match=r"(?s)fails ended with 1.*no such thing"):
        measured(run, [sys.executable, "-c", "raise SystemExit('no such thing')"], settings={"max_restarts": 0})


def test_a_turn_is_compared_with_its_neighbours() -> None:
    """A step a second and 100 tokens a step, 90 in the turns of the monitor; the warm-up and both ends are no whole turns."""
    steps, tokens = [rec.Run(state="running")], 0
    for n in range(1, 75):
        tokens += 90 if its_turn(float(n)) else 100
        steps.append(rec.Step(step=n, tokens=tokens, t=float(n)))
    speeds = turns(steps)
    assert list(speeds) == [2, 3, 4, 5, 6] and set(speeds.values()) == {90.0, 100.0}
    assert ratios(speeds) == [0.9] and ratios({1: 1.0, 2: 1.0}) == []
    found = spread([3.0, 1.0, 2.0])
    assert (found["median"], found["mean"], found["standard_error"]) == (2.0, 2.0, pytest.approx(3**-0.5))


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
