"""The list of runs for Home: read again only where a file has changed. No numpy, no Textual."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import last_records
from lumina_engine.run.directory import RunDirectory, RunInfo

SETTLES_S = 120.0  # a run without a final state is looked at again for this long: its state depends on its age
NEAR_END = 1 << 18  # bytes of a log looked at for a preview

_Signature = tuple[int, ...]


@dataclass
class _Known:
    signature: _Signature
    info: RunInfo
    seen: float


class RunList:
    """All runs below a root, the most recently active first."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock
        self._known: dict[str, _Known] = {}

    def refresh(self) -> list[RunInfo]:
        """Look at the folders again; rows of unchanged, dead runs cost two `stat` calls.

        Raises:
            OSError: the root is there but cannot be read.
        """
        try:
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        except FileNotFoundError:
            names = []
        now = self._clock()
        known: dict[str, _Known] = {}
        for name in names:
            signature = _signature(self.root / name)
            if signature is None:
                continue
            old = self._known.get(name)
            known[name] = self._look(name, signature, now) if self._stale(old, signature, now) else self._aged(old, now)
        self._known = known
        rows = [item.info for item in known.values()]
        return sorted(rows, key=lambda row: (not row.alive, row.age_s is None, row.age_s or 0.0, row.name))

    def look_at_living(self) -> bool:
        """Whether a run that was alive is not any more: only locks are looked at."""
        return any(item.info.alive and not RunDirectory(item.info.path).alive for item in self._known.values())

    def _look(self, name: str, signature: _Signature, now: float) -> _Known:
        return _Known(signature, RunDirectory(self.root / name).info(), now)

    @staticmethod
    def _stale(old: _Known | None, signature: _Signature, now: float) -> bool:
        if old is None or old.signature != signature or old.info.alive:
            return True
        young = (old.info.age_s or 0.0) + now - old.seen < SETTLES_S
        return young and old.info.state not in rec.FINAL_STATES

    @staticmethod
    def _aged(old: _Known | None, now: float) -> _Known:
        assert old is not None
        age = None if old.info.age_s is None else old.info.age_s + max(0.0, now - old.seen)
        return _Known(old.signature, replace(old.info, age_s=age), now)


def _signature(path: Path) -> _Signature | None:
    """What changes when a run changes; None if the folder is no run."""
    try:
        identity = os.lstat(path / "run.json")
    except OSError:
        return None
    try:
        log = (path / "metrics.jsonl").stat()
    except OSError:
        return (identity.st_mtime_ns, identity.st_size, identity.st_ino)
    return (identity.st_mtime_ns, identity.st_size, identity.st_ino, log.st_mtime_ns, log.st_size)


@dataclass(frozen=True)
class Preview:
    """The newest of a run, from the end of its log."""

    losses: tuple[float, ...] = ()
    alerts: tuple[rec.Alert, ...] = ()
    checkpoint: rec.Checkpoint | None = None
    seconds_per_step: float | None = None


def preview(path: Path) -> Preview:
    """The newest losses, alerts and checkpoint of a run; empty where nothing can be read."""
    log = RunDirectory(path).metrics_path
    try:
        steps = last_records(log, 400, ["step"], within=NEAR_END)
        alerts = last_records(log, 3, ["alert"], within=NEAR_END)
        saved = last_records(log, 1, ["checkpoint"], within=NEAR_END)
    except OSError:
        return Preview()
    times = [item.step_time for item in steps[-100:] if isinstance(item, rec.Step) and item.step_time is not None]
    return Preview(
        losses=tuple(item.loss for item in steps if isinstance(item, rec.Step) and item.loss is not None),
        alerts=tuple(item for item in alerts if isinstance(item, rec.Alert)),
        checkpoint=next((item for item in saved if isinstance(item, rec.Checkpoint) and not item.failed), None),
        seconds_per_step=sum(times) / len(times) if times else None,
    )


def held_out_score(path: Path) -> float | None:
    """The share of held-out questions a finished run answers (reports/sample_eval.json); None without such a report."""
    try:
        with (path / "reports" / "sample_eval.json").open("rb") as file:
            content = json.loads(file.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        return None
    overall = content.get("overall") if isinstance(content, dict) else None
    return float(overall) if isinstance(overall, int | float) and 0 <= overall <= 1 else None
