"""When the program itself fails: a few lines that say so, the details in a private file, and never a screen of source code."""

from __future__ import annotations

import traceback

from rich.text import Text
from textual.app import App

from lumina_engine.text import safe_text

from .files import write_new
from .places import state_dir


class Defects(App[None], inherit_bindings=False):
    """Replaces Textual's last words (a traceback with the values of local variables, which may be anybody's text)."""

    def _fatal_error(self) -> None:
        error = self._exception
        assert error is not None
        what = safe_text(f"{type(error).__name__}: {error}").replace("\n", " ")[:300]
        lines = [f"lumina failed: {what}", "Runs and chat servers go on; start lumina again to watch them."]
        try:
            text = "".join(traceback.format_exception(error))
            lines.append(f"Details for a report: {write_new(state_dir() / 'defects', 'lumina', 'txt', text)}")
        except OSError as refused:
            lines.append(f"The details could not be written: {refused.strerror or refused}")
        if "debug" in self.features:
            super()._fatal_error()
        self._exit_renderables.insert(0, Text("\n".join(lines), overflow="fold"))
        self._close_messages_no_wait()
