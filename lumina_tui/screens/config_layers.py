"""Layers of the config editor: find a field, edit the whole as YAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Input, Static, TextArea

from lumina_engine.config.finding import Finding

from ..actions import bindings
from ..config_text import count_words, finding_lines
from ..form import INFOS, SECTION_TITLES, field_text
from ..widgets.acts import Acts
from ..widgets.table import Column, Row, Table
from ..widgets.text_panel import TextPanel
from .dialogs import Choice, Question

_DELAY = 0.15


def matching_fields(words: str) -> list[str]:
    """Fields whose name, help or section holds every word; those with it in the name come first."""
    wanted = words.lower().replace("-", "_").split()
    found: list[tuple[bool, int, str]] = []
    for info in INFOS.values():
        text = field_text(info.name).lower()
        if all(word in text for word in wanted):
            found.append((not all(word in info.name for word in wanted), len(found), info.name))
    return [name for *_, name in sorted(found)]


class FieldSearch(ModalScreen[tuple[str, str] | None]):
    """Type words, choose a field with the arrow keys, Enter goes there. Gives the field and the words."""

    DEFAULT_CSS = """
    FieldSearch { align: center top; background: $background 60%; }
    FieldSearch > Vertical { width: 90%; max-width: 100; height: 80%; margin: 2 0 0 0; background: $surface; }
    FieldSearch Input { height: 1; background: $bar; border: none; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", show=False),
        Binding("down,ctrl+n", "move(1)", show=False),
        Binding("up,ctrl+p", "move(-1)", show=False),
    ]

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Input(placeholder="words of a name or its help", compact=True)
            table = Table(
                (Column("name", "field", 34), Column("section", "section", 11), Column("help", "", 10, grow=True, rank=2)),
                title="search all fields",
                header=False,
            )
            table.can_focus = False
            yield table

    def on_mount(self) -> None:
        self._show("")

    def on_input_changed(self, event: Input.Changed) -> None:
        self._show(event.value)

    def _show(self, words: str) -> None:
        table = self.query_one(Table)
        infos = [INFOS[name] for name in matching_fields(words)]
        table.set_rows(
            Row(info.name, ((info.name, "text"), (SECTION_TITLES[info.section], "dim"), (info.help, "dim"))) for info in infos
        )
        table.action_top()
        table.set_title(f"{len(infos)} fields", "Enter goes there, n next one  Esc back")

    def action_move(self, step: int) -> None:
        table = self.query_one(Table)
        table.action_down() if step > 0 else table.action_up()

    def on_input_submitted(self) -> None:
        self._choose(self.query_one(Table).cursor_key)

    def on_table_chosen(self, event: Table.Chosen) -> None:
        self._choose(event.key)

    def _choose(self, name: str | None) -> None:
        self.dismiss(None if name is None else (name, self.query_one(Input).value))

    def action_leave(self) -> None:
        self.dismiss(None)


class YamlView(Acts, ModalScreen[str | None]):
    """The configuration as text. Esc hands the text over; with problems that no field can show it asks first."""

    DEFAULT_CSS = """
    YamlView { layout: vertical; background: $background; }
    YamlView TextArea, YamlView TextArea:focus { height: 1fr; border: none; background: $background; padding: 0; }
    YamlView #problems { height: 6; }
    YamlView .head { height: 1; background: $bar; color: $text-dim; padding: 0 1; }
    """
    scope = "yaml"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("yaml"))

    def __init__(
        self,
        text: str,
        check: Callable[[str], tuple[Sequence[Finding], bool]],
        *,
        keep: Callable[[str | None], None],
        pending: str | None = None,
        heading: str = "",
        line: int = 1,
    ) -> None:
        """`check` gives the findings of a text, and whether the form can hold it.

        `keep` gets what is typed and was not taken over yet, None once there is nothing to keep; `pending` is such a text.
        """
        super().__init__()
        self.text, self.check, self.keep, self.pending = text, check, keep, pending
        self.heading, self.line = heading, line
        self._timer: Timer | None = None

    def compose(self) -> ComposeResult:
        yield Static(Content(f"YAML of {self.heading}    Esc takes it over  Tab to the problems"), classes="head", markup=False)
        yield TextArea(
            self.text if self.pending is None else self.pending, show_line_numbers=True, soft_wrap=False, tab_behavior="focus"
        )
        yield TextPanel(id="problems")

    def on_mount(self) -> None:
        area = self.query_one(TextArea)
        area.focus()
        area.move_cursor((max(0, self.line - 1), 0), center=True)
        self._show()

    def on_text_area_changed(self) -> None:
        if self._timer is not None:
            self._timer.stop()
        self._timer = self.set_timer(_DELAY, self._show)

    def _show(self) -> None:
        text = self.query_one(TextArea).text
        self.keep(None if text == self.text else text)
        findings, _ = self.check(text)
        panel = self.query_one("#problems", TextPanel)
        panel.set_title(f"Findings  {count_words(findings)}")
        panel.set_lines(finding_lines(findings))

    def action_leave(self) -> None:
        text = self.query_one(TextArea).text
        findings, fits = self.check(text)
        if text == self.text:
            self.keep(None)
            self.dismiss(None)
        elif fits:
            self.dismiss(text)
        else:
            choices = [Choice("k", "keep editing", "keep"), Choice("x", "drop these edits", "drop")]
            lines = [f.line() for f in findings[:4]]
            self.app.push_screen(Question("The text cannot be taken over yet", lines, choices), self._answered)

    def _answered(self, answer: str | None) -> None:
        if answer == "drop":
            self.call_later(self._drop)  # after the question is gone: dismiss pops what is on top

    def _drop(self) -> None:
        self.keep(None)
        self.dismiss(None)
