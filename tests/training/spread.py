"""A program for tests: train a tiny model in several modes on several ranks and print {mode: figures} as JSON (rank 0).

    python spread.py DATA.jsonl OUT '{"mode": {config overrides}, …}'      under torch.distributed.run

Beside configuration keys a mode may have `idle_experts` (that many are never chosen on rank 1), `nan_at` (a step at which
the gradient of an expert of the last rank is not a number) and `resume_at` (a new trainer goes on from the checkpoint of that
step: `resumed` are its steps, `refused` is what a trainer with another expert_parallel_size says to it).
Figures: `steps` [[loss, balance, z, grad_norm, tokens, skipped]], `experts` [[load, dropped]] of the records, losses `eval`
and `eval_padded` (which has not one token on rank 1), `collectives` (all-to-alls of rank 0 in training). The final weights of
each mode lie in OUT/mode.safetensors, whole.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.config.schema import Config
from lumina_engine.data.store import open_data
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.monitoring.record import Experts, Step
from lumina_engine.training.comm import Comm
from lumina_engine.training.engine import StateMismatch
from lumina_engine.training.state import restore
from lumina_engine.training.trainer import EnhancedConversationTrainer
from tests.parity.rows import Records
from tests.training.tiny import TINY


class Counted:
    """`torch.distributed.all_to_all_single`, counting its calls."""

    def __init__(self) -> None:
        self.calls, self.exchange = 0, dist.all_to_all_single

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.exchange(*args, **kwargs)


class Poison:
    """A gradient hook that gives NaN at one of its calls, counted from 1."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return grad * math.nan if self.calls == self.at else grad


def trainer_of(config: Config, records: Records, comm: Comm, manager: Any = None) -> EnhancedConversationTrainer:
    tokenizer = ConversationTokenizer(config.tokenizer)
    return EnhancedConversationTrainer(DeepSeekTransformer(config), tokenizer, config, records, comm=comm, manager=manager)


def steps_of(records: Records) -> list[list[Any]]:
    return [[r.loss, r.aux_loss, r.z_loss, r.grad_norm, r.tokens, r.skipped] for r in records if isinstance(r, Step)]


def keep(trainer: EnhancedConversationTrainer, path: Path) -> None:
    """Write the whole weights. All ranks."""
    whole = trainer.engine.model_tensors()
    if trainer.comm.rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, path)


def train(data: str, out: Path, mode: str, overrides: dict[str, Any], comm: Comm) -> dict[str, Any]:
    idle, nan_at, resume_at = (overrides.pop(name, 0) for name in ("idle_experts", "nan_at", "resume_at"))
    config = Config(**{**TINY, "train_data_path": data, "data_cache_dir": str(out / "cache"), **overrides})
    config.save_interval = resume_at
    config.validate()
    store = open_data(config, ConversationTokenizer(config.tokenizer)).train
    records = Records()
    manager = CheckpointManager(config, run_dir=out / f"run {mode}", comm=comm) if resume_at else None
    trainer = trainer_of(config, records, comm, manager)
    for layer in trainer.model.expert_layers if idle and comm.rank == 1 else []:
        layer.router.bias[:idle] = -1e9
    if nan_at and comm.rank == comm.world_size - 1:
        trainer.model.expert_layers[0].w2.register_hook(Poison(nan_at))
    counted = dist.all_to_all_single = Counted()
    try:
        trainer.train(store)
    finally:
        dist.all_to_all_single = counted.exchange
    keep(trainer, out / f"{mode}.safetensors")
    more = {} if manager is None else resume(config, store, manager, resume_at, out / f"{mode} resumed.safetensors", comm)
    return more | {
        "steps": steps_of(records),
        "experts": [[r.load, r.dropped] for r in records if isinstance(r, Experts)],
        "eval": trainer.evaluate(store, max_batches=0)["loss"],
        "eval_padded": trainer.evaluate(store, max_batches=1)["loss"],
        "collectives": counted.calls,
    }


def resume(config: Config, store: Any, manager: CheckpointManager, step: int, path: Path, comm: Comm) -> dict[str, Any]:
    loaded = manager.load(manager.checkpoints / f"step-{step:06d}")
    records = Records()
    trainer = trainer_of(config, records, comm)
    trainer.prepare(store)
    restore(trainer, loaded)
    trainer.train(store)
    keep(trainer, path)
    other = trainer_of(config.model_copy(update={"expert_parallel_size": 1, "overlap_alltoall": False}), Records(), comm)
    other.prepare(store)
    try:
        restore(other, loaded)
        refused = ""
    except StateMismatch as error:
        refused = str(error)
    return {"resumed": steps_of(records), "refused": refused}


def main() -> None:
    data, out, modes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    comm = Comm.start("gloo")
    found = {mode: train(data, out, mode, overrides, comm) for mode, overrides in modes.items()}
    if comm.rank == 0:
        print("FIGURES " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
