"""Which kind of file system a place lies on (standard library only)."""

from __future__ import annotations

import os
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
_ESCAPES = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))


def file_system(place: str | os.PathLike[str], mounts: str | None = None) -> str:
    """The type of the file system that holds an existing path, by the nearest mount point above it; empty if unknown.

    Args:
        mounts: the table of mounts, as in `MOUNTS`; None reads that.
    """
    if mounts is None:
        try:
            mounts = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")  # names of mount points are any bytes
        except OSError:
            return ""
    target, best = os.path.realpath(place), ("", "")
    for line in mounts.split("\n"):
        before, _, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split()
        if len(fields) < 5 or not tail:
            continue
        point = fields[4]
        for escape, plain in _ESCAPES:
            point = point.replace(escape, plain)
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, tail[0])
    return best[1]
