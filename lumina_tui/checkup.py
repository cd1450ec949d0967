"""The machine check as the Doctor screen shows it: rows as they come, what is still running, order, filter. No widget."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina_engine.doctor.row import GROUPS, Row, counts, matches, summary

from .widgets.table import Column
from .widgets.table import Row as TableRow
from .widgets.text_panel import Line

OLD_S = 3600.0  # results older than this are dim
ENGINE = "engine"  # id of the row that says why the engine could not check
COLUMNS = (
    Column("status", "", 7),
    Column("id", "check", 20),
    Column("value", "found", 20, grow=True),
)
ROLES = {"ok": "good", "warn": "warn", "fail": "bad", "skipped": "dim"}


@dataclass(frozen=True)
class Planned:
    """A check that the engine has announced."""

    id: str
    group: str
    slow: bool
    about: str


@dataclass(frozen=True)
class Found:
    """A row and when it was found (unix seconds)."""

    row: Row
    t: float


class Checkup:
    """One check of the machine after the other. Rows of the terminal itself are given, those of the engine come as lines."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.found: dict[str, Found] = {}
        self.planned: dict[str, Planned] = {}
        self.skipped: set[str] = set()
        self.words = ""  # the filter
        self.running = False
        self.engine_words: list[str] = []  # what the engine said when it failed
        self.began = 0.0
        self._width = 70  # cells of a line about a row

    # what comes

    def begin(self, local: Iterable[Row]) -> None:
        """A new check, with the rows of this terminal."""
        self.found, self.planned, self.engine_words, self.skipped = {}, {}, [], set()
        self.running, self.began = True, self._clock()
        for row in local:
            self.add(row)

    def add(self, row: Row) -> None:
        """A row of this terminal; it replaces the one of the same id."""
        self.found[row.id] = Found(row, self._clock())

    def take(self, line: Mapping[str, Any]) -> None:
        """A line of progress of `lumina-engine doctor`. What is known already is not replaced: a second run after a skipped
        check names it as skipped."""
        if line.get("progress") == "checks" and isinstance(line.get("checks"), list):
            for entry in line["checks"]:
                if isinstance(entry, Mapping) and isinstance(entry.get("id"), str):
                    about, group = str(entry.get("about") or ""), str(entry.get("group") or "")
                    self.planned[entry["id"]] = Planned(entry["id"], group, bool(entry.get("slow")), about)
        elif line.get("progress") == "row" and isinstance(line.get("row"), Mapping):
            try:
                row = Row.from_dict(line["row"])
            except ValueError as error:
                self.engine_words.append(str(error))
                return
            self.found.setdefault(row.id, Found(row, self._clock()))

    def end(self, error: str = "", words: Sequence[str] = ()) -> None:
        """The engine has ended; with `error`, without having checked everything."""
        self.running = False
        if error:
            self.engine_words += words
            fix = "only this terminal was checked; Enter shows all that the engine said, r tries again"
            self.add(Row(ENGINE, "python", "fail", error, fix))

    def skip(self, id: str) -> None:
        """Do without a check: its row says so, and `arguments` leaves it out."""
        self.skipped.add(id)
        group = self.planned[id].group if id in self.planned else "python"
        self.add(Row(id, group, "skipped", "skipped by you; r runs it again"))

    def arguments(self, runs: Path) -> list[str]:
        """What is to be run: the checks that have no row yet."""
        done = sorted(check for check in self.planned if check not in {planned.id for planned in self.pending})
        return ["doctor", f"--runs={runs}", *([f"--skip={','.join(done)}"] if done else [])]

    # what is known

    @property
    def pending(self) -> list[Planned]:
        """Checks that were announced and have no row yet."""
        heads = {id.partition(".")[0] for id in self.found}
        return [planned for id, planned in self.planned.items() if id not in heads] if self.running else []

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of their groups."""
        order = list(GROUPS)
        return sorted(
            (item.row for item in self.found.values()), key=lambda row: order.index(row.group) if row.group in order else 99
        )

    @property
    def shown(self) -> list[Row]:
        """The rows that the filter lets through."""
        return [row for row in self.rows if matches(row, self.words)]

    @property
    def problems(self) -> int:
        """How many checks failed."""
        return counts(self.rows)["fail"]

    @property
    def old_at(self) -> float | None:
        """When the next row becomes old (unix seconds); None if none will."""
        times = [item.t + OLD_S for item in self.found.values() if item.t + OLD_S > self._clock()]
        return min(times, default=None)

    def title(self) -> tuple[str, str]:
        """The counts, and what is running or when the check ended."""
        if self.running:
            waiting = [planned.id for planned in self.pending]
            slow = [planned.id for planned in self.pending if planned.slow]
            right = f"running {', '.join((slow or waiting)[:3])}" if waiting else "running"
        else:
            right = f"checked {time.strftime('%H:%M', time.localtime(self.began))}"
        left = summary(self.rows)
        return (f"{len(self.shown)} shown of: {left}" if self.words else left), (
            f"/{self.words}  {right}" if self.words else right
        )

    def detail(self, id: str) -> list[Line]:
        """Everything about one row, wrapped by whoever shows it."""
        found, planned = self.found.get(id), self.planned.get(id.partition(".")[0])
        lines: list[Line] = []
        if found is not None:
            row = found.row
            lines.append(((f"{row.status}  ", ROLES[row.status]), (row.value, "text")))
            if row.fix:
                lines += [(("", "text"),), (("What to do: ", "title"), (row.fix, "text"))]
            lines += [(("", "text"),), ((f"checked at {time.strftime('%H:%M:%S', time.localtime(found.t))}", "dim"),)]
        else:
            lines.append((("still running; X does without it", "dim"),))
        if planned is not None and planned.about:
            lines += [(("", "text"),), ((planned.about, "dim"),)]
        if id == ENGINE:
            lines += [
                (("", "text"),),
                (("What the engine said:", "title"),),
                *(((word, "text"),) for word in self.engine_words),
            ]
        return lines

    # as table rows

    def columns(self, count: int, width: int) -> list[list[TableRow]]:
        """Rows for `count` tables of `width` cells inside: with one, problems first and the rest by groups; with more, whole
        groups side by side."""
        self._width = max(20, width - 8)
        return [self._problems_first()] if count == 1 else self._side_by_side(count)

    def _problems_first(self) -> list[TableRow]:
        shown = self.shown
        problems = [row for status in ("fail", "warn") for row in shown if row.status == status]
        rows: list[TableRow] = [line for row in problems for line in self._lines(row)]
        for group, members in self._groups([row for row in shown if row.status not in ("fail", "warn")]):
            rows += [_heading(group), *members]
        return rows

    def _groups(self, rows: Iterable[Row]) -> list[tuple[str, list[TableRow]]]:
        groups: dict[str, list[TableRow]] = {group: [] for group in GROUPS}
        for row in rows:
            groups.setdefault(row.group, []).extend(self._lines(row))
        if not self.words:
            for planned in self.pending:
                cells = (
                    ("…", "accent"),
                    (planned.id, "text"),
                    ("running" + (", may take a while" if planned.slow else ""), "dim"),
                )
                groups.setdefault(planned.group, []).append(TableRow(planned.id, cells))
        return [(group, members) for group, members in groups.items() if members]

    def _side_by_side(self, count: int) -> list[list[TableRow]]:
        order = {"fail": 0, "warn": 1, "ok": 2, "skipped": 3}
        groups = self._groups(sorted(self.shown, key=lambda row: order[row.status]))
        columns: list[list[TableRow]] = [[] for _ in range(count)]
        room = sum(len(members) + 1 for _, members in groups) / count
        at = 0
        for group, members in groups:
            if columns[at] and len(columns[at]) + len(members) / 2 > room and at < count - 1:
                at += 1
            columns[at] += [_heading(group), *members]
        return columns

    def _lines(self, row: Row) -> list[TableRow]:
        """A row, and its fix on a line of its own if there is something to do."""
        old = self._clock() - self.found[row.id].t >= OLD_S
        role = "dim" if old or row.status == "skipped" else "text"
        cells = ((row.status, "dim" if old else ROLES[row.status]), (row.id, role), (row.value, role))
        lines = [TableRow(row.id, cells)]
        if row.fix and row.status in ("warn", "fail"):
            for number, text in enumerate(textwrap.wrap(row.fix, self._width)):
                cell = (f"{'   ' if number else '-> '}{text}", "dim" if old else "accent")
                lines.append(TableRow(f"{row.id} fix {number}", (cell,), rule=True, note=True))
        return lines


def _heading(group: str) -> TableRow:
    return TableRow(f"group {group}", ((GROUPS.get(group, group), "dim"),), rule=True)
