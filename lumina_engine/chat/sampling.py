"""Choosing the next token from logits.

Order: unused ids masked, repetition penalty, temperature, top-k, top-p, draw. The draw is one uniform number per row, taken
from that row's own generator on the CPU, so a seed means the same on every device and in every batch.

Shapes: B batch, V vocabulary rows, K tokens kept by top-k.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .modes import Sampling


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (Keskar et al. 2019, CTRL): logits of tokens already seen are divided by `penalty` if positive, else
    multiplied."""
    scaled = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, scaled, logits_BV)


def nucleus(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (B, K), largest first, 0 where top-p cuts, and their ids (B, K), after temperature, top-k and top-p.

    Top-p keeps the smallest set whose probability reaches `top_p`, measured after top-k; the kept ones sum to 1.
    """
    vocab = logits_BV.shape[-1]
    kept = sampling.top_k if 0 < sampling.top_k < vocab else vocab
    values_BK, ids_BK = (logits_BV.float() / sampling.temperature).topk(kept, dim=-1)
    probabilities_BK = values_BK.softmax(-1)
    before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
    probabilities_BK = probabilities_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
    return probabilities_BK / probabilities_BK.sum(-1, keepdim=True), ids_BK


def choose(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Ids (B,): the likeliest at temperature 0, else drawn: the cumulative distribution inverted at `uniform_B` in [0, 1)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BK, ids_BK = nucleus(logits_BV, sampling)
    cumulative_BK = probabilities_BK.double().cumsum(-1)
    target_B1 = uniform_B.to(cumulative_BK)[:, None] * cumulative_BK[:, -1:]
    last_B1 = (probabilities_BK > 0).sum(-1, keepdim=True) - 1
    index_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True).minimum(last_B1)
    return ids_BK.gather(-1, index_B1)[:, 0]


def chance(logits_BV: Tensor, sampling: Sampling, ids_B: Tensor) -> Tensor:
    """With which probability (B,) `choose` takes these ids: 1 at temperature 0, 0 for what top-k or top-p cut."""
    if sampling.temperature == 0:
        return torch.ones_like(ids_B, dtype=torch.float32)
    probabilities_BK, kept_BK = nucleus(logits_BV, sampling)
    return (probabilities_BK * (kept_BK == ids_B[:, None])).sum(-1)


class Sampler:
    """The state that sampling needs for B replies: masks, tokens seen, one generator a row.

    Args:
        vocab_rows: width of the logits.
        allowed: ids that may be sampled at all.
        spared: ids that the repetition penalty leaves alone (turn borders: every prompt repeats them).
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: list[list[int]],
        seeds: list[int],
        *,
        vocab_rows: int,
        banned: Iterable[int],
        spared: Iterable[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.sampling = sampling
        self.banned_V = torch.zeros(vocab_rows, dtype=torch.bool)
        self.banned_V[list(banned)] = True
        self.banned_V = self.banned_V.to(device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.seen_BV: Tensor | None = None
        self._spared = set(spared)
        if sampling.repetition_penalty != 1.0:
            self.seen_BV = torch.zeros(len(prompts), vocab_rows, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen_BV[row, [token for token in prompt if token not in self._spared]] = True

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """The next ids (B,) on the logits' device. Every call draws one number per row, also at temperature 0."""
        return self.draw(self.adjust(logits_BV))

    def adjust(self, logits_BV: Tensor) -> Tensor:
        """Logits (B, V), float32, with the banned ids masked and the tokens seen so far penalised."""
        logits_BV = logits_BV.float().masked_fill(self.banned_V, float("-inf"))
        if self.seen_BV is not None:
            logits_BV = penalise(logits_BV, self.seen_BV, self.sampling.repetition_penalty)
        return logits_BV

    def draw(self, logits_BV: Tensor) -> Tensor:
        """The next ids (B,) from adjusted logits; they count as seen from then on."""
        uniform_B = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators])
        ids_B = choose(logits_BV, self.sampling, uniform_B)
        if self.seen_BV is not None:
            for row, token in enumerate(ids_B.tolist()):
                if token not in self._spared:
                    self.seen_BV[row, token] = True
        return ids_B
