"""The checkpoints that one can talk to, with the memory that they need here. No widget, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from lumina_engine.chat.catalogue import Entry, list_entries
from lumina_engine.config.counts import kv_cache_bytes_per_token, parameter_counts
from lumina_engine.config.schema import ConfigError, DeepSeekConfig
from lumina_engine.monitoring.hardware import detect

SHARE = 0.9  # of the free memory that a model may take: the rest is for what one reply needs
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Room:
    """Where a chat server would load a model: the first GPU, else the host. `free` in bytes, None if unknown."""

    device: str
    weight_bytes: int  # per parameter, in the precision that the server chooses by itself
    free: int | None


@dataclass(frozen=True)
class Choice:
    """A checkpoint, the bytes of weights and a full cache in memory, and where they would lie. None: unknown."""

    entry: Entry
    needed: int | None
    room: Room

    @property
    def fits(self) -> str:
        """yes, tight (more than `SHARE` of what is free), no, or -."""
        if self.needed is None or self.room.free is None:
            return "-"
        if self.needed > self.room.free:
            return "no"
        return "yes" if self.needed <= SHARE * self.room.free else "tight"


def find_room(root: Path) -> Room:
    """What this machine offers now. Blocking."""
    machine = detect(root)
    if machine.devices:
        first = machine.devices[0]
        return Room("gpu0", 2 if first.bf16 else 4, first.memory_bytes or None)
    return Room("cpu", 4, min(psutil.virtual_memory().available, machine.host_memory_bytes))


def memory_needed(path: Path, weight_bytes: int) -> int | None:
    """Bytes of a checkpoint's weights and of the cache for its whole context; None if its shape cannot be read."""
    try:
        with (path / "model/config.json").open("rb") as file:
            shape = json.loads(file.read(MAX_CONFIG_BYTES))
        model = DeepSeekConfig.from_dict(shape).resolved()
    except (OSError, ValueError, RecursionError, ConfigError):
        return None
    return parameter_counts(model).total * weight_bytes + kv_cache_bytes_per_token(model, weight_bytes) * model.seq_length


def list_choices(root: Path) -> list[Choice]:
    """All committed checkpoints, most recently updated run first, in a run its best first. Blocking."""
    entries = list_entries(root)
    room = find_room(root) if entries else Room("cpu", 4, None)
    return [Choice(entry, None if entry.problem else memory_needed(entry.path, room.weight_bytes), room) for entry in entries]
