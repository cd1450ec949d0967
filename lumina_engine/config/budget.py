"""What a run needs, before it starts: parameters, device, host and disk memory, operations, time.

Pure arithmetic on the configuration and a description of the machine. Every figure says whether it is computed (follows from
the shape) or guessed (rests on a rule of thumb).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from lumina_engine.config.counts import (
    Counts,
    forward_flops,
    kv_cache_bytes_per_token,
    parameter_counts,
    training_flops_per_token,
)
from lumina_engine.config.machine import GB, Accelerator, Machine, count_text, flops_text, gb_text, parse_devices
from lumina_engine.config.memory import Memory, training_memory
from lumina_engine.config.resolve import (
    STAGES,
    advice,
    choose_stage,
    device_limit,
    devices_needed,
    layout_of,
    model_config,
    plannable,
    ranks_per_node,
    resolved_precision,
    world_size,
)
from lumina_engine.config.schema import Config, DeepSeekConfig

__all__ = [
    "GB",
    "Accelerator",
    "Counts",
    "Machine",
    "Memory",
    "budget",
    "count_text",
    "device_peak",
    "devices_needed",
    "flops_text",
    "forward_flops",
    "gb_text",
    "kv_cache_bytes_per_token",
    "parameter_counts",
    "parse_devices",
    "stage_table",
    "training_flops_per_token",
    "training_memory",
]

# Guesses, each named in the result's `basis`: dense peak of one device in the precision of training (FLOP/s), the share of it
# that training reaches (best and cautious), and the memory that a rank's Python, torch and DeepSpeed take.
_PEAK = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "L40": 181e12}
_PEAK_UNKNOWN = 300e12
_PEAK_CPU_CORE = 70e9
_SHARE = (0.4, 0.2)
_RANK_BYTES = 700_000_000
# Bytes of one parameter in a checkpoint: weights as trained, fp32 master (not beside fp32 weights), two fp32 moments.
_CHECKPOINT_BYTES = {"fp32": 12, "bf16": 14, "fp16": 14, "mixed_bf16": 12, "mixed_fp16": 12}


def budget(
    config: Config,
    machine: Machine,
    *,
    train_tokens: int | None = None,
    tokenizer_vocab: int | None = None,
    tokens_basis: str = "",
) -> dict[str, Any]:
    """The budget of a run on a machine, as plain numbers (bytes, FLOPs, hours).

    `train_tokens` is the length of the data of one epoch, if known; `tokens_basis` says how it is known (computed, guessed).
    Raises `ConfigError` when the shape itself is impossible.
    """
    model = model_config(config, tokenizer_vocab)
    counts = parameter_counts(model)
    world = world_size(config, machine)
    config = plannable(config, machine, model, world)
    choice = choose_stage(config, machine, model, world)
    memory = training_memory(model, layout_of(config, machine, choice.stage, world))
    precision = resolved_precision(config, machine)
    available, limit = device_limit(config, machine)
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * world * config.seq_length
    steps = _steps(config, tokens_per_step, train_tokens)
    flops = training_flops_per_token(model, config.seq_length)
    host = _host(config, machine, memory)
    disk = _disk(config, machine, counts, precision)
    fits = choice.fits and host["total"] <= host["available"] and _disk_fits(disk)
    return {
        "parameters": counts.to_dict(),
        "device": _device(memory, available, limit),
        "host": host,
        "disk": disk,
        "flops_per_token": flops,
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "time": _time(machine, world, flops, tokens_per_step, steps, tokens_basis),
        "resolved": {
            "devices": machine.label,
            "world": world,
            "zero_stage": choice.stage,
            "zero_reason": choice.reason,
            "precision": precision,
            "vocab_size": model.vocab_rows,
            "head_dim": model.head_size,
            "intermediate_size": model.expert_width,
        },
        "fits": fits,
        "advice": [] if choice.fits else advice(config, machine, model, world),
        "basis": {
            "parameters": "computed",
            "device": "computed",
            "host": "computed, with a guessed 0.7 GB per rank for Python, torch and DeepSpeed",
            "disk": "computed",
            "flops_per_token": "computed",
            "steps": "computed" if config.max_steps is not None and not train_tokens else tokens_basis or "unknown",
            "time": "guessed",
        },
    }


def _device(memory: Memory, available: int, limit: int) -> dict[str, int]:
    parts = {name: value for name, value in asdict(memory).items() if name != "host"}
    return parts | {"total": memory.total, "available": available, "limit": limit}


def _host(config: Config, machine: Machine, memory: Memory) -> dict[str, int]:
    """Host memory of one node. On CPU the devices' share lies in it too."""
    ranks = ranks_per_node(config, machine)
    processes = _RANK_BYTES * ranks
    offload = memory.host * ranks
    training = 0 if machine.devices else memory.total * ranks
    total = processes + offload + training
    return {
        "processes": processes,
        "offload": offload,
        "training": training,
        "total": total,
        "available": machine.host_memory_bytes,
    }


