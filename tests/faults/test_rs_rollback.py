"""A rollback in a real run that is killed before any checkpoint knows of it: the log does (RS08, RS10)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.launch import wait

from .conftest import TinyRuns
from .injector import Fault
from .tiny_run import final_manifest, steps


@pytest.mark.parametrize(
    "world", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.fast]), pytest.param(2, marks=pytest.mark.nightly)]
)
def test_rs08_ft05_killed_between_a_rollback_and_the_next_save_equals_unbroken(
    tiny_runs: TinyRuns, world: int, fault_random: random.Random
) -> None:
    """Of two ranks the poison is the second one's alone: both go back, and over the same batches."""
    poison = [Fault("nan_loss", step, "forward", rank=world - 1) for step in (13, 14, 15)]
    kill = Fault("kill", fault_random.randint(9, 12), "data", count=2, rank=fault_random.randrange(world))
    whole = tiny_runs.running("whole", poison, world=world, max_steps=20)
    assert wait(whole, 200) == 0, whole.log_path.read_text()[-2000:]
    killed = tiny_runs.running("killed", [*poison, kill], world=world, max_steps=20)
    assert wait(killed, 200) == 0, killed.log_path.read_text()[-2000:]
    went = [
        [(r.to_step, r.failed_step) for r in read_records(run.metrics_path) if isinstance(r, rec.Rewind)]
        for run in (whole, killed)
    ]
    assert went == [[(8, 15)], [(8, 15), (8, None)]]
    want, got = steps(whole), steps(killed)
    assert sorted(got) == sorted(want) == list(range(1, 21))
    for step in want:
        for name in ("loss", "grad_norm", "lr", "tokens", "epoch"):
            assert getattr(got[step], name) == getattr(want[step], name), (step, name)
    records = list(read_records(killed.metrics_path))
    assert [r.seq for r in records] == list(range(1, len(records) + 1))  # RS10
    proof = next(r for r in records if isinstance(r, rec.Resume))
    assert proof.step == 8 and proof.skipped_rows == (15 - 8) * 4 * world and proof.changed == {}
    last, last_killed = final_manifest(whole), final_manifest(killed)
    assert last["tokens"] == last_killed["tokens"] and last["world"] == world
    assert digests(last) == digests(last_killed), "weights, optimizer and generators of every rank"


@pytest.mark.slow
@pytest.mark.fast
def test_rs08_ft05_an_error_in_the_middle_of_a_rollback_saves_nothing_and_equals_unbroken(tiny_runs: TinyRuns) -> None:
    """Weights of step 8 beside the position of step 15 are no state to save, and the log knows what was to be left out."""
    poison = [Fault("nan_loss", step, "forward") for step in (13, 14, 15)]
    whole = tiny_runs.running("whole", poison, max_steps=20)
    assert wait(whole, 200) == 0, whole.log_path.read_text()[-2000:]
    broken = tiny_runs.running("broken", [*poison, Fault("restore", 15, "rollback")], max_steps=20)
    assert wait(broken, 200) == 0, broken.log_path.read_text()[-2000:]
    assert [(r.to_step, r.failed_step) for r in read_records(broken.metrics_path) if isinstance(r, rec.Rewind)] == [
        (8, 15),
        (8, None),
    ]
    assert list(broken.emergency.iterdir()) == []
    want, got = steps(whole), steps(broken)
    assert sorted(got) == list(range(1, 21)) and all(got[step].loss == want[step].loss for step in want)
    last, last_broken = final_manifest(whole), final_manifest(broken)
    assert last["tokens"] == last_broken["tokens"] and digests(last) == digests(last_broken)


def digests(manifest: dict[str, Any]) -> dict[str, list[str]]:
    return {f["path"]: f["chunks"] for f in manifest["files"] if f["path"].endswith(".safetensors")}
