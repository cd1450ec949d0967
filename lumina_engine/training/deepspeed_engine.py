"""The engine of DeepSpeed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .comm import Comm
from .deepspeed_experts import expert_groups, expert_handling
from .engine import StateMismatch, StepResult, adamw, load_named_state, named_state, parameter_groups
from .expert_parallel import SpreadExperts
from .precision import Precision


class SkippableAdamW(torch.optim.AdamW):
    """AdamW that leaves parameters and state alone while `skip` is set.

    At stage 0 DeepSpeed counts micro steps inside the same call that runs the optimizer, so a step that must not be applied
    still has to pass through it.
    """

    skip = False

    def step(self, closure: Any = None) -> Any:
        return None if self.skip else super().step(closure)


class DeepSpeedEngine:
    """DeepSpeed with a client AdamW, stages 0 to 2."""

    def __init__(self, model: nn.Module, config: Any, comm: Comm, ds_config: dict[str, Any]) -> None:
        import deepspeed

        os.environ.setdefault("LOCAL_RANK", str(comm.local_rank))  # DeepSpeed reads it itself
        # This op serves inference only, and building it costs tens of seconds and needs a compiler at every start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        level = getattr(logging, str(config.deepspeed_log_level).upper())
        logging.getLogger("DeepSpeed").setLevel(level)
        deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=level <= logging.INFO)
        self.comm = comm
        self.stage = int(ds_config.get("zero_optimization", {}).get("stage", 0))
        self.max_grad_norm = config.max_grad_norm
        precision = Precision.from_name(config.precision)
        model = model.to(device=comm.device, dtype=precision.weights)
        kind = torch.optim.AdamW if self.stage > 0 else SkippableAdamW  # ZeRO accepts only optimizers that it knows
        self.experts = SpreadExperts(model, comm)
        groups = expert_groups(parameter_groups(model, config.weight_decay), self.experts)
        with expert_handling(model, self.experts):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=adamw(groups, config, kind), config=ds_config, dist_init_required=False
            )
        self.module: nn.Module = self.engine.module
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.names = {p: n for n, p in self.module.named_parameters() if p.requires_grad}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed averages over ranks, and would divide by the accumulation steps unless told not to
        self.engine.backward(loss * self.comm.world_size, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # it counts micro batches itself and updates nothing before the last

    def step(self, lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stage > 0:
            self.engine.step()
            return StepResult(float(self.engine.get_global_grad_norm()), not self.optimizer.overflow)
        norm = self.experts.norm(*self.experts.split(self.parameters))
        applied = bool(torch.isfinite(norm))
        if applied and self.experts.group is not None and self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.optimizer.skip = not applied
        self.engine.step()
        self.optimizer.skip = False
        return StepResult(float(norm), applied)

    def model_tensors(self) -> dict[str, torch.Tensor]:
        return self.experts.whole(self.module.state_dict())

    def load_model_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.module.load_state_dict(self.experts.own(tensors))

    def _partitions(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield from enumerate(self.optimizer.single_partition_of_fp32_groups)

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if self.stage > 0 else self.optimizer

    def _state_names(self) -> dict[torch.Tensor, str]:
        if self.stage == 0:
            return self.names
        return {partition: f"group-{index}" for index, partition in self._partitions()}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Optimizer state of this rank as plain tensors: per parameter at stage 0, per flat partition at stages 1 and 2."""
        tensors = dict(named_state(self._base_optimizer(), self._state_names()))
        if self.stage > 0:
            tensors.update({f"master.group-{index}": partition.detach() for index, partition in self._partitions()})
        return tensors

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.stage > 0:
            for index, partition in self._partitions():
                saved = tensors.get(f"master.group-{index}")
                if saved is None:
                    raise StateMismatch(
                        "the checkpoint has no partitioned optimizer state: it was saved with another zero_stage or precision; "
                        "set them as they were"
                    )
                if saved.numel() != partition.numel():
                    raise ValueError(f"partition {index} has {saved.numel()} values, expected {partition.numel()}")
                partition.data.copy_(saved)
        load_named_state(self._base_optimizer(), self._state_names(), tensors)
