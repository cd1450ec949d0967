"""Evaluation: token-weighted, nothing dropped, the same figures for any batch size and world size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch

from ..data.batch import Batch
from ..monitoring.record import Eval
from .comm import Comm


def token_bytes_V(tokenizer: Any, size: int) -> torch.Tensor:
    """UTF-8 bytes of each id; 0 for specials and unused ids, which stand for no text."""
    textless = tokenizer.special_ids | tokenizer.unused_ids
    return torch.tensor([0 if i in textless else len(tokenizer.token_bytes(i)) for i in range(size)])


@torch.no_grad()
def evaluate(model: Any, batches: Iterable[Batch], comm: Comm, bytes_V: torch.Tensor, context: Any) -> dict[str, float]:
    """Figures over all trained tokens of `batches` on all ranks. A collective.

    Returns `loss` (nats per trained token), `perplexity`, `bits_per_byte` (of the trained text), `accuracy` (share of trained
    tokens that are the most probable one) and `tokens`. Without a trained token all of them but `tokens` are nan.
    """
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
    loss_sum, tokens, correct, size = comm.sum(sums).tolist()
    if tokens == 0:
        return {"loss": math.nan, "perplexity": math.nan, "bits_per_byte": math.nan, "accuracy": math.nan, "tokens": 0.0}
    loss = loss_sum / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss_sum / math.log(2) / size if size else math.nan,
        "accuracy": correct / tokens,
        "tokens": tokens,
    }


def eval_record(step: int, figures: dict[str, float], started: float) -> Eval:
    """The `eval` record of figures whose evaluation began at monotonic time `started`."""
    return Eval(
        step=step,
        loss=figures["loss"],
        perplexity=figures["perplexity"],
        bits_per_byte=figures["bits_per_byte"],
        accuracy=figures["accuracy"],
        tokens=int(figures["tokens"]),
        seconds=time.monotonic() - started,
    )
