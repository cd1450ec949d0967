"""Documents into rows of `seq_length` tokens, as a pure function of (fingerprint, seed, epoch).

The rows are planned once: documents are put into the order of the seed and packed. An epoch is a permutation of those rows,
so every epoch has the same number of rows, the number of steps is exact before the first one, and row i of any epoch is
found without looking at the others. Documents that share a row never see each other.

Packing:
- fit: whole documents, in as few rows as can be (`packing`); only texts that no row can hold are cut;
- concat: all documents end to end; a document may go on in the next row. Each piece is a document of its own there
  (positions from 0), so its first token is no target: a row never depends on another row;
- none: one document a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cut import Samples
from .order import Order
from .packing import pack
from .store_writer import CONTEXT, TEXT
from .token_store import TokenStore

PACKINGS = ("fit", "concat", "none")
IGNORE = -100  # label of a token without loss


@dataclass(frozen=True, slots=True)
class RowOptions:
    """The settings that decide what the rows hold."""

    seq_length: int
    packing: str = "fit"
    train_on: str = "assistant"
    assistant_loss_weight: float = 1.0
    seed: int = 0

    @classmethod
    def from_config(cls, config: Any) -> RowOptions:
        """From a `Config`, or any object that has at least `seq_length`."""
        return cls(
            seq_length=int(config.seq_length),
            packing=getattr(config, "packing", "fit"),
            train_on=getattr(config, "train_on", "assistant"),
            assistant_loss_weight=float(getattr(config, "assistant_loss_weight", 1.0)),
            seed=int(getattr(config, "seed", 0)),
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as arrays of shape (rows, seq_length). Padding has document 0, label -100 and the padding id."""

    input_ids: np.ndarray  # int64
    labels: np.ndarray  # int64, each on its own token; -100 = no loss
    document_ids: np.ndarray  # int64, 1, 2, … within a row
    position_ids: np.ndarray  # int64, from 0 within each document
    weights: np.ndarray | None  # float32, None when every label counts 1


