"""A table that paints itself: fixed columns, a cursor, and only changed rows are repainted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.style import Style
from textual.binding import BindingType
from textual.events import Click, MouseScrollDown, MouseScrollUp
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip

from ..actions import bindings
from ..paint import Align, Piece, clean, fit, fit_ends, line
from .acts import Finds
from .panel import Drawn

Cell = tuple[str, str]  # text (made safe when painted), role of the palette


@dataclass(frozen=True)
class Column:
    """`width` in cells; a column with `grow` takes what is left; low `rank` is dropped last when there is no room. What is too
    long loses its end, with `ends` its middle."""

    key: str
    title: str
    width: int
    align: Align = "left"
    grow: bool = False
    rank: int = 0
    ends: bool = False


@dataclass(frozen=True)
class Row:
    """`cells` in the order of the columns; with fewer cells than columns, the last one takes the rest of the line. A row with
    `rule` is a heading: one text over all columns, never chosen; with `note` too, it is a line about the row above it."""

    key: str
    cells: tuple[Cell, ...]
    rule: bool = False
    note: bool = False


class Table(Finds, Drawn):
    """Rows with a cursor. Posts `Moved` when the cursor is on another row and `Chosen` for Enter or a second click."""

    scope = "table"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("table"))

    class Moved(Message):
        """The cursor is on another row (None: there is none)."""

        def __init__(self, table: Table, key: str | None) -> None:
            super().__init__()
            self.table, self.key = table, key

        @property
        def control(self) -> Table:
            return self.table

    class Chosen(Message):
        """A row was opened."""

        def __init__(self, table: Table, key: str) -> None:
            super().__init__()
            self.table, self.key = table, key

        @property
        def control(self) -> Table:
            return self.table

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        title: str = "",
        id: str | None = None,
        classes: str | None = None,
        header: bool = True,
    ) -> None:
        super().__init__(title=title, id=id, classes=classes)
        self.columns = tuple(columns)
        self.rows: tuple[Row, ...] = ()
        self.header = header
        self._cursor = 0
        self._top = 0

    # content

    def set_rows(self, rows: Iterable[Row]) -> None:
        """Show these rows. The cursor stays on the row with the same key; only lines that differ are repainted."""
        before, rows = self.rows, tuple(rows)
        if rows == before:
            return
        key = self.cursor_key
        self.rows = rows
        where = next((i for i, row in enumerate(rows) if row.key == key and not row.rule), None)
        self._cursor = where if where is not None else self._selectable(min(self._cursor, len(rows) - 1), 1)
        moved = self._scroll_to_cursor()
        if moved or where is None or len(rows) != len(before):
            self.refresh()
        else:
            for index, (old, new) in enumerate(zip(before, rows, strict=True)):
                if old != new:
                    self._refresh_cells(index, old, new)
        if self.cursor_key != key:
            self.post_message(self.Moved(self, self.cursor_key))

    @property
    def cursor_key(self) -> str | None:
        """Key of the chosen row; None in an empty table."""
        if 0 <= self._cursor < len(self.rows) and not self.rows[self._cursor].rule:
            return self.rows[self._cursor].key
        return None

    @property
    def visible_keys(self) -> list[str]:
        """Keys of the rows that are on the screen, headings left out."""
        return [row.key for row in self.rows[self._top : self._top + self.page] if not row.rule]

    def move_to(self, key: str) -> None:
        """Put the cursor on the row with this key, if there is one."""
        for index, row in enumerate(self.rows):
            if row.key == key and not row.rule:
                self._go(index, 1)

    # searching

    def find_lines(self) -> Sequence[str]:
        return ["" if row.rule else " ".join(text for text, _ in row.cells) for row in self.rows]

    def find_at(self) -> int:
        return self._cursor

    def find_show(self, index: int) -> None:
        self._go(index, 1)

    # cursor

    def _selectable(self, index: int, direction: int) -> int:
        count = len(self.rows)
        index = max(0, min(index, count - 1))
        for step in (direction, -direction):
            at = index
            while 0 <= at < count:
                if not self.rows[at].rule:
                    return at
                at += step
        return index

    def _go(self, index: int, direction: int) -> None:
        index = self._selectable(index, direction)
        if index == self._cursor:
            return
        before, self._cursor = self._cursor, index
        if self._scroll_to_cursor():
            self.refresh()
        else:
            self._refresh_row(before)
            self._refresh_row(index)
        self.post_message(self.Moved(self, self.cursor_key))

    @property
    def page(self) -> int:
        """Rows that fit."""
        return max(1, self.inner[1] - self.header)

    def _scroll_to_cursor(self) -> bool:
        before, page = self._top, self.page
        if self._cursor < self._top:
            self._top = self._cursor
        elif self._cursor >= self._top + page:
            self._top = self._cursor - page + 1
        self._top = max(0, min(self._top, len(self.rows) - page))
        self._show_position()
        return self._top != before

    def _show_position(self) -> None:
        hidden = len(self.rows) > self.page
        self.set_foot(self._foot_left, f"{self._cursor + 1} of {len(self.rows)}" if hidden else "")

    def _refresh_row(self, index: int) -> None:
        y = index - self._top
        if 0 <= y < self.page:
            self.refresh_lines_inside(y + self.header)

    def _refresh_cells(self, index: int, old: Row, new: Row) -> None:
        """Repaint what differs between two versions of a row."""
        if old.rule or new.rule or min(len(old.cells), len(new.cells)) < len(self.columns):
            self._refresh_row(index)
            return
        y, left = index - self._top, 1 + self.framed
        if not 0 <= y < self.page:
            return
        changed: list[tuple[int, int]] = []
        for i, _, cells in self.layout_columns(self.inner[0]):
            if old.cells[i] != new.cells[i]:
                changed.append((left, left + cells))
            left += cells + 2
        if changed:  # one region: Textual sends each one from the line's beginning
            start, stop = changed[0][0], changed[-1][1]
            self.refresh(Region(start, y + self.header + self.framed, stop - start, 1))

    def on_resize(self) -> None:
        if self._scroll_to_cursor():
            self.refresh()

    def action_down(self) -> None:
        self._go(self._cursor + 1, 1)

    def action_up(self) -> None:
        self._go(self._cursor - 1, -1)

    def action_top(self) -> None:
        self._go(0, 1)

    def action_bottom(self) -> None:
        self._go(len(self.rows) - 1, -1)

    def action_page_down(self) -> None:
        self._go(self._cursor + self.page, 1)

    def action_page_up(self) -> None:
        self._go(self._cursor - self.page, -1)

    def action_choose(self) -> None:
        key = self.cursor_key
        if key is not None:
            self.post_message(self.Chosen(self, key))

    def on_click(self, event: Click) -> None:
        index = event.y - int(self.framed) - self.header + self._top
        if 0 <= index < len(self.rows) and not self.rows[index].rule:
            if index == self._cursor:
                self.action_choose()
            else:
                self._go(index, 1)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        event.stop()
        self._go(self._cursor + 3, 1)

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        event.stop()
        self._go(self._cursor - 3, -1)

    # painting

    def layout_columns(self, width: int) -> list[tuple[int, Column, int]]:
        """(index, column, width) of the columns that fit into `width` cells, two spaces apart."""
        shown = sorted(range(len(self.columns)), key=lambda i: self.columns[i].rank)
        while len(shown) > 1 and sum(self.columns[i].width for i in shown) + 2 * (len(shown) - 1) + 2 > width:
            shown.pop()
        room = width - 2 - sum(self.columns[i].width for i in shown) - 2 * (len(shown) - 1)
        growing = [i for i in shown if self.columns[i].grow]
        return [
            (i, self.columns[i], self.columns[i].width + (max(0, room) // len(growing) if i in growing else 0))
            for i in sorted(shown)
        ]

    def _inside(self, y: int, width: int, height: int) -> Strip:
        if self._blocking:
            return self._message_line(y, width, height)
        index = y - self.header + self._top
        chosen = y >= self.header and index == self._cursor and self.cursor_key is not None
        strip = line(width, self.draw(y, width, height))
        if chosen:
            strip = strip.apply_style(self.palette.cursor if self.has_focus else self._faded_cursor)
        return strip.apply_style(self.rich_style)

    @property
    def _faded_cursor(self) -> Style:
        return Style(bold=True)

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        columns = self.layout_columns(width)
        if self.header and y == 0:
            pieces: list[Piece] = [(" ", None)]
            for at, (_, column, cells) in enumerate(columns):
                pieces.append(("  " * (at > 0) + fit(column.title, cells, column.align), self.palette.dim))
            return pieces
        index = y - self.header + self._top
        if index >= len(self.rows):
            return ()
        row = self.rows[index]
        mark = ">" if index == self._cursor and not row.rule else " "
        if row.note:
            text, role = row.cells[0]
            return [("   ", None), (fit(clean(text), max(0, width - 4)), self.palette.of(role))]
        if row.rule:
            text = clean(row.cells[0][0])
            return [
                (" ", None),
                (fit(f"{text} {self.look.box[4] * width}", max(0, width - 2), ellipsis=""), self.palette.faint),
            ]
        pieces = [(mark, self.palette.accent)]
        used = 1
        for at, (i, column, cells) in enumerate(columns):
            last = i == len(row.cells) - 1 and i < len(self.columns) - 1
            text, role = row.cells[i] if i < len(row.cells) else ("", "text")
            room = width - used - 2 * (at > 0) - 1 if last else cells
            pieces.append(("  " * (at > 0) + _cell(clean(text), room, column), self.palette.of(role)))
            used += 2 * (at > 0) + room
            if last:
                break
        return pieces


def _cell(text: str, width: int, column: Column) -> str:
    return fit_ends(text, width) if column.ends else fit(text, width, column.align)
