"""Routing statistics between two `experts` records: summed over micro batches and ranks, read from the device once per record.

Shape letters: L expert layers, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..monitoring.record import Experts
from .comm import Comm


class RoutingWindow:
    """Accumulates `RouterStats` and turns them into an `experts` record."""

    def __init__(self, layers: list[int], experts: int, top_k: int, comm: Comm) -> None:
        self.layers = layers
        self.top_k = top_k
        self.comm = comm
        size = (len(layers), experts)
        self.counts_LE = torch.zeros(size, dtype=torch.float64, device=comm.device)
        self.dropped_L = torch.zeros(len(layers), dtype=torch.float64, device=comm.device)
        self.top_score_L = torch.zeros(len(layers), dtype=torch.float64, device=comm.device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=comm.device)

    def add(self, router: Any) -> None:
        self.counts_LE += router.counts_LE.detach()
        self.dropped_L += router.dropped_L.detach()
        self.top_score_L += router.top_score_sum_L.detach()
        self.tokens += router.tokens

    def _sums(self) -> tuple[torch.Tensor, ...]:
        return self.counts_LE, self.dropped_L, self.top_score_L, self.tokens

    def record(self, step: int, bias_LE: torch.Tensor | None) -> Experts:
        """The window's record, summed over ranks (a collective); the window starts anew."""
        counts_LE, dropped_L, top_L, tokens = (self.comm.sum(part.clone()) for part in self._sums())
        for part in self._sums():
            part.zero_()
        load = counts_LE.tolist()
        choices = max(float(tokens) * self.top_k, 1.0)
        record = Experts(step=step, layers=list(self.layers), load=load)
        for row in load:
            total = sum(row)
            shares = [n / total for n in row if n > 0] if total > 0 else []
            record.imbalance.append(max(row) * len(row) / total if total > 0 else math.nan)
            entropy = -sum(s * math.log(s) for s in shares)
            record.entropy.append(
                entropy / math.log(len(row)) if len(row) > 1 and total > 0 else 1.0 if total > 0 else math.nan
            )
            record.dead.append(sum(1 for n in row if n == 0))
        record.dropped = [n / choices for n in dropped_L.tolist()]
        record.confidence = [score / max(float(tokens), 1.0) for score in top_L.tolist()]
        if bias_LE is not None:
            record.bias_range = (bias_LE.max(dim=1).values - bias_LE.min(dim=1).values).tolist()
        return record

    def state_tensors(self) -> dict[str, torch.Tensor]:
        names = ("counts", "dropped", "top_score", "tokens")
        return {f"routing.{name}": part for name, part in zip(names, self._sums(), strict=True)}

    def copy(self) -> dict[str, torch.Tensor]:
        """The state as it is, for `load_state_tensors` to put back."""
        return {name: part.clone() for name, part in self.state_tensors().items()}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, part in self.state_tensors().items():
            if name in tensors:
                part.copy_(tensors[name])
