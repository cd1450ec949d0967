"""Asking for a path, with completion as in a shell."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input, Static

from ..paint import clean
from ..path_completion import complete
from .dialogs import Prompt

_NAMES = 8  # possible names shown


class PathPrompt(Prompt):
    """One path. Tab completes it; the names that it may go on with stand below."""

    scope = "path"
    hint = "Enter ok  Tab completes  Esc back"

    def extra(self) -> Iterable[Widget]:
        yield Static("", id="names", markup=False)

    async def action_complete(self) -> None:
        field = self.query_one(Input)
        text, names = await asyncio.to_thread(complete, field.value)
        if self.is_attached:
            field.value, field.cursor_position = text, len(text)
            more = f"  … {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
            shown = "  ".join(clean(name) for name in names[:_NAMES]) + more if len(names) > 1 else ""
            self.query_one("#names", Static).update(Content(shown))
