"""engine.log: what the supervisor and the ranks print. Read for its end, kept below a size."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def end_of(path: Path, size: int = 16_384) -> str:
    """The last `size` bytes as text; empty if the file cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def cap(path: Path, limit: int) -> None:
    """Keep a log that others append to below `limit` bytes: copy it to <name>.1 and truncate. A full disk costs the copy.

    <name>.1 appears whole and private, or not at all: a reader never meets a copy that is still being written.
    """
    try:
        if path.stat().st_size <= limit:
            return
    except OSError:
        return
    old, partial = path.with_name(path.name + ".1"), path.with_name(path.name + ".partial")
    try:
        shutil.copyfile(path, partial)
        partial.chmod(0o600)
        partial.replace(old)
    except OSError:
        partial.unlink(missing_ok=True)
    os.truncate(path, 0)


def last_lines(path: Path, start: int = 0, count: int = 3) -> str:
    """The last lines of a log that were written after byte `start`, joined by " | "; empty if there are none."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return " | ".join(line.strip()[:300] for line in [line for line in lines if line.strip()][-count:])
