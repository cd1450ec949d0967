"""Verified copies of committed checkpoints, beside the run or on another disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .commit import Staging, commit
from .files import CheckpointError, FileEntry, nonce, read_pieces, sync_folder
from .keep import discard, drop_rewound, leased, list_steps, quarantine
from .verify import LEASE, opened, read_manifest, require, step_name, verify

Rewinds = Callable[[], Iterable[tuple[int, int]]]  # (seq, to_step) of each rewind in a run's log
Tick = Callable[..., None]  # called while work goes on, with whatever is known of it


def backup_folder(backup_path: str, run_dir: Path, run_id: str) -> Path:
    """Where a run's backups lie below `backup_path`: a folder of its own, since runs in several roots may share a name."""
    return Path(backup_path).expanduser().resolve() / f"{run_dir.name}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


def by_age(folder: Path) -> list[tuple[float, str]]:
    """(when its state was saved in unix seconds, name) of each backup, newest first; one without a sound manifest is oldest.

    By time and not by step: after a rewind the backups of the abandoned branch may have the higher steps.
    """
    ages = []
    for name in list_steps(folder):
        report = read_manifest(folder / name)
        created = report.manifest.get("created")
        ages.append((float(created) if report.ok and isinstance(created, int | float) else 0.0, name))
    return sorted(ages, reverse=True)


def newest_backup(folder: Path) -> float | None:
    """When the state of the newest backup was saved (unix seconds); None without one."""
    newest, _ = next(iter(by_age(folder)), (0.0, ""))
    return newest or None


def set_others_aside(checkpoint: Path, folder: Path, rewinds: Rewinds) -> list[str]:
    """Take the copies of another history of the run out of the way of this checkpoint's: `step-N.other-<nonce>`, never deleted.

    A copy of a later step, of a later place in the log, or of this step with other content is of an abandoned branch where the
    log has a rewind behind it to an earlier step. Without one this checkpoint does not follow from it, and may not replace it.
    Without a log (a plain script) there is no telling.

    Returns:
        the new names.
    """
    source = require(read_manifest(checkpoint))
    step, seq = source.manifest["step"], source.manifest.get("log_seq")
    moved: list[str] = []
    if not isinstance(seq, int):
        return moved
    for name in list_steps(folder):
        there = read_manifest(folder / name)
        at = there.manifest.get("log_seq") if there.ok else None
        if not isinstance(at, int) or (there.manifest["step"] < step and at <= seq) or _content(there) == _content(source):
            continue
        if not any(behind > at and to_step < there.manifest["step"] for behind, to_step in rewinds()):
            moved.append(f"{name}.other-{nonce()}")
            (folder / name).rename(folder / moved[-1])
    if moved:
        sync_folder(folder)
    return moved


def back_up(checkpoint: Path, folder: Path, keep: int, known: set[str] | None = None) -> Path:
    """Copy a committed checkpoint through the hashing writer, read the copy back, then remove all but the newest `keep`.

    Only backups whose digests are right count as kept; a damaged one is set aside as `*.corrupt`.

    Args:
        known: names whose digests were compared before; those compared here are added.

    Raises:
        CheckpointError: no room, or what was read or written is not what the manifest says; older backups stay.
        OSError: the copy could not be written.
    """
    known = set() if known is None else known
    target = copied(checkpoint, folder)
    known.add(target.name)
    drop_rewound(folder)
    kept = 0
    for _, name in by_age(folder):
        if kept >= max(keep, 1):
            discard(folder, name)
            known.discard(name)
        elif name in known or verify(folder / name).ok:
            known.add(name)
            kept += 1
        else:
            quarantine(folder / name)
    return target


def copied(checkpoint: Path, folder: Path, tick: Tick = lambda *_: None) -> Path:
    """The verified copy of a committed checkpoint in another folder, made unless it is there.

    Args:
        tick: called for each chunk that was read or written.

    Raises:
        CheckpointError: no room, or what was read or written is not what the manifest says.
        OSError: the copy could not be written.
    """
    source = require(read_manifest(checkpoint))
    target = folder / step_name(source.manifest["step"])
    if target.is_dir():
        there = verify(target, progress=tick)
        if not there.ok:
            quarantine(target)
        elif _content(there) != _content(source):  # the same step of an abandoned branch
            target.rename(target.with_name(f"{target.name}.rewound-{nonce()}"))
            sync_folder(folder)
    if not target.is_dir():
        _copy(checkpoint, folder, source.manifest["step"], tick)
        require(verify(target, progress=tick, past_cache=True))
    return target


