"""Where an edited configuration comes from and goes to: presets, files, YAML text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lumina_engine.config.finding import Finding
from lumina_engine.config.loading import text_layer
from lumina_engine.config.machine import Machine
from lumina_engine.config.schema import Config, ConfigError

from ..form import TEXT_ONLY, Form, content_of
from .base import LuminaScreen
from .config_layers import YamlView


class ConfigFiles(LuminaScreen):
    """The half of the editor that opens, reads again, writes, and shows text. `form` is what is edited."""

    def __init__(self) -> None:
        super().__init__()
        self.form: Form | None = None
        self.machine: Machine | None = None
        self._error = ""
        self._disk: float | None = None  # when the file was last changed, as we know it

    # what the other half does after a change

    def _start(self) -> None:
        """Show a form from its beginning."""

    def _show(self) -> None:
        """Draw everything from the form."""

    def _edited(self) -> None:
        """The form was changed."""

    def _open(self, preset: str | None, path: Path | None, config: Config | None, origins: Mapping[str, str] | None) -> None:
        """Take over what is to be edited. What was edited before stays one `u` away."""
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
        self._error = ""
        if self.form is not None and self.form.dirty:
            form.remember(self.form)
        self.form = form
        self._disk = _changed_at(form.path)

    def action_yaml(self) -> None:
        form = self.form
        assert form is not None
        text = form.text if form.text is not None else form.to_yaml(full=True)
        first = form.text_findings[0].where.rpartition(":")[2] if form.text_findings else "1"
        view = YamlView(
            text, self._check_text, form.path.name if form.path else "the form", int(first) if first.isdigit() else 1
        )
        self.lumina.push_screen(view, self._take_text)

    def _check_text(self, text: str) -> tuple[Sequence[Finding], bool]:
        layer = text_layer(text, "line")
        fits = not any(f.code in TEXT_ONLY for f in layer.findings)
        if not fits:
            return layer.findings, False
        return Form(content_of(layer, None)).findings(self.machine), True

    def _take_text(self, text: str | None) -> None:
        if text is not None and self.form is not None:
            self.form.apply_yaml(text)
            self._edited()

    def action_write(self) -> None:
        from .write_file import ask_and_write

        assert self.form is not None
        ask_and_write(self.lumina, self.form, self._disk, self._written)

    def _written(self, path: Path) -> None:
        self._disk = _changed_at(path)
        self._show()

    def action_reload(self) -> None:
        assert self.form is not None and self.form.path is not None
        self._open(None, self.form.path, None, None)
        self._start()

    def _check_disk(self) -> None:
        """Say once that somebody else changed the file."""
        path = self.form.path if self.form else None
        now = _changed_at(path)
        if self._disk is not None and now is not None and now != self._disk:
            self.lumina.notice(f"{path} changed on disk: r reads it again, w overwrites it", "warning")


def _changed_at(path: Path | None) -> float | None:
    try:
        return None if path is None else path.stat().st_mtime
    except OSError:
        return None
