"""The adaptive controllers on and off: tiny real runs with an injected fault, and healthy ones in which it should do nothing.

A fault comes into both arms at the same step of the same run. Losses are medians; *recovered* is a run whose loss came back to
what it was before the fault, *steps lost* are the steps until then.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..checkpoint.manager import CheckpointManager
from ..config.machine import GB, Machine
from ..config.resolve import resolve
from ..config.schema import Config
from ..data.store import open_data
from ..data.tokenizer import ConversationTokenizer
from ..model.moe import Router
from ..model.transformer import DeepSeekTransformer
from ..monitoring import record as rec
from ..monitoring.decisions import of_controller, replay
from .comm import Comm
from .setup import seed_all
from .trainer import EnhancedConversationTrainer

STEPS, FAULT_AT = 260, 70
HEALTHY_STEPS = 160
NEAR = 32  # steps whose median loss is that of a moment
WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "river", "stone", "bird", "tree"]
KEYS: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 48,
    "use_moe": False,
    "seq_length": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "tokenizer": "lumina-1k",
    "rope_theta": 10_000.0,
    "learning_rate": 5e-3,  # near the edge for this size: ten times it is no rate to learn with
    "lr_schedule": "constant",
    "warmup_steps": 10,
    "max_steps": STEPS,
    "num_epochs": 1000,
    "num_workers": 0,
    "eval_interval": 0,
    "eval_split": 0.0,
    "best_metric": "loss",
    "save_interval": 0,
    "keep_checkpoints": 20,
    "async_save": False,
    "backup_every_n_hours": 0.0,
    "expert_log_interval": 1000,
    "use_deepspeed": False,
    "adaptive_cooldown_steps": 40,
}
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"use_moe": True, "num_experts": 4, "moe_top_k": 1, "learning_rate": 3e-3},
    {"lr_schedule": "cosine", "learning_rate": 3e-3},
    {"use_moe": True, "num_experts": 4, "moe_top_k": 2, "lr_schedule": "wsd", "learning_rate": 3e-3},
)


class Records(list[Any]):
    """A logger that keeps every record."""

    def emit(self, record: Any) -> None:
        self.append(record)


@dataclass
class Run:
    """What became of one run. `before` is the loss before the fault, `loss` that at the end; `hottest` the load of the hottest
    expert at the end, in equal shares (experts only)."""

    fault: str
    seed: int
    mode: str
    loss: float
    before: float | None = None
    lost: int | None = None
    hottest: float | None = None
    state: str = "finished"
    actions: list[str] = field(default_factory=list)
    agrees: bool = True

    @property
    def recovered(self) -> bool:
        return self.lost is not None


def conversations(path: Path, count: int) -> Path:
    """Words, and the same backwards."""
    draw = random.Random(7)
    lines = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(2, 9))
        turns = [("user", " ".join(words)), ("assistant", " ".join(reversed(words)))]
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def prepared(folder: Path, name: str, keys: dict[str, Any]) -> tuple[EnhancedConversationTrainer, Records, Any]:
    """A trainer, its records, its data."""
    data_path = folder / "train.jsonl"
    if not data_path.exists():
        conversations(data_path, 1500)
    own = {"data_cache_dir": str(folder / "cache"), "train_data_path": str(data_path)}
    tokenizer = ConversationTokenizer(KEYS["tokenizer"])
    config = resolve(Config(**(KEYS | own | keys)), Machine([], 16 * GB, 1, None), tokenizer_vocab=tokenizer.get_vocab_size())
    data = open_data(config, tokenizer)
    comm = Comm()
    seed_all(config, comm)
    model = DeepSeekTransformer(config)
    model.init_weights(config.seed)
    records = Records()
    manager = CheckpointManager(config, run_dir=folder / name, comm=comm, run_id=name)
    trainer = EnhancedConversationTrainer(model, tokenizer, config, records, comm=comm, manager=manager)
    trainer.prepare(data.train, data.eval)
    return trainer, records, data


# ---- faults -----------------------------------------------------------------------------------------------------------------


def rate_times_ten(trainer: Any, first: int) -> None:
    """Every step from `first` on has ten times its rate, also after a rollback: nothing undoes it."""
    inner = trainer.engine.step

    def step(lr: float, *args: Any) -> Any:
        return inner(lr * 10 if trainer.reached >= first else lr, *args)

    trainer.engine.step = step


def one_bad_batch(trainer: Any, first: int) -> None:
    """Random tokens where the answers of one batch were, as often as it comes; a rollback leaves it out."""
    inner = trainer.engine.forward
    bad: list[torch.Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        labels = kwargs["labels"]
        if trainer.progress.step + 1 == first and not bad:
            bad.append(labels.clone())
        if bad and torch.equal(labels, bad[0]):
            draw = torch.Generator().manual_seed(first)
            other = torch.randint(0, 256, labels.shape, generator=draw)
            kwargs["labels"] = torch.where(labels >= 0, other, labels)
        return inner(*args, **kwargs)

    trainer.engine.forward = forward


def broken_weights(trainer: Any, first: int) -> None:
    """The last block's weights are not those that were learned, once, as after a bad load."""
    inner = trainer.engine.forward
    done: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if trainer.progress.step + 1 == first and not done:
            done.append(first)
            generator = torch.Generator().manual_seed(first)
            with torch.no_grad():
                for parameter in trainer.model.blocks[-1].parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        return inner(*args, **kwargs)

    trainer.engine.forward = forward


