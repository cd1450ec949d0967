"""RMSNorm and the dense SwiGLU block, as autograd functions that make few passes over memory; and how to recompute a part.

Shapes: T tokens, R rows of a tile, D hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumina_engine.model.product import Linear

# Values that a CPU takes through several passes at once, so that what is made on the way stays in the cache.
_TILE = 1 << 18


def tile_rows(x: Tensor, width: int) -> int:
    """How many rows of `width` values to take through several passes at once: a tile on a CPU, everything elsewhere."""
    return max(1, _TILE // width) if x.device.type == "cpu" else max(1, x.numel() // width)


def runner(recompute: bool) -> Callable[..., Any]:
    """How to call a part of a layer: `run(function, *arguments)`.

    With `recompute` the backward pass keeps the arguments only and calls the function again. A matrix product at its end is not
    repeated, since torch stops once it has the product's inputs; so parts end with one. The function must draw no random
    numbers.
    """
    return _again if recompute else _plainly


def _plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _again(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one statistic per row; torch's own CPU backward makes several times as many passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        rstd = norm.square().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        size = x.shape[-1]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight = torch.zeros(size, dtype=torch.float32, device=x.device)
        rows = (x.reshape(-1, size), grad.reshape(-1, size), rstd.reshape(-1, 1), grad_x.view(-1, size))
        with torch.autocast(x.device.type, enabled=False):
            for x_RD, grad_RD, rstd_R1, to_RD in zip(*(part.split(tile_rows(x, size)) for part in rows), strict=True):
                _norm_backward(x_RD, grad_RD, rstd_R1, weight.float(), to_RD, grad_weight)
        return grad_x, grad_weight.to(weight.dtype), None


def _norm_backward(x_RD: Tensor, grad_RD: Tensor, rstd_R1: Tensor, weight: Tensor, to_RD: Tensor, grad_weight: Tensor) -> None:
    """Writes the gradient of some rows, rstd · (g w - x rstd² mean(g w x)), and adds their part of the weight's, Σ g x rstd."""
    x32, grad32 = x_RD.float(), grad_RD.float()
    product_RD = grad32 * x32
    grad_weight.addmv_(product_RD.t(), rstd_R1.squeeze(1))
    mean_R1 = torch.mv(product_RD, weight)[:, None].mul_(rstd_R1).mul_(-1.0 / x_RD.shape[1])
    shift_R1 = mean_R1.mul_(rstd_R1).mul_(rstd_R1)  # one by one: the cube itself would underflow early
    out_RD = to_RD if to_RD.dtype == torch.float32 else product_RD
    torch.mul(x32, shift_R1, out=out_RD).addcmul_(grad32 * weight, rstd_R1)
    if out_RD is not to_RD:
        to_RD.copy_(out_RD)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, statistics in float32, result in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # it fuses the formula
            x32 = x.float()
            return (x32 * (x32.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(x.dtype)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _GatedSilu(torch.autograd.Function):
    """silu(gate) · up from one tensor that holds both; recomputes silu in the backward instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, _ = gate_up.chunk(2, dim=-1)
        return gated_silu_backward(grad, gate_up, F.silu(gate))


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(first half) · second half over the last axis."""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _GatedSilu.apply(gate_up)


def gated_silu_backward(grad: Tensor, gate_up: Tensor, silu_gate: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of `gated_silu` with respect to its input, into `out` if given; `silu_gate`, silu(first half), is spent."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up) if out is None else out
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, silu_gate, out=grad_up)
    torch.ops.aten.silu_backward(torch.mul(grad, up, out=silu_gate), gate, grad_input=grad_gate)
    return out


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x) without biases; `gate_up` holds the gate's rows first, then the up rows."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor, norm: RMSNorm | None = None, recompute: bool = False) -> Tensor:
        """`norm` is applied to x first; `recompute` keeps neither its result nor the activation for the backward pass."""
        run = runner(recompute)
        gate_up = run(lambda x: self.gate_up(x if norm is None else norm(x)), x)
        return run(lambda gate_up: self.down(gated_silu(gate_up)), gate_up)
