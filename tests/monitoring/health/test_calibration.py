"""The bars of the health monitor and of the guard of steps, on recorded real runs (the calibration corpus)."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina_engine.bench.corpus import Recorded, read
from lumina_engine.cli import main
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.health.watch import detectors
from lumina_engine.training.guard import Spike, StepGuard

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def corpus() -> list[Recorded]:
    return read(FOLDER)


def test_c093_the_corpus_is_what_it_says(corpus: list[Recorded]) -> None:
    healthy = [run for run in corpus if run.fault == "healthy"]
    assert len(healthy) >= 50 and len({run.shape for run in healthy}) >= 6 and not any(run.generated for run in corpus)
    for fault in {run.fault for run in corpus}:
        runs = [run for run in corpus if run.fault == fault]
        assert len({run.seed for run in runs}) == len(runs) and 2 * sum(run.held for run in runs) == len(runs), fault
    assert sum(path.stat().st_size for path in FOLDER.glob("*.json.xz")) < 700_000


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """What `lumina-engine bench health --json` says on its last line."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["bench", "health", "--json"]) == 0
    return dict(json.loads(out.getvalue().splitlines()[-1]))


@pytest.mark.parametrize("part", ["chosen", "held"])
def test_c093_recall_false_alarms_and_precision(figures: dict[str, Any], part: str) -> None:
    found = figures[part]
    assert found["critical_recall"] >= 0.95 and found["critical_false_alarms"] == 0 and found["warning_precision"] >= 0.9
    assert found["healthy_runs"] >= 30 and found["critical_runs"] >= 20 and found["warnings"] >= 20


def test_c093_bench_health_names_its_figures(figures: dict[str, Any]) -> None:
    assert {"critical_recall", "critical_false_alarms", "warning_precision", "table", "codes", "records_per_s"} <= set(figures)
    assert {"router collapse", "not finite", "healthy", "slow rank"} <= {row["fault"] for row in figures["table"]}


def test_c093_each_code_has_a_fault_in_whose_runs_it_is_told(figures: dict[str, Any]) -> None:
    codes = {code for detector in detectors() for code in detector.codes}
    for part, share in (("runs", 1.0), ("held", 0.5)):
        enough = {
            code for row in figures["table"] for code, told in row["told"].items() if told[part] >= 0.75 * share * row["runs"]
        }
        assert enough == codes, part


def test_c093_bench_health_without_a_corpus_says_what_to_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "health", "--corpus", str(tmp_path)]) == 2
    assert "--corpus" in capsys.readouterr().err


def guarded(run: Recorded) -> list[tuple[int, Spike]]:
    """The spikes that the guard of steps sees in a run."""
    guard = StepGuard(SimpleNamespace(spike_sigma=6.0, spike_window=128, spike_recover_steps=32, spike_policy="alert"))
    steps = [record for record in run.records() if isinstance(record, rec.Step)]
    seen = [(s.step, guard.observe(s.step, s.loss or 0.0, s.grad_norm or 0.0, True)) for s in steps]
    return [(step, spike) for step, spike in seen if spike is not None]


def test_ft06_the_guard_raises_nothing_in_a_healthy_run(corpus: list[Recorded]) -> None:
    found = {(run.shape, run.seed): guarded(run) for run in corpus if run.fault == "healthy"}
    assert {key: spikes for key, spikes in found.items() if spikes} == {}


def test_ft06_the_guard_tells_a_bad_batch_in_its_step(corpus: list[Recorded]) -> None:
    runs = [run for run in corpus if run.fault in ("one bad batch", "bad data")]
    told = [run for run in runs if any(step == run.at for step, _ in guarded(run))]
    assert len(runs) >= 16 and told == runs
