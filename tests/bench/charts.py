"""What charts cost in CPU time: one picture, several runs over each other, a new smoothing weight, exports.

    python tests/bench/charts.py [--points 1000000] [--repeats 30] [--runs 8]

The picture is 120x30 cells with axes, smoothing and the 5-95 range, of a series that grows by a point each time. The last line
is JSON: medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from lumina_engine.monitoring.reduce import Smooth
from lumina_tui.chart_export import copied, csv_text, svg_text
from lumina_tui.series import RunStore
from lumina_tui.widgets.picture import LETTERS, Curve, Limits, Options
from lumina_tui.widgets.plot import build


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


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--points", type=int, default=1_000_000)
    cli.add_argument("--repeats", type=int, default=30)
    cli.add_argument("--runs", type=int, default=8)
    args = cli.parse_args()
    rng = np.random.default_rng(0)
    stores = [RunStore() for _ in range(args.runs)]
    for store in stores:
        grown(store, args.points, rng)
    curves = [Curve(store, f"run-{i}", i, LETTERS[i]) for i, store in enumerate(stores)]
    one = Curve(stores[0])
    limits = {"": Limits()}

    def draw(shown: list[Curve], options: Options) -> None:
        limits[""] = build(shown, options, 120, 30, "braille", limits[""]).limits

    def grow() -> None:
        grown(stores[0], 1, rng)

    found = {"points": args.points}
    for name, options in {
        "chart": Options(),
        "chart_all": Options(outliers=False),
        "chart_log_y": Options(log_y=True),
        "chart_log_x": Options(log_x=True),
        "chart_clock": Options(base="clock"),
    }.items():
        found[f"{name}_ms"] = median_ms(lambda options=options: draw([one], options), args.repeats, grow)
    found[f"overlay_{args.runs}_ms"] = median_ms(lambda: draw(curves, Options()), args.repeats, grow)
    values = stores[0].steps.metrics["loss"].values
    found["new_weight_ms"] = median_ms(lambda: Smooth(0.98).catch_up(values), min(args.repeats, 10))
    taken = copied(one, Options())
    found["svg_ms"] = median_ms(lambda: svg_text([taken], Options()), 3)
    found["csv_ms"] = median_ms(lambda: csv_text([taken]), 2)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
