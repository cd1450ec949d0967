"""Step records as columns: what a history takes at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from lumina_engine.monitoring import record as rec

from .history import STEP_METRICS

_GETTERS = {metric.name: attrgetter(metric.name) for metric in STEP_METRICS}
_STEP, _TOKENS, _SKIPPED, _TIME = attrgetter("step"), attrgetter("tokens"), attrgetter("skipped"), attrgetter("t")


@dataclass(frozen=True)
class StepRows:
    """N >= 1 step records of one incarnation whose steps rise.

    Args:
        step_N: int64.
        tokens_N, clock_N: float64; the clock is unix seconds.
        values: each of `STEP_METRICS` as float32; NaN where it is unknown.
        epoch: of the last.
        skipped: how many were not applied.
    """

    step_N: np.ndarray
    tokens_N: np.ndarray
    clock_N: np.ndarray
    values: Mapping[str, np.ndarray]
    epoch: int
    skipped: int

    @classmethod
    def of(cls, rows: Sequence[rec.Step]) -> StepRows:
        """The columns of these records."""
        size = len(rows)
        return cls(
            np.fromiter(map(_STEP, rows), np.int64, size),
            np.fromiter(map(_TOKENS, rows), np.float64, size),
            np.fromiter(map(_TIME, rows), np.float64, size),
            {name: column(get, rows) for name, get in _GETTERS.items()},
            rows[-1].epoch,
            sum(map(_SKIPPED, rows)),
        )


def column(get: Callable[[Any], float | None], rows: Sequence[Any]) -> np.ndarray:
    """A field of rows as float32; unknown (None) becomes NaN, what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        if get(rows[0]) is not None:
            with contextlib.suppress(TypeError):  # a None further on
                return np.fromiter(map(get, rows), np.float64, len(rows)).astype(np.float32)
        values = list(map(get, rows))
        if values.count(None) == len(values):
            return np.full(len(values), np.nan, np.float32)
        return np.array(values, np.float64).astype(np.float32)
