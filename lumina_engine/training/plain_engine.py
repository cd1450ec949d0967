"""The engine of plain PyTorch: the same numbers without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.universal import SavedState
from .comm import Comm
from .engine import Allows, StepResult, adamw, anything, bytes_of, load_named_state, named_state, parameter_groups
from .expert_parallel import SpreadExperts
from .loss_scale import LossScale
from .masters import MasterAdamW
from .precision import Precision


class PlainEngine:
    """PyTorch alone. With several ranks the gradients are summed once, after the last micro batch of a step.

    With `bf16` weights the optimizer works on fp32 masters, from which the weights are rounded after each step.
    """

    def __init__(self, model: nn.Module, config: Any, comm: Comm) -> None:
        self.comm = comm
        self.precision = Precision.from_name(config.precision)
        self.module = model.to(device=comm.device, dtype=self.precision.weights)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.names = {p: n for n, p in self.module.named_parameters() if p.requires_grad}
        self.scale = LossScale() if self.precision.scaled else None
        self.experts = SpreadExperts(self.module, comm)
        self.max_grad_norm = config.max_grad_norm
        groups = parameter_groups(self.module, config.weight_decay)
        self.masters: dict[nn.Parameter, nn.Parameter] = {}
        self.optimizer: torch.optim.AdamW
        if self.precision.weights == torch.float32:
            self.optimizer = adamw(groups, config, torch.optim.AdamW)
        else:
            self.masters = {p: nn.Parameter(p.detach().float().clone()) for p in self.parameters}
            groups = [{**group, "params": [self.masters[p] for p in group["params"]]} for group in groups]
            self.names = {self.masters[p]: name for p, name in self.names.items()}
            optimizer = adamw(groups, config, MasterAdamW)
            optimizer.weights = {master: parameter for parameter, master in self.masters.items()}
            self.optimizer = optimizer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision.context(self.comm.device):
            return self.module(*args, **kwargs)

    def use(self, precision: Precision) -> None:
        """Compute in another precision from now on. Only what autocast does may differ: weights and state stay as they are."""
        if precision.weights != self.precision.weights:
            raise ValueError(f"{self.precision.name} -> {precision.name}: other weights need another engine")
        self.precision = precision
        self.scale = (self.scale or LossScale()) if precision.scaled else None

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        (loss if self.scale is None else loss * self.scale.value).backward()

    def _summed(self) -> list[list[nn.Parameter]]:
        """The parameters of all ranks and those of this rank's experts, their gradients summed over ranks.

        Where there are masters and several ranks it is the masters that hold the sums, which are in fp32.
        """
        found = list(self.experts.split(self.parameters))
        if self.comm.world_size == 1:
            return found
        sums = [self.comm.sum, self.experts.sum]
        return [_sum_gradients(parameters, self.masters, add) for parameters, add in zip(found, sums, strict=True)]

    def step(self, lr: float, allows: Allows = anything) -> StepResult:
        norm = self.experts.norm(*self._summed())
        if self.scale is not None:
            norm = norm / self.scale.value
        grad_norm = float(norm)
        allowed = math.isfinite(grad_norm) and allows(grad_norm)
        if allowed:
            # The fused kernels divide by it as they read the gradients: clipping without a pass of its own.
            self.optimizer.grad_scale = self._divisor(norm)  # type: ignore[attr-defined]
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.discard()
        return StepResult.of(grad_norm, self.scale, allowed)

    def _divisor(self, norm: torch.Tensor) -> torch.Tensor | None:
        """What gradients are divided by for clipping and the loss scale; None if by one, which would only write them again."""
        divisor = torch.ones_like(norm) if self.scale is None else torch.full_like(norm, self.scale.value)
        if self.max_grad_norm > 0:
            divisor *= ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)
        return None if float(divisor) == 1 else divisor

    def discard(self) -> None:
        """Forget the gradients gathered since the last step."""
        for parameter in (*self.parameters, *self.masters.values()):
            parameter.grad = None

    def model_tensors(self) -> dict[str, torch.Tensor]:
        return self.experts.whole(self.module.state_dict())

    def load_model_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        own = self.experts.own(tensors)
        self.module.load_state_dict(own)
        with torch.no_grad():
            for master in self.masters.values():  # of a checkpoint in fp32; one with masters of its own puts them over these
                master.copy_(own[self.names[master]])

    def state_tensors(self) -> dict[str, torch.Tensor]:
        masters = {f"master.{self.names[m]}": m.detach() for m in self.masters.values()}
        return {**masters, **dict(named_state(self.optimizer, self.names))}  # type: ignore[arg-type]

    def state_bytes(self) -> int:
        return bytes_of(self.state_tensors().values())

    def state_begins(self) -> dict[str, int]:
        return self.experts.begins()

    def load_state(self, saved: SavedState) -> None:
        """Put the state back, also that of another precision: masters are fp32 weights, and fp32 weights are masters."""
        begins = self.state_begins()
        with torch.no_grad():
            for held, name in self.names.items():
                values = saved.part("master", name, begins.get(name, 0), held.numel())
                if values is not None:
                    held.copy_(values.reshape(held.shape))
        load_named_state(self.optimizer, self.names, begins, saved)  # type: ignore[arg-type]


def _sum_gradients(
    parameters: list[nn.Parameter], masters: Mapping[nn.Parameter, nn.Parameter], add: Callable[[torch.Tensor], object]
) -> list[nn.Parameter]:
    """Sum gradients over ranks, in fp32 and in one piece; give them to the masters, or the parameters that have none.

    Returns who got them. A rank without a gradient adds zeros.
    """
    if not parameters:
        return []
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        if parameter.grad is None:
            part.zero_()
        else:
            part.view_as(parameter).copy_(parameter.grad)
            parameter.grad = None
    add(flat)
    holders = [masters.get(parameter, parameter) for parameter in parameters]
    for holder, part in zip(holders, parts, strict=True):
        holder.grad = part.view_as(holder)
    return holders