def bad_data(trainer: Any, first: int) -> None:
    """Random tokens where the answers were, in every batch from `first` on."""
    inner = trainer.engine.forward
    draw = torch.Generator().manual_seed(first)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if trainer.progress.step + 1 >= first:
            labels = kwargs["labels"]
            kwargs["labels"] = torch.where(labels >= 0, torch.randint(0, 256, labels.shape, generator=draw), labels)
        return inner(*args, **kwargs)

    trainer.engine.forward = forward


def not_finite(trainer: Any, first: int) -> None:
    """No number for a loss, in two steps."""
    inner = trainer.engine.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        broken = first <= trainer.progress.step + 1 < first + 2
        return out._replace(loss_sum=out.loss_sum * float("nan")) if broken else out

    trainer.engine.forward = forward


def collapsed_router(trainer: Any, first: int) -> None:
    """Its weights send nearly every token to the first expert, once."""
    router = next(module for module in trainer.model.modules() if isinstance(module, Router))

    def collapse(module: Router, args: tuple[torch.Tensor]) -> None:
        if trainer.progress.step + 1 == first:
            hook.remove()
            mean_D = args[0].detach().float().mean(0)
            with torch.no_grad():
                module.weight[0] += 4 * mean_D / mean_D.square().sum()

    hook = router.register_forward_pre_hook(collapse)


def frozen_layer(trainer: Any, first: int) -> None:
    """The block keeps its weights from `first` on, as with an optimizer that lost its parameters."""
    weights = list(trainer.model.blocks[0].parameters())
    inner = trainer.engine.step

    def step(*args: Any) -> Any:
        before = [weight.detach().clone() for weight in weights]
        result = inner(*args)
        if trainer.progress.step + 1 >= first:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
        return result

    trainer.engine.step = step


def data_again(trainer: Any, first: int) -> None:
    """Every step from `first` on has the tokens of the step before it, or of the one before that."""
    inner = trainer.engine.forward
    last: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        number = trainer.progress.step + 1
        if number < first:
            last[:] = [*last[-1:], (args, kwargs)]
            return inner(*args, **kwargs)
        again = last[number % 2]
        return inner(*again[0], **again[1])

    trainer.engine.forward = forward


WEAKLY_BALANCED: dict[str, Any] = SHAPES[1] | {"load_balancing_weight": 0.01, "expert_log_interval": 4}
# what is done to a run, and the keys of the runs that it is done to
FAULTS: dict[str, tuple[Callable[[Any, int], None], dict[str, Any]]] = {
    "rate x 10": (rate_times_ten, {}),
    "one bad batch": (one_bad_batch, {}),
    "broken weights": (broken_weights, {}),
    "bad data": (bad_data, {}),
    "not finite": (not_finite, {}),
    "router collapse": (collapsed_router, WEAKLY_BALANCED),
    "frozen layer": (frozen_layer, {}),
    "data come again": (data_again, {}),
}


