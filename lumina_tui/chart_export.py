"""What a chart shows as a file: CSV of the full series, SVG drawn from the data, text. No Textual; may run in a thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lumina_engine.monitoring.svg import Series, line_svg
from lumina_engine.text import safe_text

from .history import BASES, METRICS, Base
from .series import Event
from .terminal import Glyphs
from .widgets.picture import Curve, Limits, Options
from .widgets.plot import build
from .widgets.readings import difference_text, evaluation, label_of, read, value_text, x_text

CSV_HEAD = "run,kind,step,tokens,hours,time,value,ema,text"
_ROWS = 20_000  # formatted at once
TEXT_SIZE = (120, 30)  # cells


@dataclass(frozen=True)
class Copied:
    """The full series of one run, independent of what the run does next (N samples, E evaluations)."""

    name: str
    letter: str
    x: dict[Base, np.ndarray]  # N each
    value_N: np.ndarray
    ema_N: np.ndarray
    eval_x: dict[Base, np.ndarray]  # E each
    eval_E: np.ndarray
    events: list[tuple[Event, dict[Base, float]]]


def copied(curve: Curve, options: Options) -> Copied:
    """The series of a curve in the metric and smoothing of a chart."""
    store, metric = curve.store, options.metric
    history = curve.history(metric)
    value_N = history.metrics[metric].values.copy()
    ema_N = history.smooth(metric, options.weight).values.copy() if options.weight else np.full(len(value_N), np.nan)
    evals = store.evals if metric == "loss" else None
    return Copied(
        curve.name or "run",
        curve.letter,
        {base: history.x(base).copy() for base in BASES},
        value_N,
        ema_N,
        {base: evals.x(base).copy() if evals is not None else np.empty(0) for base in BASES},
        evals.metrics["loss"].values.copy() if evals is not None else np.empty(0),
        [(event, {base: store.x_of(event.step, base) for base in BASES}) for event in store.events],
    )


# CSV


def csv_text(runs: Sequence[Copied]) -> str:
    """Every sample, evaluation and event of every run, one row each; see CSV_HEAD. Times are unix seconds; unknown is empty."""
    return "\n".join([CSV_HEAD, *(row for run in runs for row in _rows(run))]) + "\n"


def _rows(run: Copied) -> Iterator[str]:
    name = _field(run.name)
    columns = [run.x["step"], run.x["tokens"], run.x["hours"], run.x["clock"], run.value_N, run.ema_N]
    for at in range(0, len(run.value_N), _ROWS):
        part = zip(*(column[at : at + _ROWS].tolist() for column in columns), strict=True)
        yield from (
            f"{name},step,{step},{tokens:.0f},{hours:.7g},{_time(clock)},{value:.7g},{_number(ema)},"
            for step, tokens, hours, clock, value, ema in part
        )
    for i, value in enumerate(run.eval_E.tolist()):
        x = {base: float(values[i]) for base, values in run.eval_x.items()}
        yield f"{name},eval,{x['step']:.0f},{x['tokens']:.0f},{x['hours']:.7g},{_time(x['clock'])},{value:.7g},,"
    for event, x in run.events:
        text = _field(f"{event.sign} {event.text}")
        yield f"{name},event,{event.step},{x['tokens']:.0f},{x['hours']:.7g},{_time(event.t)},,,{text}"


def _time(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds else ""


def _number(value: float) -> str:
    return f"{value:.7g}" if value == value else ""


def _field(text: str) -> str:
    """A text as one CSV field that no spreadsheet takes for a formula."""
    text = safe_text(text).replace("\n", " ")
    if text[:1] in ("=", "+", "-", "@"):
        text = "'" + text
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r') else text


# SVG


def svg_text(runs: Sequence[Copied], options: Options, title: str = "") -> str:
    """All runs over the chart's X base: raw values faint behind smoothed ones, evaluations as points, events of the last."""
    series = []
    many = len(runs) > 1
    for run in sorted(runs, key=lambda run: run.letter):  # colours go by the order, not by which one is focused
        x = run.x[options.base]
        series.append(Series(run.name, x, run.value_N, "faint" if options.weight else "line"))
        if options.weight:
            series.append(Series(run.name, x, run.ema_N))
        if len(run.eval_E):
            series.append(Series(run.name if many else "eval", run.eval_x[options.base], run.eval_E, "points"))
    if runs and runs[-1].events:
        at = np.array([x[options.base] for _, x in runs[-1].events])
        series.append(Series("events", at, at, "events", [event.sign for event, _ in runs[-1].events]))
    metric = METRICS[options.metric]
    return line_svg(
        series,
        title=title or metric.label + (f", EMA {options.weight:g}" if options.weight else ""),
        x_label={"clock": "local time"}.get(options.base, options.base),
        y_label=metric.unit or metric.label,
        log_x=options.log_x,
        log_y=options.log_y,
        x_clock=options.base == "clock",
    )


# text


def picture_text(curves: Sequence[Curve], options: Options, glyphs: Glyphs) -> str:
    """The chart as it looks in 120x30 cells, and the values at the crosshair, or the newest ones."""
    plot = build(curves, options, *TEXT_SIZE, glyphs, Limits())
    rows = ["".join(text for text, _ in plot.frame.runs(y)).rstrip() for y in range(plot.frame.height)]
    head = " | ".join([label_of(options.metric), *([f"EMA {options.weight:g}"] if options.weight else []), *plot.notes])
    return "\n".join([head, *rows, "", *reading_lines(curves, options)]) + "\n"


def reading_lines(curves: Sequence[Curve], options: Options) -> list[str]:
    """One line a run: where, value, smoothed value, evaluation, difference to the pinned place."""
    lines = []
    for curve in curves:
        name = safe_text(" ".join(part for part in (curve.letter, curve.name) if part))
        at = read(curve.store, options, options.cross)
        if at is None:
            lines.append(f"{name}  no values")
            continue
        parts = [name] * bool(name) + [x_text(options.base, at.x), value_text(options.metric, at.value)]
        parts += [f"EMA {value_text(options.metric, at.smooth)}"] * (at.smooth is not None)
        score = evaluation(curve.store, at.step) if options.metric == "loss" else None
        parts += [f"eval {value_text('loss', score[1])} at {score[0]:,}"] if score is not None else []
        pinned = read(curve.store, options, options.pin) if options.pin is not None else None
        if pinned is not None:
            change = difference_text(options.metric, at.shown - pinned.shown)
            parts.append(f"{change} since {x_text(options.base, pinned.x)}")
        lines.append("  ".join(parts))
    return lines
