"""Committed checkpoints that one can talk to, over all runs. Reads manifests only: no weights, no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.files import CheckpointError
from ..checkpoint.keep import EMERGENCY, committed_paths, pointer
from ..checkpoint.resolve import explain_checkpoint
from ..checkpoint.verify import read_manifest, step_of

__all__ = ["CheckpointError", "Entry", "explain_checkpoint", "list_entries", "loss_of", "run_entries"]

METRICS = ("eval_loss", "loss")  # what a checkpoint is judged by, first known one


@dataclass(frozen=True)
class Entry:
    """One committed checkpoint. `problem` says why it cannot be used; unknown numbers are None."""

    run: str
    path: Path
    step: int
    best: bool = False
    latest: bool = False
    suspect: bool = False
    weights_bytes: int | None = None
    loss: float | None = None
    loss_name: str | None = None
    created: float | None = None
    digest: str | None = None
    problem: str | None = None

    @property
    def reference(self) -> str:
        """How to name it on the command line; an emergency save by its path, since a checkpoint may be of the same step."""
        return str(self.path) if self.emergency else f"{self.run}@{self.path.name}"

    @property
    def emergency(self) -> bool:
        """Whether an error made the run save it; these lie in a folder of their own."""
        return self.path.parent.name == EMERGENCY


def updated(run: Path) -> float:
    """When a run last wrote something (unix seconds), 0 if it never did."""
    times = []
    for name in ("metrics.jsonl", "checkpoints", EMERGENCY):
        try:
            times.append((run / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def list_entries(runs_root: Path) -> list[Entry]:
    """All committed checkpoints: most recently updated run first, in a run its best first, then the newest."""
    try:
        with os.scandir(runs_root) as found:
            runs = [Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    entries: list[Entry] = []
    for run in sorted(runs, key=lambda run: (-updated(run), run.name)):
        of_run = run_entries(run)
        entries += sorted(of_run, key=lambda entry: (not entry.best, -entry.step))
    return entries


def run_entries(run: Path) -> list[Entry]:
    """Committed checkpoints of one run and its emergency saves, newest first; `latest` is what RUN@latest stands for."""
    checkpoints = run / "checkpoints"
    best = _pointer(checkpoints, "best")
    entries = [_entry(run.name, path, path == checkpoints / (best or "")) for path in committed_paths(checkpoints)]
    # a living run removes old ones meanwhile: what is not there is not damaged. No lease, since a server here may hold one
    entries = [entry for entry in entries if entry.problem is None or entry.path.is_dir()]
    latest = next((entry for entry in entries if entry.problem is None), entries[0] if entries else None)
    return [replace(entry, latest=entry is latest) for entry in entries]


def _pointer(checkpoints: Path, name: str) -> str | None:
    try:
        return pointer(checkpoints, name)
    except (OSError, CheckpointError):
        return None


def _entry(run: str, path: Path, best: bool) -> Entry:
    step = step_of(path.name) or 0
    try:
        report = read_manifest(path)
    except OSError as error:
        return Entry(run, path, step, best, problem=error.strerror or str(error))
    if not report.ok:
        return Entry(run, path, step, best, problem=report.line())
    loss, name = loss_of(report.manifest.get("metrics"))
    created = report.manifest.get("created")
    flags = report.manifest.get("flags")
    return Entry(
        run,
        path,
        report.step or step,
        best,
        suspect=isinstance(flags, dict) and bool(flags.get("suspect")),
        weights_bytes=sum(entry.size for entry in report.files if entry.path.startswith("model/")),
        loss=loss,
        loss_name=name,
        created=float(created) if isinstance(created, int | float) else None,
        digest=report.digest or None,
    )


def loss_of(metrics: Any) -> tuple[float | None, str | None]:
    """The loss among a checkpoint's metrics (nats per token) and which metric it is."""
    for name in METRICS:
        value = metrics.get(name) if isinstance(metrics, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value), name
    return None, None
