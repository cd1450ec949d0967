"""What the health monitor remembers of a run: bounded windows over its records, and the statistics taken from them.

Medians, of values and of absolute differences (times 1.4826: the standard deviation of normal values), since one wild value
moves neither. Logarithms of losses and gradient norms: their noise is a ratio, not a distance. Everything is bounded, whatever
the length of the run, and depends on the records alone, so the same log gives the same judgements.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import msgspec

from .. import record as rec
from ..experts import joined

TINY = 1e-30
LEAST_SPREAD = 0.01  # of a logarithm: a window without any noise makes nothing of one percent
REFRESH = 8  # values between two looks at a reference: a median of many values need not be taken at each step
SLOPE_STEPS = 200  # over which the slope of the loss is taken
SLOPE_BLOCK = 20  # steps of one of its points
NUMERIC_STEPS = 1_000
BACK = 1_000  # values behind a reference that are kept, so that there is one after a rewind
SPIKE_STEPS = 500
DISK_EVERY = 20.0  # s between two points of the disk window
SETTLES = 5.0  # s after a save in which the file system may still give room back
LASTING = 24  # steps at one length of rows; fewer never make the level of a window in which the next length follows
KENDALL_95 = {5: 10, 6: 13, 7: 15, 8: 18, 9: 20, 10: 23}  # points -> S of Kendall's test from which a trend is one (95 %)
# what the learning rate of a step follows from: the shape of its schedule, and all that the number of steps comes from
RATE_KEYS = frozenset(
    {
        *("learning_rate", "lr_schedule", "warmup_steps", "min_lr_ratio", "decay_ratio"),
        *("max_steps", "num_epochs", "batch_size", "gradient_accumulation_steps", "data", "ranks"),
    }
)


def noise(values: Sequence[float]) -> float:
    """Standard deviation of the noise on a series, from its successive differences: a trend does not widen it (Rice 1984)."""
    return max(1.4826 / math.sqrt(2) * median(abs(b - a) for a, b in pairwise(values)), LEAST_SPREAD)


def theil_sen(values: Sequence[float]) -> tuple[float, float, float]:
    """Median slope per place of evenly spaced values (5 to 10), and its 95 % interval by Kendall's test (Sen 1968)."""
    count = len(values)
    slopes = sorted((values[j] - values[i]) / (j - i) for i in range(count) for j in range(i + 1, count))
    out = (len(slopes) - KENDALL_95[count]) // 2
    return median(slopes), slopes[max(0, out)], slopes[min(len(slopes) - 1, len(slopes) - 1 - out)]


def _sinks(before: object, after: object) -> bool:
    """Whether a value that was changed is lower now."""
    return isinstance(before, int | float) and isinstance(after, int | float) and after < before


def _with(known: rec.Hardware, record: rec.Hardware) -> rec.Hardware:
    """A record with the figures `known` that it leaves out.

    A sampler's record, which always has the cores, is complete: what it leaves out cannot be measured any more, and a device
    that it does not list is gone.
    """
    if record.cpu_count is not None:
        return record
    told = {name: value for name in record.__struct_fields__ if (value := getattr(record, name)) not in (None, [])}
    return msgspec.structs.replace(known, **told)


class Level:
    """A series with a recent part and what lies before it, so that a fault does not judge itself.

    Args:
        recent: newest values.
        before: values of the reference, those just before the recent ones.
        level: newest of them whose median is the level: few, where the series has a trend. None: all, and no deviations.
        least: values of the reference from which there is one.
    """

    def __init__(self, recent: int, before: int = 64, level: int | None = None, least: int = 32) -> None:
        self.recent: deque[float] = deque(maxlen=recent)
        self.before: deque[float] = deque(maxlen=before)
        self._trail: deque[tuple[int, float]] = deque(maxlen=recent + before + BACK)  # steps and values of both, and older ones
        self.level = level
        self.least = least
        self.middle = 0.0  # the level
        self.sigma = LEAST_SPREAD
        self.wide = LEAST_SPREAD  # deviation about the level, with the trend in it
        self._age = REFRESH

    def push(self, value: float, step: int) -> None:
        if len(self.recent) == self.recent.maxlen:
            self.before.append(self.recent[0])
        self.recent.append(value)
        self._trail.append((step, value))
        self._age += 1
        if self._age >= REFRESH and self.known:
            self._age = 0
            self._refresh(list(self.before))

    def _refresh(self, values: list[float]) -> None:
        if self.level is None:
            self.middle = median(values)
            return
        self.middle = median(values[-self.level :])
        self.sigma = noise(values)
        self.wide = max(self.sigma, 1.4826 * median(abs(value - self.middle) for value in values))

    @property
    def known(self) -> bool:
        """Whether there is a reference."""
        return len(self.before) >= self.least

    def z(self, value: float) -> float:
        """Deviations of `value` above the reference; 0 without one."""
        return (value - self.middle) / self.sigma if self.known else 0.0

    def standing(self, value: float) -> float:
        """Deviations of one value: the larger of those by `wide`, half of those by the noise, which no trend widens."""
        return max((value - self.middle) / self.wide, self.z(value) / 2) if self.known else 0.0

    def cut(self, step: int) -> None:
        """Drop the values of later steps. Recent ones, reference and level are again what they were then."""
        kept = [(at, value) for at, value in self._trail if at <= step]
        if len(kept) == len(self._trail):
            return
        self.clear()
        for at, value in kept:
            self.push(value, at)
        if self.known:
            self._age = 0
            self._refresh(list(self.before))

    def clear(self) -> None:
        self.recent.clear()
        self.before.clear()
        self._trail.clear()
        self._age = REFRESH


