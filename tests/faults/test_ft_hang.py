"""Ranks that do not move any more, and ranks that are slow: found, named, ended, started again, exactly where they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.client import RunClient
from lumina_engine.run.launch import wait
from lumina_engine.run.process import marked
from tests.waiting import until

from .conftest import TinyRuns
from .injector import Fault, fired
from .tiny_run import ends, final_manifest, prepare, start, steps

SOON = {"hang_timeout_s": 1.0, "hang_factor": 5.0, "hang_grace_s": 0.5}  # 30 s by default: nobody gains by waiting here
STEP = 14
BEFORE_A_MERGE = [pytest.mark.slow, pytest.mark.fast]


def alerts(path: Path, code: str) -> list[rec.Alert]:
    return [r for r in read_records(path) if isinstance(r, rec.Alert) and r.code == code]


def digests(manifest: dict[str, object]) -> dict[str, object]:
    """Of the weights and of the optimizer's state."""
    files = manifest["files"]
    assert isinstance(files, list)
    found = {file["path"]: file["chunks"] for file in files if file["path"].endswith(".safetensors")}
    assert found
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], dict[str, object]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        run = start(prepare(tmp_path_factory.mktemp("unbroken"), "unbroken"))
        assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    return {step: record.loss for step, record in steps(run).items()}, digests(final_manifest(run))


@pytest.mark.parametrize(
    ("how", "section"),
    [
        pytest.param("sleep", "forward", marks=BEFORE_A_MERGE),
        pytest.param("hold_gil", "backward", marks=BEFORE_A_MERGE),
        pytest.param("stop", "data", marks=BEFORE_A_MERGE),
        ("deadlock", "step"),
    ],
)
def test_ft07_a_hang_is_found_named_and_restarted_exactly(
    tiny_runs: TinyRuns,
    unbroken: tuple[dict[int, float], dict[str, object]],
    how: str,
    section: str,
) -> None:
    run = tiny_runs.running("hung", [Fault(how, STEP, section)], settings=SOON)
    until(lambda: fired(run.path), "the fault", 60)
    words = until(lambda: "being ended" in (run.info().reason or "") and run.info().reason, "a word")
    assert words.startswith("rank 0 is ") and f"in {section} of step {STEP}" in words
    assert ("stopped" in words) == (how == "stop")
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    (alert,) = alerts(run.metrics_path, "hang")
    assert alert.severity == "critical" and alert.step == STEP and alert.message in words
    text = run.log_path.read_text()
    if how == "stop":
        assert "rank 0 is stopped by a signal: it prints no stack" in text
    else:
        assert "most recent call first" in text and "injector.py" in text
    assert [(inc, state) for inc, state, _ in ends(run) if state in ("crashed", "finished")] == [
        (1, "crashed"),
        (2, "finished"),
    ]
    assert ({step: record.loss for step, record in steps(run).items()}, digests(final_manifest(run))) == unbroken


@pytest.mark.slow
@pytest.mark.fast
def test_ft07_of_two_ranks_the_one_that_hangs_is_named(tiny_runs: TinyRuns) -> None:
    run = tiny_runs.running(faults=[Fault("sleep", STEP, "forward", rank=1)], world=2, settings=SOON, max_steps=16)
    nonce = run.identity()["nonce"]
    assert wait(run, 240) == 0, run.log_path.read_text()[-2000:]
    (alert,) = alerts(run.metrics_path, "hang")
    place = f" s in forward of step {STEP}"  # rank 0 waits there for rank 1, and may have come first
    assert alert.message.startswith("rank 1 is ") or alert.message.endswith(f"{place}, so is rank 1"), alert.message
    assert place in alert.message
    assert run.log_path.read_text().count("most recent call first") >= 2, "the stacks of both"
    assert marked(nonce) == []


@pytest.mark.slow
@pytest.mark.fast
def test_ft07_the_screen_s_question_finds_the_rank_too(tiny_runs: TinyRuns) -> None:
    run = tiny_runs.running(faults=[Fault("sleep", 8, "backward")])
    until(lambda: fired(run.path), "the fault", 60)
    with RunClient(run) as client:
        ranks = until(lambda: [r for r in client.ask("ranks")["ranks"] if r["age_s"] > 0.3], "a rank that stands still")
    assert [(rank["rank"], rank["step"]) for rank in ranks] == [(0, 8)]


@pytest.mark.nightly
def test_ft11_a_slow_rank_is_told_within_50_steps(tiny_runs: TinyRuns, figure: Callable[[str, object], None]) -> None:
    slow = Fault("slow", None, "forward", rank=1, count=60, value=0.05, times=None)
    run = tiny_runs.running(faults=[slow], world=2, max_steps=150, num_epochs=40, save_interval=100, eval_interval=0)
    assert wait(run, 240) == 0, run.log_path.read_text()[-2000:]
    told = alerts(run.metrics_path, "straggler")
    assert told and all(alert.message.startswith("rank 1 is slow") for alert in told)
    assert any("the fastest rank" in alert.message for alert in told)
    first = min(alert.step or 0 for alert in told)
    figure("steps until told", first - 60)
    assert 60 < first <= 110
