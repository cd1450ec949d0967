"""`auto_tune_precision`: the precisions that the device really has, each tried on the run's own first steps.

Every try trains in a process of its own (`trial.py`) from the state that the run starts from, on the rows that it starts with,
and is thrown away: the run's weights, random state and data order are as without.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..config.machine import gb_text
from ..config.schema import Config
from ..monitoring import record as rec
from ..run.rank import Command, NullChannel
from .comm import Comm
from .expert_parallel import build_model
from .ladder import native_bf16
from .memory import peaks
from .setup import seed_all
from .trial import leave, local_ranks, run_trial, trial_main

WARMUP, MEASURED = 3, 10  # steps
LOSS_BOUND, NORM_BOUND = 0.01, 0.05  # relative to fp32
TIE = 0.05
PREFERRED = ("bf16", "mixed_bf16")  # of those that are as fast as the fastest


@dataclass(frozen=True)
class Row:
    """One line of the table: medians and means over the measured steps; `failed` says why there are none."""

    precision: str
    tokens_per_s: float = math.nan
    peak: int = 0  # bytes, of the rank that needed most
    loss: float = math.nan
    grad_norm: float = math.nan
    failed: str = ""

    def text(self, base: Row) -> str:
        """The line for a person, differences against `base` (fp32)."""
        if self.failed:
            return f"{self.precision}: {self.failed}"
        told = f"{self.precision}: {self.tokens_per_s:,.0f} tokens/s, peak {gb_text(self.peak)}"
        told += f", loss {self.loss:.4f}, norm {self.grad_norm:.4f}"
        if self is base or base.failed:
            return told
        loss, norm = _share(self.loss, base.loss), _share(self.grad_norm, base.grad_norm)
        return f"{told} ({loss:+.2%} and {norm:+.2%} of fp32)"

    def accurate(self, base: Row) -> bool:
        """Whether loss and gradient norm are finite and within the bounds of `base`."""
        loss, norm = _share(self.loss, base.loss), _share(self.grad_norm, base.grad_norm)
        return not self.failed and abs(loss) <= LOSS_BOUND and abs(norm) <= NORM_BOUND


def _share(value: float, base: float) -> float:
    return (value - base) / base if base else math.nan


def modes(device: torch.device) -> list[str]:
    """What is tried: fp32, and every mode that this program trains in whose type the device computes itself."""
    found = ["fp32"]
    if native_bf16(device):
        found += ["bf16", "mixed_bf16"]
    if device.type == "cuda":
        found += ["fp16", "mixed_fp16"]
    return found


def in_precision(config: Config, name: str) -> Config:
    """`config` in another precision. DeepSpeed takes short weights from ZeRO stage 1 on, so stage 0 becomes 1."""
    short = config.use_deepspeed and config.zero_stage == 0 and name in ("bf16", "fp16")
    return config.model_copy(update={"precision": name, **({"zero_stage": 1} if short else {})})


def choose(rows: list[Row]) -> tuple[str, str]:
    """The fastest accurate precision and the reason; one of `PREFERRED` where it is as fast within `TIE`. fp32 comes first."""
    base = rows[0]
    if base.failed:
        return base.precision, f"fp32 {base.failed}, so nothing can be compared with it"
    inside = [row for row in rows if row.accurate(base)]
    if base not in inside:
        return base.precision, "its own loss or gradient is not finite, so nothing can be compared with it"
    fastest = max(inside, key=lambda row: row.tokens_per_s)
    out = [row.precision for row in rows if row not in inside and not row.failed]
    left_out = f"; outside the bounds of 1 % in loss and 5 % in gradient norm: {', '.join(out)}" if out else ""
    for name in PREFERRED:
        near = next((row for row in inside if row.precision == name), None)
        if near is not None and near is not fastest and near.tokens_per_s >= (1 - TIE) * fastest.tokens_per_s:
            return name, f"within 5 % of {fastest.precision}, the fastest, and a tie goes to bf16{left_out}"
    others = [row for row in inside if row is not fastest]
    if not others:
        return fastest.precision, f"no other precision is inside the bounds{left_out}"
    ratio = fastest.tokens_per_s / max(row.tokens_per_s for row in others)
    return fastest.precision, f"the fastest inside the bounds, {ratio:.2f} x the next{left_out}"


def tune(config: Config, comm: Comm, tell: Callable[[str], None]) -> tuple[str, list[str]]:
    """The precision to train in, and the lines of the table with the reason. A collective; `tell` is called before each try.

    Raises:
        TrialError: a try failed for another reason than memory.
    """
    rows = []
    for name in modes(comm.device):
        tell(name)
        rows.append(_measured(name, config, comm))
    chosen, reason = choose(rows)
    table = [f"auto_tune_precision: {row.text(rows[0])}" for row in rows]
    return chosen, [*table, f"auto_tune_precision: {chosen} it is: {reason}"]


def _measured(name: str, config: Config, comm: Comm) -> Row:
    outcomes = run_trial(__name__, in_precision(config, name), comm, {"local_ranks": local_ranks(comm)})
    if lost := next((o for o in outcomes if o.out_of_memory), None):
        return Row(name, failed=lost.text)
    results = [o.result or {} for o in outcomes]
    if results[0]["steps"] <= WARMUP:
        return Row(name, failed=f"only {results[0]['steps']} steps in the whole run")
    told = {key: results[0][key] for key in ("tokens_per_s", "loss", "grad_norm")}
    return Row(name, peak=max(result["peak"] for result in results), **told)


class _Enough(NullChannel):
    """A channel that ends a run after its measured steps, and keeps their records: the schedule stays that of the whole run."""

    def __init__(self) -> None:
        self.steps: list[rec.Step] = []

    def emit(self, record: Any) -> None:
        """The logger's side."""
        if isinstance(record, rec.Step):
            self.steps.append(record)

    def poll(self) -> list[Command]:
        """Rank 0's command counts for all."""
        return [Command("trial", "stop", {"save": False})] if len(self.steps) >= WARMUP + MEASURED else []


def trial(config: Config, order: dict[str, Any]) -> dict[str, Any]:
    """One try, in its own process."""
    from ..data.store import open_data
    from ..data.tokenizer import ConversationTokenizer
    from .trainer import EnhancedConversationTrainer

    quiet = {"eval_interval": 0, "log_interval": 1, "save_interval": 0, "auto_tune_precision": False, "dynamic_batching": False}
    config = config.model_copy(update=quiet)
    tokenizer = ConversationTokenizer(config.tokenizer)
    data = open_data(config, tokenizer)
    comm = Comm.start(config.communication_backend)
    model = build_model(config, comm)
    seed_all(config, comm)
    watch = _Enough()
    trainer = EnhancedConversationTrainer(model, tokenizer, config, watch, comm=comm, channel=watch)
    trainer.train(data.train)
    measured = watch.steps[WARMUP:]
    peak = max(peaks(comm.device, order["local_ranks"]), key=lambda p: p.used / p.available).used
    if not measured:  # a run of few steps, or another rank than 0: only that one gets records
        return {"steps": len(watch.steps), "peak": peak}
    return {
        "steps": len(watch.steps),
        "peak": peak,
        "tokens_per_s": statistics.median(step.tokens_per_s or 0.0 for step in measured),
        "loss": statistics.fmean(math.nan if step.loss is None else step.loss for step in measured),
        "grad_norm": statistics.fmean(math.nan if step.grad_norm is None else step.grad_norm for step in measured),
    }


if __name__ == "__main__":
    leave(trial_main(trial, sys.argv))
