"""Weights that ZeRO stage 3 splits over the ranks: splitting, gathering and replacing them, one parameter at a time.

No rank ever holds more than its part of the model and one whole parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .comm import Comm
from .engine import StateMismatch
from .memory import whole_numel


def split_weights(model: Any, dtype: torch.dtype, seed: int, comm: Comm, ds_config: dict[str, Any]) -> None:
    """Split the weights of `model` over the ranks, in place, in `dtype`. A collective.

    A parameter on `meta` gets its first values, the bits that `init_weights(seed)` gives; any other keeps rank 0's.
    """
    from deepspeed import zero

    # Parameters that are split know how to split others in the same way: the first one needs DeepSpeed's own context.
    first: nn.Parameter | None = None
    for name, parameter in list(model.named_parameters()):
        whole = _whole(model, name, parameter, dtype, seed, comm)
        if first is None:
            zero.Init(module=nn.ParameterList([whole]), config_dict_or_path=ds_config, dtype=dtype)
            first = whole
        else:
            first.convert_to_zero_parameters([whole])  # type: ignore[attr-defined]
    _place_buffers(model, comm.device)


def _whole(model: Any, name: str, parameter: nn.Parameter, dtype: torch.dtype, seed: int, comm: Comm) -> nn.Parameter:
    """The parameter with its values in `dtype`; rank 0's count, so the others need only room for them."""
    if not parameter.is_meta:
        parameter.data = parameter.data.to(dtype)
        return parameter
    if comm.rank == 0:
        values = model.first_weight(name, seed).to(dtype)
    else:
        values = torch.empty(parameter.shape, dtype=dtype, device=comm.device)
    owner, _, last = name.rpartition(".")
    whole = nn.Parameter(values, requires_grad=parameter.requires_grad)
    setattr(model.get_submodule(owner), last, whole)
    return whole


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers are whole on every rank. Those on `meta` begin as zeros, as in `init_weights`."""
    for name, buffer in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        here = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        setattr(model.get_submodule(owner), last, here)


def gathered(module: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The whole weights and buffers of a module whose parameters are split over ranks, in host memory; {} without `keep`.

    A collective. One parameter at a time, so no rank but the one that keeps them ever holds more than one.
    """
    from deepspeed import zero

    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        with zero.GatheredParameters([parameter]):
            if keep:
                tensors[name] = parameter.detach().to("cpu", copy=True)
    if keep:
        tensors |= {name: tensor for name, tensor in module.state_dict().items() if name not in tensors}
    return tensors


def scatter(module: nn.Module, tensors: dict[str, torch.Tensor], rank: int) -> None:
    """Give whole weights and buffers to a module whose parameters are split over ranks. A collective; rank 0's weights count.

    Raises:
        StateMismatch: the names or shapes are not those of the module.
    """
    from deepspeed import zero

    buffers = {name: buffer for name, buffer in module.state_dict(keep_vars=True).items() if not hasattr(buffer, "ds_id")}
    parameters = dict(module.named_parameters())
    odd = sorted((set(buffers) | set(parameters)) ^ set(tensors))
    odd += [name for name, p in parameters.items() if name in tensors and tensors[name].numel() != whole_numel(p)]
    if odd:
        raise StateMismatch(f"the weights of the checkpoint do not fit the model: {', '.join(odd[:5])}")
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(tensors[name])
        for name, parameter in parameters.items():
            with zero.GatheredParameters([parameter], modifier_rank=0):
                if rank == 0:
                    parameter.copy_(tensors[name])
