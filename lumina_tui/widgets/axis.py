"""Axes: round limits that do not tremble, round ticks, short labels, linear and logarithmic scale."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ..paint import count


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

    def back(self, position: float) -> float:
        """The value at a dot position."""
        share = position / max(1, self.size - 1)
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return float(10 ** (low + share * (high - low)))
        return self.low + share * (self.high - self.low)


def round_step(raw: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `raw`."""
    if not raw > 0 or not math.isfinite(raw):
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    for factor in (1.0, 2.0, 2.5, 5.0, 10.0):
        if factor * power >= raw * (1 - 1e-9):
            return factor * power
    return 10.0 * power


def ticks(low: float, high: float, most: int, log: bool = False, whole: bool = False) -> list[float]:
    """At most about `most` round values in [low, high]."""
    if most < 1 or not (math.isfinite(low) and math.isfinite(high)) or high < low:
        return []
    if log and low > 0:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        if last - first + 1 >= 2:
            stride = max(1, -(-(last - first + 1) // most))
            return [10.0**power for power in range(first, last + 1, stride)]
    step = round_step((high - low) / most) if high > low else 1.0
    if whole:
        step = max(1.0, math.ceil(step))
    start = math.ceil(low / step - 1e-9)
    found = [i * step for i in range(start, start + most + 2) if i * step <= high + step * 1e-9]
    return [0.0 if value == 0 else value for value in found]


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


def y_labels(values: list[float], log: bool) -> list[str]:
    """Labels with as many decimals as tell them apart."""
    if not values:
        return []
    if log or max(abs(value) for value in values) >= 1e4 or max(abs(value) for value in values) < 0.01:
        return [_short(value) for value in values]
    gap = min((b - a for a, b in itertools.pairwise(values)), default=abs(values[0]) or 1.0)
    decimals = max(0, min(6, -math.floor(math.log10(gap) + 1e-9))) if gap > 0 else 2
    if decimals and any(round(value, decimals) != round(value, decimals + 1) for value in values):
        decimals += 1  # steps of 2.5
    return [f"{value:.{decimals}f}" for value in values]


def _short(value: float) -> str:
    """A round value without empty zeros: 10k, 2.5k, 1e-3."""
    if abs(value) >= 1000:
        digits, _, prefix = count(value).partition(" ")
        return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + prefix
    if value and abs(value) < 0.01:
        return _exponent(value)
    return f"{value:g}"


def _exponent(value: float) -> str:
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


def x_labels(values: list[float], base: str) -> list[str]:
    """Labels of an X axis: steps and tokens with prefixes, hours as time."""
    if base == "hours":
        most = max(values, default=0.0)
        if most < 2 / 60:
            return [f"{value * 3600:.0f}s" for value in values]
        if most < 2:
            return [f"{value * 60:.3g}m" for value in values]
        return [f"{value:.3g}h" for value in values]
    return [_short(value) for value in values]
