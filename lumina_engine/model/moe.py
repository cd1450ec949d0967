"""Mixture of experts: router, dispatch, stacked experts, statistics and the balancing losses.

Experts are two stacked tensors, so that every rank touches all that it holds whatever the routing (no collective depends on
it). Statistics are sums over this micro batch, which the trainer reduces over ranks; the only collectives of a model are those
of experts that are spread over ranks (exchange.py).

Shapes: B batch, S sequence, T = B·S tokens, E experts, K experts per token, N routed choices sorted by expert (≤ T·K),
D hidden size, H expert width, L expert layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_engine.model.exchange import ExpertGroup, experts_elsewhere
from lumina_engine.model.experts import experts_grouped, experts_loop, grouped_works
from lumina_engine.model.layers import SwiGLU, runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lumina_engine.config.schema import DeepSeekConfig


class LayerStats(NamedTuple):
    """Sums over the tokens of one micro batch in one expert layer; padding is in none of them."""

    counts_E: Tensor  # choices per expert before capacity; float32, no gradient
    prob_sum_E: Tensor  # probabilities (sigmoid scores normalised to sum 1); differentiable
    z_sum: Tensor  # logsumexp(logits)²; differentiable
    dropped: Tensor  # choices lost to capacity
    top_score_sum: Tensor  # highest unbiased score per token


class LayerRoute(NamedTuple):
    """Where the tokens of one forward went in one expert layer: the router's own choice, also for padding."""

    experts_BSK: Tensor
    gates_BSK: Tensor  # float32; what the experts' outputs were multiplied by


class RouterStats(NamedTuple):
    """The statistics of all expert layers, layer index first, in float32. Sums: add them over micro batches and ranks."""

    counts_LE: Tensor
    prob_sum_LE: Tensor
    z_sum_L: Tensor
    dropped_L: Tensor
    top_score_sum_L: Tensor
    tokens: Tensor  # real (non-padding) tokens, scalar

    @staticmethod
    def stack(layers: list[LayerStats], tokens: Tensor) -> RouterStats:
        counts, prob_sums, z_sums, dropped, top_scores = (torch.stack(parts) for parts in zip(*layers, strict=True))
        return RouterStats(counts, prob_sums, z_sums, dropped, top_scores, tokens)


def balance_loss(prob_sum_LE: Tensor, counts_LE: Tensor, tokens: Tensor, prob_tokens: Tensor, top_k: int) -> Tensor:
    """Mean over expert layers of E/K · Σ_e (n_e/T)·P_e (Switch, arXiv:2101.03961); 1.0 = balanced.

    `counts_LE` and `tokens` are of the global batch. `prob_sum_LE` may be this rank's part as long as `prob_tokens` is the
    global number of tokens: the parts of all ranks then add up to the loss.
    """
    experts = counts_LE.shape[-1]
    shares = counts_LE / tokens.clamp(min=1)
    probabilities = prob_sum_LE / prob_tokens.clamp(min=1)
    return (shares * probabilities).sum(-1).mean() * (experts / top_k)


def z_loss(z_sum_L: Tensor, tokens: Tensor) -> Tensor:
    """Mean over layers and tokens of logsumexp(router logits)² (ST-MoE, arXiv:2202.08906); `tokens` as `prob_tokens` above."""
    return z_sum_L.mean() / tokens.clamp(min=1)


