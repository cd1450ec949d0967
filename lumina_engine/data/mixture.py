"""The mixture of tasks: which task a row of the run comes from, and which of its rows, as a pure function of its place.

`MixturePlan.at(epoch, index)` depends on (fingerprints, shares, seed, epoch, index) alone and costs the same for any place, so
a mixed run resumes anywhere, on any number of ranks and workers. Each task counts its own rows one after the other through its
own epochs: none comes twice or never within one.

Places fall into blocks of 256. The values 0 … 255, times 4,096, plus an offset of the block, are compared with the cumulated
shares (in units of 2^-20), which is systematic sampling: each block holds every task in its share, rounded down or up. The
offsets of 4,096 blocks are a van der Corput sequence (Niederreiter, "Random Number Generation and Quasi-Monte Carlo Methods",
1992, chapter 3), so the rounding averages out over few blocks and is exact after 2^20 rows; how many of the first b offsets lie
below a bound follows from the binary digits of b. Inside a block the order is a permutation of the seed.

A task that has been repeated `max_epochs` times ends at an exact place; from the next row on its share goes to the others, in
proportion to theirs. Behind the end of all tasks the shares hold once more without a limit: only rows of a skip list are
replaced from there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from .order import Order

MIX_VERSION = 1  # part of the fingerprint of a mixture: raise it when the same shares give another sequence
BLOCK_BITS, OFFSET_BITS = 8, 12
BLOCK = 1 << BLOCK_BITS  # rows among which every task has its share
OFFSETS = 1 << OFFSET_BITS
UNITS = BLOCK * OFFSETS  # what shares are rounded to, and the rows after which they are exact


def temper(weights: Sequence[float], temperature: float) -> list[float]:
    """Shares, which sum to 1, in proportion to weight^(1/temperature).

    As in multilingual training (Conneau et al., arXiv:1911.02116, section 3.1): above 1 evens out, below 1 sharpens.

    Raises:
        ValueError: a weight that is not a positive number, or no such temperature.
    """
    if not weights or any(not (math.isfinite(weight) and weight > 0) for weight in weights):
        raise ValueError(f"weights {list(weights)}: each must be a number above 0")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: it must be above 0")
    logs = [math.log(weight) / temperature for weight in weights]  # no power of a small temperature overflows
    raised = [math.exp(value - max(logs)) for value in logs]
    return [value / math.fsum(raised) for value in raised]


def apportion(shares: Sequence[float], units: int) -> list[int]:
    """Whole units in proportion to `shares`, by largest remainder (Hamilton), at least one for each."""
    rest = units - len(shares)
    exact = [share * rest / math.fsum(shares) for share in shares]
    found = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (found[i] - exact[i], i))
    for i in by_remainder[: rest - sum(found)]:
        found[i] += 1
    return [value + 1 for value in found]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row of a mixed run comes from: `epoch` and `index` count in the rows of its task."""

    task: int
    epoch: int
    index: int


class _Phase:
    """A stretch of the run with the same tasks: `begin` in places of the run, `before` rows of each task taken until then."""

    def __init__(self, begin: int, before: list[int], tasks: list[int], shares: Sequence[float], order: Order) -> None:
        self.begin, self.before, self.tasks, self.order = begin, before, tasks, order
        self.bounds = np.cumsum(apportion([shares[task] for task in tasks], UNITS)).tolist()  # the last one is UNITS
        self.block = lru_cache(maxsize=64)(self._block)

    def _block(self, number: int) -> tuple[list[int], list[int]]:
        """Of each place of a block: the task (as an index into `tasks`), and which row of it that is in this phase."""
        values = (np.arange(BLOCK) << OFFSET_BITS) + _reversed(number % OFFSETS, OFFSET_BITS)
        kinds = np.searchsorted(self.bounds, values, side="right")[self.order.documents(number, 0, BLOCK)]
        rows = np.empty(BLOCK, dtype=np.int64)
        for kind, taken in enumerate(self._in_blocks(number)):
            mine = kinds == kind
            rows[mine] = taken + np.arange(int(mine.sum()))
        return kinds.tolist(), rows.tolist()

    def _in_blocks(self, blocks: int) -> list[int]:
        """Rows of each task in the first `blocks` blocks."""
        periods, rest = divmod(blocks, OFFSETS)
        below = [0]
        for bound in self.bounds:
            whole, part = divmod(bound, OFFSETS)
            below.append(periods * bound + rest * whole + _offsets_below(rest, part))
        return [high - low for low, high in pairwise(below)]

    def taken(self, places: int) -> list[int]:
        """Rows of each task in the first `places` places of the phase."""
        blocks, rest = divmod(places, BLOCK)
        found = self._in_blocks(blocks)
        for kind in self.block(blocks)[0][:rest]:
            found[kind] += 1
        return found

    def place_of(self, kind: int, row: int) -> int:
        """The place behind row number `row` of a task, the first place at which `row + 1` of it are taken."""
        low, high = 0, BLOCK
        while self.taken(high)[kind] <= row:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.taken(middle)[kind] <= row else (low, middle)
        return high


