"""Launch: one review of everything that will happen, then the start in four steps, then Monitor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumina_engine.config.machine import Machine
from lumina_engine.config.schema import Config, ConfigError

from .. import config_text as say
from ..form import Form
from ..preview import command
from ..review import Review, fingerprint, review
from ..starting import Start
from .base import State
from .dialogs import Choice
from .launch_view import LaunchView

_LOOK = 2.0  # s between two looks at what was reviewed


class LaunchScreen(LaunchView):
    """Shows the newest of what was handed to it and what the editor holds."""

    scope = "launch"
    number = 4
    heading = "Launch"

    def __init__(
        self,
        *,
        config: Config | None = None,
        origins: Mapping[str, str] | None = None,
        preset: str | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        self._error = ""
        self._given: Form | None = None
        self._looked = 0.0
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
        if self.is_mounted and not self.starting:
            self._review_again()
        return True

    def place(self) -> dict[str, str | list[str]] | None:
        return None  # a review belongs to its moment: the next session opens the editor

    # life

    def on_mount(self) -> None:
        self._panel("checks").focus()
        self._review_again()

    def on_screen_resume(self) -> None:
        if self.start is None:
            self._review_again()

    def on_resize(self) -> None:
        self.call_after_refresh(self._show)

    def tick(self) -> None:
        now = time.monotonic()
        if self.reviewing:
            self._show_rows()
        elif self.review is not None and self._panel("budget").inner[0] != self._budget_width:  # a scroll bar has come or gone
            self._show()
        elif self.start is None and self.review is not None and not self.stale and now - self._looked > _LOOK:
            self._looked = now
            self.lumina.spawn(self._look_for_changes())

    def _newest_form(self) -> Form | None:
        """What the editor holds, or what was handed over, whichever was touched last."""
        forms = [self._given] if self._given is not None else []
        if self.lumina.is_screen_installed("screen-3"):
            edited = getattr(self.lumina.get_screen("screen-3"), "form", None)
            forms += [edited] if edited is not None else []
        return max(forms, key=lambda form: form.stamp, default=None)

    # the review

    def _review_again(self) -> None:
        """Review in a thread; the rows are shown as they are found."""
        self.form, self.start, self._looked = self._newest_form(), None, time.monotonic()
        checks = self._panel("checks")
        if self.form is None:
            checks.set_state(State.ERROR if self._error else State.EMPTY, self._error or "2 picks a preset")
            self.set_frame(subject="", badge="")
            return
        if self._error:
            self.lumina.notice(self._error, "error")
        self._rows, self.reviewing = {}, True
        self.set_frame(subject=say.document_name(self.form), badge="checking …", badge_role="dim")
        self.run_worker(self._look(self.form), group="review", exclusive=True)

    async def _look(self, form: Form) -> None:
        from lumina_engine.monitoring.hardware import detect

        rows = self._rows
        root = self.lumina.runs_root

        def work() -> tuple[Machine, Review]:
            machine = detect(root if root.exists() else ".")
            return machine, review(form, machine, root, lambda row: rows.update({row.label: row}))

        try:
            self.machine, self.review = await asyncio.to_thread(work)
        except (OSError, RuntimeError, ValueError) as error:  # a path of the configuration that cannot be looked at
            self.reviewing, self.review = False, None
            place = getattr(error, "filename", None) or "the check failed"
            self._panel("checks").set_state(
                State.ERROR, f"{place}: {getattr(error, 'strerror', None) or error}: r checks again"
            )
            self.set_frame(badge="not checked", badge_role="bad")
            return
        self.reviewing = False
        self._set_stale(False)
        self._show()

    async def _look_for_changes(self) -> bool:
        """Compare what was reviewed with what is there now, in a thread; True: it is still the same."""
        form, found = self.form, self.review
        if form is None or found is None:
            return False
        now = await asyncio.to_thread(lambda: fingerprint(form, form.config()))
        if found is self.review and not self.reviewing and self.start is None:
            self._set_stale(now != found.seen)
            self._show()
        return not self.stale

    # actions

    def why_not(self, action_id: str) -> str | None:
        if self.starting and action_id not in ("launch.start", "launch.copy"):
            return "it is starting"
        if action_id == "launch.reload":
            return None
        if self.form is None:
            return "nothing to launch: 2 picks a preset"
        if action_id == "launch.start":
            return self._why_no_start()
        if action_id.endswith("_finding") and not (self.review and self.review.findings):
            return "there are no findings"
        return None

    def _why_no_start(self) -> str | None:
        if self.starting:
            return None
        if self.start is not None:
            return "this start failed: r reviews again"
        if self.review is None or self.reviewing:
            return "the review is not ready yet"
        if self.stale:
            return "configuration or data changed since this review: r reviews again"
        return f"blocked: {self.review.why_blocked}" if self.review.blocked else None

    async def action_start(self) -> None:
        if self.starting:
            self._open_monitor()
            return
        found = self.review
        assert self.form is not None and found is not None
        if not await self._look_for_changes():
            self.lumina.notice("configuration or data changed since this review: r reviews again", "warning")
        elif found.warnings:
            choices = [Choice("y", "launch", "launch")]
            self.lumina.ask("Launch with warnings?", choices, lambda _: self._begin(found), found.warnings[:6])
        else:
            self._begin(found)

    def _begin(self, found: Review) -> None:
        if self.start is not None or self.review is not found:
            return
        self.start = Start(found.arguments, self.lumina.runs_root / found.name, self.lumina.start_run, self._show_start)
        self.set_frame(badge="starting", badge_role="accent")
        self._show_start()
        self.refresh_keys()
        self.lumina.spawn(self._follow(self.start))

    async def _follow(self, start: Start) -> None:
        """To the first step. Leaving the screen stops nothing."""
        await start.run()
        if start.failure is not None:
            self.set_frame(badge="failed", badge_role="bad")
            self.lumina.notice(f"{start.failure.step}: {start.failure.cause}", "error")
            self._show()
        elif self.start is start:
            if not self.is_current:
                self.lumina.notice(f"run {start.path.name} has taken its first step: 5 shows it")
            self._open_monitor()

    def _open_monitor(self) -> None:
        start, self.start = self.start, None
        if start is not None and self.is_current:
            self.lumina.open_monitor(start.path)

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
        ask_and_write(self.lumina, self.form, lambda path: self._review_again())

    def action_next_finding(self) -> None:
        self._step(1)

    def action_previous_finding(self) -> None:
        self._step(-1)

    def _step(self, step: int) -> None:
        if self.review is not None and self.review.findings:
            self.finding = (self.finding + step) % len(self.review.findings)
            self._panel("findings").focus()
            self._show()

    def action_reload(self) -> None:
        self._review_again()
