"""Packing "fit": whole documents into few rows, the fewest where they are few.

Windows of consecutive documents of the order are packed on their own. Within a window:

- best fit by falling length, which wastes little where there are thousands of documents of mixed lengths;
- in a small window, where one row counts, every row in turn is filled as far as the lengths allow (the "subset sum"
  heuristic; Caprara and Pferschy, "Worst-case analysis of the subset sum algorithm for bin packing", 2004), if that takes
  fewer rows;
- then the last pieces of long plain texts, which are cut where a row ends as it is, are cut once more where that saves the
  row in which they stand. No part gets shorter than a sixteenth of a row, so that each has a context.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

WINDOW = 8192  # documents that are packed together
_SMALL = 1024  # documents of a window in which one row more or less is a share of the data
_WORK = 1 << 36  # bound of documents² · size for filling rows exactly: a second or two
_PARTS_OF_ROW = 16  # the shortest part of a text that is cut once more is this part of a row


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of samples. `cuts` has the samples that were cut once more, each with the lengths of its parts.

    The first part of such a sample keeps its number. The others are numbered on from the last sample, in the order of `cuts`.
    """

    members: np.ndarray  # int64, samples row by row
    first: np.ndarray  # int64, index of each row's first member, and the end
    cuts: dict[int, list[int]]

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return len(self.first) - 1


def pack(lengths: np.ndarray, order: np.ndarray, size: int, loose: np.ndarray | None = None) -> Packed:
    """Samples of `lengths` (int64, each at most `size`), taken in `order`, into rows of `size` tokens.

    `loose` (bool, one for each sample) marks those that may be cut once more; None: none.
    """
    members: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    cuts: dict[int, list[int]] = {}
    following = len(lengths)  # number of the next part
    for begin in range(0, len(order), WINDOW):
        window = order[begin : begin + WINDOW]
        soft = np.zeros(len(window), dtype=bool) if loose is None else loose[window]
        window = window[np.lexsort((soft, -lengths[window]))]  # longest first, of equal ones those that may be cut come last
        rows = _best_fit(lengths, window, size)
        if len(window) <= _SMALL and len(window) ** 2 * size <= _WORK:
            rows = _filled(lengths, window, size, len(rows)) or rows
        if loose is not None and soft.any():
            found = _dissolve(rows, lengths, loose, size, following)
            following += sum(len(parts) - 1 for parts in found.values())
            cuts |= found
        members.append(np.fromiter((sample for row in rows for sample in row), dtype=np.int64))
        counts.append(np.fromiter(map(len, rows), dtype=np.int64))
    if not members:
        return Packed(np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64), cuts)
    return Packed(np.concatenate(members), np.concatenate([[0], np.cumsum(np.concatenate(counts))]), cuts)


def _best_fit(lengths: np.ndarray, window: np.ndarray, size: int) -> list[list[int]]:
    """Each sample of `window` (longest first) into the fullest row that has room for it."""
    rows: list[list[int]] = []
    samples, falling = window.tolist(), lengths[window].tolist()
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted: the fullest row that still fits comes first
    for sample, length in zip(samples, falling, strict=True):
        at = bisect_left(free, (length, -1))
        if at < len(free):
            room, row = free.pop(at)
            rows[row].append(sample)
        else:
            room, row = size, len(rows)
            rows.append([sample])
        if room - length >= falling[-1]:
            insort(free, (room - length, row))
    return rows


def _filled(lengths: np.ndarray, window: np.ndarray, size: int, most: int) -> list[list[int]] | None:
    """Each row: the longest sample that is left, and of the others those that together fill it best, long ones first.

    `window` is longest first. None as soon as it cannot be fewer than `most` rows.
    """
    rows: list[list[int]] = []
    samples, falling = window.tolist(), lengths[window].tolist()
    left = sum(falling)
    while samples:
        if len(rows) - (-left // size) >= most:
            return None
        row, room = [samples.pop(0)], size - falling.pop(0)
        reach = [1]  # bit n of entry i: the first i samples have some whose lengths add up to n
        for length in falling:
            if reach[-1] >> room:
                break
            reach.append((reach[-1] | reach[-1] << length) & ((2 << room) - 1))
        total = reach[-1].bit_length() - 1
        left -= size - room + total
        for i in range(len(reach) - 2, -1, -1):
            if not reach[i] >> total & 1:
                total -= falling.pop(i)
                row.append(samples.pop(i))
        rows.append(row)
    return rows


def _dissolve(rows: list[list[int]], lengths: np.ndarray, loose: np.ndarray, size: int, following: int) -> dict[int, list[int]]:
    """Cut the samples of rows that hold nothing but `loose` ones over what other rows have free, emptiest row first.

    Changes `rows`; returns the cuts, whose new parts are numbered from `following`.
    """
    cuts: dict[int, list[int]] = {}
    room = _Room([size - int(lengths[row].sum()) for row in rows])
    emptiest = sorted((i for i, row in enumerate(rows) if all(loose[sample] for sample in row)), key=lambda i: -room.of[i])
    gone: set[int] = set()
    grown: set[int] = set()
    for i in emptiest:
        if i in grown or not room.of[i]:
            continue
        spread = room.spread({sample: int(lengths[sample]) for sample in rows[i]}, size // _PARTS_OF_ROW, without=i)
        for sample, parts in spread.items():
            names = [sample, *range(following, following + len(parts) - 1)]
            following += len(parts) - 1
            for name, (row, _) in zip(names, parts, strict=True):
                rows[row].append(name)
                grown.add(row)
            if len(parts) > 1:
                cuts[sample] = [length for _, length in parts]
        if spread:
            gone.add(i)
    rows[:] = [row for i, row in enumerate(rows) if i not in gone]
    return cuts


class _Room:
    """Free tokens of each row (`of`), and a heap of them, in which entries that are no longer true are passed over."""

    def __init__(self, of: list[int]) -> None:
        self.of = of
        self._heap = [(-tokens, row) for row, tokens in enumerate(of) if tokens]
        heapq.heapify(self._heap)

    def _emptiest(self) -> int | None:
        """The row with most room, no longer in the heap."""
        while self._heap:
            tokens, row = heapq.heappop(self._heap)
            if tokens and self.of[row] == -tokens:
                return row
        return None

    def _set(self, row: int, tokens: int) -> None:
        self.of[row] = tokens
        heapq.heappush(self._heap, (-tokens, row))

    def spread(self, samples: dict[int, int], least: int, without: int) -> dict[int, list[tuple[int, int]]]:
        """(row, tokens) of each part of `samples` (number: tokens), in other rows than `without`, which is then out of use.

        Empty, and nothing changed, where parts of at least `least` tokens do not all find a place.
        """
        before = {without: self.of[without]}
        self.of[without] = 0
        placed: dict[int, list[tuple[int, int]]] = {sample: [] for sample in samples}
        for sample, left in samples.items():
            while left:
                row = self._emptiest()
                part = 0 if row is None else min(left, self.of[row])
                if 0 < left - part < least:
                    part = left - least
                if row is not None:
                    before.setdefault(row, self.of[row])
                if row is None or (part < least and part < left):
                    for changed, tokens in before.items():
                        self._set(changed, tokens)
                    return {}
                placed[sample].append((row, part))
                left -= part
                self._set(row, self.of[row] - part)
        return placed
