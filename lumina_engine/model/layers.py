"""RMSNorm and the dense SwiGLU block, as autograd functions that make few passes over memory; and how to recompute a part.

Shapes: T tokens, D hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumina_engine.model.product import Linear


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
        with torch.autocast(x.device.type, enabled=False):
            size = x.shape[-1]
            normed = (x.float() * rstd).view(-1, size)
            grad32 = grad.float().reshape(-1, size)
            product = grad32 * normed
            weight32 = weight.float()
            shift = torch.mv(product, weight32).mul_(-1.0 / size)
            grad_x = (grad32 * weight32).addcmul_(normed, shift[:, None]).view(x.shape).mul_(rstd)
            return grad_x.to(x.dtype), product.sum(0).to(weight.dtype), None


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


def gated_silu_backward(grad: Tensor, gate_up: Tensor, silu_gate: Tensor) -> Tensor:
    """Gradient of `gated_silu` with respect to its input; `silu_gate` is silu(first half)."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, silu_gate, out=grad_up)
    torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate)
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
