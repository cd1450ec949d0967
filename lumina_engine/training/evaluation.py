"""Evaluation: token-weighted, nothing dropped, the same figures for any batch size and world size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data.batch import Batch
from ..monitoring.record import Eval
from .comm import Comm

TASK_LOSS = "loss/"  # before the name of a task, in figures


def token_bytes_V(tokenizer: Any, size: int) -> torch.Tensor:
    """UTF-8 bytes of each id; 0 for specials and unused ids, which stand for no text."""
    textless = tokenizer.special_ids | tokenizer.unused_ids
    return torch.tensor([0 if i in textless else len(tokenizer.token_bytes(i)) for i in range(size)])


@dataclass(frozen=True, slots=True)
class EvalSums:
    """Sums over trained tokens of all ranks: their losses (nats), their number, those predicted right, their UTF-8 bytes."""

    loss: float = 0.0
    tokens: float = 0.0
    correct: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: EvalSums) -> EvalSums:
        return EvalSums(
            self.loss + other.loss, self.tokens + other.tokens, self.correct + other.correct, self.bytes + other.bytes
        )

    def figures(self) -> dict[str, float]:
        """`loss` (nats per trained token), `perplexity`, `bits_per_byte` (of the trained text), `accuracy` (share of trained
        tokens that are the most probable one) and `tokens`. Without a trained token all of them but `tokens` are nan.
        """
        if self.tokens == 0:
            return {"loss": math.nan, "perplexity": math.nan, "bits_per_byte": math.nan, "accuracy": math.nan, "tokens": 0.0}
        loss = self.loss / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": self.loss / math.log(2) / self.bytes if self.bytes else math.nan,
            "accuracy": self.correct / self.tokens,
            "tokens": self.tokens,
        }


def evaluate(model: Any, batches: Iterable[Batch], comm: Comm, bytes_V: torch.Tensor, context: Any) -> dict[str, float]:
    """Figures over all trained tokens of `batches` on all ranks, as `EvalSums.figures`. A collective."""
    return evaluate_sums(model, batches, comm, bytes_V, context).figures()


def evaluate_tasks(
    model: Any, tasks: Mapping[str, Iterable[Batch]], comm: Comm, bytes_V: torch.Tensor, context: Any
) -> dict[str, float]:
    """Figures over all tasks together, and the loss of each as `loss/NAME`. A collective."""
    sums = {name: evaluate_sums(model, batches, comm, bytes_V, context) for name, batches in tasks.items()}
    by_task = {f"{TASK_LOSS}{name}": found.figures()["loss"] for name, found in sums.items()}
    return sum(sums.values(), EvalSums()).figures() | by_task


@torch.no_grad()
def evaluate_sums(model: Any, batches: Iterable[Batch], comm: Comm, bytes_V: torch.Tensor, context: Any) -> EvalSums:
    """Sums over all trained tokens of `batches` on all ranks. A collective."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=comm.device)  # loss, tokens, correct, bytes
    try:
        for batch in batches:
            batch = batch.to(comm.device)
            with context(comm.device):
                out = model(
                    batch.input_ids_BS,
                    labels=batch.labels_BS,
                    document_ids=batch.document_ids_BS,
                    position_ids=batch.position_ids_BS,
                    layout=batch.layout,
                    return_aux=True,
                )
            trained = batch.labels_BS[batch.labels_BS >= 0]
            size = bytes_V.to(comm.device)[trained].sum()
            sums += torch.stack([out.loss_sum.double(), trained.new_tensor(trained.numel()), out.num_correct, size]).double()
    finally:
        model.train(was_training)
    return EvalSums(*comm.sum(sums).tolist())


def eval_record(step: int, figures: dict[str, float], started: float) -> Eval:
    """The `eval` record of figures whose evaluation began at monotonic time `started`."""
    by_task = {name.removeprefix(TASK_LOSS): value for name, value in figures.items() if name.startswith(TASK_LOSS)}
    return Eval(
        step=step,
        loss=figures["loss"],
        perplexity=figures["perplexity"],
        bits_per_byte=figures["bits_per_byte"],
        accuracy=figures["accuracy"],
        tokens=int(figures["tokens"]),
        tasks=by_task or None,
        seconds=time.monotonic() - started,
    )