def _content(report: Any) -> dict[str, Any]:
    """A manifest without what differs between a checkpoint and its copy."""
    return {name: value for name, value in report.manifest.items() if name != "files"} | {
        "files": [entry for entry in report.manifest["files"] if entry["path"] != LEASE]
    }


class Backups:
    """Backups of one run, made by rank 0 when they are due. A copy runs beside training and never in the way of the next save.

    Args:
        folder: of the backups. clock, started: unix seconds now, and when the run was made.
        tell: takes a sentence about a copy that failed, or that was of another history of the run.
        rewinds: of the run's log.
    """

    def __init__(
        self,
        config: Any,
        checkpoints: Path,
        folder: Path,
        clock: Callable[[], float],
        started: Callable[[], float],
        tell: Callable[[str], None],
        rewinds: Rewinds = tuple,
    ) -> None:
        self.config, self.checkpoints, self.folder = config, checkpoints, folder
        self._clock, self._started, self._tell, self._rewinds = clock, started, tell, rewinds
        self.held = False  # no copy is started any more
        self._known: set[str] = set()
        self._thread: threading.Thread | None = None
        self._name = ""

    @property
    def copying(self) -> str | None:
        """Name of the checkpoint that is being copied: its lease is this process's own, which does not hold retention off."""
        return self._name if self._thread is not None and self._thread.is_alive() else None

    def copy_if_due(self, checkpoint: Path) -> None:
        """Copy a checkpoint just committed, if `backup_every_n_hours` have passed, in a thread, one at a time.

        Beside a blocking save too: its time says nothing of how long a copy to another disk takes, so a watchdog that knows
        saves would take the copy for a hang, and the other ranks would wait for it.
        """
        hours = self.config.backup_every_n_hours
        if not hours or self.held or self.copying is not None:
            return
        last = newest_backup(self.folder)
        if self._clock() - (self._started() if last is None else last) < hours * 3600:
            return
        self._name = checkpoint.name
        # a daemon: a process that must leave does not wait for a slow disk, and the next start removes what is half-done
        self._thread = threading.Thread(target=self._copy, args=(checkpoint,), name="checkpoint-backup", daemon=True)
        self._thread.start()

    def _make(self, checkpoint: Path) -> None:
        for name in set_others_aside(checkpoint, self.folder, self._rewinds):
            self._known.discard(name.partition(".")[0])
            self._tell(f"{self.folder / name} is of another history of this run, which its log does not explain: it is kept")
        back_up(checkpoint, self.folder, self.config.max_backup_count, self._known)

    def _copy(self, checkpoint: Path) -> None:
        try:
            self._make(checkpoint)
        except BaseException as problem:  # a thread that dies silently would hide that there is no backup
            self._tell(f"{checkpoint.name} was not backed up: {problem}")

    def wait(self) -> None:
        """Wait for the copy in flight."""
        if self._thread is not None:
            self._thread.join()


def ticking(pieces: Iterable[Any], tick: Tick) -> Iterator[Any]:
    """The pieces, with a call for each one that is taken."""
    for piece in pieces:
        tick()
        yield piece


def _copy(checkpoint: Path, folder: Path, step: int, tick: Tick) -> None:
    with leased(checkpoint) as opened_folder:
        report = require(read_manifest(checkpoint))
        staging = Staging(folder, step, report.bytes)
        try:
            entries = [_copy_file(opened_folder, entry, staging, tick) for entry in report.files if entry.path != LEASE]
            commit(staging, entries, report.manifest)
        except BaseException:
            staging.drop()
            raise


def _copy_file(folder: int, entry: FileEntry, staging: Staging, tick: Tick) -> FileEntry:
    with opened(folder, entry.path) as (fd, _):
        copy = staging.write(entry.path, ticking(read_pieces(fd), tick), entry.size, entry)
    if copy != entry:
        raise CheckpointError(f"{entry.path} of step {staging.step} is not what was written, so it was not copied")
    return copy
