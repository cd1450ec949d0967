"""Two ways to run stacked SwiGLU experts over tokens that are sorted by expert; both are deterministic and give the same
result.

Shapes: T tokens, K experts per token, N choices sorted by expert, E experts, D hidden size, H expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_engine.model.layers import gated_silu, gated_silu_backward, runner


def experts_loop(
    x_TD: Tensor, gates_TK: Tensor, choice_N: Tensor, ends_E: Tensor, w13: Tensor, w2: Tensor, recompute: bool = False
) -> Tensor:
    """Σ over a token's served choices of gate · expert(token), (T, D), by one matrix product per expert that has tokens.

    Reads the group sizes from the device, so it suits the CPU. Nothing is computed for choices behind `ends_E[-1]`. With
    `recompute` only the tokens and the products with `w13` are kept for the backward pass; no product is repeated.
    """
    ends = ends_E.tolist()
    choice_N = choice_N[: ends[-1]]
    gates_N = gates_TK.reshape(-1).index_select(0, choice_N)
    token_N = choice_N // gates_TK.shape[1]
    segments = [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]
    return _ExpertsLoop.apply(x_TD, gates_N, w13, w2, token_N, segments, recompute)


class _ExpertsLoop(torch.autograd.Function):
    """Gather, gate-up product, SwiGLU, down product, gate, scatter. Weight gradients are written in place into one stacked
    tensor; autograd over `w13[e]` would build a full-size tensor per expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_N: Tensor,
        w13: Tensor,
        w2: Tensor,
        token_N: Tensor,
        segments: list[tuple[int, int, int]],
        recompute: bool,
    ) -> Tensor:
        x_ND = x_TD.index_select(0, token_N)
        gate_up = x_ND.new_empty(len(token_N), w13.shape[1])
        y_ND = torch.empty_like(x_ND)
        with torch.autocast(x_TD.device.type, enabled=False):
            for e, start, end in segments:
                torch.mm(x_ND[start:end], w13[e].t(), out=gate_up[start:end])
            gate, up = gate_up.chunk(2, dim=-1)
            act_NH = F.silu(gate).mul_(up)
            for e, start, end in segments:
                torch.mm(act_NH[start:end], w2[e].t(), out=y_ND[start:end])
        kept_ND = y_ND if ctx.needs_input_grad[1] and not recompute else None  # for the gates' gradient
        ctx.save_for_backward(x_TD if recompute else x_ND, kept_ND, gate_up, gates_N, w13, w2, token_N)
        ctx.segments, ctx.tokens, ctx.recompute = segments, len(x_TD), recompute
        return _scattered(y_ND * gates_N[:, None].to(y_ND.dtype), token_N, len(x_TD))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None, None, None]:
        x_ND, y_ND, gate_up, gates_N, w13, w2, token_N = ctx.saved_tensors
        with torch.autocast(grad_TD.device.type, enabled=False):
            grad_ND = grad_TD.index_select(0, token_N)
            gated_ND = grad_ND * gates_N[:, None].to(grad_ND.dtype)
            grad_w13, grad_w2 = _idle_zeroed(w13, ctx.segments), _idle_zeroed(w2, ctx.segments)
            gate, up = gate_up.chunk(2, dim=-1)
            silu_NH = F.silu(gate)
            act_NH = silu_NH * up
            grad_act = torch.empty_like(act_NH)
            for e, start, end in ctx.segments:
                torch.mm((grad_ND if ctx.recompute else gated_ND)[start:end], w2[e], out=grad_act[start:end])
                torch.mm(gated_ND[start:end].t(), act_NH[start:end], out=grad_w2[e])
            if ctx.recompute:  # grad · (w2 act) = (grad w2) · act: the result of the expert is not needed
                grad_gates = (grad_act * act_NH).sum(-1, dtype=gates_N.dtype)
                grad_act.mul_(gates_N[:, None])
                x_ND = x_ND.index_select(0, token_N)
            else:
                grad_gates = None if y_ND is None else (grad_ND * y_ND).sum(-1, dtype=gates_N.dtype)
            grad_gate_up = gated_silu_backward(grad_act, gate_up, silu_NH)
            grad_x = torch.empty_like(x_ND)
            for e, start, end in ctx.segments:
                torch.mm(grad_gate_up[start:end], w13[e], out=grad_x[start:end])
                torch.mm(grad_gate_up[start:end].t(), x_ND[start:end], out=grad_w13[e])
        return _scattered(grad_x, token_N, ctx.tokens), grad_gates, grad_w13, grad_w2, None, None, None


def _idle_zeroed(weight: Tensor, segments: list[tuple[int, int, int]]) -> Tensor:
    """A gradient to write into: zero for experts without tokens, undefined for those that will be written."""
    grad = torch.empty_like(weight)
    busy = {e for e, _, _ in segments}
    for e in range(len(weight)):
        if e not in busy:
            grad[e].zero_()
    return grad


def _scattered(rows_ND: Tensor, token_N: Tensor, tokens: int) -> Tensor:
    """Sums rows into their tokens, in the order of the rows."""
    return rows_ND.new_zeros(tokens, rows_ND.shape[1]).index_add_(0, token_N, rows_ND)


class _Spread(torch.autograd.Function):
    """x[token of each sorted choice]; the gradient is a gather by the inverse order and a sum over K, no scatter."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, choice_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = top_k
        return x_TD.index_select(0, choice_N // top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grad_ND.index_select(0, inverse_N).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    """Sum over the K choices of each token, the mirror image of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, choice_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(choice_N)
        ctx.top_k = top_k
        return y_ND.index_select(0, inverse_N).unflatten(0, (-1, top_k)).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (choice_N,) = ctx.saved_tensors
        return grad_TD.index_select(0, choice_N // ctx.top_k), None, None, None


def experts_grouped(
    x_TD: Tensor, gates_TK: Tensor, choice_N: Tensor, ends_E: Tensor, w13: Tensor, w2: Tensor, recompute: bool = False
) -> Tensor:
    """The same by `torch.nn.functional.grouped_mm`: fixed shapes, nothing read from the device, no atomic adds.

    Rows behind `ends_E[-1]` are left undefined by the kernel, forward and backward, and are masked on both sides.
    """
    top_k = gates_TK.shape[1]
    places_N = torch.arange(len(choice_N), device=choice_N.device)
    inverse_N = torch.empty_like(choice_N).scatter_(0, choice_N, places_N)
    unserved_N1 = (places_N >= ends_E[-1])[:, None]
    offsets_E = ends_E.to(torch.int32)

    def up(x_TD: Tensor) -> Tensor:
        x_ND = _Spread.apply(x_TD, choice_N, inverse_N, top_k).masked_fill(unserved_N1, 0)
        return F.grouped_mm(x_ND, w13.transpose(-2, -1), offs=offsets_E)

    def down(gate_up: Tensor) -> Tensor:
        return F.grouped_mm(gated_silu(gate_up), w2.transpose(-2, -1), offs=offsets_E)

    run = runner(recompute)
    y_ND = run(down, run(up, x_TD)).masked_fill(unserved_N1, 0)
    gates_N1 = gates_TK.reshape(-1, 1).index_select(0, choice_N).to(y_ND.dtype)
    return _Gather.apply(y_ND * gates_N1, choice_N, inverse_N, top_k)
