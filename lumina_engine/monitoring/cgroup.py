"""Memory and cores of this process's control group: limits, use, and whom the kernel killed in it. Standard library only.

Version 2 keeps all controllers in one tree (`0::/path`), version 1 one tree a controller (`4:memory:/path`). In a container the
path may be the host's, which is not there: then the top of the tree is the container's own.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory.limit_in_bytes")
# what is in use, and the lines of memory.stat for page cache in it, with the groups below
_USES = (
    ("memory.current", ("inactive_file", "active_file")),
    ("memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
_KILLS = ("memory.events", "memory.oom_control")


def memory_folders(root: Path = ROOT, membership: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The folders that account this process's memory, its own group first, then those above it."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found: list[Path] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        top = root if number == "0" else root / "memory" if "memory" in controllers.split(",") else None
        if top is None or ".." in path.split("/"):
            continue
        own = top / path.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder == top or top in folder.parents]
    return [folder for folder in dict.fromkeys([*found, root, root / "memory"]) if folder.is_dir()]


def limiting_folder(root: Path = ROOT, membership: Path = Path("/proc/self/cgroup")) -> tuple[int, Path] | None:
    """The lowest memory limit in bytes of the group and those above, and whose it is; None where there is none.

    Of equal limits that of the outermost folder counts: what others use is in it.
    """
    lowest: tuple[int, Path] | None = None
    for folder in memory_folders(root, membership):
        for text in (_text(folder / name) for name in _LIMITS):
            if text.isdigit() and (lowest is None or int(text) <= lowest[0]):
                lowest = int(text), folder
    return lowest


def limit(root: Path = ROOT, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The lowest memory limit in bytes of the group and those above; None where there is none."""
    lowest = limiting_folder(root, membership)
    return None if lowest is None else lowest[0]


def in_use(folder: Path) -> int | None:
    """Bytes of memory that a group and those below it use, without page cache; None where the kernel does not tell.

    The kernel takes page cache back before it kills, and lets it fill the whole limit of a group that reads large files; the
    host's `available` leaves it out in the same way. Memory that is shared between processes is no such cache.
    """
    for name, cached in _USES:
        total = _text(folder / name)
        pairs = (line.partition(" ") for line in _text(folder / "memory.stat").splitlines())
        cache = [int(value) for key, _, value in pairs if key in cached and value.isdigit()]
        if total.isdigit() and cache:
            return max(0, int(total) - sum(cache))
    return None


def oom_kills(root: Path = ROOT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """How many processes of the group the kernel has killed for want of memory; 0 where it does not tell."""
    for folder in memory_folders(root, membership):
        for name in _KILLS:
            counts = [line.split()[1] for line in _text(folder / name).splitlines() if line.startswith("oom_kill ")]
            if counts and counts[0].isdigit():
                return int(counts[0])
    return 0


def core_count(cgroup: Path = ROOT) -> int:
    """Cores that this process may use: its affinity, or its cgroup's quota if that is lower."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return count
    if not quota.isdigit():
        return count  # "max"
    return max(1, min(count, -(-int(quota) // int(period))))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
