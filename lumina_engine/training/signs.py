"""What only the trainer can see of a run's health: parts of the model that stand still, and batches that come again."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
import torch
from torch import nn

from ..data.batch import Batch
from .memory import held, whole_shape

LOOK = 32  # steps between two looks at the weights: fewer, and a small rate moves nothing in 16 bit
SAMPLE = 1_024  # values of a matrix that are looked at
REMEMBERED = 4_096  # batches


class Movement:
    """Which parts of a model (each block, embedding, head) stand still while others learn.

    A look compares some values of each matrix with those of the look before, bit by bit. Vectors are left out: in 16 bit a
    weight of 1 stays where it is for long. Under ZeRO 3 only this rank's part of each matrix is seen.
    """

    def __init__(self, model: nn.Module, step: int) -> None:
        self.model, self.step = model, step
        self._before = self._values()

    def look(self, step: int) -> list[str]:
        """The parts in which no value has changed since the last look. Empty less than `LOOK` steps after it."""
        if step - self.step < LOOK:
            return []
        self.step = step
        before, self._before = self._before, self._values()
        still = {
            part: all(torch.equal(old, new) for old, new in zip(before[part], values, strict=True))
            for part, values in self._before.items()
        }
        return [] if all(still.values()) else [part for part in still if still[part]]

    def _values(self) -> dict[str, list[torch.Tensor]]:
        found: dict[str, list[torch.Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            values = held(parameter).detach().flatten()
            if len(whole_shape(parameter)) > 1 and len(values):
                step = -(-len(values) // SAMPLE)
                found.setdefault(_part(name), []).append(values[::step].clone())
        return found


def _part(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"block {rest.partition('.')[0]}" if first == "blocks" else first


class Repeats:
    """Whether a batch has the very tokens of an earlier one of its epoch. On this rank; the last `REMEMBERED` are known.

    A batch of one row is left out: data with repeats in them give one row again without any fault of the order. `found` is
    the step of the earlier one, None if there is none.
    """

    def __init__(self) -> None:
        self.found: int | None = None
        self._epoch = 0
        self._steps: OrderedDict[int, int] = OrderedDict()  # digest -> step

    def take(self, batches: Collection[Batch], epoch: int, step: int) -> None:
        """Take the batch of `step`, before it is on a device."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._steps.clear()
        self.found = None
        if sum(len(batch.input_ids_BS) for batch in batches) < 2:
            return
        digest = 0
        for batch in batches:
            digest = zlib.crc32(np.ascontiguousarray(batch.input_ids_BS.numpy()).data, digest)
        self.found = self._steps.pop(digest, None)
        self._steps[digest] = step
        if len(self._steps) > REMEMBERED:
            self._steps.popitem(last=False)