def _reversed(value: int, bits: int) -> int:
    """The binary digits of `value` in reverse."""
    return int(f"{value:0{bits}b}"[::-1], 2) if bits else 0


def _offsets_below(count: int, limit: int) -> int:
    """How many of the first `count` offsets are below `limit`.

    `count` is a sum of powers of two, each an aligned run of places: the reversed digits of such a run of 2^j take every value
    in their j upper digits and one in the others.
    """
    found = start = 0
    for j in range(OFFSET_BITS, -1, -1):
        if count >> j & 1:
            low = OFFSET_BITS - j
            fixed = _reversed(start >> j, low)
            found += max(0, (limit - fixed + (1 << low) - 1) >> low)
            start += 1 << j
    return found


class MixturePlan:
    """The sequence of a mixed run.

    Args:
        fingerprint: of the data of all tasks.
        rows: rows of one epoch of each task.
        shares: of each task; they need not sum to 1.
        max_epochs: how often each task may be repeated; None is without end.

    An epoch of the run has as many rows as all tasks together, whatever their shares.

    Raises:
        ValueError: no task, a task without rows, or a share that is not above 0.
    """

    def __init__(
        self, fingerprint: str, rows: Sequence[int], shares: Sequence[float], seed: int, max_epochs: float | None = None
    ) -> None:
        if not rows or len(rows) != len(shares) or min(rows) < 1 or not all(share > 0 for share in shares):
            raise ValueError(f"tasks of {list(rows)} rows with shares {list(shares)}: each needs rows and a share above 0")
        if len(rows) > BLOCK:
            raise ValueError(f"{len(rows)} tasks: at most {BLOCK}")
        self.rows, self.shares, self.seed, self.fingerprint = list(rows), list(shares), seed, fingerprint
        self.num_rows = sum(rows)
        self.limits = None if max_epochs is None else [max(1, math.floor(count * max_epochs + 1e-9)) for count in rows]
        self.capacity = None if self.limits is None else sum(self.limits)  # rows until all tasks have ended
        self._phases = self._plan()
        self._begins = [phase.begin for phase in self._phases]

    def _plan(self) -> list[_Phase]:
        """The phases: one more for each task that ends, and one without limits."""
        phases: list[_Phase] = []
        begin, taken, tasks = 0, [0] * len(self.rows), list(range(len(self.rows)))
        while self.limits is not None and tasks:
            phase = self._phase(len(phases), begin, taken, tasks)
            ends = [phase.place_of(kind, self.limits[task] - taken[task] - 1) for kind, task in enumerate(tasks)]
            length = min(ends)
            for task, count in zip(tasks, phase.taken(length), strict=True):
                taken[task] += count
            phases.append(phase)
            begin += length
            tasks = [task for task in tasks if taken[task] < self.limits[task]]
        return [*phases, self._phase(len(phases), begin, taken, list(range(len(self.rows))))]

    def _phase(self, number: int, begin: int, taken: list[int], tasks: list[int]) -> _Phase:
        order = Order(f"{self.fingerprint}/mix {MIX_VERSION}/{number}", self.seed, BLOCK)
        return _Phase(begin, list(taken), tasks, self.shares, order)

    def at(self, epoch: int, index: int) -> Place:
        """Where the row at place `index` of `epoch` comes from. Raises IndexError for a negative place."""
        number = epoch * self.num_rows + index
        if number < 0:
            raise IndexError(f"place {number}")
        phase = self._phases[bisect_right(self._begins, number) - 1]
        block, within = divmod(number - phase.begin, BLOCK)
        kinds, rows = phase.block(block)
        task = phase.tasks[kinds[within]]
        return Place(task, *divmod(phase.before[task] + rows[within], self.rows[task]))

    def taken(self, places: int) -> list[int]:
        """Rows of each task among the first `places` of the run."""
        phase = self._phases[bisect_right(self._begins, places) - 1]
        found = list(phase.before)
        for task, count in zip(phase.tasks, phase.taken(places - phase.begin), strict=True):
            found[task] += count
        return found

    def places(self, num_epochs: int) -> int:
        """Rows of a run of `num_epochs`: fewer where all tasks end before."""
        whole = self.num_rows * num_epochs
        return whole if self.capacity is None else min(whole, self.capacity)
