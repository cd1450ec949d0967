"""Memory in use and memory needed: the device's allocator, the host, and the model's own parts. Bytes throughout."""

from __future__ import annotations

import errno
from typing import Any

import psutil
import torch

from ..config.curriculum import Curriculum


def memory_stats(model: Any, optimizer_tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Memory now. On CPU the device figures are those of this process (`allocated` and `reserved` = resident set)."""
    host = psutil.virtual_memory()
    process = psutil.Process().memory_info()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    optimizer = sum(t.numel() * t.element_size() for t in optimizer_tensors.values())
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        on_device = {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "total": total,
            "free": free,
        }
    else:
        peak = max(process.rss, _peak_rss())  # the kernel updates the peak with a delay
        on_device = {
            "allocated": process.rss,
            "reserved": process.rss,
            "peak": peak,
            "total": host.total,
            "free": host.available,
        }
    return {
        "device": {"type": device.type, **on_device},
        "host": {"rss": process.rss, "available": host.available, "total": host.total},
        "components": {"parameters": parameters, "gradients": gradients, "optimizer": optimizer},
    }


def _peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


WORST_DOCUMENT = 17  # tokens: attention lays it into a rectangle that is 32 wide


class DoesNotFit(MemoryError):
    """The worst micro batch does not fit: a matter of the configuration, told before the first step."""

    exit_code = 2


def dry_run(model: Any, config: Any, device: torch.device, context: Any) -> None:
    """One forward and backward pass at the worst shape, before the first step: what does not fit fails now, with advice.

    Parameters, gradients and random state are as before. Rows are full, every token is trained, and documents are just longer
    than the narrowest rectangle of attention, which leaves the most filler in it. The longest rows of a curriculum are the
    worst: all its shapes have the same tokens, and only what grows with the square of the length tells them apart.

    Raises:
        DoesNotFit: it does not fit; the message names the keys that would help.
    """
    rng = torch.get_rng_state()
    length = Curriculum.of(config).lengths[-1]
    shape = (config.batch_size * config.seq_length // length, length)
    ids_BS = torch.arange(shape[0] * shape[1], device=device).reshape(shape) % config.vocab_size
    documents_BS = (torch.arange(length, device=device) // WORST_DOCUMENT + 1).expand(shape)
    try:
        with context(device):
            out = model(ids_BS, labels=ids_BS, document_ids=documents_BS, return_aux=True)
        objective = out.loss_sum
        if out.router is not None:
            objective = objective + out.router.prob_sum_LE.sum() + out.router.z_sum_L.sum()
        objective.backward()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"a micro batch of {shape[0]} rows of {shape[1]} tokens does not fit: lower batch_size (and raise "
            "gradient_accumulation_steps by the same factor), set gradient_checkpointing=true, or lower seq_length"
        ) from error
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        torch.set_rng_state(rng)
