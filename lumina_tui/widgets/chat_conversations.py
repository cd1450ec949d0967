"""The saved conversations, last changed first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..conversations import Summary
from ..paint import age, whole
from .panel import State
from .table import Column, Row, Table

COLUMNS = (
    Column("first", "first words", 18, grow=True),
    Column("age", "age", 5, "right", rank=1),
    Column("messages", "msgs", 4, "right", rank=2),
    Column("step", "step", 9, "right", rank=3),
    Column("name", "name", 22, rank=4),
)


class ConversationTable(Table):
    """Rows of `Conversations.list`; the key of a row is the file's path."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(COLUMNS, title="conversations", id=id)
        self.found: tuple[Summary, ...] = ()

    def show(self, found: Sequence[Summary], current: Path | None) -> None:
        """Show what was found; `current` is the one that is open."""
        self.found = tuple(found)
        now = time.time()
        if found:
            self.set_state(State.LIVE)
            self.set_foot("R rename  D delete")
        else:
            self.set_state(State.EMPTY, "No conversation was saved in chats/ yet. i writes a message: each turn is saved.")
            self.set_foot("")
        self.set_rows(_row(summary, now, current) for summary in found)

    def summary(self, key: str | None) -> Summary | None:
        """The conversation of a row."""
        return next((summary for summary in self.found if str(summary.path) == key), None)


def _row(summary: Summary, now: float, current: Path | None) -> Row:
    here = current is not None and summary.path.name == current.name
    role = "bad" if summary.problem else "title" if here else "text"
    cells = (
        (("* " if here else "") + (summary.problem or summary.first or "nothing was said"), role),
        (age(now - summary.modified), "dim"),
        (whole(summary.messages) if not summary.problem else "-", "dim"),
        (whole(summary.step) + (" +1" if summary.split else ""), "dim"),
        (summary.name, "dim"),
    )
    return Row(str(summary.path), cells)
