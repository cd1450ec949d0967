"""Matrix products by the faster of the libraries that PyTorch brings, and the linear layer made of them.

On a CPU `torch.mm` in float32 is MKL, which reaches about 80 % of oneDNN's speed on processors of other makers (measured:
tests/bench/README.md); in bfloat16 it is oneDNN already. PyTorch offers oneDNN's float32 product only as an operator of its
compiler, so it is looked up and `torch.mm` stands in where it is absent. Which one is taken depends on device and dtype
alone: the same machine gives the same bits.

Shapes: R rows, I inner size, O output size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _takes_onednn(x: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler chooses its products itself
        return False
    return _HAS_ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu"


if _HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_RI: Sequence[int], weight_OI: Sequence[int], *_: object, **__: object) -> int:
        """What FlopCounterMode counts for it; one multiply-add is two."""
        return 2 * x_RI[0] * x_RI[1] * weight_OI[0]


def product(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight.T, (R, O), without autograd; either may be a transposed view."""
    if _takes_onednn(x_RI):
        return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, None, "none", [], "")
    return torch.mm(x_RI, weight_OI.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        return product(x_RI, weight_OI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_RI, weight_OI = ctx.saved_tensors
        grad_x = product(grad_RO, weight_OI.t()) if ctx.needs_input_grad[0] else None
        # MKL is the faster one here: both factors are read across their rows.
        return grad_x, torch.mm(grad_RO.t(), x_RI) if ctx.needs_input_grad[1] else None


class Linear(nn.Linear):
    """`nn.Linear` without bias; the same numbers up to rounding.

    While `repeated` it is torch's own: selective checkpointing runs it again up to the product, and can stop there only.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.repeated = False

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        if self.repeated or autocast or not _takes_onednn(x) or not torch.is_grad_enabled():
            return F.linear(x, self.weight)
        return _Linear.apply(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
