"""The expert map over time: one layer (experts by time), or one figure of all layers (layers by time). No Textual in here."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.style import Style

from ..paint import Piece, fit, whole
from ..routing import LayerTime, RoutingHistory
from .expert_cells import Ink, fewer_columns, level_of


@dataclass(frozen=True)
class Figure:
    """A figure of a layer: its name in the records, its heading, its text, and what `level` of the map's five it has."""

    name: str
    head: str
    title: str
    text: Callable[[float], str]
    level: Callable[[float], int]


def _share(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def _count(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "-"


def _small(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _steps(*limits: float) -> Callable[[float], int]:
    """Levels 1 to 4 by limits: 1 is fine, 4 is bad."""
    return lambda value: 1 + bisect.bisect_right(limits, value)


FIGURES = (
    Figure("imbalance", "max", "max/mean", _share, _steps(1.25, 1.6, 2.0)),
    Figure("entropy", "entr.", "entropy", _share, lambda value: _steps(0.05, 0.15, 0.3)(1 - value)),
    Figure("dead", "dead", "dead experts", _count, _steps(1, 2, 4)),
    Figure("dropped", "drop", "dropped share", _percent, _steps(0.001, 0.01, 0.05)),
    Figure("bias_range", "bias", "bias range", _small, _steps(0.1, 0.5, 1.0)),
    Figure("confidence", "conf", "confidence", _share, level_of),
)
BY_NAME = {figure.name: figure for figure in FIGURES}


@dataclass
class Picture:
    """Lines that are ready to be shown, and what lies under each cell. `at(y, x)` of a cursor gives words."""

    lines: list[list[Piece]]
    left: int = 0  # columns before the first cell
    each: int = 1  # columns of a cell
    cells: int = 0  # cells in a row


def _spread(cells: Sequence[Piece], each: int) -> list[Piece]:
    return [(text * each, style) for text, style in cells]


def _axis(first: int, last: int, left: int, width: int, style: Style) -> list[Piece]:
    """The steps of the first and the last column."""
    a, b = whole(first), whole(last)
    if width < len(a) + len(b) + 1:
        return [(" " * left + fit(b, width, "right"), style)]
    return [(" " * left + a + " " * (width - len(a) - len(b)) + b, style)]


def _span(first: int, last: int, width: int) -> str:
    """The steps of a column, shorter in a narrow panel."""
    return f"steps {whole(first)} to {whole(last)}" if width >= 40 else f"{whole(first)}-{whole(last)}"


def _column_width(columns: int, room: int) -> int:
    return max(1, min(4, room // max(1, columns)))


def layer_picture(time: LayerTime, width: int, height: int, ink: Ink, row: int, column: int) -> tuple[Picture, str]:
    """One layer: experts from top to bottom, time from left to right. The cell under (`row`, `column`) in words."""
    share_TE = time.share_TE
    experts = share_TE.shape[1]
    label, newest_width = len(str(max(0, experts - 1))) + 2, 6
    room = max(1, width - label - newest_width)
    share, dead, starts = fewer_columns(share_TE, time.dead_TE, room)
    rows = max(1, height - (1 if height >= 4 else 0))
    per = 2 if ink.halves and experts > rows else 1
    page = rows * per
    first = row // page * page
    each, cells = _column_width(len(starts), room), len(starts)
    lines: list[list[Piece]] = []
    for top in range(first, min(experts, first + page), per):
        pair = [e for e in range(top, top + per) if e < experts]
        pieces: list[Piece] = []
        for t in range(cells):
            values = [*((float(share[t, e]), bool(dead[t, e])) for e in pair), (math.nan, False)]
            text, style = ink.cell(*values[0]) if per == 1 else ink.pair(values[0], values[1])
            if row in pair and t == column:
                style += Style(reverse=True)
            pieces.append((text * each, style))
        newest = float(share_TE[-1, top]) if len(share_TE) else math.nan
        lines.append(
            [
                (fit(f"E{top}", label - 1) + " ", ink.palette.dim),
                *pieces,
                (" " * (room - cells * each), None),
                (fit(_share(newest), newest_width, "right"), ink.palette.text),
            ]
        )
    if height >= 4 and cells:
        lines.append(_axis(int(time.first_T[0]), int(time.last_T[-1]), label, cells * each, ink.palette.faint))
    words = ""
    if cells and row < experts:
        column = min(column, cells - 1)
        stop = int(starts[column + 1]) if column + 1 < cells else len(time.last_T)
        state = "dead" if dead[column, row] else f"{_share(float(share[column, row]))} x fair"
        words = f"E{row} {state}, {_span(int(time.first_T[starts[column]]), int(time.last_T[stop - 1]), width)}"
    return Picture(lines, label, each, cells), words


def figure_picture(
    history: RoutingHistory, figure: Figure, layers: Sequence[int], width: int, height: int, ink: Ink, row: int, column: int
) -> tuple[Picture, str]:
    """One figure of all layers: layers from top to bottom, time from left to right."""
    label, newest_width = max((len(str(layer)) for layer in layers), default=1) + 2, 8
    room = max(1, width - label - newest_width)
    rows = max(1, height - (1 if height >= 4 else 0))
    first = max(0, row) // rows * rows
    lines: list[list[Piece]] = []
    words, cells, each, ends = "", 0, 1, (0, 0)
    for at, layer in enumerate(layers[first : first + rows], start=first):
        time = history.layer(layer)
        if time is None or not len(time.last_T):
            continue
        values_T = time.figures[figure.name]
        starts = np.arange(0, len(values_T), max(1, -(-len(values_T) // room)))
        worse = np.fmin if figure.name in ("entropy", "confidence") else np.fmax
        values = worse.reduceat(values_T, starts)
        cells, each, ends = len(values), _column_width(len(values), room), (int(time.first_T[0]), int(time.last_T[-1]))
        pieces = _figure_cells(values, figure, ink, min(column, cells - 1) if at == row else None)
        newest = figure.text(float(values_T[-1]))
        lines.append(
            [
                (fit(f"L{layer}", label - 1) + " ", ink.palette.dim),
                *_spread(pieces, each),
                (" " * (room - cells * each), None),
                (fit(newest, newest_width, "right"), ink.palette.text),
            ]
        )
        if at == row:
            t = min(column, cells - 1)
            stop = int(starts[t + 1]) if t + 1 < cells else len(values_T)
            span = _span(int(time.first_T[starts[t]]), int(time.last_T[stop - 1]), width)
            words = f"L{layer} {figure.text(float(values[t]))}, {span}"
    if height >= 4 and cells:
        lines.append(_axis(*ends, label, cells * each, ink.palette.faint))
    return Picture(lines, label, each, cells), words


def figures_below(history: RoutingHistory, layers: Sequence[int], width: int, height: int, ink: Ink) -> list[list[Piece]]:
    """As many figures over time as fit into `height` lines, each with its name above it."""
    lines: list[list[Piece]] = []
    for figure in FIGURES:
        picture, _ = figure_picture(history, figure, layers, width, max(4, len(layers) + 1), ink, -1, -1)
        block: list[list[Piece]] = [[(f" {figure.title} over time", ink.palette.dim)], *picture.lines]
        if not picture.lines or len(lines) + len(block) + 1 > height:
            break
        if lines:
            lines.append([])
        lines += block
    return lines


def _figure_cells(values: np.ndarray, figure: Figure, ink: Ink, chosen: int | None) -> list[Piece]:
    """A cell a value; neighbours of one level are one piece."""
    looks = [ink.cell(math.nan, False), *(ink.cell(share, False) for share in (0.1, 0.5, 1.0, 1.5, 3.0))]
    levels = [figure.level(value) + 1 if math.isfinite(value) else 0 for value in values.tolist()]
    pieces: list[Piece] = []
    for (level, marked), group in itertools.groupby(enumerate(levels), lambda item: (item[1], item[0] == chosen)):
        text, style = looks[level]
        count = sum(1 for _ in group)
        pieces.append((text * count, style + Style(reverse=True) if marked else style))
    return pieces
