"""The whole history of a run as columns, read from its log in pieces: what plots and reports are made from.

A value stands for its step once: a `rewind` to step S takes back the later ones, and a step that is written again replaces
itself and what came after it. Memory: 8 bytes a value and step; timelines keep their first and last thousand entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from . import record as rec
from .experts import LayerLoad, layers_of
from .log import LogReader
from .reduce import Buffer, smooth

SMOOTHING = 0.98  # weight of the debiased moving average in plots and reports
SPLIT = ("data_time", "forward_time", "backward_time", "optimizer_time")  # parts of step_time
STEP_METRICS = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "aux_loss", "z_loss", "step_time", *SPLIT)
EVAL_METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy")
ROUTING_METRICS = ("imbalance", "entropy", "dead", "dropped")  # worst layer: max, min; over all layers: sum, mean
_KEPT = 1000  # entries kept from the beginning, and from the end, of each timeline
_LAYER_HISTORY = 64  # observations of a layer that a rewind can go back through


class Timeline:
    """Entries in order; in the middle of a long one some are only counted."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[Any] = []
        self._last: deque[Any] = deque(maxlen=_KEPT)

    def add(self, entry: Any) -> None:
        """Append an entry."""
        self.count += 1
        (self._first if len(self._first) < _KEPT else self._last).append(entry)

    def __iter__(self) -> Iterator[Any]:
        yield from self._first
        yield from self._last

    @property
    def left_out(self) -> int:
        """Entries that are only counted."""
        return self.count - len(self._first) - len(self._last)


class Columns:
    """Values over rising steps."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._step = Buffer(np.int64)
        self._values = {name: Buffer(np.float64) for name in names}

    def __len__(self) -> int:
        return len(self._step)

    @property
    def step(self) -> np.ndarray:
        """Steps, int64 (N,)."""
        return self._step.values

    def __getitem__(self, name: str) -> np.ndarray:
        """Values of a metric, float64 (N,); NaN where one is not known."""
        return self._values[name].values

    def cut(self, to_step: int) -> None:
        """Take back what is later than a step."""
        size = int(np.searchsorted(self.step, to_step, side="right"))
        for column in (self._step, *self._values.values()):
            column.truncate(size)

    def extend(self, steps: list[int], values: dict[str, list[float | None]]) -> None:
        """Append rows whose steps rise, behind what is there."""
        self._step.extend(np.array(steps, np.int64))
        for name, column in self._values.items():
            column.extend(np.array(values[name], np.float64))  # None becomes NaN


@dataclass
class Incarnation:
    """One start of the run: unix times of its first and last record, its steps, and the last state that it told."""

    number: int
    begun: float
    ended: float
    first_step: int | None = None
    last_step: int | None = None
    state: str = ""
    reason: str | None = None


@dataclass
class History:
    """A run as its log tells it. `unreadable` has (first byte, byte after the last) of lines that are no records."""

    steps: Columns = field(default_factory=lambda: Columns((*STEP_METRICS, "tokens", "skipped")))
    evals: Columns = field(default_factory=lambda: Columns(EVAL_METRICS))
    routing: Columns = field(default_factory=lambda: Columns(ROUTING_METRICS))
    checkpoints: list[rec.Checkpoint] = field(default_factory=list)
    events: Timeline = field(default_factory=Timeline)  # alert, change, rewind, note, run, failed checkpoint
    alerts: dict[str, int] = field(default_factory=dict)  # by severity
    incarnations: dict[int, Incarnation] = field(default_factory=dict)
    hardware: rec.Hardware | None = None
    tasks: dict[str, float] = field(default_factory=dict)  # loss by task of the newest evaluation
    total_steps: int | None = None
    records: int = 0
    unreadable: list[tuple[int, int]] = field(default_factory=list)
    _layers: dict[int, deque[LayerLoad]] = field(default_factory=dict)

    @property
    def layers(self) -> dict[int, LayerLoad]:
        """The newest observation of each expert layer, by its index in the model."""
        return {index: seen[-1] for index, seen in sorted(self._layers.items()) if seen}

    def ema(self, name: str, weight: float = SMOOTHING) -> np.ndarray:
        """The debiased moving average of a step metric, float64 (N,)."""
        return smooth(self.steps[name], weight)

    def cut(self, to_step: int) -> None:
        """Take back values of later steps. Events stay: they happened."""
        for columns in (self.steps, self.evals, self.routing):
            columns.cut(to_step)
        self.checkpoints = [item for item in self.checkpoints if item.step <= to_step]
        for seen in self._layers.values():
            while seen and seen[-1].step > to_step:
                seen.pop()


def read_history(path: str | Path, beside: Callable[[list[rec.Record]], object] | None = None) -> History:
    """Read a log from its beginning to its end, a few MiB at a time. A missing file is an empty history.

    `beside` is given the records too, in their order.

    Raises:
        OSError: the file is there but cannot be read.
    """
    history = History()
    reader, taker = LogReader(path), _Taker(history)
    while records := reader.read_new():
        taker.take(records)
        if beside is not None:
            beside(records)
    history.unreadable = list(reader.errors)
    return history


_GETTERS = {name: attrgetter(name) for name in (*STEP_METRICS, "tokens", "skipped")}


class _Taker:
    """Sorts records into a history; runs of steps are taken together, an array operation instead of one for each."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._rows: list[rec.Step] = []
        self._now = Incarnation(-1, 0.0, 0.0)

    def take(self, records: list[rec.Record]) -> None:
        self.history.records += len(records)
        number, newest = self._now.number, -1
        for record in records:
            if record.inc != number:
                self._flush()
                number, newest = record.inc, -1
                self._now = self.history.incarnations.setdefault(number, Incarnation(number, record.t, record.t))
            if type(record) is rec.Step:
                if record.step <= newest:
                    self._flush()
                newest = record.step
                self._rows.append(record)
            else:
                self._flush()
                newest = -1
                self._now.ended = record.t
                self._sort(record)
        self._flush()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            steps, now = self.history.steps, self._now
            now.first_step = rows[0].step if now.first_step is None else now.first_step
            now.last_step, now.ended = rows[-1].step, rows[-1].t
            if len(steps) and rows[0].step <= int(steps.step[-1]):
                self.history.cut(rows[0].step - 1)
            values = {name: list(map(get, rows)) for name, get in _GETTERS.items()}
            steps.extend([row.step for row in rows], values)

    def _sort(self, record: rec.Record) -> None:
        history = self.history
        match record:
            case rec.Eval():
                self._replace(history.evals, record.step, {name: [getattr(record, name)] for name in EVAL_METRICS})
                history.tasks = record.tasks or {}
            case rec.Experts():
                self._experts(record)
            case rec.Hardware():
                history.hardware = record
            case rec.Checkpoint():
                if record.failed:
                    history.events.add(record)
                else:
                    history.checkpoints.append(record)
            case rec.Rewind():
                history.cut(record.to_step)
                history.events.add(record)
            case _:
                self._event(record)

    @staticmethod
    def _replace(columns: Columns, step: int, values: dict[str, list[float | None]]) -> None:
        columns.cut(step - 1)
        columns.extend([step], values)

    def _event(self, record: rec.Record) -> None:
        self.history.events.add(record)
        if isinstance(record, rec.Alert):
            self.history.alerts[record.severity] = self.history.alerts.get(record.severity, 0) + 1
        elif isinstance(record, rec.Run):
            now = self.history.incarnations[record.inc]
            now.state, now.reason = record.state, record.reason
            self.history.total_steps = record.total_steps if record.total_steps is not None else self.history.total_steps

    def _experts(self, record: rec.Experts) -> None:
        """Keep each layer; a record that was split over several lines makes one row of the curves."""
        layers = self.history._layers
        for index, layer in layers_of(record):
            seen = layers.setdefault(index, deque(maxlen=_LAYER_HISTORY))
            while seen and seen[-1].step >= record.step:
                seen.pop()
            seen.append(layer)
        now = [seen[-1] for seen in layers.values() if seen and seen[-1].step == record.step]
        self._replace(self.history.routing, record.step, {name: [value] for name, value in worst(now).items()})


