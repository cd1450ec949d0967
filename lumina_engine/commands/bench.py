"""`lumina-engine bench`: measure what using Lumina costs on this machine."""

from __future__ import annotations

import argparse

from .common import UserError, print_json

HELP = "measure the terminal program on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "start-up, key delay, CPU, bytes and memory of `lumina` in a pseudo-terminal (about 12 minutes)"
    tui = verbs.add_parser("tui", help=text, description=text, allow_abbrev=False)
    tui.add_argument("--json", action="store_true", help="a JSON object a line for each figure; the last line has all")
    tui.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, not what it costs")
    tui.add_argument("--only", metavar="LIST", default="", help="only these measurements, separated by commas")


def row(label: str, goal: float | None, value: float | None, unit: str, holds: bool | None, note: str) -> str:
    """One line of the table: what, figure beside goal, whether it holds."""
    shown = "-" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    limit = "" if goal is None else f"<= {goal:,.3g}"
    word = {None: "", True: "ok", False: "MISSED"}[holds]
    return f"{label:<58} {shown:>9} {unit:<7} {limit:>9}  {word:<6} {note}".rstrip()


def run(args: argparse.Namespace) -> int:
    import importlib.util
    import tempfile
    from pathlib import Path

    from ..bench.tui import HEADLINES, MEASUREMENTS, QUICK, Sizes, measure

    if importlib.util.find_spec("lumina_tui") is None:
        raise UserError("lumina_tui is not installed: there is no terminal program to measure")
    names = [measurement.__name__ for measurement in MEASUREMENTS]
    only = [word for word in args.only.split(",") if word]
    if unknown := [word for word in only if word not in names]:
        raise UserError(f"no measurement {unknown[0]!r}: there are {', '.join(names)}")
    figures = []
    with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
        for figure in measure(Path(folder), QUICK if args.quick else Sizes(), only):
            figures.append(figure)
            if args.json:
                shown = {"figure": figure.name, "what": figure.label, "unit": figure.unit, "goal": figure.goal}
                print_json({**shown, "value": figure.value, "holds": figure.holds, "note": figure.note}, lines=True)
            else:
                print(row(figure.label, figure.goal, figure.value, figure.unit, figure.holds, figure.note), flush=True)
    if args.json:
        print_json({**dict.fromkeys(HEADLINES), **{figure.name: figure.value for figure in figures}}, lines=True)
    return 0
