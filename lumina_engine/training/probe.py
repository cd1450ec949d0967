"""What only an import can show, as one JSON line: `python -m lumina_engine.training.probe torch` (or `deepspeed`).

A process of its own, so that a broken installation, or one that hangs, cannot take the asker with it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# the operators that DeepSpeed compiles when they are first used, by accelerator
_OPERATORS = {"cpu": ("ShmCommBuilder", "CPUAdamBuilder"), "cuda": ("FusedAdamBuilder", "CPUAdamBuilder", "AsyncIOBuilder")}


def torch_facts() -> dict[str, Any]:
    """Version, build, a product of two matrices, and whether a process group of one rank comes about."""
    import torch

    matrix = torch.ones(64, 64)
    product = {
        str(kind).removeprefix("torch."): bool(((matrix.to(kind) @ matrix.to(kind)) == 64).all())
        for kind in (torch.float32, torch.bfloat16)
    }
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "products": product,
        "gloo": _gloo(),
        **_cuda(),
    }


def _gloo() -> str:
    """Empty, or why no process group of gloo comes about."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return "this build of torch has no gloo"
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
    except (RuntimeError, OSError) as error:
        return str(error).splitlines()[0]
    return ""


def _cuda() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return {"devices": [], "nccl": None, "flash": False}
    devices = [
        {
            "name": torch.cuda.get_device_name(index),
            "capability": list(torch.cuda.get_device_capability(index)),
            "product": float((torch.ones(16, 16, device=f"cuda:{index}") @ torch.ones(16, 16, device=f"cuda:{index}"))[0, 0]),
        }
        for index in range(torch.cuda.device_count())
    ]
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version()) if dist.is_nccl_available() else None
    return {"devices": devices, "nccl": nccl, "flash": bool(torch.backends.cuda.is_flash_attention_available())}


def deepspeed_facts() -> dict[str, Any]:
    """Version, accelerator, and the operators that would be compiled."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    accelerator = get_accelerator()
    name = accelerator.device_name().split(":")[0]
    operators = {}
    for builder_name in _OPERATORS.get(name, ()):
        builder = accelerator.create_op_builder(builder_name)
        if builder is not None and "not_implemented" not in builder.name:  # DeepSpeed's stand-in for what an accelerator lacks
            built = bool(installed_ops.get(builder.name.removeprefix("deepspeed_"), installed_ops.get(builder.name, False)))
            operators[builder.name] = {"built": built, "compatible": bool(builder.is_compatible(verbose=False))}
    return {"version": deepspeed.__version__, "accelerator": name, "operators": operators}


def main(argv: list[str]) -> int:
    """Print the facts as the last line of stdout; what the libraries say goes before it."""
    facts = {"torch": torch_facts, "deepspeed": deepspeed_facts}[argv[0]]()
    print(json.dumps(facts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
