"""Data sets too large to tokenise whole: a window of them on the disk at a time, in an order that is computed, not stored.

The files fall into pieces (`pieces.py`), the pieces in a fixed random order into windows, and a window is a token store of its
own: the pieces that a data set of this size would be joined from. An epoch takes the windows in the order of the seed and the
rows of a window as a map-style run over it would, so a row is a pure function of (fingerprints, seed, epoch, index): resume
opens one window, no rank or worker count matters, no row comes twice or never. A data set of one window gives the very rows of
the map-style path.

Before its first step a stream is counted: each window is tokenised once, for the rows of an epoch must be known. What is on the
disk stays below `room` (but for the windows in use); windows that had to go are tokenised again when their turn comes, and must
come out the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .conversation import DataError, Document
from .order import Order
from .pieces import Piece
from .prepare import Job, join, tokenise
from .rows import RowOptions, RowPlan
from .store_writer import StoreWriter, locked, staging_name
from .stream_rows import IN_USE, RowCount, StreamRows, count_rows
from .tally import Tally
from .token_store import Progress, TokenStore, open_verified

WINDOW_PIECES = 8  # 128 MiB of JSON Lines are shuffled together
STREAM_VERSION = 1  # part of every fingerprint of more than one window: raise it when windows or their order change
_LISTED = 20  # files that an error names


@dataclass(frozen=True, slots=True)
class Counted:
    """What is known of a window once it was tokenised."""

    fingerprint: str
    documents: int
    tokens: int
    trained: int
    longest: int
    weights: tuple[float, ...]
    tally: dict[str, Any]


def windows_of(pieces: list[Piece], size: int = WINDOW_PIECES) -> list[list[Piece]]:
    """The pieces of each window. One window keeps the order of the files; several mix pieces from everywhere."""
    if len(pieces) <= size:
        return [pieces]
    order = Order("stream pieces", 0, len(pieces)).documents(0, 0, len(pieces))
    return [[pieces[i] for i in sorted(order[begin : begin + size].tolist())] for begin in range(0, len(pieces), size)]


class TokenStream:
    """A data set by windows, opened for reading. `count` must have run before anything is read.

    Args:
        folder: of the windows and of what was counted; named by the identity of the data and the tokenizer.
        windows: their pieces, from `windows_of`.
        threshold, part_of: of the split into training and evaluation, as for a `Job`.
        room: bytes of token stores that may lie in `folder`; the windows in use are kept whatever it says.
        workers: processes that count; 0 tokenises in this process, for a tokenizer that no other process can make.
    """

    def __init__(
        self,
        folder: Path,
        windows: list[list[Piece]],
        tokenizer: Any,
        *,
        threshold: int | None = None,
        part_of: Callable[[Document], str],
        room: float = 0.0,
        workers: int = 1,
    ) -> None:
        self.path, self.windows, self.tokenizer = folder, windows, tokenizer
        self.threshold, self.part_of, self.room, self.workers = threshold, part_of, room, workers
        self.counted: list[Counted] = []
        self.eval: TokenStore | None = None
        self._plans: dict[RowOptions, StreamRows] = {}
        self._building = [
            threading.Lock() for _ in windows
        ]  # a lock on a file keeps other processes out, not threads of this one

    @property
    def part(self) -> str:
        """The part that is trained on."""
        return "all" if self.threshold is None else "train"

    # figures, as a `TokenStore` has them

    @property
    def fingerprint(self) -> str:
        """Equal fingerprint, equal rows. That of one window is the window's, so streaming can be switched on and off."""
        if len(self.counted) == 1:
            return self.counted[0].fingerprint
        parts = [STREAM_VERSION, [window.fingerprint for window in self.counted]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding id."""
        return int(self.tokenizer.pad_id)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(window.tokens for window in self.counted)

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return sum(window.trained for window in self.counted)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(window.longest for window in self.counted)

    @property
    def tally(self) -> Tally:
        """What became of all records."""
        total = Tally()
        for window in self.counted:
            total.add(Tally.from_dict(window.tally))
        return total

    def __len__(self) -> int:
        return sum(window.documents for window in self.counted)

    # counting

    def count(self, options: RowOptions, progress: Progress | None = None) -> StreamRows:
        """The rows of `options`, after each window that was not counted yet has been. A killed count goes on where it was.

        Raises:
            DataError: a malformed record, no conversation at all, a file that changed, a disk that is full.
        """
        if options in self._plans:
            return self._plans[options]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path, "count", "eval"):  # other ranks wait, and find it done
                rows = self._count(options, progress)
                if self.threshold is not None:
                    self.eval = self._join_eval()
        except OSError as error:
            cause = f"the token stores of the stream cannot be written ({error.strerror or error})"
            raise DataError(cause, path=self.path, fix="free some space or set data_cache_dir", exit_code=2) from None
        self._plans[options] = StreamRows(self, options, rows)
        return self._plans[options]

    def _count(self, options: RowOptions, progress: Progress | None) -> list[RowCount]:
        known = self.path / f"rows-{_digest(asdict(options))}.json"
        self.counted = [Counted(**entry) for entry in _read(self.path / "counted.json")]
        rows = [RowCount(**entry) for entry in _read(known)]
        for number in range(min(len(self.counted), len(rows)), len(self.windows)):
            before = (len(self), self.num_tokens) if len(self.counted) == number else (0, 0)
            store = self.window(number, progress and _after(progress, before), self.workers)
            if len(self.counted) == number:
                np.asarray(store.digests).tofile(self._digests(number))
                self.counted.append(_counted(store))
                _write(self.path / "counted.json", self.counted)
            if len(rows) == number:
                rows.append(count_rows(store, options))
                _write(known, rows)
        return rows

    def _join_eval(self) -> TokenStore | None:
        """The evaluation parts of all windows as one store, in their order. None where no conversation fell on that side."""
        target = self.path / "eval"
        store = open_verified(target)
        if store is None:
            writer = StoreWriter(target, self.tokenizer)
            try:
                for number in range(len(self.windows)):
                    part = self._eval_part(number)
                    if open_verified(part) is None:  # `eval` was there, and was lost since
                        self._again(number)
                    writer.extend(TokenStore(part))
                store = TokenStore(writer.publish({"tally": Tally().to_dict()}))
            finally:
                writer.discard()
            for number in range(len(self.windows)):
                shutil.rmtree(self._eval_part(number), ignore_errors=True)
        return store if len(store) else None

    def _again(self, number: int) -> None:
        """Tokenise a window that may be there, for what is held out of it."""
        target = self.path / f"window-{number:06d}"
        with self._building[number], locked(self.path, target.name, self._eval_part(number).name):
            _remove(target)
            self._tokenise(number, target, None, self.workers)

    def _eval_part(self, number: int) -> Path:
        return self.path / f"eval-{number:06d}"

    def shared_with(self, store: TokenStore) -> int:
        """Different conversations that are in the stream and in `store`, by their digests. One window in memory at a time."""
        theirs = np.asarray(store.digests)
        found = [np.intersect1d(np.fromfile(self._digests(n), "<u8"), theirs) for n in range(len(self.windows))]
        return len(np.unique(np.concatenate(found)))

    def _digests(self, number: int) -> Path:
        return self.path / f"digests-{number:06d}.u64"

    # windows

    def window(self, number: int, progress: Progress | None = None, workers: int | None = None) -> TokenStore:
        """The store of a window, tokenised if it is not there. Raises `DataError`, also where it is not what was counted."""
        target = self.path / f"window-{number:06d}"
        with self._building[number], locked(self.path, target.name, self._eval_part(number).name):
            store = open_verified(target)
            if store is None:
                self._evict(keep=target)
                store = self._tokenise(number, target, progress, min(self.workers, 1) if workers is None else workers)
            if number < len(self.counted) and store.fingerprint != self.counted[number].fingerprint:
                shutil.rmtree(target)
                raise self._changed(number)
            os.utime(target)  # read just now
        return store

    def _tokenise(self, number: int, target: Path, progress: Progress | None, workers: int) -> TokenStore:
        pieces = self.windows[number]
        job = Job(pieces, self.path / f"{target.name}.pieces", self.tokenizer, self.threshold, self.part_of)
        finished = tokenise(job, workers, progress, apart=workers > 0)
        held_out = {} if self.threshold is None else {"eval": self._eval_part(number)}
        for part in held_out.values():  # of a window that is tokenised again
            shutil.rmtree(part, ignore_errors=True)
        # the window comes last: where it is, what is held out of it is there, too, whenever this process is killed
        built = join(job, finished, {**held_out, self.part: target}, lambda tally: {"tally": tally.to_dict()}, required=False)
        assert built is not None  # nothing is required
        if (self.path / "eval").exists():  # joined already
            for part in held_out.values():
                shutil.rmtree(part, ignore_errors=True)
        return built[self.part]

    def _changed(self, number: int) -> DataError:
        names = sorted({piece.path for piece in self.windows[number]})
        shown = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        return DataError(
            f"the data changed since they were counted: {shown}",
            path=names[0],
            fix="restore the files, or start a new run",
        )

    def _evict(self, keep: Path) -> None:
        """Remove the windows that were not read for longest while more than `room` lies here; those in use stay."""
        found = []
        for folder in self.path.glob("window-??????"):
            try:
                size = sum(entry.stat().st_size for entry in folder.iterdir())
                found.append((folder.stat().st_mtime_ns, size, folder))
            except OSError:  # another rank was first
                continue
        total = sum(size for _, size, _ in found)
        coming = max((size for _, size, _ in found), default=0)  # about the size of a window
        for _, size, folder in sorted(found)[: max(0, len(found) - (IN_USE - 1))]:
            if total + coming <= self.room or folder == keep:
                continue
            if _remove(folder):
                total -= size


def _remove(folder: Path) -> bool:
    """Remove a window whole or not at all: who has it open goes on reading. False: another process was first."""
    gone = staging_name(folder)
    try:
        folder.rename(gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _counted(store: TokenStore) -> Counted:
    meta = store.meta
    return Counted(
        store.fingerprint,
        len(store),
        store.num_tokens,
        store.num_trained,
        int(meta["longest"]),
        tuple(meta["weights"]),
        meta["tally"],
    )


def _after(progress: Progress, before: tuple[int, int]) -> Progress:
    """The figures of one window, told on top of those of the windows before it."""
    return lambda documents, tokens: progress(before[0] + documents, before[1] + tokens)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> list[dict[str, Any]]:
    """What `_write` wrote; nothing where it is not there or damaged, since it can be counted again."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()} for entry in entries]


def _write(path: Path, entries: list[Any]) -> None:
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(json.dumps([asdict(entry) for entry in entries]), encoding="utf-8")
    staging.replace(path)


def row_plan(data: TokenStore | TokenStream, options: RowOptions) -> RowPlan | StreamRows:
    """The rows of a store, or of a stream."""
    return data.count(options) if isinstance(data, TokenStream) else RowPlan(data, options)
