"""The same losses from every engine, ZeRO stage and number of ranks for the same global batch (C54, C70, C72, R02, R03)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .losses import write_conversations

SCRIPT = Path(__file__).with_name("losses.py")
STAGES = (0, 1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("parity") / "train.jsonl")


def losses(data: Path, modes: dict[str, dict], ranks: int = 1) -> dict[str, list]:
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    if ranks > 1:
        launch += ["--master-addr", "127.0.0.1", "--master-port", str(29_500 + os.getpid() % 2000)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    done = subprocess.run([*launch, str(SCRIPT), str(data), json.dumps(modes)], capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOSSES ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("LOSSES "))


def modes(batch_size: int, accumulation: int = 1, **more: object) -> dict[str, dict]:
    shared = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, **more}
    plain = {"plain": {**shared, "use_deepspeed": False}}
    return plain | {f"zero{stage}": {**shared, "zero_stage": stage} for stage in STAGES}


@pytest.fixture(scope="module")
def one_rank(data: Path) -> dict[str, list]:
    return losses(data, modes(8))


def worst(a: list, b: list, column: int = 0) -> float:
    assert len(a) == len(b) == 20
    return max(abs(x[column] - y[column]) for x, y in zip(a, b, strict=True))


def test_c054_every_stage_equals_plain_torch_on_one_rank(one_rank: dict[str, list]) -> None:
    first, last = one_rank["plain"][0], one_rank["plain"][-1]
    assert last[0] < 0.8 * first[0]  # it learns, so equality says something
    for stage in STAGES:
        assert worst(one_rank[f"zero{stage}"], one_rank["plain"]) < 1e-5
        pairs = zip(one_rank[f"zero{stage}"], one_rank["plain"], strict=True)
        assert all(a[2] == pytest.approx(b[2], rel=1e-4) for a, b in pairs)  # gradient norms


def test_c070_two_ranks_equal_one_rank_of_the_same_global_batch(data: Path, one_rank: dict[str, list]) -> None:
    for mode, rows in losses(data, modes(4), ranks=2).items():
        assert worst(rows, one_rank["plain"]) < 1e-5, mode
        assert worst(rows, one_rank["plain"], 1) < 1e-5, mode  # the balance loss is over the global batch
        assert [row[3] for row in rows] == [row[3] for row in one_rank["plain"]], mode  # the same tokens


def test_c072_accumulation_equals_one_large_micro_batch(data: Path) -> None:
    """Uneven padding between micro batches. Without the balance loss, whose shares a micro batch cannot know ahead."""
    whole = losses(data, {"plain": {"batch_size": 8, "use_deepspeed": False, "load_balancing_weight": 0.0}})["plain"]
    for mode, rows in losses(data, modes(2, 4, load_balancing_weight=0.0)).items():
        assert worst(rows, whole) < 1e-5, mode


def test_c054_bf16_agrees_to_its_precision(data: Path) -> None:
    rows = losses(data, {m: {**o, "precision": "bf16"} for m, o in modes(8).items() if m != "zero0"})
    for stage in (1, 2):
        assert worst(rows[f"zero{stage}"], rows["plain"]) < 2e-2
