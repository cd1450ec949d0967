"""Memory in use and memory needed: the device's allocator, the host, and the model's own parts. Bytes throughout."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch

from ..config.activations import WORST_DOCUMENT
from ..config.curriculum import Curriculum
from ..config.micro_batch import smaller
from ..data.batch import Batch
from ..model.moe import uniform_routing
from ..monitoring.hardware import memory_limit, process_memory

# mallopt(3) of the GNU C library, and the variables with which a user sets the same
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_NEVER = 2**31 - 1


def memory_stats(model: Any, optimizer_bytes: int, device: torch.device) -> dict[str, Any]:
    """Memory now, in bytes; `optimizer_bytes` are those of its state in memory (`Engine.state_bytes`).

    On CPU the device figures are those of this process (`allocated` and `reserved` = resident set).
    """
    host = psutil.virtual_memory()
    process = psutil.Process().memory_info()
    parameters = sum(held(p).numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
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
        peak = max(process.rss, process_memory("VmHWM"))  # the kernel updates the peak with a delay
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
        "components": {"parameters": parameters, "gradients": gradients, "optimizer": optimizer_bytes},
    }


def held(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank keeps of a parameter: its part under ZeRO-3, else all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def whole_numel(parameter: torch.Tensor) -> int:
    """Values of the whole parameter, also where ZeRO-3 keeps only a part of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO-3 keeps only a part of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


# How a RuntimeError says it: the allocator of the CPU, C++ itself, and threads that get no stack.
_NO_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory", "can't start new thread")


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed instead of giving it back to the system.

    False, and nothing changed, where the C library cannot or the user set malloc by its environment variables.

    A step frees and takes hundreds of MB. Given back, each page of it is zeroed and mapped again in the next step, which took
    a tenth of a step (measured: tests/bench/README.md). The largest size of the process stays the same, and stays.
    """
    if any(name in os.environ for name in _MALLOC_VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not the GNU C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@dataclass(frozen=True)
class Peak:
    """The most memory of one kind that this process has used, and what there is of it for this process. Bytes."""

    kind: str
    used: int
    available: int


def peaks(device: torch.device, local_ranks: int = 1) -> list[Peak]:
    """Peaks of this process: of the device's allocator; on CPU of resident memory, and of the address space if it is limited.

    Resident memory is counted against the machine's, or the cgroup's where that is lower, shared by the ranks of this host.
    """
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return [Peak("device memory", torch.cuda.max_memory_reserved(device), total)]
    resident = max(process_memory("VmHWM"), psutil.Process().memory_info().rss)
    found = [Peak("resident memory", resident, memory_limit() // local_ranks)]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        found.append(Peak("address space", process_memory("VmPeak"), address_space))
    return found


class DoesNotFit(MemoryError):
    """The worst micro batch does not fit: a matter of the configuration, told before the first step."""

    exit_code = 2

    def __init__(self, rows: int, length: int, config: Any) -> None:
        self.final = smaller(config) is None  # no other split of the global batch is left
        keys = "lower batch_size (and raise gradient_accumulation_steps by the same factor), "
        if self.final:
            keys = "lower min_batch_size, " if config.dynamic_batching and config.min_batch_size > 1 else ""
        super().__init__(f"a micro batch of {rows} rows of {length} tokens does not fit: {keys}{WAYS_OUT}")


WAYS_OUT = (
    "set gradient_checkpointing=true, lower seq_length, raise num_gpus with a higher zero_stage, or choose a smaller preset"
)


def worst_batch(config: Any, device: torch.device) -> Batch:
    """The micro batch that needs the most memory: full rows, every token trained.

    Its documents are just longer than the narrowest rectangle of attention, which leaves the most filler in it. The longest
    rows of a curriculum are the worst: all its shapes have the same tokens, and only what grows with the square of the length
    tells them apart.
    """
    length = Curriculum.of(config).lengths[-1]
    shape = (config.batch_size * config.seq_length // length, length)
    ids_BS = torch.arange(shape[0] * shape[1], device=device).reshape(shape) % config.vocab_size
    place_S = torch.arange(length, device=device)
    documents_BS = (place_S // WORST_DOCUMENT + 1).expand(shape)
    return Batch(ids_BS, ids_BS, documents_BS, (place_S % WORST_DOCUMENT).expand(shape)).counted()


def worst_objective(forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """What to call backward on for a worst batch: every part of the objective, in a sum that stays finite in any precision."""
    out = forward(
        batch.input_ids_BS,
        labels=batch.labels_BS,
        document_ids=batch.document_ids_BS,
        position_ids=batch.position_ids_BS,
        layout=batch.layout,
        return_aux=True,
    )
    objective: torch.Tensor = out.loss_sum / batch.input_ids_BS.numel()
    if out.router is not None:
        objective = objective + (out.router.prob_sum_LE.sum() + out.router.z_sum_L.sum()) / batch.input_ids_BS.numel()
    return objective


def torch_rng() -> dict[str, torch.Tensor]:
    """torch's random states, by device: those that dropout and router jitter draw from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_torch_rng(states: dict[str, torch.Tensor]) -> None:
    """The reverse of `torch_rng`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def drop_gradients(model: Any) -> None:
    """Forget the gradients of all parameters."""
    for parameter in model.parameters():
        parameter.grad = None


def dry_run(
    model: Any,
    config: Any,
    device: torch.device,
    context: Any,
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
    discard: Callable[[], None] | None = None,
) -> None:
    """One forward and backward pass at the worst shape, before the first step: what does not fit fails now, with advice.

    All experts get the same load, so no choice is dropped. Parameters, gradients and random state are as before. `backward` and
    `discard` (of the gradients) are the engine's where weights are split over ranks; then it is a collective.

    Raises:
        DoesNotFit: it does not fit; the message names the keys that would help.
    """
    rng = torch_rng()
    batch = worst_batch(config, device)
    try:
        with uniform_routing(model):
            with context(device):
                objective = worst_objective(model, batch)
            backward(objective)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows, length = batch.input_ids_BS.shape
        raise DoesNotFit(rows, length, config) from error
    finally:
        (discard or partial(drop_gradients, model))()
        restore_torch_rng(rng)
