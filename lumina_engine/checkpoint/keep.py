"""What happens to committed checkpoints: found at start, pointed to, leased, retained, quarantined.

    step-000123                     committed                    step-000123.corrupt    failed its digests, never deleted
    step-000123.rewound-<nonce>     on an abandoned branch       .trash-…, .tmp-…       being deleted, being written

Everything here that renames or deletes is for the holder of the run's lock; readers (chat, export, lists) only take a lease.
"""

# ruff: noqa: PTH104, PTH108, PTH116, PTH208  os.* calls on purpose: the fault rig counts them (pathlib of 3.10 binds its own)

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .files import (
    CheckpointError,
    nonce,
    open_beneath,
    open_folder,
    read_file,
    remove_tree,
    require_unlinked,
    sync_folder,
    write_file,
)
from .verify import DAMAGE, LEASE, Report, read_manifest, step_of, verify

POINTERS = ("latest", "best")
EMERGENCY = "emergency"  # folder beside checkpoints/
MIN_KEEP = 2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what file systems without locks answer
_STALE = (".tmp-", ".trash-", *(f"{name}.tmp-" for name in POINTERS))
_FOREIGN_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".tar", ".zip", ".distcp")


class GoneError(CheckpointError):
    """There is no such checkpoint, or no longer: retention has removed it."""


@dataclass(slots=True)
class Found:
    """Result of the start-up scan: the newest valid checkpoint (None: there never was one) and what was refused on the way."""

    path: Path | None = None
    report: Report | None = None
    rejected: list[tuple[str, str]] = field(default_factory=list)  # name, reason; these now carry `.corrupt`
    removed: list[str] = field(default_factory=list)  # stale staging and trash that the clean-up deleted


