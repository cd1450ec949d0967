"""The list of runs as the command line and the terminal show it: figures from the end of each log, filter, order, JSON.

Nothing here reads a whole log: `Tail` looks at its last bytes once, and from then on only at what was added.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..monitoring import record as rec
from ..monitoring.log import LogReader, last_records, whole_length
from .directory import RunDirectory, RunInfo

NEAR_END = 1 << 18  # bytes of a log that are looked at first
FARTHER = 1 << 20  # bytes that are searched for the newest step if it is not there
KEPT = 400  # newest steps
WEIGHT = 0.9  # of the smoothed loss
_SPEED_STEPS = 100  # steps whose mean time tells how long the rest takes
_TYPES = ("step", "rewind", "alert", "checkpoint", "hardware")


@dataclass(frozen=True)
class Figures:
    """What the end of a log says. `alerts` are warnings and critical ones there, oldest first; losses in nats per token."""

    last: rec.Step | None = None
    losses: tuple[float, ...] = ()
    smoothed_loss: float | None = None
    step_time: float | None = None  # s, mean of the newest steps
    alerts: tuple[rec.Alert, ...] = ()
    checkpoint: rec.Checkpoint | None = None
    hardware: rec.Hardware | None = None


class Tail:
    """Follows the end of one log. Not safe from two threads at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: LogReader | None = None
        self._restarts = 0
        self._forget()

    def _forget(self) -> None:
        self._steps: deque[rec.Step] = deque(maxlen=KEPT)
        self._rewound: rec.Step | None = None  # where a rewind went, until steps follow
        self._alerts: deque[rec.Alert] = deque(maxlen=KEPT)
        self._checkpoint: rec.Checkpoint | None = None
        self._hardware: rec.Hardware | None = None

    def figures(self) -> Figures:
        """Read what is new and sum it up.

        Raises:
            OSError: the log is there but cannot be read.
        """
        if self._reader is None:
            end = whole_length(self._path)
            near = last_records(self._path, None, _TYPES, within=NEAR_END, end=end)
            if not any(isinstance(record, rec.Step) for record in near):  # long records of experts, or nothing but alerts
                near = last_records(self._path, 1, ("step", "rewind"), within=FARTHER, end=end) + near
            for record in near:
                self._take(record)
            self._reader = LogReader(self._path, end)
        while records := self._reader.read_new():
            if self._reader.restarts != self._restarts:  # another file in its place
                self._restarts = self._reader.restarts
                self._forget()
            for record in records:
                self._take(record)
        return self._sum()

    def _take(self, record: rec.Record) -> None:
        if isinstance(record, rec.Step):
            self._steps.append(record)
            self._rewound = None
        elif isinstance(record, rec.Rewind):
            while self._steps and self._steps[-1].step > record.to_step:
                self._steps.pop()
            self._rewound = rec.Step(step=record.to_step)
        elif isinstance(record, rec.Alert) and record.severity != "info":
            self._alerts.append(record)
        elif isinstance(record, rec.Checkpoint) and not record.failed:
            self._checkpoint = record
        elif isinstance(record, rec.Hardware):
            self._hardware = record

    def _sum(self) -> Figures:
        losses = tuple(step.loss for step in self._steps if step.loss is not None)
        times = [step.step_time for step in list(self._steps)[-_SPEED_STEPS:] if step.step_time is not None]
        return Figures(
            last=self._rewound or (self._steps[-1] if self._steps else None),
            losses=losses,
            smoothed_loss=smoothed(losses),
            step_time=sum(times) / len(times) if times else None,
            alerts=tuple(self._alerts),
            checkpoint=self._checkpoint,
            hardware=self._hardware,
        )


def smoothed(values: Iterable[float], weight: float = WEIGHT) -> float | None:
    """The debiased exponential mean at the last value; values that are not finite do not count. None without any."""
    mean, rest = 0.0, 1.0
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            rest *= weight
    return mean / (1 - rest) if rest < 1.0 else None


def with_figures(row: RunInfo, figures: Figures) -> RunInfo:
    """A row with what the end of its log says."""
    last = figures.last
    left = None
    if row.alive and last is not None and row.total_steps and figures.step_time is not None:
        left = max(0, row.total_steps - last.step) * figures.step_time
    return replace(
        row,
        step=last.step if last is not None else None,
        loss=last.loss if last is not None else None,
        tokens_per_s=last.tokens_per_s if last is not None else None,
        smoothed_loss=figures.smoothed_loss,
        left_s=left,
        alerts=len(figures.alerts),
        critical=sum(alert.severity == "critical" for alert in figures.alerts),
    )


def run_names(root: str | os.PathLike[str]) -> list[str]:
    """Names of the folders below a root, runs or not; none if the root is not there.

    Raises:
        OSError: it is there but cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []


def listed(root: str | os.PathLike[str]) -> list[RunInfo]:
    """Every run below a root with its figures, ordered by age."""
    rows = []
    for name in run_names(root):
        run = RunDirectory(Path(root) / name)
        if os.path.lexists(run.identity_path):
            rows.append(filled(run.head(), Tail(run.metrics_path)))
    return ordered(rows, "age")


def filled(row: RunInfo, tail: Tail) -> RunInfo:
    """A row with the figures of its tail; a log that cannot be read is the reason of a row that has none."""
    try:
        return with_figures(row, tail.figures())
    except OSError as error:
        return replace(row, alerts=0, critical=0, reason=row.reason or f"metrics.jsonl: {error.strerror or error}")


SORTS: Mapping[str, Callable[[RunInfo], tuple[Any, ...]]] = {
    # living runs in the order of their making, so that they keep their places; the others by the age of their last record
    "age": lambda row: (
        not row.alive,
        row.age_s is None,
        0.0 if row.alive else row.age_s or 0.0,
        -(row.created or 0),
        row.name,
    ),
    "name": lambda row: (row.name,),
    "state": lambda row: (row.state, row.name),
    "loss": lambda row: (_unknown(row.smoothed_loss), row.smoothed_loss or 0.0, row.name),
    "alerts": lambda row: (-(row.critical or 0), -(row.alerts or 0), row.name),
}
NEEDS_FIGURES = frozenset({"loss", "alerts"})  # orders that need the figures of every row


def _unknown(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def ordered(rows: Iterable[RunInfo], order: str) -> list[RunInfo]:
    """Rows by one of SORTS."""
    return sorted(rows, key=SORTS[order])


def matches(row: RunInfo, words: str) -> bool:
    """Whether a row has all words of a filter: `state:x`, `preset:x`, `name:x`, or a part of the name."""
    fields = {"state": row.state, "preset": row.preset or "", "name": row.name}
    for word in words.lower().split():
        field, _, wanted = word.rpartition(":")
        text = fields.get(field, "") if field else row.name
        if wanted not in text.lower():
            return False
    return True


def row_dict(row: RunInfo) -> dict[str, Any]:
    """A row for JSON and CSV; what leads to the process (pid, socket) is left out."""
    fields = {name: value for name, value in dataclasses.asdict(row).items() if name not in ("pid", "socket")}
    return {**fields, "path": str(row.path)}
