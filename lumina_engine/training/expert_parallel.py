"""Expert parallelism: groups of ranks that hold the experts of every block together, and what an engine does differently then.

With world = R · copies, ranks 0 to R-1 form the first group of peers, R to 2R-1 the next: peers exchange tokens in every block,
so they stand close together. Rank i holds the experts of place i mod R; the ranks of one place are replicas of each other.
The gradient of an expert is complete on the rank that holds it but for the tokens of the other groups, so it is summed over
replicas only; every other gradient is summed over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..config.finding import ConfigError
from ..config.resolve import expert_ranks_findings
from ..model.exchange import ExpertGroup
from ..model.transformer import DeepSeekTransformer
from .comm import Comm
from .engine import global_norm


def expert_group(comm: Comm, size: int, overlap: bool) -> ExpertGroup:
    """This rank's group of `size` peers. A collective of all ranks.

    Raises:
        ConfigError: `size` does not divide the number of ranks.
    """
    if findings := expert_ranks_findings(size, comm.world_size):
        raise ConfigError(findings)
    copies = comm.world_size // size
    peers = [dist.new_group(range(i * size, (i + 1) * size)) for i in range(copies)]
    replicas = [dist.new_group(range(i, comm.world_size, size)) for i in range(size)]
    number, place = divmod(comm.rank, size)
    return ExpertGroup(peers[number], place, size, replicas[place], copies, overlap)


def spread_experts(model: DeepSeekTransformer, comm: Comm) -> None:
    """Spread the experts of `model` over ranks as its configuration says; nothing if they are, or if each rank has all."""
    shape = model.config
    if shape.use_moe and shape.expert_parallel_size > 1 and model.expert_group is None:
        model.spread_experts(expert_group(comm, shape.expert_parallel_size, shape.overlap_alltoall))


def build_model(config: Any, comm: Comm) -> DeepSeekTransformer:
    """A model on `meta`, with this rank's share of the experts. The trainer gives it its first weights."""
    with torch.device("meta"):
        model = DeepSeekTransformer(config)
    spread_experts(model, comm)
    return model


class SpreadExperts:
    """The spread experts of a model as an engine sees them. Without expert parallelism there are none, and nothing differs."""

    def __init__(self, model: nn.Module, comm: Comm) -> None:
        self.comm = comm
        self.group: ExpertGroup | None = getattr(model, "expert_group", None)
        self.weights: dict[str, nn.Parameter] = model.expert_weights if self.group is not None else {}  # type: ignore[assignment]

    def split(self, parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that all ranks have, and those of the experts of this rank."""
        mine = set(self.weights.values())
        return [p for p in parameters if p not in mine], [p for p in parameters if p in mine]

    def sum(self, flat: torch.Tensor) -> None:
        """Sum over the replicas of this rank's experts, in place."""
        if self.group is not None and self.group.copies > 1:
            dist.all_reduce(flat, group=self.group.replicas)

    def norm(self, everywhere: list[nn.Parameter], mine: list[nn.Parameter]) -> torch.Tensor:
        """The 2-norm of all gradients of the model, each counted once: the same bits on every rank. A collective."""
        norm = global_norm(everywhere)
        if self.group is None:
            return norm
        # Over all ranks rather than over peers: replicas then cannot differ, and with them the choice to skip a step.
        squares = self.comm.sum(global_norm(mine).double().square().to(self.comm.device)) / self.group.copies
        return (norm.double().square() + squares).sqrt().float()

    def begins(self) -> dict[str, int]:
        """Where this rank's part of each expert weight begins in the flattened weight of all experts; zeros are left out."""
        if self.group is None or self.group.place == 0:
            return {}
        return {name: self.group.place * weight.numel() for name, weight in self.weights.items()}

    def whole(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`state_dict` with all experts, on rank 0 and in host memory; empty on other ranks. A collective."""
        if self.group is None:
            return dict(state)
        gathered: dict[str, torch.Tensor] = {}
        if self.comm.rank < self.group.size:  # the other groups have the same experts
            for name in self.weights:
                part = state[name].contiguous()
                parts = [torch.empty_like(part) for _ in range(self.group.size)] if self.comm.rank == 0 else None
                dist.gather(part, parts, dst=0, group=self.group.peers)
                if parts is not None:
                    gathered[name] = torch.cat([piece.cpu() for piece in parts])
        return {**state, **gathered} if self.comm.rank == 0 else {}

    def own(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reverse of `whole`: of all experts those of this rank."""
        group = self.group
        if group is None:
            return dict(state)
        return {name: group.own(tensor) if name in self.weights else tensor for name, tensor in state.items()}
