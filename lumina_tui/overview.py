"""What Home shows, read from files alone: runs, the chosen one in detail, the machine, loaded chat servers. No socket."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_engine.monitoring.record import Hardware
from lumina_engine.run.directory import RunInfo
from lumina_engine.run.listing import Figures

from .runs import RunList

if TYPE_CHECKING:
    from lumina_engine.chat.card import Card
    from lumina_engine.monitoring.hardware import Nvml, Sampler

DEVICES_S = 2.0  # s between two samples of a machine with GPUs and no live run
HOST_S = 10.0  # of one without
_STALE_S = 60.0  # older samples of a run are not believed


@dataclass(frozen=True)
class Change:
    """A key of a run that differs from its preset, both values as text."""

    name: str
    now: str
    preset: str


@dataclass(frozen=True)
class Server:
    """A loaded chat server. `memory_bytes` is measured: on its device, or resident memory on the processor."""

    card: Card
    memory_bytes: int | None


@dataclass(frozen=True)
class Overview:
    """One look."""

    rows: list[RunInfo]
    figures: dict[str, Figures]  # of the rows that were visible, and of the chosen one
    changes: list[Change] | None
    hardware: Hardware | None
    servers: list[Server]


class Reader:
    """Looks at the files below a root, each time only at what can have changed. One thread at a time may use it."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.runs = RunList(root, clock)
        self._root = root
        self._clock = clock
        self._sampler: Sampler | None = None
        self._sample: Hardware | None = None
        self._sampled_at = 0.0
        self._looked = False
        self._changes: tuple[tuple[object, ...], list[Change] | None] = ((), None)

    def look(self, visible: Collection[str] | None, chosen: str | None = None, *, compare: bool = False) -> Overview:
        """Runs with the figures of the visible ones (None: of all); with `compare` what the chosen one changed in its preset.

        The first look leaves the machine and the chat servers out.

        Raises:
            OSError: the root is there but cannot be read.
        """
        first, self._looked = not self._looked, True
        rows = self.runs.refresh(visible)
        names = {row.name for row in rows}
        wanted = names if visible is None else names & set(visible)
        figures = {name: self.runs.figures(name) for name in ({*wanted, chosen} if chosen in names else wanted) if name}
        row = next((row for row in rows if row.name == chosen), None)
        changes = self._compared(row) if compare and row is not None else None
        if first:  # the names at once: measuring the machine takes longer
            return Overview(rows, figures, changes, None, [])
        return Overview(rows, figures, changes, self._hardware(any(row.alive for row in rows)), self._servers())

    def _hardware(self, live: bool) -> Hardware | None:
        now = self._clock()
        if live:
            newest = self.runs.hardware()
            if newest is not None and now - newest.t < _STALE_S:
                return newest
        every = DEVICES_S if self._sample is not None and self._sample.devices else HOST_S
        if self._sample is None or now - self._sampled_at >= every:
            self._sampled_at = now
            self._sample = self._measure()
        return self._sample

    def _measure(self) -> Hardware | None:
        from lumina_engine.monitoring.hardware import Sampler

        self._sampler = self._sampler or Sampler(self._root)
        try:
            return self._sampler.sample()
        except OSError:  # the folder's disk is gone: nothing is known
            return None

    def _servers(self) -> list[Server]:
        from lumina_engine.chat.card import living_cards

        return [Server(card, self._memory(card)) for card in living_cards()]

    def _memory(self, card: Card) -> int | None:
        if card.device.startswith("cuda"):
            nvml: Nvml | None = self._sampler.nvml if self._sampler is not None else None
            return nvml.process_memory(card.pid) if nvml is not None else None
        return resident_bytes(card.pid)

    def _compared(self, row: RunInfo) -> list[Change] | None:
        path = row.path / "config.yaml"
        try:
            key = (path, row.preset, path.stat().st_mtime_ns)
        except OSError:
            return None
        if key != self._changes[0]:
            self._changes = (key, preset_changes(path, row.preset))
        return self._changes[1]


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process, None if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def preset_changes(path: Path, preset: str | None) -> list[Change] | None:
    """Keys of a run's configuration that differ from its preset's; None if that cannot be told. Keys that the preset leaves
    to the start (None, auto) do not count: every run fills them."""
    from lumina_engine.config.declare import show
    from lumina_engine.config.presets import NAMES, ConfigPresets
    from lumina_engine.config.schema import Config, ConfigError, fields_info

    if preset not in NAMES:
        return None
    try:
        mine, base = Config.load(path), ConfigPresets.get(preset)
    except (ConfigError, OSError):
        return None
    names = [info.name for info in fields_info() if getattr(base, info.name) not in (None, "auto")]
    pairs = [(name, getattr(mine, name), getattr(base, name)) for name in names if name not in ("experiment_name",)]
    return [
        Change(name, show(now), show(before)) for name, now, before in pairs if now != before and not _same_place(now, before)
    ]


def _same_place(now: object, before: object) -> bool:
    """Whether a path is the preset's, only made absolute at the start."""
    if not (isinstance(now, str) and isinstance(before, str) and now.startswith("/")):
        return False
    return now.endswith("/" + before.removeprefix("./"))
