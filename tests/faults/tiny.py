"""Rig T: the real trainer with a tiny mixture of experts and dropout in this process, a few milliseconds a step.

`Tiny(folder, name)` makes a trainer as the worker does; those of one folder share data, those of one name checkpoints. What a
resume must give back is one dictionary, `Tiny.state`: equal dictionaries are equal runs.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumina_engine.checkpoint.manager import CheckpointManager, Loaded
from lumina_engine.config.machine import GB, Machine
from lumina_engine.config.resolve import resolve
from lumina_engine.config.schema import Config
from lumina_engine.data.batch import TrainLoader
from lumina_engine.data.store import Data, open_data
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.monitoring import record as rec
from lumina_engine.run.rank import Command, NullChannel
from lumina_engine.training.comm import Comm
from lumina_engine.training.proof import resume_proof, rng_digest
from lumina_engine.training.state import restore
from lumina_engine.training.trainer import EnhancedConversationTrainer
from tests.training.observed import BASE, conversations

MACHINE = Machine([], 16 * GB, 2, None)
KEYS: dict[str, Any] = {
    **BASE,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
    "seq_length": 32,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "router_jitter_noise": 0.01,
    "router_bias_rate": 0.01,
    "num_epochs": 20,
    "max_steps": 24,
    "eval_interval": 0,
    "eval_split": 0.0,
    "save_interval": 0,
    "keep_checkpoints": 100,
    "expert_log_interval": 5,
    "log_interval": 1,
}


class Records(list[Any]):
    """A logger that keeps every record."""

    def emit(self, record: Any) -> None:
        self.append(record)


class Channel(NullChannel):
    """Calls `at(step, section)` at each report, and gives the commands of `commands[step]` at the boundary of that step."""

    def __init__(self) -> None:
        self.at: Callable[[int, str], None] = lambda step, section: None
        self.commands: dict[int, list[Command]] = {}
        self.step = 0

    def report(self, step: int, section: str) -> None:
        self.step = step
        self.at(step, section)

    def poll(self) -> list[Command]:
        return self.commands.pop(self.step, [])


class Tiny:
    """One start of a tiny run."""

    def __init__(self, folder: Path, name: str = "run", comm: Comm | None = None, documents: int = 60, **keys: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "train.jsonl"
        if not data.exists():
            conversations(data, documents)
        own = {"data_cache_dir": str(folder / "cache"), "train_data_path": str(data)}
        self.comm = comm or Comm()
        tokenizer = ConversationTokenizer(KEYS["tokenizer"])
        given = Config(**(KEYS | own | keys))
        self.config = resolve(given, MACHINE, tokenizer_vocab=tokenizer.get_vocab_size(), world=self.comm.world_size)
        self.data: Data = open_data(self.config, tokenizer)
        _seed(self.config.seed)
        model = DeepSeekTransformer(self.config)
        model.init_weights(self.config.seed)
        self.records, self.channel = Records(), Channel()
        self.manager = CheckpointManager(self.config, run_dir=folder / name, comm=self.comm, run_id=name)
        self.trainer = EnhancedConversationTrainer(
            model, tokenizer, self.config, self.records, comm=self.comm, manager=self.manager, channel=self.channel
        )
        _seed(self.config.seed)
        self.trainer.prepare(self.data.train, self.data.eval)
        self.rows: dict[int, list[int]] = {}  # step -> planned rows that this rank took
        self._watch_rows()

    def _watch_rows(self) -> None:
        inner = self.trainer._step

        def step(micro_batches: list[Any], begin: float, data_time: float) -> None:
            self.rows[self.trainer.progress.step + 1] = [row for batch in micro_batches for row in batch.rows]
            inner(micro_batches, begin, data_time)

        self.trainer._step = step  # type: ignore[method-assign]

    def resume(self, step: int | None = None, change: Callable[[Loaded], None] = lambda loaded: None) -> rec.Resume:
        """Put back the checkpoint of `step` (default: the newest), after whatever `change` does to it; the proof."""
        _seed(99)  # a start of another process: nothing is left of the generators
        path = self.manager.recover() if step is None else self.manager.path_of(step)
        assert path is not None
        loaded = self.manager.load(path)
        self.manager.rewind(loaded.step)
        change(loaded)
        restore(self.trainer, loaded)
        return resume_proof(self.trainer, loaded)

    def train(self, until: int | None = None) -> dict[str, Any]:
        """Train to the end, or to the boundary of step `until`; the summary."""
        if until is not None:
            self.trainer.total_steps = until  # the schedule keeps its length
        summary = self.trainer.train(self.data.train, self.data.eval)
        self.manager.close()
        return summary

    @property
    def losses(self) -> dict[int, list[Any]]:
        """What each step's record says, but for times."""
        names = ("loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens", "epoch", "skipped")
        steps = [r for r in self.records if isinstance(r, rec.Step)]
        return {r.step: [_exact(getattr(r, name)) for name in names] for r in steps}

    def alerts(self) -> list[str]:
        return [r.code for r in self.records if isinstance(r, rec.Alert)]

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run must have again, each part as a value that compares bit for bit."""
        trainer = self.trainer
        progress = {k: v for k, v in trainer.progress.state_dict().items() if k != "wall_seconds"}
        window = trainer.window.state_tensors() if trainer.window is not None else {}
        assert trainer.schedule is not None
        return {
            "parameters": digest(dict(trainer.model.named_parameters())),
            "router": digest({**dict(trainer.model.named_buffers()), **window}),
            "optimizer": digest(trainer.engine.state_tensors()),
            "rng": rng_digest(),
            "progress": progress,
            "schedule": trainer.schedule.state_dict(),
            "scale": None if trainer.engine.scale is None else trainer.engine.scale.state_dict(),
            "guard": trainer.guard.state_dict(),
            "recovery": trainer.recovery.state_dict(),
            "adaptive": trainer.adaptive.state_dict(),
        }

    def loader(self) -> TrainLoader:
        return self.trainer._loader()


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Names, shapes and bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        raw = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tuple(raw.shape)} {raw.dtype}".encode() + bytes(raw.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()[:16]


def _exact(value: Any) -> Any:
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
