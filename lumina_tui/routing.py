"""Routing of the experts over a whole run, in bounded memory: columns of time that become coarser as the run grows.

Shape suffixes: N observations, T columns of time, L layers, E experts. A share is a load divided by the layer's fair share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lumina_engine.monitoring import record as rec

COLUMNS = 256  # of time, at most; two become one when they are full
CELLS = 4_000_000  # layers x experts x columns, at most
FEWEST = 16  # columns that even the largest model gets
BLOCKS = 32  # sets of layers that are told apart (a long record is split by layers)

# figures of a layer, and which of several observations a column keeps: the worst
FIGURES = ("imbalance", "entropy", "dead", "dropped", "bias_range", "confidence")
_LOW_IS_BAD = frozenset({"entropy", "confidence"})


@dataclass(frozen=True)
class LayerTime:
    """One layer over time. `dead_TE` tells whether an expert had an observation without a token; `figures[name]` has the worst
    value of each column."""

    first_T: np.ndarray  # steps
    last_T: np.ndarray
    dead_TE: np.ndarray
    figures: dict[str, np.ndarray]
    sum_TE: np.ndarray  # of the shares in each column
    known_T: np.ndarray  # how many there were

    @property
    def share_TE(self) -> np.ndarray:
        """The mean share in each column; NaN where it is unknown."""
        known_T = self.known_T.astype(np.float32)
        with np.errstate(all="ignore"):
            share_TE: np.ndarray = np.where(known_T[:, None] > 0, self.sum_TE / known_T[:, None], np.nan)
        return share_TE


@dataclass(frozen=True)
class Summary:
    """All layers in one row per observed step: worst max / mean, mean entropy, mean share of dropped choices."""

    step_N: np.ndarray
    imbalance_N: np.ndarray
    entropy_N: np.ndarray
    dropped_N: np.ndarray
    layers_N: np.ndarray  # how many layers the means are over


class Block:
    """Observations of the same layers. Every column but the last holds exactly `stride` of them."""

    FIELDS = ("first_T", "last_T", "count_T", "known_TL", "share_TLE", "dead_TLE", *(f"{name}_TL" for name in FIGURES))

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self.layers, self.experts, self.stride = tuple(layers), experts, 1
        shape_L = (0, len(self.layers))
        self.first_T, self.last_T, self.count_T = (np.zeros(0, np.int64) for _ in range(3))
        self.known_TL = np.zeros(shape_L, np.int64)  # observations with any load
        self.share_TLE = np.zeros((*shape_L, experts), np.float32)  # sums; NaN where a layer has no such expert
        self.dead_TLE = np.zeros((*shape_L, experts), np.bool_)
        self.worst: dict[str, np.ndarray] = {name: np.zeros(shape_L, np.float32) for name in FIGURES}

    @property
    def capacity(self) -> int:
        """Columns that this block may have; even."""
        cells = max(1, len(self.layers) * self.experts)
        return max(FEWEST, min(COLUMNS, CELLS // cells)) // 2 * 2

    @property
    def newest(self) -> int:
        """The newest observed step; -1 without any."""
        return int(self.last_T[-1]) if len(self.last_T) else -1

    def extend(self, step_N: np.ndarray, load_NLE: np.ndarray, worst: Mapping[str, np.ndarray]) -> None:
        """Append observations; `step_N` rises."""
        at = 0
        while at < len(step_N):
            open_room = self.stride - int(self.count_T[-1]) if len(self.count_T) else 0
            room = open_room + (self.capacity - len(self.count_T)) * self.stride
            if room == 0:
                self._halve()
                continue
            stop = min(len(step_N), at + room)
            self._append(step_N[at:stop], load_NLE[at:stop], {name: worst[name][at:stop] for name in FIGURES}, open_room)
            at = stop

    def _append(self, step_N: np.ndarray, load_NLE: np.ndarray, worst: Mapping[str, np.ndarray], open_room: int) -> None:
        with np.errstate(all="ignore"):
            total_NL = np.nansum(load_NLE, axis=2)
            fair_NL = total_NL / np.maximum(1, np.isfinite(load_NLE).sum(axis=2))
            known_NL = np.isfinite(total_NL) & (total_NL > 0)
            share_NLE = np.where(known_NL[..., None], load_NLE / np.where(known_NL, fair_NL, 1.0)[..., None], load_NLE * 0.0)
        starts = [0] if not open_room else [0, open_room][: 1 + (open_room < len(step_N))]
        starts += range(starts[-1] + self.stride, len(step_N), self.stride)
        ends = [*starts[1:], len(step_N)]
        pieces: dict[str, np.ndarray] = {
            "first_T": step_N[starts],
            "last_T": step_N[[end - 1 for end in ends]],
            "count_T": np.diff([*starts, len(step_N)]),
            "known_TL": np.add.reduceat(known_NL.astype(np.int64), starts),
            "share_TLE": np.add.reduceat(share_NLE, starts).astype(np.float32),
            "dead_TLE": np.logical_or.reduceat(load_NLE <= 0, starts),
        }
        with np.errstate(over="ignore"):
            for name in FIGURES:
                pieces[f"{name}_TL"] = _worse(name).reduceat(worst[name], starts).astype(np.float32)
        if open_room:
            self._merge_into_last({name: part[0] for name, part in pieces.items()})
            pieces = {name: part[1:] for name, part in pieces.items()}
        for name, part in pieces.items():
            self._set(name, np.concatenate([self._get(name), part.astype(self._get(name).dtype)]))

    def _merge_into_last(self, piece: Mapping[str, np.ndarray]) -> None:
        self.last_T[-1] = piece["last_T"]
        for name in ("count_T", "known_TL", "share_TLE"):
            self._get(name)[-1] += piece[name]
        self.dead_TLE[-1] |= piece["dead_TLE"]
        for name in FIGURES:
            column = self.worst[name]
            column[-1] = _worse(name)(column[-1], piece[f"{name}_TL"])

    def _halve(self) -> None:
        """Two columns become one."""
        self.first_T, self.last_T = self.first_T[::2].copy(), self.last_T[1::2].copy()
        for name in ("count_T", "known_TL", "share_TLE"):
            column = self._get(name)
            self._set(name, column[::2] + column[1::2])
        self.dead_TLE = self.dead_TLE[::2] | self.dead_TLE[1::2]
        self.worst = {name: _worse(name)(column[::2], column[1::2]) for name, column in self.worst.items()}
        self.stride *= 2

    def truncate(self, to_step: int) -> None:
        """Forget the columns that reach beyond a step."""
        size = int(np.searchsorted(self.last_T, to_step, side="right"))
        for name in self.FIELDS if size < len(self.last_T) else ():
            self._set(name, self._get(name)[:size].copy())

    def layer(self, layer: int) -> LayerTime:
        """One of the layers over time."""
        at = self.layers.index(layer)
        figures = {name: column[:, at] for name, column in self.worst.items()}
        return LayerTime(self.first_T, self.last_T, self.dead_TLE[:, at], figures, self.share_TLE[:, at], self.known_TL[:, at])

    def _get(self, name: str) -> np.ndarray:
        figure = name[:-3]
        found: np.ndarray = self.worst[figure] if figure in self.worst else getattr(self, name)
        return found

    def _set(self, name: str, value: np.ndarray) -> None:
        if name[:-3] in self.worst:
            self.worst[name[:-3]] = value
        else:
            setattr(self, name, value)


class RoutingHistory:
    """What the `experts` records of a run say about each layer over time. `version` counts changes."""

    def __init__(self) -> None:
        self.version = 0
        self._blocks: list[Block] = []  # the one extended last comes last

    @property
    def layers(self) -> list[int]:
        """All layers seen, in order."""
        return sorted({layer for block in self._blocks for layer in block.layers})

    def layer(self, layer: int) -> LayerTime | None:
        """A layer over time; None if it never was observed."""
        found = [block for block in self._blocks if layer in block.layers and len(block.last_T)]
        return max(found, key=lambda block: block.newest).layer(layer) if found else None

    def extend(self, records: Iterable[rec.Experts]) -> Summary:
        """Take records in the order of the log; returns one row per observed step."""
        shapes: dict[tuple[tuple[int, ...], int], list[rec.Experts]] = {}
        for record in records:
            shapes.setdefault((_layers(record), _width(record)), []).append(record)
        parts = [
            self._extend_block(layers, experts, group) for (layers, experts), group in shapes.items() if layers and experts
        ]
        self.version += bool(parts)
        return _joined(parts)

    def _extend_block(self, layers: tuple[int, ...], experts: int, records: list[rec.Experts]) -> Summary:
        block = next((item for item in self._blocks if (item.layers, item.experts) == (layers, experts)), None)
        if block is None:
            block = Block(layers, experts)
        else:
            self._blocks.remove(block)
        self._blocks = [*self._blocks[-(BLOCKS - 1) :], block]
        step_N = np.array([record.step for record in records], np.int64)
        load_NLE, figures = _arrays(records, len(layers), experts)
        least_N = np.minimum.accumulate(step_N[::-1])[
            ::-1
        ]  # of what follows: a step that comes again replaces what came before
        kept_N = (step_N == least_N) & np.append(least_N[1:] > step_N[:-1], True)
        step_N, load_NLE = step_N[kept_N], load_NLE[kept_N]
        figures = {name: values[kept_N] for name, values in figures.items()}
        block.truncate(int(step_N[0]) - 1)
        block.extend(step_N, load_NLE, figures)
        return _summary(step_N, figures)

    def truncate(self, to_step: int) -> None:
        """Forget what lies behind a rewind."""
        for block in self._blocks:
            block.truncate(to_step)
        self.version += 1

    # keeping it

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything, as plain arrays by name."""
        arrays: dict[str, np.ndarray] = {}
        for index, block in enumerate(self._blocks):
            arrays[f"{index}.shape"] = np.array([block.experts, block.stride, *block.layers], np.int64)
            arrays |= {f"{index}.{name}": block._get(name) for name in Block.FIELDS}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> RoutingHistory:
        """The history that `to_arrays` was called on.

        Raises:
            ValueError, KeyError, IndexError: the arrays are not of this kind.
        """
        history = cls()
        for index in itertools.count():
            if f"{index}.shape" not in arrays:
                return history
            experts, stride, *layers = arrays[f"{index}.shape"].tolist()
            block = Block(layers, experts)
            block.stride = stride
            for name in Block.FIELDS:
                value, like = arrays[f"{index}.{name}"], block._get(name)
                if value.dtype != like.dtype or value.shape[1:] != like.shape[1:]:
                    raise ValueError(f"{index}.{name}: {value.dtype} {value.shape}, expected {like.dtype} {like.shape}")
                block._set(name, value)
            history._blocks.append(block)
        raise AssertionError("unreachable")


