"""The throughput that a run measured, from its own records: what a budget puts in place of its guess."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from ..config.duration import WARM_UP_STEPS, Speed
from . import record as rec
from .log import surviving

LEAST_STEPS = 10  # measured steps below which nothing is said


def measured_speed(records: Iterable[rec.Record], name: str) -> Speed | None:
    """Throughput, start, evaluations and saves of a run called `name`; None before enough steps were timed.

    The first steps of each start are left out (caches, compilation), and those that were skipped. Evaluations and saves lie
    between steps and are not in a step's time. The cautious figures are those that nine in ten exceed.
    """
    rates: list[float] = []
    starts: list[float] = []
    evals: list[float] = []
    saves: list[float] = []
    first: dict[int, float] = {}  # when each start of the run began
    seen: dict[int, int] = {}  # steps of each start so far
    for record in surviving(records):
        first.setdefault(record.inc, record.t)
        if isinstance(record, rec.Step):
            count = seen[record.inc] = seen.get(record.inc, 0) + 1
            if count == 1:
                starts.append(max(0.0, record.t - first[record.inc] - (record.step_time or 0.0)))
            elif count > WARM_UP_STEPS and record.tokens_per_s and not record.skipped:
                rates.append(record.tokens_per_s)
        elif isinstance(record, rec.Eval) and record.seconds is not None:
            evals.append(record.seconds)
        elif isinstance(record, rec.Checkpoint) and not record.failed:
            saves.append(record.blocking or 0.0)
    if len(rates) < LEAST_STEPS:
        return None
    return Speed(
        tokens_per_s=(statistics.median(rates), statistics.quantiles(rates, n=10)[0]),
        basis=f"measured: median of {len(rates):,} steps of run {name}",
        start_s=_both(starts) or (0.0, 0.0),
        eval_s=_both(evals),
        save_s=_both(saves) or (0.0, 0.0),
    )


def _both(values: list[float]) -> tuple[float, float] | None:
    """Median, and what nine in ten stay below."""
    if not values:
        return None
    return statistics.median(values), statistics.quantiles(values, n=10)[-1] if len(values) > 1 else values[0]
