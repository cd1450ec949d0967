"""Rows that a run leaves out after a rollback, as a pure function of the list: no state, nothing is read.

Global rows are numbered 0, 1, 2 … over all epochs (epoch · rows per epoch + index). What a run takes is that endless list
without the ranges of its skip list; `place` and `row` translate between a row's number and its place in what is taken.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SkipList:
    """Ranges [begin, end) of global row numbers that are never taken: sorted, apart, none empty."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[Iterable[int]]) -> SkipList:
        """The union of any ranges; those that meet or overlap become one, empty ones vanish.

        Raises:
            ValueError: something else than pairs of whole numbers from 0 up.
        """
        merged: list[tuple[int, int]] = []
        for begin, end in sorted((int(begin), int(end)) for begin, end in ranges):
            if begin < 0:
                raise ValueError(f"row {begin} of a skip list is below 0")
            if begin >= end:
                continue
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        return cls(tuple(merged))

    def __or__(self, other: SkipList) -> SkipList:
        return SkipList.of((*self.ranges, *other.ranges))

    def __len__(self) -> int:
        """Rows left out."""
        return sum(end - begin for begin, end in self.ranges)

    def place(self, row: int) -> int:
        """How many rows are taken before `row`: its place, or that of the next one taken if it is left out itself."""
        return row - sum(min(end, row) - begin for begin, end in self.ranges if begin < row)

    def row(self, place: int) -> int:
        """The number of the row at `place`; the reverse of `place` for every row that is taken."""
        starts: list[int] = []  # the place at which each range is left out
        gone = 0
        for begin, end in self.ranges:
            starts.append(begin - gone)
            gone += end - begin
        passed = bisect_right(starts, place)
        return place + sum(end - begin for begin, end in self.ranges[:passed])
