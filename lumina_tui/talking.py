"""How the application talks to the user: notices, questions, one line of input, copied text."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from textual.app import App

from .files import write_atomic, write_new
from .paint import clean
from .places import cache_dir

if TYPE_CHECKING:
    from .screens.dialogs import Choice

TOASTS = 3  # at once
OSC52_BYTES = 8192  # what terminals and multiplexers take for certain

Severity = Literal["information", "warning", "error"]


@dataclass(frozen=True)
class Notice:
    """Something that was said to the user."""

    t: float
    severity: Severity
    text: str


class Talks(App[None], inherit_bindings=False):
    """The part of the application that speaks. Texts from outside may come as they are: they are made safe here."""

    readonly = False
    exports_folder = Path("exports")

    def __init__(self) -> None:
        super().__init__()
        self.notices: deque[Notice] = deque(maxlen=500)

    def notice(
        self, text: str, severity: Severity = "information", *, timeout: float | None = None, toast: bool = True
    ) -> None:
        """A toast that is also kept in the notices list. Outside text may come as it is.

        `toast=False` only keeps it: for what the screen on top says anyway.
        """
        text = clean(text)
        self.notices.append(Notice(time.time(), severity, text))
        if not toast:
            return
        self.notify(text, severity=severity, timeout=timeout, markup=False)
        self.call_later(self._trim_toasts)  # behind the message that shows it

    def _trim_toasts(self) -> None:
        """Leave the newest toasts only."""
        for old in list(self._notifications)[:-TOASTS]:
            self._unnotify(old)

    def ask(self, question: str, choices: Sequence[Choice], answer: Callable[[str], None], lines: Sequence[str] = ()) -> None:
        """One question that names the thing; `answer(value)` is called with the choice, not at all for Esc."""
        from .screens.dialogs import Question

        def done(value: str | None) -> None:
            if value is not None:
                answer(value)

        self.push_screen(Question(question, lines, choices), done)

    def prompt(
        self,
        question: str,
        answer: Callable[[str], None],
        *,
        value: str = "",
        lines: Sequence[str] = (),
        check: Callable[[str], str | None] = lambda text: None,
    ) -> None:
        """Ask for one line of text; `check` gives what is wrong with it, or None."""
        from .screens.dialogs import Prompt

        def done(text: str | None) -> None:
            if text is not None:
                answer(text)

        self.push_screen(Prompt(question, value, lines, check), done)

    def copy_text(self, text: str, name: str = "copied.txt") -> None:
        """Copy by OSC 52 (at most 8 KiB; no terminal answers whether it worked) and also into a file that the notice names.

        With --readonly no file is written.
        """
        short = len(text.encode("utf-8", "replace")) <= OSC52_BYTES
        if short:
            self.copy_to_clipboard(text)
        if self.readonly:
            done = "copied, if the terminal allows it" if short else "too long to copy"
            self.notice(f"--readonly: {done}; no file is written")
            return
        path = cache_dir() / name
        try:
            write_atomic(path, text)
        except OSError as error:
            self.notice(f"copied, if the terminal allows it; the file copy failed: {error}", "warning")
            return
        self.notice(f"copied; also in {path}")

    def save_export(self, stem: str, suffix: str, data: str | bytes) -> Path:
        """Write `./exports/<stem>-<time>.<suffix>` (0600; never over another file), say where in a notice, give the path.

        Raises:
            OSError: it could not be written; the message names the path. PermissionError with --readonly.
        """
        if self.readonly:
            raise PermissionError("--readonly: nothing is written")
        path = write_new(self.exports_folder, stem, suffix, data)
        self.notice(f"written to {path}")
        return path

    async def export(self, stem: str, suffix: str, make: Callable[[], str | bytes]) -> Path | None:
        """Make a file's content and write it as `save_export` does, both in a thread; None if it failed (a notice says why)."""
        if self.readonly:
            self.notice("--readonly: nothing is written", "warning")
            return None
        try:
            path = await asyncio.to_thread(lambda: write_new(self.exports_folder, stem, suffix, make()))
        except OSError as error:
            self.notice(f"not exported: {error}", "error")
            return None
        self.notice(f"written to {path}")
        return path
