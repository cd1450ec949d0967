"""The rows of a stream: which window a row lies in, which windows are open."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .order import Order
from .rows import RowOptions, RowPlan, Rows, is_weighted, joined_rows, label_weights
from .token_store import TokenStore

if TYPE_CHECKING:
    from .stream import TokenStream

IN_USE = 3  # windows that a rank holds open: the one being read, the one before it, the one after it


@dataclass(frozen=True, slots=True)
class RowCount:
    """What the rows of a window are, for one choice of length, packing and seed."""

    rows: int
    samples: int
    cut_documents: int
    lost_tokens: int
    shortened: dict[str, int]


def count_rows(store: TokenStore, options: RowOptions) -> RowCount:
    """The rows of one window."""
    plan = RowPlan(store, options)
    cut = plan.samples
    return RowCount(plan.num_rows, len(cut), cut.cut_documents, cut.lost_tokens, dict(cut.shortened))


class StreamRows:
    """The rows of a stream: for loaders the same as a `RowPlan`. A planned row is numbered through all windows."""

    def __init__(self, stream: TokenStream, options: RowOptions, rows: list[RowCount]) -> None:
        self.stream, self.options = stream, options
        self.sizes = np.array([count.rows for count in rows], dtype=np.int64)
        self.num_rows = int(self.sizes.sum())
        self._begins = np.concatenate([[0], np.cumsum(self.sizes)])
        self._samples_before = np.concatenate([[0], np.cumsum([count.samples for count in rows])])
        self.num_samples = int(self._samples_before[-1])
        self.counts = rows
        self._window_order = Order(f"{stream.fingerprint}/windows", options.seed, len(rows))
        self._row_orders = [
            Order(f"{window.fingerprint}/rows", options.seed, count.rows)
            for window, count in zip(stream.counted, rows, strict=True)
        ]
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._open: dict[int, Future[RowPlan]] = {}  # in the order of their last use
        self._ahead: tuple[int, int] | None = None  # epoch, and place of the window in it, of the row that was asked for last

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows of an epoch; the same for every epoch."""
        return self.num_rows

    def rows_of_run(self, num_epochs: int) -> int:
        """Rows that a run of `num_epochs` takes."""
        return self.num_rows * num_epochs

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows of an epoch in order, and the place behind the last row of each."""
        found = self._epochs.get(epoch)
        if found is None:
            order = self._window_order.documents(epoch, 0, len(self.sizes))
            found = order, np.cumsum(self.sizes[order])
            self._epochs = {e: f for e, f in self._epochs.items() if abs(e - epoch) == 1} | {
                epoch: found
            }  # a step may lie in two
        return found

    def row(self, epoch: int, index: int) -> int:
        """The planned row at place `index` of `epoch`. Nothing is read."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        order, ends = self._epoch(epoch)
        at = int(np.searchsorted(ends, index, side="right"))
        window = int(order[at])
        local = index - (int(ends[at - 1]) if at else 0)
        self._ahead = epoch, at
        return int(self._begins[window]) + self._row_orders[window].document(epoch, local)

    def ready(self, row: int) -> bool:
        """Whether a planned row can be built at once; else its window may have to be tokenised first."""
        with self._lock:
            future = self._open.get(self._window_of(row))
        return future is not None and future.done()

    def members(self, row: int) -> list[int]:
        """The samples of a planned row, numbered through all windows. Opens its window."""
        window = self._window_of(row)
        before = int(self._samples_before[window])
        return [before + sample for sample in self._plan(window).members(row - int(self._begins[window]))]

    def _window_of(self, row: int) -> int:
        return int(np.searchsorted(self._begins, row, side="right")) - 1

    def build(self, rows: np.ndarray | list[int]) -> Rows:
        """The planned rows as arrays; -1 stands for a row of padding only. Opens their windows, and the next one beside."""
        with self._lock:
            idle = next(reversed(self._open), 0)
        rows = np.asarray(rows, dtype=np.int64)
        built = joined_rows(rows, self._begins, self._build, self.options, self.weighted, idle)
        self._open_next()
        return built

    def _build(self, window: int, rows: np.ndarray) -> Rows:
        return self._plan(window).build(rows)

    @property
    def weighted(self) -> bool:
        """Whether any label counts other than 1."""
        tables = {window.weights for window in self.stream.counted}
        return any(is_weighted(label_weights(table, self.options)) for table in tables)

    def _plan(self, window: int) -> RowPlan:
        """The rows of a window; who asks first opens it, the others wait. The least used one goes."""
        with self._lock:
            future = self._open.pop(window, None)
            mine = future is None
            future = future or Future()
            self._open[window] = future
            for old in list(self._open)[: max(0, len(self._open) - IN_USE)]:
                if self._open[old].done():  # one that is being opened stays: who asks for it again waits for the same one
                    del self._open[old]
        if mine:
            try:
                future.set_result(RowPlan(self.stream.window(window), self.options))
            except BaseException as error:
                with self._lock:
                    self._open.pop(window, None)  # the next one who asks tries again
                future.set_exception(error)
        return future.result()

    def _open_next(self) -> None:
        """Have the window that follows the one that was asked for last opened by a thread."""
        if self._ahead is None:
            return
        epoch, at = self._ahead
        order = self._epoch(epoch)[0] if at + 1 < len(self.sizes) else self._window_order.documents(epoch + 1, 0, 1)
        following = int(order[at + 1 if at + 1 < len(self.sizes) else 0])
        with self._lock:
            there = following in self._open
        if not there:  # a daemon: a run that ends does not wait for a window that nobody will read
            threading.Thread(target=self._quietly, args=(following,), name="lumina-window", daemon=True).start()

    def _quietly(self, window: int) -> None:
        """Open a window; an error is met again, and told, by who reads it."""
        with contextlib.suppress(Exception):
            self._plan(window)
