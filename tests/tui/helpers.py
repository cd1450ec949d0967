"""What the terminal tests share: waiting on a condition, the screen as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


async def until(pilot: Any, condition: Callable[[], object], seconds: float = 20.0, what: str = "") -> None:
    """Let the app work until `condition()` is true.

    Raises:
        AssertionError: it did not come true in `seconds`; shows the screen.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if pilot.app._exception is not None:
            raise pilot.app._exception
        assert time.monotonic() < deadline, f"waited {seconds} s for {what or condition}\n{screen_text(pilot.app)}"
        await asyncio.sleep(0.005)
    await pilot.pause()


def screen_text(app: Any) -> str:
    """The screen on top as plain text, one line per row. The one place that uses Textual's private compositor."""
    strips = app.screen._compositor.render_strips()
    return "\n".join(strip.text for strip in strips)
