"""RS06, C81: a run goes on with another number of ranks, another stage, another engine; the same batches and losses.

The fault seed is the training seed too, and draws the steps at which the chains of RS06 change ranks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint.consolidate import KINDS, consolidate
from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.config.schema import Config
from lumina_engine.run.launch import wait
from tests.launch import last_line, launch
from tests.parity.modes import write_data
from tests.training.test_resume import conversations, kill_rank_at, steps, train
from tests.training.zero_ranks import STEPS

PROGRAM = Path(__file__).with_name("world_ranks.py")
PLAIN = {"use_deepspeed": False}
UNEVEN = {"hidden_size": 65, "head_dim": 34, "num_experts": 4, "stage3_param_persistence_threshold": 100}
SPREAD = {**PLAIN, "expert_parallel_size": 2}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_stage": stage, **more}


# chain -> parts with 1 rank, then with 2, then with 1: (step at which it is given up, overrides)
CHAINS: dict[str, tuple[list[Any], list[Any], list[Any]]] = {
    "world plain": ([[2, PLAIN]], [[4, PLAIN]], [[STEPS, PLAIN]]),
    "world zero1": ([[2, zero(1)]], [[4, zero(1)]], [[STEPS, zero(1)]]),
    "world zero3": ([[2, zero(3)]], [[4, zero(3)]], [[STEPS, zero(3)]]),
    "stages": ([[1, zero(0)], [2, zero(1)]], [[3, zero(2)], [4, zero(3)]], [[5, zero(1)], [STEPS, PLAIN]]),
    "offload": ([[2, zero(2, cpu_offload_optimizer=True)]], [[4, zero(3)]], [[STEPS, zero(3, cpu_offload=True)]]),
    "experts": ([[2, PLAIN]], [[3, SPREAD], [4, zero(2, expert_parallel_size=2)]], [[STEPS, zero(2)]]),
    "bf16": ([[2, zero(2, precision="bf16")]], [[4, zero(3, precision="bf16")]], [[STEPS, zero(1, precision="bf16")]]),
    "to fp32": ([[2, zero(2, precision="bf16")]], [[4, zero(3, precision="bf16")]], [[STEPS, PLAIN]]),
}
UNBROKEN = {"fp32": [[STEPS, zero(1)]], "bf16 unbroken": [[STEPS, zero(2, precision="bf16")]]}


def drawn(seed: int) -> dict[str, list[list[Any]]]:
    """The chains; those that only change their ranks do so at two steps drawn for each."""
    chance, chains = random.Random(f"{seed}:world"), {}
    for name, three in CHAINS.items():
        if name.startswith("world"):
            stops = [*sorted(chance.sample(range(1, STEPS), 2)), STEPS]
            chains[name] = [[[stop, keys]] for stop, [[_, keys]] in zip(stops, three, strict=True)]
        else:
            chains[name] = list(three)
    return chains


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, fault_seed: int) -> dict[str, Any]:
    folder, seed = tmp_path_factory.mktemp("world"), fault_seed
    own, chains = {**UNEVEN, "seed": seed}, drawn(seed)
    out: dict[str, Any] = {
        "folder": str(folder),
        "left by two ranks": {name: two[-1][0] for name, (_, two, _) in chains.items()},
    }
    data = str(write_data(folder))
    for number, ranks in enumerate((1, 2, 1)):
        parts = {chain: [[stop, own | keys] for stop, keys in three[number]] for chain, three in chains.items()}
        if number == 0:
            parts |= {chain: [[stop, own | keys] for stop, keys in one] for chain, one in UNBROKEN.items()}
        done = launch(PROGRAM, ranks, data, str(folder), json.dumps(parts), XDG_STATE_HOME=str(folder / "state"))
        for chain, rows in last_line(done, "PARTS ").items():
            out.setdefault(chain, []).extend(rows)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_rs06_other_ranks_and_stages_go_on_with_the_same_batches(
    found: dict[str, Any], chain: str, figure: Callable[[str, object], None]
) -> None:
    want = found["bf16 unbroken" if chain in ("bf16", "to fp32") else "fp32"]
    got = found[chain]
    assert [row[0] for row in got] == list(range(1, STEPS + 1))
    assert [row[3] for row in got] == [row[3] for row in want]  # tokens, so the same global batches
    bound = 1e-6 if "16" not in chain and "fp32" not in chain else 5e-3
    if chain.startswith("world"):
        figure(
            "largest difference of a loss", float(f"{max(abs(a[1] / b[1] - 1) for a, b in zip(got, want, strict=True)):.1e}")
        )
    for row, other in zip(got, want, strict=True):
        assert row[1] == pytest.approx(other[1], rel=bound) and row[2] == pytest.approx(other[2], rel=20 * bound)


@pytest.mark.slow
def test_c081_consolidate_of_two_ranks_at_stage_3(found: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint that two ranks left at stage 3 as one of one rank: whole tensors, the same values."""
    step = found["left by two ranks"]["world zero3"]
    source = Path(found["folder"]) / "world zero3" / "checkpoints" / f"step-{step:06d}"
    path = Path(consolidate(source, tmp_path / "out")["path"])
    reader = CheckpointManager(Config(), tmp_path / "nobody")
    two, one = (reader.load(folder, same_config=False) for folder in (source, path))
    assert (two.manifest["world"], one.manifest["world"]) == (2, 1)
    saved, trained = two.saved_state(), [name for name in one.model if not name.endswith("router.bias")]
    assert not any(name.startswith("master.") for name in one.rank_tensors)  # the weights are fp32 themselves
    assert all(torch.equal(saved.master(name, 0, one.model[name].numel()), one.model[name].reshape(-1)) for name in trained)
    for kind in KINDS[1:]:
        for name in trained:
            tensor = one.rank_tensors[f"{kind}.{name}"]
            part = saved.part(kind, name, 0, tensor.numel())
            assert (
                tensor.shape == one.model[name].shape and part is not None and torch.equal(part.reshape(tensor.shape), tensor)
            )


@pytest.mark.slow
def test_c081_train_resume_with_other_ranks_and_stage(tmp_path: Path) -> None:
    """Through the command line: one plain process, killed; two ranks at stage 2; one again: as never stopped."""
    data = conversations(tmp_path / "train.jsonl")
    keys = ("max_steps=16", "dropout=0", "router_jitter_noise=0", "curriculum_learning=false", "use_deepspeed=false")
    whole = train(tmp_path, "whole", data, *keys)
    run = train(tmp_path, "moved", data, *keys)
    assert wait(whole, 180) == 0, whole.log_path.read_text()[-2000:]
    kill_rank_at(run, 6)
    train(tmp_path, "moved", data, "--resume", "num_gpus=2", "batch_size=2", "use_deepspeed=true", "zero_stage=2")
    kill_rank_at(run, 11)
    train(tmp_path, "moved", data, "--resume", "num_gpus=1", "batch_size=4", "zero_stage=1")
    assert wait(run, 180) == 0, run.log_path.read_text()[-2000:]
    want, got = steps(whole), steps(run)
    assert sorted(got) == sorted(want) == list(range(1, 17))
    for step in want:
        assert got[step].tokens == want[step].tokens and got[step].loss == pytest.approx(want[step].loss, rel=1e-6), step