class RowPlan:
    """Which pieces of which documents stand in which row."""

    def __init__(self, store: TokenStore, options: RowOptions) -> None:
        if options.packing not in PACKINGS:
            raise ValueError(f"packing is {options.packing!r}, not one of {', '.join(PACKINGS)}")
        self.store = store
        self.options = options
        self.samples = Samples(store, None if options.packing == "concat" else options.seq_length)
        count = len(self.samples)
        packing_order = Order(f"{store.fingerprint}/pack", options.seed, count)
        if options.packing == "none":
            self._members, self._first = np.arange(count), np.arange(count + 1)
        else:
            order = packing_order.documents(0, 0, count)
            if options.packing == "fit":
                packed = pack(self.samples.lengths, order, options.seq_length, self.samples.loose)
                self.samples.cut_again(packed.cuts)
                self._members, self._first = packed.members, packed.first
            else:
                self._members, self._ends = order, np.cumsum(self.samples.lengths[order])
        if options.packing == "concat":
            self.num_rows = -(-store.num_tokens // options.seq_length)
        else:
            self.num_rows = len(self._first) - 1
        self._order = Order(f"{store.fingerprint}/rows", options.seed, self.num_rows)
        self._weight_of_mask = label_weights(store.meta["weights"], options)

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows of an epoch; the same for every epoch."""
        return self.num_rows

    def rows_of_run(self, num_epochs: int) -> int:
        """Rows that a run of `num_epochs` takes."""
        return self.num_rows * num_epochs

    def row(self, epoch: int, index: int) -> int:
        """The planned row at place `index` of `epoch`."""
        return self._order.document(epoch, index)

    def ready(self, row: int) -> bool:
        """Whether a planned row can be built at once: always, since the store is there."""
        return True

    def members(self, row: int) -> list[int]:
        """The samples of a planned row (under concat: those that have a piece in it)."""
        return self._pieces(np.array([row]))[0].tolist()

    def _pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """(sample, index into `rows`, first token of the sample in the row, tokens of it): None = the whole sample."""
        if self.options.packing != "concat":
            first, count = self._first[rows], self._first[rows + 1] - self._first[rows]
            owner = np.repeat(np.arange(len(rows)), count)
            index = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
            return self._members[index], owner, None, None
        size = self.options.seq_length
        begin = rows * size
        stop = np.minimum(begin + size, self.store.num_tokens)
        low = np.searchsorted(self._ends, begin, side="right")
        high = np.searchsorted(self._ends, stop, side="left") + 1
        count = high - low
        owner = np.repeat(np.arange(len(rows)), count)
        index = np.repeat(low - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
        sample = self._members[index]
        origin = self._ends[index] - self.samples.lengths[sample]  # where the sample begins in the whole
        skip = np.maximum(begin[owner] - origin, 0)
        return sample, owner, skip, np.minimum(stop[owner], self._ends[index]) - (origin + skip)

    def build(self, rows: np.ndarray | list[int]) -> Rows:
        """The planned rows as arrays; -1 stands for a row of padding only."""
        rows = np.asarray(rows, dtype=np.int64)
        size = self.options.seq_length
        real = np.flatnonzero(rows >= 0)
        sample, owner, skip, taken = self._pieces(rows[real])
        start, length, piece = self.samples.segments(sample)
        if skip is not None and taken is not None:  # concat: samples are single segments
            start, length = start + skip, taken
        row_of = real[owner[piece]]  # of each segment
        new_document = np.concatenate([[True], piece[1:] != piece[:-1]]) if len(piece) else np.empty(0, dtype=bool)
        ends = np.cumsum(length)
        source = np.repeat(start - (ends - length), length) + np.arange(int(length.sum()))
        # where each segment begins: in the flat array of all rows, and inside its document
        begins = ends - length
        row_begin = _at_change(begins, row_of)
        document_begin = _at_start(begins, new_document)
        target = np.repeat(row_of * size + begins - row_begin - begins, length) + np.arange(len(source))
        position = np.arange(len(source)) - np.repeat(document_begin, length)
        document = np.cumsum(new_document)
        document -= _at_change(document, row_of) - 1
        return self._fill(len(rows), source, target, position, np.repeat(document, length))

    def _fill(self, rows: int, source: np.ndarray, target: np.ndarray, position: np.ndarray, document: np.ndarray) -> Rows:
        """Gather the tokens at `source` into the places `target` of `rows` rows."""
        size = self.options.seq_length
        tokens = self.store.tokens[source].astype(np.int64)
        weight = self._weight_of_mask[self.store.mask[source]]
        weight[position == 0] = 0  # nothing comes before the first token of a document
        ids = np.full(rows * size, self.store.pad_id, dtype=np.int64)
        labels = np.full(rows * size, IGNORE, dtype=np.int64)
        documents, positions = np.zeros(rows * size, dtype=np.int64), np.zeros(rows * size, dtype=np.int64)
        ids[target], documents[target], positions[target] = tokens, document, position
        labels[target] = np.where(weight > 0, tokens, IGNORE)
        shape = (rows, size)
        weights: np.ndarray | None = None
        if self.weighted:
            flat = np.zeros(rows * size, dtype=np.float32)
            flat[target] = weight
            weights = flat.reshape(shape)
        return Rows(ids.reshape(shape), labels.reshape(shape), documents.reshape(shape), positions.reshape(shape), weights)

    @property
    def weighted(self) -> bool:
        """Whether any label counts other than 1."""
        return is_weighted(self._weight_of_mask)


def joined_rows(
    rows: np.ndarray,
    begins: np.ndarray,
    build: Callable[[int, np.ndarray], Rows],
    options: RowOptions,
    weighted: bool,
    idle: int = 0,
) -> Rows:
    """Rows that several plans make, numbered through all of them: part p has the rows from `begins[p]` to `begins[p + 1]`.

    `build(p, local)` gives rows of part p; rows of padding (-1) come from a part that is asked anyway, else from part `idle`.
    With `weighted` every row has weights, so that the batches of a run are alike.
    """
    part_of = np.searchsorted(begins, rows, side="right") - 1
    part_of[rows < 0] = part_of[rows >= 0][0] if (rows >= 0).any() else idle
    shape = (len(rows), options.seq_length)
    arrays = [np.empty(shape, dtype=np.int64) for _ in range(4)]
    weights = np.empty(shape, dtype=np.float32) if weighted else None
    for part in np.unique(part_of).tolist():
        mine = part_of == part
        built = build(part, np.where(rows < 0, -1, rows - begins[part])[mine])
        for array, filled in zip(arrays, (built.input_ids, built.labels, built.document_ids, built.position_ids), strict=True):
            array[mine] = filled
        if weights is not None:
            weights[mine] = (built.labels >= 0) if built.weights is None else built.weights
    ids, labels, documents, positions = arrays
    return Rows(ids, labels, documents, positions, weights)


def label_weights(weights_of_mask: Sequence[float], options: RowOptions) -> np.ndarray:
    """Weight of the label of a token by its mask value (256 of float32); 0 = no label. `weights_of_mask` as in meta.json."""
    table = np.zeros(256, dtype=np.float32)
    weights = np.asarray(weights_of_mask, dtype=np.float32)
    table[1 : len(weights)] = weights[1:]
    if options.train_on == "all":
        table *= options.assistant_loss_weight
        table[CONTEXT] = 1
    table[TEXT] = 1
    return table


def is_weighted(table: np.ndarray) -> bool:
    """Whether a table of `label_weights` has other weights than 0 and 1."""
    return bool(np.any((table != 0) & (table != 1)))


def _at_change(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """For each element the value of the first element of its run of equal `group`."""
    if not len(values):
        return values
    return _at_start(values, np.concatenate([[True], group[1:] != group[:-1]]))


def _at_start(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """For each element the value at the latest start; the first element is one."""
    if not len(values):
        return values
    return values[np.flatnonzero(starts)][np.cumsum(starts) - 1]