def one(folder: Path, fault: str, seed: int, mode: str, keys: dict[str, Any]) -> Run:
    """Train one run."""
    name = f"{fault.replace(' ', '-')}-{keys.get('spike_policy', 'skip')}-{seed}-{mode}"
    inject, own = FAULTS.get(fault, (None, {}))
    trainer, records, data = prepared(folder, name, keys | own | {"adaptive": mode, "seed": seed})
    first = FAULT_AT + random.Random(seed).randrange(20)
    if inject is not None:
        _follow(trainer)
        inject(trainer, first)
    summary = trainer.train(data.train, data.eval)
    trainer.manager.close()
    steps = [record for record in records if isinstance(record, rec.Step) and math.isfinite(record.loss or math.nan)]
    losses = [float(record.loss or 0.0) for record in steps]
    done = [record for record in records if of_controller(record)]
    run = Run(fault, seed, mode, median(losses[-NEAR:]), state=summary["state"])
    run.actions = [
        str((record.evidence or {}).get("action")) if isinstance(record, rec.Change) else record.code for record in done
    ]
    run.hottest = hottest(records)
    run.agrees = replay([rec.decode(rec.encode(record)) for record in records], trainer.config).agrees
    if inject is not None:
        at = next(place for place, record in enumerate(steps) if record.step >= first)
        run.before = median(losses[at - NEAR : at])
        run.lost = lost(losses, at, run.before)
    return run


def _follow(trainer: Any) -> None:
    """`trainer.reached`: the furthest step that it has come to, whatever it went back to since."""
    inner = trainer.section

    def section(name: str, step: int) -> None:
        trainer.reached = max(trainer.reached, step)
        inner(name, step)

    trainer.reached, trainer.section = 0, section


def hottest(records: list[Any]) -> float | None:
    """Median over the last five records of experts of the hottest expert's load, as a multiple of the equal share."""
    loads = [record.load for record in records if isinstance(record, rec.Experts)][-5:]
    return median(max(max(layer) * len(layer) / sum(layer) for layer in load) for load in loads) if loads else None


def lost(losses: list[float], at: int, before: float) -> int | None:
    """Steps from the fault on until the median of 32 losses is that of before it again; None if never."""
    for end in range(at + NEAR, len(losses) + 1):
        if median(losses[end - NEAR : end]) <= before:
            return end - NEAR - at
    return None


def measure(folder: Path, seeds: int, healthy: int, policies: tuple[str, ...]) -> Iterator[Run]:
    """All runs, one after the other."""
    for policy in policies:
        keys = {"spike_policy": policy, "save_interval": 20 if policy == "rollback" else 0}
        for seed, fault, mode in itertools.product(range(seeds), FAULTS, ("off", "act")):
            run = one(folder, fault, seed, mode, keys)
            run.fault = f"{fault}, {policy}"
            yield run
    for seed in range(healthy):
        yield one(folder, "healthy", seed, "act", {"max_steps": HEALTHY_STEPS} | SHAPES[seed % len(SHAPES)])


def table(runs: list[Run]) -> list[dict[str, Any]]:
    """A row for each fault and arm, and one for the healthy runs."""
    rows = []
    for fault, mode in dict.fromkeys((run.fault, run.mode) for run in runs):
        part = [run for run in runs if (run.fault, run.mode) == (fault, mode)]
        row: dict[str, Any] = {"fault": fault, "adaptive": mode, "runs": len(part), "loss": median(run.loss for run in part)}
        if fault != "healthy":
            back = [run.lost for run in part if run.lost is not None]
            row |= {
                "before": median(run.before for run in part if run.before is not None),
                "recovered": len(back),
                "lost": median(back) if back else None,
                "ended": sum(run.state == "failed" for run in part),
            }
        if peaks := [run.hottest for run in part if run.hottest is not None]:
            row["hottest"] = median(peaks)
        row |= {"without_action": sum(not run.actions for run in part), "replay_agrees": all(run.agrees for run in part)}
        rows.append(row)
    return rows
