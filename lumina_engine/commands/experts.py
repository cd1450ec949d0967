"""`checkpoint grow` and `checkpoint shrink`: a new run whose model has one expert more, or less, in each layer."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import UserError, add_json, print_json, safe

if TYPE_CHECKING:
    from ..checkpoint.growth import Source

RECENT = 100  # steps of the log that tell which expert is meant


def add_arguments(actions: Any) -> None:
    """The two actions of `checkpoint`."""
    words = {
        "grow": "one expert more in each expert layer, a twin of its hottest one: a new run that says what the old one said",
        "shrink": "one expert less: the coldest of each layer merged into its most similar one, unless the loss rises by 1 %",
    }
    for name, text in words.items():
        action = actions.add_parser(name, help=text)
        action.add_argument("target", metavar="PATH|RUN", help="a checkpoint, or a run (its best one; also RUN@latest)")
        action.add_argument("--run", metavar="NAME", required=True, help="name of the new run")
        action.add_argument(
            "--expert",
            metavar="LAYER:EXPERT",
            action="append",
            default=[],
            help="which expert of a layer, both counted from 0; as often as needed (default: as the run's log tells)",
        )
        if name == "shrink":
            action.add_argument("--rows", type=int, default=64, help="rows of the run's own data that the loss is measured on")
        add_json(action)


def grow(args: argparse.Namespace) -> int:
    """Split one expert of each layer."""
    from ..checkpoint import growth
    from ..run.directory import runs_root

    source = growth.open_source(args.target)
    experts = growth.hottest(loads(source) or {}, _given(args.expert))
    return _tell(args, growth.grow(source, experts, runs_root(), args.run))


def shrink(args: argparse.Namespace) -> int:
    """Merge one expert of each layer."""
    from ..checkpoint import growth
    from ..checkpoint.probe import probe_loss, probe_rows
    from ..config.schema import Config
    from ..run.directory import runs_root

    if args.rows < 1:
        raise UserError("--rows must be at least 1")
    source = growth.open_source(args.target)
    rows = probe_rows(Config(**(source.loaded.config or {})), args.rows)
    known = loads(source)
    experts = growth.coldest(known or {}, _given(args.expert))
    done = growth.shrink(source, experts, known, runs_root(), args.run, lambda shape, held: probe_loss(shape, held, rows))
    return _tell(args, {**done, "rows": rows.rows, "held_out": rows.held_out})


def loads(source: Source) -> Mapping[int, list[float]] | None:
    """Tokens per expert by layer in the last 100 steps before the checkpoint, by the run's log; else by its own count."""
    from ..monitoring import record as rec
    from ..monitoring.log import read_records
    from ..monitoring.moe import observations

    log = source.path.parent.parent / "metrics.jsonl"
    if log.is_file():
        step = source.loaded.step
        layers, seen = observations(r for r in read_records(log) if not (isinstance(r, rec.Experts) and r.step > step))
        recent = [item.load_LE for item in seen if item.step > step - RECENT]
        if layers == source.layers and recent and all(load_LE.shape[1] == source.experts for load_LE in recent):
            return dict(zip(layers, sum(recent[1:], recent[0]).tolist(), strict=True))
    return source.window()


def _given(texts: list[str]) -> dict[int, int]:
    found = {}
    for text in texts:
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
        if match is None:
            raise UserError(f"--expert {text}: give LAYER:EXPERT, both counted from 0, e.g. --expert 2:5")
        found[int(match[1])] = int(match[2])
    return found


def _tell(args: argparse.Namespace, done: dict[str, Any]) -> int:
    if args.json:
        print_json(done)
        return 0
    count, added = done["experts"], done["parameters_added"]
    print(safe(f"{done['path']}: {count['before']} experts made {count['after']}, {added:+,} parameters"))
    for row in done["layers"]:
        into = f" into {row['into']} (its share {100 * row['share']:.0f} %)" if "into" in row else " split in two"
        print(safe(f"  layer {row['layer']}: expert {row['expert']}{into}"))
    if "loss_before" in done:
        kind = "held-out" if done["held_out"] else "training"
        print(safe(f"  loss on {done['rows']} {kind} rows: {done['loss_before']:.4f} before, {done['loss_after']:.4f} after"))
    run = Path(done["run"]).name
    print(safe(f"  `lumina-engine train --run {run} --resume` goes on from step {done['step']:,}"))
    return 0
