"""Completing a path as a shell does. Reads one folder; call it off the loop where that folder may be slow."""

from __future__ import annotations

import os
from pathlib import Path

MAX_NAMES = 2000  # entries of one folder that are looked at


def complete(text: str) -> tuple[str, list[str]]:
    """(the text with everything that is certain added, the names that it may go on with; folders end in `/`).

    Hidden entries are offered only for a name that begins with a dot. Nothing is raised: a folder that cannot be read has no
    names.
    """
    head, _, tail = text.rpartition("/")
    folder = f"{head}/" if "/" in text else ""
    names = [name for name in _names(Path(folder or ".").expanduser()) if name.startswith(tail)]
    if not tail.startswith("."):
        names = [name for name in names if not name.startswith(".")]
    common = os.path.commonprefix(names)  # noqa: RUF071  (of names, not of paths)
    return (folder + common if len(common) > len(tail) else text), names


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry.name + ("/" if entry.is_dir() else "") for entry, _ in zip(entries, range(MAX_NAMES), strict=False)]
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return []
    return sorted(found)
