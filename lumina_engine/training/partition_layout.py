"""What lies where in the flat partitions of ZeRO: a digest saved with each, so that no state is read into another order.

Settings of DeepSpeed may reorder the parameters of a group or group them otherwise (`round_robin_gradients`,
`parameter_alignment`, sub-groups). The number of values stays the same then, and only the layout tells.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from .memory import whole_shape


def layout_digests(zero: Any, stage: int, names: dict[torch.Tensor, str]) -> list[torch.Tensor]:
    """For each partition of DeepSpeed's optimizer the SHA-256 of names, shapes and offsets in its order: 32 bytes (uint8)."""
    if stage == 3:
        groups = [[(names[p], tuple(whole_shape(p)), 0) for p in group] for group in zero.fp16_groups]
    else:
        groups = [
            [(names[p], tuple(p.shape), offset) for p, offset in zip(parameters, offsets, strict=True)]
            for parameters, offsets in zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        ]
    return [torch.tensor(list(hashlib.sha256(repr(group).encode()).digest()), dtype=torch.uint8) for group in groups]
