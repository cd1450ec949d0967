"""An error in a step of a real run: the last finished step is saved beside the checkpoints, and the run goes on from it."""

from __future__ import annotations

from typing import Any

import pytest

from lumina_engine.checkpoint.verify import verify
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records, surviving
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.launch import wait

from .conftest import TinyRuns
from .injector import Fault
from .tiny_run import final_manifest, prepare, start, steps

# two micro batches a step, experts whose load is told each 5 steps, as a save is taken: one more does not tidy up yet
KEYS: dict[str, Any] = {
    "max_steps": 10,
    "save_interval": 5,
    "expert_log_interval": 5,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
}
BEFORE_A_MERGE = [pytest.mark.slow, pytest.mark.fast]


def seen(run: RunDirectory) -> dict[str, Any]:
    """What two equal runs have in common: losses, load of the experts, and all that the last checkpoint holds in tensors."""
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    experts = {r.step: r.load for r in surviving(read_records(run.metrics_path)) if isinstance(r, rec.Experts)}
    files = {f["path"]: f["chunks"] for f in final_manifest(run)["files"] if f["path"].endswith(".safetensors")}
    return {"losses": {step: record.loss for step, record in steps(run).items()}, "experts": experts, "files": files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return seen(start(prepare(tmp_path_factory.mktemp("whole"), "whole", **KEYS)))


@pytest.mark.parametrize(
    ("section", "count", "enabled"),
    [
        ("forward", 2, True),
        ("step", 1, True),
        pytest.param("data", 1, True, marks=BEFORE_A_MERGE),
        pytest.param("backward", 2, True, marks=BEFORE_A_MERGE),
        pytest.param("forward", 2, False, marks=BEFORE_A_MERGE),
    ],
)
def test_c084_ft09_an_error_in_a_step_saves_the_one_before_it(
    tiny_runs: TinyRuns, whole: dict[str, Any], section: str, count: int, enabled: bool
) -> None:
    """In the second micro batch random numbers were drawn and the experts' load was counted: both are taken back."""
    fault = Fault("raise", 7, section, count=count)
    run = tiny_runs.running("r", [fault], enable_emergency_save=enabled, **KEYS)
    assert seen(run) == whole and set(whole["experts"]) == {5, 10}
    at = 6 if enabled else 5
    assert [(r.to_step, r.reason) for r in read_records(run.metrics_path) if isinstance(r, rec.Rewind)] == [
        (at, f"resumed from step-{at:06d}")
    ]
    assert [path.name for path in run.emergency.iterdir()] == ["step-000006"] * enabled
    assert all(verify(path).ok for path in run.emergency.iterdir())
