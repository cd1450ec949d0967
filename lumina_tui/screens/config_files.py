"""Where an edited configuration comes from and goes to: presets, files, YAML text, drafts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lumina_engine.config.finding import Finding
from lumina_engine.config.loading import text_layer
from lumina_engine.config.machine import Machine
from lumina_engine.config.schema import Config, ConfigError

from .. import config_text as say
from ..drafts import load_draft, save_draft
from ..form import TEXT_ONLY, Form, content_of, named_preset
from .base import LuminaScreen
from .config_layers import YamlView

_LOOK = 2.0  # s between two looks at the file
STALE = {
    "same": "",
    "changed": "changed on disk: r reload, w overwrite, d diff",
    "gone": "gone from disk: w writes it again",
}


class ConfigFiles(LuminaScreen):
    """The half of the editor that opens, reads again, writes, and shows text. `form` is what is edited."""

    def __init__(self) -> None:
        super().__init__()
        self.form: Form | None = None
        self.machine: Machine | None = None
        self.disk = "same"  # how the file stands to what was read or written
        self._error = ""
        self._looked = 0.0
        self._looking = False

    # what the other half does after a change

    def _start(self) -> None:
        """Show a form from its beginning."""

    def _show(self) -> None:
        """Draw everything from the form."""

    def _edited(self) -> None:
        """The form was changed."""

    def _open(self, preset: str | None, path: Path | None, config: Config | None, origins: Mapping[str, str] | None) -> None:
        """Take over what is to be edited. What was edited before stays one `u` away, a draft of an earlier session too."""
        try:
            if config is not None:
                form = Form.from_config(config, origins, preset)
            elif path is not None:
                form = Form.from_file(path)
            else:
                form = Form.from_preset(str(preset))
        except ConfigError as error:
            self._error = str(error)
            return
        self._error, self.disk = "", "same"
        if self.form is None:
            draft = load_draft()
            self.form = draft if draft is not None and (draft.dirty or draft.pending is not None) else None
        if self.form is None:
            self.form = form
            return
        left = say.document_name(self.form) if self.form.dirty else ""
        self.form.load(form)
        if left:
            self.lumina.notice(f"{left} was not written: u brings it back")

    def keep_draft(self) -> None:
        """Keep what is edited, so that a lost line loses nothing."""
        try:
            if self.form is not None:
                save_draft(self.form)
        except OSError as error:
            self.lumina.notice(f"the draft cannot be kept: {error.strerror or error}", "warning")

    # YAML

    def action_yaml(self) -> None:
        form = self.form
        assert form is not None
        text = form.text if form.text is not None else form.to_yaml(full=True)
        first = form.text_findings[0].where.rpartition(":")[2] if form.text_findings else "1"
        line = int(first) if first.isdecimal() else 1
        name = form.path.name if form.path else "the form"
        view = YamlView(text, self._check_text, keep=self._keep_text, pending=form.pending, heading=name, line=line)
        self.lumina.push_screen(view, self._take_text)

    def _check_text(self, text: str) -> tuple[Sequence[Finding], bool]:
        layer = text_layer(text, "line")
        if any(f.code in TEXT_ONLY for f in layer.findings):
            return layer.findings, False
        return Form(content_of(layer, named_preset(text))).findings(self.machine), True

    def _keep_text(self, text: str | None) -> None:
        if self.form is not None and self.form.pending != text:
            self.form.pending = text
            self.keep_draft()

    def _take_text(self, text: str | None) -> None:
        if text is not None and self.form is not None:
            self.form.apply_yaml(text)
            self._edited()

    # the file

    def action_write(self) -> None:
        from .write_file import ask_and_write

        assert self.form is not None
        ask_and_write(self.lumina, self.form, self._written)

    def action_save_preset(self) -> None:
        from .write_file import ask_and_save_preset

        assert self.form is not None
        ask_and_save_preset(self.lumina, self.form, self._written)

    def _written(self, path: Path) -> None:
        self.disk = "same"
        self.keep_draft()
        self._show()

    def action_reload(self) -> None:
        assert self.form is not None and self.form.path is not None
        self._open(None, self.form.path, None, None)
        if self._error:
            self.lumina.notice(self._error, "error")
        self._start()

    def action_diff(self) -> None:
        from .sheets import lines_sheet

        form = self.form
        assert form is not None
        base = say.base_name(form)
        lines = say.diff_lines(form.changes(), base)
        if self.disk == "changed" and form.path is not None:
            lines = [*say.disk_lines(form, form.path), (("", "text"),), ((f"against {base}", "title"),), *lines]
        self.lumina.push_screen(lines_sheet(f"{len(form.changes())} changes against {base}", lines))

    def tick(self) -> None:
        now = time.monotonic()
        if self.form is not None and not self._looking and now - self._looked > _LOOK:
            self._looked = now
            self.lumina.spawn(self.look_at_file())

    async def look_at_file(self) -> None:
        """See whether somebody else changed the file; said once in a notice, and in the frame for as long as it is so."""
        form = self.form
        if form is None or self._looking:
            return
        self._looking = True
        try:
            state = await asyncio.to_thread(form.disk_state)
        finally:
            self._looking = False
        if form is self.form and state != self.disk:
            self.disk = state
            if STALE[state]:
                self.lumina.notice(f"{form.path} {STALE[state]}", "warning")
            self._show()
