"""How the fields of a section are laid out: lines of fields with their words below them, flowing into columns. No Textual."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding

from .form import INFOS, Form
from .paint import clean

SEVERITY_MARKS = {"error": ("!", "bad"), "warning": ("?", "warn"), "info": ("i", "dim")}
ORIGIN_WORDS = {"default": "default", "preset": "preset", "file": "file", "cli": "command", "you": "you"}
ORIGIN_CELLS = 7
VALUE_CELLS = 14  # least cells of the value column
TWO_COLUMNS = 112  # cells inside the frame from which the fields stand in two columns


@dataclass(frozen=True)
class FieldLine:
    """The field's own line (`text` empty), or a line of words below it."""

    name: str
    text: str = ""
    role: str = "text"


def field_lines(form: Form, names: Iterable[str], problems: Mapping[str, Finding], width: int) -> list[FieldLine]:
    """The lines of some fields in a column of `width` cells: what is wrong with a field or changed in it stands below it."""
    out: list[FieldLine] = []
    for name in names:
        out.append(FieldLine(name))
        text, role = words_below(form, name, problems.get(name))
        out += [FieldLine(name, part, role) for part in textwrap.wrap(text, max(10, width - 6))[:2]]
    return out


def words_below(form: Form, name: str, problem: Finding | None) -> tuple[str, str]:
    """What stands under a field, and its role: its problem, else what it was changed from; nothing where it is as it was."""
    if problem is not None:
        said = clean(problem.line()).removeprefix(f"{name} = ")
        return f"{problem.severity}: {said}", SEVERITY_MARKS[problem.severity][1]
    if form.changed(name):
        base = f"preset {form.preset} has" if form.preset else "the default is"
        return f"changed: {base} {clean(show(form.reference(name)))}", "dim"
    return "", "text"


@dataclass(frozen=True)
class Columns:
    """Lines in one or two columns of `width` cells and `rows` lines, beginning with line `top`."""

    count: int
    width: int
    rows: int
    top: int = 0

    @property
    def page(self) -> int:
        """Lines that can be seen."""
        return self.count * self.rows

    def place(self, index: int) -> tuple[int, int] | None:
        """(column, row) of a line; None where it is out of sight."""
        at = index - self.top
        return divmod(at, self.rows) if 0 <= at < self.page else None

    def index(self, column: int, row: int) -> int:
        """The line at a place."""
        return self.top + column * self.rows + row


def columns(lines: Sequence[FieldLine], width: int, height: int, top: int = 0) -> Columns:
    """Two columns where there is room, balanced and never cut between a field and its words while all lines fit."""
    rows = max(1, height)
    if width < TWO_COLUMNS:
        return Columns(1, max(0, width), rows, top)
    if len(lines) <= 2 * rows:
        half = -(-len(lines) // 2)
        while half < min(rows, len(lines)) and lines[half].text:
            half += 1
        rows = max(1, half)
    return Columns(2, (width - 1) // 2, rows, top)


def cells(names: Sequence[str], width: int) -> tuple[int, int, int]:
    """Cells of name, value and unit in a column."""
    name = min(max((len(n) for n in names), default=10), max(12, width - VALUE_CELLS - ORIGIN_CELLS - 7))
    rest = width - 3 - name - ORIGIN_CELLS - 6
    unit = max((len(INFOS[n].unit) for n in names), default=0)
    if unit > rest - VALUE_CELLS:  # then the line of help has it
        unit = 0
    return name, max(4, min(rest - unit, 40)), unit
