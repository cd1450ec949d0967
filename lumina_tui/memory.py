"""What `lumina` remembers from one session to the next: layout, filters, the last screen. One small JSON file.

Keys are `"<scope>.<name>"`, values plain JSON. Only what this session changed is written, over what the file holds then: two
viewers at once do not wipe out each other's settings.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .files import write_atomic

MAX_BYTES = 1 << 20
DELAY_S = 1.0  # from the first change to the write
T = TypeVar("T")


class Memory:
    """Values by key, kept in a file.

    Args:
        path: the file; a missing one is an empty memory.
        readonly: keep nothing on disk.
        wake: called (in the caller's thread) when there is something to write and no write is planned yet; it should call
            `flush()` after `DELAY_S`. None: only an explicit `flush()` writes.

    `problem` says what was wrong with the file, in one sentence, else "".
    """

    def __init__(self, path: Path, *, readonly: bool = False, wake: Callable[[], None] | None = None) -> None:
        self.path, self.readonly, self.wake = path, readonly, wake
        self.problem = ""
        self._changed: dict[str, Any] = {}
        self._planned = False
        self._lock = threading.Lock()
        self._values = self._load()

    def get(self, key: str, default: T) -> T:
        """The value kept under `key`; `default` if there is none or it is of another type than `default`.

        With None as default, any value is given. A whole number is taken where a float is expected; the items of a list or a
        dict must be of the type of the default's first item, if it has one.
        """
        value: Any = self._values.get(key)
        if value is None or not _fits(value, default):
            return default
        shape = type(default) if isinstance(default, float | tuple) else None
        found: T = shape(value) if shape is not None else value
        return found

    def set(self, key: str, value: Any) -> None:
        """Keep a value (plain JSON; None forgets it). It reaches the disk soon, and at the end of the session.

        Raises:
            TypeError: the value is no JSON.
            ValueError: a number in it is not finite.
        """
        text = json.dumps(value, allow_nan=False)
        if key in self._values and json.dumps(self._values[key]) == text:
            return
        with self._lock:
            self._values[key] = self._changed[key] = json.loads(text)  # a copy: later changes of the caller's list are his
        if not self._planned and self.wake is not None:
            self._planned = True
            self.wake()

    def flush(self) -> None:
        """Write what has changed. Safe from any thread, and when there is nothing to do.

        Raises:
            OSError: the file could not be written; the values stay in memory.
        """
        with self._lock:
            self._planned = False
            if not self._changed or self.readonly:
                return
            values = _read(self.path)
            values = values if isinstance(values, dict) else {}
            values.update(self._changed)
            kept = {key: value for key, value in values.items() if value is not None}
            write_atomic(self.path, json.dumps(kept, indent=1, sort_keys=True) + "\n")
            self._changed.clear()

    def _load(self) -> dict[str, Any]:
        found = _read(self.path)
        if isinstance(found, dict):
            return found
        if found is None:
            return {}
        self.problem = f"{self.path}: {found}; starting without it"
        if not self.readonly:
            aside = self.path.with_name(f"{self.path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
            try:
                self.path.replace(aside)
                self.problem += f"; the old file is {aside.name}"
            except OSError as error:
                self.problem += f"; it could not be moved aside: {error.strerror or error}"
        return {}


def _read(path: Path) -> dict[str, Any] | str | None:
    """The object in a JSON file, None if there is no file, or what is wrong with it."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return f"larger than {MAX_BYTES >> 20} MiB"
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (ValueError, RecursionError) as error:
        return f"is no JSON: {error}"
    return values if isinstance(values, dict) else "does not hold an object"


def _fits(value: Any, default: Any) -> bool:
    """Whether `value` is of the same kind as `default`, in its items too."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and -1e308 < value < 1e308
    if isinstance(default, list | tuple):
        return isinstance(value, list) and all(_fits(item, default[0]) for item in value if default)
    if isinstance(default, dict):
        sample = next(iter(default.values()), None)
        return isinstance(value, dict) and all(_fits(item, sample) for item in value.values())
    return isinstance(value, type(default))
