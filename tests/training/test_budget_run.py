"""C113, C139: a real run: what its checkpoint weighs, and the budget of its rest with the speed that it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_engine.monitoring.log import read_records
from lumina_engine.monitoring.record import Step

from .peak import corpus

ENGINE = [sys.executable, "-m", "lumina_engine.cli"]
KEYS = ["seq_length=64", "batch_size=2", "max_steps=40", "eval_interval=0", "save_interval=20", "num_workers=0"]
KEYS += ["eval_split=0", "best_metric=loss", "warmup_steps=2", "train_on=all", "packing=concat"]


def budget(folder: Path, *arguments: str) -> dict:
    done = subprocess.run([*ENGINE, "budget", *arguments, "--json"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("use_deepspeed=false", id="plain"),
        pytest.param("zero_stage=1 precision=bf16", id="bf16", marks=pytest.mark.slow),
    ],
)
def test_c139_c113_a_run_weighs_and_takes_what_its_budget_says(tmp_path: Path, mode: str) -> None:
    keys = [*KEYS, *mode.split(), f"train_data_path={corpus(tmp_path)}"]
    before = budget(tmp_path, "--preset", "debug", *keys)
    done = subprocess.run([*ENGINE, "train", "experiment_name=x", *keys], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "x"
    checkpoint = next((run / "checkpoints").glob("step-*40"))
    weighs = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert before["disk"]["checkpoint"] == pytest.approx(weighs, rel=0.02)
    assert before["basis"]["time"] == "guessed"

    after = budget(tmp_path, "--run", "x", "max_steps=240")
    assert after["basis"]["time"] == "measured" and after["time"]["steps_done"] == 40 and after["steps"] == 240
    assert after["time"]["basis"].startswith("measured: median of 30 steps of run x")
    rates = sorted(r.tokens_per_s for r in read_records(run / "metrics.jsonl") if isinstance(r, Step) and r.step > 10)
    assert rates[0] <= after["time"]["tokens_per_s"] <= rates[-1]
    seconds = 200 * after["tokens_per_step"] / after["time"]["tokens_per_s"]
    assert seconds < after["time"]["p50_h"] * 3600 < after["time"]["p90_h"] * 3600
    # a model with other operations: the same speed in operations
    wider = budget(tmp_path, "--run", "x", "moe_top_k=2")
    same = wider["time"]["tokens_per_s"] * wider["flops_per_token"]
    assert same == pytest.approx(after["time"]["tokens_per_s"] * after["flops_per_token"])
    assert "for other operations" in wider["time"]["basis"]


def test_c113_a_run_that_measured_nothing_is_guessed_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([*ENGINE, "budget", "--run", "nothing"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "no run" in done.stderr and "Traceback" not in done.stderr
    both = subprocess.run([*ENGINE, "budget", "--run", "x", "--preset", "b1"], capture_output=True, text=True, cwd=tmp_path)
    assert both.returncode == 2 and "--run takes the configuration of the run" in both.stderr
