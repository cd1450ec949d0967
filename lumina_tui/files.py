"""Small files of a user's own: replaced whole or not at all, never overwritten by accident, readable by nobody else."""

from __future__ import annotations

import os
import re
import secrets
import time
from pathlib import Path

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` (mode 0600, its folder made if need be): a reader sees the old content or the new, never a part.

    Raises:
        OSError: nothing is changed then.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        _create(part, data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_new(folder: Path, stem: str, suffix: str, data: str | bytes, now: float | None = None) -> Path:
    """Write `<folder>/<stem>-<time>.<suffix>` (0600) and give its path; a file that is there is never touched.

    Characters of `stem` that do not belong into a file name become `_`.

    Raises:
        OSError: nothing is left behind then.
    """
    stem = re.sub(r"[^A-Za-z0-9._@+-]+", "_", stem).strip("._")[:80] or "export"
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    number = 1
    while True:
        path = folder / f"{stem}-{moment}{f'-{number}' if number > 1 else ''}.{suffix.lstrip('.')}"
        try:
            _create(path, data)
        except FileExistsError:
            number += 1
        else:
            return path


def _create(path: Path, data: str | bytes) -> None:
    """Write a file that must not be there yet; a failed one is removed again."""
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, PRIVATE_FILE)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
    except OSError:
        path.unlink(missing_ok=True)
        raise
