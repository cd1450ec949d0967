"""What a tiny run really does, as values to compare: the model, its numbers, the order of data, records, files.

`observe(folder, keys)` resolves the configuration as a launch does, trains a few steps as the worker does, and returns one
value per aspect. Times and paths are in none of them, so the same keys give the same values.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.config.deepspeed import to_deepspeed
from lumina_engine.config.machine import GB, Machine
from lumina_engine.config.resolve import resolve, world_size
from lumina_engine.config.schema import Config
from lumina_engine.data.batch import TrainLoader
from lumina_engine.data.store import open_data
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.monitoring import record as rec
from lumina_engine.run.launch import rank_argv
from lumina_engine.training.comm import Comm
from lumina_engine.training.setup import seed_all
from lumina_engine.training.trainer import EnhancedConversationTrainer

MACHINE = Machine([], 16 * GB, 2, None)
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "seq_length": 64,
    "num_experts": 4,
    "moe_top_k": 2,
    "tokenizer": "lumina-1k",
    "rope_theta": 10_000.0,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "max_steps": 6,
    "num_workers": 0,
    "eval_interval": 3,
    "eval_batches": 1,
    "eval_split": 0.25,
    "save_interval": 2,
    "keep_checkpoints": 2,
    "expert_log_interval": 2,
    "use_deepspeed": False,
    "backup_every_n_hours": 0.0,
    "async_save": False,
}
WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "river", "stone", "bird", "tree"]


def conversations(path: Path, count: int, start: int = 0) -> Path:
    """Conversations of uneven length, the same each time."""
    lines = []
    for number in range(start, start + count):
        asked = " ".join(WORDS[(number * 5 + i * i) % len(WORDS)] for i in range(number % 7 + 2))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": " ".join(reversed(asked.split()))}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def observe(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """One value per aspect of a run with these keys."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"data_cache_dir": str(folder / "cache"), "train_data_path": str(conversations(folder / "train.jsonl", 60))}
    given = Config(**(BASE | own | keys))
    tokenizer = ConversationTokenizer(given.tokenizer)
    config = resolve(given, MACHINE, tokenizer_vocab=tokenizer.get_vocab_size())
    seen: dict[str, Any] = launched(config, folder)
    data = open_data(config, tokenizer)
    try:
        seed_all(config, Comm())
        seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
        model = DeepSeekTransformer(config)
        model.init_weights(config.seed)
        seen |= looked_at(model)
        seen |= trained(config, model, tokenizer, data, folder)
    finally:
        torch.use_deterministic_algorithms(False)
    return seen


def launched(config: Config, folder: Path) -> dict[str, Any]:
    """What is started: the command of the ranks without places, and what DeepSpeed gets."""
    world = world_size(config, MACHINE)
    argv = [word for word in rank_argv(config, folder / "run", world) if str(folder) not in word]
    return {"argv": argv, "deepspeed": to_deepspeed(config, world) if config.use_deepspeed else None}


class _Largest(TorchDispatchMode):
    """The largest tensor that an operator gave back, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def looked_at(model: DeepSeekTransformer) -> dict[str, Any]:
    """The model before training: shapes, first weights, logits, and what one forward pass keeps and makes."""
    ids = torch.arange(4 * model.config.seq_length).reshape(4, -1) % 251
    with torch.no_grad():
        logits = model.eval()(ids)
    kept: list[int] = []
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t), _Largest() as largest:
        model(ids, labels=ids)
    return {
        "shapes": {name: tuple(p.shape) for name, p in model.named_parameters()},
        "weights": digest([p for _, p in sorted(model.named_parameters(), key=lambda pair: pair[0])]),
        "logits": digest([logits]),
        "kept": sum(kept),
        "largest": largest.elements,
    }


def digest(tensors: list[torch.Tensor]) -> str:
    """A digest of values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().float().numpy().tobytes())
    return found.hexdigest()[:16]


class _Records(list):
    def emit(self, record: Any) -> None:
        self.append(record)


def trained(config: Config, model: Any, tokenizer: Any, data: Any, folder: Path) -> dict[str, Any]:
    """A few steps: numbers, rates, rows, records, files."""
    records, comm = _Records(), Comm()
    manager = CheckpointManager(config, run_dir=folder / "run", comm=comm)
    trainer = EnhancedConversationTrainer(model, tokenizer, config, records, comm=comm, manager=manager)
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in trainer.engine.optimizer.param_groups]
    state = trainer.engine.state_tensors()
    first = next(iter(_loader(config, data)))
    summary = trainer.train(data.train, data.eval)
    manager.close()
    steps = [r for r in records if isinstance(r, rec.Step)]
    run = folder / "run"
    return {
        "optimizer": groups,
        "dtypes": sorted({str(p.dtype) for p in trainer.model.parameters()} | {str(t.dtype) for t in state.values()}),
        "rows": digest([b.input_ids_BS for b in first] + [b.labels_BS for b in first]),
        "row_weights": digest([b.weights_BS for b in first if b.weights_BS is not None]),
        "row_shape": [tuple(b.input_ids_BS.shape) for b in first],
        "losses": [(r.loss, r.grad_norm) for r in steps],
        "balance": [(r.aux_loss, r.z_loss) for r in steps],
        "rates": [r.lr for r in steps],
        "steps": [(r.step, r.batch, r.seq_length) for r in steps],
        "evals": [(r.step, r.tokens) for r in records if isinstance(r, rec.Eval)],
        "experts": [r.step for r in records if isinstance(r, rec.Experts)],
        "saves": [(r.step, r.best) for r in records if isinstance(r, rec.Checkpoint)],
        "bias": digest([trainer.model.router_bias_LE]) if trainer.model.router_bias_LE is not None else None,
        "dropped": [r.dropped for r in records if isinstance(r, rec.Experts)],
        "end": (summary["step"], summary["total_steps"], summary["reason"]),
        "kept_checkpoints": sorted(p.name for p in (run / "checkpoints").glob("step-*")),
        "state_files": sorted(p.name for p in (run / "checkpoints").glob("step-*/state/*")),
        "backups": [len(list((run / "backups").glob("step-*"))) if (run / "backups").exists() else 0],
        "folders": sorted(p.name for p in folder.iterdir() if p.is_dir()),
        "tokens": (data.train.num_tokens, data.eval.num_tokens if data.eval is not None else 0),
    }


def _loader(config: Config, data: Any) -> TrainLoader:
    return TrainLoader(
        data.train, config, rank=0, world=1, micro_batch=config.batch_size, accumulation=config.gradient_accumulation_steps
    )