class Router(nn.Module):
    """Scores every token for every expert in float32, whatever the precision of the rest.

    An expert that was split (checkpoint/growth.py) has the probability exp(l - ln m) / Σ exp(l - ln m) and counts m times in
    choice and gate, m its multiplicity. Twins then count what their parent did, and all others the same.
    """

    bias: Tensor
    log2_multiplicity: Tensor | None  # (E), 0 for an expert that was never split; only where scores depend on each other

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        # Moved by update_router_bias, not by gradients. Steps of 1e-3 would round to nothing in bf16, so it stays float32.
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.top_k, self.score = config.moe_top_k, config.router_score
        self.normalize, self.scale = config.normalizes_gates, config.router_scale
        may_split = config.moe_top_k == 1 and config.router_score == "softmax"
        self.register_buffer("log2_multiplicity", torch.zeros_like(self.bias) if may_split else None)
        self.jitter = config.router_jitter_noise
        self.choose: Callable[[Tensor, int], Tensor] = _highest

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, kept in before.items():
            now = getattr(self, name)
            if kept is not None:
                setattr(self, name, now.float() if kept.is_meta else kept.to(now.device))
        return self

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (T, E), scores (T, E), chosen experts (T, K) and their gates (T, K)."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.training and self.jitter > 0:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            logits_TE = F.linear(x_TD, self.weight.float())
            if self.log2_multiplicity is not None:
                logits_TE = logits_TE - self.log2_multiplicity * math.log(2)
            scores_TE = logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
            # The bias takes part in the choice only; the gate comes from the unbiased score.
            experts_TK = self.choose(self._counted(scores_TE.detach()) + self.bias, self.top_k)
            gates_TK = scores_TE.gather(-1, experts_TK)
            if self.log2_multiplicity is not None:
                gates_TK = gates_TK * self.log2_multiplicity.exp2()[experts_TK]
            if self.normalize:
                gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
            if self.scale != 1:
                gates_TK = gates_TK * self.scale
            return logits_TE, scores_TE, experts_TK, gates_TK

    def _counted(self, scores_TE: Tensor) -> Tensor:
        """Scores as they count in the choice: those of an expert that was split as often as it was."""
        return scores_TE if self.log2_multiplicity is None else scores_TE * self.log2_multiplicity.exp2()

    def statistics(self, logits_TE: Tensor, scores_TE: Tensor, valid_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over real tokens: probabilities (E), squared logsumexp, top score."""
        probs_TE = scores_TE if self.score == "softmax" else scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        z_T = logits_TE.logsumexp(-1).square()
        top_T = self._counted(scores_TE.detach()).amax(-1)
        if valid_T is None:
            return probs_TE.sum(0), z_T.sum(), top_T.sum()
        weight_T = valid_T.float()
        return weight_T @ probs_TE, torch.dot(z_T, weight_T), torch.dot(top_T, weight_T)


def _highest(scores_TE: Tensor, top_k: int) -> Tensor:
    return scores_TE.topk(top_k, dim=-1).indices


def _in_turn(scores_TE: Tensor, top_k: int) -> Tensor:
    tokens, experts = scores_TE.shape
    first_T1 = torch.arange(0, tokens * top_k, top_k, device=scores_TE.device)[:, None]
    return (first_T1 + torch.arange(top_k, device=scores_TE.device)) % experts


@contextmanager
def uniform_routing(model: nn.Module) -> Iterator[None]:
    """Within it tokens go to the experts in turn, so that all get the same load whatever the weights are.

    For benchmarks and measures of memory, which then do not depend on how far a router has learned; gates are still the scores
    of the experts that were given. Backward passes belong inside too, since checkpointing routes again.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.choose = _in_turn
    try:
        yield
    finally:
        for router in routers:
            router.choose = _highest


class Dispatch(NamedTuple):
    """Choices sorted by expert. The first `ends_E[-1]` entries are served; padding and overflow lie behind them."""

    choice_N: Tensor  # index into the flattened (T, K)
    ends_E: Tensor  # cumulative number of served choices
    counts_E: Tensor  # choices before capacity


def capacity_of(tokens: int | Tensor, num_experts: int, top_k: int, factor: float) -> Tensor:
    """ceil(T/E · factor · K); a hair is taken off first, so that a product that should be whole does not round up."""
    exact = torch.as_tensor(tokens, dtype=torch.float64) * top_k * factor / num_experts
    return (exact * (1 - 1e-12)).ceil().long()


def dispatch(experts_BSK: Tensor, num_experts: int, valid_BS: Tensor | None, capacity: Tensor | None) -> Dispatch:
    """Sorts choices by expert, within an expert by position over all sequences, then by sequence.

    Served in that order, a token's fate under `capacity` depends on no later position (rule R17). Reads nothing back from the
    device.
    """
    batch, _, top_k = experts_BSK.shape
    keys_N = experts_BSK.transpose(0, 1)
    if valid_BS is not None:
        keys_N = keys_N.masked_fill(~valid_BS.t()[..., None], num_experts)
    keys_N, order_N = keys_N.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(keys_N, torch.arange(num_experts, device=keys_N.device), right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    if capacity is not None:
        starts_E1 = F.pad(ends_E, (1, 0))
        rank_N = torch.arange(len(keys_N), device=keys_N.device) - starts_E1[keys_N]
        order_N = order_N[keys_N.masked_fill(rank_N >= capacity, num_experts).sort(stable=True).indices]
        ends_E = counts_E.minimum(capacity).cumsum(0)
    # From (S, B, K), the order of service, to (B, S, K), the order of the hidden states.
    place_N, slot_N = order_N // top_k, order_N % top_k
    token_N = place_N % batch * experts_BSK.shape[1] + place_N // batch
    return Dispatch(token_N * top_k + slot_N, ends_E, counts_E)


class MoE(nn.Module):
    """Top-k mixture of SwiGLU experts, plus shared experts that every token uses.

    `w13` (E, 2H, D) holds the gate's rows first, then the up rows; `w2` is (E, D, H). After `spread` they hold the experts of
    this rank only. Capacity is that of this rank's tokens of one micro batch in either case, and shared experts stay local.
    """

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.expert_width
        self.num_experts, self.top_k = config.num_experts, config.moe_top_k
        self.capacity_factor = None if config.moe_dropless else config.capacity_factor
        self.router = Router(config)
        self.w13 = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.w2 = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.shared = SwiGLU(hidden, config.num_shared_experts * width) if config.num_shared_experts else None
        self.group: ExpertGroup | None = None
        self._grouped_works: dict[torch.dtype, bool] = {}  # what this device was found to do

    def spread(self, group: ExpertGroup) -> None:
        """Keep only the experts that belong to this rank of `group`; a second call changes nothing.

        Raises:
            ValueError: the experts cannot be divided by the ranks.
        """
        if self.group is not None:
            return
        if self.num_experts % group.size:
            raise ValueError(f"expert_parallel_size = {group.size} does not divide num_experts = {self.num_experts}")
        self.group = group
        self.w13 = nn.Parameter(group.own(self.w13.detach()).clone())
        self.w2 = nn.Parameter(group.own(self.w2.detach()).clone())

    def forward(
        self,
        x_BSD: Tensor,
        valid_BS: Tensor | None = None,
        routes: list[LayerRoute] | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, LayerStats]:
        """Output (B, S, D), zero where a token lost all its choices to capacity, and the statistics of this call.

        The routing is appended to `routes`, if given. With `recompute` the backward pass keeps x and the experts' first
        products only; nothing is counted twice.
        """
        batch, length, hidden = x_BSD.shape
        x_TD = x_BSD.reshape(-1, hidden)
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)
        # With jitter the router draws random numbers, so it is not run again.
        route = runner(recompute and not (self.training and self.router.jitter > 0))
        logits_TE, scores_TE, experts_TK, gates_TK = route(self.router, x_TD)
        if routes is not None:
            shape = (batch, length, self.top_k)
            routes.append(LayerRoute(experts_TK.detach().view(shape), gates_TK.detach().view(shape)))
        capacity = None
        if self.training and self.capacity_factor is not None:
            tokens = len(x_TD) if valid_T is None else valid_T.sum()
            capacity = capacity_of(tokens, self.num_experts, self.top_k, self.capacity_factor)
        plan = dispatch(experts_TK.view(batch, length, self.top_k), self.num_experts, valid_BS, capacity)
        out_TD = self._experts(x_TD, gates_TK, plan, recompute)
        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD, recompute=recompute)
        dropped = (plan.counts_E.sum() - plan.ends_E[-1]).float()
        sums = self.router.statistics(logits_TE, scores_TE, valid_T)
        return out_TD.view(x_BSD.shape), LayerStats(plan.counts_E.float(), sums[0], sums[1], dropped, sums[2])

    def _kernel(self, x_TD: Tensor) -> Callable[..., Tensor]:
        """The grouped products where the device can do them, found out by trying once; else the loop.

        On a CPU both are equally fast, and the loop skips what capacity dropped. Only bf16 can be compiled (torch 2.13).
        """
        if x_TD.device.type == "cpu" or x_TD.shape[1] % 8:  # grouped_mm wants rows of whole 16 bytes
            return experts_loop
        if torch.compiler.is_compiling():
            return experts_grouped if x_TD.dtype == torch.bfloat16 else experts_loop
        if x_TD.dtype not in self._grouped_works:
            self._grouped_works[x_TD.dtype] = grouped_works(x_TD.device, x_TD.dtype)
        return experts_grouped if self._grouped_works[x_TD.dtype] else experts_loop

    def _experts(self, x_TD: Tensor, gates_TK: Tensor, plan: Dispatch, recompute: bool) -> Tensor:
        device = x_TD.device.type
        w13: Tensor = self.w13
        w2: Tensor = self.w2
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_TD, w13, w2 = x_TD.to(dtype), w13.to(dtype), w2.to(dtype)
        compute = self._kernel(x_TD)
        if self.group is None:
            return compute(x_TD, gates_TK, plan.choice_N, plan.ends_E, w13, w2, recompute)

        def local(rows_MD: Tensor, order_M: Tensor, ends_F: Tensor) -> Tensor:
            run = compute if len(rows_MD) else experts_loop  # without a row the weights still get their (zero) gradients
            return run(rows_MD, gates_TK.new_ones(len(rows_MD), 1), order_M, ends_F, w13, w2, recompute)

        return experts_elsewhere(x_TD, gates_TK, plan.choice_N, plan.ends_E, self.group, local)
