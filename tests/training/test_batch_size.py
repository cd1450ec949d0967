"""dynamic_batching: the largest micro batch under a memory cap, for real, in the same global batch (C75, R42)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina_engine.config.checks import check
from lumina_engine.config.machine import GB, Machine
from lumina_engine.config.micro_batch import candidates, smaller, split
from lumina_engine.config.resolve import resolve
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.launch import wait
from lumina_engine.training.batch_size import Tries, Try, fit, judge, largest
from lumina_engine.training.comm import Comm
from lumina_engine.training.memory import DoesNotFit, Peak
from lumina_engine.training.settle import NoRoom, Settler
from lumina_engine.training.trial import TrialError, run_trial
from tests.waiting import until

from .test_resume import conversations, steps

ROOT = Path(__file__).resolve().parents[2]
# Much memory and little to compute: narrow layers, so that twice the rows is a step of hundreds of megabytes.
WIDE = {
    "vocab_size": 1024,
    "tokenizer": "lumina-1k",
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 1,
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "dense_intermediate_size": 64,
    "use_moe": False,
    "seq_length": 512,
    "rope_theta": 10000.0,
    "precision": "fp32",
    "use_deepspeed": False,
    "zero_stage": 0,
    "dynamic_batching": True,
    "min_batch_size": 16,
    "max_batch_size": 64,
    "batch_size": 4,
    "gradient_accumulation_steps": 16,
    "target_memory_usage": 0.98,
}


def config(**keys: Any) -> Config:
    return Config(**{"dynamic_batching": True, "tokenizer": "lumina-1k", **keys})


@given(rows=st.integers(1, 400), low=st.integers(1, 40), width=st.integers(0, 60), limit=st.integers(0, 100))
def test_c075_the_largest_divisor_that_fits(rows: int, low: int, width: int, limit: int) -> None:
    sizes = candidates(config(batch_size=1, gradient_accumulation_steps=rows, min_batch_size=low, max_batch_size=low + width))
    assert sizes == [n for n in range(low, low + width + 1) if rows % n == 0]
    if not sizes:
        return
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest(sizes, fits) == max((n for n in sizes if n <= limit), default=None)
    assert len(tried) == len(set(tried)) <= 1 + len(sizes).bit_length()


def test_c075_the_global_batch_is_kept_exactly() -> None:
    given_config = config(batch_size=6, gradient_accumulation_steps=4)
    assert candidates(given_config) == [1, 2, 3, 4, 6, 8, 12, 24]
    for size in candidates(given_config):
        changed = given_config.model_copy(update=split(given_config, size))
        assert changed.batch_size * changed.gradient_accumulation_steps == 24
    with pytest.raises(ValueError, match="do not make up 24"):
        split(given_config, 5)


@pytest.mark.parametrize(("rows", "steps", "want"), [(8, 1, 4), (6, 1, 3), (3, 1, 1), (9, 2, 3), (1, 8, None)])
def test_r42_half_the_rows_or_the_next_that_divides(rows: int, steps: int, want: int | None) -> None:
    given_config = Config(batch_size=rows, gradient_accumulation_steps=steps)
    assert smaller(given_config) == want
    assert smaller(config(batch_size=8, min_batch_size=8)) is None


def test_c075_bounds_that_leave_nothing_are_an_error() -> None:
    found = [f for f in check(config(batch_size=6, min_batch_size=4, max_batch_size=5)) if f.severity == "error"]
    assert [f.code for f in found] == ["batch_bounds"] and "divides the 6 rows" in found[0].line()
    found = check(Config(tokenizer="lumina-1k", max_batch_size=64))
    assert [f.code for f in found] == ["switched_off"]


def test_c075_what_is_planned_is_the_least_that_may_be_chosen() -> None:
    large = {"hidden_size": 512, "seq_length": 2048, "batch_size": 64, "max_batch_size": 64, "loss_chunk_size": 2048}
    machine = Machine([], 8 * GB, 4, None)
    assert [f.code for f in check(config(**large, dynamic_batching=False), machine) if f.severity == "error"]
    assert not [f for f in check(config(**large), machine) if f.severity == "error"]
    resolved = resolve(config(**large), machine, tokenizer_vocab=1024)
    assert resolved.batch_size * resolved.gradient_accumulation_steps == 64 and resolved.batch_size == 1


def test_c075_the_peak_nearest_to_its_limit_decides() -> None:
    found = [Peak("resident memory", 500, 1000), Peak("address space", 900, 1000)]
    assert judge(found, 0.9).fits and not judge(found, 0.8).fits
    assert judge(found, 0.8).why.startswith("address space")


def test_c075_what_was_tried_is_kept_by_all_that_decides_it(tmp_path: Path) -> None:
    keys = config(seq_length=64, zero_stage=0, precision="fp32", vocab_size=1024, data_cache_dir=str(tmp_path))
    tries = Tries(keys, Comm(), {"torch": "1"})
    tries.note("8x1", Try(True, "enough"))
    again = Tries(keys.model_copy(update={"batch_size": 7, "num_epochs": 9}), Comm(), {"torch": "1"})
    assert again.tried == {"8x1": Try(True, "enough")} and again.too_large is None
    again.ran_out(32)
    assert Tries(keys, Comm(), {"torch": "1"}).too_large == 17
    for changes in ({"hidden_size": 64}, {"precision": "bf16"}, {"target_memory_usage": 0.5}, {"zero_stage": 1}):
        assert Tries(keys.model_copy(update=changes), Comm(), {"torch": "1"}).tried == {}
    assert Tries(keys, Comm(), {"torch": "2"}).tried == {}
    plain = keys.model_copy(update={"use_deepspeed": False})  # without the blocks that tell DeepSpeed of it
    Tries(plain, Comm(), {}).note("8x1", Try(True, "enough"))
    assert Tries(plain, Comm(), {}).tried and not Tries(plain.model_copy(update={"precision": "bf16"}), Comm(), {}).tried
    tries.path.write_text("{")
    assert Tries(keys, Comm(), {"torch": "1"}).tried == {}


def test_c075_a_known_answer_needs_no_try_and_a_size_that_ran_out_is_not_chosen(tmp_path: Path) -> None:
    base = {"seq_length": 64, "zero_stage": 0, "precision": "fp32", "vocab_size": 1024, "data_cache_dir": str(tmp_path)}
    keys = config(**base, batch_size=2, gradient_accumulation_steps=4)
    tries = Tries(keys, Comm(), {})
    for name in ("8x1", "4x2"):
        tries.note(name, Try(True, "enough"))
    changed, line = fit(keys, Comm(), tries, pytest.fail)
    assert (changed.batch_size, changed.gradient_accumulation_steps) == (8, 1) and "known from an earlier start" in line
    tries.ran_out(8)
    assert fit(keys, Comm(), tries, pytest.fail)[0].batch_size == 4
    for name in ("1x2", "2x2", "4x2"):
        tries.note(name, Try(False, "too much"))
    with pytest.raises(DoesNotFit, match="1 rows of 64 tokens does not fit: set gradient_checkpointing=true") as caught:
        fit(keys, Comm(), tries, pytest.fail)
    assert caught.value.exit_code == 2 and caught.value.final


def test_r42_recovery_halves_the_micro_batch_or_ends_with_advice(tmp_path: Path) -> None:
    records: list[Any] = []
    settler = Settler(Config(batch_size=6, gradient_accumulation_steps=2), Comm(), records.append, lambda step, section: None)
    changed = settler.after_out_of_memory(40)
    assert (changed.batch_size, changed.gradient_accumulation_steps) == (3, 4)
    assert [(r.what, r.before, r.after, r.by, r.step) for r in records if isinstance(r, rec.Change)] == [
        ("batch_size", 6, 3, "recovery", 40),
        ("gradient_accumulation_steps", 2, 4, "recovery", 40),
    ]
    settler.config = changed.model_copy(update={"batch_size": 1})
    with pytest.raises(NoRoom, match="set gradient_checkpointing=true, lower seq_length") as caught:
        settler.after_out_of_memory(40)
    assert caught.value.exit_code == 93


def test_c075_a_killed_try_is_survived_and_an_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LUMINA_RANK_SOCKET", "/nowhere")
    outcomes = {
        how: run_trial("tests.training.trials", Config(batch_size=7), Comm(), {"how": how})[0] for how in ("", "killed")
    }
    assert outcomes[""].result == {"rows": 7, "alone": "1", "channel": None} and not outcomes[""].out_of_memory
    assert outcomes["killed"].out_of_memory and outcomes["killed"].text == "killed by SIGKILL"
    assert run_trial("tests.training.trials", Config(), Comm(), {"how": "memory"})[0].text == "out of memory"
    with pytest.raises(TrialError, match="trials: the trial ended with exit code 1"):
        run_trial("tests.training.trials", Config(), Comm(), {"how": "wrong"})


@pytest.mark.slow
def test_c075_a_try_that_one_rank_loses_is_lost_for_all(tmp_path: Path) -> None:
    """The other rank's process would wait for ever: it is ended, and every rank learns the same."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    launch += ["--master-port", str(31_500 + os.getpid() % 2000), "-m", "tests.training.trials"]
    done = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    assert json.loads(lines[-1].removeprefix("FOUND ")) == [[[None, False], [-9, True]]] * 2