def _disk(config: Config, machine: Machine, counts: Counts, precision: str) -> dict[str, int | None]:
    """Disk of one run: the checkpoints that are kept, the best one, the one being written, and the capped log."""
    checkpoint = counts.stored * _CHECKPOINT_BYTES[precision]
    kept = config.keep_checkpoints + 2
    log = config.engine_log_mb << 20
    total = checkpoint * kept + log
    return {"checkpoint": checkpoint, "checkpoints": kept, "log": log, "total": total, "available": machine.disk_free_bytes}


def _disk_fits(disk: dict[str, int | None]) -> bool:
    return disk["available"] is None or (disk["total"] or 0) <= disk["available"]


def _steps(config: Config, tokens_per_step: int, train_tokens: int | None) -> int | None:
    """Optimizer steps of the run: by the data if its length is known, by max_steps, or the smaller of both."""
    by_data = None if not train_tokens else -(-train_tokens * config.num_epochs // tokens_per_step)
    known = [s for s in (by_data, config.max_steps) if s is not None]
    return min(known) if known else None


def _time(
    machine: Machine, world: int, flops: float, tokens_per_step: int, steps: int | None, tokens_basis: str
) -> dict[str, Any]:
    if machine.devices:
        name = machine.devices[0].name
        peak = (device_peak(name) or _PEAK_UNKNOWN) * world
    else:
        peak = _PEAK_CPU_CORE * machine.cpu_count
    speed = [peak * share / flops for share in _SHARE]
    basis = f"guessed: {_SHARE[0]:.0%} (p50) or {_SHARE[1]:.0%} (p90) of {flops_text(peak)}/s"
    if steps is None:
        basis = "unknown: max_steps is null and the data has not been counted; " + basis
        return {"p50_h": None, "p90_h": None, "tokens_per_s": speed[0], "basis": basis}
    if tokens_basis:
        basis += f"; length of the data {tokens_basis}"
    p50, p90 = (steps * tokens_per_step / s / 3600 for s in speed)
    return {"p50_h": p50, "p90_h": p90, "tokens_per_s": speed[0], "basis": basis}


def device_peak(name: str) -> float | None:
    """Dense peak of a GPU in bf16 (FLOP/s) by its product name, None if it is not in the table."""
    return next((value for key, value in _PEAK.items() if key in name), None)


def stage_table(config: Config, machine: Machine, tokenizer_vocab: int | None = None) -> list[dict[str, Any]]:
    """Memory of one device at each ZeRO stage, the last with the optimizer in host memory, for comparison.

    Rows: stage, offload, state, activations (all that is no state), total, available, fits, built (whether training offers it).
    """
    model: DeepSeekConfig = model_config(config, tokenizer_vocab)
    available, limit = device_limit(config, machine)
    rows = []
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (3, True)):
        layout = layout_of(config, machine, stage)
        memory = training_memory(model, replace(layout, offload_optimizer=offload or layout.offload_optimizer))
        state = memory.weights + memory.gradients + memory.optimizer
        rows.append(
            {
                "stage": stage,
                "offload": offload,
                "state": state,
                "activations": memory.total - state,
                "total": memory.total,
                "available": available,
                "fits": memory.total <= limit,
                "built": stage in STAGES and not offload,
            }
        )
    return rows
