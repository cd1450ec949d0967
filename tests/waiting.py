"""Waiting for other processes and threads: look again until a condition holds."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

DEADLINE = 20.0  # s; a wait that needs longer has failed


def until(condition: Callable[[], Any], what: str | Callable[[], str] = "", deadline: float = DEADLINE) -> Any:
    """Wait for a condition to hold; its value. `what` names it in the failure, or is called for a text to show there."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what() if callable(what) else what or condition}"
        select.select([], [], [], 0.01)
    return value
