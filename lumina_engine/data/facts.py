"""What training makes of the data: rows, padding, what is cut, what carries loss, and how often each task is seen.

Everything is counted on the rows of the prepared data themselves; without prepared data nothing is known. Imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import task_checks
from .conversation import DataError
from .mixed import AnyRows, MixedRows, Mixture, mixture_of, row_plan
from .rows import RowOptions, RowPlan
from .size import data_bytes, stored
from .stream_open import is_streamed
from .stream_rows import StreamRows
from .token_store import TokenStore

if TYPE_CHECKING:
    from ..config.schema import Config

_COUNTED_TOKENS = 8_000_000  # of rows that are built to count labels in; beyond, rows at even distances stand for all
_READ_BYTES = 1_000_000_000  # of data whose digest is taken, to know its store
_PACKED_CONVERSATIONS = 2_000_000  # that are packed only to be looked at


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """One task of a mixed run.

    Args:
        share: of the rows, as configured, 0 to 1.
        rows: of its data.
        run_rows: that the run takes of it.
        epochs: how often that goes through its data.
        tokens: that the run reads of it, without padding.
    """

    name: str
    share: float
    rows: int
    run_rows: int
    epochs: float
    tokens: int


@dataclass(frozen=True, slots=True)
class DataFacts:
    """One epoch of the data in rows. Shares are 0 to 1.

    Args:
        rows: of `seq_length` tokens; run_rows: that the run takes.
        fill: tokens of the rows that are no padding.
        trained: tokens of the rows that carry loss, of those that are no padding; None of a stream.
        shortened: conversations that are longer than a row; lost: tokens that go with it, of all.
        tasks: of a mixed run.
    """

    rows: int
    run_rows: int
    seq_length: int
    packing: str
    conversations: int
    fill: float
    trained: float | None
    shortened: int
    lost: float
    tasks: tuple[TaskFacts, ...] = ()

    @property
    def padding(self) -> float:
        """Tokens of the rows that are padding."""
        return 1 - self.fill

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"padding": self.padding, "tasks": [asdict(task) for task in self.tasks]}

    def lines(self) -> list[str]:
        """For people: the rows, what was cut, each task."""
        cut = "nothing is cut"
        if self.shortened:
            cut = f"{self.shortened:,} of {self.conversations:,} conversations cut, {_percent(self.lost)} of the tokens"
        return [
            f"{self.rows:,} rows of {self.seq_length:,} an epoch (packing {self.packing}), {_percent(self.fill)} filled, "
            f"{_percent(self.padding)} padding",
            f"{'an unknown share' if self.trained is None else _percent(self.trained)} of the tokens trained; {cut}",
            *(
                f"task {task.name}: {_percent(task.share)} of the rows, {task.run_rows:,} in this run, "
                f"{task.epochs:.3g} epochs of its {task.rows:,}, {task.tokens:,} tokens"
                for task in self.tasks
            ),
        ]


def _percent(share: float) -> str:
    """At least three figures of a share, so that 99.96 % is not 100 %."""
    return f"{100 * share:.1f} %" if 0.001 <= share <= 0.999 or share in (0, 1) else f"{100 * share:.3f} %"


def facts_of(plan: AnyRows, run_rows: int) -> DataFacts:
    """The facts of a plan of which a run takes `run_rows` rows."""
    parts = [_part_of(part) for part in (plan.plans if isinstance(plan, MixedRows) else [plan])]
    size, tokens = plan.options.seq_length, sum(part.tokens for part in parts)
    lost = sum(part.lost for part in parts)
    return DataFacts(
        rows=plan.num_rows,
        run_rows=run_rows,
        seq_length=size,
        packing=plan.options.packing,
        conversations=sum(part.conversations for part in parts),
        fill=tokens / (plan.num_rows * size) if plan.num_rows else 0.0,
        trained=None if any(part.streamed for part in parts) else _trained_share(plan),
        shortened=sum(part.shortened for part in parts),
        lost=lost / (lost + tokens) if lost else 0.0,
        tasks=_tasks(plan, run_rows, [part.tokens for part in parts]) if isinstance(plan, MixedRows) else (),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """One store or stream: tokens of its rows, those that were cut away, conversations, those that were cut."""

    tokens: int
    lost: int
    conversations: int
    shortened: int
    streamed: bool = False


def _part_of(plan: RowPlan | StreamRows) -> _Part:
    if isinstance(plan, StreamRows):
        lost = sum(count.lost_tokens for count in plan.counts)
        cut = sum(count.cut_documents for count in plan.counts)
        return _Part(plan.stream.num_tokens - lost, lost, len(plan.stream), cut, streamed=True)
    samples = plan.samples
    return _Part(int(samples.lengths.sum()), samples.lost_tokens, len(plan.store), samples.cut_documents)


def _trained_share(plan: AnyRows) -> float:
    """Tokens with a label that counts, of those that are no padding."""
    size, most = plan.options.seq_length, max(1, _COUNTED_TOKENS // plan.options.seq_length)
    chosen = np.unique(np.linspace(0, plan.num_rows - 1, min(plan.num_rows, most)).astype(np.int64))
    labels = tokens = 0
    for part in np.array_split(chosen, -(-len(chosen) * size // 1_000_000) or 1):
        built = plan.build(part)
        labels += int((built.labels >= 0).sum())
        tokens += int((built.document_ids > 0).sum())
    return labels / tokens if tokens else 0.0


def _tasks(plan: MixedRows, run_rows: int, tokens: list[int]) -> tuple[TaskFacts, ...]:
    taken = plan.mixture.taken(run_rows)
    return tuple(
        TaskFacts(name, share, rows, count, count / rows, round(count / rows * held))
        for name, share, rows, count, held in zip(
            plan.names, plan.mixture.shares, plan.mixture.rows, taken, tokens, strict=True
        )
    )


def rows_of_run(plan: AnyRows, config: Config, world: int) -> int:
    """Rows that a run takes: of its epochs, or of `max_steps` where that is less."""
    rows = plan.rows_of_run(config.num_epochs)
    most = (
        None if config.max_steps is None else config.max_steps * config.batch_size * config.gradient_accumulation_steps * world
    )
    return rows if most is None else min(rows, most)


def look(config: Config, world: int, most: int = _READ_BYTES) -> tuple[DataFacts | None, str]:
    """The facts of the prepared data of a configuration, or why they are not known. Reads up to `most` bytes of data."""
    wrong = [found for found in task_checks.tasks(config) if found.severity == "error"]
    if wrong:
        return None, wrong[0].message
    try:
        data = prepared(config, most)
    except (DataError, OSError) as error:
        return None, str(error)
    if isinstance(data, str):
        return None, data
    if config.packing == "fit" and len(data) > _PACKED_CONVERSATIONS:
        return None, f"{len(data):,} conversations are too many to pack for a look; the run's start tells"
    plan = row_plan(data, RowOptions.from_config(config))
    return facts_of(plan, rows_of_run(plan, config, world)), ""


def prepared(config: Config, most: int = _READ_BYTES) -> TokenStore | Mixture | str:
    """The data of a configuration as it lies in the cache, or why it is not there.

    Raises:
        DataError: files that are missing or unreadable.
    """
    from .tasks import train_sources

    given = task_checks.train_paths(config)
    if any(value is not None and is_streamed(value, config, key) for key, value in given.items()):
        return "unknown before the run: the data is streamed"
    if sum(data_bytes(value) for value in given.values()) > most:
        return "unknown before the run: the data is too large to look for what was prepared of it"
    stores = {}
    for name, source in train_sources(config).items():
        found = stored(config, source.digest)
        if found is None:
            return "unknown until the data is prepared: `lumina-engine data prepare`, or the run's start"
        stores[name] = TokenStore(found[0])
    return mixture_of(config, stores) if config.multi_task else stores[""]
