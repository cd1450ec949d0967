"""Spread experts under DeepSpeed, stages 0 to 2.

DeepSpeed knows experts that not all ranks have: parameters with `allreduce = False` and a `group_name`, in a parameter group
marked `moe`. It reduces their gradients (and at stages 1 and 2 partitions their optimizer state) over the ranks that hold the
same experts, divides by the number of all ranks as for the other gradients, and looks for infinities over all ranks. At
stages 1 and 2 its norm is that of all gradients. At stage 0 it is not (it averages the norms of the ranks), so clipping is
not left to it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .expert_parallel import SpreadExperts


def expert_groups(groups: list[dict[str, Any]], experts: SpreadExperts) -> list[dict[str, Any]]:
    """Optimizer groups with the experts of this rank in groups of their own, marked as DeepSpeed wants them."""
    if experts.group is None:
        return groups
    name = _name(experts.group.size)
    marked = []
    for group in groups:
        everywhere, mine = experts.split(group["params"])
        for parameter in mine:
            parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
        marked += [{**group, "params": everywhere}, {**group, "params": mine, "moe": True, "name": name}]
    return [group for group in marked if group["params"]]


@contextmanager
def expert_handling(model: nn.Module, experts: SpreadExperts) -> Iterator[None]:
    """While DeepSpeed takes the model in: it handles experts only in a model that contains its own MoE layer, so a layer of
    that kind without weights stands in it meanwhile, and makes the process groups when DeepSpeed asks it to."""
    if experts.group is None:
        yield
        return
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    size = experts.group.size

    class Mark(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = size

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            if _name(size) not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(size)

    model.add_module("mark", Mark())
    try:
        yield
    finally:
        del model.mark


def _name(size: int) -> str:
    """What DeepSpeed calls the group."""
    return f"ep_size_{size}"
