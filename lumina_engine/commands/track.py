"""`lumina-engine track RUN`: feed an experiment tracker from a run's log, or say how far each one is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import common

HELP = "feed an experiment tracker from a run's records"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="name of a run, or its folder")
    parser.add_argument(
        "--to", metavar="TRACKER", help="tensorboard, wandb, mlflow or trackio; without it the state of each one is shown"
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of the runs (default ./runs or $LUMINA_RUNS)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..config.trackers import NAMES
    from ..run import tracking
    from ..run.directory import find, runs_root

    directory = find(args.run, Path(args.runs) if args.runs else runs_root())
    if args.to is None:
        rows = [tracking.status(directory, name) for name in NAMES if tracking.place(directory, name).exists()]
        return _show(args, rows, directory.name)
    code = tracking.main([str(directory.path), args.to])
    return _show(args, [tracking.status(directory, args.to)], directory.name) or code


def _show(args: argparse.Namespace, rows: list[dict[str, Any]], name: str) -> int:
    if args.json:
        common.print_json(rows)
    elif not rows:
        print(common.safe(f"run {name} feeds no tracker: `lumina-engine track {name} --to tensorboard` starts one"))
    else:
        cells = [
            [row["tracker"], row["state"], row["step"], row["behind_bytes"], row["error"] or row["folder"]] for row in rows
        ]
        print(common.safe(common.table(cells, ["tracker", "state", "step", "bytes behind", "error or folder"], right=(2, 3))))
    return 0
