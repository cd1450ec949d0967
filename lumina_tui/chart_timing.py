"""How long a chart takes: `python -m lumina_tui.chart_timing POINTS [REPEATS]` prints the median CPU time of one picture in ms.

The picture is 120x30 cells with axes, smoothing and the 5-95 range, of a series that grows by a point each time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from .series import RunStore
from .widgets.picture import Curve, Limits, Options
from .widgets.plot import build


def milliseconds(points: int, repeats: int) -> float:
    """The median CPU time of one picture of a series of `points` samples, in ms."""
    rng = np.random.default_rng(0)
    store = RunStore()
    history = store.steps

    def grow(count: int) -> None:
        first = len(history) + 1
        steps = np.arange(first, first + count)
        values = {name: (2 + rng.standard_normal(count)).astype(np.float32) for name in history.metrics}
        history.extend(steps, 2048.0 * steps, steps / 3e4, values)

    grow(points)
    times = []
    limits = Limits()
    for _ in range(repeats + 1):
        grow(1)
        began = time.process_time()
        limits = build([Curve(store)], Options(), 120, 30, "braille", limits).limits
        times.append(time.process_time() - began)
    return 1e3 * statistics.median(times[1:])  # the first one smooths the whole series


def main(argv: Sequence[str]) -> int:
    print(f"{milliseconds(int(argv[0]), int(argv[1]) if len(argv) > 1 else 30):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
