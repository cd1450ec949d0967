"""The fields of one section in one or two columns; one field can be edited in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.events import Click, MouseScrollDown, MouseScrollUp
from textual.message import Message
from textual.strip import Strip
from textual.widgets import Input

from lumina_engine.config.finding import Finding

from ..actions import bindings
from ..field_lines import ORIGIN_CELLS, ORIGIN_WORDS, SEVERITY_MARKS, Columns, FieldLine, cells, columns, field_lines
from ..form import INFOS, Form, field_text
from ..paint import Piece, clean, fit, line
from .acts import Acts, Finds
from .panel import Drawn
from .text_panel import Line


class ValueInput(Acts, Input):
    """The field that is being edited."""

    scope = "field"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("field"))

    def action_take(self) -> None:
        self.post_message(self.Submitted(self, self.value))

    def action_cancel(self) -> None:
        self.post_message(FieldList.Left(self))


class FieldList(Finds, Drawn):
    """One line per field of the shown section, a second one where something is wrong with it."""

    DEFAULT_CSS = """
    FieldList > ValueInput { display: none; height: 1; background: $bar; border: none; padding: 0; }
    FieldList.-editing > ValueInput { display: block; }
    """
    scope = "fields"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("fields"))

    class Moved(Message):
        """The cursor is on another field."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    class Typed(Message):
        """The text in the edited field changed."""

        def __init__(self, name: str, text: str) -> None:
            super().__init__()
            self.name, self.text = name, text

    class Entered(Message):
        """A text was entered."""

        def __init__(self, name: str, text: str) -> None:
            super().__init__()
            self.name, self.text = name, text

    class Cycled(Message):
        """The next (1) or previous (-1) choice is wanted; 0 asks for all of them."""

        def __init__(self, name: str, step: int) -> None:
            super().__init__()
            self.name, self.step = name, step

    class Wanted(Message):
        """A field, perhaps of another section, is to be gone to."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    class Left(Message):
        """The edited field was left without a change."""

        def __init__(self, field: ValueInput) -> None:
            super().__init__()
            self.field = field

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.form: Form | None = None
        self.names: list[str] = []
        self.problems: Mapping[str, Finding] = {}
        self.editing: str | None = None
        self.locked = ""  # why no field can be changed now
        self._lines: list[FieldLine] = []
        self._cursor = 0
        self._top = 0

    def compose(self) -> ComposeResult:
        yield ValueInput(compact=True, select_on_focus=True)

    # content

    def show(self, form: Form, section: str, problems: Mapping[str, Finding], title: str, note: str = "") -> None:
        """Show a section of a form; `problems` has the worst finding of each field, `note` stands in the frame."""
        names = [info.name for info in INFOS.values() if info.section == section]
        if names != self.names:
            self.leave()
            self.names, self._cursor, self._top = names, 0, 0
        self.form, self.problems = form, problems
        self.set_title(title, note)
        self._lay_out()
        self.refresh()

    def set_problem(self, name: str, problem: Finding | None) -> None:
        """Show what is wrong with one field, or nothing, before the rules have been checked."""
        if self.problems.get(name) != problem:
            self.problems = {n: p for n, p in {**self.problems, name: problem}.items() if p is not None}
            self._lay_out()
            self.refresh()

    @property
    def current(self) -> str | None:
        """The field under the cursor."""
        return self.names[self._cursor] if self.names else None

    def explain(self) -> list[Line]:
        """What the field under the cursor is for, with its problem: help begins with it."""
        from .. import config_text as say

        name = self.current
        if name is None or self.form is None:
            return []
        problem = self.problems.get(name)
        lines = [((name, "title"),), *say.help_lines(name, 0), ((say.help_foot(self.form, name), "dim"),)]
        return [*lines, ((problem.line(), "bad"),)] if problem else lines

    def go_to(self, name: str) -> None:
        """Put the cursor on a field of this section."""
        if name in self.names:
            self._go(self.names.index(name))

    def edit(self) -> None:
        """Open the field under the cursor for typing."""
        if self.form is None or self.current is None:
            return
        field = self.query_one(ValueInput)
        self.editing = self.current
        with field.prevent(Input.Changed):
            field.value = self.form.edit_text(self.current)
        self.add_class("-editing")
        self._place()
        field.focus()
        self.refresh()

    def leave(self) -> None:
        """Close the edited field."""
        if self.editing is not None:
            self.editing = None
            self.remove_class("-editing")
            self.focus()
            self.refresh()

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        if self.editing is not None:
            self.post_message(self.Typed(self.editing, event.value))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if self.editing is not None:
            name = self.editing
            self.leave()
            self.post_message(self.Entered(name, event.value))

    # lines

    @property
    def columns(self) -> Columns:
        """Where the lines stand."""
        return columns(self._lines, *self.inner, self._top)

    def _lay_out(self) -> None:
        """Make the lines anew, and keep the cursor in sight."""
        if self.form is not None:
            width = columns(self._lines, *self.inner).width
            self._lines = field_lines(self.form, self.names, self.problems, width)
        self._keep_in_sight()

    def _line_of(self, name: str) -> int:
        return self._lines.index(FieldLine(name))

    def _place(self) -> None:
        """Lay the input over the value of its field."""
        if self.editing is None:
            return
        where = self.columns
        name, value, _ = cells(self.names, where.width)
        column, row = where.place(self._line_of(self.editing)) or (0, 0)
        field = self.query_one(ValueInput)
        field.styles.offset = (column * (where.width + 1) + 4 + name + 1, row + 1)
        field.styles.width = value + 1

    def _keep_in_sight(self) -> None:
        if not self._lines:
            return
        name, page = self.names[self._cursor], self.columns.page
        at = self._line_of(name)
        need = max(i for i, item in enumerate(self._lines) if item.name == name)
        if at < self._top:
            self._top = at
        elif need >= self._top + page:
            self._top = need - page + 1
        self._top = max(0, min(self._top, len(self._lines) - page))
        hidden = len(self._lines) > page
        self.set_foot("", f"{self._cursor + 1} of {len(self.names)}" if hidden else "")
        self._place()

    def on_resize(self) -> None:
        self._lay_out()

    # cursor

    def _go(self, index: int) -> None:
        index = max(0, min(index, len(self.names) - 1))
        if not self.names or index == self._cursor:
            return
        self.leave()
        before, top = self._cursor, self._top
        self._cursor = index
        self._keep_in_sight()
        if self._top != top:
            self.refresh()
        else:
            for changed in (before, index):
                place = self.columns.place(self._line_of(self.names[changed]))
                if place is not None:
                    self.refresh_lines_inside(place[1])
        self.post_message(self.Moved(self.names[index]))

    def action_down(self) -> None:
        self._go(self._cursor + 1)

    def action_up(self) -> None:
        self._go(self._cursor - 1)

    def action_top(self) -> None:
        self._go(0)

    def action_bottom(self) -> None:
        self._go(len(self.names) - 1)

    def action_page_down(self) -> None:
        self._go(self._cursor + max(1, self.inner[1] - 1))

    def action_page_up(self) -> None:
        self._go(self._cursor - max(1, self.inner[1] - 1))

    def action_edit(self) -> None:
        if self.current is None:
            return
        if INFOS[self.current].kind in ("bool", "choice"):
            self.post_message(self.Cycled(self.current, 0))
        else:
            self.edit()

    def action_more(self) -> None:
        if self.current is not None:
            self.post_message(self.Cycled(self.current, 1))

    def action_less(self) -> None:
        if self.current is not None:
            self.post_message(self.Cycled(self.current, -1))

    def find_lines(self) -> Sequence[str]:
        return [field_text(name) for name in INFOS]

    def find_at(self) -> int:
        return list(INFOS).index(self.current) if self.current else 0

    def find_show(self, index: int) -> None:
        self.post_message(self.Wanted(list(INFOS)[index]))

    def why_not(self, action_id: str) -> str | None:
        name = self.current
        if self.locked and action_id in ("fields.edit", "fields.more", "fields.less"):
            return self.locked
        if action_id in ("fields.more", "fields.less") and name and INFOS[name].kind not in ("bool", "choice"):
            return f"{name} has no fixed choices; Enter edits it"
        return None

    def on_click(self, event: Click) -> None:
        where = self.columns
        at = where.index(min(max(0, event.x - 1) // (where.width + 1), where.count - 1), event.y - 1)
        if not 0 <= event.y - 1 < where.rows or at >= len(self._lines):
            return
        index = self.names.index(self._lines[at].name)
        if index != self._cursor:
            self._go(index)
        elif not self.locked:
            self.action_edit()

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        event.stop()
        self._go(self._cursor + 3)

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        event.stop()
        self._go(self._cursor - 3)

    # painting

    def _inside(self, y: int, width: int, height: int) -> Strip:
        if self._blocking:
            return self._message_line(y, width, height)
        where = self.columns
        parts = []
        for column in range(where.count):
            index = where.index(column, y)
            shown = self._lines[index] if y < where.rows and index < len(self._lines) else None
            strip = line(where.width, self._pieces(shown, where.width) if shown is not None else ())
            if shown == FieldLine(self.current or ""):
                strip = strip.apply_style(self.palette.cursor if self.has_focus else self.palette.title)
            parts += [strip, Strip.blank(1)]
        return Strip.join(parts[:-1]).adjust_cell_length(width).apply_style(self.rich_style)

    def _pieces(self, shown: FieldLine, width: int) -> Sequence[Piece]:
        if self.form is None:
            return ()
        name, palette = shown.name, self.palette
        if shown.text:
            return [("     ", None), (fit(shown.text, width - 6), palette.of(shown.role))]
        mark, role = SEVERITY_MARKS[self.problems[name].severity] if name in self.problems else (" ", "text")
        changed, origin = self.form.changed(name), self.form.origin(name)
        label, value, unit = cells(self.names, width)
        here = name == self.current
        return [
            (">" if here else " ", palette.accent),
            (mark if mark != " " else "*" if changed else " ", palette.of(role if mark != " " else "accent")),
            (" " + fit(name, label) + "  ", palette.title if changed else palette.text),
            (fit(self._value_text(name, here), value) + "  ", palette.of("accent" if changed else "text")),
            (fit(ORIGIN_WORDS[origin], ORIGIN_CELLS) + " ", palette.of("accent" if origin == "you" else "dim")),
            (fit(INFOS[name].unit, unit), palette.dim),
        ]

    def _value_text(self, name: str, here: bool) -> str:
        assert self.form is not None
        text = clean(self.form.shown(name))
        return f"< {text} >" if here and self.has_focus and INFOS[name].kind in ("bool", "choice") else text
