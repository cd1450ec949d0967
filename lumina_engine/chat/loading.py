"""From a committed checkpoint to a backend that answers. Every digest is checked before a weight is used (R33, R35)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lumina_engine.checkpoint.manager import load_model
from lumina_engine.config.counts import parameter_counts

from .catalogue import loss_of
from .events import Loading, ModelInfo
from .generate import LocalBackend
from .modes import ChatError

if TYPE_CHECKING:
    from lumina_engine.model.transformer import DeepSeekTransformer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU.

    Raises:
        ChatError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ChatError(f"device {name!r} is unknown: use cpu, cuda or cuda:0", 2) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ChatError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs here; use --device cpu", 2)
    if device.type not in ("cpu", "cuda"):
        raise ChatError(f"device {name!r} is not supported: use cpu, cuda or cuda:0", 2)
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, fp32 otherwise.

    Raises:
        ChatError: unknown, or not for this device.
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if name not in PRECISIONS:
        raise ChatError(f"precision {name!r} is unknown: use auto, {', '.join(PRECISIONS)}", 2)
    if name == "fp16" and device.type == "cpu":
        raise ChatError("precision fp16 is for GPUs: use --precision fp32 or bf16 on the CPU", 2)
    return name


def tune_threads(model: DeepSeekTransformer) -> int:
    """Set torch's threads for one token at a time on this CPU: one, or all, whichever is faster now; returns the number.

    Small models lose by a second thread, and on a busy machine (a training run beside the chat) threads that wait for each
    other make decoding ten times slower. A number that the user set (OMP_NUM_THREADS) stays.
    """
    every = torch.get_num_threads()
    if next(model.parameters()).device.type != "cpu" or every == 1 or "OMP_NUM_THREADS" in os.environ:
        return every
    seconds = {}
    for threads in (1, every):
        torch.set_num_threads(threads)
        times = sorted(_one_token(model) for _ in range(5))
        seconds[threads] = times[2]
    best = 1 if seconds[1] <= seconds[every] else every
    torch.set_num_threads(best)
    return best


@torch.inference_mode()
def _one_token(model: DeepSeekTransformer) -> float:
    began = time.perf_counter()
    model(torch.zeros(1, 1, dtype=torch.long))
    return time.perf_counter() - began


def open_backend(
    path: Path, device: str = "auto", precision: str = "auto", say: Callable[[Loading], None] | None = None
) -> LocalBackend:
    """Load a committed checkpoint. `say` is told what is being done; the caller knows since when (seconds stay 0).

    Raises:
        ChatError: no such device or precision, or not enough memory.
        CheckpointError: damaged, foreign, or not the weights of its own configuration.
    """
    where = choose_device(device)
    kind = choose_precision(precision, where)
    reading = f"checking and reading {path.name}"

    def read(done: int, total: int) -> None:
        if say is not None:
            say(Loading(reading, 0.0, done, total) if done < total else Loading(f"placing {path.name} on {where}", 0.0))

    if say is not None:
        say(Loading(reading, 0.0))
    try:
        model, tokenizer, facts = load_model(path, device=where, dtype=PRECISIONS[kind], progress=read)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ChatError(f"{path} does not fit the memory of {where}: use --precision bf16, or --device cpu") from error
    counts = parameter_counts(model.config)
    loss, loss_name = loss_of(facts["metrics"])
    info = ModelInfo(
        path=str(facts["path"]),
        run=facts["run"] or None,
        step=facts["step"],
        loss=loss,
        loss_name=loss_name,
        parameters=counts.total,
        active_parameters=counts.active,
        weights_bytes=facts["weights_bytes"],
        precision=kind,
        device=str(where),
        context_limit=model.config.seq_length,
        tokenizer=tokenizer.name,
        digest=facts["digest"],
    )
    return LocalBackend(model, tokenizer, info)
