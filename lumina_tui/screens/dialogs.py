"""Small layers over a screen: a question, a value to enter, help, notices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Input, Static

from ..actions import key_text
from ..paint import clean
from ..widgets.acts import Finds
from .layer import Layer

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.widget import Widget


@dataclass(frozen=True)
class Choice:
    """One answer: the key that gives it, its text, and the value handed back."""

    key: str
    text: str
    value: str


class Question(Layer[str]):
    """A question that names the thing, with one key per answer; Esc gives None. Enter answers nothing: no accident."""

    def __init__(self, question: str, lines: Sequence[str], choices: Sequence[Choice]) -> None:
        super().__init__()
        self.question, self.lines, self.choices = question, lines, choices

    def compose(self) -> ComposeResult:
        answers = [f" {key_text(choice.key):<3} {choice.text}" for choice in self.choices] + [" Esc back"]
        body = [clean(line) for line in self.lines]
        box = Static(Content("\n".join([*body, *([""] if body else []), *answers])), classes="dialog", markup=False)
        box.border_title = Content(f" {clean(self.question)} ")
        box.styles.min_width = min(72, max(44, cell_len(clean(self.question)) + 8))  # a title does not widen its frame
        yield box

    def on_key(self, event: Any) -> None:
        for choice in self.choices:
            if event.character == choice.key or event.key == choice.key:
                event.stop()
                self.dismiss(choice.value)


class Prompt(Layer[str]):
    """One line of input. `check(text)` gives what is wrong with it, or None; Enter is refused while something is wrong."""

    hint = "Enter ok  Esc back"

    def __init__(
        self,
        question: str,
        value: str = "",
        lines: Sequence[str] = (),
        check: Callable[[str], str | None] = lambda text: None,
    ) -> None:
        super().__init__()
        self.question, self.value, self.lines, self.check = question, value, lines, check

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog", can_focus=False) as box:
            if self.lines:
                yield Static(Content("\n".join(clean(line) for line in self.lines)), markup=False)
            yield Input(self.value, compact=True)
            yield from self.extra()
            yield Static("", id="wrong", markup=False)
            yield Static(Content(self.hint), classes="hint", markup=False)
        box.border_title = Content(f" {clean(self.question)} ")

    def extra(self) -> Iterable[Widget]:
        """What stands between the field and what is wrong with it."""
        return ()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._show(self.check(event.value))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        wrong = self.check(event.value)
        if wrong is None:
            self.dismiss(event.value)
        else:
            self._show(wrong)

    def _show(self, wrong: str | None) -> None:
        self.query_one("#wrong", Static).update(Content(clean(wrong or "")))


class Sheet(Finds, Layer[None]):
    """Text to read and leave: Esc, q or the key that opened it. `/` finds lines."""

    scope = "sheet"

    def __init__(self, heading: str, text: Content) -> None:
        super().__init__()
        self.heading, self.text = heading, text
        self._found = -1

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog sheet") as box:
            yield Static(self.text, markup=False)
        box.border_title = Content(f" {clean(self.heading)} ")
        box.border_subtitle = Content(" j k scroll  / find  y copy  Esc back ")

    @property
    def box(self) -> VerticalScroll:
        return self.query_one(VerticalScroll)

    # searching

    def find_lines(self) -> Sequence[str]:
        return self.text.plain.split("\n")

    def find_at(self) -> int:
        return max(0, self._found)

    def find_show(self, index: int) -> None:
        """Mark the line and bring it into sight; a wrapped line above it takes more than one row."""
        self._found = index
        lines = self.text.split("\n", allow_blank=True)
        shown = self.query_one(Static)
        shown.update(Content("\n").join([*lines[:index], lines[index].stylize("reverse"), *lines[index + 1 :]]))
        width = max(1, shown.size.width)
        above = sum(max(1, -(-cell_len(line) // width)) for line in self.find_lines()[:index])
        self.box.scroll_to(y=max(0, above - self.box.size.height // 2), animate=False)

    # actions

    def action_find(self) -> None:
        self.lumina.prompt("Find", self.find, value=self.needle)

    def action_copy(self) -> None:
        self.lumina.copy_text(self.text.plain)

    def action_down(self) -> None:
        self.box.scroll_relative(y=1, animate=False)

    def action_up(self) -> None:
        self.box.scroll_relative(y=-1, animate=False)

    def action_top(self) -> None:
        self.box.scroll_home(animate=False)

    def action_bottom(self) -> None:
        self.box.scroll_end(animate=False)

    def action_page_down(self) -> None:
        self.box.scroll_page_down(animate=False)

    def action_page_up(self) -> None:
        self.box.scroll_page_up(animate=False)