def capped(cap: int, cache: Path, *sizes: int) -> Any:
    words = [sys.executable, "-m", "tests.training.trials", str(cap), str(cache), json.dumps(WIDE), *map(str, sizes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("FOUND ")), done.stderr


@pytest.mark.slow
def test_c075_the_largest_batch_under_a_memory_cap_is_found(tmp_path: Path) -> None:
    free, _ = capped(1 << 40, tmp_path / "free", 16, 32)
    need = [next(p["used"] for p in one["peaks"] if p["kind"] == "address space") for one in free]
    assert need[1] - need[0] > 100_000_000, "the cap could not tell the two apart"
    cap = int((need[0] + need[1]) / 2 / WIDE["target_memory_usage"])  # type: ignore[operator]
    found, errors = capped(cap, tmp_path / "cache")
    assert found["batch"] == [16, 4], found
    assert {name: item["fits"] for name, item in found["tried"].items()} == {"64x1": False, "16x2": True, "32x2": False}
    assert found["tried"]["64x1"]["why"] == "out of memory" and "a trial ran out of memory" in errors


NARROW = [
    *("hidden_size=64", "num_layers=2", "num_heads=1", "num_kv_heads=1", "intermediate_size=512", "use_moe=false"),
    *("tokenizer=lumina-1k", "seq_length=512", "rope_theta=10000", "learning_rate=3e-3", "warmup_steps=2"),
    *(
        "max_steps=6",
        "num_epochs=50",
        "save_interval=0",
        "eval_interval=0",
        "eval_split=0",
        "num_workers=0",
        "use_deepspeed=false",
    ),
]


@pytest.mark.slow
def test_r42_out_of_memory_in_a_step_goes_on_with_half_the_micro_batch(tmp_path: Path) -> None:
    """The rank's address space is closed at what it has now, so its next large tensor finds no room: a real want of memory.
    (malloc is told to map large tensors one by one; what it keeps by itself would have room for the step.)

    It is compared with a run whose micro batch was found before the start, as large as this one's.
    """
    data = conversations(tmp_path / "train.jsonl")
    found = ("dynamic_batching=true", "batch_size=4", "gradient_accumulation_steps=8", "min_batch_size=4")
    whole = launched(tmp_path, "whole", data, *found)
    assert wait(whole, 200) == 0
    chosen = Config.load(whole.config_path)
    assert (chosen.batch_size, chosen.gradient_accumulation_steps) == (32, 1)  # C75
    run = launched(tmp_path, "broken", data, "batch_size=32")
    until(lambda: len(steps(run)) >= 2, "two steps", deadline=120)
    owner = run.owner()
    assert owner is not None
    for rank in psutil.Process(owner.pid).children():
        with rank.oneshot():
            rank.rlimit(psutil.RLIMIT_AS, (rank.memory_info().vms, psutil.RLIM_INFINITY))
    assert wait(run, 200) == 0, run.log_path.read_text()[-3000:]
    records = list(read_records(run.metrics_path))
    changes = [(r.what, r.before, r.after, r.by) for r in records if isinstance(r, rec.Change)]
    assert changes == [("batch_size", 32, 16, "recovery"), ("gradient_accumulation_steps", 1, 2, "recovery")]
    assert next(r.to_step for r in records if isinstance(r, rec.Rewind)) >= 2, "it went on from the step before, not from 0"
    assert "out of memory with micro batches of 32 rows" in next(
        r.reason for r in records if getattr(r, "state", "") == "crashed"
    )
    want, got = steps(whole), steps(run)
    assert sorted(got) == sorted(want) == list(range(1, 7))
    assert all(got[n].loss == pytest.approx(want[n].loss, rel=1e-5) and got[n].batch == want[n].batch for n in want)
    assert all(got[n].tokens == want[n].tokens for n in want)
    kept = Config.load(run.config_path)
    assert (kept.batch_size, kept.gradient_accumulation_steps) == (16, 2)


def launched(root: Path, name: str, data: Path, *more: str) -> RunDirectory:
    words = [sys.executable, "-m", "lumina_engine.cli", "train", "--runs", str(root), "--run", name, "--detach", *NARROW]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(root / "state"), "MALLOC_MMAP_THRESHOLD_": "131072"}
    keys = [f"train_data_path={data}", f"data_cache_dir={root / 'cache'}"]
    done = subprocess.run([*words, *keys, *more], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return RunDirectory(root / name)
