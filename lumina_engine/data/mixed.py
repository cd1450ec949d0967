"""Several tasks as one body of data: their token stores, and the rows of a run that mixes them.

A planned row of the mixture is numbered through all tasks, in the order of their names: the rows of a task follow those of the
tasks before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from .mixture import MIX_VERSION, MixturePlan, temper
from .rows import RowOptions, RowPlan, Rows, joined_rows
from .stream import TokenStream
from .stream import row_plan as rows_of_one
from .stream_rows import StreamRows
from .token_store import TokenStore

Store = TokenStore | TokenStream


@dataclass(frozen=True)
class Mixture:
    """The stores of the tasks, in the order of their names, and how to mix them.

    Args:
        stores: of each task; none is empty.
        weights: of each task; empty stands for the rows of each, so shares as they lie.
        temperature: shares are in proportion to weight^(1/temperature).
        max_epochs: how often a task may be repeated; None is without end.
    """

    stores: Mapping[str, Store]
    weights: dict[str, float]
    temperature: float = 1.0
    max_epochs: float | None = None

    @property
    def fingerprint(self) -> str:
        """Equal fingerprint, equal rows in equal order (for the same settings of packing and seed)."""
        parts = [[name, store.fingerprint, self.weights.get(name)] for name, store in self.stores.items()]
        return hashlib.sha256(json.dumps([MIX_VERSION, parts, self.temperature, self.max_epochs]).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.stores.values()))

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents of all tasks, each once."""
        return sum(store.num_tokens for store in self.stores.values())

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss, each once."""
        return sum(store.num_trained for store in self.stores.values())


class MixedRows:
    """The rows of a mixed run: for loaders the same as a `RowPlan`."""

    def __init__(self, data: Mixture, options: RowOptions) -> None:
        self.options = options
        self.names = list(data.stores)
        self.plans = [rows_of_one(store, options) for store in data.stores.values()]
        sizes = [plan.num_rows for plan in self.plans]
        shares = temper([data.weights.get(name, size) for name, size in zip(self.names, sizes, strict=True)], data.temperature)
        self.mixture = MixturePlan(data.fingerprint, sizes, shares, options.seed, data.max_epochs)
        self.num_rows = sum(sizes)
        self._begins = np.concatenate([[0], np.cumsum(sizes)])
        self._samples_before = [0, *accumulate(map(_samples, self.plans))]

    def rows_of_run(self, num_epochs: int) -> int:
        """Rows that a run of `num_epochs` takes."""
        return self.mixture.places(num_epochs)

    def row(self, epoch: int, index: int) -> int:
        """The planned row at place `index` of `epoch`."""
        place = self.mixture.at(epoch, index)
        return int(self._begins[place.task]) + self.plans[place.task].row(place.epoch, place.index)

    def task_of(self, row: int) -> int:
        """The task of a planned row."""
        return int(np.searchsorted(self._begins, row, side="right")) - 1

    def ready(self, row: int) -> bool:
        """Whether a planned row can be built at once; else its task may have to be tokenised first."""
        task = self.task_of(row)
        return self.plans[task].ready(row - int(self._begins[task]))

    @property
    def streamed(self) -> bool:
        """Whether any task is a stream."""
        return any(isinstance(plan, StreamRows) for plan in self.plans)

    def members(self, row: int) -> list[int]:
        """The samples of a planned row, numbered through all tasks."""
        task = self.task_of(row)
        before = self._samples_before[task]
        return [before + sample for sample in self.plans[task].members(row - int(self._begins[task]))]

    def build(self, rows: np.ndarray | list[int]) -> Rows:
        """The planned rows as arrays; -1 stands for a row of padding only."""
        rows = np.asarray(rows, dtype=np.int64)
        return joined_rows(rows, self._begins, self._build, self.options, self.weighted)

    def _build(self, task: int, rows: np.ndarray) -> Rows:
        return self.plans[task].build(rows)

    @property
    def weighted(self) -> bool:
        """Whether any label counts other than 1."""
        return any(plan.weighted for plan in self.plans)


AnyRows = RowPlan | StreamRows | MixedRows


def _samples(plan: RowPlan | StreamRows) -> int:
    return plan.num_samples if isinstance(plan, StreamRows) else len(plan.samples)


def mixture_of(config: Any, stores: Mapping[str, Store]) -> Mixture:
    """The stores of the tasks, mixed as a configuration says."""
    return Mixture(dict(stores), dict(config.task_weights), float(config.task_temperature), config.task_max_epochs)


def row_plan(data: Store | Mixture, options: RowOptions) -> AnyRows:
    """The rows of a store, of a stream, or of a mixture."""
    return MixedRows(data, options) if isinstance(data, Mixture) else rows_of_one(data, options)


def stores_of(data: Store | Mixture) -> Mapping[str, Store]:
    """The stores by task; data without tasks have one, of no name."""
    return data.stores if isinstance(data, Mixture) else {"": data}
