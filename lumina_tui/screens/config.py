"""Config: edit a configuration with checks at every key, its findings and its budget always in sight."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textual.timer import Timer

from lumina_engine.config.declare import show
from lumina_engine.config.schema import SECTIONS, Config

from .. import budget_text, checking
from ..checking import DataLook
from ..drafts import load_draft
from ..form import INFOS, SECTION_TITLES, check_value
from ..preview import command, preview_lines
from ..widgets.fields import FieldList
from ..widgets.table import Row, Table
from .base import State
from .config_layers import FieldSearch
from .config_view import ConfigView
from .dialogs import Choice

_DELAY = 0.15  # s from the last key to the rules across fields and the budget


class ConfigScreen(ConfigView):
    """One configuration. `form` is the model; everything shown is drawn from it."""

    scope = "config"
    number = 3
    heading = "Config"

    def __init__(
        self,
        *,
        preset: str | None = None,
        path: Path | None = None,
        config: Config | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._data = DataLook()
        self._timer: Timer | None = None
        if any(argument is not None for argument in (preset, path, config)):
            self._open(preset, path, config, origins)
        else:
            self.form = load_draft()

    def retarget(self, **arguments: Any) -> bool:
        self._open(*(arguments.get(name) for name in ("preset", "path", "config", "origins")))
        if self.is_mounted:
            self._start()
        return True

    def place(self) -> dict[str, str | list[str]] | None:
        form = self.form
        return {} if form is None or form.path is None or form.dirty else {"path": str(form.path.absolute())}

    # life

    def on_mount(self) -> None:
        rows = [Row(name, ((SECTION_TITLES[name], "text"),)) for name in SECTIONS]
        self.query_one("#sections", Table).set_rows(rows)
        self.run_worker(self._look_around(), group="machine", exclusive=True, exit_on_error=False)
        self.watch(self.app, "app_focus", self._on_app_focus, init=False)
        self.fields.focus()
        self._start()

    async def _look_around(self) -> None:
        """What this machine has, in a thread; the budget follows."""
        from lumina_engine.monitoring.hardware import detect

        self.machine = await asyncio.to_thread(detect)
        self._rules()

    def on_screen_resume(self) -> None:
        self.lumina.spawn(self.look_at_file())

    def _on_app_focus(self, focused: bool) -> None:
        if focused and self.is_current:
            self.lumina.spawn(self.look_at_file())

    def on_resize(self) -> None:
        self.set_class(self.size.height < 22, "-low")
        self.call_after_refresh(self._show)

    def _start(self) -> None:
        """Show a form from its beginning; text that no form can hold opens as YAML, and so does text not taken over yet."""
        if self.form is None:
            message = self._error or "2 picks a preset, or lumina FILE.yaml"
            self.fields.set_state(State.ERROR if self._error else State.EMPTY, message)
            self.set_frame(subject="", badge="")
            return
        if self._error:
            self.lumina.notice(self._error, "error")
            self._error = ""
        self.fields.set_state(State.LIVE)
        self._rules()
        if self.form.text is not None or self.form.pending is not None:
            self.action_yaml()

    def _rules(self, trial: tuple[str, str] | None = None) -> None:
        """Rules across fields and the budget, for what is entered, or with a field's text that is being typed."""
        if self._timer is not None:
            self._timer.stop()
            self._timer = None
        if self.form is None:
            return
        known = self._data.of(self.form.config())
        if known is None:
            self.run_worker(self._look_at_data(self.form.config()), group="data", exclusive=True, exit_on_error=False)
        tokens, data = known or ((None, ""), ["looking at the data …"])
        self.checked = checking.checked(self.form, self.machine, trial, tokens, data)
        self.findings = list(self.checked.findings)
        self.finding = min(self.finding, len(self.findings) - 1)
        self._show_budget()
        self._show()

    async def _look_at_data(self, config: Config) -> None:
        """How much data there is and what becomes of it, in a thread; the budget follows."""
        await asyncio.to_thread(self._data.look, config)
        self._rules()

    def _soon(self, trial: tuple[str, str] | None = None) -> None:
        if self._timer is not None:
            self._timer.stop()
        self._timer = self.set_timer(_DELAY, lambda: self._rules(trial))

    def _edited(self) -> None:
        """After each change of the form: show it at once, keep the draft, check the rules soon."""
        assert self.form is not None
        self.findings = checking.after_entry(self.form, self.findings)
        self._show()
        self._soon()
        self.keep_draft()

    # events

    def on_table_moved(self) -> None:
        self._show()

    def on_table_chosen(self) -> None:
        self.fields.focus()

    def on_field_list_moved(self) -> None:
        self._show_help()

    def on_field_list_typed(self, event: FieldList.Typed) -> None:
        _, problem = check_value(INFOS[event.name], event.text, self.form.preset if self.form is not None else None)
        self.fields.set_problem(event.name, problem)
        self._show_help(problem)
        self._soon((event.name, event.text))

    def on_field_list_entered(self, event: FieldList.Entered) -> None:
        assert self.form is not None
        self.form.set_text(event.name, event.text)
        self._edited()

    def on_field_list_left(self) -> None:
        self.fields.leave()
        self._rules()

    def on_field_list_cycled(self, event: FieldList.Cycled) -> None:
        assert self.form is not None
        name = event.name
        if event.step:
            self.form.cycle(name, event.step)
            self._edited()
            return
        words = [show(choice) for choice in self.form.choices(name)]

        def take(word: str) -> None:
            assert self.form is not None
            self.form.set_text(name, word)
            self._edited()

        choices = [Choice(str(i + 1), word, word) for i, word in enumerate(words)]
        self.lumina.ask(name, choices, take, [f"now {self.form.shown(name)}"])

    # actions

    def why_not(self, action_id: str) -> str | None:
        if self.fields.editing is not None:
            return "a field is being edited: Enter takes it over, Esc leaves it as it was"
        if self.form is None and action_id != "config.search":
            return "nothing is edited: 2 picks a preset"
        if action_id in ("config.next_problem", "config.previous_problem") and not self.findings:
            return "there are no findings"
        if action_id in ("config.write", "config.save_preset") and self.lumina.readonly:
            return "--readonly: nothing is written"
        if action_id == "config.budget" and self.checked.figures is None:
            return self.checked.reason
        if action_id == "config.reload" and self.form is not None and self.form.path is None:
            return "it was not written to a file yet"
        return None

    def action_undo(self) -> None:
        self._step("undo")

    def action_redo(self) -> None:
        self._step("redo")

    def _step(self, way: str) -> None:
        assert self.form is not None
        name = getattr(self.form, way)()
        if name is None:
            self.lumina.notice(f"nothing to {way}")
            return
        if name in INFOS:
            self.go_to_field(name)
        self._edited()

    def action_reset(self) -> None:
        if self.form is not None and self.fields.current is not None:
            self.form.reset(self.fields.current)
            self._edited()

    def go_to_field(self, name: str) -> None:
        """Put the cursor on a field, in whatever section it is; without a configuration nothing happens."""
        if self.form is None or name not in INFOS:
            return
        self.query_one("#sections", Table).move_to(INFOS[name].section)
        self._show()
        self.fields.go_to(name)
        self.fields.focus()
        self._show_help()

    def action_next_problem(self) -> None:
        self._problem(1)

    def action_previous_problem(self) -> None:
        self._problem(-1)

    def _problem(self, step: int) -> None:
        self.finding = (self.finding + step) % len(self.findings) if self.finding >= 0 or step > 0 else len(self.findings) - 1
        finding = self.findings[self.finding]
        name = next((key for key in finding.keys if key in INFOS), None)
        if name is not None:
            self.go_to_field(name)
        self._show()

    def action_search(self) -> None:
        def found(answer: tuple[str, str] | None) -> None:
            if answer is not None:
                name, self.fields.needle = answer
                self.go_to_field(name)

        self.lumina.push_screen(FieldSearch(), found)

    def on_field_list_wanted(self, event: FieldList.Wanted) -> None:
        self.go_to_field(event.name)

    def action_budget(self) -> None:
        from .sheets import lines_sheet

        if self.checked.figures is not None and self.machine is not None:
            lines = budget_text.detail_lines(self.checked.figures, min(76, self.size.width - 10))
            self.lumina.push_screen(lines_sheet(f"Budget on {self.machine.label}", lines))

    def action_preview(self) -> None:
        from .sheets import lines_sheet

        assert self.form is not None
        self.lumina.push_screen(lines_sheet("What it becomes", preview_lines(self.form, self.machine, self.findings)))

    def action_start(self) -> None:
        self.lumina.open_screen(4)

    def action_copy(self) -> None:
        assert self.form is not None
        self.lumina.copy_text(command(self.form.arguments()), "command.txt")
