"""AdamW on fp32 masters of shorter weights, and the norm of gradients, a stretch at a time.

What is in fp32 only on the way, a stretch of a gradient, never leaves the cache, and there is no fp32 copy of all gradients.
Values are those of converting everything first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Values converted at once. On a CPU a stretch in fp32 and its master fit the last cache; a GPU wants few large kernels.
_STRETCH_CPU, _STRETCH = 1 << 20, 1 << 24
_ROW = 1 << 12  # values whose squares are added up by themselves


def _stretches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretch of tensors that have equally many values."""
    size = _STRETCH_CPU if tensors[0].device.type == "cpu" else _STRETCH
    return zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)


def _scratch(tensors: list[Tensor]) -> Tensor:
    """Room in fp32 for one stretch of any of them."""
    return torch.empty(max(len(part) for tensor in tensors for (part,) in _stretches(tensor)), device=tensors[0].device)


def norm_by_stretches(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all values together, computed in fp32: a scalar.

    From the norms of short rows: one accumulator over a whole tensor of stacked experts would lose a percent, and how
    many of them `torch.dot` has is up to the processor.
    """
    short = gradients[0].dtype != torch.float32
    scratch, norms = _scratch(gradients) if short else None, [gradients[0].new_zeros(1, dtype=torch.float32)]
    for gradient in gradients:
        for (part,) in _stretches(gradient):
            exact = part if scratch is None else scratch[: len(part)].copy_(part)
            whole = len(exact) // _ROW * _ROW
            if whole:
                norms.append(torch.linalg.vector_norm(exact[:whole].view(-1, _ROW), dim=1))
            if whole < len(exact):
                norms.append(torch.linalg.vector_norm(exact[whole:]).view(1))
    return (
        torch.cat(norms).square().sum().sqrt()
    )  # vector_norm of so many equal rows would lose as much; sum() adds up in pairs


class MasterAdamW(torch.optim.AdamW):
    """Fused AdamW whose parameters are the masters of `weights`: gradients are read from those, and results rounded to them.

    A master that has a gradient itself, in fp32, takes that one. A weight without any is left alone. `grad_scale`, a scalar
    tensor or None, divides the gradients.
    """

    weights: Mapping[Tensor, nn.Parameter]
    grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all masters and weights."""
        given = {master: master.grad if master.grad is not None else weight.grad for master, weight in self.weights.items()}
        found = [grad for grad in given.values() if grad is not None]
        if not found:
            return
        scratch = _scratch(found)
        for group in self.param_groups:
            for master in group["params"]:
                if (grad := given[master]) is not None:
                    self._update(master, grad, group, scratch)

    def _update(self, master: Tensor, given: Tensor, group: dict[str, Any], scratch: Tensor) -> None:
        weight, state = self.weights[master], self.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        parts = (given, weight.view(-1), master.view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        for grad, short, *held in _stretches(*parts):
            exact = grad if grad.dtype == torch.float32 else scratch[: len(grad)].copy_(grad)
            torch._fused_adamw_(
                held[:1],
                [exact],
                held[1:2],
                held[2:],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=self.grad_scale,
            )
            short.copy_(held[0])
