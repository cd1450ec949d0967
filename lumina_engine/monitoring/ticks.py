"""Round places on an axis and their labels: for charts in the terminal, SVG and reports. Standard library only."""

from __future__ import annotations

import itertools
import math
import time

_PREFIXES = ("", "k", "M", "G", "T", "P")
_CLOCK_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200)  # s, then whole days
DAY_S = 86_400


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


def clock_ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round local times in [low, high], unix seconds."""
    if most < 1 or not (math.isfinite(low) and math.isfinite(high)) or high < low:
        return []
    raw = (high - low) / most
    step = next((float(s) for s in _CLOCK_STEPS if s >= raw), DAY_S * max(1.0, math.ceil(round_step(raw / DAY_S))))
    offset = time.localtime(low).tm_gmtoff  # rounds to local hours and days
    start = math.ceil((low + offset) / step - 1e-9)
    return [i * step - offset for i in range(start, start + most + 2) if i * step - offset <= high]


def clock_labels(values: list[float]) -> list[str]:
    """Unix seconds as local time of day; midnight, and places a day or more apart, as days."""
    if not values:
        return []
    gap = min((b - a for a, b in itertools.pairwise(values)), default=60.0)
    form = "%d %b" if gap >= DAY_S else "%H:%M" if gap >= 60 else "%H:%M:%S"
    moments = [time.localtime(value) for value in values]
    return [time.strftime("%d %b" if at.tm_hour == at.tm_min == at.tm_sec == 0 else form, at) for at in moments]


def value_labels(values: list[float], log: bool = False) -> list[str]:
    """Labels with as many decimals as tell them apart."""
    if not values:
        return []
    if log or max(abs(value) for value in values) >= 1e4 or max(abs(value) for value in values) < 0.01:
        return _apart([short(value) for value in values], values)
    gap = min((b - a for a, b in itertools.pairwise(values)), default=abs(values[0]) or 1.0)
    decimals = max(0, min(6, -math.floor(math.log10(gap) + 1e-9))) if gap > 0 else 2
    if decimals and any(round(value, decimals) != round(value, decimals + 1) for value in values):
        decimals += 1  # steps of 2.5
    return [f"{value:.{decimals}f}" for value in values]


def count_labels(values: list[float]) -> list[str]:
    """Steps and tokens with prefixes; in full where the prefixes would make them equal."""
    return _apart([short(value) for value in values], values)


def hour_labels(values: list[float]) -> list[str]:
    """Hours in the unit that suits their size: 30s, 15m, 2.5h."""
    most = max(values, default=0.0)
    if most < 2 / 60:
        return _apart([f"{value * 3600:.0f}s" for value in values], [value * 3600 for value in values], "s")
    if most < 2:
        return _apart([f"{value * 60:.3g}m" for value in values], [value * 60 for value in values], "m")
    return _apart([f"{value:.3g}h" for value in values], values, "h")


def _apart(labels: list[str], values: list[float], unit: str = "") -> list[str]:
    """`labels`, or the values with all digits where two labels are the same."""
    if len(set(labels)) == len(labels):
        return labels
    gap = min((b - a for a, b in itertools.pairwise(values) if b > a), default=1.0)
    decimals = max(0, min(9, math.ceil(-math.log10(gap) - 1e-9)))
    return [f"{value:,.{decimals}f}{unit}" for value in values]


def short(value: float) -> str:
    """A round value without empty zeros: 10k, 2.5k, 1e-3."""
    if abs(value) >= 1000:
        power = min(int(math.log10(abs(value)) // 3), len(_PREFIXES) - 1)
        if abs(float(f"{value / 1000**power:.3g}")) >= 1000 and power < len(_PREFIXES) - 1:
            power += 1
        scaled = value / 1000**power
        return (f"{scaled:.3g}" if abs(scaled) < 999.5 else f"{scaled:.3e}".replace("e+", "e")) + _PREFIXES[power]
    if value and abs(value) < 0.01:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:g}"
