"""What charts cost in CPU time: one picture, several runs over each other, a new smoothing weight, exports.

    python tests/bench/charts.py [--points 1000000] [--repeats 100] [--runs 8]

The pictures are those of `lumina_tui.chart_timing`, with more settings. The last line is JSON: medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.reduce import Smooth
from lumina_tui.chart_export import copied, csv_text, svg_text
from lumina_tui.chart_timing import grown, median_ms, picture_ms
from lumina_tui.series import RunStore
from lumina_tui.widgets.picture import LETTERS, Curve, Options


def with_events(points: int, rng: np.random.Generator) -> RunStore:
    """A run with 200 evaluations and checkpoints, 20 alerts and 20 changes."""
    store = RunStore()
    grown(store, points, rng)
    records: list[rec.Record] = []
    for number in range(1, 201):
        step = number * points // 200
        records.append(rec.Eval(step=step, loss=1.8 + 4 * float(np.exp(-step / 1e5))))
        records.append(rec.Checkpoint(step=step))
        if number % 10 == 0:
            records += [
                rec.Alert(severity="warning", code="loss_spike", message="6 sigma", step=step),
                rec.Change(what="lr", before=1e-3, after=1e-4, by="user", step=step),
            ]
    for seq, record in enumerate(records, 1):
        record.seq, record.inc, record.t = seq, 1, 1.7e9
    store.apply(records)
    return store


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--points", type=int, default=1_000_000)
    cli.add_argument("--repeats", type=int, default=100)
    cli.add_argument("--runs", type=int, default=8)
    args = cli.parse_args()
    rng = np.random.default_rng(0)
    found: dict[str, float] = {"points": args.points}
    settings = {
        "chart": Options(),
        "chart_all": Options(outliers=False),
        "chart_log_y": Options(log_y=True),
        "chart_log_x": Options(log_x=True),
        "chart_tokens": Options(base="tokens"),
        "chart_clock": Options(base="clock"),
    }
    for name, options in settings.items():
        one = RunStore()
        grown(one, args.points, rng)
        found[f"{name}_ms"] = picture_ms([Curve(one)], options, args.repeats, rng)
    marked = Curve(with_events(args.points, rng))
    found["chart_marked_ms"] = picture_ms([marked], Options(), args.repeats, rng)
    found["chart_marked_clock_log_y_ms"] = picture_ms([marked], Options(base="clock", log_y=True), args.repeats, rng)
    stores = [RunStore() for _ in range(args.runs)]
    for store in stores:
        grown(store, args.points, rng)
    curves = [Curve(store, f"run-{i}", i, LETTERS[i]) for i, store in enumerate(stores)]
    found[f"overlay_{args.runs}_ms"] = picture_ms(curves, Options(), args.repeats, rng)
    values = stores[0].steps.metrics["loss"].values
    found["new_weight_ms"] = median_ms(lambda: Smooth(0.98).catch_up(values), min(args.repeats, 10))
    taken = copied(curves[0], Options())
    found["svg_ms"] = median_ms(lambda: svg_text([taken], Options()), 3)
    found["csv_ms"] = median_ms(lambda: csv_text([taken]), 2)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
