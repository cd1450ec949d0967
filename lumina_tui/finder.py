"""What the palette finds, and how it ranks it. `gather` reads files and imports the schema: call it in a thread."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from lumina_engine.checkpoint.keep import committed_paths

Kind = Literal["action", "run", "checkpoint", "preset", "config", "field", "theme", "help"]

MAX_RUNS = 2000
MAX_CHECKPOINTS = 20  # of one run, newest first


@dataclass(frozen=True)
class Entry:
    """One thing that can be chosen. `target` says what to open; `reason` why it cannot be done now."""

    kind: Kind
    target: str
    title: str
    help: str = ""
    keys: str = ""
    reason: str = ""
    danger: bool = False

    @property
    def key(self) -> str:
        """Unique among all entries."""
        return f"{self.kind}:{self.target}"

    @cached_property
    def text(self) -> str:
        """What is searched, in lower case: the title first."""
        return f"{self.title}\n{self.keys} {self.help}".lower()


def search(entries: Sequence[Entry], query: str, most: int = 100) -> tuple[list[Entry], int]:
    """The best `most` entries that have every word of `query`, best first, and how many there are in all.

    A word matches as a part of the title or the help, or by its letters in order in the title ("lrt" finds "learning rate").
    """
    words = query.lower().split()
    if not words:
        return list(entries[:most]), len(entries)
    loose = [re.compile(".*?".join(map(re.escape, word))) for word in words]
    found: list[tuple[int, int, Entry]] = []
    for order, item in enumerate(entries):
        text = item.text
        end = len(item.title)
        total = 0
        for word, pattern in zip(words, loose, strict=True):
            cost = _cost(text, end, word, pattern)
            if cost is None:
                break
            total += cost
        else:
            found.append((total * 4 + 2 * bool(item.reason) + (item.kind != "action"), order, item))
    found.sort(key=lambda row: row[:2])
    return [item for _, _, item in found[:most]], len(found)


def _cost(text: str, end: int, word: str, loose: re.Pattern[str]) -> int | None:
    """How badly a word fits: 0 is the beginning of the title, None not at all. `text[:end]` is the title."""
    at = text.find(word)
    if at == 0:
        return 0
    if 0 < at < end:
        return 1 if not text[at - 1].isalnum() else 2
    if at >= end:
        return 3 if not text[at - 1].isalnum() else 5
    scattered = loose.search(text, 0, end)
    if scattered is None:
        return None
    spread = scattered.end() - scattered.start() - len(word)
    return 6 + spread // 4 if spread <= 3 * len(word) + 2 else None


def gather(runs_root: Path, folders: Iterable[Path]) -> list[Entry]:
    """Runs (newest first) with their checkpoints, presets, configuration files of `folders`, and all fields. Blocking."""
    runs = _runs(runs_root)
    return [
        *(Entry("run", name, f"run {name}", "watch it in the Monitor") for name in runs),
        *_presets(),
        *_configs(folders),
        *_fields(),
        *(found for name in runs for found in _checkpoints(runs_root / name)),
    ]


def _runs(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            found = [(item.stat().st_mtime, item.name) for item in entries if item.is_dir() and not item.name.startswith(".")]
    except OSError:
        return []
    return [name for _, name in sorted(found, reverse=True)[:MAX_RUNS]]


def _checkpoints(run: Path) -> list[Entry]:
    """Committed checkpoints of a run and its emergency saves, newest first, but the best one before all."""
    try:
        steps = list(dict.fromkeys(path.name for path in committed_paths(run / "checkpoints")))
    except OSError:
        return []
    best = ["best"] if steps and os.path.lexists(run / "checkpoints" / "best") else []
    return [
        Entry("checkpoint", f"{run.name}@{name}", f"checkpoint {run.name}@{name}", "talk to it in Chat")
        for name in [*best, *steps[:MAX_CHECKPOINTS]]
    ]


def _presets() -> list[Entry]:
    from lumina_engine.config.presets import NAMES

    return [Entry("preset", name, f"preset {name}", "edit a copy of it") for name in NAMES]


def _configs(folders: Iterable[Path]) -> list[Entry]:
    found = []
    for folder in folders:
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
        except OSError:
            continue
        found += [Entry("config", str(path), f"config {path.name}", f"edit {path}") for path in paths]
    return found


def _fields() -> list[Entry]:
    from .form import INFOS

    return [Entry("field", name, name, f"{info.section}: {info.help}") for name, info in INFOS.items()]
