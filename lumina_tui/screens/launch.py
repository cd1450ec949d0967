"""Launch: one review of everything that will happen, then the start in four stages, then Monitor."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.containers import Container, Vertical

from lumina_engine.config.machine import Machine
from lumina_engine.config.schema import Config, ConfigError

from .. import budget_text
from .. import config_text as say
from ..form import Form
from ..launching import Launched, LaunchError
from ..paint import duration
from ..review import Review, check_lines, command, fingerprint, review
from ..starting import STAGES, Progress, Watch, last_lines
from ..widgets.text_panel import Line, TextPanel
from .base import LuminaScreen, State
from .dialogs import Choice

_LOOK = 0.2  # s between two looks at a starting run


class LaunchScreen(LuminaScreen):
    """Shows the newest of what was handed to it and what the editor holds."""

    scope = "launch"
    number = 4
    heading = "Launch"
    DEFAULT_CSS = """
    LaunchScreen #body { layout: horizontal; height: 1fr; }
    LaunchScreen #left, LaunchScreen #right { width: 1fr; height: 1fr; }
    LaunchScreen TextPanel { height: 1fr; }
    LaunchScreen #checks { height: 11; }
    LaunchScreen #command { height: 7; }
    LaunchScreen.-compact #body { layout: vertical; overflow-y: auto; }
    LaunchScreen.-compact #left, LaunchScreen.-compact #right { width: 1fr; height: auto; }
    LaunchScreen.-compact #checks { height: 10; }
    LaunchScreen.-compact #budget { height: 12; }
    LaunchScreen.-compact #findings, LaunchScreen.-compact #diff, LaunchScreen.-compact #deepspeed { height: 9; }
    """

    def __init__(
        self,
        *,
        config: Config | None = None,
        origins: Mapping[str, str] | None = None,
        preset: str | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        self.form: Form | None = None
        self.review: Review | None = None
        self.machine: Machine | None = None
        self.progress: Progress | None = None
        self.started: Path | None = None
        self._error = ""
        self._problem: tuple[str, list[str]] | None = None  # why a start failed, and its last words
        self._finding = -1
        self._given: Form | None = None
        self._accepted = False
        self._take(config, origins, preset, path)

    def _take(self, config: Config | None, origins: Mapping[str, str] | None, preset: str | None, path: Path | None) -> None:
        self._error = ""
        try:
            if config is not None:
                self._given = Form.from_config(config, origins, preset)
            elif path is not None:
                self._given = Form.from_file(path)
            elif preset is not None:
                self._given = Form.from_preset(preset)
        except ConfigError as error:
            self._error = str(error)

    def retarget(self, **arguments: Any) -> bool:
        self._take(*(arguments.get(name) for name in ("config", "origins", "preset", "path")))
        if self.is_mounted:
            self._refresh_review()
        return True

    def content(self) -> ComposeResult:
        with Container(id="body", classes="content"):
            with Vertical(id="left"):
                yield TextPanel(id="checks", title="Before the start")
                yield TextPanel(id="budget", title="Budget")
                yield TextPanel(id="findings", title="Findings")
            with Vertical(id="right"):
                yield TextPanel(id="command", title="Command")
                yield TextPanel(id="diff", title="Differences")
                yield TextPanel(id="deepspeed", title="deepspeed.json", indent=0)

    def place(self) -> dict[str, str | list[str]] | None:
        return None  # a review belongs to its moment: the next session opens the editor

    # life

    def on_mount(self) -> None:
        self._panel("checks").focus()
        self._refresh_review()

    def on_screen_resume(self) -> None:
        if self.progress is not None and self.progress.done:
            self.progress = None
        if self.progress is None:
            self._refresh_review()

    def _panel(self, name: str) -> TextPanel:
        return self.query_one(f"#{name}", TextPanel)

    def _newest_form(self) -> Form | None:
        """What the editor holds, or what was handed over, whichever was touched last."""
        forms = [self._given] if self._given is not None else []
        if self.lumina.is_screen_installed("screen-3"):
            edited = getattr(self.lumina.get_screen("screen-3"), "form", None)
            forms += [edited] if edited is not None else []
        return max(forms, key=lambda form: form.stamp, default=None)

    def _refresh_review(self) -> None:
        """Review again, in a thread; what is shown meanwhile is the last review."""
        self.form = self._newest_form()
        self._problem, self._accepted = None, False
        checks = self._panel("checks")
        if self.form is None:
            checks.set_state(State.ERROR if self._error else State.EMPTY, self._error or "2 picks a preset")
            self.set_frame(subject="", badge="")
            return
        checks.set_state(State.LIVE)
        if self.review is None:
            checks.set_lines([(("checking …", "dim"),)])
        self.run_worker(self._look(self.form), group="review", exclusive=True, exit_on_error=False)

    async def _look(self, form: Form) -> None:
        from lumina_engine.monitoring.hardware import detect

        def work() -> tuple[Machine, Review]:
            root = self.lumina.runs_root
            machine = detect(root if root.exists() else ".")
            return machine, review(form, machine, root)

        self.machine, self.review = await asyncio.to_thread(work)
        self._show()

    # showing

    def _show(self) -> None:
        form, found = self.form, self.review
        if form is None or found is None:
            return
        name = form.path.name if form.path else f"preset {form.preset}" if form.preset else "own values"
        state = "blocked" if found.blocked else "ready"
        self.set_frame(subject=name, badge=state, badge_role="bad" if found.blocked else "good")
        if self.progress is None:
            self._panel("checks").set_title("Before the start", self.machine.label if self.machine else "")
            self._panel("checks").set_lines(check_lines(found.rows) if self._problem is None else self._problem_lines())
        budget = self._panel("budget")
        budget.set_title("Budget", "computed, time guessed")
        figures = found.figures
        nothing: list[Line] = [(("not known before the errors are mended", "dim"),)]
        width = max(0, budget.inner[0] - 2)
        lines = budget_text.summary_lines(figures, width) + budget_text.detail_lines(figures, width) if figures else nothing
        budget.set_lines(lines)
        findings = self._panel("findings")
        findings.set_title(f"Findings  {say.count_words(found.findings)}")
        findings.set_lines(say.finding_lines(found.findings, self._finding))
        self._panel("command").set_lines([((command(found.arguments), "text"),)])
        changes = form.changes()
        self._panel("diff").set_title(f"{len(changes)} differences from {say.base_name(form)}")
        self._panel("diff").set_lines(say.diff_lines(changes, say.base_name(form)))
        self._panel("deepspeed").set_lines([((line, "text"),) for line in found.deepspeed.splitlines()])
        self.refresh_keys()

    def _problem_lines(self) -> list[Line]:
        assert self._problem is not None
        why, words = self._problem
        head: list[Line] = [(("! ", "bad"), (why, "bad")), (("nothing is left running; mend it and r reviews again", "dim"),)]
        return head + [((word, "dim"),) for word in words]

    def _show_progress(self) -> None:
        progress = self.progress
        if progress is None:
            return
        lines: list[Line] = []
        for stage in STAGES:
            at = progress.reached.get(stage)
            if at is not None:
                lines.append((("ok  ", "good"), (f"{stage:<15}", "text"), (f"after {duration(at)}", "dim")))
            elif stage == progress.waiting_for:
                lines.append((("…   ", "accent"), (f"{stage:<15}", "title"), (progress.now, "dim")))
            else:
                lines.append((("    ", "dim"), (stage, "dim")))
        if self.started is not None:
            lines += [(("", "text"),), ((f"run {self.started.name}; Enter opens its monitor now", "dim"),)]
        self._panel("checks").set_title("Starting")
        self._panel("checks").set_lines(lines)

    # actions

    def why_not(self, action_id: str) -> str | None:
        if action_id == "launch.reload":
            return None
        if self.form is None:
            return "nothing to launch: 2 picks a preset"
        if action_id == "launch.start":
            return self._why_no_start()
        if action_id == "launch.write" and self.lumina.readonly:
            return "--readonly: nothing is written"
        if action_id.endswith("_finding") and not (self.review and self.review.findings):
            return "there are no findings"
        return None

    def _why_no_start(self) -> str | None:
        if self.progress is not None:
            return None if self.started is not None else "it is starting"
        if self.lumina.readonly:
            return "--readonly: nothing is started"
        if self.review is None:
            return "the review is not ready yet"
        if self.review.blocked:
            bad = [row for row in self.review.rows if row.status == "fail" and row.label != "configuration"]
            first = next((f.line() for f in self.review.findings if f.severity == "error"), "")
            return f"blocked: {first or f'{bad[0].label}: {bad[0].text}'}"
        return None

    def action_start(self) -> None:
        if self.started is not None and self.progress is not None:
            self._open_monitor()
            return
        assert self.form is not None and self.review is not None
        if fingerprint(self.form, self.form.config()) != self.review.seen:
            self.lumina.notice("values or data changed since this review: r reviews again", "warning")
            return
        warnings = self.review.warnings
        if warnings and not self._accepted:
            self.lumina.ask("Launch with warnings?", [Choice("y", "launch", "launch")], lambda _: self._start(), warnings[:6])
        else:
            self._start()

    def _start(self) -> None:
        assert self.review is not None
        self._accepted = True
        self.progress, self.started, self._problem = Progress(), None, None
        self.set_frame(badge="starting", badge_role="accent")
        self._show_progress()
        self.refresh_keys()
        self.lumina.spawn(self._run(list(self.review.arguments), self.progress))

    async def _run(self, arguments: list[str], progress: Progress) -> None:
        """Start, then follow the run's log to its first step. Leaving the screen stops nothing."""
        try:
            launched = await self.lumina.start_run(arguments)
        except LaunchError as error:
            self._failed(str(error), error.output.splitlines()[-20:])
            return
        progress.reach("supervisor")
        progress.now = "preparing the data"
        await self._follow(launched, progress)

    async def _follow(self, launched: Launched, progress: Progress) -> None:
        self.started = launched.path
        self.refresh_keys()
        watch = Watch(launched.path, progress)
        while self.progress is progress:
            watch.look()
            self._show_progress()
            if progress.failed:
                self._failed(f"run {launched.run} {progress.failed}", last_lines(launched.path / "engine.log"))
            elif progress.done:
                self._open_monitor()
            else:
                await asyncio.sleep(_LOOK)

    def _failed(self, why: str, words: list[str]) -> None:
        self.progress, self.started = None, None
        self._problem = (why, words)
        self._show()
        self.set_frame(badge="failed", badge_role="bad")
        self.lumina.notice(why, "error")

    def _open_monitor(self) -> None:
        path, self.progress, self.started = self.started, None, None
        if path is not None and self.is_current:
            self.lumina.open_monitor(path)

    def action_diff(self) -> None:
        from .sheets import lines_sheet

        assert self.form is not None
        base = say.base_name(self.form)
        self.lumina.push_screen(lines_sheet(f"differences from {base}", say.diff_lines(self.form.changes(), base)))

    def action_edit(self) -> None:
        if self.form is self._given and self.form is not None:
            form = self.form
            self.lumina.open_config(**({"path": form.path} if form.path else {"config": form.config(), "preset": form.preset}))
        else:
            self.lumina.open_screen(3)

    def action_copy(self) -> None:
        if self.review is not None:
            self.lumina.copy_text(command(self.review.arguments), "command.txt")

    def action_write(self) -> None:
        from .write_file import ask_and_write

        assert self.form is not None
        ask_and_write(self.lumina, self.form, lambda path: self._refresh_review())

    def action_next_finding(self) -> None:
        self._step(1)

    def action_previous_finding(self) -> None:
        self._step(-1)

    def _step(self, step: int) -> None:
        if self.review is not None and self.review.findings:
            self._finding = (self._finding + step) % len(self.review.findings)
            self._panel("findings").focus()
            self._show()

    def action_reload(self) -> None:
        self._refresh_review()
