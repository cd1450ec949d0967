"""Curves of a run for a terminal that only prints (plotext), and as SVG: the same series for both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .curves import ROUTING_METRICS, SMOOTHING, STEP_METRICS, History, reduced
from .svg import Series, line_svg
from .ticks import count_labels, ticks

POINTS = 500  # handed to plotext for one series, at most
METRICS = (*STEP_METRICS, *ROUTING_METRICS)
LABELS = {
    "loss": "loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU (share of peak)",
    "aux_loss": "balance loss",
    "z_loss": "z loss",
    "step_time": "step time (s)",
    "data_time": "data (s)",
    "forward_time": "forward (s)",
    "backward_time": "backward (s)",
    "optimizer_time": "optimizer (s)",
    "imbalance": "experts, max/mean of the worst layer",
    "entropy": "experts, entropy of the worst layer",
    "dead": "experts without a token",
    "dropped": "dropped share",
}
_PLAIN = ("lr",)  # exact series: a moving average would only blur them
_FRAME = str.maketrans("┌┐└┘─│┤├┬┴┼", "++++-|++++" + "+")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Curve:
    """One metric over steps (N,), its moving average, and evaluations (M,) that belong to it."""

    name: str
    step: np.ndarray
    value: np.ndarray
    ema: np.ndarray | None
    eval_step: np.ndarray
    eval_value: np.ndarray

    @property
    def label(self) -> str:
        """The name for a person, with its unit."""
        return LABELS[self.name]


def curve(history: History, name: str, last: int | None = None) -> Curve:
    """A metric of a history; `last`: only its newest steps. The average is that of the whole series all the same."""
    none = np.empty(0)
    if name in ROUTING_METRICS:
        step, value, ema = history.routing.step, history.routing[name], None
    else:
        step, value = history.steps.step, history.steps[name]
        ema = None if name in _PLAIN else history.ema(name)
    begin = max(0, len(step) - last) if last is not None else 0
    eval_step, eval_value = (history.evals.step, history.evals["loss"]) if name == "loss" else (none.astype(np.int64), none)
    seen = eval_step >= (step[begin] if len(step) else 0)
    return Curve(name, step[begin:], value[begin:], None if ema is None else ema[begin:], eval_step[seen], eval_value[seen])


def svg(found: Curve, title: str, *, log_y: bool = False, width: int = 960, height: int = 320) -> str:
    """A curve as one SVG document: raw faint, average bold, evaluations as points."""
    plain = found.label.partition(" (")[0]
    name = f"{plain}, EMA {SMOOTHING:g}" if found.ema is not None else plain
    series = [Series(name, found.step, found.value, "line" if found.ema is None else "faint")]
    if found.ema is not None:
        series.append(Series(name, found.step, found.ema))  # the same name: one colour, one legend entry
    if len(found.eval_step):
        series.append(Series("evaluation", found.eval_step, found.eval_value, "points"))
    return line_svg(series, title=title, log_y=log_y, width=width, height=height)


def stacked(pictures: Sequence[str], width: int, height: int) -> str:
    """Several SVG documents of one size below each other in one."""
    if len(pictures) == 1:
        return pictures[0]
    inner = []
    for number, picture in enumerate(pictures):
        inner.append(own_ids(picture, number).replace("<svg ", f'<svg y="{number * height}" ', 1))
    whole = f"0 0 {width} {height * len(pictures)}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{whole}" width="{width}" height="{height * len(pictures)}">'
    return "\n".join([head, *inner, "</svg>"]) + "\n"


def own_ids(picture: str, number: int) -> str:
    """The picture with ids that no other in the same document has."""
    return picture.replace('id="plot"', f'id="plot{number}"').replace('"url(#plot)"', f'"url(#plot{number})"')


def text(
    found: Curve, title: str, *, width: int, height: int, log_y: bool = False, colour: bool = False, ascii: bool = False
) -> str:
    """A curve in characters: `.` raw, a line its average (`*` in ASCII), `o` evaluations. Nothing is said by colour only."""
    import plotext._figure  # the public module draws on one global figure

    figure = plotext._figure._figure_class()
    figure._limit_size(False, False)  # not to the terminal: what is wanted may go into a file
    figure.plotsize(width, height)
    figure.theme("clear")
    pen = "*" if ascii else "braille"
    parts, left_out, drawn = [], 0, False
    layers: list[tuple[str, np.ndarray, np.ndarray, str, str]] = []
    if found.ema is None:
        layers.append(("", found.step, found.value, pen, "cyan"))
    else:
        layers += [
            (". raw", found.step, found.value, ".", "blue"),
            (f"{pen if ascii else '-'} EMA {SMOOTHING:g}", found.step, found.ema, pen, "cyan"),
        ]
    if len(found.eval_step):
        layers.append(("o evaluation", found.eval_step, found.eval_value, "o", "orange"))
    for label, step, value, marker, tint in layers:
        x, y, below = _points(step, value, log_y)
        left_out = max(left_out, below)
        parts += [label] if label else []
        drawn |= _draw(figure, x, y, marker, tint if colour else "default", dots=marker in ".o")
    heading = "  ".join([title, *parts] + ([f"{left_out:,} values left out"] if left_out else []))
    if not drawn:
        return f"{heading}\n(no values)"
    if log_y:
        figure.yscale("log")
    places = ticks(float(found.step[0]), float(found.step[-1]), max(2, width // 16), whole=True)
    figure.xticks(places, count_labels(places))  # steps are whole
    figure.title(heading)
    figure.xlabel("step")
    return _finish(figure.build(), colour, ascii)


def _points(step: np.ndarray, value: np.ndarray, log_y: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """At most `POINTS` points: minimum and maximum of each column; NaN where it has none. And how many have no place."""
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(value) & ((value > 0) | (not log_y))
    value = np.where(usable, value, np.nan)
    missing = int((~usable).sum())
    if len(step) <= POINTS:
        return step, value, missing
    columns = reduced(step, value, POINTS // 2)
    return np.repeat(columns["step"], 2), np.stack([columns["min"], columns["max"]], axis=1).reshape(-1), missing


def _draw(figure: Any, x: np.ndarray, y: np.ndarray, marker: str, tint: str, dots: bool) -> bool:
    """Draw points, or lines between neighbours; a gap breaks the line. Whether there was anything."""
    good = np.isfinite(y)
    if not good.any():
        return False
    if dots:
        figure.scatter(x[good].tolist(), y[good].tolist(), marker=marker, color=tint)
        return True
    for run in np.split(np.arange(len(y)), np.flatnonzero(np.diff(good)) + 1):
        if good[run[0]]:
            draw = figure.plot if len(run) > 1 else figure.scatter
            draw(x[run].tolist(), y[run].tolist(), marker=marker, color=tint)
    return True


def _finish(drawn: str, colour: bool, ascii: bool) -> str:
    if not colour:
        drawn = _ESCAPES.sub("", drawn)
    if ascii:
        drawn = drawn.translate(_FRAME).encode("ascii", "replace").decode()
    return "\n".join(line.rstrip() for line in drawn.rstrip("\n").split("\n"))
