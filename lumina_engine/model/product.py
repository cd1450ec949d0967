"""Matrix products by the fastest of the libraries that PyTorch brings, and the linear layer made of them.

In float32 `torch.mm` takes MKL. On Intel's processors that is the fastest. On AMD's with AVX-512 oneDNN's products are faster;
with AVX2 alone they are as fast where the weight is read along its rows, and slower where it is read across them. PyTorch
offers oneDNN's product only as an operator of its compiler, so it is looked up and `torch.mm` stands in where it is absent.

A CPU that cannot multiply bfloat16 or float16 has fallbacks in PyTorch at a seventh of its float32 speed (measured:
tests/bench/README.md). There the factors are widened to float32, a part at a time, and the result is rounded: the sums are
float32, as they are where the processor does it.

Which one is taken depends on device, processor, dtype and layout alone: the same machine gives the same bits.

Shapes: R rows, I inner size, O output size; P and Q rows and outputs of a part.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONLY_AVX2: bool = torch.backends.cpu.get_cpu_capability() == "AVX2"


def _is_intel() -> bool:
    """Whether the processor is one of Intel's; not where this torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
    return str(capabilities.get("cpu_name", "")).startswith("Intel")


_INTEL: bool = _is_intel()
# Rows, columns and inner size of the parts that are widened at a time: 4 MiB each, and products of full speed.
_SIDE = 1024


def _unsupported() -> frozenset[torch.dtype]:
    """The 16-bit dtypes for which oneDNN has no products on this CPU."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    answers = {dtype: getattr(torch.ops.mkldnn, name, None) for dtype, name in asked.items()}
    return frozenset(dtype for dtype, supported in answers.items() if supported is not None and not supported())


_UNSUPPORTED: frozenset[torch.dtype] = _unsupported()


def widens(x: Tensor) -> bool:
    """Whether products of tensors like `x` are made in float32, since the processor has none of their dtype."""
    return x.device.type == "cpu" and x.dtype in _UNSUPPORTED and not torch.compiler.is_compiling()


def _takes_onednn(x: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler chooses its products itself
        return False
    return _HAS_ONEDNN and not _INTEL and x.dtype == torch.float32 and x.device.type == "cpu"


def generates_code(x: Tensor) -> bool:
    """Whether the first product of each new number of rows takes longer: oneDNN makes code for it, MKL in float32 does not."""
    return x.dtype != torch.float32 or _takes_onednn(x)


if _HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_RI: Sequence[int], weight_OI: Sequence[int], *_: object, **__: object) -> int:
        """What FlopCounterMode counts for it; one multiply-add is two."""
        return 2 * x_RI[0] * x_RI[1] * weight_OI[0]


def product(x_RI: Tensor, weight_OI: Tensor, room: Tensor | None = None) -> Tensor:
    """x @ weight.T, (R, O), without autograd; either may be a transposed view. `room` (R, O) may be used for the result."""
    if widens(x_RI):
        return _widened(x_RI, weight_OI, room)
    if _takes_onednn(x_RI) and not (_ONLY_AVX2 and weight_OI.stride(0) == 1):
        return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, None, "none", [], "")
    return torch.mm(x_RI, weight_OI.t()) if room is None else torch.mm(x_RI, weight_OI.t(), out=room)


def weight_gradient(grad_RO: Tensor, x_RI: Tensor, out: Tensor | None = None) -> Tensor:
    """grad.T @ x, (O, I), without autograd, into `out` if given."""
    if widens(x_RI):
        return _widened(grad_RO.t(), x_RI.t(), out)
    # In float32 MKL is the faster one everywhere: both factors are read across their rows.
    return torch.mm(grad_RO.t(), x_RI, out=out) if out is not None else torch.mm(grad_RO.t(), x_RI)


def _widened(x_RI: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ weight.T by float32 products of parts, so that the wide copies stay small."""
    rows, inner, outer = *x_RI.shape, len(weight_OI)
    out = x_RI.new_empty(rows, outer) if out is None else out
    if not inner:
        return out.zero_()
    with torch.autocast("cpu", enabled=False):
        for start, first in itertools.product(range(0, rows, _SIDE), range(0, outer, _SIDE)):
            x_PI, weight_QI = x_RI[start : start + _SIDE], weight_OI[first : first + _SIDE]
            sums_PQ = torch.mm(x_PI[:, :_SIDE].float(), weight_QI[:, :_SIDE].float().t())
            for begin in range(_SIDE, inner, _SIDE):
                sums_PQ.addmm_(x_PI[:, begin : begin + _SIDE].float(), weight_QI[:, begin : begin + _SIDE].float().t())
            out[start : start + _SIDE, first : first + _SIDE] = sums_PQ
    return out


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
        return grad_x, weight_gradient(grad_RO, x_RI) if ctx.needs_input_grad[1] else None


def linear(x: Tensor, weight_OI: Tensor, repeated: bool = False) -> Tensor:
    """x @ weight.T over the last axis, differentiable; under autocast in its dtype, as `F.linear`.

    With `repeated` it is an operator of torch's own, at which a checkpoint that computes it again can stop.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.device.type != "cpu" or dtype not in _UNSUPPORTED or torch.compiler.is_compiling():
            return F.linear(x, weight_OI)
        x, weight_OI = x.to(dtype), weight_OI.to(dtype)
    if repeated and widens(x):
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight_OI.float()).to(x.dtype)
    if not repeated and (widens(x) or (_takes_onednn(x) and torch.is_grad_enabled())):
        return _Linear.apply(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], len(weight_OI))
    return F.linear(x, weight_OI)


class Linear(nn.Linear):
    """`nn.Linear` without bias; the same numbers up to rounding.

    `repeated`: selective checkpointing runs it again up to the product (see `linear`).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.repeated = False

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.repeated)
