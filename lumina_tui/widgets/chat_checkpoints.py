"""The committed checkpoints one can talk to, best first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints import Choice
from ..paint import number, size, whole
from .panel import State
from .table import Column, Row, Table

COLUMNS = (
    Column("run", "run", 12, grow=True),
    Column("step", "step", 7, "right"),
    Column("kind", "", 16, rank=1),
    Column("loss", "loss", 14, "right", rank=2),
    Column("size", "weights", 8, "right", rank=4),
    Column("fits", "fits (needs)", 12, rank=3),
)


class CheckpointTable(Table):
    """Rows of `checkpoints.list_choices`; the key of a row is the checkpoint's path."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(COLUMNS, title="checkpoints, of each run its best first", id=id)
        self.choices: tuple[Choice, ...] = ()

    def searching(self, root: Path) -> None:
        """Say that they are being looked for, unless some are shown already."""
        if not self.choices:
            self.set_state(State.LOADING, f"looking for checkpoints in {root}")

    def show(self, choices: Sequence[Choice], root: Path) -> None:
        """Show what was found, or what fills the list."""
        self.choices = tuple(choices)
        if choices:
            self.set_state(State.LIVE)
            room = choices[0].room
            self.set_foot(
                f"on {room.device}, {size(room.free)} free" if room.device == "cpu" else f"{room.device}, {size(room.free)}"
            )
        else:
            self.set_state(State.EMPTY, f"No committed checkpoint in {root}. 1 shows the runs, 2 starts one.")
        self.set_rows(_row(choice) for choice in choices)

    def chosen(self, key: str) -> Choice | None:
        """The checkpoint of a row."""
        return next((choice for choice in self.choices if str(choice.entry.path) == key), None)


def _row(choice: Choice) -> Row:
    entry, fits = choice.entry, choice.fits
    kinds = {"best": entry.best, "latest": entry.latest, "suspect": entry.suspect, "emergency": entry.emergency}
    kind = " ".join(word for word, given in kinds.items() if given)
    loss = f"{entry.loss_name} {number(entry.loss)}" if entry.loss is not None else "-"
    role = "bad" if entry.problem else "text"
    needs = "-" if choice.needed is None else f"{fits} {size(choice.needed)}"
    cells = (
        (entry.run, role),
        (whole(entry.step), role),
        ("unreadable" if entry.problem else kind, "warn" if entry.suspect or entry.problem else "good"),
        (loss, "text"),
        (size(entry.weights_bytes), "dim"),
        (needs, {"no": "bad", "tight": "warn", "yes": "good"}.get(fits, "dim")),
    )
    return Row(str(entry.path), cells)
