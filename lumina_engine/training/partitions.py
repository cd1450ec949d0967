"""What the flat fp32 partitions of DeepSpeed's ZeRO optimizers are made of, so that their state can be saved by parameter name.

Stages 1 and 2 flatten the parameters of a group one after the other and cut the whole evenly: a rank may hold the end of one
parameter and the beginning of another; DeepSpeed notes which (`_hp_mapping`). Stage 3 cuts each parameter evenly, and a rank's
partition holds its part of each, padded at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Piece:
    """Values [begin, begin + count) of a flattened whole parameter lie at `offset` of a flat partition."""

    name: str
    begin: int
    offset: int
    count: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The piece's values, a view."""
        return flat[self.offset : self.offset + self.count]


def flat_pieces(group: Sequence[nn.Parameter], names: Mapping[Any, str], begins: Mapping[str, int]) -> Iterator[Piece]:
    """Pieces of this rank's partition of a parameter group at stages 1 and 2.

    Args:
        begins: where this rank's own part of a parameter begins in the whole one, for spread experts.
    """
    for parameter in group:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            name, here, there = names[parameter], mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Piece(name, begins.get(name, 0) + int(here.start), int(there.start), int(here.numel))


def split_pieces(group: Sequence[Any], names: Mapping[Any, str]) -> Iterator[Piece]:
    """Pieces of this rank's partition of a sub-group at stage 3; the padding behind a parameter's end is nobody's."""
    offset = 0
    for parameter in group:
        size = int(parameter.partition_numel())
        begin = size * torch.distributed.get_rank(parameter.ds_process_group)
        count = min(size, int(parameter.ds_numel) - begin)
        if count > 0:
            yield Piece(names[parameter], begin, offset, count)
        offset += size
