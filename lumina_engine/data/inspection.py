"""Rows as training would see them: which tokens are trained, which are context, which are padding."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .conversation import DataError, Document
from .rows import RowOptions, RowPlan, Rows
from .token_store import Progress, build_store


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of a row that are treated alike. `kind`: context, trained or padding; `document` 0 is padding."""

    kind: str
    document: int
    tokens: int
    text: str
    ends_turn: bool = False


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row of training."""

    documents: int
    tokens: int
    trained: int
    padding: int
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Preview:
    """Some rows of epoch 0: `rows[0]` is row `first` of `total_rows`, which `conversations` of `tokens` fill."""

    first: int
    total_rows: int
    conversations: int
    tokens: int
    rows: list[PreviewRow]


def preview(
    documents: Iterable[Document],
    tokenizer: Any,
    options: RowOptions,
    rows: int,
    sample: int = 0,
    *,
    first: int = 0,
    progress: Progress | None = None,
) -> Preview:
    """`rows` rows of epoch 0 from row `first` on, over the first `sample` documents (0: all), exactly as training packs them.

    Raises `DataError` when no document is left or there is no row `first`.
    """
    return preview_tasks({"": documents}, tokenizer, options, rows, sample, first=first, progress=progress)[""]


def preview_tasks(
    documents: Mapping[str, Iterable[Document]],
    tokenizer: Any,
    options: RowOptions,
    rows: int,
    sample: int = 0,
    *,
    first: int = 0,
    progress: Progress | None = None,
) -> dict[str, Preview]:
    """The same for each task of a mixed run, whose rows hold conversations of one task; a task may have no row `first`.

    Raises `DataError` when no document of a task is left or no task has a row `first`.
    """
    found: dict[str, Preview] = {}
    for task, given in documents.items():
        before = sum(seen.conversations for seen in found.values()), sum(seen.tokens for seen in found.values())
        told = None if progress is None else _after(progress, *before)
        chosen = islice(given, sample) if sample else given
        with tempfile.TemporaryDirectory(prefix="lumina-preview-") as folder:
            store = build_store(chosen, tokenizer, Path(folder), source_digest="preview", progress=told)
            if not len(store):
                of = f" of task {task}" if task else ""
                raise DataError(f"no conversation{of} left to show", fix="check data_format and the records")
            plan = RowPlan(store, options)
            stop = min(first + rows, plan.num_rows)
            shown = [_preview(plan.build([plan.row(0, index)]), tokenizer) for index in range(first, stop)]
            found[task] = Preview(first, plan.num_rows, len(store), store.num_tokens, shown)
    most = max(seen.total_rows for seen in found.values())
    if first >= most:
        raise DataError(f"there is no row {first:,}: they are {most:,}, from 0 on", fix="lower --first", exit_code=2)
    return found


def _after(progress: Progress, documents: int, tokens: int) -> Progress:
    """Figures of one task, told on top of those of the tasks before it."""
    return lambda more, of_them: progress(documents + more, tokens + of_them)


def _preview(built: Rows, tokenizer: Any) -> PreviewRow:
    ids, labels, documents = built.input_ids[0], built.labels[0], built.document_ids[0]
    kind = np.where(documents == 0, 2, (labels >= 0).astype(np.int64))
    border = np.flatnonzero((np.diff(kind) != 0) | (np.diff(documents) != 0)) + 1
    pieces = []
    for part in np.split(np.arange(len(ids)), border):
        name = ("context", "trained", "padding")[int(kind[part[0]])]
        text = "" if name == "padding" else tokenizer.decode(ids[part].tolist())
        ends = bool(ids[part[-1]] == tokenizer.im_end_id)
        pieces.append(Piece(name, int(documents[part[0]]), len(part), text, name == "trained" and ends))
    padding = int((documents == 0).sum())
    return PreviewRow(int(documents.max()), len(ids) - padding, int((labels >= 0).sum()), padding, pieces)
