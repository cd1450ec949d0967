"""From numbers to glyphs: columns of dots as braille, half blocks or ASCII, on a grid of cells. Pure numpy.

Shape suffixes: H rows of cells, W columns of cells, D dot columns, R dot rows.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from ..terminal import Glyphs

DOTS: dict[Glyphs, tuple[int, int]] = {"braille": (2, 4), "block": (1, 2), "ascii": (1, 1)}  # columns, rows in a cell
_BRAILLE_BITS = tuple((np.uint32(left), np.uint32(right)) for left, right in ((0, 3), (1, 4), (2, 5), (6, 7)))
_BLOCKS = np.array([ord(c) for c in " ▀▄█"], np.uint32)
SPACE = ord(" ")


class Spans(NamedTuple):
    """From which dot row to which (both included, 0 at the bottom) each dot column is filled; NaN where it is empty."""

    low_D: np.ndarray
    high_D: np.ndarray


def joined(low_D: np.ndarray, high_D: np.ndarray) -> Spans:
    """Spans stretched half way to their neighbours, so that a line has no holes; NaN columns break it."""
    low, high = np.round(low_D), np.round(high_D)
    if len(low) > 1:
        with np.errstate(invalid="ignore"):
            rise = low[1:] - high[:-1]  # > 1: a hole on the way up
            fall = low[:-1] - high[1:]
            up = rise > 1
            middle = np.floor((low[1:] + high[:-1]) / 2)
            high[:-1] = np.where(up, middle, high[:-1])
            low[1:] = np.where(up, middle + 1, low[1:])
            down = fall > 1
            middle = np.floor((low[:-1] + high[1:]) / 2)
            low[:-1] = np.where(down, np.minimum(low[:-1], middle + 1), low[:-1])
            high[1:] = np.where(down, np.maximum(high[1:], middle), high[1:])
    return Spans(low, high)


def dots(spans: Spans, rows: int) -> np.ndarray:
    """Boolean grid (R, D), top row first, clipped to `rows`."""
    row_R = np.arange(rows - 1, -1, -1, dtype=np.float32)[:, None]  # half the bytes; dot rows are exact in it
    with np.errstate(invalid="ignore", over="ignore"):
        filled: np.ndarray = (row_R >= spans.low_D.astype(np.float32)) & (row_R <= spans.high_D.astype(np.float32))
    return filled


def cells(grid_RD: np.ndarray, glyphs: Glyphs) -> np.ndarray:
    """Code points (H, W) of a dot grid; SPACE where a cell is empty."""
    across, down = DOTS[glyphs]
    height, width = grid_RD.shape[0] // down, grid_RD.shape[1] // across
    grid = grid_RD[: height * down, : width * across].reshape(height, down, width, across)
    if glyphs == "braille":
        bits = grid.view(np.uint8)
        code_HW = np.zeros((height, width), np.uint32)
        for row, column in np.ndindex(down, across):
            code_HW |= bits[:, row, :, column].astype(np.uint32) << _BRAILLE_BITS[row][column]
        return np.where(code_HW > 0, code_HW + 0x2800, SPACE).astype(np.uint32)
    if glyphs == "block":
        return _BLOCKS[grid[:, 0, :, 0] + 2 * grid[:, 1, :, 0]]
    single = grid[:, 0, :, 0]
    tall = single & (np.roll(single, 1, axis=0) | np.roll(single, -1, axis=0))
    return np.where(tall, ord("|"), np.where(single, ord("*"), SPACE)).astype(np.uint32)


class Frame:
    """A picture of H x W cells: code points and style numbers, to be compared with the picture before."""

    def __init__(self, width: int, height: int) -> None:
        self.code_HW = np.full((height, width), SPACE, np.uint32)
        self.style_HW = np.zeros((height, width), np.uint8)

    @property
    def width(self) -> int:
        return self.code_HW.shape[1]

    @property
    def height(self) -> int:
        return self.code_HW.shape[0]

    def layer(self, code_HW: np.ndarray, style: int, x: int = 0, y: int = 0) -> None:
        """Lay glyphs over the picture; a filled cell belongs to the newest layer alone."""
        h, w = code_HW.shape
        here = np.s_[y : y + h, x : x + w]
        filled = code_HW != SPACE
        self.code_HW[here] = np.where(filled, code_HW, self.code_HW[here])
        self.style_HW[here] = np.where(filled, style, self.style_HW[here])

    def put(self, x: int, y: int, text: str, style: int) -> None:
        """Write a text of one-cell characters, cut at the edges."""
        if not 0 <= y < self.height:
            return
        code_W, style_W, width = self.code_HW[y], self.style_HW[y], self.width
        for i, character in enumerate(text, x):
            if 0 <= i < width:
                code_W[i] = ord(character)
                style_W[i] = style

    def runs(self, y: int) -> list[tuple[str, int]]:
        """The pieces of one row: text and style number."""
        style_W = self.style_HW[y]
        edges = [0, *(np.flatnonzero(style_W[1:] != style_W[:-1]) + 1).tolist(), self.width]
        text = self.code_HW[y].astype("<u4").tobytes().decode("utf-32-le")
        return [(text[a:b], int(style_W[a])) for a, b in itertools.pairwise(edges) if b > a]


def changed_regions(new: Frame, old: Frame | None, most: int = 8) -> list[tuple[int, int, int, int]] | None:
    """Rectangles (x, y, width, height) that differ; None if the whole picture should be repainted."""
    if old is None or new.code_HW.shape != old.code_HW.shape:
        return None
    differs_HW = (new.code_HW != old.code_HW) | (new.style_HW != old.style_HW)
    rows = np.flatnonzero(differs_HW.any(axis=1))
    if not len(rows):
        return []
    columns = np.flatnonzero(differs_HW.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1))
    best, area = [box], box[2] * box[3]
    if len(rows) <= most:
        each = []
        for y in rows.tolist():
            inside = np.flatnonzero(differs_HW[y])
            each.append((int(inside[0]), y, int(inside[-1] - inside[0] + 1), 1))
        if sum(region[2] for region in each) < area:
            best, area = each, sum(region[2] for region in each)
    return best if area < 0.6 * differs_HW.size else None
