"""Everything known about one run, built from its records: series for charts, newest values, events. No widget in here.

Widgets hold a `RunStore` and compare version counters; the feed calls `apply`. Histories live in numpy columns that are only
appended to, or cut by a rewind.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.reduce import Buffer, Pyramid, Smooth, thin

Base = Literal["step", "tokens", "hours"]
BASES: tuple[Base, ...] = ("step", "tokens", "hours")


@dataclass(frozen=True)
class Metric:
    """How a series is named and reduced. `keep` is what a narrow column shows: its mean, or its maximum; a series that is
    not `noisy` (the learning rate) is shown as it is: without smoothing, in its whole range."""

    name: str
    label: str
    unit: str = ""
    keep: Literal["mean", "max"] = "mean"
    noisy: bool = True


STEP_METRICS = (
    Metric("loss", "loss", "nats per token"),
    Metric("tokens_per_s", "tokens/s", "tokens/s"),
    Metric("grad_norm", "grad norm", "", "max"),
    Metric("lr", "learning rate", noisy=False),
    Metric("aux_loss", "balance loss"),
    Metric("z_loss", "z loss", "", "max"),
    Metric("step_time", "step time", "s", "max"),
    Metric("mfu", "MFU", "share of peak"),
)
EVAL_METRICS = (Metric("loss", "eval loss"), Metric("perplexity", "perplexity"), Metric("accuracy", "accuracy"))
METRICS = {metric.name: metric for metric in STEP_METRICS}

_MAX_TAILS = 16
_TAIL_POINTS = 4096
_RECENT = 100  # steps that rates and the time left are taken from


@dataclass(frozen=True)
class Event:
    """Something on the X axis. `sign`: C checkpoint, ! alert, D change, < rewind, | new incarnation."""

    step: int
    sign: str
    text: str
    t: float


class History:
    """Values over steps: one X column per base, one pyramid per metric, cut together."""

    def __init__(self, names: Sequence[str]) -> None:
        self.step = Buffer(np.int64)
        self.tokens = Buffer(np.float64)
        self.hours = Buffer(np.float64)
        self.metrics: dict[str, Pyramid] = {name: Pyramid() for name in names}
        self.version = 0
        self._smooth: dict[tuple[str, float], Smooth] = {}

    def __len__(self) -> int:
        return len(self.step)

    def x(self, base: Base) -> np.ndarray:
        """The X column of a base; never falls."""
        buffer = {"step": self.step, "tokens": self.tokens, "hours": self.hours}[base]
        return buffer.values

    def smooth(self, name: str, weight: float) -> Pyramid:
        """The debiased moving average of a metric over its whole history."""
        found = self._smooth.get((name, weight))
        if found is None:
            for old in [key for key in self._smooth if key[0] == name]:
                del self._smooth[old]
            found = self._smooth[(name, weight)] = Smooth(weight)
        found.catch_up(self.metrics[name].values)
        return found.pyramid

    def extend(self, step: np.ndarray, tokens: np.ndarray, hours: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Append rows; `step` rises."""
        self.step.extend(step)
        self.tokens.extend(tokens)
        self.hours.extend(hours)
        for name, pyramid in self.metrics.items():
            pyramid.extend(values[name])
        self.version += 1

    def truncate(self, size: int) -> None:
        """Keep the first `size` rows."""
        if size >= len(self):
            return
        for (name, _), smooth in self._smooth.items():
            smooth.truncate(size, self.metrics[name].values)
        for column in (self.step, self.tokens, self.hours):
            column.truncate(size)
        for pyramid in self.metrics.values():
            pyramid.truncate(size)
        self.version += 1

    def last(self, name: str) -> float | None:
        """The newest value of a metric, also if it is not finite (as NaN); None without any."""
        values = self.metrics[name].values
        return float(values[-1]) if len(values) else None

    def mean(self, name: str, count: int = _RECENT) -> float | None:
        """The mean of the finite values among the newest `count`."""
        values = self.metrics[name].values[-count:]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None


@dataclass
class LayerLoad:
    """Routing of one expert layer, newest observation."""

    step: int
    load: list[float]
    imbalance: float | None = None
    entropy: float | None = None
    dead: int | None = None
    dropped: float | None = None
    bias_range: float | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Tail:
    """What a rewind cut off: steps and values of each metric, thinned."""

    step: np.ndarray
    metrics: dict[str, np.ndarray]


