"""Config: edit a configuration with checks at every key, its findings and its budget always in sight."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.timer import Timer

from lumina_engine.config.budget import budget
from lumina_engine.config.finding import Finding
from lumina_engine.config.schema import SECTIONS, Config, ConfigError

from .. import config_text as say
from ..drafts import load_draft, save_draft
from ..form import INFOS, SECTION_TITLES, check_value
from ..launching import train_argv
from ..widgets.fields import FieldList
from ..widgets.table import Column, Row, Table
from ..widgets.text_panel import TextPanel
from .base import State
from .config_files import ConfigFiles
from .config_layers import FieldSearch
from .dialogs import Choice

_DELAY = 0.15  # s from the last key to the rules across fields and the budget


class ConfigScreen(ConfigFiles):
    """One configuration. `form` is the model; everything shown is drawn from it."""

    scope = "config"
    number = 3
    heading = "Config"
    DEFAULT_CSS = """
    ConfigScreen #sections { width: 19; }
    ConfigScreen #middle { width: 1fr; }
    ConfigScreen #help { height: 6; }
    ConfigScreen #side { width: 50; display: none; }
    ConfigScreen #findings { height: 8; }
    ConfigScreen #budget { height: 4; }
    ConfigScreen.-compact #help { height: 5; }
    ConfigScreen.-compact #findings { height: 4; }
    ConfigScreen.-compact #sections { width: 18; }
    ConfigScreen.-low #help { display: none; }
    ConfigScreen.-low #findings, ConfigScreen.-low #budget { height: 3; }
    ConfigScreen.-wide #side { display: block; }
    ConfigScreen #details { height: 16; }
    """

    def __init__(
        self,
        *,
        preset: str | None = None,
        path: Path | None = None,
        config: Config | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.findings: list[Finding] = []
        self._current = -1  # finding
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

    def content(self) -> ComposeResult:
        with Horizontal(classes="content"):
            yield Table((Column("name", "", 10, grow=True),), title="Sections", id="sections", header=False)
            with Vertical(id="middle"):
                yield FieldList(id="fields")
                yield TextPanel(id="help", focusable=False)
            with Vertical(id="side"):
                yield TextPanel(id="diff", title="Differences")
                yield TextPanel(id="details", title="Budget, part by part", focusable=False)
        yield TextPanel(id="findings")
        yield TextPanel(id="budget", focusable=False)

    # life

    def on_mount(self) -> None:
        rows = [Row(name, ((SECTION_TITLES[name], "text"),)) for name in SECTIONS]
        self.query_one("#sections", Table).set_rows(rows)
        self.run_worker(self._look_around(), group="machine", exclusive=True, exit_on_error=False)
        self.fields.focus()
        self._start()

    async def _look_around(self) -> None:
        """What this machine has, in a thread; the budget follows."""
        from lumina_engine.monitoring.hardware import detect

        self.machine = await asyncio.to_thread(detect)
        self._rules()

    def on_screen_resume(self) -> None:
        self._check_disk()

    def on_resize(self) -> None:
        self.set_class(self.size.height < 22, "-low")
        self.call_after_refresh(self._show)

    @property
    def fields(self) -> FieldList:
        return self.query_one(FieldList)

    @property
    def section(self) -> str:
        return self.query_one("#sections", Table).cursor_key or SECTIONS[0]

    def _start(self) -> None:
        """Show a form from its beginning; text that no form can hold opens as YAML."""
        if self.form is None:
            message = self._error or "2 picks a preset, or lumina FILE.yaml"
            self.fields.set_state(State.ERROR if self._error else State.EMPTY, message)
            self.set_frame(subject="", badge="")
            return
        self.fields.set_state(State.LIVE)
        self._rules()
        if self.form.text is not None:
            self.action_yaml()

    # showing

    def _show(self) -> None:
        form = self.form
        if form is None:
            return
        name = form.path.name if form.path else f"copy of {form.preset}" if form.preset else "new"
        count = len(form.changes())
        badge = f"{say.base_name(form)} | {count} change{'s' if count != 1 else ''}"
        self.set_frame(subject=name + (" *" if form.dirty else ""), badge=badge)
        problems = say.worst_by_field(self.findings)
        rows = [Row(s, (self._section_cell(s, problems),)) for s in SECTIONS]
        self.query_one("#sections", Table).set_rows(rows)
        self.fields.show(form, self.section, problems, SECTION_TITLES[self.section])
        self._show_help()
        panel = self.query_one("#findings", TextPanel)
        panel.set_title(f"Findings  {say.count_words(self.findings)}", "] next" if self.findings else "")
        panel.set_lines(say.finding_lines(self.findings, self._current))
        self.query_one("#diff", TextPanel).set_lines(say.diff_lines(form.changes(), say.base_name(form)))
        self.refresh_keys()

    def _section_cell(self, section: str, problems: Mapping[str, Finding]) -> tuple[str, str]:
        names = [n for n, info in INFOS.items() if info.section == section]
        assert self.form is not None
        changed = sum(self.form.changed(n) for n in names)
        errors = sum(n in problems and problems[n].severity == "error" for n in names)
        warnings = sum(n in problems and problems[n].severity == "warning" for n in names)
        words = [f"{n}{mark}" for n, mark in ((changed, "*"), (warnings, "?"), (errors, "!")) if n]
        role = "bad" if errors else "warn" if warnings else "accent" if changed else "text"
        width = max(0, self.query_one("#sections", Table).inner[0] - 2)
        title, marks = SECTION_TITLES[section], " ".join(words[-2:])
        return title + marks.rjust(width - len(title)), role

    def _show_help(self, problem: Finding | None = None) -> None:
        panel, name = self.query_one("#help", TextPanel), self.fields.current
        if name is None or self.form is None:
            return
        panel.set_title(say.help_title(name))
        panel.set_foot(say.help_foot(self.form, name))
        lines = say.help_lines(name)
        panel.set_lines([((problem.line(), "bad"),), *lines] if problem else lines)

    def _rules(self, trial: tuple[str, str] | None = None) -> None:
        """Rules across fields and the budget, for what is entered, or with a field's text that is being typed."""
        if self._timer is not None:
            self._timer.stop()
            self._timer = None
        if self.form is None:
            return
        self.findings = self.form.findings(self.machine, trial)
        self._current = min(self._current, len(self.findings) - 1)
        self._show_budget()
        self._show()

    def _show_budget(self) -> None:
        panel = self.query_one("#budget", TextPanel)
        if self.machine is None or self.form is None:
            panel.set_title("Budget", "looking at this machine …")
            return
        panel.set_title(f"Budget on {self.machine.label}", "computed")
        try:
            figures = budget(self.form.config(), self.machine)
        except ConfigError as error:
            panel.set_lines([((str(error), "dim"),)])
            return
        except (ArithmeticError, ValueError):
            panel.set_lines([(("this shape has no budget: mend the errors first", "dim"),)])
            return
        panel.set_lines(say.budget_summary(figures))
        self.query_one("#details", TextPanel).set_lines(say.budget_details(figures))

    def _soon(self, trial: tuple[str, str] | None = None) -> None:
        if self._timer is not None:
            self._timer.stop()
        self._timer = self.set_timer(_DELAY, lambda: self._rules(trial))

    def _edited(self) -> None:
        """After each change of the form: show it at once, keep the draft, check the rules soon."""
        assert self.form is not None
        bad = set(self.form.bad)
        self.findings = [
            *self.form.bad.values(),
            *(f for f in self.findings if f.code != "bad_value" and not bad & set(f.keys)),
        ]
        self._show()
        self._soon()
        try:
            save_draft(self.form)
        except OSError as error:
            self.lumina.notice(f"the draft cannot be kept: {error.strerror or error}", "warning")

    # events

    def on_table_moved(self) -> None:
        self._show()

    def on_table_chosen(self) -> None:
        self.fields.focus()

    def on_field_list_moved(self) -> None:
        self._show_help()

    def on_field_list_typed(self, event: FieldList.Typed) -> None:
        _, problem = check_value(INFOS[event.name], event.text)
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
        name, info = event.name, INFOS[event.name]
        if event.step:
            self.form.cycle(name, event.step)
            self._edited()
            return
        words = (
            ["true", "false"]
            if info.kind == "bool"
            else [str(c).lower() if isinstance(c, bool) else str(c) for c in info.choices]
        )

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
        if action_id == "config.write" and self.lumina.readonly:
            return "--readonly: nothing is written"
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
        self._current = (
            (self._current + step) % len(self.findings) if self._current >= 0 or step > 0 else len(self.findings) - 1
        )
        finding = self.findings[self._current]
        name = next((key for key in finding.keys if key in INFOS), None)
        if name is not None:
            self.go_to_field(name)
        self._show()

    def action_search(self) -> None:
        self.lumina.push_screen(FieldSearch(), lambda name: self.go_to_field(name) if name and self.form else None)

    def action_diff(self) -> None:
        from .sheets import lines_sheet

        assert self.form is not None
        heading = f"{len(self.form.changes())} changes against {say.base_name(self.form)}"
        self.lumina.push_screen(lines_sheet(heading, say.diff_lines(self.form.changes(), say.base_name(self.form))))

    def action_start(self) -> None:
        self.lumina.open_screen(4)

    def action_copy(self) -> None:
        assert self.form is not None
        self.lumina.copy_text(shlex.join(train_argv(self.form.arguments())[:-2]), "command.txt")
