"""A check of data before training on it: problems with file and line, lengths, what a row would cut, exact repeats.

Memory: 32 bytes a conversation and 8 for each further row of a long text, the first thousand problems, and the sampled
conversations where only a sample is tokenised.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .conversation import DataError, Document, TextDocument
from .cut import Template, cut_trained
from .files import Paths, expand
from .formats import FORMATS, check_format, detect_format, read_conversations, read_located
from .packing import pack
from .quality import Quality, Where
from .store_writer import template_of
from .tally import Tally

MAX_PROBLEMS = 1000  # kept with their text; all are counted
MAX_EXAMPLES = 100  # repeats kept with their lines; all are counted
_LINE_BITS = 40  # of a packed place: file number above, line below
_REPORT_EVERY = 256  # conversations between two calls of a progress callback
_SMALLEST_EDGE = 16  # tokens; the first bar of the histogram ends here

BUILT_IN = "built-in corpus"

Judged = Callable[[Document, list[str]], None]
Lost = Callable[[DataError], None]


@dataclass(frozen=True)
class Sofar:
    """What a check has done so far; `tokens` is None where none are counted yet."""

    conversations: int
    problems: int
    tokens: int | None
    bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Repeat:
    """A conversation that is there twice. `first_path` None: the other one is in the data that it is compared with."""

    path: str
    line: int
    first_path: str | None = None
    first_line: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"path": self.path, "line": self.line, "first_path": self.first_path, "first_line": self.first_line}


@dataclass(frozen=True)
class Repeats:
    """All repeats by count, the first hundred with their places. Equal means: roles and contents are equal."""

    conversations: int
    examples: list[Repeat]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"conversations": self.conversations, "examples": [item.to_dict() for item in self.examples]}


@dataclass(frozen=True)
class Cut:
    """What rows of `seq_length` tokens cut off the counted conversations, by the rules of training."""

    seq_length: int
    conversations: int
    lost_tokens: int
    how: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seq_length": self.seq_length,
            "conversations": self.conversations,
            "lost_tokens": self.lost_tokens,
            "how": self.how,
        }


class Lengths:
    """Tokens of the conversations that were tokenised."""

    def __init__(self, tokenizer: Any, seq_length: int | None = None) -> None:
        self.seq_length = seq_length
        self.trained = 0
        self._tokenizer = tokenizer
        self._template = Template(template_of(tokenizer)) if seq_length else None
        self._lengths, self._in_rows = array("Q"), array("Q")
        self._loose = array("Q")  # places in `_in_rows` of the last pieces of long texts
        self.tokens = 0
        self._cut, self._lost = 0, 0
        self._how: Counter[str] = Counter()

    def add(self, document: Document) -> int:
        """Tokenise one conversation; its tokens."""
        if isinstance(document, TextDocument):
            length = trained = kept = len(self._tokenizer.encode(document.text)) + 1  # and the end of the text
        else:
            ids, mask = self._tokenizer.encode_with_mask(document)
            length, trained = len(ids), sum(mask)  # an answer of weight 0 is not in the mask
            kept = length
            if self._template is not None and self.seq_length and length > self.seq_length:
                ranges, done = cut_trained(np.asarray(ids), np.asarray(mask), self.seq_length, self._template)
                kept = sum(stop - start for start, stop in ranges)
                self._cut += 1
                self._lost += length - kept
                self._how.update(done)
        self._lengths.append(length)
        self.tokens += length
        self.trained += trained
        if isinstance(document, TextDocument) and self.seq_length:
            pieces, rest = divmod(length, self.seq_length)
            self._in_rows.extend([self.seq_length] * pieces + [rest] * bool(rest))
            if pieces and rest:
                self._loose.append(len(self._in_rows) - 1)
        else:
            self._in_rows.append(kept)
        return length

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def cut(self) -> Cut | None:
        """What is cut off; None without a row length."""
        return None if self.seq_length is None else Cut(self.seq_length, self._cut, self._lost, dict(self._how))

    @property
    def rows(self) -> dict[str, Any] | None:
        """Rows that training makes of these conversations by packing "fit", and their padding; None without a row length."""
        if self.seq_length is None:
            return None
        lengths = np.frombuffer(self._in_rows, dtype=np.uint64).astype(np.int64)
        loose = np.zeros(len(lengths), dtype=bool)
        loose[np.frombuffer(self._loose, dtype=np.uint64)] = True
        rows = pack(lengths, np.arange(len(lengths)), self.seq_length, loose).num_rows
        return {"rows": rows, "padding_share": 1 - int(lengths.sum()) / (rows * self.seq_length)}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: shortest, longest, median, 95th percentile, and a histogram.

        `edges` has one entry more than `counts`: bar i counts lengths above edges[i], up to and with edges[i + 1]. Edges are
        powers of two and `seq_length`, so no bar stands on both sides of it.
        """
        lengths = np.frombuffer(self._lengths, dtype=np.uint64).astype(np.int64)
        longest = int(lengths.max())
        edges = {_SMALLEST_EDGE}
        while max(edges) < longest:
            edges.add(2 * max(edges))
        if self.seq_length is not None:
            edges.add(self.seq_length)
        upper = np.array(sorted(edges))
        counts = np.bincount(np.searchsorted(upper, lengths, side="left"), minlength=len(upper))
        return {
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "longest": longest,
            "edges": [0, *upper.tolist()],
            "counts": counts.tolist(),
        }


