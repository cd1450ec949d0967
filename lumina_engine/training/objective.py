"""What one optimizer step minimises, and the sums that it reports.

Shape letters: L expert layers, E experts.

    objective = Σ token losses / N  +  w_balance · balance  +  w_z · mean logsumexp²

N counts the trained tokens of the *global* batch: all micro batches on all ranks. The balance loss is
`E/k · Σ_e (n_e/T) · P_e`, averaged over expert layers (Switch Transformers, arXiv:2101.03961, for k choices), with
`n_e` and `P_e` over the global batch too. `n_e` carries no gradient; with gradient accumulation a micro batch knows the choices
of its own and the earlier micro batches of the step (of all ranks), not those that are yet to come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.batch import Batch
from ..model.moe import balance_loss, z_loss
from .comm import Comm


@dataclass
class GlobalBatch:
    """Sums over the global batch of one step, known before its first forward pass."""

    labels: float  # trained tokens (their weights, where tokens are weighted)
    tokens: int  # tokens that are not padding

    @classmethod
    def of(cls, micro_batches: list[Batch], comm: Comm) -> GlobalBatch:
        labels = sum(batch.label_weight for batch in micro_batches)
        tokens = sum(batch.num_tokens for batch in micro_batches)
        both = comm.sum(torch.tensor([labels, tokens], dtype=torch.float64, device=comm.device)).tolist()
        return cls(both[0], int(both[1]))


@dataclass
class Objective:
    """Builds this rank's share of the objective, micro batch by micro batch, and keeps the sums for the record."""

    totals: GlobalBatch
    comm: Comm
    balance_weight: float
    z_weight: float
    top_k: int
    loss_sum: torch.Tensor = field(init=False)
    z: torch.Tensor = field(init=False)
    _prob_sum_LE: torch.Tensor = field(init=False)  # of this rank
    _counts_LE: torch.Tensor | None = field(init=False, default=None)
    _tokens: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        self.loss_sum, self.z, self._prob_sum_LE = zero.clone(), zero.clone(), zero.clone()

    def add(self, output: Any, tokens: int) -> torch.Tensor:
        """The scalar to call `backward` on for one micro batch with `tokens` tokens on this rank."""
        self.loss_sum += output.loss_sum.detach()
        loss = output.loss_sum / (self.totals.labels or 1.0)
        router = output.router
        if router is None:
            return loss
        counts_LE, seen = self._global_counts(router.counts_LE, tokens)
        all_tokens = counts_LE.new_full((), float(self.totals.tokens))
        balance = balance_loss(router.prob_sum_LE, counts_LE, seen, all_tokens, self.top_k)
        z = z_loss(router.z_sum_L, all_tokens)
        self._prob_sum_LE = self._prob_sum_LE + router.prob_sum_LE.detach().double()
        self.z += z.detach()
        return loss + self.balance_weight * balance + self.z_weight * z

    def _global_counts(self, counts_LE: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choices per expert and tokens over all ranks and the micro batches of this step so far."""
        counts = counts_LE.detach().to(torch.float32)
        summed = torch.cat([counts.reshape(-1), counts.new_full((1,), float(tokens))])
        self.comm.sum(summed)
        counts = summed[:-1].view_as(counts)
        self._counts_LE = counts if self._counts_LE is None else self._counts_LE + counts
        self._tokens = summed[-1] if self._tokens is None else self._tokens + summed[-1]
        return self._counts_LE, self._tokens

    @property
    def counts_LE(self) -> torch.Tensor | None:
        """Choices per expert over the global batch so far."""
        return self._counts_LE

    def reduce(self) -> tuple[float, float, float]:
        """(language loss in nats per trained token, balance loss, z-loss) of the global batch, on every rank.

        Here all choices are known, so this balance loss does not depend on accumulation; 1 means balanced.
        """
        shape = self._prob_sum_LE.shape
        sums = self.comm.sum(torch.cat([torch.stack([self.loss_sum, self.z]), self._prob_sum_LE.reshape(-1)]))
        loss_sum, z = sums[:2].tolist()
        balance = 0.0
        if self._counts_LE is not None and self._tokens is not None:
            counts_LE, tokens = self._counts_LE.double(), self._tokens.double()
            balance = float(balance_loss(sums[2:].view(shape), counts_LE, tokens, tokens, self.top_k))
        return loss_sum / (self.totals.labels or 1.0), balance, z