def _worse(name: str) -> np.ufunc:
    """Which of two values is the worse one; an unknown value (NaN) yields to the other."""
    return np.fmin if name in _LOW_IS_BAD else np.fmax


def _layers(record: rec.Experts) -> tuple[int, ...]:
    if len(record.layers) >= len(record.load):
        return tuple(record.layers[: len(record.load)])
    return (*record.layers, *range(len(record.layers), len(record.load)))


def _width(record: rec.Experts) -> int:
    return max(map(len, record.load), default=0)


def _arrays(records: list[rec.Experts], layers: int, experts: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Loads (N, L, E) and figures (N, L); NaN where a record has nothing."""
    try:
        load_NLE = np.array([record.load for record in records], np.float64)
    except ValueError:  # rows of different lengths
        padded = [[[*row, *[np.nan] * (experts - len(row))] for row in record.load] for record in records]
        load_NLE = np.array(padded, np.float64)
    figures = {}
    for name in FIGURES:
        rows = [getattr(record, name)[:layers] for record in records]
        if any(len(row) != layers for row in rows):
            rows = [[*row, *[np.nan] * (layers - len(row))] for row in rows]
        figures[name] = np.array(rows, np.float64)
    with np.errstate(all="ignore"):  # what a record leaves out is in its loads
        total_NL = np.nansum(load_NLE, axis=2)
        high_NL = np.fmax.reduce(load_NLE, axis=2) * np.isfinite(load_NLE).sum(axis=2) / total_NL
        figures["imbalance"] = np.where(np.isnan(figures["imbalance"]), high_NL, figures["imbalance"])
        dead_NL = (load_NLE <= 0).sum(axis=2).astype(np.float64)
        figures["dead"] = np.where(np.isnan(figures["dead"]), dead_NL, figures["dead"])
    return load_NLE, figures


def _summary(step_N: np.ndarray, figures: Mapping[str, np.ndarray]) -> Summary:
    with np.errstate(all="ignore"):
        entropy, dropped = (
            np.nansum(values, axis=1) / np.isfinite(values).sum(axis=1) for values in (figures["entropy"], figures["dropped"])
        )
    layers_N = np.full(len(step_N), figures["entropy"].shape[1], np.int64)
    return Summary(step_N, np.fmax.reduce(figures["imbalance"], axis=1), entropy, dropped, layers_N)


def _joined(parts: Sequence[Summary]) -> Summary:
    """One row per step; parts of one step (layers in several records) become one row."""
    if not parts:
        nothing = np.zeros(0)
        return Summary(np.zeros(0, np.int64), nothing, nothing, nothing, np.zeros(0, np.int64))
    step_N, imbalance_N, entropy_N, dropped_N, layers_N = (
        np.concatenate([getattr(part, name) for part in parts]) for name in Summary.__dataclass_fields__
    )
    order_N = np.argsort(step_N, kind="stable")
    step_N, starts = np.unique(step_N[order_N], return_index=True)
    weight_N = layers_N[order_N]
    layers_N = np.add.reduceat(weight_N, starts)
    means = [np.add.reduceat(values[order_N] * weight_N, starts) / layers_N for values in (entropy_N, dropped_N)]
    return Summary(step_N, np.fmax.reduceat(imbalance_N[order_N], starts), means[0], means[1], layers_N)