class Windows:
    """All windows of a run. `take` each record once, in the order of the log.

    Args:
        run: the name by which commands know the run, for advice; None for a training loop of one's own.
    """

    def __init__(self, run: str | None = None) -> None:
        self.run = run
        self.total_steps: int | None = None  # of the run, once a trainer has begun
        self.steps = 0  # records of steps so far
        self.step = 0  # number of the last one
        self.inc = 0
        self.last: rec.Step | None = None
        self.nonfinite_in_row = 0
        self._overflow: int | None = None  # step whose gradient was too large for its loss scale; told before its record
        self.finite_in_row = 0
        self.length: int | None = None  # of the rows of the last step
        self.at_length = 0  # steps at it in a row
        self.lengths = 0  # how often a lasting length has ended: the windows of loss and gradient began anew
        self.loss = Level(recent=8, level=16)
        self.norm = Level(recent=8, level=16)
        # each value with its step, the last one of a block
        self.nonfinite: deque[tuple[int, bool]] = deque(maxlen=NUMERIC_STEPS)
        self.norms: deque[tuple[int, float]] = deque(maxlen=SPIKE_STEPS)
        self.rates: deque[tuple[int, float]] = deque(maxlen=2)  # learning rates
        self.spikes: deque[tuple[int, bool]] = deque(maxlen=SPIKE_STEPS)
        self.curve: deque[tuple[int, float]] = deque(maxlen=SLOPE_STEPS // SLOPE_BLOCK)  # medians of log loss
        self._block: deque[tuple[int, float]] = deque(maxlen=SLOPE_BLOCK)
        self.speed = Level(recent=32, before=256, least=64)  # log tokens/s at one shape of batch
        self.shape: tuple[int | None, int | None] = (None, None)
        self.waiting: deque[float] = deque(maxlen=64)  # share of a step that waited for data
        self.evals: deque[tuple[int, float, float | None]] = deque(maxlen=8)  # step, eval loss, log train loss then
        self.experts: rec.Experts | None = None  # the newest line
        self.routing: rec.Experts | None = None  # all layers of the newest step: a long record is several lines
        self.hardware: rec.Hardware | None = None  # the newest of each figure: a record need not have all
        self.rss: deque[tuple[float, float]] = deque(maxlen=96)  # t, bytes
        self.disk: deque[tuple[float, float, bool]] = deque(maxlen=256)  # t, free bytes, whether a save lies before it
        self._settled = -math.inf  # t at which the last save has left the disk alone
        self.checkpoint_bytes: int | None = None
        self.rate_set = 0  # step at which somebody set the learning rate last, or began another schedule by a resume

    def take(self, record: rec.Record) -> None:
        """Add a record to the windows it belongs to."""
        kind = type(record)
        if kind is rec.Step:
            self._step(record)  # type: ignore[arg-type]
        elif isinstance(record, rec.Experts):
            self._routed(record)
        elif isinstance(record, rec.Hardware):
            self._hardware(record)
        elif isinstance(record, rec.Eval):
            if record.loss is not None and math.isfinite(record.loss) and record.loss > 0:
                train = median(self.loss.recent) if len(self.loss.recent) == self.loss.recent.maxlen else None
                self.evals.append((record.step, record.loss, train))
        elif isinstance(record, rec.Checkpoint):
            self.checkpoint_bytes = record.bytes or self.checkpoint_bytes
            self._saved(record)
        elif isinstance(record, rec.Change):
            if record.what == "learning_rate":
                self.rate_set = record.step or self.step
            elif record.what == "loss_scale":
                self._overflow = record.step if _sinks(record.before, record.after) else None
        elif isinstance(record, rec.Resume):
            if not RATE_KEYS.isdisjoint(record.changed):
                self.rate_set = record.step + 1
        elif isinstance(record, rec.Rewind):
            self._rewind(record.to_step)
        elif isinstance(record, rec.Run):
            self.total_steps = self.total_steps if record.total_steps is None else record.total_steps
            if record.state == "preparing":
                self._start(record.inc)

    @property
    def rate_is_flat(self) -> bool:
        """Whether the last two steps had the same learning rate."""
        return len(self.rates) == 2 and self.rates[0][1] == self.rates[1][1]

    def nonfinite_in(self, steps: int) -> int:
        """How many of the last `steps` were not finite."""
        return sum(bad for _, bad in list(self.nonfinite)[-steps:])

    def spell_over(self, steps: int) -> bool:
        """Whether there were exactly `steps` finite steps since the last other one, or since the run went back."""
        return self.finite_in_row == steps

    def _step(self, record: rec.Step) -> None:
        self.steps += 1
        self.step, self.last = record.step, record
        # a loss scale that sinks is no sign of broken values; the loss itself is not scaled
        scaled, self._overflow = record.step == self._overflow, None
        self._rows(record.seq_length)
        if record.lr is not None:
            self.rates.append((record.step, record.lr))
        finite = math.isfinite(record.loss or 0.0) and (scaled or math.isfinite(record.grad_norm or 0.0))
        self.nonfinite.append((record.step, not finite))
        self.nonfinite_in_row = 0 if finite else self.nonfinite_in_row + 1
        self.finite_in_row = self.finite_in_row + 1 if finite else 0
        if finite:
            self._values(record)
        if record.step_time and record.step_time > 0:
            self._time(record, record.step_time)

    def _rows(self, length: int | None) -> None:
        """Begin anew with loss and gradient where rows get another length for good, as in a curriculum.

        Where the length is another one at each step, as where a loop of one's own pads to the longest row, losses are as like
        as they get. The number of rows widens or narrows the noise and moves no level: the rest of an epoch ends no window.
        """
        if length == self.length:
            self.at_length += 1
            return
        if self.at_length >= LASTING:
            self.lengths += 1
            self.loss.clear()
            self.norm.clear()
            self.curve.clear()
            self._block.clear()
        self.length, self.at_length = length, 1

    def _values(self, record: rec.Step) -> None:
        spike = False
        if record.loss is not None:
            value = math.log(max(record.loss, TINY))
            spike = self.loss.standing(value) > 6
            self.loss.push(value, record.step)
            self._block.append((record.step, value))
            if len(self._block) == SLOPE_BLOCK:
                self.curve.append((record.step, median(value for _, value in self._block)))
                self._block.clear()
        if record.grad_norm is not None and math.isfinite(record.grad_norm):
            value = math.log(max(record.grad_norm, TINY))
            spike = spike or (self.norm.known and value - self.norm.middle > math.log(10))
            self.norm.push(value, record.step)
            self.norms.append((record.step, record.grad_norm))
        self.spikes.append((record.step, spike))

    def _time(self, record: rec.Step, seconds: float) -> None:
        shape = (record.seq_length, record.batch)
        if shape != self.shape:
            self.shape = shape
            self.speed.clear()
        rate = record.tokens_per_s if record.tokens_per_s else 1.0 / seconds
        self.speed.push(math.log(max(rate, TINY)), record.step)
        if record.data_time is not None:
            self.waiting.append(min(1.0, record.data_time / seconds))

    def _routed(self, record: rec.Experts) -> None:
        self.experts = record
        known = self.routing
        self.routing = joined(known, record) if known is not None and known.step == record.step else record

    def _hardware(self, record: rec.Hardware) -> None:
        self.hardware = record if self.hardware is None else _with(self.hardware, record)
        if record.rss is not None:
            self.rss.append((record.t, float(record.rss)))
        if record.disk_free is not None:
            self._free(record.t, float(record.disk_free))

    def _free(self, t: float, free: float) -> None:
        before = self.disk[-1][0] if self.disk else -math.inf
        if abs(t - before) >= DISK_EVERY:
            self.disk.append((t, free, before < self._settled))

    def _saved(self, record: rec.Checkpoint) -> None:
        """A save is told at its end: mark the points that came while it wrote, and deleted what is not kept any more."""
        begin, self._settled = record.t - (record.span or record.seconds or 0.0), record.t + SETTLES
        for place in range(len(self.disk) - 1, -1, -1):
            t, free, _ = self.disk[place]
            if t <= begin:
                break
            self.disk[place] = t, free, True

    def _rewind(self, step: int) -> None:
        """The run goes back: what was seen of later steps is of a branch that is left. Speed is the machine's, and stays."""
        self.step, self.nonfinite_in_row, self.finite_in_row, self._overflow = step, 0, 0, None
        if self.routing is not None and self.routing.step > step:
            self.routing = None
        self.loss.cut(step)
        self.norm.cut(step)
        of_steps: tuple[deque[Any], ...] = (self.nonfinite, self.norms, self.rates, self.spikes, self.curve, self._block)
        for trail in (*of_steps, self.evals):
            while trail and trail[-1][0] > step:
                trail.pop()

    def _start(self, inc: int) -> None:
        """Other processes: their memory and speed are their own, and nobody looked at the disk in between."""
        self.inc = inc
        self.speed.clear()
        self.waiting.clear()
        self.rss.clear()
        self.disk.clear()
        self.hardware = self.experts = self.routing = self._overflow = None
