"""A last word before an optimizer changes anything, also inside an engine that calls the optimizer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Veto:
    """Lets `optimizer.step()` pass without effect where `refused` says so.

    By torch's own hooks: parameters without a gradient are left alone, state and step counter too. So the gradients are taken
    away before the step and put back after it, for whoever keeps them. `refused` is asked once per call.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.refused: Callable[[], bool] | None = None
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.refused is None or not self.refused():
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._held.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self._held:
            parameter.grad = gradient
        self._held.clear()