@dataclass
class Check:
    """What `check_files` found. `problems` holds the first thousand; `counts` counts all of them by reason."""

    conversations: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    files: list[dict[str, Any]] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)
    lost: int = 0  # records that are no conversation: malformed, or nothing in them to train on
    counts: Counter[str] = field(default_factory=Counter)
    lengths: Lengths | None = None
    duplicates: Repeats = field(default_factory=lambda: Repeats(0, []))
    overlap: Repeats | None = None  # None: compared with nothing
    quality: Quality | None = None

    def add(self, problem: DataError) -> None:
        """Count a problem, keep its text if there is room."""
        self.counts[problem.reason] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    @property
    def measured(self) -> bool:
        """Whether every conversation was tokenised."""
        return self.lengths is not None and len(self.lengths) == self.conversations

    @property
    def tokens(self) -> int | None:
        """Tokens of all conversations: counted if `measured`, else the sample's mean times their number."""
        if self.lengths is None or not len(self.lengths):
            return None
        return round(self.lengths.tokens / len(self.lengths) * self.conversations)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Token figures appear where a tokenizer was given and a conversation was found."""
        return {
            "total_conversations": self.conversations,
            "messages": dict(self.messages),
            "files": self.files,
            **self._token_figures(),
            "duplicates": self.duplicates.to_dict(),
            "overlap": None if self.overlap is None else self.overlap.to_dict(),
            **self._quality(),
            "problem_counts": dict(self.counts),
            "problems": [
                {
                    "path": p.path,
                    "line": p.line,
                    "message": p.message,
                    "fix": p.fix,
                    "reason": p.reason,
                    "excerpt": None if p.excerpt is None else list(p.excerpt),
                }
                for p in self.problems
            ],
        }

    def _quality(self) -> dict[str, Any]:
        """A sample is judged as if it held its share of what is lost."""
        if self.quality is None:
            return {}
        judged = self.quality.conversations / self.conversations if self.conversations else 0.0
        found = self.quality.to_dict(round(self.lost * judged))
        return {"quality_score": found["score"], "quality": found}

    def _token_figures(self) -> dict[str, Any]:
        lengths = self.lengths
        if lengths is None or not len(lengths):
            return {}
        histogram = lengths.to_dict()
        return {
            "tokens": self.tokens,
            "tokens_basis": "measured" if self.measured else "guessed",
            "sampled_conversations": len(lengths),
            "avg_tokens": lengths.tokens / len(lengths),
            "trained_tokens": round(lengths.trained / len(lengths) * self.conversations),
            "trained_share": lengths.trained / lengths.tokens,
            "longest": histogram["longest"],
            "lengths": histogram,
            "cut": None if lengths.cut is None else lengths.cut.to_dict(),
            "packing": lengths.rows,
        }


def check_files(
    paths: Paths | None,
    format: str = "auto",
    tokenizer: Any = None,
    *,
    sample: int = 0,
    seq_length: int | None = None,
    against: Paths | None = None,
    quality: Quality | None = None,
    judged: Judged | None = None,
    lost: Lost | None = None,
    progress: Callable[[Sofar], None] | None = None,
) -> Check:
    """Read every record and collect all problems with file and line, those that `convert` would drop or cut included.

    A conversation that loses turns in training is counted, measured and judged as training has it, beside its problem.

    Args:
        paths: files, folders, globs; None: the built-in corpus.
        tokenizer: count tokens with it: of every conversation, or with `sample` > 0 of that many, drawn evenly.
        seq_length: also count what rows of this length would cut off.
        against: evaluation data; conversations that stand in both are counted. For the built-in corpus its own held-out
            questions, if nothing is given.
        quality: judges the conversations that are tokenised; needs a tokenizer.
        judged: told each judged conversation and the rules that it breaks. lost: each record that is none.
        progress: told how far it is, often; throttling is the callee's part.

    Raises:
        DataError: only for paths that name nothing and for an unknown format.
    """
    check_format(format)
    work = _Work(tokenizer, sample, seq_length, progress, quality, judged, lost)
    if paths is None:
        work.built_in()
    else:
        for path in work.begin(expand(paths)):
            work.file(path, format)
    others = _digests(against, built_in=paths is None)
    return work.finish(others)


class _Work:
    """A check in progress."""

    def __init__(
        self,
        tokenizer: Any,
        sample: int,
        seq_length: int | None,
        progress: Callable[[Sofar], None] | None,
        quality: Quality | None = None,
        judged: Judged | None = None,
        lost: Lost | None = None,
    ) -> None:
        self.check = Check(lengths=None if tokenizer is None else Lengths(tokenizer, seq_length), quality=quality)
        self._sample, self._progress, self._judged, self._told_lost = sample, progress, judged, lost
        self._kept: list[tuple[Document, Where]] = []  # an even sample of what was read (Vitter 1985, algorithm R)
        self._random = random.Random(0)
        self._digests, self._places = array("Q"), array("Q")
        self._before, self._total = 0, 0

    def begin(self, files: list[Path]) -> list[Path]:
        self._total = sum(_size(path) for path in files)
        return files

    def built_in(self) -> None:
        from .store import sample_source

        self.check.files.append({"path": BUILT_IN, "format": "messages"})
        for number, document in enumerate(sample_source("train").read(Tally()), 1):
            self._add(document, number, 0)
        self.check.files[0]["conversations"] = self.check.conversations

    def file(self, path: Path, format: str) -> None:
        """Check one file. What is wrong with it becomes a problem; the next file is not touched by it."""
        before, layout = self.check.conversations, format
        entry: dict[str, Any] = {"path": str(path), "format": None}
        self.check.files.append(entry)
        try:
            found = path.stat()
            entry |= {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
            layout = detect_format(path) if format == "auto" else format
            tally = Tally(rejects=self._lost, problems=self.check.add)
            for record, document in read_located(path, layout, tally=tally, on_error=self._malformed):
                self._add(document, record.line, record.offset)
        except DataError as error:
            self.check.add(error)
        except OSError as error:
            cause = f"cannot be read ({error.strerror or error})"
            self.check.add(DataError(cause, path=path, fix="check the file and its rights"))
        entry["format"] = layout if layout in FORMATS[1:] else None
        entry["conversations"] = self.check.conversations - before
        self._before += entry.get("bytes", 0)

    def _malformed(self, error: DataError) -> None:
        self.check.add(error)
        self._lost(error)

    def _lost(self, error: DataError) -> None:
        self.check.lost += 1
        if self._told_lost is not None:
            self._told_lost(error)

    def _add(self, document: Document, line: int, offset: int) -> None:
        check, number = self.check, self.check.conversations
        check.conversations += 1
        check.messages.update(["text"] if isinstance(document, TextDocument) else [m.role for m in document.messages])
        self._digests.append(int.from_bytes(document.digest()[:8], "big"))
        self._places.append((len(check.files) - 1) << _LINE_BITS | line)
        if check.lengths is not None:
            where = Where(check.files[-1]["path"], line)
            if not self._sample:
                self._measure(document, where)
            elif len(self._kept) < self._sample:
                self._kept.append((document, where))
            elif (slot := self._random.randrange(number + 1)) < self._sample:
                self._kept[slot] = (document, where)
        if self._progress is not None and number % _REPORT_EVERY == 0:
            tokens = check.lengths.tokens if check.lengths is not None and not self._sample else None
            self._progress(Sofar(check.conversations, check.counts.total(), tokens, self._before + offset, self._total))

    def _measure(self, document: Document, where: Where) -> None:
        assert self.check.lengths is not None
        tokens = self.check.lengths.add(document)
        if self.check.quality is not None:
            broken = self.check.quality.judge(document, tokens, where)
            if self._judged is not None:
                self._judged(document, broken)

    def finish(self, others: np.ndarray | None) -> Check:
        check = self.check
        if check.lengths is not None:
            for document, where in sorted(self._kept, key=lambda kept: (kept[1].path, kept[1].line)):
                self._measure(document, where)
        digests = np.frombuffer(self._digests, dtype=np.uint64) if self._digests else np.empty(0, np.uint64)
        check.duplicates = self._duplicates(digests)
        if others is not None:
            shared = np.flatnonzero(np.isin(digests, others))
            check.overlap = Repeats(len(shared), [Repeat(*self._place(i)) for i in shared[:MAX_EXAMPLES].tolist()])
        return check

    def _place(self, index: int) -> tuple[str, int]:
        packed = self._places[index]
        return self.check.files[packed >> _LINE_BITS]["path"], packed & ((1 << _LINE_BITS) - 1)

    def _duplicates(self, digests: np.ndarray) -> Repeats:
        """Conversations that stand there before already."""
        order = np.argsort(digests, kind="stable")
        again = np.zeros(len(order), dtype=bool)
        again[1:] = digests[order[1:]] == digests[order[:-1]]
        first = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))  # where its run of equal digests begins
        late, early = order[again], order[first[again]]
        count = len(late)
        if count > MAX_EXAMPLES:  # the first ones by their place; millions of repeats are never made Python objects
            kept = np.argpartition(late, MAX_EXAMPLES)[:MAX_EXAMPLES]
            late, early = late[kept], early[kept]
        found = sorted(zip(late.tolist(), early.tolist(), strict=True))
        return Repeats(count, [Repeat(*self._place(place), *self._place(before)) for place, before in found])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it vanished; reading it names the problem
        return 0


def _digests(against: Paths | None, built_in: bool) -> np.ndarray | None:
    """Digests of the evaluation data; what is malformed there is that data's own problem and left out here."""
    documents: Iterable[Document]
    if against is not None:
        documents = readable(against)
    elif built_in:
        from .store import sample_source

        documents = sample_source("eval").read(Tally())
    else:
        return None
    return np.fromiter((int.from_bytes(d.digest()[:8], "big") for d in documents), dtype=np.uint64)


def readable(paths: Paths) -> Iterator[Document]:
    """The conversations of evaluation data that can be read; what is malformed is that data's own problem."""
    for path in expand(paths, "--against"):
        yield from read_conversations(path, on_error=lambda error: None)
