"""Everything known about one run, built from its records: series for charts, newest values, events. No widget in here.

Widgets hold a `RunStore` and compare version counters; the feed calls `apply`. Histories live in numpy columns that are only
appended to, or cut by a rewind.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import compress, count, repeat
from operator import attrgetter, is_not
from typing import Any

import numpy as np

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.experts import LayerLoad, layers_of
from lumina_engine.monitoring.reduce import thin
from lumina_engine.monitoring.resume_words import resume_words

from .history import BASES, EVAL_METRICS, EXPERT_METRICS, RECENT, STEP_METRICS, Base, History
from .routing import RoutingHistory
from .step_rows import StepRows, column
from .stretches import Read

_SEQ, _INC, _STEP = attrgetter("seq"), attrgetter("inc"), attrgetter("step")
MAX_NAMES = 10_000  # series of one kind that are kept of a log
_MANY = 16  # steps in a row that are worth a look at all of them together
_MAX_TAILS = 16
_TAIL_POINTS = 4096


@dataclass(frozen=True)
class Event:
    """Something on the X axis. `sign`: C checkpoint, ! alert, D change, < rewind, | new incarnation."""

    step: int
    sign: str
    text: str
    t: float


@dataclass(frozen=True)
class Tail:
    """What a rewind cut off: values of each metric over each X base, thinned."""

    x: dict[Base, np.ndarray]
    metrics: dict[str, np.ndarray]

    @property
    def step(self) -> np.ndarray:
        return self.x["step"]


@dataclass
class RunStore:
    """One run as far as it has been read."""

    steps: History = field(default_factory=lambda: History([metric.name for metric in STEP_METRICS]))
    evals: History = field(default_factory=lambda: History([metric.name for metric in EVAL_METRICS]))
    experts: History = field(default_factory=lambda: History([*(metric.name for metric in EXPERT_METRICS), "layers"]))
    routing: RoutingHistory = field(default_factory=RoutingHistory)
    layers: dict[int, LayerLoad] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    alerts: list[rec.Alert] = field(default_factory=list)
    checkpoints: list[rec.Checkpoint] = field(default_factory=list)
    tails: list[Tail] = field(default_factory=list)
    task_losses: dict[str, float] = field(default_factory=dict)  # of the newest evaluation
    hardware: rec.Hardware | None = None
    usage: dict[str, deque[float]] = field(default_factory=dict)
    answers: dict[str, rec.Record] = field(default_factory=dict)

    state: str = ""
    state_since: float = 0.0
    reason: str | None = None
    exit_code: int | None = None
    total_steps: int | None = None
    total_tokens: int | None = None
    world: int | None = None
    inc: int = 0
    epoch: int = 0
    skipped: int = 0
    seq: int = 0
    t: float = 0.0
    newest: str = ""  # what the newest record was, in words
    refused_names: bool = False  # there were more names than MAX_NAMES
    preview: bool = False  # a part of the log stands for the whole: spikes may be missing

    version: int = 0
    expert_version: int = 0
    hardware_version: int = 0
    event_version: int = 0
    state_version: int = 0

    # taken together at the end of a batch: one array operation instead of one for each record
    _rows: list[rec.Step] = field(default_factory=list)
    _evals: list[rec.Eval] = field(default_factory=list)
    _experts: list[rec.Experts] = field(default_factory=list)
    _t_before: float | None = None

    # reading

    def become(self, other: RunStore) -> None:
        """Take over all that another store has; nobody may use that one any more. Every version is a new one."""
        parts = ("steps", "evals", "experts", "routing")
        versions = {name: getattr(self, name) for name in vars(self) if name.endswith("version")}
        inner = {name: getattr(self, name).version for name in parts}
        vars(self).update(vars(other))
        for name, version in versions.items():
            setattr(self, name, max(version, getattr(self, name)) + 1)
        for name, version in inner.items():
            part = getattr(self, name)
            part.version = max(version, part.version) + 1

    def apply(self, records: Iterable[rec.Record]) -> None:
        """Take records in the order of their `seq`; those seen before are passed over."""
        before = self.seq
        records = list(records)
        at = 0
        others = compress(count(), map(is_not, map(type, records), repeat(rec.Step)))
        for stop in [*others, len(records)]:
            self._take_steps(records[at:stop])  # type: ignore[arg-type]
            if stop < len(records) and records[stop].seq > self.seq:
                self.seq = records[stop].seq
                if records[stop].inc > self.inc:
                    self._begin(records[stop])
                self._sort(records[stop])
            at = stop + 1
        self._flush()
        if self.seq != before:
            self.version += 1
            self.newest = _words(next(record for record in reversed(records) if record.seq == self.seq))

    def apply_stretch(self, stretch: Read) -> bool:
        """Take a stretch of the log that another process has read; False, with nothing taken, if it is not what comes next.

        Its evaluations and routing are taken with the next steps (or `apply`), since where they lie on an axis is known then.
        """
        head, steps = stretch.head, stretch.steps
        self._flush_rows()
        back = steps is not None and self.step is not None and int(steps.step_N[0]) <= self.step
        if back or head.first != self.seq + 1 or head.inc != self.inc:
            return False
        if steps is not None:
            self._extend(steps)
        self._flush()
        for record in stretch.others:
            self.seq = record.seq
            self._sort(record)
        self.seq, self.t = head.last, head.t or self.t
        self.version += 1
        last = stretch.others[-1] if stretch.others and stretch.others[-1].seq == head.last else None
        self.newest = _words(last) if last is not None else f"step {int(self.steps.step.values[-1]):,}"
        return True

    def _take_steps(self, rows: list[rec.Step]) -> None:
        if self._regular(rows):
            self._rows += rows
            self.seq, self.t = rows[-1].seq, rows[-1].t or self.t
            return
        for row in rows:
            if row.seq <= self.seq:
                continue
            self.seq = row.seq
            if row.inc > self.inc:
                self._begin(row)
            if self.step is not None and row.step <= self.step:  # a value per step: what comes later in the file holds
                self._flush()
                self._rewind(row.step - 1)
            self._rows.append(row)
            self.t = row.t or self.t

    def _regular(self, rows: list[rec.Step]) -> bool:
        """Whether these are the next records and the next steps of the same incarnation: then they need no look at each."""
        if len(rows) < _MANY or (self.step is not None and rows[0].step <= self.step):
            return False
        seq, step = self.seq + 1, rows[0].step
        return (
            list(map(_SEQ, rows)) == list(range(seq, seq + len(rows)))
            and list(map(_STEP, rows)) == list(range(step, step + len(rows)))
            and set(map(_INC, rows)) == {self.inc}
        )

    def _begin(self, record: rec.Record) -> None:
        """A new incarnation starts with this record."""
        self._flush()
        if self.inc and self.step is not None:
            self._event(Event(self.step, "|", f"start {record.inc}", record.t))
        self.inc, self._t_before = record.inc, None

    def _sort(self, record: rec.Record) -> None:
        """Keep what can wait for the end of the batch, take the rest now."""
        self.t = record.t or self.t
        match record:
            case rec.Eval():
                self._evals.append(record)
            case rec.Experts():
                self._experts.append(record)
            case rec.Rewind():
                self._flush()
                self._rewind(record.to_step)
                self._event(Event(record.to_step, "<", record.reason or f"back to step {record.to_step}", record.t))
            case _:
                self._take(record)

    def _take(self, record: rec.Record) -> None:
        identity = getattr(record, "id", None)
        if identity:
            self.answers[identity] = record
        match record:
            case rec.Run():
                self._take_run(record)
            case rec.Hardware():
                self._take_hardware(record)
            case rec.Checkpoint():
                self._take_checkpoint(record)
            case rec.Alert():
                self.alerts.append(record)
                self._event(Event(record.step if record.step is not None else self.step or 0, "!", record.message, record.t))
            case rec.Resume():
                self._event(Event(record.step, "|", ". ".join(resume_words(record)), record.t))
            case rec.Change():
                text = f"{record.what} {_plain(record.before)} to {_plain(record.after)}"
                if record.by == "adaptive":
                    text += f", by itself: {record.reason}" if record.reason else ", by itself"
                self._event(Event(record.step if record.step is not None else self.step or 0, "D", text, record.t))

    def _take_run(self, record: rec.Run) -> None:
        if record.state != self.state:
            self.state_since = record.t
        self.state, self.reason, self.exit_code = record.state, record.reason, record.exit_code
        self.total_steps = record.total_steps if record.total_steps is not None else self.total_steps
        self.total_tokens = record.total_tokens if record.total_tokens is not None else self.total_tokens
        self.world = record.world if record.world is not None else self.world
        self.state_version += 1

    def _take_checkpoint(self, record: rec.Checkpoint) -> None:
        self.checkpoints.append(record)
        text = f"not saved: {record.failed}" if record.failed else f"saved{' (best)' if record.best else ''}"
        self._event(Event(record.step, "!" if record.failed else "C", text, record.t))

    def _take_experts(self, record: rec.Experts) -> None:
        self.layers.update(
            {number: load for number, load in layers_of(record) if self._has_room(self.layers, number, record.t)}
        )
        self.expert_version += 1

    def _take_hardware(self, record: rec.Hardware) -> None:
        self.hardware = record
        values: dict[str, float | None] = {"cpu": record.cpu}
        if record.memory_used is not None and record.memory_total:
            values["memory"] = 100.0 * record.memory_used / record.memory_total
        for device in record.devices:
            values[f"gpu{device.index}"] = device.utilisation
        for name, value in values.items():
            if not self._has_room(self.usage, name, record.t):
                continue
            self.usage.setdefault(name, deque(maxlen=512)).append(math.nan if value is None else value)
        self.hardware_version += 1

    def _has_room(self, kept: Mapping[Any, object], name: object, t: float) -> bool:
        """Whether a series of this name may be kept: a log that brings ever new ones costs no more memory, and one warning."""
        if name in kept or len(kept) < MAX_NAMES:
            return True
        if not self.refused_names:
            self.refused_names = True
            message = f"the log names more than {MAX_NAMES:,} series: the others are not shown"
            self._take(rec.Alert(severity="warning", code="too_many_names", message=message, t=t, seq=self.seq))
        return False

    def _take_eval(self, record: rec.Eval) -> None:
        history = self.evals
        if len(history) and record.step <= int(history.step.values[-1]):
            history.truncate(int(np.searchsorted(history.step.values, record.step)))
        tokens, hours, clock = (np.array([self.x_of(record.step, base)]) for base in BASES[1:])
        values = {name: column(attrgetter(name), [record]) for name in history.metrics}
        history.extend(np.array([record.step]), tokens, hours, values, clock)
        self.task_losses = record.tasks or {}

    def _flush_rows(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self._extend(StepRows.of(rows))

    def _flush(self) -> None:
        self._flush_rows()
        evals, self._evals = self._evals, []
        for evaluation in evals:
            self._take_eval(evaluation)
        experts, self._experts = self._experts, []
        if experts:
            self._extend_experts(experts)

    def _extend(self, rows: StepRows) -> None:
        tokens_N = rows.tokens_N
        if len(self.steps):
            tokens_N = np.maximum(tokens_N, self.steps.tokens.values[-1])
        self.steps.extend(rows.step_N, np.maximum.accumulate(tokens_N), self._hours(rows), dict(rows.values), rows.clock_N)
        self.epoch = rows.epoch
        self.skipped += rows.skipped

    def _extend_experts(self, records: list[rec.Experts]) -> None:
        for newest in {tuple(record.layers): record for record in records}.values():
            self._take_experts(newest)
        rows = self.routing.extend(records)
        history, size = self.experts, len(rows.step_N)
        values = [rows.imbalance_N, rows.entropy_N, rows.dropped_N, rows.layers_N.astype(np.float64)]
        if size and len(history) and int(rows.step_N[0]) <= int(history.step.values[-1]):
            if int(rows.step_N[0]) == int(history.step.values[-1]):  # the other layers of the same step
                before = [float(history.metrics[name].values[-1]) for name in history.metrics]
                _mix(values, before)
            history.truncate(int(np.searchsorted(history.step.values, int(rows.step_N[0]))))
        if size:
            tokens, hours, clock = (self.xs_of(rows.step_N, base) for base in BASES[1:])
            columns = {name: column.astype(np.float32) for name, column in zip(history.metrics, values, strict=True)}
            history.extend(rows.step_N, tokens, hours, columns, clock)

    def _hours(self, rows: StepRows) -> np.ndarray:
        """Hours of training up to each row. Steps between two rows are taken to last as long as the later one; where a
        step's time is unknown, the time since the row before counts."""
        step_N, clock_N = rows.step_N, rows.clock_N
        before = int(self.steps.step.values[-1]) if len(self.steps) else max(int(step_N[0]) - 1, -(2**63))
        spent = rows.values["step_time"].astype(np.float64) * np.diff(step_N, prepend=before)
        unknown = np.flatnonzero(~np.isfinite(spent))
        if len(unknown):
            spent[unknown] = np.diff(clock_N, prepend=clock_N[0] if self._t_before is None else self._t_before)[unknown]
        self._t_before = float(clock_N[-1])
        start = float(self.steps.hours.values[-1]) if len(self.steps) else 0.0
        # summed from the first row on, so that it does not matter where a batch ends
        return np.cumsum(np.append(start, np.maximum(spent, 0.0) / 3600.0))[1:]

    def _rewind(self, to_step: int) -> None:
        history = self.steps
        size = int(np.searchsorted(history.step.values, to_step, side="right"))
        if size < len(history):
            cut = {name: _thin(pyramid.values[size:]) for name, pyramid in history.metrics.items()}
            x = {base: _thin(history.x(base)[size:]) for base in BASES}
            self.tails = [*self.tails, Tail(x, cut)][-_MAX_TAILS:]
            history.truncate(size)
        for sparse in (self.evals, self.experts):
            sparse.truncate(int(np.searchsorted(sparse.step.values, to_step, side="right")))
        self.routing.truncate(to_step)
        self.checkpoints = [item for item in self.checkpoints if item.step <= to_step]
        self._t_before = None

    def _event(self, event: Event) -> None:
        bisect.insort(self.events, event, key=lambda item: item.step)
        self.event_version += 1

    # asking

    @property
    def step(self) -> int | None:
        """The newest step."""
        if self._rows:
            return self._rows[-1].step
        return int(self.steps.step.values[-1]) if len(self.steps) else None

    @property
    def tokens(self) -> int | None:
        """Tokens processed so far."""
        return int(self.steps.tokens.values[-1]) if len(self.steps) else None

    @property
    def final(self) -> bool:
        """Whether the run says that it has ended."""
        return self.state in rec.FINAL_STATES

    def x_of(self, step: int, base: Base) -> float:
        """Where a step lies on an X axis."""
        return float(self.xs_of(np.array([step]), base)[0])

    def xs_of(self, step_N: np.ndarray, base: Base) -> np.ndarray:
        """Where steps lie on an X axis, as float64: between two known ones on the line from one to the other."""
        if base == "step" or not len(self.steps):
            return step_N.astype(np.float64)
        known, xs = self.steps.step.values, self.steps.x(base)  # long: only the places that are asked for are touched
        before_N = np.clip(np.searchsorted(known, step_N, side="right") - 1, 0, len(known) - 1)
        after_N = np.minimum(before_N + 1, len(known) - 1)
        share_N = np.clip((step_N - known[before_N]) / np.maximum(known[after_N] - known[before_N], 1), 0.0, 1.0)
        return xs[before_N] + share_N * (xs[after_N] - xs[before_N])

    def history(self, metric: str) -> History:
        """The history that has a metric of a chart: every step's, or the routing's with an own row per observation."""
        return self.steps if metric in self.steps.metrics else self.experts

    def seconds_per_step(self) -> float | None:
        """Mean time of the newest steps, in seconds; None before any."""
        return self.steps.mean("step_time")

    def seconds_left(self) -> float | None:
        """Time to the last step at the present rate; None if either is unknown."""
        each, step = self.seconds_per_step(), self.step
        if each is None or step is None or self.total_steps is None:
            return None
        return max(0, self.total_steps - step) * each

    def median_step_time(self) -> float | None:
        """Median time of the newest steps, in seconds."""
        values = self.steps.metrics["step_time"].values[-RECENT:]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    def longest_save(self) -> float:
        """The longest time the newest checkpoints made training wait, in seconds."""
        return max((item.blocking or item.seconds or 0.0 for item in self.checkpoints[-5:]), default=0.0)


def _mix(values: list[np.ndarray], before: list[float]) -> None:
    """Add what was known of the first row's step: the worst imbalance, means weighted by layers, the sum of layers."""
    layers = before[3] + values[3][0]
    values[0][0] = np.fmax(values[0][0], before[0])
    for at in (1, 2):
        values[at][0] = (before[at] * before[3] + values[at][0] * values[3][0]) / layers
    values[3][0] = layers


def _words(record: rec.Record) -> str:
    step = getattr(record, "step", None)
    kind = {rec.Step: "step", rec.Eval: "the evaluation of step", rec.Checkpoint: "the checkpoint of step"}.get(type(record))
    if kind is not None and step is not None:
        return f"{kind} {step:,}"
    return f"a record of type {record.__struct_config__.tag}"


def _thin(values: np.ndarray) -> np.ndarray:
    return values.copy() if len(values) <= _TAIL_POINTS else thin(values, _TAIL_POINTS // 2)


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
