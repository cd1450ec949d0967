"""What a run needs, before it starts: parameters, device, host and disk memory, operations, time.

Pure arithmetic on the configuration and a description of the machine. Every figure says whether it is computed (follows from
the shape) or guessed (rests on a rule of thumb).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from lumina_engine.config.advice import advice, devices_needed, disk_advice
from lumina_engine.config.counts import (
    Counts,
    forward_flops,
    kv_cache_bytes_per_token,
    parameter_counts,
    training_flops_per_token,
)
from lumina_engine.config.duration import Hours, Speed, device_peak, duration, guessed_speed
from lumina_engine.config.machine import GB, Accelerator, Machine, count_text, flops_text, gb_text, parse_devices
from lumina_engine.config.memory import Memory, checkpoint_bytes, training_memory
from lumina_engine.config.resolve import (
    choose_stage,
    device_limit,
    host_memory,
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
    "Hours",
    "Machine",
    "Memory",
    "Speed",
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


def budget(
    config: Config,
    machine: Machine,
    *,
    train_tokens: int | None = None,
    tokenizer_vocab: int | None = None,
    tokens_basis: str = "",
    speed: Speed | None = None,
    done: int = 0,
) -> dict[str, Any]:
    """The budget of a run on a machine, as plain numbers (bytes, FLOPs, hours).

    Args:
        train_tokens: the length of the data of one epoch, if known.
        tokens_basis: how it is known (computed, guessed).
        speed: what a run measured; without it the time is guessed.
        done: steps that a resumed run has behind it; the time is that of the others.

    Raises:
        ConfigError: the shape itself is impossible.
    """
    model = model_config(config, tokenizer_vocab)
    counts = parameter_counts(model)
    world = world_size(config, machine)
    config = plannable(config, machine, model, world)
    choice = choose_stage(config, machine, model, world)
    layout = layout_of(config, machine, choice.stage, world)
    memory, saved = training_memory(model, layout), checkpoint_bytes(model, layout)
    precision = resolved_precision(config, machine)
    available, limit = device_limit(config, machine)
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * world * config.seq_length
    steps = _steps(config, tokens_per_step, train_tokens)
    flops = training_flops_per_token(model, config.seq_length)
    speed = speed or guessed_speed(config, model, machine, world, precision, flops)
    time = duration(config, model, speed, world=world, steps=steps, done=done, train_tokens=train_tokens)
    if tokens_basis and steps is not None:
        time["basis"] += f"; length of the data {tokens_basis}"
    host = host_memory(config, machine, memory, saved)
    disk = _disk(
        config, machine, saved.weights + saved.state * world, memory.nvme * ranks_per_node(config, machine), time["p90_h"]
    )
    enough = choice.fits and host["total"] <= host["available"]
    found = [] if enough else advice(config, machine, model, world)
    found += [] if _disk_fits(disk) else disk_advice(config, disk)
    return {
        "parameters": counts.to_dict(),
        "device": _device(memory, available, limit),
        "host": host,
        "disk": disk,
        "flops_per_token": flops,
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "time": time,
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
        "fits": not found,
        "advice": found,
        "basis": {
            "parameters": "computed",
            "device": "computed",
            "host": "computed, with a guessed 0.7 GB per rank for Python, torch and DeepSpeed",
            "disk": "computed",
            "flops_per_token": "computed",
            "steps": "computed" if config.max_steps is not None and not train_tokens else tokens_basis or "unknown",
            "time": "measured" if speed.is_measured else "guessed",
        },
    }


def _device(memory: Memory, available: int, limit: int) -> dict[str, Any]:
    parts = {name: value for name, value in asdict(memory).items() if name not in ("host", "nvme")}
    return parts | {"total": memory.total, "moment": memory.moment, "available": available, "limit": limit}


def _disk(config: Config, machine: Machine, checkpoint: int, nvme: int, hours: float | None) -> dict[str, int | None]:
    """Disk of a run on one node: checkpoints (those kept, the best, the one being written), backups, log, NVMe offload.

    Backups count where they lie beside the run, as many as `hours` (None: unknown) give time for, and the one being written.
    `checkpoint`: bytes of one, of all ranks. All of it is taken to be on one disk.
    """
    kept = config.keep_checkpoints + 2
    backups = 0
    if config.backup_every_n_hours and config.backup_path is None:
        backups = config.max_backup_count + 1
        backups = backups if hours is None else min(backups, int(hours / config.backup_every_n_hours))
    log = config.engine_log_mb << 20
    return {
        "checkpoint": checkpoint,
        "checkpoints": kept,
        "backups": backups,
        "log": log,
        "nvme": nvme,
        "total": checkpoint * (kept + backups) + log + nvme,
        "available": machine.disk_free_bytes,
    }


def _disk_fits(disk: dict[str, int | None]) -> bool:
    return disk["available"] is None or (disk["total"] or 0) <= disk["available"]


def _steps(config: Config, tokens_per_step: int, train_tokens: int | None) -> int | None:
    """Optimizer steps of the run: by the data if its length is known, by max_steps, or the smaller of both."""
    by_data = None if not train_tokens else -(-train_tokens * config.num_epochs // tokens_per_step)
    known = [s for s in (by_data, config.max_steps) if s is not None]
    return min(known) if known else None


def stage_table(config: Config, machine: Machine, tokenizer_vocab: int | None = None) -> list[dict[str, Any]]:
    """Memory of one device at each ZeRO stage, the last with the optimizer in host memory, for comparison.

    Rows: stage, offload, state, activations (all that is no state), total, available, fits.
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
                "activations": max(0, memory.total - state),
                "total": memory.total,
                "available": available,
                "fits": memory.total <= limit,
            }
        )
    return rows
