"""The losses of the tasks in words: the same for the command line and the terminal."""

from __future__ import annotations

from collections.abc import Mapping


def task_losses(tasks: Mapping[str, float | None]) -> str:
    """The loss of each task, in the order of their names."""
    return ", ".join(f"{name} {'-' if loss is None else f'{loss:.4g}'}" for name, loss in sorted(tasks.items()))
