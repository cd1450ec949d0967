"""How long a chart takes: `python -m lumina_tui.chart_timing POINTS [REPEATS]` prints the median CPU time of one picture in ms.

The picture is 120x30 cells with axes, smoothing and the 5-95 range, of a series that grows by a column of dots each time:
smoothing and reducing the new samples counts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from .series import RunStore
from .widgets.picture import Curve, Limits, Options
from .widgets.plot import build

WIDTH, HEIGHT = 120, 30
COLUMN = 2 * (WIDTH - 6)  # one in so many samples: a column of dots


def grown(store: RunStore, count: int, rng: np.random.Generator) -> None:
    """Append `count` steps of a falling, noisy loss."""
    history = store.steps
    first = len(history) + 1
    steps = np.arange(first, first + count)
    loss = (1.7 + 4 * np.exp(-steps / 1e5) + rng.normal(0, 0.05, count)).astype(np.float32)
    history.extend(steps, 2048.0 * steps, steps / 3e4, dict.fromkeys(history.metrics, loss), 1.7e9 + steps)


def median_ms(work: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> float:
    """The median CPU time of `work` in ms, without its first call."""
    times = []
    for _ in range(repeats + 1):
        before()
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return round(1e3 * statistics.median(times[1:]), 3)


def picture_ms(curves: Sequence[Curve], options: Options, repeats: int, rng: np.random.Generator) -> float:
    """The median CPU time of one picture of these runs; the first of them grows by a column of dots each time."""
    limits = Limits()
    store = curves[0].store
    column = max(1, len(store.steps) // COLUMN)

    def draw() -> None:
        nonlocal limits
        limits = build(curves, options, WIDTH, HEIGHT, "braille", limits).limits

    return median_ms(draw, repeats, lambda: grown(store, column, rng))


def main(argv: Sequence[str]) -> int:
    rng = np.random.default_rng(0)
    store = RunStore()
    grown(store, int(argv[0]), rng)
    print(f"{picture_ms([Curve(store)], Options(), int(argv[1]) if len(argv) > 1 else 100, rng):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
