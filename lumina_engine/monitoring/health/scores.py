"""The sub-scores of health, each in [0, 1], None without enough values, with the words that say where it comes from.

| score | statistic | least |
|---|---|---|
| convergence | slope of log loss (Theil-Sen, 10 medians of 20): down 1, flat 0.8, up 0.5 - 5 slope per 100 steps | 100 steps |
| stability | (1 - 20 share of spikes in 500 steps) min(1, 10 median / p99 of the gradient norm) | 64 steps |
| numerics | 1 - 0.5 for each step in 1,000 that is not finite; 0 at 3 in a row | 1 step |
| routing | worst layer: min(1, 1.4 / imbalance) (1 - 5 dropped) (1 - dead / experts) | 1 record |
| throughput | tokens/s of 32 steps over the median of 256 before at one shape: 1 at 0.9, 0 at 0.3 | 96 steps |
| resources | least of free host memory (1 at 5 %, 0 at 0.5 %), wait for data (1 at 2 %, 0 at 30 %), disk (2 saves) | 1 record |

A step whose gradient overflowed under the loss scale of fp16, which then sank, is finite if its loss is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from .system import headroom
from .windows import SLOPE_BLOCK, Windows, theil_sen

WARMING_STEPS = 32
HEALTHY, DEGRADED = 0.85, 0.6
LEAST_NORMS = 64


@dataclass(frozen=True, slots=True)
class Score:
    """One sub-score: None while there are fewer than `least` values. `words` name statistic and window."""

    value: float | None
    words: str


def scores(seen: Windows) -> dict[str, Score]:
    """All sub-scores by name."""
    return {
        "convergence": _convergence(seen),
        "stability": _stability(seen),
        "numerics": _numerics(seen),
        "routing": _routing(seen),
        "throughput": _throughput(seen),
        "resources": _resources(seen),
    }


def overall(found: dict[str, Score]) -> float:
    """min(numerics, geometric mean of the known ones); nan if none is known."""
    known = [score.value for score in found.values() if score.value is not None]
    if not known:
        return math.nan
    mean = math.prod(known) ** (1 / len(known))
    numerics = found["numerics"].value
    return mean if numerics is None else min(numerics, mean)


def status(seen: Windows, total: float, alarmed: bool = False) -> str:
    """`no_data`, `warming_up`, `healthy`, `degraded` or `critical`.

    `alarmed`: a critical alert is open, so one of the last two.
    """
    if alarmed:
        return "critical" if total < DEGRADED else "degraded"
    if math.isnan(total):
        return "no_data"
    if seen.steps < WARMING_STEPS:
        return "warming_up"
    return "healthy" if total >= HEALTHY else "degraded" if total >= DEGRADED else "critical"


def ramp(value: float, zero: float, one: float) -> float:
    """0 at `zero`, 1 at `one`, straight in between."""
    return min(1.0, max(0.0, (value - zero) / (one - zero)))


def _convergence(seen: Windows) -> Score:
    if len(seen.curve) < 5:
        return Score(None, f"loss slope: needs {5 * SLOPE_BLOCK} steps")
    slope, low, high = (100 / SLOPE_BLOCK * part for part in theil_sen([value for _, value in seen.curve]))
    steps = len(seen.curve) * SLOPE_BLOCK
    words = f"log loss {slope:+.3f} per 100 steps over {steps} (95 %: {low:+.3f} to {high:+.3f})"
    return Score(1.0 if high < 0 else max(0.0, 0.5 - 5 * slope) if low > 0 else 0.8, words)


def _stability(seen: Windows) -> Score:
    if len(seen.norms) < LEAST_NORMS:
        return Score(None, f"spikes and gradient norms: needs {LEAST_NORMS} steps")
    ordered = sorted(norm for _, norm in seen.norms)
    middle, top = median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    share = sum(spike for _, spike in seen.spikes) / max(1, len(seen.spikes))
    value = max(0.0, 1 - 20 * share) * (min(1.0, 10 * middle / top) if top > 0 else 1.0)
    return Score(
        value, f"{share:.1%} spikes, p99 of the gradient norm {top:.3g} (median {middle:.3g}) over {len(ordered)} steps"
    )


def _numerics(seen: Windows) -> Score:
    if not seen.nonfinite:
        return Score(None, "steps that are not finite: needs 1 step")
    bad = sum(bad for _, bad in seen.nonfinite)
    value = 0.0 if seen.nonfinite_in_row >= 3 else max(0.0, 1 - 0.5 * bad)
    return Score(value, f"{bad} of the last {len(seen.nonfinite)} steps not finite")


def _routing(seen: Windows) -> Score:
    experts = seen.routing
    if experts is None or not experts.load:
        return Score(None, "routing: needs a record of experts")
    worst, where = 1.0, 0
    for place, load in enumerate(experts.load):
        imbalance = experts.imbalance[place] if place < len(experts.imbalance) else math.nan
        if not math.isfinite(imbalance) or imbalance <= 0:
            continue
        dropped = experts.dropped[place] if place < len(experts.dropped) else 0.0
        dead = experts.dead[place] if place < len(experts.dead) else 0
        value = min(1.0, 1.4 / imbalance) * max(0.0, 1 - 5 * dropped) * (1 - dead / len(load))
        if value < worst:
            worst, where = value, experts.layers[place] if place < len(experts.layers) else place
    named = f"worst layer {where} of" if worst < 1 else "no layer is uneven in"
    return Score(worst, f"{named} the record of step {experts.step}")


def _throughput(seen: Windows) -> Score:
    if not seen.speed.known or len(seen.speed.recent) < 32:
        return Score(None, "tokens/s: needs 96 steps at one batch shape")
    share = math.exp(median(seen.speed.recent) - seen.speed.middle)
    return Score(ramp(share, 0.3, 0.9), f"{share:.0%} of its own median over the last 32 steps")


def _resources(seen: Windows) -> Score:
    parts: list[tuple[float, str]] = []
    free = None if seen.hardware is None else headroom(seen.hardware)
    if free is not None:
        parts.append((ramp(free, 0.005, 0.05), f"{free:.0%} of host memory free"))
    if len(seen.waiting) >= 32:
        share = median(seen.waiting)
        parts.append((ramp(share, 0.3, 0.02), f"{share:.0%} of a step waits for data (64 steps)"))
    disk = None if seen.hardware is None else seen.hardware.disk_free
    if disk is not None and seen.checkpoint_bytes:
        room = disk / seen.checkpoint_bytes
        parts.append((ramp(room, 1, 2), f"disk for {room:.0f} checkpoints"))
    if not parts:
        return Score(None, "resources: needs a hardware record or 32 steps")
    return Score(min(value for value, _ in parts), ", ".join(words for _, words in parts))
