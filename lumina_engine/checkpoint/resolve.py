"""From what a person writes to a checkpoint: RUN, RUN@best, RUN@latest, RUN@step-000123, a path, or nothing."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from .files import CheckpointError, require_unlinked
from .keep import EMERGENCY, POINTERS, committed_paths, is_run, list_steps, pointer
from .verify import read_manifest, step_of

_RUN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@(.+))?")
_FOREIGN = (".pt", ".pth", ".bin", ".ckpt")


def resolve_checkpoint(reference: str | os.PathLike[str] | None, runs_root: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a committed checkpoint; see `explain_checkpoint`, which also says why this one."""
    return explain_checkpoint(reference, runs_root)[0]


def explain_checkpoint(
    reference: str | os.PathLike[str] | None, runs_root: str | os.PathLike[str] | None = None
) -> tuple[Path, str]:
    """The folder of a committed checkpoint, and in a few words which one it is.

    RUN stands for RUN@best; where no best one is known yet, for the latest. A path may name a checkpoint, a run or a folder of
    checkpoints. None takes the best of the most recently updated run. Digests are compared by whoever loads it.

    Raises:
        CheckpointError: nothing there, and the message names the nearest thing that is; or the run's folder of them is a link.
    """
    if runs_root is None:
        from ..run.directory import runs_root as default_root

        runs_root = default_root()
    root = Path(runs_root)
    if reference is None:
        return _newest_run(root)
    text = os.fspath(reference)
    if text.lower().endswith(_FOREIGN):
        raise CheckpointError(
            f"{text} is not a checkpoint of Lumina, and pickle files are never opened here: "
            f"`lumina-engine checkpoint import {text} --run NAME` makes a run of it"
        )
    path = Path(text).expanduser()
    if path.is_dir():
        return _from_path(path)
    match = _RUN.fullmatch(text)
    if match is None:
        raise CheckpointError(f"{text} does not exist{_nearby(path)}")
    run = root / match[1]
    if not run.is_dir():
        raise CheckpointError(f"no run {match[1]!r} in {root}{_nearest(match[1], _runs(root))}")
    return _from_run(run, match[2] or "best")


def _from_path(path: Path) -> tuple[Path, str]:
    if path.name == "checkpoints":
        require_unlinked(path)
    path = path.resolve()
    if is_run(path):
        return _from_run(path, "best")
    if step_of(path.name) is not None or (path / "MANIFEST.json").is_file():
        return path, "the checkpoint named"
    if list_steps(path):
        return _choose(path, "best", str(path))
    raise CheckpointError(f"{path} holds no committed checkpoint{_nearby(path)}")


def _from_run(run: Path, wanted: str) -> tuple[Path, str]:
    if wanted not in POINTERS and step_of(wanted) is None:
        raise CheckpointError(f"{run.name}@{wanted}: after @ stands best, latest or a step like step-000123")
    folder = run.resolve()
    require_unlinked(folder / "checkpoints", folder / EMERGENCY)
    return _choose(folder / "checkpoints", wanted, f"run {run.name}")


def _choose(checkpoints: Path, wanted: str, owner: str) -> tuple[Path, str]:
    paths = committed_paths(checkpoints)
    if not paths:
        others = _names_text(_runs(checkpoints.parent.parent))
        raise CheckpointError(f"{owner} has no checkpoint yet{others}")
    if wanted not in POINTERS:
        path = next((path for path in paths if path.name == wanted), None)
        if path is None:
            raise CheckpointError(f"{owner} has no {wanted}; it has {', '.join(path.name for path in paths[:5])}")
        return path, f"{wanted} of {owner}" + _kind(path)
    target = pointer(checkpoints, "best") if wanted == "best" else None
    if target is not None:
        return checkpoints / target, f"best of {owner}"
    # `latest` is only a hint: the newest folder with a sound manifest is the truth
    path = next((path for path in paths if read_manifest(path).ok), paths[0])
    return path, f"latest of {owner}" + _kind(path) + (" (no best one is known yet)" if wanted == "best" else "")


def _kind(path: Path) -> str:
    return ", an emergency save" if path.parent.name == EMERGENCY else ""


def _runs(root: Path) -> list[str]:
    """Names of the runs that have a committed checkpoint."""
    try:
        return sorted(entry.name for entry in root.iterdir() if is_run(entry) and committed_paths(entry / "checkpoints"))
    except OSError:
        return []


def _newest_run(root: Path) -> tuple[Path, str]:
    found = [(_updated(root / name), name) for name in _runs(root)]
    if not found:
        raise CheckpointError(f"no run with a checkpoint in {root}; train one with `lumina-engine train`, or name a checkpoint")
    name = max(found)[1]
    path, why = _from_run(root / name, "best")
    others = f", the most recently updated of {len(found)} runs" if len(found) > 1 else ""
    return path, why + others


def _updated(run: Path) -> float:
    times = []
    for path in (run / "checkpoints", run / EMERGENCY, run / "metrics.jsonl"):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue  # a run without a log yet
    return max(times, default=0.0)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return _names_text(names) or "; no run has a checkpoint yet"


def _names_text(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"; runs with checkpoints: {', '.join(names[:5])}{more}" if names else ""


def _nearby(path: Path) -> str:
    """The best checkpoint of the run that a missing path lies in."""
    for folder in path.absolute().parents:
        if is_run(folder):
            try:
                return f"; the best checkpoint of run {folder.name} is {_from_run(folder, 'best')[0]}"
            except CheckpointError:
                return f"; run {folder.name} has no checkpoint yet"
    return ""
