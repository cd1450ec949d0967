"""A series in one line of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from lumina_engine.monitoring.reduce import Pyramid

EIGHTHS = "▁▂▃▄▅▆▇█"
EIGHTHS_ASCII = "__..-=*#"


def spark(pyramid: Pyramid, width: int, keep: Literal["mean", "max"] = "mean", ascii_only: bool = False, last: int = 0) -> str:
    """At most `width` cells; each shows the mean or the maximum of its samples. `last` > 0: only about the newest samples.

    The samples of a cell are the same from call to call (groups of 1, 2, 3, 4, 6, 8, 12 … counted from the start), so that a
    new sample changes the last cell only.
    """
    size = len(pyramid)
    if width <= 0 or not size:
        return " " * max(0, width)
    need = min(size, last or size)
    group = next(group for k in range(64) for group in (2**k, 3 * 2**k // 2) if need <= width * group)
    stop = -(-size // group)  # groups so far
    start = max(0, stop - width)
    if group == 1:
        values = pyramid.values[start:].astype(np.float64)
    else:
        columns = pyramid.columns(np.minimum(np.arange(start, stop + 1) * group, size))
        values = columns.mean_C if keep == "mean" else columns.high_C
    return bars(values, width, ascii_only)


def spark_values(
    values: Iterable[float], width: int, ascii_only: bool = False, low: float | None = None, high: float | None = None
) -> str:
    """The newest `width` values, with a fixed range if one is given."""
    return bars(np.array(list(values)[-width:] if width > 0 else [], np.float64), width, ascii_only, low, high)


def bars(
    values_C: np.ndarray, width: int, ascii_only: bool = False, low: float | None = None, high: float | None = None
) -> str:
    """One glyph a value, then blanks up to `width` cells; a blank where a value is not finite."""
    values_C = values_C[-width:] if width > 0 else values_C[:0]
    finite = values_C[np.isfinite(values_C)]
    glyphs = EIGHTHS_ASCII if ascii_only else EIGHTHS
    if not len(finite):
        return " " * max(0, width)
    bottom = float(finite.min()) if low is None else low
    top = float(finite.max()) if high is None else high
    if top - bottom <= abs(top) * 1e-9:
        text = "".join(glyphs[3] if np.isfinite(value) else " " for value in values_C)
        return text.ljust(width)
    level_C = np.clip(np.nan_to_num((values_C - bottom) / (top - bottom)) * 7.999, 0, 7).astype(int)
    return "".join(glyphs[level] if ok else " " for level, ok in zip(level_C, np.isfinite(values_C), strict=True)).ljust(width)
