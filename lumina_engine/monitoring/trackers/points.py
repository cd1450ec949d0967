"""Records of a run as what experiment trackers hold: named numbers at a step, and texts; and what a tracker must do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import msgspec

from .. import record as rec
from ..experts import layers_of

_COMMON = frozenset({"seq", "t", "inc", "step"})
_LAYER = ("imbalance", "entropy", "dead", "dropped", "bias_range", "confidence")


@dataclass(frozen=True, slots=True)
class Point:
    """What one record gives a tracker: `values` by name at `step`, `text` (tag, line), or a return to step `rewind`.

    `seq` is the record's number in the log and `t` its unix time in seconds.
    """

    seq: int
    t: float
    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    text: tuple[str, str] | None = None
    rewind: int | None = None


class Sink(Protocol):
    """A tracker's end of the line. Every call may raise whatever the tracker raises, or never return."""

    def write(self, points: Iterable[Point]) -> None:
        """Take these points."""

    def flush(self) -> Any:
        """Make everything taken so far durable, if the tracker can; returns what `open_sink` goes on from (JSON), or None."""

    def close(self, state: str | None) -> None:
        """Say goodbye; `state` is the run's final state, None if it goes on without this tracker."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The run as a tracker is told of it: its name and id, the tracker's folder, flat configuration."""

    name: str
    id: str
    folder: Path
    config: Mapping[str, Any]


def open_sink(name: str, subject: Subject, mark: Any) -> Sink:
    """The tracker's sink, going on from `mark`: what `flush` returned last, None for the first time.

    Raises:
        ImportError: its package is not installed. Anything else: what the tracker raises.
    """
    module = import_module(f".{name}_sink", __package__)
    sink: Sink = module.Sink(subject, mark)
    return sink


def points(records: Iterable[rec.Record], step: int) -> Iterator[Point]:
    """The points of records; those that know no step (hardware, states) get the newest one, `step` at the start."""
    for record in records:
        step = getattr(record, "step", None) or step
        if isinstance(record, rec.Rewind):
            step = record.to_step
            yield Point(record.seq, record.t, step, text=("run", f"back to step {step}"), rewind=step)
            continue
        values, text = _values(record), _text(record)
        if values or text:
            yield Point(record.seq, record.t, step, values, text)


def _numbers(record: msgspec.Struct, prefix: str) -> dict[str, float]:
    """The numeric fields of a record, flags as 0 and 1; what it does not know is left out."""
    found = {name: getattr(record, name) for name in record.__struct_fields__ if name not in _COMMON}
    return {f"{prefix}/{name}": float(value) for name, value in found.items() if isinstance(value, int | float)}


def _values(record: rec.Record) -> dict[str, float]:
    if isinstance(record, rec.Step):
        return _numbers(record, "train")
    if isinstance(record, rec.Eval):
        return _numbers(record, "eval") | {f"eval/tasks/{task}": loss for task, loss in (record.tasks or {}).items()}
    if isinstance(record, rec.Hardware):
        host = _numbers(record, "hardware")
        return host | {
            name: value
            for device in record.devices
            for name, value in _numbers(device, f"hardware/device_{device.index}").items()
            if not name.endswith("/index")
        }
    if isinstance(record, rec.Experts):
        return {
            f"experts/layer_{layer}/{name}": float(value)
            for layer, load in layers_of(record)
            for name in _LAYER
            if (value := getattr(load, name)) is not None
        }
    if isinstance(record, rec.Checkpoint) and record.failed is None:
        return {
            f"checkpoint/{name}": float(value) for name in ("bytes", "seconds", "blocking") if (value := getattr(record, name))
        }
    return {}


def _text(record: rec.Record) -> tuple[str, str] | None:
    if isinstance(record, rec.Alert):
        advice = f" — {record.recommendation}" if record.recommendation else ""
        return "alerts", f"{record.severity} {record.code}: {record.message}{advice}"
    if isinstance(record, rec.Change):
        why = f": {record.reason}" if record.reason else ""
        return "changes", f"{record.what} {record.before} -> {record.after} by {record.by or 'unknown'}{why}"
    if isinstance(record, rec.Run):
        return "run", record.state + (f": {record.reason}" if record.reason else "")
    if isinstance(record, rec.Checkpoint) and record.failed is not None:
        return "alerts", f"checkpoint failed: {record.failed}"
    return None
