"""The list of runs for Home: read again only where a file has changed. No numpy, no Textual."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from lumina_engine.monitoring import record as rec
from lumina_engine.run.directory import UNREADABLE, RunDirectory, RunError, RunInfo, find, list_runs
from lumina_engine.run.listing import Figures, Tail, filled, ordered, run_names
from lumina_engine.run.process import Process

SETTLES_S = 120.0  # a run without a final state is looked at again for this long: its state depends on its age
ALL_EVERY_S = 20.0  # rows that nobody sees, and that are over, are looked at this often

_Signature = tuple[int, ...]


@dataclass
class _Known:
    signature: _Signature
    info: RunInfo
    seen: float
    owner: Process | None = None  # the supervisor of a living run
    tail: Tail | None = None
    figures: _Signature = ()  # what the log was when its figures were read


class RunList:
    """All runs below a root. One thread at a time may use it."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._all_at = 0.0

    def refresh(self, visible: Collection[str] | None = ()) -> list[RunInfo]:
        """The rows, by age. The first call reads each run.json; later ones look at what can have changed.

        Args:
            visible: names of the rows whose figures are wanted (None: of all). Rows that are visible or alive are looked at
                in every call, the others every 20 s; an unchanged row costs two `stat` calls.

        Raises:
            OSError: the root is there but cannot be read.
        """
        now = self._clock()
        look_at_all = visible is None or now - self._all_at >= ALL_EVERY_S
        if look_at_all:
            self._all_at = now
        known: dict[str, _Known] = {}
        for name in run_names(self.root):
            item = self._known.get(name)
            lived = item is not None and item.info.alive
            wanted = visible is None or name in visible
            if item is None or wanted or look_at_all or item.info.alive:
                signature = _signature(self.root / name)
                if signature is None:
                    continue
                if self._stale(item, signature, now):
                    item = self._read(name, item, signature, now)
                assert item is not None
            if wanted or (lived and not item.info.alive):  # an end may bring a row into sight: its last figures come with it
                self._fill(item)
            item.info, item.seen = _aged(item, now), now
            known[name] = item
        self._known = known
        return ordered((item.info for item in known.values()), "age")

    def look_at_living(self) -> bool:
        """Whether a run that was alive is not any more (the next refresh reads it again).

        Their supervisors are looked at, which costs no file; locks only where a supervisor is not on this machine.
        """
        died = [item for item in self._known.values() if item.info.alive and not _lives(item)]
        for item in died:
            item.signature = ()
        return bool(died)

    def figures(self, name: str) -> Figures:
        """What the end of a run's log says; empty where nothing can be read."""
        item = self._known.get(name)
        if item is None or item.info.state == UNREADABLE:
            return Figures()
        item.tail = item.tail or Tail(item.info.path / "metrics.jsonl")
        try:
            return item.tail.figures()
        except OSError:  # the row says so
            return Figures()

    def hardware(self) -> rec.Hardware | None:
        """The newest sample of the machine in the logs of living runs that were looked at, with the devices of all of them."""
        found = [self.figures(name).hardware for name, item in self._known.items() if item.info.alive and item.tail is not None]
        samples = sorted((sample for sample in found if sample is not None), key=lambda sample: sample.t)
        if not samples:
            return None
        devices = {device.index: device for sample in samples for device in sample.devices}
        samples[-1].devices = [devices[index] for index in sorted(devices)]
        return samples[-1]

    def _read(self, name: str, old: _Known | None, signature: _Signature, now: float) -> _Known:
        if old is not None and old.info.alive and len(signature) == 5 and signature[:3] == old.signature[:3]:
            # only its log has grown: whether it still lives, look_at_living says
            age = max(0.0, now - signature[3] / 1e9)
            return replace(old, signature=signature, info=replace(old.info, age_s=age), seen=now)
        run = RunDirectory(self.root / name)
        row = run.head()
        owner = run.owner() if row.alive else None
        if old is None:
            return _Known(signature, row, now, owner)
        kept = {field: getattr(old.info, field) for field in _FIGURES}
        return _Known(signature, replace(row, **kept), now, owner, old.tail, old.figures)

    @staticmethod
    def _fill(item: _Known) -> None:
        if item.info.state == UNREADABLE or item.figures == item.signature:
            return
        item.tail = item.tail or Tail(item.info.path / "metrics.jsonl")
        item.info, item.figures = filled(item.info, item.tail), item.signature

    @staticmethod
    def _stale(old: _Known | None, signature: _Signature, now: float) -> bool:
        if old is None or old.signature != signature:
            return True
        young = (old.info.age_s or 0.0) + now - old.seen < SETTLES_S
        return young and not old.info.alive and old.info.state not in rec.FINAL_STATES


_FIGURES = ("step", "loss", "tokens_per_s", "smoothed_loss", "left_s", "alerts", "critical")


def _lives(item: _Known) -> bool:
    return item.owner.alive if item.owner is not None else RunDirectory(item.info.path).alive


def _aged(item: _Known, now: float) -> RunInfo:
    """The row as old as it is now."""
    if item.info.age_s is None or now <= item.seen:
        return item.info
    return replace(item.info, age_s=item.info.age_s + now - item.seen)


def _signature(path: Path) -> _Signature | None:
    """What changes when a run changes, first of run.json, then of the log; None if the folder is no run."""
    try:
        identity = os.lstat(path / "run.json")
    except OSError:
        return None
    try:
        log = (path / "metrics.jsonl").stat()
    except OSError:
        return (identity.st_mtime_ns, identity.st_size, identity.st_ino)
    return (identity.st_mtime_ns, identity.st_size, identity.st_ino, log.st_mtime_ns, log.st_size)


def held_out_score(path: Path) -> float | None:
    """The share of held-out questions a finished run answers (reports/sample_eval.json); None without such a report."""
    try:
        with (path / "reports" / "sample_eval.json").open("rb") as file:
            content = json.loads(file.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        return None
    overall = content.get("overall") if isinstance(content, dict) else None
    return float(overall) if isinstance(overall, int | float) and 0 <= overall <= 1 else None


def watched_run(wanted: str | Path | None, root: Path) -> RunDirectory | None:
    """The run that is meant: a path, a name below `root`, or (None) the one that was active last; None if there is none.

    Raises:
        RunError: there is no such run.
    """
    if wanted is None:
        rows = list_runs(root)
        return RunDirectory(rows[0].path) if rows else None
    if isinstance(wanted, Path) and (wanted / "run.json").exists():
        return RunDirectory(wanted)
    return find(str(wanted), root)


def identity_of(run: RunDirectory) -> str:
    """What tells a run from an earlier one of the same name."""
    try:
        return str(run.identity().get("id") or run.path)
    except RunError:
        return str(run.path)
