"""Packing "fit": whole documents into as few rows as can be.

Windows of consecutive documents of the order are packed on their own. Within a window:

- best fit by falling length: in a window of thousands this comes within one or two rows of the fewest there can be;
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
        rows = _best_fit(lengths, window, size)
        if len(window) <= _SMALL and len(rows) > _fewest(lengths, window, size):
            rows = min(rows, _filled(lengths, window, size), key=len)
        if loose is not None and loose[window].any():
            found = _dissolve(rows, lengths, loose, size, following)
            following += sum(len(parts) - 1 for parts in found.values())
            cuts |= found
        members.append(np.fromiter((sample for row in rows for sample in row), dtype=np.int64))
        counts.append(np.fromiter(map(len, rows), dtype=np.int64))
    if not members:
        return Packed(np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64), cuts)
    return Packed(np.concatenate(members), np.concatenate([[0], np.cumsum(np.concatenate(counts))]), cuts)


def _fewest(lengths: np.ndarray, window: np.ndarray, size: int) -> int:
    """No packing takes fewer rows than this."""
    return -(-int(lengths[window].sum()) // size)


def _falling(lengths: np.ndarray, window: np.ndarray) -> tuple[list[int], list[int]]:
    """The samples of a window, longest first, and their lengths."""
    falling = window[np.argsort(-lengths[window], kind="stable")]
    return falling.tolist(), lengths[falling].tolist()


def _best_fit(lengths: np.ndarray, window: np.ndarray, size: int) -> list[list[int]]:
    """Each sample, longest first, into the fullest row that has room for it."""
    rows: list[list[int]] = []
    samples, falling = _falling(lengths, window)
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


def _filled(lengths: np.ndarray, window: np.ndarray, size: int) -> list[list[int]]:
    """Each row: the longest sample that is left, and of the others those that together fill it best, long ones first."""
    rows: list[list[int]] = []
    samples, falling = _falling(lengths, window)
    while samples:
        row, room = [samples.pop(0)], size - falling.pop(0)
        reach = [1]  # bit n of entry i: the first i samples have some whose lengths add up to n
        for length in falling:
            if reach[-1] >> room:
                break
            reach.append((reach[-1] | reach[-1] << length) & ((2 << room) - 1))
        total = reach[-1].bit_length() - 1
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
    used = [int(lengths[row].sum()) for row in rows]
    cuts: dict[int, list[int]] = {}
    free = [(used[i] - size, i) for i in range(len(rows)) if used[i] < size]  # a heap: the emptiest row comes first
    heapq.heapify(free)
    candidates = sorted((used[i], i) for i in range(len(rows)) if used[i] < size and all(loose[sample] for sample in rows[i]))
    gone: set[int] = set()
    touched: set[int] = set()
    for _, i in candidates:
        if i in touched:
            continue
        rest = [entry for entry in free if entry[1] != i]
        heapq.heapify(rest)
        spread = _spread([(sample, int(lengths[sample])) for sample in rows[i]], rest, size // _PARTS_OF_ROW)
        if spread is None:
            break
        for sample, parts in spread.items():
            names = [sample, *range(following, following + len(parts) - 1)]
            following += len(parts) - 1
            for name, (row, _) in zip(names, parts, strict=True):
                rows[row].append(name)
                touched.add(row)
            if len(parts) > 1:
                cuts[sample] = [length for _, length in parts]
        gone.add(i)
        free = rest
    rows[:] = [row for i, row in enumerate(rows) if i not in gone]
    return cuts


def _spread(samples: list[tuple[int, int]], free: list[tuple[int, int]], least: int) -> dict[int, list[tuple[int, int]]] | None:
    """Where the parts of `samples` (number, tokens) go: (row, tokens) of each. None where they do not all find a place.

    Takes from the heap `free` of (-free tokens, row).
    """
    placed: dict[int, list[tuple[int, int]]] = {}
    for sample, left in samples:
        parts = placed.setdefault(sample, [])
        while left:
            if not free:
                return None
            room, row = heapq.heappop(free)
            taken = min(left, -room)
            if 0 < left - taken < least:
                taken = left - least
            if taken < least and taken < left:
                return None
            parts.append((row, taken))
            left -= taken
            if room + taken < 0:
                heapq.heappush(free, (room + taken, row))
    return placed
