"""What would make a run fit: changes of keys or devices, each of them tried on the same arithmetic that said it does not.

An advice is one line; what it names is enough by itself. Simple changes come first, combinations only where no simple one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from lumina_engine.config.declare import show
from lumina_engine.config.machine import Machine, gb_text
from lumina_engine.config.memory import training_memory
from lumina_engine.config.resolve import (
    device_limit,
    fits_memory,
    layout_of,
    model_config,
    most_stage,
    ranks_per_node,
    resolved_precision,
    world_size,
)
from lumina_engine.config.schema import Config, DeepSeekConfig

MOST = 3  # lines of advice
_MOST_DEVICES = 65_536


@dataclass(frozen=True, slots=True)
class Change:
    """Keys with their new values, and what that costs."""

    values: dict[str, Any]
    cost: str


def advice(config: Config, machine: Machine, model: DeepSeekConfig, ranks: int) -> list[str]:
    """At most three lines, each of which makes device and host memory suffice: `set key=value …`, `use N such devices …`.

    `ranks` counts those of all nodes. Without any such change one line says so, and with which devices it would do.
    """
    vocab = model.vocab_rows
    found = [_text(change) for change in _enough(config, machine, vocab, ranks)]
    highest = most_stage(config)
    if len(found) < MOST and config.use_deepspeed and machine.devices:
        count = devices_needed(config, machine, model, highest)
        found += [f"use {count:,} such devices with zero_stage={highest}"] if count > ranks else []
    if found:
        return found[:MOST]
    return ["choose a smaller preset (`lumina-engine presets list`) or a machine with more memory"]


def disk_advice(config: Config, disk: dict[str, int | None]) -> list[str]:
    """What makes the disk suffice: fewer checkpoints and backups if that is enough, else room."""
    short = (disk["total"] or 0) - (disk["available"] or 0)
    one = disk["checkpoint"] or 0
    spare = (config.keep_checkpoints - 2) * one
    found = []
    if spare >= short:
        found.append("set keep_checkpoints=2 (older checkpoints are removed sooner)")
    if (disk["backups"] or 0) * one >= short:
        found.append("set backup_every_n_hours=0 (no backups), or backup_path on another disk")
    elif spare + (disk["backups"] or 0) * one >= short:
        found.append("set keep_checkpoints=2 backup_every_n_hours=0 (no backups)")
    return found or [f"free {gb_text(short)} of disk, or name another --runs folder"]


def _text(change: Change) -> str:
    pairs = " ".join(f"{name}={show(value)}" for name, value in change.values.items())
    return f"set {pairs}" + (f" ({change.cost})" if change.cost else "")


def _enough(config: Config, machine: Machine, vocab: int, ranks: int) -> list[Change]:
    """Changes that are enough, simple ones first; none that contains another."""
    moves = list(_moves(config, machine, ranks))
    found: list[Change] = []
    for size in (1, 2, 3, len(moves)):
        for together in _groups(moves, size):
            if len(found) == MOST:
                return found
            keys = [name for move in together for name in move.values]
            if size < len(moves) and len(keys) > len(set(keys)):
                continue  # two that set one key; of all together the last counts
            change = Change(
                {name: value for move in together for name, value in move.values.items()},
                ", ".join(move.cost for move in together if move.cost),
            )
            if any(other.values.keys() - {"gradient_accumulation_steps"} <= change.values.keys() for other in found):
                continue
            if enough := _with_batch(config, machine, vocab, ranks, change):
                found.append(enough)
        if found and size > 1:
            break
    return found or [change for change in [_shorter(config, machine, vocab, ranks, moves)] if change]


def _groups(moves: list[Change], size: int) -> Iterator[tuple[Change, ...]]:
    """Moves to try together, `size` of them; where that is all of them, first those that leave saving as it is."""
    if size == len(moves) and (kept := _without_saving(moves)):
        yield tuple(kept)
    yield from combinations(moves, size)


def _without_saving(moves: list[Change]) -> list[Change]:
    return [move for move in moves if "async_save" not in move.values]


def _moves(config: Config, machine: Machine, ranks: int) -> Iterator[Change]:
    """What may be changed at all, cheapest first."""
    if config.batch_size > 1:
        yield Change({"batch_size": 1}, "same global batch")
    if not config.gradient_checkpointing:
        yield Change({"gradient_checkpointing": "selective"}, "cheap parts are computed twice")
    if config.gradient_checkpointing is not True:
        yield Change({"gradient_checkpointing": True}, "a third more compute")
    if config.loss_chunk_size == 0 or config.loss_chunk_size > 512:
        yield Change({"loss_chunk_size": 512}, "")
    if config.async_save:
        yield Change({"async_save": False}, "training waits for each save")
    if config.use_deepspeed:
        if ranks > 1 and config.zero_stage != "auto" and config.zero_stage < most_stage(config):
            yield Change({"zero_stage": "auto"}, "")
        if machine.devices and not (config.cpu_offload or config.cpu_offload_optimizer):
            yield Change({"cpu_offload_optimizer": True, "zero_stage": "auto"}, "slower updates")
    elif ranks > 1:
        yield Change({"use_deepspeed": True, "zero_stage": "auto"}, "")
    if not machine.devices and ranks_per_node(config, machine) > 1:
        yield Change({"num_gpus": 1}, "slower")
    if resolved_precision(config, machine) == "fp32" and machine.devices and all(d.bf16 for d in machine.devices):
        yield Change({"precision": "bf16", "zero_stage": "auto"}, "less exact")


def _with_batch(config: Config, machine: Machine, vocab: int, ranks: int, change: Change) -> Change | None:
    """The change if it is enough; a smaller batch in it becomes the largest that is, with the global batch as it was."""
    if "batch_size" not in change.values:
        return change if _fits(config, machine, vocab, ranks, change.values) else None
    rows = config.batch_size * config.gradient_accumulation_steps
    for batch in range(config.batch_size - 1, 0, -1):
        if rows % batch or rows // batch > 65_536:
            continue
        values = change.values | {"batch_size": batch, "gradient_accumulation_steps": rows // batch}
        if _fits(config, machine, vocab, ranks, values):
            return replace(change, values=values)
    return None


def _shorter(config: Config, machine: Machine, vocab: int, ranks: int, moves: list[Change]) -> Change | None:
    """Shorter rows with all that saves memory, if nothing else is enough."""
    length = config.seq_length // 2
    while length >= 128:
        for together in (_without_saving(moves), moves):
            values = {name: value for move in together for name, value in move.values.items()} | {"seq_length": length}
            if _fits(config, machine, vocab, ranks, values):
                return Change(values, "shorter rows")
        length //= 2
    return None


def _fits(config: Config, machine: Machine, vocab: int, ranks: int, values: dict[str, Any]) -> bool:
    """Whether a changed configuration is sound, offered, and fits device and host memory."""
    from lumina_engine.config.checks import check  # it asks for a budget itself

    changed = config.model_copy(update=values)
    world = ranks if ranks_per_node(changed, machine) == ranks_per_node(config, machine) else world_size(changed, machine)
    model = model_config(changed.model_copy(update={"vocab_size": vocab}))
    if not fits_memory(changed, machine, model, world):
        return False
    before = {(f.code, f.keys) for f in check(config) if f.severity == "error"}
    return all((f.code, f.keys) in before for f in check(changed) if f.severity == "error")


def devices_needed(config: Config, machine: Machine, model: DeepSeekConfig, stage: int, most: int = _MOST_DEVICES) -> int:
    """The least number of such devices on which the run fits at a ZeRO stage; 0 if `most` are not enough."""
    _, limit = device_limit(config, machine)
    unit = model.expert_parallel_size if model.use_moe else 1

    def fits(groups: int) -> bool:
        return training_memory(model, layout_of(config, machine, stage, groups * unit)).total <= limit

    most = max(1, most // unit)
    if not fits(most):
        return 0
    low, high = 0, most  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * unit