def list_steps(checkpoints: Path) -> list[str]:
    """Names of the committed folders, newest step first. Nothing about them is checked."""
    try:
        with os.scandir(checkpoints) as entries:
            names = [entry.name for entry in entries if step_of(entry.name) is not None and entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(names, key=lambda name: step_of(name) or 0, reverse=True)


def committed_paths(checkpoints: Path) -> list[Path]:
    """The committed folders of a run, newest step first: those of checkpoints/, and of emergency/ beside it.

    A start goes on from the newest of all. Of two of one step that of checkpoints/ comes first. Nothing about them is checked.
    """
    folders = [checkpoints, checkpoints.with_name(EMERGENCY)] if checkpoints.name == "checkpoints" else [checkpoints]
    paths = [folder / name for folder in folders for name in list_steps(folder)]
    return sorted(paths, key=lambda path: step_of(path.name) or 0, reverse=True)


def told(path: Path) -> str:
    """The name of a committed folder within its run, as people read it: an emergency save with the folder that it lies in."""
    return f"{EMERGENCY}/{path.name}" if path.parent.name == EMERGENCY else path.name


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run: checkpoints lie in it, or emergency saves, which a script may have alone."""
    return (path / "checkpoints").is_dir() or (path / EMERGENCY).is_dir()


def newest_valid(checkpoints: Path, *more: Path, progress: Callable[[int, int], None] | None = None) -> Found:
    """Newest to oldest, every digest, first good one wins; those refused before it are renamed `*.corrupt`.

    Args:
        checkpoints: the run's folder. `more`: further folders of committed checkpoints (emergency/).
        progress: as of `verify`, for each checkpoint that is read.

    Raises:
        CheckpointError: a checkpoint of a newer format; or something like a checkpoint is there and none is valid; or one of
            the folders is a link. Then nothing has been renamed, moved or deleted.
    """
    require_unlinked(checkpoints, *more)
    found = Found()
    folders = [folder for folder in (checkpoints, *more) if folder.is_dir()]
    candidates = [
        (step_of(name) or 0, -index, folder / name) for index, folder in enumerate(folders) for name in list_steps(folder)
    ]
    bad: list[Report] = []
    for _, _, path in sorted(candidates, reverse=True):
        report = verify(path, progress=progress)
        if report.newer_format:
            raise CheckpointError(f"{path}: {report.line()}")
        if report.ok:
            found.path, found.report = path, report
            break
        bad.append(report)
    if found.path is None:
        _refuse(folders, bad)
        return found
    for report in bad:
        quarantine(report.path)
        found.rejected.append((report.path.name, report.line()))
    return found


def _refuse(folders: list[Path], bad: list[Report]) -> None:
    reasons = [f"{report.path.name}: {report.line()}" for report in bad]
    judged = {report.path.name for report in bad}
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            if name not in judged and _is_like_checkpoint(folder, name):
                reasons.append(f"{name}: {_why_no_candidate(name)}")
    if reasons:
        raise CheckpointError(
            f"no valid checkpoint in {folders[0]}, and it is not empty, so nothing is started over: {'; '.join(reasons)}. "
            "Nothing was changed. Restore a checkpoint there, or start again with --fresh (moves the whole run aside)"
        )


def _is_like_checkpoint(folder: Path, name: str) -> bool:
    if name.startswith(".tmp-"):
        return False  # was never committed
    if name in POINTERS or (folder / name).is_dir():
        return True
    return name.endswith(_FOREIGN_SUFFIXES) or any(word in name.lower() for word in ("step", "ckpt", "checkpoint", "epoch"))


def _why_no_candidate(name: str) -> str:
    if name in POINTERS:
        return "points to a checkpoint that is gone"
    if ".corrupt" in name:
        return "was refused before"
    if ".rewound-" in name:
        return "belongs to an abandoned branch"
    return "is no checkpoint of Lumina"


def quarantine(path: Path) -> Path:
    """Rename a damaged checkpoint to `<name>.corrupt`; it is no candidate any more and is never deleted."""
    target = path.with_name(path.name + ".corrupt")
    if os.path.lexists(target):
        target = path.with_name(f"{path.name}.corrupt-{nonce()}")
    os.rename(path, target)
    sync_folder(path.parent)
    return target


def good_names(folder: Path, count: int) -> list[str]:
    """Names of the newest `count` committed checkpoints whose every digest is right, newest first. Reads all of them."""
    found: list[str] = []
    for name in list_steps(folder):
        if len(found) == count:
            break
        if verify(folder / name).ok:
            found.append(name)
    return found


def clean_stale(checkpoints: Path) -> list[str]:
    """Delete what a dead writer left behind. Only for the holder of the run's lock: a live writer's staging looks the same."""
    if not checkpoints.is_dir():
        return []
    parent = open_folder(checkpoints)
    try:
        stale = sorted(name for name in os.listdir(parent) if name.startswith(_STALE))
        for name in stale:
            remove_tree(parent, name)
    finally:
        os.close(parent)
    return stale


def pointer(checkpoints: Path, name: str) -> str | None:
    """What `latest` or `best` names, if that is a committed folder here. Anything else, however it came about, is None."""
    try:
        folder = open_folder(checkpoints)
    except OSError:
        return None
    try:
        target = read_file(folder, name, limit=64).decode("ascii").strip("\n")
        if step_of(target) is None:
            return None
        os.close(open_folder(target, dir_fd=folder))
    except (OSError, CheckpointError, UnicodeDecodeError):
        return None  # a hint that cannot be read is no hint
    finally:
        os.close(folder)
    return target


def set_pointer(checkpoints: Path, name: str, target: str) -> None:
    """Let `latest` or `best` name a committed step: temporary file, fsync, rename, fsync of the folder.

    Raises:
        OSError: not changed, or not durably.
    """
    if name not in POINTERS or step_of(target) is None:
        raise CheckpointError(f"{name} cannot point to {target!r}")
    temporary = f"{name}.tmp-{nonce()}"
    folder = open_folder(checkpoints)
    try:
        write_file(folder, temporary, [target.encode() + b"\n"])
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)


def drop_pointer(checkpoints: Path, name: str) -> None:
    """Remove a pointer, if it is there."""
    try:
        os.unlink(checkpoints / name)
    except FileNotFoundError:
        return


@contextmanager
def leased(path: Path) -> Iterator[int]:
    """Hold a checkpoint against retention while reading it; yields a descriptor of its folder.

    The lock is POSIX (dies with its process, is not inherited). A process takes one lease per checkpoint at a time: closing any
    descriptor of LEASE drops the process's lock. Where the file system has no locks there is no lease: what is removed under
    the reader is missing then, which verification finds.

    Raises:
        GoneError: no such checkpoint, or retention removed it first.
        CheckpointError: no folder, or one that this process may not open.
    """
    try:
        folder = open_folder(path)
    except FileNotFoundError as error:
        raise GoneError(f"{path}: no checkpoint there ({error.strerror})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: no checkpoint there ({error.strerror})") from error
    lease = None
    try:
        try:
            lease = open_beneath(folder, LEASE, os.O_RDONLY)
            fcntl.lockf(lease, fcntl.LOCK_SH)
        except OSError as error:
            # verification reports a file that is missing or no file, and nothing else
            if error.errno not in (DAMAGE if lease is None else _NO_LOCKS):
                raise
        _require_same(path, folder)
        yield folder
    finally:
        if lease is not None:
            os.close(lease)
        os.close(folder)


def _require_same(path: Path, folder: int) -> None:
    mine = os.fstat(folder)
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        there = None
    if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
        raise GoneError(f"{path} was removed by retention while it was being opened; take the newest one")


def retain(
    checkpoints: Path, keep: int, verified: Collection[str], protect: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Delete what is older than the newest `keep` verified checkpoints. Call after the newest one is verified.

    Args:
        keep: at least 2 are kept whatever this says.
        verified: names whose digests this process has compared since they were committed or found.
        protect: names to keep besides (the target of `best`).

    Returns:
        names removed, names left because a reader holds their lease.
    """
    names = list_steps(checkpoints)
    good = [name for name in names if name in verified]
    keep = max(keep, MIN_KEEP)
    if len(good) < keep:
        return [], []
    kept = {*names[: names.index(good[keep - 1]) + 1], *protect}
    sound = next((name for name in names if not _is_suspect(checkpoints / name)), None)
    if sound is not None:
        kept.add(sound)  # a rollback needs the newest one from before the trouble began
    removed: list[str] = []
    busy: list[str] = []
    for name in reversed(names):
        if name not in kept:
            (removed if discard(checkpoints, name) else busy).append(name)
    return removed, busy


def drop_overtaken(checkpoints: Path, verified: Collection[str]) -> list[str]:
    """Delete the emergency saves of a run that `MIN_KEEP` verified checkpoints have overtaken, and those of abandoned branches.

    One that is being read stays until the next call. Call after a commit.
    """
    emergency = checkpoints.with_name(EMERGENCY)
    if not emergency.is_dir():
        return []
    drop_rewound(emergency)
    good = [step_of(name) or 0 for name in list_steps(checkpoints) if name in verified]
    if len(good) < MIN_KEEP:
        return []
    names = [name for name in list_steps(emergency) if (step_of(name) or 0) <= good[MIN_KEEP - 1]]
    return [name for name in names if discard(emergency, name)]


def _is_suspect(path: Path) -> bool:
    report = read_manifest(path)
    flags = report.manifest.get("flags")
    return not report.ok or bool(isinstance(flags, dict) and flags.get("suspect"))


def discard(checkpoints: Path, name: str) -> bool:
    """Delete a folder unless a reader holds its lease: exclusive lease, rename to `.trash-…`, fsync, remove."""
    parent = open_folder(checkpoints)
    trash = f".trash-{name}-{nonce()}"
    lease = None
    try:
        try:
            folder = open_folder(name, dir_fd=parent)
            try:
                lease = open_beneath(folder, LEASE, os.O_RDWR)
            finally:
                os.close(folder)
            fcntl.lockf(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            lease = None  # without the file nobody can hold it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        os.rename(name, trash, src_dir_fd=parent, dst_dir_fd=parent)
        os.fsync(parent)
        remove_tree(parent, trash)
        return True
    finally:
        if lease is not None:
            os.close(lease)
        os.close(parent)


def rewind(checkpoints: Path, step: int) -> list[str]:
    """Give up every committed checkpoint after `step`: renamed `.rewound-<nonce>`, so none is found at start or in the way.

    Newest first: a crash in between leaves either branch whole. They are deleted after the next commit (`drop_rewound`).
    """
    names = [name for name in list_steps(checkpoints) if (step_of(name) or 0) > step]
    for name in names:
        os.rename(checkpoints / name, checkpoints / f"{name}.rewound-{nonce()}")
    if names:
        sync_folder(checkpoints)
    return names


def drop_rewound(checkpoints: Path) -> list[str]:
    """Delete the checkpoints of abandoned branches; one that is being read stays until the next call."""
    with os.scandir(checkpoints) as entries:
        names = sorted(entry.name for entry in entries if ".rewound-" in entry.name and entry.is_dir(follow_symlinks=False))
    return [name for name in names if step_of(name.split(".rewound-")[0]) is not None and discard(checkpoints, name)]
