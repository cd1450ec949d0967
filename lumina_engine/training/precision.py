"""The one source of dtypes: what the weights are stored in, and what autocast computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """`fp32`; `bf16`, `fp16`: weights and gradients in it with fp32 masters; `mixed_*`: fp32 weights, autocast.

    Router, norms, softmax and loss are computed in fp32 in every mode; that is the model's own doing.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None

    @classmethod
    def from_name(cls, name: str) -> Precision:
        modes = {
            "fp32": (torch.float32, None),
            "bf16": (torch.bfloat16, None),
            "fp16": (torch.float16, None),
            "mixed_bf16": (torch.float32, torch.bfloat16),
            "mixed_fp16": (torch.float32, torch.float16),
        }
        if name not in modes:
            raise ValueError(f"precision {name!r}: training here knows {', '.join(modes)}")
        return cls(name, *modes[name])

    @property
    def scaled(self) -> bool:
        """Whether gradients are in fp16, whose small values round to zero without a loss scale."""
        return torch.float16 in (self.weights, self.autocast)

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The autocast context of a forward pass."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)
