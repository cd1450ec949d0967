"""Reducing long series for a few columns without losing a spike: min-max pyramid, smoothing, percentile range. Pure numpy.

Shape suffixes: N samples, B blocks, C columns, F some of them, S both sides of each column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_Reduced = tuple[Floats, Floats, Floats, NDArray[np.int64]]  # lows, highs, sums and counts of finite values per column

BLOCK = 64  # samples in a block of the lowest level
FANOUT = 4  # blocks of one level in a block of the next
_MAX_BLOCKS = 32_768  # blocks looked at for one picture; beyond, the next level is used
_COARSE = 4096  # samples in a block, at most, where everything is summed up
SAMPLE = 4096  # values that a percentile is estimated from: its rank is then right to 0.4 points (one sigma)
_KEEP = 64  # columns from which on a picture is kept for the next one
_SAVE_EVERY = 4096  # samples between two saved states of the smoothing
_PIECE = 1 << 16  # samples smoothed at once: they fit the processor's cache
_SCAN = 64  # terms that the smoothing adds up in one matrix product


class Buffer:
    """A float32 or other array that grows by a quarter and can be cut."""

    def __init__(self, dtype: type = np.float32) -> None:
        self._data: np.ndarray = np.empty(256, dtype)
        self._size = 0
        self.cuts = 0  # how often it was cut: views taken before a cut may be overwritten

    @classmethod
    def of(cls, values: np.ndarray) -> Buffer:
        """A buffer that begins with `values` and owns the array."""
        made = cls(values.dtype.type)
        if len(values):
            made._data, made._size = values, len(values)
        return made

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        """A view of the values; valid until the next change."""
        return self._data[: self._size]

    def reserve(self, size: int) -> None:
        """Make room for `size` values in all; for a quarter more than there is at least, so that it is not asked for often."""
        if size > len(self._data):
            grown = np.empty(max(size, len(self._data) + len(self._data) // 4), self._data.dtype)
            grown[: self._size] = self.values
            self._data = grown

    def extend(self, values: np.ndarray) -> None:
        """Append values."""
        need = self._size + len(values)
        if need > len(self._data):
            self.reserve(need)
        self._data[self._size : need] = values
        self._size = need

    def truncate(self, size: int) -> None:
        """Keep the first `size` values."""
        if size < self._size:
            self._size = max(0, size)
            self.cuts += 1


@dataclass(frozen=True)
class Columns:
    """What a picture of C columns needs. NaN where a column has no finite value."""

    low_C: Floats
    high_C: Floats
    mean_C: Floats
    count_C: NDArray[np.int64]  # finite values in the column
    missing_C: NDArray[np.int64]  # values that are not finite


@dataclass
class _Level:
    block: int
    low: Buffer
    high: Buffer
    total: Buffer
    count: Buffer


class Pyramid:
    """A series with minima, maxima, sums and counts per block, so that any window costs its width, not its length.

    Non-finite values are kept as NaN: they count as missing and never enter a bound or a mean.
    """

    def __init__(self) -> None:
        self._raw = Buffer(np.float32)
        self._levels: list[_Level] = []
        self._kept: tuple[np.ndarray, _Reduced] | None = None  # edges of the picture before, and what came of them

    @classmethod
    def of(cls, raw: Buffer) -> Pyramid:
        """The pyramid of samples that are finite or NaN; it owns the buffer."""
        made = cls()
        made._raw = raw
        made.build()
        return made

    @property
    def raw(self) -> Buffer:
        """The samples (float32, finite or NaN)."""
        return self._raw

    def __len__(self) -> int:
        return len(self._raw)

    @property
    def values(self) -> np.ndarray:
        """All samples (float32); valid until the next change."""
        return self._raw.values

    def extend(self, values: np.ndarray) -> None:
        """Append samples. The blocks over them are made when they are asked for."""
        values = np.asarray(values, np.float32)
        self._raw.extend(np.where(np.isfinite(values), values, np.float32(np.nan)))

    def truncate(self, size: int) -> None:
        """Keep the first `size` samples."""
        self._raw.truncate(size)
        self._kept = None
        for level in self._levels:
            for buffer in (level.low, level.high, level.total, level.count):
                buffer.truncate(len(self._raw) // level.block)

    def build(self) -> None:
        """Make the blocks over all samples: for who has a thread to do it in, before a picture asks for them."""
        block, index = BLOCK, 0
        while len(self._raw) >= block:
            if index == len(self._levels):
                self._levels.append(_Level(block, Buffer(), Buffer(), Buffer(np.float64), Buffer(np.int64)))
            level = self._levels[index]
            done, whole = len(level.low), len(self._raw) // block
            if whole > done:
                self._fill(index, level, done, whole)
            block, index = block * FANOUT, index + 1

    def _fill(self, index: int, level: _Level, done: int, whole: int) -> None:
        with np.errstate(invalid="ignore"):
            if index == 0:
                part_BN = self._raw.values[done * BLOCK : whole * BLOCK].reshape(-1, BLOCK)
                finite_BN = np.isfinite(part_BN)
                level.low.extend(np.fmin.reduce(part_BN, axis=1))
                level.high.extend(np.fmax.reduce(part_BN, axis=1))
                level.total.extend(np.where(finite_BN, part_BN, 0.0).sum(axis=1, dtype=np.float64))
                level.count.extend(finite_BN.sum(axis=1))
                return
            below = self._levels[index - 1]
            span = slice(done * FANOUT, whole * FANOUT)
            level.low.extend(np.fmin.reduce(below.low.values[span].reshape(-1, FANOUT), axis=1))
            level.high.extend(np.fmax.reduce(below.high.values[span].reshape(-1, FANOUT), axis=1))
            level.total.extend(below.total.values[span].reshape(-1, FANOUT).sum(axis=1))
            level.count.extend(below.count.values[span].reshape(-1, FANOUT).sum(axis=1))

    def columns(self, edges: np.ndarray) -> Columns:
        """Reduce the samples `edges[c]` to `edges[c+1]` (exclusive) of each column c; exact at every zoom.

        Args:
            edges: C+1 sample indices that never fall, each from 0 to len(self).
        """
        edges = np.asarray(edges, np.int64)
        start_C, stop_C = edges[:-1], edges[1:]
        self.build()
        low_C, high_C, total_C, count_C = self._reduce(edges)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_C = np.where(count_C > 0, total_C / count_C, np.nan)
        return Columns(low_C, high_C, mean_C, count_C, stop_C - start_C - count_C)

    def _reduce(self, edges: np.ndarray) -> _Reduced:
        """Columns that the picture before had too are taken from it: samples are only appended, and a cut forgets it."""
        start_C, stop_C = edges[:-1], edges[1:]
        if self._kept is not None and len(self._kept[0]) == len(edges):
            before, (low_C, high_C, total_C, count_C) = self._kept
            new_F = np.flatnonzero((before[:-1] != start_C) | (before[1:] != stop_C))
            if 2 * len(new_F) < len(start_C):
                reduced = low_C.copy(), high_C.copy(), total_C.copy(), count_C.copy()
                fresh = self._over(start_C[new_F], stop_C[new_F])
                reduced[0][new_F], reduced[1][new_F], reduced[2][new_F], reduced[3][new_F] = fresh
                self._kept = edges.copy(), reduced
                return reduced
        reduced = self._over(start_C, stop_C)
        if len(start_C) >= _KEEP:
            self._kept = edges.copy(), reduced
        return reduced

    def extremes(self) -> tuple[float, float, int]:
        """Lowest and highest value of all samples (NaN without any) and how many are finite. Costs no look at each sample."""
        self.build()
        level = next((level for level in reversed(self._levels) if level.block <= _COARSE), None)
        done = len(level.low) * level.block if level is not None else 0
        rest = self._raw.values[done:]
        low, high, count = np.fmin.reduce(rest, initial=np.nan), np.fmax.reduce(rest, initial=np.nan), np.isfinite(rest).sum()
        if level is not None:
            low = np.fmin(low, np.fmin.reduce(level.low.values))
            high = np.fmax(high, np.fmax.reduce(level.high.values))
            count += level.count.values.sum()
        return float(low), float(high), int(count)

    def _level_for(self, span: int) -> _Level | None:
        if span <= _MAX_BLOCKS:
            return None
        for level in self._levels:
            if span // level.block <= _MAX_BLOCKS:
                return level
        return self._levels[-1] if self._levels else None

    def _over(self, start_C: np.ndarray, stop_C: np.ndarray) -> _Reduced:
        """From the blocks of the level that suits the width, and the samples beside them."""
        level = self._level_for(int(stop_C[-1] - start_C[0]) if len(start_C) else 0)
        if level is None:
            return _reduce_raw(self._raw.values, start_C, stop_C)
        block = level.block
        first_C = np.minimum(-(-start_C // block), len(level.low))  # whole blocks inside the column
        last_C = np.maximum(first_C, np.minimum(stop_C // block, len(level.low)))
        inside_C = last_C > first_C
        left_C = np.where(inside_C, np.minimum(first_C * block, stop_C), stop_C)  # samples before and after those blocks
        right_C = np.where(inside_C, last_C * block, stop_C)
        over = (level.low.values, level.high.values, level.total.values, level.count.values)
        low_C, high_C, total_C, count_C = _spans(*over, first_C, last_C)
        sides = np.concatenate((start_C, right_C)), np.concatenate((left_C, stop_C))
        low_S, high_S, total_S, count_S = _reduce_raw(self._raw.values, *sides)
        for side in (slice(None, len(start_C)), slice(len(start_C), None)):
            low_C, high_C = np.fmin(low_C, low_S[side]), np.fmax(high_C, high_S[side])
            total_C, count_C = total_C + total_S[side], count_C + count_S[side]
        return low_C, high_C, total_C, count_C


def _spans(
    low_N: np.ndarray,
    high_N: np.ndarray,
    total_N: np.ndarray,
    count_N: np.ndarray | None,
    start_C: np.ndarray,
    stop_C: np.ndarray,
) -> _Reduced:
    """Each array over [start:stop] of each column: NaN and 0 where nothing is inside. Columns lie side by side or apart,
    never over each other. Without counts each entry counts as 1."""
    size = len(start_C)
    low_C, high_C, total_C, count_C = np.full(size, np.nan), np.full(size, np.nan), np.zeros(size), np.zeros(size, np.int64)
    filled_C = stop_C > start_C
    if not filled_C.any():
        return low_C, high_C, total_C, count_C
    start_F, stop_F = start_C[filled_C], stop_C[filled_C]
    lo, hi = int(start_F.min()), int(stop_F.max())
    pairs = np.empty(2 * len(start_F), np.int64)
    pairs[0::2], pairs[1::2] = start_F - lo, stop_F - lo
    if pairs[-1] == hi - lo:  # reduceat needs indices inside the data: the last stop is the end anyway
        pairs = pairs[:-1]
    low_C[filled_C] = np.fmin.reduceat(low_N[lo:hi], pairs)[0::2]
    high_C[filled_C] = np.fmax.reduceat(high_N[lo:hi], pairs)[0::2]
    total_C[filled_C] = np.add.reduceat(total_N[lo:hi], pairs, dtype=np.float64)[0::2]
    count_C[filled_C] = stop_F - start_F if count_N is None else np.add.reduceat(count_N[lo:hi], pairs, dtype=np.int64)[0::2]
    return low_C, high_C, total_C, count_C


def _reduce_raw(raw_N: np.ndarray, start_C: np.ndarray, stop_C: np.ndarray) -> _Reduced:
    length_C = np.maximum(0, stop_C - start_C)
    end_C = np.cumsum(length_C)
    begin_C = end_C - length_C
    total = int(end_C[-1]) if len(end_C) else 0
    picked = raw_N[np.arange(total) + np.repeat(start_C - begin_C, length_C)]  # only the samples that are needed
    finite = np.isfinite(picked)
    if finite.all():
        return _spans(picked, picked, picked, None, begin_C, end_C)
    return _spans(picked, picked, np.where(finite, picked, np.float32(0.0)), finite, begin_C, end_C)


class Smooth:
    """Debiased exponential moving average of a growing series, kept for every sample.

    `m = w*m + (1-w)*y` over the finite samples, shown as `m / (1 - w**n)` with n finite samples so far (the first sample is
    shown as it is; Kingma & Ba 2015 use the same correction). NaN samples leave a gap and do not count.
    """

    def __init__(self, weight: float) -> None:
        if not 0.0 <= weight < 1.0:
            raise ValueError(f"smoothing weight {weight} is not in [0, 1)")
        self.weight = weight
        self._shown = Pyramid()
        self._states: list[tuple[float, int]] = [(0.0, 0)]  # (m, n) before sample k * _SAVE_EVERY
        self._m, self._n = 0.0, 0

    @property
    def pyramid(self) -> Pyramid:
        """The smoothed series."""
        return self._shown

    def catch_up(self, values_N: np.ndarray) -> None:
        """Continue over a series whose first `len(self.pyramid)` samples have been seen (after `truncate`, if it was cut)."""
        for at in range(len(self._shown), len(values_N), _PIECE):
            self._continue(values_N[at : at + _PIECE], at)

    def _continue(self, values_N: np.ndarray, at: int) -> None:
        """Take the samples `at` and following."""
        finite_N = np.isfinite(values_N)
        terms_F = (values_N if finite_N.all() else values_N[finite_N]).astype(np.float64)
        state_F = _decayed((1.0 - self.weight) * terms_F, self.weight, self._m)
        for save in range((at // _SAVE_EVERY + 1) * _SAVE_EVERY, at + len(values_N) + 1, _SAVE_EVERY):
            seen = int(np.count_nonzero(finite_N[: save - at]))
            self._states.append((float(state_F[seen - 1]) if seen else self._m, self._n + seen))
        self._shown.extend(_shown(state_F, finite_N, self.weight, self._n))
        self._m = float(state_F[-1]) if len(state_F) else self._m
        self._n += len(state_F)

    def truncate(self, size: int, values_N: np.ndarray) -> None:
        """Forget the samples from `size` on; `values_N` are the raw samples, of which the first `size` still hold."""
        if size >= len(self._shown):
            return
        block = size // _SAVE_EVERY
        del self._states[block + 1 :]
        self._m, self._n = self._states[block]
        self._shown.truncate(block * _SAVE_EVERY)
        self.catch_up(values_N[:size])


def _decayed(terms_N: np.ndarray, weight: float, state: float) -> Floats:
    """`s = weight*s + term` for each term, beginning with `state`.

    A block scan: all blocks of _SCAN terms at once as one matrix product, then the states between the blocks by the same rule
    (with the weight of a whole block), so that a million terms cost no Python loop over samples.
    """
    size = len(terms_N)
    if weight == 0.0 or not size:
        return np.asarray(terms_N, np.float64)
    if size <= _SCAN:
        scanned_N = np.empty(size)
        for i, term in enumerate(terms_N.tolist()):
            state = weight * state + term
            scanned_N[i] = state
        return scanned_N
    power_S = weight ** np.arange(_SCAN + 1)
    apart_SS = np.arange(_SCAN)[None, :] - np.arange(_SCAN)[:, None]
    padded_N = np.zeros(-(-size // _SCAN) * _SCAN)
    padded_N[:size] = terms_N
    inside_BS = padded_N.reshape(-1, _SCAN) @ np.where(apart_SS >= 0, power_S[np.maximum(apart_SS, 0)], 0.0)
    carried_B = np.empty(len(inside_BS))
    carried_B[0] = state
    carried_B[1:] = _decayed(inside_BS[:-1, -1], float(power_S[-1]), state)
    inside_BS += carried_B[:, None] * power_S[None, 1:]
    return inside_BS.reshape(-1)[:size]


def _shown(state_F: np.ndarray, finite_N: np.ndarray, weight: float, seen: int) -> Floats:
    """The states without their bias towards 0, in the places of the finite samples, of which `seen` came before."""
    shown_F = state_F
    biased = 0 if weight == 0.0 else min(len(state_F), max(0, int(-40.0 / np.log(weight)) + 1 - seen))  # w**n < 1e-17 beyond
    if biased > 0:
        shown_F = state_F.copy()
        shown_F[:biased] /= -np.expm1((seen + np.arange(1, biased + 1)) * np.log(weight))
    if len(state_F) == len(finite_N):
        return shown_F
    shown_N = np.full(len(finite_N), np.nan)
    shown_N[finite_N] = shown_F
    return shown_N


def smooth(values_N: np.ndarray, weight: float) -> Floats:
    """The debiased moving average of a whole series; NaN where a value is not finite."""
    values_N = np.asarray(values_N, np.float64)
    finite_N = np.isfinite(values_N)
    return _shown(_decayed((1.0 - weight) * values_N[finite_N], weight, 0.0), finite_N, weight, 0)


def percentile_range(
    values_N: np.ndarray, low: float = 5.0, high: float = 95.0, positive: bool = False
) -> tuple[float, float] | None:
    """The percentiles of the finite (and positive) values, estimated from at most 16,384 even ones; None without any."""
    step = max(1, -(-len(values_N) // SAMPLE))
    sample = values_N[::step].copy()  # side by side in memory
    good = np.isfinite(sample) & (sample > 0) if positive else np.isfinite(sample)
    if not good.all():
        sample = sample[good]
    if not len(sample):
        return None
    places = [share / 100 * (len(sample) - 1) for share in (low, high)]
    firsts = [int(place) for place in places]
    nexts = [min(first + 1, len(sample) - 1) for first in firsts]
    sample.partition([*firsts, *nexts])  # what np.percentile gives, without ordering more than these places
    found = []
    for place, first, after in zip(places, firsts, nexts, strict=True):
        below, above = float(sample[first]), float(sample[after])
        found.append(below + (place - first) * (above - below))
    return found[0], found[1]


def thin(values_N: np.ndarray, columns: int) -> np.ndarray:
    """Evenly spread minima and maxima (two values a column) of a series: for plots that take a plain list of points."""
    if len(values_N) <= 2 * columns:
        return np.asarray(values_N, np.float64)
    pyramid = Pyramid()
    pyramid.extend(values_N)
    reduced = pyramid.columns(np.linspace(0, len(values_N), columns + 1).astype(np.int64))
    return np.stack([reduced.low_C, reduced.high_C], axis=1).reshape(-1)
