"""Rows as training would see them: which tokens are trained, which are context, which are padding."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
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
    """Some rows of epoch 0: `rows[0]` is row `first` of `total_rows`, which `conversations` documents fill."""

    first: int
    total_rows: int
    conversations: int
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
    chosen = islice(documents, sample) if sample else documents
    with tempfile.TemporaryDirectory(prefix="lumina-preview-") as folder:
        store = build_store(chosen, tokenizer, Path(folder), source_digest="preview", progress=progress)
        if not len(store):
            raise DataError("no conversation left to show", fix="check data_format and the records")
        plan = RowPlan(store, options)
        if first >= plan.num_rows:
            raise DataError(
                f"there is no row {first:,}: they are {plan.num_rows:,}, from 0 on", fix="lower --first", exit_code=2
            )
        stop = min(first + rows, plan.num_rows)
        shown = [_preview(plan.build([plan.row(0, index)]), tokenizer) for index in range(first, stop)]
        return Preview(first, plan.num_rows, len(store), shown)


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
