"""Rows as torch tensors, in the order of training and of evaluation.

Shape letters: B rows of a micro batch, S tokens of a row.

The rows of all epochs form one endless list; step k of a run takes the next `global_batch` of them (micro batch ×
accumulation × world), whatever the split: micro batch m of rank r takes the rows from (m · world + r) · micro on. Epochs may
meet inside a step. The last step of a run is filled up with rows of padding. Rows of a skip list are taken out of that list,
and as many are taken from one more epoch, so a run has the same steps with and without it.

A curriculum changes nothing of that: the planned rows of a step are cut into shorter ones, so each step has the same tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config.curriculum import Curriculum
from ..model.segments import DocumentLayout
from .mixed import AnyRows, MixedRows, Mixture, row_plan
from .rows import IGNORE, RowOptions, Rows
from .skip_list import SkipList
from .stream import TokenStream
from .token_store import TokenStore

T = TypeVar("T")
EVAL_SEED = 0  # the order of evaluation never depends on the run's seed: figures of two runs compare


@dataclass(frozen=True, slots=True)
class Position:
    """Where the data stands: the next row of the global order, as (epoch from 0, index in the epoch)."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Known:
    """What is counted of a batch while it lies on the CPU, so that no step waits for its device to tell.

    num_tokens: tokens that are not padding. num_labels: tokens that carry loss; label_weight: the sum of their weights.
    """

    num_tokens: int
    num_labels: int
    label_weight: float
    layout: DocumentLayout

    @staticmethod
    def of(batch: Batch) -> Known:
        """Counts a batch. Reads its tensors."""
        trained_BS = batch.labels_BS >= 0
        labels, weights = int(trained_BS.sum()), batch.weights_BS
        return Known(
            int(torch.count_nonzero(batch.document_ids_BS)),
            labels,
            float(labels) if weights is None else float(weights[trained_BS].sum()),
            DocumentLayout.of(batch.document_ids_BS),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro batch. `rows` are the planned rows in it (-1: a row of padding), also where they are cut into shorter ones."""

    input_ids_BS: Tensor  # int64
    labels_BS: Tensor  # int64, each label on its own token; -100 = no loss
    document_ids_BS: Tensor  # int64, 1, 2, … within a row; 0 = padding
    position_ids_BS: Tensor  # int64, from 0 within each document
    weights_BS: Tensor | None = None  # float32 weight of each label; None = all 1
    rows: tuple[int, ...] = ()

    known: Known | None = None  # None until `counted`

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return (self.known or Known.of(self)).num_tokens

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss."""
        return (self.known or Known.of(self)).num_labels

    @property
    def label_weight(self) -> float:
        """Tokens that carry loss, each counted with its weight."""
        return (self.known or Known.of(self)).label_weight

    @property
    def layout(self) -> DocumentLayout | None:
        """Where the documents lie, if it is known."""
        return None if self.known is None else self.known.layout

    def counted(self) -> Batch:
        """The batch with all that is counted of it."""
        return replace(self, known=Known.of(self))

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        known = self.known
        return replace(
            self,
            known=None if known is None else replace(known, layout=known.layout.to(device)),
            **{
                name: value.to(device)
                for name in ("input_ids_BS", "labels_BS", "document_ids_BS", "position_ids_BS", "weights_BS")
                if (value := getattr(self, name)) is not None
            },
        )


def make_batch(plan: AnyRows, rows: list[int]) -> Batch:
    """The planned `rows` (-1 = padding only) as a batch."""
    built: Rows = plan.build(rows)
    return Batch(
        torch.from_numpy(built.input_ids),
        torch.from_numpy(built.labels),
        torch.from_numpy(built.document_ids),
        torch.from_numpy(built.position_ids),
        None if built.weights is None else torch.from_numpy(built.weights),
        tuple(rows),
    )


def cut_rows(batch: Batch, length: int) -> Batch:
    """The rows of a batch cut into rows of `length` tokens, (B, S) to (B · S / length, length), in the same order.

    Every token stays. What a cut splits of a document is a document of its own, with positions from 0: nothing comes before
    its first token, which therefore carries no loss.
    """
    size = batch.input_ids_BS.shape[1]
    if size == length:
        return batch
    if size % length:
        raise ValueError(f"rows of {size} tokens cannot be cut into rows of {length}")
    ids, labels, documents, positions = (
        tensor.reshape(-1, length).clone()
        for tensor in (batch.input_ids_BS, batch.labels_BS, batch.document_ids_BS, batch.position_ids_BS)
    )
    first_B1 = documents[:, :1].clone()
    positions -= torch.where(documents == first_B1, positions[:, :1], 0)
    documents = torch.where(documents > 0, documents - first_B1 + 1, 0)
    labels[:, 0] = IGNORE
    weights = batch.weights_BS
    if weights is not None:
        weights = weights.reshape(-1, length).clone()
        weights[:, 0] = 0
    return Batch(ids, labels, documents, positions, weights, batch.rows)


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Rows of packed conversations, map-style: item i is planned row i.

    `config` needs only `seq_length`; `packing`, `train_on`, `seed`, `data_cache_dir` and the rest are used where it has them.
    `data_path` None is the built-in corpus. Raises `DataError`. `notes` says what was dropped or cut.
    """

    def __init__(self, data_path: Any = None, tokenizer: Any = None, config: Any = None) -> None:
        from .store import open_train  # here, since that reads every format

        if tokenizer is None or config is None:
            raise TypeError("ConversationDataset needs data_path=, tokenizer= and config=")
        self.store, self.notes = open_train(data_path, tokenizer, config)
        self.plan = row_plan(self.store, RowOptions.from_config(config))

    def __len__(self) -> int:
        return self.plan.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch = make_batch(self.plan, [index % len(self)])
        return {
            "input_ids": batch.input_ids_BS[0],
            "labels": batch.labels_BS[0],
            "document_ids": batch.document_ids_BS[0],
            "position_ids": batch.position_ids_BS[0],
        }


def ahead_of(make: Callable[[int], T], count: int, workers: int, prefetch: int) -> Iterator[T]:
    """`make(0)` … `make(count − 1)` in order, up to `workers · prefetch` of them made ahead by `workers` threads.

    Threads, not processes: a row is a few array copies, which release the interpreter lock where they are long; nothing is
    forked beside an initialised process group, and no worker can outlive its rank.
    """
    if workers == 0:
        yield from map(make, range(count))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lumina-data")
    waiting: deque[Future[T]] = deque()
    try:
        for number in range(count):
            waiting.append(pool.submit(make, number))
            if len(waiting) > workers * prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class TrainLoader:
    """Steps of training: iterating gives, per optimizer step, the micro batches of this rank (`accumulation` of them).

    Starts at `start`, after `steps_done` optimizer steps, leaves out the rows of `skip`, and ends after as many rows as
    `config.num_epochs` have. `position` is where the run stands after the step that was yielded last: a loader started there
    goes on with the very next rows. `plan` is that of the store, where it was made before.
    """

    def __init__(
        self,
        store: TokenStore | TokenStream | Mixture,
        config: Any,
        *,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
        accumulation: int | None = None,
        start: Position | None = None,
        steps_done: int = 0,
        skip: SkipList | None = None,
        plan: AnyRows | None = None,
    ) -> None:
        self.plan = plan or row_plan(store, RowOptions.from_config(config))
        self.skip = skip or SkipList()
        self.curriculum = Curriculum.of(config)
        self.steps_done = steps_done
        self.rank, self.world = rank, world
        self.micro_batch = micro_batch if micro_batch is not None else int(config.batch_size)
        self.accumulation = accumulation if accumulation is not None else int(getattr(config, "gradient_accumulation_steps", 1))
        if not 0 <= rank < world or self.micro_batch < 1 or self.accumulation < 1:
            raise ValueError(f"rank {rank} of {world}, micro batch {self.micro_batch}, accumulation {self.accumulation}")
        self.num_epochs = int(getattr(config, "num_epochs", 1))
        self.num_workers = int(getattr(config, "num_workers", 0))
        self.prefetch_batches = int(getattr(config, "prefetch_batches", 2))
        start = start or Position()
        self.position = self._position(start.epoch * self.rows_per_epoch + start.index)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch, of all ranks together."""
        return self.plan.num_rows

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step, of all ranks together."""
        return self.micro_batch * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one epoch; a step may lie across two epochs."""
        return self.rows_per_epoch / self.global_batch

    def total_steps(self, num_epochs: int | None = None) -> int:
        """Optimizer steps of a whole run of `num_epochs` (default: the configured number), exactly."""
        rows = self.plan.rows_of_run(self.num_epochs if num_epochs is None else num_epochs)
        return -(-rows // self.global_batch)

    def next_rows(self) -> list[int]:
        """The planned rows of the whole next step, of all ranks, in order; -1 is padding. Nothing is read."""
        begin, size = self.skip.place(self.row_number), self.micro_batch
        return [row for first in range(begin, begin + self.global_batch, size) for row in self._planned(first)]

    def waits(self) -> bool:
        """Whether the next step may have to wait for data that are not tokenised yet, as a stream's may: a minute and more."""
        begin = self.skip.place(self.row_number)
        end = min(begin + self.global_batch, self._places)
        every = isinstance(self.plan, MixedRows) and self.plan.streamed  # else the rows between lie in the windows of the ends
        places = range(begin, end) if every else (begin, end - 1)
        return not all(self.plan.ready(self.plan.row(*divmod(self.skip.row(place), self.rows_per_epoch))) for place in places)

    def __len__(self) -> int:
        """Steps from `position` to the end."""
        return max(0, -(-(self._places - self.skip.place(self.row_number)) // self.global_batch))

    @property
    def row_number(self) -> int:
        """The global row number of `position`."""
        return self.position.epoch * self.rows_per_epoch + self.position.index

    @property
    def _places(self) -> int:
        """Rows that a whole run takes."""
        return self.plan.rows_of_run(self.num_epochs)

    def _position(self, number: int) -> Position:
        return Position(*divmod(number, self.rows_per_epoch)) if self.rows_per_epoch else Position()

    def _planned(self, first: int) -> list[int]:
        """The planned rows from place `first` of what is taken, for one micro batch of this rank; -1 behind the end."""
        end, size = self._places, self.rows_per_epoch
        places = range(first, first + self.micro_batch)
        return [self.plan.row(*divmod(self.skip.row(place), size)) if place < end else -1 for place in places]

    def __iter__(self) -> Iterator[list[Batch]]:
        begin, steps, done_before = self.skip.place(self.row_number), len(self), self.steps_done

        def micro_batch(number: int) -> Batch:
            step, micro = divmod(number, self.accumulation)
            first = begin + step * self.global_batch + (micro * self.world + self.rank) * self.micro_batch
            batch = make_batch(self.plan, self._planned(first))
            return cut_rows(batch, self.curriculum.length(done_before + step + 1)).counted()

        batches = ahead_of(micro_batch, steps * self.accumulation, self.num_workers, self.prefetch_batches)
        try:
            for step in range(1, steps + 1):
                micro_batches = [next(batches) for _ in range(self.accumulation)]
                done = min(begin + step * self.global_batch, self._places)
                self.position, self.steps_done = self._position(self.skip.row(done)), done_before + step
                yield micro_batches
        finally:
            batches.close()  # type: ignore[attr-defined]


class EvalLoader:
    """Batches of evaluation: every row once in a fixed order, or the first rows of it; nothing is dropped.

    `max_batches` counts batches of `config.batch_size` rows in all, not per rank, so the rows are the same for any `world` and
    `micro_batch`; 0 is all. Each rank gets the same number of batches; rows of padding fill the last ones.
    """

    def __init__(
        self,
        store: TokenStore | TokenStream,
        config: Any,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
        max_batches: int = 0,
    ) -> None:
        self.plan = row_plan(store, replace(RowOptions.from_config(config), seed=EVAL_SEED))
        self.rank, self.world = rank, world
        size = int(getattr(config, "batch_size", 1))
        self.micro_batch = micro_batch if micro_batch is not None else size
        self.num_rows = min(self.plan.num_rows, max_batches * size) if max_batches else self.plan.num_rows
        self.num_workers = int(getattr(config, "num_workers", 0))
        self.prefetch_batches = int(getattr(config, "prefetch_batches", 2))

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-self.num_rows // (self.micro_batch * self.world))

    def __iter__(self) -> Iterator[Batch]:
        def batch(number: int) -> Batch:
            first = (number * self.world + self.rank) * self.micro_batch
            places = range(first, first + self.micro_batch)
            return make_batch(self.plan, [self.plan.row(0, i) if i < self.num_rows else -1 for i in places]).counted()

        yield from ahead_of(batch, len(self), self.num_workers, self.prefetch_batches)
