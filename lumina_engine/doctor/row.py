"""What a check says: rows, their filter, their summary. Standard library only; the terminal uses it too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Status = Literal["ok", "warn", "fail", "skipped"]
STATUSES: tuple[Status, ...] = get_args(Status)

# every group with its title, in the order of lists
GROUPS: Mapping[str, str] = {
    "terminal": "Terminal",
    "ssh": "SSH and tmux",
    "python": "Python and packages",
    "devices": "Devices and driver",
    "deepspeed": "DeepSpeed",
    "memory": "Memory and limits",
    "disk": "Disk and run root",
    "clock": "Clock",
    "sockets": "Sockets",
    "supervision": "Supervision",
    "network": "Network between nodes",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report. `id` is the check's, with `.part` behind it where a check has several rows; `value` is what was
    measured, `fix` what to do (empty where there is nothing to do)."""

    id: str
    group: str
    status: Status
    value: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Row:
        """
        Raises:
            ValueError: a key is missing, no text, or the status is none.
        """
        texts = {name: content.get(name) for name in ("id", "group", "status", "value", "fix")}
        if not all(isinstance(text, str) for text in texts.values()) or texts["status"] not in STATUSES:
            raise ValueError(f"no row of a check: {dict(content)!r:.200}")
        return cls(**texts)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Result:
    """What a check function gives for one row; `part` tells several rows of one check apart."""

    status: Status
    value: str
    fix: str = ""
    part: str = ""


def ok(value: str, fix: str = "", part: str = "") -> Result:
    """As it should be; a `fix` here is advice that may be ignored."""
    return Result("ok", value, fix, part)


def warn(value: str, fix: str, part: str = "") -> Result:
    """Works, but something will be slow, lost or refused."""
    return Result("warn", value, fix, part)


def fail(value: str, fix: str, part: str = "") -> Result:
    """Lumina or a run will not work like this."""
    return Result("fail", value, fix, part)


def skipped(value: str, fix: str = "", part: str = "") -> Result:
    """Does not apply here, or cannot be known; `value` says why."""
    return Result("skipped", value, fix, part)


def matches(row: Row, words: str) -> bool:
    """Whether a row has all words of a filter: a status, `group:disk`, `status:fail`, or a part of any of its texts."""
    for word in words.lower().split():
        field, _, wanted = word.rpartition(":")
        if word in STATUSES:
            found = row.status == word
        elif field in ("id", "group", "status", "value", "fix"):
            found = wanted in str(getattr(row, field)).lower()
        else:
            found = any(word in text.lower() for text in (row.id, row.group, GROUPS.get(row.group, ""), row.value, row.fix))
        if not found:
            return False
    return True


def counts(rows: Iterable[Row]) -> dict[Status, int]:
    """How many rows have each status."""
    found: dict[Status, int] = dict.fromkeys(STATUSES, 0)
    for row in rows:
        found[row.status] += 1
    return found


def summary(rows: Iterable[Row]) -> str:
    """The counts in words."""
    found = counts(rows)
    warnings = f"{found['warn']} warning{'s' * (found['warn'] != 1)}"
    return f"{found['fail']} failed, {warnings}, {found['ok']} ok, {found['skipped']} skipped"
