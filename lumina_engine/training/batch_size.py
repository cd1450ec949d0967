"""`dynamic_batching`: the largest micro batch that fits, found before the first step by trying.

Each try is a forward and backward pass and an optimizer step at the worst shape in a process of its own (`trial.py`): its
peak is measured from nothing, and what runs out of memory there costs the run nothing. The global batch never changes: only
micro batches that divide a rank's rows are tried. What was found is kept in `data_cache_dir`, by everything that decides it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.curriculum import Curriculum
from ..config.machine import gb_text
from ..config.micro_batch import candidates, split
from ..config.schema import Config, DeepSeekConfig
from ..run.directory import write_json
from .comm import Comm
from .engine import build_engine
from .expert_parallel import build_model
from .memory import DoesNotFit, Peak, peaks, worst_batch, worst_objective
from .setup import deepspeed_config, placed
from .trial import leave, local_ranks, run_trial, trial_main

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Try:
    """How one micro batch went, and why, in words: the peak that came nearest to its limit, or the end of the try."""

    fits: bool
    why: str


def largest(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of rising `sizes` that fits, by halving what is open; None if not even the first.

    The last one is tried first: it often fits, and it may need less than the one before it, because a step of one micro batch
    keeps no gradients over its forward pass. Below it need only grows.
    """
    if fits(sizes[-1]):
        return sizes[-1]
    low, high = -1, len(sizes) - 1  # low fits (or is none), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else None


class Tries:
    """What is known of the micro batches of one setting, on disk. Only rank 0 reads and writes."""

    def __init__(self, config: Config, comm: Comm, versions: dict[str, str]) -> None:
        self.comm = comm
        self.key = _key(config, comm, versions)
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:24]
        self.path = Path(config.data_cache_dir) / "batch-size" / f"{digest}.json"
        known = comm.broadcast(self._read() if comm.rank == 0 else None)
        self.tried = {name: Try(**item) for name, item in known["tried"].items()}
        self.too_large: int | None = known["too_large"]  # a run ran out of memory with this many rows

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {"tried": {n: asdict(Try(**t)) for n, t in found["tried"].items()}, "too_large": found["too_large"]}
        except (OSError, ValueError, TypeError, KeyError):
            return {"tried": {}, "too_large": None}  # nothing known, or nothing that this version wrote: try again

    def _write(self) -> None:
        if self.comm.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tried = {name: asdict(item) for name, item in self.tried.items()}
            write_json(self.path, {"key": self.key, "tried": tried, "too_large": self.too_large})

    def note(self, name: str, item: Try) -> None:
        """Keep how a try went."""
        self.tried[name] = item
        self._write()

    def ran_out(self, rows: int) -> None:
        """Keep that a run had no memory for `rows`, whatever a try had said: it and the half above its half are out."""
        bound = rows // 2 + 1
        self.too_large = bound if self.too_large is None else min(self.too_large, bound)
        self._write()


def _key(config: Config, comm: Comm, versions: dict[str, str]) -> dict[str, Any]:
    """Everything that decides what fits."""
    deepspeed = deepspeed_config(config, comm) or {}
    room = [peak.available for peak in peaks(comm.device, local_ranks(comm))]
    return {
        "model": DeepSeekConfig.from_config(config).to_dict(),
        "rows_of": Curriculum.of(config).lengths[-1],
        "precision": config.precision,
        "compile": config.compile,
        "deepspeed": {name: value for name, value in deepspeed.items() if name not in _BATCH_KEYS},
        "devices": comm.all_gather([_device_name(comm.device), room]),
        "target_memory_usage": config.target_memory_usage,
        "versions": versions,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fit(config: Config, comm: Comm, tries: Tries, tell: Callable[[int], None]) -> tuple[Config, str]:
    """`config` with the largest micro batch that fits on every rank, and a line that says what was found. A collective.

    Args:
        tell: called before each try with its rows.

    Raises:
        DoesNotFit: not even the smallest one fits. TrialError: a try failed for another reason.
    """
    sizes = [size for size in candidates(config) if tries.too_large is None or size < tries.too_large]
    new: list[str] = []

    def fits(size: int) -> bool:
        changes = split(config, size)
        changes["gradient_accumulation_steps"] = min(2, changes["gradient_accumulation_steps"])
        name = "{batch_size}x{gradient_accumulation_steps}".format(**changes)
        if name not in tries.tried:
            tell(size)
            tries.note(name, _try(config.model_copy(update=changes), comm))
            new.append(name)
        found = tries.tried[name]
        told[size] = f"{size} {'fits' if found.fits else 'does not'} ({found.why})"
        return found.fits

    told: dict[int, str] = {}
    best = largest(sizes, fits) if sizes else None
    if best is None:
        least = candidates(config)[0]
        length = Curriculum.of(config).lengths[-1]
        raise DoesNotFit(least * config.seq_length // length, length, config.model_copy(update=split(config, least)))
    changed = config.model_copy(update=split(config, best))
    steps, source = changed.gradient_accumulation_steps, "tried" if new else "known from an earlier start"
    line = (
        f"dynamic_batching: batch_size {best} x {steps} accumulation x {comm.world_size} ranks instead of "
        f"{config.batch_size} x {config.gradient_accumulation_steps} x {comm.world_size}, the same global batch; "
        f"{source}: {', '.join(told[size] for size in sorted(told))}"
    )
    return changed, line


def _try(config: Config, comm: Comm) -> Try:
    outcomes = run_trial(__name__, config, comm, {"local_ranks": local_ranks(comm)})
    if lost := next((o for o in outcomes if o.out_of_memory), None):
        return Try(False, lost.text)
    return judge([Peak(**peak) for outcome in outcomes for peak in (outcome.result or {})["peaks"]], config.target_memory_usage)


def judge(found: Iterable[Peak], share: float) -> Try:
    """Whether every peak stays within `share` of what there is, told by the one that comes nearest."""
    worst = max(found, key=lambda peak: peak.used / peak.available)
    limit = int(worst.available * share)
    return Try(worst.used <= limit, f"{worst.kind} {gb_text(worst.used)} of {gb_text(limit)}")


def steps_at_worst(config: Config, comm: Comm) -> None:
    """Optimizer steps at the worst shape: with the router's own choice, and with all tokens sent to the same experts.

    The first step makes the optimizer's state, so the later ones have everything in memory. With accumulation two micro batches
    make a step, the second of which finds the gradients of the first.
    """
    ds_config = deepspeed_config(config, comm)
    model = placed(build_model(config, comm), config, comm, ds_config)
    engine = build_engine(model, config, comm, ds_config)
    batch = worst_batch(config, comm.device)
    for skewed in (False, False, True):
        if skewed:
            for layer in engine.module.expert_layers:  # type: ignore[union-attr]
                layer.router.bias[: config.moe_top_k] = 1e4
        for micro in range(config.gradient_accumulation_steps):
            loss = worst_objective(engine.forward, batch)
            engine.backward(loss, last=micro == config.gradient_accumulation_steps - 1)
        engine.step(config.learning_rate)


def trial(config: Config, order: dict[str, Any]) -> dict[str, Any]:
    """One try, in its own process: the peaks of this rank."""
    comm = Comm.start(config.communication_backend)
    steps_at_worst(config, comm)
    return {"peaks": [asdict(peak) for peak in peaks(comm.device, order["local_ranks"])]}


if __name__ == "__main__":
    leave(trial_main(trial, sys.argv))
