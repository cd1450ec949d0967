"""Optimizer state by parameter name, put together for whichever ranks and ZeRO stage go on with it.

Every rank saves what it holds of a parameter's state as one run of values of the flattened whole parameter:

    master.NAME, optimizer.exp_avg.NAME, optimizer.exp_avg_sq.NAME      [count], beginning at `begins[NAME]` (0 if left out)
    optimizer.step.NAME                                                 a scalar

A plain engine and stage 0 hold whole parameters, stages 1 to 3 a part of some, and with spread experts a rank has its own.
Whoever loads asks for the run that it holds itself. If its own file has it, no other file is read; else those of all ranks are
verified and mapped, and only the pages that are asked for are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .files import CheckpointError


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank saved: its tensors, and where in the whole parameter its runs begin."""

    tensors: Mapping[str, Tensor]
    begins: Mapping[str, int] = field(default_factory=dict)

    def run(self, kind: str, name: str) -> tuple[int, Tensor] | None:
        """Where the saved run begins, and its values."""
        tensor = self.tensors.get(f"{kind}.{name}")
        return None if tensor is None else (int(self.begins.get(name, 0)), tensor.reshape(-1))


class SavedState:
    """The optimizer state of a checkpoint, whoever saved it.

    Args:
        own: what the rank of the same number saved.
        others: gives what every other rank saved; called at most once, and only if `own` does not suffice.
        weights: the whole weights of the checkpoint; they stand in for masters that nobody saved.
    """

    def __init__(
        self,
        own: Shard,
        others: Callable[[], list[Shard]] = list,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._shards, self._others = [own], others
        self._complete = False
        self.weights: Mapping[str, Tensor] = weights if weights is not None else {}

    def shards(self) -> list[Shard]:
        """What every rank saved."""
        if not self._complete:
            self._shards += self._others()
            self._complete = True
        return self._shards

    def part(self, kind: str, name: str, begin: int, count: int) -> Tensor | None:
        """Values [begin, begin + count) of the flattened state `kind` of a parameter; None if no rank saved any of it.

        Raises:
            CheckpointError: the saved runs do not cover these values.
        """
        own = self._shards[0].run(kind, name)
        if own is not None and own[0] <= begin and begin + count <= own[0] + own[1].numel():
            return own[1][begin - own[0] : begin - own[0] + count]
        if own is None and self._never_saved(kind):
            return None
        runs = sorted(filter(None, (shard.run(kind, name) for shard in self.shards())), key=lambda run: run[0])
        if not runs:
            return None
        made = torch.empty(count, dtype=runs[0][1].dtype)
        at, end = begin, begin + count
        for first, values in runs:
            last = min(end, first + values.numel())
            if first <= at < last:
                made[at - begin : last - begin] = values[at - first : last - first]
                at = last
        if at < end:
            raise CheckpointError(f"the checkpoint lacks values {at} to {end - 1} of {kind} of {name}: it was not saved whole")
        return made

    def _never_saved(self, kind: str) -> bool:
        """Every rank saves the same kinds of state, so a rank that has moments and no masters knows that there are none."""
        own = self._shards[0].tensors
        return any(key.startswith("optimizer.") for key in own) and not any(key.startswith(f"{kind}.") for key in own)

    def master(self, name: str, begin: int, count: int) -> Tensor:
        """The fp32 values of a parameter: its master, or its weight where the weights were fp32 themselves.

        Raises:
            CheckpointError: there is neither.
        """
        saved = self.part("master", name, begin, count)
        if saved is None and name in self.weights:
            saved = self.weights[name].reshape(-1)[begin : begin + count].float()
        if saved is None:
            raise CheckpointError(f"the checkpoint has no values of {name}")
        return saved

    def scalar(self, kind: str, name: str) -> Tensor | None:
        """A count that every part of a parameter has, such as `optimizer.step`."""
        own = self._shards[0].run(kind, name)
        found = [own] if own is not None else list(filter(None, (shard.run(kind, name) for shard in self.shards())))
        return found[0][1].reshape(()) if found else None

    def whole_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights for a model in `dtype`: from the masters where the weights were saved with fewer bits."""
        return {
            name: self.part("master", name, 0, math.prod(tensor.shape)).reshape(tensor.shape)  # type: ignore[union-attr]
            if tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize and self._has_master(name)
            else tensor
            for name, tensor in self.weights.items()
        }

    def _has_master(self, name: str) -> bool:
        return any(f"master.{name}" in shard.tensors for shard in self.shards())
