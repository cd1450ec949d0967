"""Cells of the expert map: a share of the fair load as one glyph, in a row, in half-blocks, in pages. No Textual in here.

A share is a load divided by the fair one; five levels. An expert without a token is `x`, never hidden by its neighbours.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.style import Style

from lumina_engine.monitoring.experts import LayerLoad

from ..paint import Piece
from ..terminal import Palette

LEVELS = (0.25, 0.75, 1.25, 2.0)  # limits of the share of the fair load
GLYPHS = "·░▒▓█"
GLYPHS_ASCII = " .:+#"
UNKNOWN = " "
DEAD = "x"
HALF = "▀"
LIMIT_WARN = 2.0  # max / mean from which a layer is marked
WIDEST = 3  # cells for an expert, at most


def level_of(share: float) -> int:
    """0 (far below the fair share) to 4 (above twice the fair share)."""
    return bisect.bisect_right(LEVELS, share)


def _level(share: float, dead: bool) -> int:
    """A level, -1 for unknown, -2 for dead."""
    return -2 if dead else level_of(share) if math.isfinite(share) else -1


def shares(load: Sequence[float]) -> list[float]:
    """Loads divided by their mean; all NaN while nothing was routed."""
    total = sum(load)
    fair = total / len(load) if load else 0.0
    return [value / fair if fair > 0 and math.isfinite(fair) else math.nan for value in load]


def imbalance(load: LayerLoad) -> float:
    """max / mean of a layer, from its record or else from its loads."""
    return load.imbalance if load.imbalance is not None else max(shares(load.load), default=math.nan)


@dataclass(frozen=True)
class Ink:
    """How cells are drawn: styles, glyphs, and whether two of them fit into one (half-blocks need colours of their own)."""

    palette: Palette
    ascii: bool = False
    halves: bool = False
    _pairs: dict[tuple[int, int], Style] = field(default_factory=dict, compare=False, repr=False)  # by levels

    def cell(self, share: float, dead: bool) -> tuple[str, Style]:
        """One glyph."""
        if dead:
            return DEAD, self.palette.bad
        if not math.isfinite(share):
            return UNKNOWN, self.palette.faint
        level = level_of(share)
        return (GLYPHS_ASCII if self.ascii else GLYPHS)[level], self.palette.heat[level]

    def pair(self, upper: tuple[float, bool], lower: tuple[float, bool]) -> tuple[str, Style]:
        """Two cells in one, one above the other."""
        key = (_level(*upper), _level(*lower))
        style = self._pairs.get(key)
        if style is None:
            (_, above), (_, below) = self.cell(*upper), self.cell(*lower)
            style = Style(color=above.color, bgcolor=below.color)
            if upper[1] or lower[1]:
                behind = above if lower[1] and not upper[1] else below if not lower[1] else None
                style = self.palette.bad + Style(bgcolor=behind.color if behind is not None else None)
            self._pairs[key] = style
        return (DEAD if upper[1] or lower[1] else HALF), style


@dataclass(frozen=True)
class Row:
    """How the experts of a layer lie in a row of cells: from expert `first` on, `count` of them, `per` in a cell that is
    `each` columns wide."""

    first: int
    count: int
    per: int
    each: int

    @property
    def width(self) -> int:
        """Columns taken."""
        return -(-self.count // self.per) * self.each

    def of(self, cell: int) -> range:
        """The experts in a cell."""
        start = self.first + cell * self.per
        return range(start, min(start + self.per, self.first + self.count))


def row_of(experts: int, room: int, halves: bool, column: int) -> Row:
    """Fit experts into `room` columns: wide cells, single ones, two in one, then the page that has expert `column`."""
    room = max(1, room)
    if experts <= room:
        return Row(0, experts, 1, min(WIDEST, room // max(1, experts)))
    per = 2 if halves else 1
    if experts <= room * per:
        return Row(0, experts, per, 1)
    page = room * per
    first = column // page * page
    return Row(first, min(page, experts - first), per, 1)


def row_cells(values: Sequence[float], dead: Sequence[bool], row: Row, ink: Ink, chosen: int | None) -> list[Piece]:
    """The cells of one row; the one with expert `chosen` is reversed."""
    pieces: list[Piece] = []
    for cell in range(-(-row.count // row.per)):
        experts = [expert for expert in row.of(cell) if expert < len(values)]
        if not experts:
            pieces.append((" " * row.each, None))
            continue
        one = (values[experts[0]], dead[experts[0]])
        if row.per == 1:
            text, style = ink.cell(*one)
        else:
            other = (values[experts[1]], dead[experts[1]]) if len(experts) > 1 else (math.nan, False)
            text, style = ink.pair(one, other)
        if chosen is not None and chosen in experts:
            style += Style(reverse=True)
        pieces.append((text * row.each if text != DEAD else DEAD.ljust(row.each), style))
    return pieces


def fewer_columns(share_TE: np.ndarray, dead_TE: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of time merged until they fit: per expert the share farthest from fair, and dead if it was so at any time.

    Returns shares and deaths per column, and the index of the first of the merged columns.
    """
    columns = len(share_TE)
    starts = np.unique(np.arange(0, columns, max(1, -(-columns // max(1, width)))))
    if len(starts) == columns:
        return share_TE, dead_TE, starts
    with np.errstate(all="ignore"):
        far_TE = np.nan_to_num(np.abs(np.log(np.maximum(share_TE, 1e-6))), nan=-1.0)
    share = np.full((len(starts), share_TE.shape[1]), np.nan, share_TE.dtype)
    for at, (start, stop) in enumerate(zip(starts, [*starts[1:], columns], strict=True)):
        best_E = far_TE[start:stop].argmax(axis=0)
        share[at] = share_TE[start:stop][best_E, np.arange(share_TE.shape[1])]
    return share, np.logical_or.reduceat(dead_TE, starts, axis=0), starts
