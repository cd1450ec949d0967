"""The committed checkpoints one can talk to, best first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lumina_engine.chat.catalogue import Entry

from ..paint import number, size, whole
from .panel import State
from .table import Column, Row, Table

COLUMNS = (
    Column("run", "run", 14, grow=True),
    Column("step", "step", 9, "right"),
    Column("kind", "", 11, rank=1),
    Column("loss", "loss", 16, "right", rank=2),
    Column("size", "weights", 9, "right", rank=3),
)


class CheckpointTable(Table):
    """Rows of `chat.catalogue.list_entries`; the key of a row is the checkpoint's path."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(COLUMNS, title="checkpoints, best first", id=id)
        self.entries: tuple[Entry, ...] = ()

    def searching(self, root: Path) -> None:
        """Say that they are being looked for, unless some are shown already."""
        if not self.entries:
            self.set_state(State.LOADING, f"looking for checkpoints in {root}")

    def show(self, entries: Sequence[Entry], root: Path) -> None:
        """Show what was found, or what fills the list."""
        self.entries = tuple(entries)
        if entries:
            self.set_state(State.LIVE)
        else:
            self.set_state(State.EMPTY, f"No committed checkpoint in {root}. 1 shows the runs, 2 starts one.")
        self.set_rows(_row(entry) for entry in entries)

    def chosen(self, key: str) -> Entry | None:
        """The entry of a row."""
        return next((entry for entry in self.entries if str(entry.path) == key), None)


def _row(entry: Entry) -> Row:
    kind = " ".join(
        word for word, given in (("best", entry.best), ("latest", entry.latest), ("suspect", entry.suspect)) if given
    )
    loss = f"{entry.loss_name} {number(entry.loss)}" if entry.loss is not None else "-"
    role = "bad" if entry.problem else "text"
    cells = (
        (entry.run, role),
        (whole(entry.step), role),
        ("unreadable" if entry.problem else kind, "warn" if entry.suspect or entry.problem else "good"),
        (loss, "text"),
        (size(entry.weights_bytes), "dim"),
    )
    return Row(str(entry.path), cells)
