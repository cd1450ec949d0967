"""Parts of Compare: its chart, the list to choose runs from, results and differences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from textual.message import Message

from lumina_engine.run.directory import RunInfo, list_runs

from ..paint import age, clean, count, whole
from .bars import STATE_ROLES
from .line_chart import Cursor, LineChart
from .panel import State
from .picture import MOST_RUNS
from .table import Column, Row, Table
from .text_panel import Line, TextPanel

EMPTY = "Mark runs in Home with Space, then =\n\nOr choose here: Space marks, Enter compares."
CHOICES = (
    Column("mark", "", 1),
    Column("name", "name", 20, grow=True),
    Column("state", "state", 10),
    Column("step", "step", 9, "right", rank=1),
    Column("loss", "loss", 7, "right", rank=2),
    Column("age", "age", 5, "right", rank=3),
)


class CompareChart(LineChart):
    """A chart of several runs. `extra` gives what stands beside it, for a text export."""

    scope = "chart"
    memory_scope = "compare"

    def __init__(self, metric: str, *, cursor: Cursor, id: str | None = None) -> None:
        super().__init__(metric=metric, cursor=cursor, id=id)
        self.extra: Callable[[], Sequence[str]] = tuple

    def extra_text(self) -> Sequence[str]:
        return self.extra()


class SidePanel(TextPanel):
    """Results and differing keys; scrolled with the keys of every text."""

    @property
    def room(self) -> int:
        """Cells for a line."""
        return self.inner[0] - 2 if self.inner[0] > 10 else 76

    def show(self, lines: Sequence[Line]) -> None:
        self.set_lines(lines)


class RunChooser(Table):
    """The runs below the root; Space marks, Enter compares the marked ones (and the chosen one, if it is the second)."""

    class Confirmed(Message):
        """These runs are to be compared."""

        def __init__(self, paths: Sequence[Path]) -> None:
            super().__init__()
            self.paths = paths

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(CHOICES, title="choose runs: Space marks, Enter compares", id=id)
        self.infos: list[RunInfo] = []
        self.marked: list[str] = []

    async def offer(self, root: Path, marked: Sequence[str]) -> None:
        """List the runs below `root`; those whose paths are in `marked` are marked."""
        self.set_state(State.LOADING, f"reading {clean(root)} …")
        try:
            self.infos = await asyncio.to_thread(list_runs, root)
        except OSError as error:
            self.set_state(State.ERROR, f"{root}: {error.strerror or error}\nr reads it again")
            return
        self.marked = [info.name for info in self.infos if str(info.path.absolute()) in marked][:MOST_RUNS]
        self._fill()
        if len(self.infos) < 2:
            count_text = f"{len(self.infos)} run{'s' * (len(self.infos) != 1)} in {clean(root)}."
            self.set_state(State.EMPTY, f"{count_text}\n\n{EMPTY}")

    def _fill(self) -> None:
        self.set_state(State.LIVE)
        self.set_rows([Row(info.name, self._row(info)) for info in self.infos])
        self.set_foot(f"{len(self.marked)} marked")

    def _row(self, info: RunInfo) -> tuple[tuple[str, str], ...]:
        loss = "-" if info.loss is None else f"{info.loss:.3f}" if abs(info.loss) < 1000 else count(info.loss)
        return (
            ("*" if info.name in self.marked else " ", "accent"),
            (info.name if info.state != "unreadable" else f"{info.name}: {info.reason or ''}", "text"),
            (info.state, STATE_ROLES.get(info.state, "dim")),
            (whole(info.step), "text"),
            (loss, "text"),
            (age(info.age_s), "dim"),
        )

    def why_not_mark(self) -> str | None:
        """Why the run under the cursor cannot be marked."""
        if self.cursor_key is None:
            return "no run is chosen"
        if len(self.marked) >= MOST_RUNS and self.cursor_key not in self.marked:
            return f"{MOST_RUNS} runs can be compared; Space takes a mark back"
        return None

    def mark(self) -> None:
        """Mark the run under the cursor, or take its mark back."""
        key = self.cursor_key
        if key is None:
            return
        if key in self.marked:
            self.marked.remove(key)
        else:
            self.marked.append(key)
        self._fill()

    def action_choose(self) -> None:
        names = list(self.marked)
        if len(names) < 2 and self.cursor_key is not None and self.cursor_key not in names:
            names.append(self.cursor_key)
        if len(names) < 2:
            self.lumina.notice("two runs make a comparison: Space marks, Enter compares", "warning")
            return
        by_name = {info.name: info.path for info in self.infos}
        self.post_message(self.Confirmed([by_name[name] for name in names]))
