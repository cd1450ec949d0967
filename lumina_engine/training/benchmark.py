"""Throughput of the training loop itself: a `EnhancedConversationTrainer` on random tokens, timed step by step.

Nothing is imitated: data go through the loader, records into a real log. Times are rank 0's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.store_writer import TEXT
from ..model.moe import uniform_routing
from ..monitoring import record as rec
from ..monitoring.log import MetricLog
from .comm import Comm
from .expert_parallel import build_model
from .matmul_peak import products_rate, square_rate, step_products
from .memory import memory_stats, whole_numel
from .precision import Precision
from .setup import seed_all
from .trainer import EnhancedConversationTrainer

PARTS = ("data", "forward", "backward", "optimizer", "telemetry")


class RandomStore:
    """A token store in memory: `rows` plain documents of `length` random ids.

    Every row is full, and all of its tokens but the first are trained.
    """

    def __init__(self, rows: int, length: int, vocabulary: int, seed: int) -> None:
        count = rows * length
        self.tokens = np.random.default_rng(seed).integers(0, vocabulary, count, dtype=np.uint32)
        self.mask = np.full(count, TEXT, dtype=np.uint8)
        self.offsets = np.arange(0, count + 1, length, dtype=np.uint64)
        self.meta = {"weights": [0.0, 1.0], "template": {}}
        self.fingerprint = f"random-{rows}-{length}-{vocabulary}-{seed}"
        self.num_tokens = count
        self.pad_id = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1


class _Stopwatch:
    """A logger that writes every record and notes when each step's came."""

    def __init__(self, log: MetricLog | None, each: Callable[[dict[str, Any]], None]) -> None:
        self.log, self.each = log, each
        self.steps: list[dict[str, Any]] = []
        self._last = 0.0

    def emit(self, record: Any) -> None:
        if self.log is not None:
            self.log.emit(record)
        if isinstance(record, rec.Run):
            self._last = time.perf_counter()
        if isinstance(record, rec.Step):
            self._note(record)

    def _note(self, record: rec.Step) -> None:
        """What the parts of the step leave of the time since the step before is telemetry: counting, records, commands."""
        now = time.perf_counter()
        wall, self._last = now - self._last, now
        parts = {name: getattr(record, f"{name}_time") or 0.0 for name in PARTS[:-1]}
        parts["telemetry"] = wall - sum(parts.values())
        self.steps.append({"step": record.step, "seconds": wall, "loss": record.loss, **parts})
        self.each(self.steps[-1])


def measure(
    config: Any, steps: int, warmup: int, each: Callable[[dict[str, Any]], None], *, uniform: bool = False
) -> dict[str, Any]:
    """Train `warmup + steps` steps and return the figures; `each` gets every step's times (seconds) as it ends.

    Throughput, times and split are medians over the steps behind the warm-up; tokens are those of all ranks. FLOP/s count
    what the model needs (attention half of S x S), so a step that computes something twice gains nothing by it. `uniform` gives
    all experts the same load.
    """
    from ..data.tokenizer import ConversationTokenizer

    config = config.model_copy(update={"max_steps": warmup + steps, "num_epochs": 1, "eval_interval": 0, "log_interval": 1})
    comm = Comm.start(config.communication_backend)
    seed_all(config, comm)
    tokenizer = ConversationTokenizer(config.tokenizer)
    model = build_model(config, comm)
    rows = config.batch_size * config.gradient_accumulation_steps * comm.world_size * (warmup + steps)
    store = RandomStore(rows, config.seq_length, model.config.vocab_rows, config.seed)
    with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
        log = MetricLog(Path(folder) / "metrics.jsonl", 1) if comm.rank == 0 else None
        watch = _Stopwatch(log, each)
        trainer = EnhancedConversationTrainer(model, tokenizer, config, watch, comm=comm)
        with uniform_routing(trainer.model) if uniform else nullcontext():
            trainer.train(store)
        memory = memory_stats(trainer.model, trainer.engine.state_bytes(), comm.device)
        # Behind the peak of memory, of which the factors would become a part. Twice: the machine may be slower just now.
        roofs = [_roofs(trainer), _roofs(trainer)]
        if log is not None:
            log.close()
    if comm.rank != 0:
        return {}
    return _figures(trainer, watch.steps[warmup:], memory, [max(pair) for pair in zip(*roofs, strict=True)])


def _roofs(trainer: EnhancedConversationTrainer) -> tuple[float, float]:
    """FLOP/s of matrix products in the precision of the run: a large square, and the step's own shapes."""
    config, device = trainer.config, trainer.comm.device
    precision = Precision.from_name(config.precision)
    dtype = precision.autocast or precision.weights
    own = step_products(trainer.model.config, config.batch_size, config.seq_length)
    return square_rate(device, dtype), products_rate(own, device, dtype)


def _figures(
    trainer: EnhancedConversationTrainer, steps: list[dict[str, Any]], memory: dict[str, Any], roofs: list[float]
) -> dict[str, Any]:
    config, world = trainer.config, trainer.comm.world_size
    tokens = config.batch_size * config.gradient_accumulation_steps * config.seq_length * world
    rates = [tokens / step["seconds"] for step in steps]
    rate = statistics.median(rates)
    flops = rate * trainer.utilisation.flops_per_token(trainer.config.seq_length) / world
    return {
        "tokens_per_s": rate,
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
        "spread": (max(rates) - min(rates)) / rate,
        "steps": len(steps),
        "tokens_per_step": tokens,
        "step_s": statistics.median(step["seconds"] for step in steps),
        "split_s": {part: statistics.median(step[part] for step in steps) for part in PARTS},
        "peak_memory_bytes": memory["device"]["peak"],
        "memory_bytes": memory["components"],
        "flops_per_s": flops,
        "matmul_peak_flops_per_s": roofs[0],
        "matmul_share": flops / roofs[0],
        "matmul_own_shapes_flops_per_s": roofs[1],
        "matmul_share_own_shapes": flops / roofs[1],
        "parameters": sum(map(whole_numel, trainer.model.parameters())),
        "precision": config.precision,
        "engine": f"deepspeed ZeRO-{config.zero_stage}" if config.use_deepspeed else "plain torch",
        "ranks": world,
        "threads": torch.get_num_threads(),
        "loss": steps[-1]["loss"],
    }
