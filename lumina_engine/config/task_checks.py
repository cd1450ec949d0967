"""Rules of a mixed run: its tasks, their shares and their data."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding, error, finding, nearest
from lumina_engine.config.schema import Config, infos_of

_KEYS = ("task_weights", "task_data_paths", "task_temperature", "task_max_epochs")
MAX_TASKS = 256  # the block in which every task has its share


def tasks(config: Config) -> Iterator[Finding]:
    """Whether every task has a share and data."""
    weights, data = config.task_weights, config.task_data_paths
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            message = f"task_weights.{name} = {show(weight)}: a share must be a number above 0"
            yield error("task_weight", "task_weights", message, "give a weight above 0, or take the task out")
    if not config.multi_task:
        for name in [key for key in _KEYS if getattr(config, key) != infos_of(Config)[key].default]:
            message = f"{name} has no effect with multi_task = false"
            yield finding("warning", "tasks_off", f"{name} multi_task", message, "set multi_task=true")
        return
    if weights and data:
        yield from _same_tasks(weights, data)
    if not weights and not data:
        message = "multi_task = true, but no task is named"
        yield error(
            "no_tasks", "task_weights task_data_paths", message, "give task_weights={NAME: SHARE, …} or task_data_paths"
        )
    elif len(weights or data) > MAX_TASKS:
        message = f"{len(weights or data)} tasks: at most {MAX_TASKS} can be mixed"
        yield error("many_tasks", "task_weights task_data_paths", message, "join some of them")
    for name, value in data.items():
        if not value or not all(value if isinstance(value, list) else [value]):
            message = f"task_data_paths.{name} names no file"
            yield error("task_path", "task_data_paths", message, "give a file, folder, glob or list of them")
    if data and config.train_data_path is not None:
        message = "train_data_path is not read: with task_data_paths each task has its own data"
        yield error("task_train_path", "train_data_path task_data_paths", message, "set train_data_path=null")


def _same_tasks(weights: dict[str, float], data: dict[str, str | list[str]]) -> Iterator[Finding]:
    """A path without a weight, or a weight without a path."""
    for key, other, names, known in (
        ("task_weights", "task_data_paths", weights, data),
        ("task_data_paths", "task_weights", data, weights),
    ):
        for name in names:
            if name not in known:
                near = nearest(name, known)
                fix = f"did you mean {near}?" if near else f"add {name} to {other}, or take it out of {key}"
                yield error("task_names", f"{key} {other}", f"{key} has the task {name}, {other} has not", fix)


def train_paths(config: Config) -> dict[str, str | list[str] | None]:
    """What a run trains on, by the name of its key; with `task_data_paths` there is one for each task."""
    if config.multi_task and config.task_data_paths:
        return {f"task_data_paths.{name}": value for name, value in config.task_data_paths.items()}
    return {"train_data_path": config.train_data_path}