@dataclass
class RunStore:
    """One run as far as it has been read."""

    steps: History = field(default_factory=lambda: History([metric.name for metric in STEP_METRICS]))
    evals: History = field(default_factory=lambda: History([metric.name for metric in EVAL_METRICS]))
    layers: dict[int, LayerLoad] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    alerts: list[rec.Alert] = field(default_factory=list)
    checkpoints: list[rec.Checkpoint] = field(default_factory=list)
    tails: list[Tail] = field(default_factory=list)
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

    version: int = 0
    expert_version: int = 0
    hardware_version: int = 0
    event_version: int = 0
    state_version: int = 0

    # taken together at the end of a batch: one array operation instead of one for each record
    _rows: list[rec.Step] = field(default_factory=list)
    _evals: list[rec.Eval] = field(default_factory=list)
    _experts: dict[tuple[int, ...], rec.Experts] = field(default_factory=dict)
    _t_before: float | None = None

    # reading

    def apply(self, records: Iterable[rec.Record]) -> None:
        """Take records in the order of their `seq`; those seen before are passed over."""
        changed = False
        for record in records:
            if record.seq <= self.seq:
                continue
            self.seq, self.t = record.seq, record.t or self.t
            changed = True
            if record.inc > self.inc:
                if self.inc and self.step is not None:
                    self._event(Event(self.step, "|", f"start {record.inc}", record.t))
                self.inc, self._t_before = record.inc, None
            match record:
                case rec.Step():
                    if self._rows and record.step <= self._rows[-1].step:
                        self._flush()
                    self._rows.append(record)
                case rec.Eval():
                    self._evals.append(record)
                case rec.Experts():
                    self._experts[tuple(record.layers)] = record
                case rec.Rewind():
                    self._flush()
                    self._rewind(record.to_step)
                    self._event(Event(record.to_step, "<", record.reason or f"back to step {record.to_step}", record.t))
                case _:
                    self._take(record)
        self._flush()
        self.version += changed

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
            case rec.Change():
                text = f"{record.what} {_plain(record.before)} to {_plain(record.after)}"
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
        for i, load in enumerate(record.load):
            layer = record.layers[i] if i < len(record.layers) else i

            def at(values: list[float], i: int = i) -> float | None:
                return values[i] if i < len(values) else None

            dead = at(record.dead)  # type: ignore[arg-type]
            self.layers[layer] = LayerLoad(
                record.step,
                load,
                at(record.imbalance),
                at(record.entropy),
                int(dead) if dead is not None else None,
                at(record.dropped),
                at(record.bias_range),
                at(record.confidence),
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
            self.usage.setdefault(name, deque(maxlen=512)).append(math.nan if value is None else value)
        self.hardware_version += 1

    def _take_eval(self, record: rec.Eval) -> None:
        history = self.evals
        if len(history) and record.step <= int(history.step.values[-1]):
            history.truncate(int(np.searchsorted(history.step.values, record.step)))
        tokens, hours = self.x_of(record.step, "tokens"), self.x_of(record.step, "hours")
        values = {name: _column([getattr(record, name)]) for name in history.metrics}
        history.extend(np.array([record.step]), np.array([tokens]), np.array([hours]), values)

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self._extend(rows)
        evals, self._evals = self._evals, []
        for evaluation in evals:
            self._take_eval(evaluation)
        experts, self._experts = self._experts, {}
        for observation in experts.values():
            self._take_experts(observation)

    def _extend(self, rows: list[rec.Step]) -> None:
        if len(self.steps) and rows[0].step <= int(self.steps.step.values[-1]):
            self._rewind(rows[0].step - 1)  # a value per step: what comes later in the file holds
        hours = np.empty(len(rows))
        before = float(self.steps.hours.values[-1]) if len(self.steps) else 0.0
        for i, row in enumerate(rows):
            spent = row.step_time
            if spent is None or not math.isfinite(spent):
                spent = row.t - self._t_before if self._t_before is not None else 0.0
            self._t_before = row.t
            before += max(0.0, spent) / 3600.0
            hours[i] = before
        tokens = np.array([row.tokens for row in rows], np.float64)
        if len(self.steps):
            tokens = np.maximum(tokens, self.steps.tokens.values[-1])
        values = {name: _column([getattr(row, name) for row in rows]) for name in self.steps.metrics}
        steps = np.array([row.step for row in rows], np.int64)
        self.steps.extend(steps, np.maximum.accumulate(tokens), hours, values)
        self.epoch = rows[-1].epoch
        self.skipped += sum(row.skipped for row in rows)

    def _rewind(self, to_step: int) -> None:
        history = self.steps
        size = int(np.searchsorted(history.step.values, to_step, side="right"))
        if size < len(history):
            cut = {name: _thin(pyramid.values[size:]) for name, pyramid in history.metrics.items()}
            self.tails = [*self.tails, Tail(_thin(history.step.values[size:]), cut)][-_MAX_TAILS:]
            history.truncate(size)
        self.evals.truncate(int(np.searchsorted(self.evals.step.values, to_step, side="right")))
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
        if base == "step" or not len(self.steps):
            return float(step)
        return float(np.interp(step, self.steps.step.values, self.steps.x(base)))

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
        values = self.steps.metrics["step_time"].values[-_RECENT:]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    def longest_save(self) -> float:
        """The longest time the newest checkpoints made training wait, in seconds."""
        return max((item.blocking or item.seconds or 0.0 for item in self.checkpoints[-5:]), default=0.0)


def _column(values: list[float | None]) -> np.ndarray:
    """As float32; unknown becomes NaN, what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return np.array([math.nan if value is None else value for value in values], np.float32)


def _thin(values: np.ndarray) -> np.ndarray:
    return values.copy() if len(values) <= _TAIL_POINTS else thin(values, _TAIL_POINTS // 2)


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
