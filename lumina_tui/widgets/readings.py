"""Values at one place of a chart, and how they are written for a person. No Textual in here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..history import METRICS, Base
from ..paint import count, number
from ..series import RunStore
from .picture import Options


@dataclass(frozen=True)
class Reading:
    """The values at one place of a chart."""

    index: int
    x: float
    step: int
    value: float
    smooth: float | None

    @property
    def shown(self) -> float:
        """The smoothed value where there is smoothing, else the raw one."""
        return self.value if self.smooth is None else self.smooth


def read(store: RunStore, options: Options, x: float | None = None, within: float = math.inf) -> Reading | None:
    """The sample nearest to `x` (None: the newest); None without samples, or if `x` lies further than `within` outside them."""
    history = store.history(options.metric)
    if not len(history):
        return None
    xs = history.x(options.base)
    index = len(xs) - 1
    if x is not None:
        if x < xs[0] - within or x > xs[-1] + within:
            return None
        index = min(_first_at(xs, x), len(xs) - 1)
        if index and x - xs[index - 1] < xs[index] - x:
            index -= 1
    smooth = history.smooth(options.metric, options.weight).values[index] if options.weight else None
    value = float(history.metrics[options.metric].values[index])
    return Reading(index, float(xs[index]), int(history.step.values[index]), value, None if smooth is None else float(smooth))


def _first_at(xs: np.ndarray, x: float) -> int:
    """The first index whose X is not below `x`."""
    return int(edges_of(xs, np.array([x]))[0])


def edges_of(xs: np.ndarray, bounds_D: np.ndarray) -> np.ndarray:
    """For each bound the first index whose X is not below it. Whole numbers are compared as such: the column is not copied."""
    if np.issubdtype(xs.dtype, np.integer):
        bounds_D = np.ceil(np.clip(bounds_D, -9e18, 9e18)).astype(xs.dtype)
    return np.searchsorted(xs, bounds_D, side="left")


def column_range(store: RunStore, options: Options, ends: tuple[float, float]) -> tuple[float, float, int] | None:
    """Lowest and highest value between two X values, and how many there are; None without any."""
    history = store.history(options.metric)
    edges = edges_of(history.x(options.base), np.array(ends))
    reduced = history.metrics[options.metric].columns(np.maximum.accumulate(edges))
    if not len(reduced.count_C) or not reduced.count_C[0]:
        return None
    return float(reduced.low_C[0]), float(reduced.high_C[0]), int(reduced.count_C[0])


def evaluation(store: RunStore, step: int) -> tuple[int, float] | None:
    """Step and loss of the newest evaluation up to `step` (the first one before any); None without evaluations."""
    evals = store.evals
    if not len(evals):
        return None
    index = max(0, int(evals.step.values.searchsorted(step, side="right")) - 1)
    return int(evals.step.values[index]), float(evals.metrics["loss"].values[index])


def value_text(metric: str, value: float | None) -> str:
    """A value of a metric for a person."""
    if value is None:
        return "-"
    if metric in ("loss", "aux_loss", "z_loss", "grad_norm"):
        return f"{value:.3f}" if math.isfinite(value) and abs(value) < 1000 else number(value)
    if metric == "lr":
        return number(value) if not math.isfinite(value) or value == 0 or value >= 0.01 else f"{value:.2e}".replace("e-0", "e-")
    if metric == "mfu":
        return f"{100 * value:.1f} %" if math.isfinite(value) else number(value)
    if metric == "tokens_per_s":
        return count(value)
    return number(value)


def difference_text(metric: str, change: float | None) -> str:
    """A difference of two values, with its sign; `-` if one of them is unknown."""
    if change is None or math.isnan(change):
        return "-"
    text = value_text(metric, abs(change))
    return text if float(change) == 0 else ("+" if change > 0 else "-") + text


def x_text(base: Base, x: float | None) -> str:
    """An X value with its unit."""
    if x is None:
        return "-"
    if base == "clock":
        import time

        return time.strftime("%d %b %H:%M:%S", time.localtime(x))
    if base == "hours":
        return f"{x:.4g} h"
    return f"step {round(x):,}" if base == "step" else f"{count(x)} tokens"


def label_of(metric: str) -> str:
    """The name of a metric on the screen."""
    return METRICS[metric].label
