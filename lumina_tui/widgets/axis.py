"""Axes: round limits that do not tremble, round ticks, short labels, linear and logarithmic scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lumina_engine.monitoring.ticks import clock_labels, count_labels, hour_labels, round_step


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to 0 … size-1 (first to last dot)."""

    low: float
    high: float
    size: int
    log: bool = False

    def at(self, values: np.ndarray) -> np.ndarray:
        """Dot positions (float); NaN where a value has none. Not clipped."""
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.log:
                low, high = math.log10(self.low), math.log10(self.high)
                values = np.log10(np.where(values > 0, values, np.nan))
            else:
                low, high = self.low, self.high
            return (values - low) / ((high - low) or 1.0) * (self.size - 1)

    def place(self, value: float) -> float:
        """The dot position of one value; NaN where it has none. Not clipped."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return math.nan
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / ((high - low) or 1.0) * (self.size - 1)

    def back(self, position: float) -> float:
        """The value at a dot position."""
        share = position / max(1, self.size - 1)
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return float(10 ** (low + share * (high - low)))
        return self.low + share * (self.high - self.low)


def y_limits(low: float, high: float, rows: int, log: bool, before: tuple[float, float] | None) -> tuple[float, float]:
    """Round limits around [low, high]; the limits before are kept as long as they fit and do not waste a third."""
    if log:
        low = max(low, 1e-300)
        inside = before is not None and before[0] <= low and high <= before[1]
        if before is not None and inside and math.log10(before[1] / before[0]) <= 1.5 * math.log10(max(high / low, 1.01)) + 0.2:
            return before
        return 10 ** (math.floor(math.log10(low) * 4) / 4), 10 ** (math.ceil(math.log10(max(high, low * 1.01)) * 4) / 4)
    span = high - low
    if span <= abs(high) * 1e-6:
        span = abs(high) * 0.1 or 1.0
        low, high = low - span / 2, high + span / 2
    if before is not None and before[0] <= low and high <= before[1] and before[1] - before[0] <= 1.5 * span:
        return before
    step = round_step(span / max(4, rows))
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def x_limit(newest: float, first: float, before: float | None) -> float:
    """The right end of a following X axis: a round value beyond the newest point, so that the picture stays still."""
    span = max(newest - first, 1e-9)
    if before is not None and newest <= before <= first + 1.3 * span:
        return before
    step = round_step(span / 20)
    return first + math.ceil((newest - first) / step + 1e-6) * step


def x_labels(values: list[float], base: str) -> list[str]:
    """Labels of an X axis: steps and tokens with prefixes, hours as a length of time, clock time as local time."""
    return {"hours": hour_labels, "clock": clock_labels}.get(base, count_labels)(values)
