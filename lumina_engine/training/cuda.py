"""Settings of CUDA that trade exactness to the bit for speed, behind one seam that tests drive without a GPU."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

import torch

_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
# torch takes the first of these that is set (HIP's in its builds for AMD only) and merges nothing
_OF_THE_USER = (_ALLOCATOR, "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def optimize_cuda_settings(
    deterministic: bool = False, *, backend: Any = torch, environment: MutableMapping[str, str] | None = None
) -> dict[str, str]:
    """Set what makes training on NVIDIA GPUs faster; call it before the first tensor is put on one.

    TF32 in fp32 matrix products, cuDNN's search for the fastest kernel, and an allocator whose segments grow (less memory lost
    to gaps). A setting of the user's own for the allocator stays, whichever of torch's variables holds it.

    Args:
        deterministic: leave TF32 and the search off, because results would not be the same to the bit.
        backend: the torch module, or what stands for it.
        environment: where the allocator's setting goes; this process's by default.

    Returns:
        What was set, by name. Empty without a GPU.
    """
    if not backend.cuda.is_available():
        return {}
    environment = os.environ if environment is None else environment
    done: dict[str, str] = {}
    if not backend.cuda.is_initialized() and not any(name in environment for name in _OF_THE_USER):
        environment[_ALLOCATOR] = done["allocator"] = "expandable_segments:True"
    if not deterministic:
        backend.set_float32_matmul_precision("high")
        done["float32_matmul_precision"] = "high"  # TF32
        backend.backends.cudnn.benchmark = True
        done["cudnn_benchmark"] = "True"
    return done
