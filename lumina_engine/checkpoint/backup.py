"""Verified copies of committed checkpoints, beside the run or on another disk."""

from __future__ import annotations

from pathlib import Path

from .commit import Staging, commit
from .files import CheckpointError, FileEntry, read_pieces
from .keep import discard, leased, list_steps, quarantine
from .verify import LEASE, opened, read_manifest, require, step_name, verify


def newest_backup(folder: Path) -> float | None:
    """When the state of the newest backup was saved (unix seconds); None without one."""
    for name in list_steps(folder):
        report = read_manifest(folder / name)
        created = report.manifest.get("created")
        if report.ok and isinstance(created, int | float):
            return float(created)
    return None


def back_up(checkpoint: Path, folder: Path, keep: int) -> Path:
    """Copy a committed checkpoint through the hashing writer, read the copy back, then remove all but the newest `keep`.

    Raises:
        CheckpointError: no room, or what was read or written is not what the manifest says; older backups stay.
        OSError: the copy could not be written.
    """
    source = require(read_manifest(checkpoint))
    step = source.manifest["step"]
    target = folder / step_name(step)
    if target.is_dir() and not verify(target).ok:
        quarantine(target)
    if not target.is_dir():
        _copy(checkpoint, folder, step)
        require(verify(target))
    for name in list_steps(folder)[max(keep, 1) :]:
        discard(folder, name)
    return target


def _copy(checkpoint: Path, folder: Path, step: int) -> None:
    with leased(checkpoint) as opened_folder:
        report = require(read_manifest(checkpoint))
        staging = Staging(folder, step, report.bytes)
        try:
            entries = [_copy_file(opened_folder, entry, staging) for entry in report.files if entry.path != LEASE]
            commit(staging, entries, report.manifest)
        except BaseException:
            staging.drop()
            raise


def _copy_file(folder: int, entry: FileEntry, staging: Staging) -> FileEntry:
    with opened(folder, entry.path) as (fd, _):
        copy = staging.write(entry.path, read_pieces(fd), entry.size)
    if copy != entry:
        raise CheckpointError(f"{entry.path} of step {staging.step} is not what was written, so it was not copied")
    return copy
