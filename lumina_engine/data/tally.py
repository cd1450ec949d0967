"""What became of the records that were read: kept, changed, dropped, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .conversation import DataError, Place


@dataclass
class Tally:
    """What happened to the records: `read` = kept + sum of `dropped`. `changed` counts conversations that lost turns.

    Layouts of single messages (trees) count these too: messages read = `used` + sum of `left_out`. With `strict` nothing is
    dropped or changed: the first such record is an error. `rejects` is told each drop, `problems` each drop and change with
    what to do.
    """

    strict: bool = False
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    rejects: Callable[[DataError], None] | None = None
    problems: Callable[[DataError], None] | None = None

    @property
    def kept(self) -> int:
        """Conversations that came through."""
        return self.read - self.dropped.total()

    def drop(self, reason: str, place: Place, detail: str = "") -> None:
        """Count a conversation that is left out."""
        fix = "correct the record, or let `lumina-engine data convert` drop and count it"
        if self.strict:
            raise place.error(detail or reason, fix, reason)
        self.dropped[reason] += 1
        if self.problems:
            self.problems(place.error(detail or reason, fix, reason))
        if self.rejects:
            self.rejects(place.error(detail or reason, reason=reason))

    def malformed(self, error: DataError) -> None:
        """Count a record that could not be read as a conversation."""
        if self.strict:
            raise error
        self.read += 1
        self.dropped[error.reason] += 1
        if self.rejects:
            self.rejects(error)

    def change(self, reason: str, place: Place, detail: str) -> None:
        """Count a conversation that loses turns; `detail` says what is wrong with it."""
        fix = "correct the record, or let `lumina-engine data convert` cut and count it"
        if self.strict:
            raise place.error(detail, fix, reason)
        self.changed[reason] += 1
        if self.problems:
            self.problems(place.error(detail, fix, reason))

    def use(self, messages: int) -> None:
        """Count messages of a tree that a conversation holds."""
        self.used += messages

    def leave_out(self, reason: str, messages: int = 1) -> None:
        """Count messages of a tree that no conversation holds."""
        if messages:
            self.left_out[reason] += messages

    def lines(self) -> list[str]:
        """One line per kind of loss, for people."""
        total = self.used + self.left_out.total()
        lost = [f"{n:,} of {self.read:,} conversations dropped: {reason}" for reason, n in sorted(self.dropped.items())]
        lost += [f"{n:,} of {self.read:,} conversations changed: {reason}" for reason, n in sorted(self.changed.items())]
        return lost + [f"{n:,} of {total:,} messages left out: {reason}" for reason, n in sorted(self.left_out.items())]

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        self.read += other.read
        self.dropped.update(other.dropped)
        self.changed.update(other.changed)
        self.used += other.used
        self.left_out.update(other.left_out)

    def to_dict(self) -> dict[str, Any]:
        """The counts, for JSON; `Tally.from_dict` reads them back."""
        return {
            "read": self.read,
            "dropped": dict(self.dropped),
            "changed": dict(self.changed),
            "messages": {"used": self.used, "left_out": dict(self.left_out)},
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Tally:
        """The tally of counts that `to_dict` gave."""
        messages = saved.get("messages", {"used": 0, "left_out": {}})
        return cls(
            read=saved["read"],
            dropped=Counter(saved["dropped"]),
            changed=Counter(saved["changed"]),
            used=messages["used"],
            left_out=Counter(messages["left_out"]),
        )
