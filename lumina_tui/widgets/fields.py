"""The fields of one section: value, origin, unit, marks and problems; one field can be edited in its place."""

from __future__ import annotations

import textwrap
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
from ..form import INFOS, Form
from ..paint import Piece, clean, fit, line
from .acts import Acts
from .panel import Drawn

SEVERITY_MARKS = {"error": ("!", "bad"), "warning": ("?", "warn"), "info": ("i", "dim")}
_VALUE = 14  # least cells of the value column
_ORIGIN = 7


class ValueInput(Acts, Input):
    """The field that is being edited."""

    scope = "field"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("field"))

    def action_take(self) -> None:
        self.post_message(self.Submitted(self, self.value))

    def action_cancel(self) -> None:
        self.post_message(FieldList.Left(self))


class FieldList(Drawn):
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
        self._cursor = 0
        self._top = 0

    def compose(self) -> ComposeResult:
        yield ValueInput(compact=True, select_on_focus=True)

    # content

    def show(self, form: Form, section: str, problems: Mapping[str, Finding], title: str) -> None:
        """Show a section of a form; `problems` has the worst finding of each field."""
        names = [info.name for info in INFOS.values() if info.section == section]
        if names != self.names:
            self.leave()
            self.names, self._cursor, self._top = names, 0, 0
        self.form, self.problems = form, problems
        self.set_title(title)
        self._keep_in_sight()
        self.refresh()

    @property
    def current(self) -> str | None:
        """The field under the cursor."""
        return self.names[self._cursor] if self.names else None

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

    def _lines(self) -> list[tuple[str, str]]:
        """(field, text) of every line; the text is empty on the field's own line, else a line of its problem."""
        out = []
        for name in self.names:
            out.append((name, ""))
            if name in self.problems:
                text = clean(self.problems[name].line()).removeprefix(f"{name} = ")
                out += [(name, part) for part in textwrap.wrap(text, max(10, self.inner[0] - 6))[:2]]
        return out

    def _line_of(self, name: str) -> int:
        return self._lines().index((name, ""))

    def _columns(self, width: int) -> tuple[int, int, int]:
        """Cells of name, value and unit."""
        name = min(max((len(n) for n in self.names), default=10), max(12, width - _VALUE - _ORIGIN - 7))
        rest = width - 3 - name - _ORIGIN - 6
        unit = max((len(INFOS[n].unit) for n in self.names), default=0)
        if unit > rest - _VALUE:  # then the line of help has it
            unit = 0
        return name, max(4, min(rest - unit, 40)), unit

    def _place(self) -> None:
        """Lay the input over the value of its field."""
        if self.editing is None:
            return
        name, value, _ = self._columns(self.inner[0])
        field = self.query_one(ValueInput)
        field.styles.offset = (4 + name + 1, self._line_of(self.editing) - self._top + 1)
        field.styles.width = value + 1

    def _keep_in_sight(self) -> None:
        if not self.names:
            return
        at, page = self._line_of(self.names[self._cursor]), max(1, self.inner[1])
        need = max(i for i, (name, _) in enumerate(self._lines()) if name == self.names[self._cursor])
        if at < self._top:
            self._top = at
        elif need >= self._top + page:
            self._top = need - page + 1
        self._top = max(0, min(self._top, len(self._lines()) - page))
        hidden = len(self._lines()) > page
        self.set_foot("", f"{self._cursor + 1} of {len(self.names)}" if hidden else "")
        self._place()

    def on_resize(self) -> None:
        self._keep_in_sight()

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
                self.refresh_lines_inside(self._line_of(self.names[changed]) - self._top)
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

    def why_not(self, action_id: str) -> str | None:
        name = self.current
        if action_id in ("fields.more", "fields.less") and name and INFOS[name].kind not in ("bool", "choice"):
            return f"{name} has no fixed choices; Enter edits it"
        return None

    def on_click(self, event: Click) -> None:
        lines, at = self._lines(), event.y - 1 + self._top
        if 0 <= at < len(lines):
            index = self.names.index(lines[at][0])
            if index == self._cursor:
                self.action_edit()
            else:
                self._go(index)

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
        strip = line(width, self.draw(y, width, height))
        lines = self._lines()
        at = y + self._top
        if at < len(lines) and lines[at] == (self.current, ""):
            palette = self.palette
            strip = strip.apply_style(palette.cursor if self.has_focus else palette.title)
        return strip.apply_style(self.rich_style)

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        lines = self._lines()
        at = y + self._top
        if at >= len(lines) or self.form is None:
            return ()
        name, problem = lines[at]
        palette = self.palette
        if problem:
            return [("     ", None), (fit(problem, width - 6), palette.of(SEVERITY_MARKS[self.problems[name].severity][1]))]
        mark, role = SEVERITY_MARKS[self.problems[name].severity] if name in self.problems else (" ", "text")
        changed = self.form.changed(name)
        cells, value, unit = self._columns(width)
        here = name == self.current
        return [
            (">" if here else " ", palette.accent),
            (mark if mark != " " else "*" if changed else " ", palette.of(role if mark != " " else "accent")),
            (" " + fit(name, cells) + "  ", palette.title if changed else palette.text),
            (fit(self._value_text(name, here), value) + "  ", palette.of("accent" if changed else "text")),
            (fit(self.form.origin(name), _ORIGIN) + " ", palette.of("accent" if self.form.origin(name) == "you" else "dim")),
            (fit(INFOS[name].unit, unit), palette.dim),
        ]

    def _value_text(self, name: str, here: bool) -> str:
        assert self.form is not None
        text = clean(self.form.shown(name))
        return f"< {text} >" if here and self.has_focus and INFOS[name].kind in ("bool", "choice") else text
