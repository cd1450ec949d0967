"""Two ways to turn losses into updates, behind one small interface: DeepSpeed, and plain PyTorch with the same numbers.

Both take a loss that is this rank's *share* of the global objective: the sum over ranks and micro batches of what is passed
to `backward` is the objective whose gradient is applied. What DeepSpeed divides by itself is
multiplied back here, and nowhere else.

A step whose gradient is not finite changes no parameter on any rank: `step` then returns `applied=False`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .comm import Comm
from .precision import Precision


@dataclass(frozen=True)
class StepResult:
    """`grad_norm` is the global 2-norm before clipping; not finite where the step was not applied."""

    grad_norm: float
    applied: bool


class Engine(Protocol):
    """`backward` once per micro batch, with `last` for the last one of a step; then `step` with the rate in force."""

    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: torch.Tensor, last: bool) -> None: ...
    def step(self, lr: float) -> StepResult: ...
    def state_tensors(self) -> dict[str, torch.Tensor]: ...
    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None: ...


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norms, biases, embeddings and routers do not."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or "embed" in name or "router" in name
        (no_decay if exempt else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class SkippableAdamW(torch.optim.AdamW):
    """AdamW that leaves parameters and state alone while `skip` is set.

    At stage 0 DeepSpeed counts micro steps inside the same call that runs the optimizer, so a step that must not be applied
    still has to pass through it.
    """

    skip = False

    def step(self, closure: Any = None) -> Any:
        return None if self.skip else super().step(closure)


def adamw(
    groups: Iterable[dict[str, Any]], config: Any, kind: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.AdamW:
    """AdamW, fused where the device has it (CPU and CUDA do)."""
    return kind(
        list(groups), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True
    )


def _named_state(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{key}.{names[parameter]}", torch.as_tensor(value)


class StateMismatch(Exception):
    """Saved optimizer state does not belong to this engine; the run is refused rather than started with half of it."""

    exit_code = 65


def _load_named_state(
    optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], tensors: dict[str, torch.Tensor]
) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                saved = tensors.get(f"optimizer.{key}.{names[parameter]}")
                if saved is None:
                    raise StateMismatch(
                        f"the checkpoint has no optimizer state {key} of {names[parameter]}: it was saved with another "
                        "zero_stage, precision or use_deepspeed; set them as they were"
                    )
                if key != "step" and saved.numel() != parameter.numel():
                    raise ValueError(
                        f"optimizer state {key} of {names[parameter]} has {saved.numel()} values, expected {parameter.numel()}"
                    )
                # a tensor of its own for each parameter: a shared step counter would be advanced once per parameter
                state[key] = saved.clone() if key == "step" else saved.to(parameter.device).reshape(parameter.shape).clone()
            if state:
                optimizer.state[parameter] = state


def _norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())


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
        self.max_grad_norm = config.max_grad_norm
        groups = parameter_groups(self.module, config.weight_decay)
        self.masters: dict[nn.Parameter, nn.Parameter] = {}
        if self.precision.weights != torch.float32:
            self.masters = {p: nn.Parameter(p.detach().float().clone()) for p in self.parameters}
            groups = [{**group, "params": [self.masters[p] for p in group["params"]]} for group in groups]
            self.names = {self.masters[p]: name for p, name in self.names.items()}
        self.optimizer = adamw(groups, config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision.context(self.comm.device):
            return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def _sum_over_ranks(self) -> None:
        if self.comm.world_size == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.float().reshape(-1) for p in self.parameters])  # type: ignore[union-attr]
        self.comm.sum(flat)
        at = 0
        for parameter in self.parameters:
            part = flat[at : at + parameter.numel()].view_as(parameter)
            parameter.grad.copy_(part)  # type: ignore[union-attr]
            at += parameter.numel()

    def step(self, lr: float) -> StepResult:
        self._sum_over_ranks()
        worked = self.parameters
        if self.masters:
            for parameter, master in self.masters.items():
                master.grad = None if parameter.grad is None else parameter.grad.float()
            worked = list(self.masters.values())
        norm = _norm(worked)
        grad_norm = float(norm)
        applied = bool(torch.isfinite(norm))
        if applied:
            if self.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(worked, self.max_grad_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            with torch.no_grad():
                for parameter, master in self.masters.items():
                    parameter.copy_(master)
        for parameter in {*self.parameters, *worked}:
            parameter.grad = None
        return StepResult(grad_norm, applied)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        masters = {f"master.{self.names[m]}": m.detach() for m in self.masters.values()}
        return {**masters, **dict(_named_state(self.optimizer, self.names))}  # type: ignore[arg-type]

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for master in self.masters.values():
                master.copy_(tensors[f"master.{self.names[master]}"])
        _load_named_state(self.optimizer, self.names, tensors)  # type: ignore[arg-type]


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
        precision = Precision.from_name(config.precision)
        model = model.to(device=comm.device, dtype=precision.weights)
        kind = torch.optim.AdamW if self.stage > 0 else SkippableAdamW  # ZeRO accepts only optimizers that it knows
        optimizer = adamw(parameter_groups(model, config.weight_decay), config, kind)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
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
        norm = _norm(self.parameters)
        applied = bool(torch.isfinite(norm))
        self.optimizer.skip = not applied
        self.engine.step()
        self.optimizer.skip = False
        return StepResult(float(norm), applied)

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
        tensors = dict(_named_state(self._base_optimizer(), self._state_names()))
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
        _load_named_state(self._base_optimizer(), self._state_names(), tensors)


def build_engine(model: nn.Module, config: Any, comm: Comm, ds_config: dict[str, Any] | None) -> Engine:
    """DeepSpeed if `use_deepspeed`, else plain PyTorch; never one in place of the other.

    Raises:
        RuntimeError: DeepSpeed is wanted and not installed.
    """
    if not config.use_deepspeed:
        return PlainEngine(model, config, comm)
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "use_deepspeed=true, but deepspeed cannot be imported: pip install 'deepspeed>=0.19', or set use_deepspeed=false"
        ) from error
    if ds_config is None:
        raise RuntimeError("use_deepspeed=true needs the DeepSpeed configuration that the config generates")
    return DeepSpeedEngine(model, config, comm, ds_config)
