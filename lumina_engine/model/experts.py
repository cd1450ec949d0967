"""Two ways to run stacked SwiGLU experts over tokens that are sorted by expert; both are deterministic and give the same
result.

Shapes: T tokens, K experts per token, N choices sorted by expert, R rows of one expert, E experts, D hidden size, H expert
width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_engine.model.layers import gated_silu, gated_silu_backward, runner
from lumina_engine.model.product import generates_code, product, weight_gradient

# oneDNN generates code for every new number of rows, which costs as much as a product; multiples of up to this recur.
_MULTIPLE = 32
# Filler is at most one in so many rows.
_FILLER = 16


@torch.compiler.disable(reason="its shapes follow the routing of each batch")
def experts_loop(
    x_TD: Tensor, gates_TK: Tensor, choice_N: Tensor, ends_E: Tensor, w13: Tensor, w2: Tensor, recompute: bool = False
) -> Tensor:
    """Σ over a token's served choices of gate · expert(token), (T, D), expert by expert, those that have tokens.

    Reads the group sizes from the device, so it suits the CPU. Nothing is computed for choices behind `ends_E[-1]`. With
    `recompute` only the tokens and the products with `w13` are kept for the backward pass; no product is repeated.
    """
    ends = ends_E.tolist()
    choice_N = choice_N[: ends[-1]]
    gates_N = gates_TK.reshape(-1).index_select(0, choice_N)
    token_N = choice_N // gates_TK.shape[1]
    segments = [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]
    filled = torch.is_grad_enabled() and generates_code(x_TD)
    return _ExpertsLoop.apply(x_TD, gates_N, w13, w2, token_N, segments, recompute, filled)


class _ExpertsLoop(torch.autograd.Function):
    """Gather, gate-up product, SwiGLU, gate, down product, scatter: all of one expert before the next, and all experts in the
    same memory, so that what lies between the products stays in the cache.

    Weight gradients are written in place into one stacked tensor; autograd over `w13[e]` would build one per expert.
    """

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
        filled: bool,
    ) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        keeps = ctx.needs_input_grad[1] and not recompute  # results, for the gates' gradient
        kept: list[Tensor] = []
        x_room, act_room, gated_room = _rooms(x_TD, segments, filled, (w2.shape[1], w2.shape[2], w2.shape[1]))
        with torch.autocast(x_TD.device.type, enabled=False):
            for e, start, end in segments:
                token_R, gate_R1, count = token_N[start:end], gates_N[start:end, None], end - start
                gate_up = product(_rows(x_TD, token_R, filled, x_room), w13[e])
                gate, up = gate_up.chunk(2, dim=-1)
                act_RH = torch.ops.aten.silu.out(gate, out=act_room[: len(gate)]).mul_(up)
                y_RD = product(act_RH, w2[e])
                gated_RD = torch.mul(y_RD[:count], gate_R1.to(y_RD.dtype), out=gated_room[:count])
                out_TD.index_add_(0, token_R, gated_RD)
                kept += (gate_up, y_RD) if keeps else (gate_up,)
        ctx.save_for_backward(x_TD, gates_N, w13, w2, token_N, *kept)
        ctx.segments, ctx.keeps, ctx.filled = segments, keeps, filled
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None, None, None, None]:
        x_TD, gates_N, w13, w2, token_N, *kept = ctx.saved_tensors
        each = 2 if ctx.keeps else 1
        wanted = ctx.needs_input_grad[1]
        grad_x, grad_gates = torch.zeros_like(x_TD), torch.empty_like(gates_N) if wanted else None
        grad_w13, grad_w2 = _idle_zeroed(w13, ctx.segments), _idle_zeroed(w2, ctx.segments)
        hidden, width = w2.shape[1:]
        widths = (hidden, hidden, hidden, width, width, width, 2 * width)
        rooms = _rooms(x_TD, ctx.segments, ctx.filled, widths)
        with torch.autocast(grad_TD.device.type, enabled=False):
            for number, (e, start, end) in enumerate(ctx.segments):
                gate_up, *results = kept[each * number : each * (number + 1)]
                token_R, rows = token_N[start:end], len(gate_up)
                grad_room, gated_room, x_room, silu_room, act_room, grad_act_room, grad_up_room = (r[:rows] for r in rooms)
                grad_RD = _rows(grad_TD, token_R, ctx.filled, grad_room)
                gate_R1 = F.pad(gates_N[start:end, None], (0, 0, 0, rows - len(token_R)))
                gate, up = gate_up.chunk(2, dim=-1)
                silu_RH = torch.ops.aten.silu.out(gate, out=silu_room)
                act_RH = torch.mul(silu_RH, up, out=act_room)
                if results and grad_gates is not None:
                    weighed_RD = torch.mul(grad_RD, results[0], out=gated_room)
                    grad_gates[start:end] = weighed_RD.sum(-1, dtype=gates_N.dtype)[: end - start]
                gated_RD = torch.mul(grad_RD, gate_R1.to(grad_RD.dtype), out=gated_room)
                if results or grad_gates is None:
                    grad_act = product(gated_RD, w2[e].t(), grad_act_room)
                else:  # grad · (w2 act) = (grad w2) · act: the result of the expert is not needed
                    grad_act = product(grad_RD, w2[e].t(), grad_act_room)
                    grad_gates[start:end] = (grad_act * act_RH).sum(-1, dtype=gates_N.dtype)[: end - start]
                    grad_act.mul_(gate_R1)
                weight_gradient(gated_RD, act_RH, out=grad_w2[e])
                grad_gate_up = gated_silu_backward(grad_act, gate_up, silu_RH, grad_up_room)
                weight_gradient(grad_gate_up, _rows(x_TD, token_R, ctx.filled, x_room), out=grad_w13[e])
                grad_x_RD = product(grad_gate_up, w13[e].t(), x_room)
                grad_x.index_add_(0, token_R, grad_x_RD[: end - start])
        return grad_x, grad_gates, grad_w13, grad_w2, None, None, None, None


def _filler(count: int, filled: bool) -> int:
    """Rows that are added to so many of one expert, to make a number that recurs."""
    multiple = min(_MULTIPLE, 1 << (count // _FILLER).bit_length() >> 1) if filled else 1
    return -count % max(multiple, 1)


def _rooms(like: Tensor, segments: list[tuple[int, int, int]], filled: bool, widths: tuple[int, ...]) -> list[Tensor]:
    """Memory of these widths for the rows of each expert in turn."""
    rows = max((end - start + _filler(end - start, filled) for _, start, end in segments), default=0)
    return [like.new_empty(rows, width) for width in widths]


def _rows(x_TD: Tensor, token_N: Tensor, filled: bool, room: Tensor) -> Tensor:
    """Rows of the tokens of one expert, then filler of zeros, so that it is finite whatever the expert does with tokens."""
    count = len(token_N)
    rows_RD = room[: count + _filler(count, filled)]
    torch.index_select(x_TD, 0, token_N, out=rows_RD[:count])
    rows_RD[count:].zero_()
    return rows_RD


def _idle_zeroed(weight: Tensor, segments: list[tuple[int, int, int]]) -> Tensor:
    """A gradient to write into: zero for experts without tokens, undefined for those that will be written."""
    grad = torch.empty_like(weight)
    busy = {e for e, _, _ in segments}
    for e in range(len(weight)):
        if e not in busy:
            grad[e].zero_()
    return grad


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


def grouped_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the grouped products run here, forward and backward, on a tiny problem: kernels exist for some devices only."""
    try:
        with torch.enable_grad():
            x_TD = torch.ones(4, 16, device=device, dtype=dtype, requires_grad=True)
            w13 = torch.ones(2, 32, 16, device=device, dtype=dtype, requires_grad=True)
            w2 = torch.ones(2, 16, 16, device=device, dtype=dtype, requires_grad=True)
            ends_E = torch.tensor([1, 4], device=device)
            gates_TK = torch.ones(4, 1, device=device)
            experts_grouped(x_TD, gates_TK, torch.arange(4, device=device), ends_E, w13, w2).sum().backward()
    except (RuntimeError, NotImplementedError, AttributeError):  # no kernel, or a torch without it
        return False
    return True
