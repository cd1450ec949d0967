"""Two ways to turn losses into updates, behind one small interface: DeepSpeed, and plain PyTorch with the same numbers.

Both take a loss that is this rank's *share* of the global objective: the sum over ranks and micro batches of what is passed
to `backward` is the objective whose gradient is applied. What DeepSpeed divides by itself is
multiplied back here, and nowhere else.

A step whose gradient is not finite, or that `allows` refuses, changes no parameter on any rank: `step` then returns
`applied=False`. `allows` is given the gradient norm before the update, where it is finite; the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..checkpoint.universal import SavedState
from .comm import Comm
from .loss_scale import LossScale
from .masters import norm_by_stretches
from .memory import whole_shape


@dataclass(frozen=True)
class StepResult:
    """`grad_norm` is the global 2-norm before clipping. `applied`: it was finite and nobody refused the step.

    `overflow`: it was not applied because the loss scale was too high, which is lower now. `scale` is that of the next step.
    """

    grad_norm: float
    applied: bool
    overflow: bool = False
    scale: float | None = None

    @classmethod
    def of(cls, grad_norm: float, scale: LossScale | None, allowed: bool = True) -> StepResult:
        """The result of a step whose gradient has this norm; the loss scale takes note of it."""
        finite = math.isfinite(grad_norm)
        applied = finite and allowed
        if scale is None:
            return cls(grad_norm, applied)
        lowered = scale.update(overflow=not finite)
        return cls(grad_norm, applied, lowered, scale.value)


Allows = Callable[[float], bool]  # gradient norm -> whether the step may change parameters


def anything(grad_norm: float) -> bool:
    """Refuses no step."""
    return True


class Engine(Protocol):
    """`backward` once per micro batch, with `last` for the last one of a step; then `step` with the rate in force.

    `model_tensors` are the whole weights and buffers on rank 0 (a collective; other ranks may get an empty mapping);
    `state_tensors` are this rank's part of the rest by name of parameter, each a run of the flattened whole parameter that
    begins at `state_begins` (0 if left out); `state_bytes` counts those in memory, not on disk. All are called on all ranks at
    a step boundary, and so are the reverses: they get the whole weights on every rank, and the state of a run with any number
    of ranks and any stage.
    """

    module: nn.Module
    scale: LossScale | None  # of fp16

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: torch.Tensor, last: bool) -> None: ...
    def step(self, lr: float, allows: Allows = anything) -> StepResult: ...
    def discard(self) -> None: ...
    def model_tensors(self) -> dict[str, torch.Tensor]: ...
    def load_model_tensors(self, tensors: dict[str, torch.Tensor]) -> None: ...
    def state_tensors(self) -> dict[str, torch.Tensor]: ...
    def state_bytes(self) -> int: ...
    def state_begins(self) -> dict[str, int]: ...
    def load_state(self, saved: SavedState) -> None: ...


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norms, biases, embeddings and routers do not."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = len(whole_shape(parameter)) < 2 or "embed" in name or "router" in name
        (no_decay if exempt else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


_AdamW = TypeVar("_AdamW", bound=torch.optim.AdamW)


def adamw(groups: Iterable[dict[str, Any]], config: Any, kind: type[_AdamW]) -> _AdamW:
    """AdamW, fused where the device has it (CPU and CUDA do)."""
    return kind(
        list(groups), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True
    )


def named_state(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimizer's state of the tensors in `names`, as `optimizer.<key>.<name>`."""
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"optimizer.{key}.{name}", torch.as_tensor(value)


class StateMismatch(Exception):
    """Saved optimizer state does not belong to this engine; the run is refused rather than started with half of it."""

    exit_code = 65


MOMENTS = ("exp_avg", "exp_avg_sq")


def saved_moments(saved: SavedState, name: str, begin: int, count: int) -> dict[str, torch.Tensor]:
    """The saved state of AdamW for values [begin, begin + count) of a parameter: `step`, and the moments flat.

    Raises:
        StateMismatch: none was saved. CheckpointError: not all of it was.
    """
    state = {"step": saved.scalar("optimizer.step", name)}
    state |= {key: saved.part(f"optimizer.{key}", name, begin, count) for key in MOMENTS}
    missing = [key for key, value in state.items() if value is None]
    if missing:
        raise StateMismatch(
            f"the checkpoint has no optimizer state {', '.join(missing)} of {name}: it holds weights only, or an earlier "
            "version of Lumina saved it; start a new run from it with `lumina-engine checkpoint export` and `import`"
        )
    # tensors of their own: a shared step counter would be advanced once per parameter, and mapped files are not written to
    return {key: value.clone() for key, value in state.items() if value is not None}


def load_named_state(
    optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], begins: dict[str, int], saved: SavedState
) -> None:
    """Put back what `named_state` gave, or its part that belongs to these tensors, on the device of each.

    The counter of steps too: the fused kernels of a GPU take none from the host.

    Raises:
        StateMismatch, CheckpointError: as `saved_moments`.
    """
    for parameter, name in names.items():
        state = saved_moments(saved, name, begins.get(name, 0), parameter.numel())
        moments = {key: state[key].to(parameter.device).reshape(parameter.shape) for key in MOMENTS}
        optimizer.state[parameter] = {"step": state["step"].to(parameter.device, torch.float32), **moments}


def global_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together, in fp32."""
    return norm_of([p.grad for p in parameters if p.grad is not None])


def norm_of(grads: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of tensors of one dtype together, in fp32."""
    if not grads:
        return torch.zeros(())
    # torch's own norm of a tensor adds up naively in fp32 on a CPU: 1 % is lost over 134 M values
    exact = grads[0].dtype == torch.float32 and grads[0].device.type != "cpu"
    return torch.nn.utils.get_total_norm(grads) if exact else norm_by_stretches(grads)


def build_engine(model: nn.Module, config: Any, comm: Comm, ds_config: dict[str, Any] | None) -> Engine:
    """DeepSpeed if `use_deepspeed`, else plain PyTorch; never one in place of the other.

    Raises:
        RuntimeError: DeepSpeed is wanted and not installed.
    """
    if not config.use_deepspeed:
        from .plain_engine import PlainEngine

        return PlainEngine(model, config, comm)
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "use_deepspeed=true, but deepspeed cannot be imported: pip install 'deepspeed>=0.19', or set use_deepspeed=false"
        ) from error
    if ds_config is None:
        raise RuntimeError("use_deepspeed=true needs the DeepSpeed configuration that the config generates")
    from .deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config, comm, ds_config)