def worst(layers: list[LayerLoad]) -> dict[str, float | None]:
    """Routing of all layers in one figure each: highest max/mean, lowest entropy, dead experts in all, mean dropped share."""

    def known(name: str) -> list[float]:
        return [value for layer in layers if (value := getattr(layer, name)) is not None]

    imbalance, entropy, dead, dropped = (known(name) for name in ROUTING_METRICS)
    return {
        "imbalance": max(imbalance, default=None),
        "entropy": min(entropy, default=None),
        "dead": sum(dead) if dead else None,
        "dropped": sum(dropped) / len(dropped) if dropped else None,
    }


def reduced(step_N: np.ndarray, values_N: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """A long series in at most `columns` columns (C), exact: each spike is a minimum or a maximum.

    Returns `step` (the last of each column, int64 (C,)), `min`, `max`, `mean` of its finite values (float64 (C,), NaN without
    one) and `missing` (values that are not finite, int64 (C,)).
    """
    count = min(columns, len(step_N))
    if not count:
        empty = np.empty(0)
        return {"step": np.empty(0, np.int64), "min": empty, "max": empty, "mean": empty, "missing": np.empty(0, np.int64)}
    edges = np.linspace(0, len(step_N), count + 1).astype(np.int64)
    finite_N = np.isfinite(values_N)
    clean_N = np.where(finite_N, values_N, np.nan)
    good_C = np.add.reduceat(finite_N.astype(np.int64), edges[:-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_C = np.add.reduceat(np.where(finite_N, values_N, 0.0), edges[:-1]) / good_C
    return {
        "step": step_N[edges[1:] - 1],
        "min": np.fmin.reduceat(clean_N, edges[:-1]),
        "max": np.fmax.reduceat(clean_N, edges[:-1]),
        "mean": np.where(good_C > 0, mean_C, np.nan),
        "missing": np.diff(edges) - good_C,
    }
