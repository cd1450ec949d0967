"""Checks of the folders that Lumina writes: free space, kind of file system, and a real write, fsync, rename and lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path

from ..mounts import MOUNTS, file_system
from .row import Result, fail, ok, warn
from .system import System

NETWORK_TYPES = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "ceph", "glusterfs", "beegfs", "9p", "afs", "sshfs")
_ADVISED = 10e9  # bytes free for runs
_LEAST = 1e9
_FEW_FILES = 10_000


def runs_folder(system: System) -> Iterator[Result]:
    """The folder of the runs: checkpoints go there, so it needs room, fsync, atomic rename and POSIX locks."""
    yield from _folder(system, system.runs, _LEAST, _ADVISED, "set LUMINA_RUNS (or --runs) to a folder on another disk", True)


def cache_folder(system: System) -> Iterator[Result]:
    """The cache: columns of long logs, token stores, copied text. Safe to delete."""
    yield from _folder(system, system.cache, 1e8, 2e9, "set XDG_CACHE_HOME to a folder on another disk", False)


def tmp_folder(system: System) -> Iterator[Result]:
    """Temporary files: output of programs that are started, and what is compiled."""
    yield from _folder(system, system.tmp, 1e8, 1e9, "set TMPDIR to a folder on another disk", False)


def _folder(system: System, folder: Path, least: float, advised: float, move: str, keeps: bool) -> Iterator[Result]:
    place = nearest(folder)
    named = f"{folder}" if place == Path(os.path.abspath(folder)) else f"{folder} (will be made below {place})"  # noqa: PTH100
    kind = file_system(place, system.read(str(MOUNTS)) or "")
    try:
        space = system.statvfs(place)
    except OSError as error:
        yield fail(f"{named}: {error.strerror}", move)
        return
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    text = f"{named}, {kind or 'unknown file system'}, {free / 1e9:,.1f} of {total / 1e9:,.1f} GB free"
    problem = use(place)
    if problem is not None:
        yield fail(f"{text}; {problem}", move)
    elif free < least:
        yield fail(text, f"free space there, or {move}")
    elif space.f_files and space.f_favail < _FEW_FILES:
        yield fail(f"{text}; only {space.f_favail:,} more files fit", f"delete files there, or {move}")
    elif kind in NETWORK_TYPES or kind.startswith("fuse."):
        yield warn(
            f"{text}; a network file system: locks, appends and fsync may behave otherwise than on a local disk",
            f"tested on local disks only; {move}",
        )
    elif keeps and kind in ("tmpfs", "ramfs"):
        yield warn(f"{text}; in memory: gone after a restart", move)
    elif keeps and kind == "overlay":
        yield warn(f"{text}; inside the container: gone with it", f"mount a volume there (docker run -v …), or {move}")
    elif free < advised:
        yield warn(text, f"free space there, or {move}")
    else:
        yield ok(f"{text}; write, fsync, rename and lock work")


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    place = Path(os.path.abspath(folder))  # noqa: PTH100
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def use(place: Path) -> str | None:
    """Write a small file, bring it to the disk, rename it, lock it, remove it; what did not work, or None."""
    first = place / f".lumina-doctor-{secrets.token_hex(6)}"
    second = first.with_name(first.name + "-renamed")
    step = "write"
    try:
        descriptor = os.open(first, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, b"lumina")
            step = "fsync"
            os.fsync(descriptor)
            step = "rename"
            first.rename(second)
            step = "lock"
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _seen_locked(second):
                return "a lock is not seen by others: two supervisors could take one run"
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{step}: {error.strerror or error}"
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):  # the step that failed is what the row says
                path.unlink(missing_ok=True)
    return None


def _seen_locked(path: Path) -> bool:
    """Whether a second open file sees the lock of the first; open-file locks and POSIX locks exclude each other."""
    layout = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, length, pid
    query = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with path.open("rb+") as file:
        answer = fcntl.fcntl(file.fileno(), fcntl.F_OFD_GETLK, query)
    return struct.unpack(layout, answer)[0] != fcntl.F_UNLCK
