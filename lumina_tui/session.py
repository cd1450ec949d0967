"""Which screen a session ended on, and whether the next one can begin there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .memory import Memory

KEY = "app.screen"


@dataclass(frozen=True)
class Place:
    """A screen and the arguments that rebuild its subject."""

    number: int
    arguments: dict[str, Any]


def remember(memory: Memory, root: Path, number: int, arguments: dict[str, str | list[str]]) -> None:
    """Keep where the user is: paths as text, the runs' root with it (other runs are another session)."""
    memory.set(KEY, {"root": str(root.absolute()), "screen": str(number), "subject": arguments})


def restored(memory: Memory, root: Path) -> Place | None:
    """Where to begin; None if nothing was kept, it was below another root, or its run or file is gone. Cheap: a few `stat`."""
    kept: Any = memory.get(KEY, None)
    if not isinstance(kept, dict) or kept.get("root") != str(root.absolute()):
        return None
    number, subject = kept.get("screen"), kept.get("subject")
    if not isinstance(number, str) or not number.isdecimal() or not isinstance(subject, dict):
        return None
    arguments: dict[str, Any] = {}
    for name, value in subject.items():
        found = _subject(name, value)
        if found is None:
            return None
        arguments[name] = found
    return Place(int(number), arguments)


def _subject(name: str, value: Any) -> Any:
    """An argument as its screen takes it; None if what it names is not there any more."""
    if name == "run" and isinstance(value, str):
        return Path(value) if _is_run(value) else None
    if name == "runs" and isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [Path(item) for item in value] if all(map(_is_run, value)) else None
    if name == "path" and isinstance(value, str):
        return Path(value) if Path(value).is_file() else None
    if name == "select" and isinstance(value, str):
        return value
    return None


def _is_run(path: str) -> bool:
    return (Path(path) / "run.json").is_file()
