"""A rank's folder for state that is offloaded to disk: private, its own, and removed when the rank ends.

DeepSpeed names its files by rank and clears what it finds, so two runs in one folder would destroy each other.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

_LOCK = "LOCK"


class SwapRefused(Exception):
    """The folder for offload cannot be used; a matter of the configuration."""

    exit_code = 2


def swap_folder(path: str | Path) -> Path:
    """A new folder below `path` (made if need be) for this process. What dead processes left there is removed.

    Raises:
        SwapRefused: `path` is no folder of this user, or others may write to it.
    """
    root = Path(path).expanduser()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(root)
    except OSError as error:
        raise SwapRefused(f"nvme_path = {root}: {error.strerror}; set another folder on a local disk") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise SwapRefused(f"nvme_path = {root}: not a folder of yours alone (others may write to it); set another one")
    for left in root.glob("lumina-*"):
        _remove_if_dead(left)
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    lock = os.open(fresh / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # held until the process ends; unlike lockf also against this process itself
    folder = fresh.rename(root / f"lumina-{fresh.name.removeprefix('.new-')}")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _remove_if_dead(folder: Path) -> None:
    """Remove a folder whose process is gone."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return  # being removed by another rank, or not one of these
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # its process lives
    finally:
        os.close(lock)
