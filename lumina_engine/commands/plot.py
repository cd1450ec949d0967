"""`lumina-engine runs plot`: curves of a run printed with plotext, or written as SVG."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from ..monitoring.curves import History
    from ..run.directory import RunDirectory

DEFAULT = "loss,lr"
_SMALLEST, _LARGEST = (30, 8), (1000, 500)  # columns, lines of a printed chart
_SVG_SIZE = (960, 320)  # px


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options behind RUN."""
    parser.add_argument("--metrics", metavar="LIST", default=DEFAULT, help=f"metrics, separated by commas (default {DEFAULT})")
    parser.add_argument("--svg", metavar="FILE", help="write an SVG file instead of printing")
    parser.add_argument("--width", type=int, metavar="N", help="columns (default: the terminal's, else 80), or px of the SVG")
    parser.add_argument("--height", type=int, metavar="N", help="lines of each chart (default 18), or px of the SVG")
    parser.add_argument("--log-y", action="store_true", help="logarithmic values")
    parser.add_argument("--last", type=int, metavar="N", help="only the newest N steps")
    parser.add_argument("--ascii", action="store_true", help="only ASCII characters")


def run(args: argparse.Namespace, directory: RunDirectory) -> int:
    """Print or write the curves of a run."""
    from ..monitoring.curves import read_history

    names = _names(args.metrics)
    if args.last is not None and args.last < 1:
        raise common.UserError(f"--last {args.last}: give at least 1")
    history = read_history(directory.metrics_path)
    if args.json:
        common.print_json({"run": directory.name, "metrics": {name: _figures(history, name, args.last) for name in names}})
        return 0
    if args.svg:
        _write_svg(args, directory.name, history, names)
    else:
        _print(args, directory.name, history, names)
    return 0


def _names(text: str) -> list[str]:
    import difflib

    from ..monitoring.plot import METRICS

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise common.UserError(f"--metrics {name}: there is no such metric; {hint}metrics: {', '.join(METRICS)}")
    if not names:
        raise common.UserError("--metrics is empty: name at least one, such as loss")
    return list(dict.fromkeys(names))


def _size(args: argparse.Namespace, default: tuple[int, int], least: tuple[int, int], most: tuple[int, int]) -> tuple[int, int]:
    size = (default[0] if args.width is None else args.width, default[1] if args.height is None else args.height)
    for name, value, low, high in zip(("width", "height"), size, least, most, strict=True):
        if not low <= value <= high:
            raise common.UserError(f"--{name} {value}: give {low} to {high}")
    return size


def _figures(history: History, name: str, last: int | None) -> dict[str, Any]:
    """A metric in at most 500 columns."""
    from ..monitoring import plot
    from ..monitoring.curves import reduced

    found = plot.curve(history, name, last)
    columns = {key: values.tolist() for key, values in reduced(found.step, found.value, plot.POINTS).items()}
    return {**columns, "eval": {"step": found.eval_step.tolist(), "value": found.eval_value.tolist()}}


def _write_svg(args: argparse.Namespace, run: str, history: History, names: list[str]) -> None:
    from ..monitoring import plot

    width, height = _size(args, _SVG_SIZE, (160, 120), (20_000, 20_000))
    pictures = [
        plot.svg(
            plot.curve(history, name, args.last), f"{run}: {plot.LABELS[name]}", log_y=args.log_y, width=width, height=height
        )
        for name in names
    ]
    Path(args.svg).write_text(plot.stacked(pictures, width, height), encoding="utf-8")
    print(common.safe(f"written to {args.svg}"))


def _print(args: argparse.Namespace, run: str, history: History, names: list[str]) -> None:
    import shutil

    from ..monitoring import plot

    columns = min(_LARGEST[0], max(_SMALLEST[0], shutil.get_terminal_size((80, 24)).columns))
    width, height = _size(args, (columns, 18), _SMALLEST, _LARGEST)
    ascii_only = args.ascii or "utf" not in (sys.stdout.encoding or "").lower()
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"
    for name in names:
        found = plot.curve(history, name, args.last)
        title = common.safe(f"{run}: {found.label}").replace("\n", " ")
        print(plot.text(found, title, width=width, height=height, log_y=args.log_y, colour=colour, ascii=ascii_only))
    if history.unreadable:
        lost = sum(stop - start for start, stop in history.unreadable)
        print(f"{lost:,} bytes of the log are no records and were left out", file=sys.stderr)
