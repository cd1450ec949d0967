"""A run killed twice goes on bit for bit (RS02, FT; issue: exact resume), through the real command line and supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records, surviving
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.launch import wait
from tests.waiting import until

KEYS = [
    *(
        "hidden_size=64",
        "num_layers=2",
        "num_heads=2",
        "num_kv_heads=1",
        "intermediate_size=96",
        "num_experts=4",
        "moe_top_k=2",
    ),
    *("tokenizer=lumina-1k", "seq_length=64", "rope_theta=10000", "batch_size=4", "num_workers=0", "learning_rate=3e-3"),
    *("max_steps=30", "save_interval=5", "eval_interval=10", "eval_batches=2", "warmup_steps=4", "max_restarts=0"),
    *("dropout=0.1", "router_jitter_noise=0.01", "router_bias_rate=0.001", "expert_log_interval=3"),
    *("curriculum_learning=true", "min_seq_length=16", "curriculum_steps=20"),  # both kills fall into its ramp
]


def conversations(path: Path) -> Path:
    with path.open("w") as stream:
        for i in range(400):
            turns = [
                {"role": "user", "content": f"say {i} and {i * 7 % 31}"},
                {"role": "assistant", "content": f"{i} and {i * 7 % 31}"},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return path


def train(root: Path, name: str, data: Path, *more: str) -> RunDirectory:
    words = [sys.executable, "-m", "lumina_engine.cli", "train", "--runs", str(root), "--run", name, "--detach"]
    if "--resume" not in more:
        words += [*KEYS, f"train_data_path={data}", f"data_cache_dir={root / 'cache'}"]
    words += more
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(root / "state")}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return RunDirectory(root / name)


def steps(run: RunDirectory) -> dict[int, rec.Step]:
    return {r.step: r for r in surviving(read_records(run.metrics_path)) if isinstance(r, rec.Step)}


def kill_rank_at(run: RunDirectory, step: int) -> None:
    """SIGKILL the worker once `step` is in the log and a checkpoint is committed; returns when the run is over."""

    def reached() -> bool:
        last = [r for r in read_records(run.metrics_path) if isinstance(r, rec.Step | rec.Rewind)]
        return bool(last) and isinstance(last[-1], rec.Step) and last[-1].step >= step and run.newest_step() is not None

    until(reached, f"step {step}", deadline=120)
    owner = run.owner()
    assert owner is not None
    for child in psutil.Process(owner.pid).children():
        os.kill(child.pid, signal.SIGKILL)
    until(lambda: not run.alive, "the supervisor's end", deadline=120)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, RunDirectory]:
    root = tmp_path_factory.mktemp("resume")
    data = conversations(root / "train.jsonl")
    run = train(root, "unbroken", data)
    assert wait(run, 180) == 0, run.log_path.read_text()[-2000:]
    return root, data, run


def test_rs02_killed_twice_equals_unbroken(unbroken: tuple[Path, Path, RunDirectory]) -> None:
    root, data, whole = unbroken
    run = train(root, "killed", data)
    kill_rank_at(run, 8)
    assert run.info().state == "failed" and "SIGKILL" in (run.info().reason or "")
    train(root, "killed", data, "--resume")
    kill_rank_at(run, 17)
    train(root, "killed", data, "--resume")
    assert wait(run, 180) == 0, run.log_path.read_text()[-2000:]
    want, got = steps(whole), steps(run)
    assert sorted(got) == sorted(want) == list(range(1, 31))
    for step in want:
        for name in ("loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens", "epoch", "seq_length", "batch"):
            assert getattr(got[step], name) == getattr(want[step], name), (step, name)
    shapes = [(want[step].seq_length, want[step].batch) for step in sorted(want)]
    assert shapes == [(16, 16)] * 10 + [(32, 8)] * 10 + [(64, 4)] * 10  # C74
    records = list(read_records(run.metrics_path))
    assert [r.seq for r in records] == list(range(1, len(records) + 1))
    assert len([r for r in records if isinstance(r, rec.Rewind)]) == 2
    proofs = [r for r in records if isinstance(r, rec.Resume)]
    assert [(r.step, r.changed) for r in proofs] == [(r.to_step, {}) for r in records if isinstance(r, rec.Rewind)]
    for proof in proofs:
        assert proof.lr == want[proof.step + 1].lr and proof.tokens == want[proof.step].tokens
        assert len(proof.rng) == 1 and proof.samples


@pytest.mark.slow
def test_c020_spread_experts_killed_equals_unbroken_and_talks(unbroken: tuple[Path, Path, RunDirectory]) -> None:
    """Two ranks with half of the experts each: the same, and the checkpoint has all of them for one process to talk to."""
    root, data, _ = unbroken
    spread = ("num_gpus=2", "expert_parallel_size=2", "overlap_alltoall=true", "use_deepspeed=false", "max_steps=14")
    whole = train(root, "spread", data, *spread)
    assert wait(whole, 180) == 0, whole.log_path.read_text()[-2000:]
    run = train(root, "spread-killed", data, *spread)
    kill_rank_at(run, 8)
    train(root, "spread-killed", data, "--resume")
    assert wait(run, 180) == 0, run.log_path.read_text()[-2000:]
    want, got = steps(whole), steps(run)
    assert sorted(got) == sorted(want) == list(range(1, 15))
    for step in want:
        for name in ("loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens", "epoch"):
            assert getattr(got[step], name) == getattr(want[step], name), (step, name)
    words = [sys.executable, "-m", "lumina_engine.cli", "chat", str(run.checkpoints / "step-000014"), "--json"]
    words += ["--prompt", "say 3 and 21", "--temperature", "0", "--max-new-tokens", "8"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "XDG_STATE_HOME": str(root / "state")})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] > 0


@pytest.mark.slow
@pytest.mark.fast
def test_rs07_changed_data_is_refused(unbroken: tuple[Path, Path, RunDirectory]) -> None:
    root, data, _ = unbroken
    mine = root / "changing.jsonl"
    mine.write_bytes(data.read_bytes())
    run = train(root, "changed", mine)
    kill_rank_at(run, 6)
    mine.write_bytes(data.read_bytes().replace(b"say 7 and", b"say 8 and"))
    train(root, "changed", mine, "--resume")
    assert wait(run, 180) == 65
    assert "data changed" in (run.info().reason or "") and "--accept-data-change" in (run.info().reason or "")
    assert f"{mine} changed" in (run.info().reason or "")
    newest = run.newest_step() or 0
    train(root, "changed", mine, "--resume", "--accept-data-change")
    assert wait(run, 180) == 0, run.log_path.read_text()[-2000:]
    records = [r for r in read_records(run.metrics_path) if r.inc == run.info().inc]
    assert [r.code for r in records if isinstance(r, rec.Alert)] == ["data_changed"]
    proof = next(r for r in records if isinstance(r, rec.Resume))
    assert proof.step == newest and list(proof.changed) == ["data"]
    manifests = [json.loads(path.read_text()) for path in run.checkpoints.glob("step-*[0-9]/MANIFEST.json")]
    marked = {m["step"]: m["flags"].get("overrides") for m in manifests if m["step"] > newest}
    then, now = proof.changed["data"]
    assert len(marked) >= 2
    for marks in marked.values():  # every later manifest says so
        (mark,) = marks
        assert (mark["what"], mark["step"]) == ("data", newest)
        assert (mark["before"][:16], mark["after"][:16]) == (then, now)


def test_rs07_accepting_needs_a_resume(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "lumina_engine.cli",
        "train",
        "--runs",
        str(tmp_path),
        "--run",
        "new",
        "--accept-data-change",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "add --resume" in done.stderr and not (tmp_path / "new").exists()


def test_resume_refuses_a_key_that_must_not_change(unbroken: tuple[Path, Path, RunDirectory]) -> None:
    root, _, run = unbroken
    words = [
        sys.executable,
        "-m",
        "lumina_engine.cli",
        "train",
        "--runs",
        str(root),
        "--run",
        run.name,
        "--resume",
        "hidden_size=128",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "hidden_size" in done.stderr and "Traceback" not in done.stderr
