"""Looking at data before training on it: a check of files, and rows as training would see them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .conversation import DataError, Document, TextDocument
from .files import Paths, expand
from .formats import FORMATS, check_format, detect_format, read_conversations
from .layouts import Tally
from .rows import RowOptions, RowPlan, Rows
from .token_store import build_store

MAX_PROBLEMS = 1000  # kept with their text; all are counted


@dataclass
class Check:
    """What `check_files` found. `problems` holds the first thousand; `counts` counts all of them by reason."""

    conversations: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    files: list[dict[str, Any]] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    tokens: int | None = None
    trained_tokens: int | None = None
    longest: int | None = None

    def add(self, problem: DataError) -> None:
        """Count a problem, keep its text if there is room."""
        self.counts[problem.reason] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Token figures appear where a tokenizer was given."""
        tokens = {"tokens": self.tokens, "trained_tokens": self.trained_tokens, "longest": self.longest}
        return {
            "total_conversations": self.conversations,
            "messages": dict(self.messages),
            "files": self.files,
            **({} if self.tokens is None else tokens),
            "problem_counts": dict(self.counts),
            "problems": [
                {"path": p.path, "line": p.line, "message": p.message, "fix": p.fix, "reason": p.reason} for p in self.problems
            ],
        }


def check_files(paths: Paths, format: str = "auto", tokenizer: Any = None) -> Check:
    """Read every record and collect all problems with file and line, those that `convert` would drop or cut included.

    Raises `DataError` only for paths that name nothing and for an unknown format.
    """
    check_format(format)
    check = Check()
    for path in expand(paths):
        before = check.conversations
        layout = format
        try:
            layout = detect_format(path) if format == "auto" else format
            for document in read_conversations(path, layout, tally=Tally(strict=True), on_error=check.add):
                _count(check, document, tokenizer)
        except DataError as error:
            check.add(error)
        known = layout if layout in FORMATS[1:] else None
        check.files.append({"path": str(path), "format": known, "conversations": check.conversations - before})
    return check


def _count(check: Check, document: Document, tokenizer: Any) -> None:
    check.conversations += 1
    check.messages.update(["text"] if isinstance(document, TextDocument) else [m.role for m in document.messages])
    if tokenizer is None:
        return
    if isinstance(document, TextDocument):
        length = trained = len(tokenizer.encode(document.text)) + 1
    else:
        ids, mask = tokenizer.encode_with_mask(document)
        length, trained = len(ids), sum(mask)
    check.tokens = (check.tokens or 0) + length
    check.trained_tokens = (check.trained_tokens or 0) + trained
    check.longest = max(check.longest or 0, length)


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


def preview_rows(
    documents: Iterable[Document], tokenizer: Any, options: RowOptions, rows: int, sample: int = 0
) -> Iterator[PreviewRow]:
    """The first `rows` rows of epoch 0 over the first `sample` documents (0: all), exactly as training packs them."""
    chosen = islice(documents, sample) if sample else documents
    with tempfile.TemporaryDirectory(prefix="lumina-preview-") as folder:
        store = build_store(chosen, tokenizer, Path(folder), source_digest="preview")
        if not len(store):
            raise DataError("no conversation left to show", fix="check data_format and the records")
        plan = RowPlan(store, options)
        for index in range(min(rows, plan.num_rows)):
            yield _preview(plan.build([plan.row(0, index)]), tokenizer)


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
