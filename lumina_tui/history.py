"""Values over the steps of a run: columns that grow or are cut, with smoothing kept up to date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lumina_engine.monitoring.reduce import Buffer, Pyramid, Smooth

Base = Literal["step", "tokens", "hours", "clock"]  # clock: local time, kept as unix seconds
BASES: tuple[Base, ...] = ("step", "tokens", "hours", "clock")


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
    Metric("data_time", "data time", "s", "max"),
    Metric("forward_time", "forward time", "s", "max"),
    Metric("backward_time", "backward time", "s", "max"),
    Metric("optimizer_time", "optimizer time", "s", "max"),
)
EVAL_METRICS = (Metric("loss", "eval loss"), Metric("perplexity", "perplexity"), Metric("accuracy", "accuracy"))
EXPERT_METRICS = (
    Metric("imbalance", "imbalance", "max / mean, worst layer", "max"),
    Metric("entropy", "routing entropy", "mean of the layers, 1 = balanced"),
    Metric("dropped", "dropped share", "of the choices", "max"),
)
CHART_METRICS = (*STEP_METRICS, *EXPERT_METRICS)
METRICS = {metric.name: metric for metric in CHART_METRICS}

RECENT = 100  # steps that rates and the time left are taken from


class History:
    """Values over steps: one X column per base, one pyramid per metric, cut together."""

    def __init__(self, names: Sequence[str]) -> None:
        self.step = Buffer(np.int64)
        self.tokens = Buffer(np.float64)
        self.hours = Buffer(np.float64)
        self.clock = Buffer(np.float64)
        self.metrics: dict[str, Pyramid] = {name: Pyramid() for name in names}
        self.version = 0
        self._smooth: dict[tuple[str, float], Smooth] = {}

    def __len__(self) -> int:
        return len(self.step)

    def x(self, base: Base) -> np.ndarray:
        """The X column of a base; never falls."""
        buffer = {"step": self.step, "tokens": self.tokens, "hours": self.hours, "clock": self.clock}[base]
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

    def extend(
        self,
        step: np.ndarray,
        tokens: np.ndarray,
        hours: np.ndarray,
        values: dict[str, np.ndarray],
        clock: np.ndarray | None = None,
    ) -> None:
        """Append rows; `step` rises. `clock`: when each was written, unix seconds; unknown ones count as the time before."""
        before = float(self.clock.values[-1]) if len(self.clock) else 0.0
        times = np.full(len(step), before) if clock is None else np.asarray(clock, np.float64)
        self.clock.extend(np.maximum(np.maximum.accumulate(times), before))  # a clock that was set back stands still
        self.step.extend(step)
        self.tokens.extend(tokens)
        self.hours.extend(hours)
        for name, pyramid in self.metrics.items():
            pyramid.extend(values[name])
        self.version += 1

    def reserve(self, size: int) -> None:
        """Make room for `size` rows in all, so that a long log is not copied while it grows."""
        for column in (self.step, self.tokens, self.hours, self.clock, *(pyramid.raw for pyramid in self.metrics.values())):
            column.reserve(size)

    def truncate(self, size: int) -> None:
        """Keep the first `size` rows."""
        if size >= len(self):
            return
        for (name, _), smooth in self._smooth.items():
            smooth.truncate(size, self.metrics[name].values)
        for column in (self.step, self.tokens, self.hours, self.clock):
            column.truncate(size)
        for pyramid in self.metrics.values():
            pyramid.truncate(size)
        self.version += 1

    def last(self, name: str) -> float | None:
        """The newest value of a metric, also if it is not finite (as NaN); None without any."""
        values = self.metrics[name].values
        return float(values[-1]) if len(values) else None

    def mean(self, name: str, count: int = RECENT) -> float | None:
        """The mean of the finite values among the newest `count`."""
        values = self.metrics[name].values[-count:]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None
