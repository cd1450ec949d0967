"""From the settings of a run to its token stores: sources, the split into training and evaluation, what to tell the user."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .ahead import PIECE_BYTES, PIECES_FROM, Ahead, label_of, processors
from .conversation import DataError, Document
from .cut import Samples
from .files import Paths, digest_files, digests_of, expand, joined_digest, total_bytes, unread_note
from .formats import read_conversations
from .mixed import Mixture, stores_of
from .pieces import plan
from .prepare import Job, join, tokenise
from .rows import RowOptions
from .store_writer import locked
from .stream import TokenStream
from .stream_open import is_streamed, notes_of, open_stream, unread_sources
from .tally import Tally
from .token_store import Progress, TokenStore, build_parts, build_store, open_verified, store_name
from .tokenizer import ConversationTokenizer

__all__ = ["Data", "TokenStore", "build_store", "open_data", "open_train"]

_SPLIT_UNIT = 1 << 64  # split values are below this


@dataclass
class Data:
    """What a run trains and evaluates on. `notes` are lines for the user: what was dropped, cut, held out.

    `sources` are the files that are trained on, by name (with the task before it) and SHA-256; those of a stream by
    `unread_sources`.
    """

    train: TokenStore | TokenStream | Mixture
    eval: TokenStore | Mixture | None
    notes: list[str] = field(default_factory=list)
    is_sample: bool = False
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Conversations with a digest that changes when they do."""

    label: str
    digest: str
    read: Callable[[Tally], Iterable[Document]]
    files: tuple[Path, ...] = ()  # what it reads, where that can be done in pieces
    layout: str = "auto"
    digests: tuple[tuple[str, str], ...] = ()  # (path, SHA-256) of each file that it reads


def open_data(
    config: Any,
    tokenizer: Any,
    progress: Progress | None = None,
    workers: int | None = None,
    engine: str = "local",
    ahead: Ahead | None = None,
) -> Data:
    """The stores for `config`, built where the cache has none; large files by `workers` processes (default: one a processor).

    With `engine` "ray" files of any size are built by workers of Ray; what cannot be cut in pieces is built here, and what
    would be streamed is refused. `ahead` has processes that may be used; the caller closes it.

    `train_data_path` null is the built-in corpus with its own held-out split. Without `eval_data_path`, `eval_split` of the
    conversations is held out by digest of their id (or content), so a conversation stays on its side when others are added.

    Raises `DataError`: missing or empty file, malformed record (file:line), no conversation left, vocabulary too small.
    """
    check_vocabulary(config, tokenizer)
    cache = Cache(Path(getattr(config, "data_cache_dir", "data/cache")), tokenizer, progress, workers, engine, ahead)
    if getattr(config, "multi_task", False):
        from .tasks import open_tasks  # here, since it opens the sources of each task as this module does

        data = open_tasks(config, cache)
    else:
        data = _open_whole(config, cache)
    data.notes += _unread_notes(config) + _closing_notes(config, data)
    return data


def _open_whole(config: Any, cache: Cache) -> Data:
    """Data without tasks."""
    train_path = getattr(config, "train_data_path", None)
    eval_path = getattr(config, "eval_data_path", None)
    split = float(getattr(config, "eval_split", 0.0))
    notes: list[str] = []
    held_out: TokenStore | None = None
    sources: dict[str, str] = {}
    if is_streamed(train_path, config):
        return _open_streamed(config, cache)
    if train_path is None:
        train = cache.store(sample_source("train"), notes)
        if eval_path is None:
            held_out = cache.store(sample_source("eval"), notes)
    else:
        source = file_source(train_path, config, "train_data_path")
        sources = dict(source.digests)
        if eval_path is None and split > 0:
            train, held_out = cache.split(source, split, notes)
        else:
            train = cache.store(source, notes)
    if eval_path is not None:
        held_out = cache.store(file_source(eval_path, config, "eval_data_path"), notes)
    return Data(train, held_out, notes, is_sample=train_path is None, sources=sources)


def _unread_notes(config: Any) -> list[str]:
    """Files of the folders of data that are not read."""
    tasks = config.task_data_paths if getattr(config, "multi_task", False) else {}
    train = list(tasks.values()) or [getattr(config, "train_data_path", None)]
    return [line for given in (*train, getattr(config, "eval_data_path", None)) for line in unread_note(given)]


def _closing_notes(config: Any, data: Data) -> list[str]:
    """What is cut of the data to fit a row, and whether evaluation shares conversations with training."""
    notes: list[str] = []
    train = stores_of(data.train)
    held_out = {} if data.eval is None else stores_of(data.eval)
    cut = getattr(config, "packing", "fit") != "concat"
    for name, stores in (("training", train), ("evaluation", held_out)):
        for task, store in stores.items() if cut else ():
            if isinstance(store, TokenStore):  # a stream has told of itself
                note = Samples(store, int(config.seq_length)).note(f"{name} ({task})" if task else name)
                notes += [note] if note else []
    if not held_out:
        split = float(getattr(config, "eval_split", 0.0))
        why = "one conversation cannot be split; set eval_data_path" if split else "set eval_data_path or eval_split"
        return [*notes, f"no evaluation data: {why}"]
    apart = [store for store in held_out.values() if isinstance(store, TokenStore)]
    return notes + _overlap_note(sum(_shared(store, other) for store in train.values() for other in apart))


def _shared(train: TokenStore | TokenStream, held_out: TokenStore) -> int:
    """Conversations that both have."""
    if isinstance(train, TokenStream):
        return train.shared_with(held_out)
    return len(np.intersect1d(train.digests, held_out.digests))


def _overlap_note(shared: int) -> list[str]:
    words = "conversations are in both training and evaluation data; evaluation flatters the model"
    return [f"warning: {shared:,} {words}"] if shared else []


def _open_streamed(config: Any, cache: Cache) -> Data:
    """Training data above `streaming_threshold_gb`. Evaluation data are small and a store, as ever."""
    split = float(getattr(config, "eval_split", 0.0)) if getattr(config, "eval_data_path", None) is None else 0.0
    stream = cache.stream(config.train_data_path, config, "train_data_path", split)
    files = expand(config.train_data_path, "train_data_path")
    notes = notes_of(stream, RowOptions.from_config(config), label_of(files), split)
    held_out = stream.eval
    if getattr(config, "eval_data_path", None) is not None:
        held_out = cache.store(file_source(config.eval_data_path, config, "eval_data_path"), notes)
    return Data(stream, held_out, notes, sources=unread_sources(files))


def open_train(
    data_path: Paths | None, tokenizer: Any, config: Any, progress: Progress | None = None
) -> tuple[TokenStore | TokenStream, list[str]]:
    """The store or stream of all conversations of `data_path` (None: the built-in corpus), and notes. Raises `DataError`."""
    check_vocabulary(config, tokenizer)
    notes: list[str] = []
    cache = Cache(Path(getattr(config, "data_cache_dir", "data/cache")), tokenizer, progress)
    if is_streamed(data_path, config, "data_path"):
        assert data_path is not None
        stream = cache.stream(data_path, config, "data_path")
        return stream, notes_of(stream, RowOptions.from_config(config), "data", 0.0)
    source = sample_source("train") if data_path is None else file_source(data_path, config, "data_path")
    store = cache.store(source, notes)
    note = Samples(store, int(config.seq_length)).note("data") if getattr(config, "packing", "fit") != "concat" else None
    return store, [*notes, note] if note else notes


def check_vocabulary(config: Any, tokenizer: Any) -> None:
    """Refuse an embedding that has no row for some of the tokenizer's ids."""
    rows, ids = getattr(config, "vocab_size", "auto"), tokenizer.get_vocab_size()
    if isinstance(rows, int) and rows < ids:
        raise DataError(
            f"vocab_size={rows:,} is too small for tokenizer {tokenizer.name}, which has {ids:,} ids",
            fix=f"set vocab_size=auto ({tokenizer.padded_vocab_size:,})",
            exit_code=2,
        )


def file_source(paths: Paths, config: Any, key: str) -> Source:
    """Files, folders and globs as a source. Raises `DataError` for what is missing."""
    files = expand(paths, key)
    layout = getattr(config, "data_format", "auto")
    each = digests_of(files)
    digest = hashlib.sha256(f"{layout}\n{joined_digest(each)}".encode()).hexdigest()
    read = partial(_read_files, list(files), layout, key)
    return Source(label_of(files), digest, read, tuple(files), layout, tuple(zip(map(str, files), each, strict=True)))


def _read_files(files: list[Path], layout: str, key: str, tally: Tally) -> Iterator[Document]:
    return read_conversations(files, layout, tally=tally, key=key)


def sample_source(split: str) -> Source:
    """The built-in corpus. Its digest is that of the modules that generate it."""
    from . import sample

    modules = sorted(Path(sample.__file__).parent.glob("sample*.py"))
    digest = hashlib.sha256(f"sample {split}\n{digest_files(modules)}".encode()).hexdigest()

    def read(tally: Tally) -> Iterator[Document]:
        for conversation in sample.conversations(split):
            tally.read += 1
            yield conversation

    return Source(f"built-in corpus ({split})", digest, read)


def _nothing_left(source: Source, tally: Tally) -> DataError:
    why = "; ".join(tally.lines()) or "it holds no record"
    return DataError(f"no conversation left to train on: {why}", path=source.label, fix="check data_format and the records")


def _meta(source: Source, tally: Tally) -> dict[str, Any]:
    return {
        "source": {"label": source.label, "digest": source.digest},
        "tally": tally.to_dict(),
    }


def _note_tally(source: Source, store: TokenStore, notes: list[str]) -> None:
    notes += [f"{source.label}: {line}" for line in Tally.from_dict(store.meta["tally"]).lines()]


def split_value(document: Document) -> int:
    """Where a conversation falls between 0 and 2^64: the digest of its id, or of its content when it has none."""
    digest = hashlib.sha256(f"id\n{document.id}".encode()).digest() if document.id is not None else document.digest()
    return int.from_bytes(digest[:8], "big")


def part_of(threshold: int | None) -> Callable[[Document], str]:
    """To which part a document belongs: "eval" below the threshold, else "train"; "all" without one."""
    if threshold is None:
        return lambda document: "all"
    return lambda document: "eval" if split_value(document) < threshold else "train"


class Cache:
    """The folder of stores; builds those that are not there. Two processes may want the same: one builds, the other waits."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        progress: Progress | None = None,
        workers: int | None = None,
        engine: str = "local",
        ahead: Ahead | None = None,
    ) -> None:
        self.engine = engine
        self.ahead = ahead or Ahead()
        self.folder, self.tokenizer, self.progress = folder, tokenizer, progress
        by_name = isinstance(tokenizer, ConversationTokenizer)  # another kind cannot be made again in another process
        self.workers = (workers or processors()) if by_name else 1
        self._cluster = workers  # Ray knows how many processors its machines have

    def store(self, source: Source, notes: list[str]) -> TokenStore:
        """The store of a whole source."""
        targets = {"all": self.folder / store_name(self.tokenizer, source=source.digest, part="all")}
        with locked(self.folder, targets["all"].name):
            store = open_verified(targets["all"])
            if store is None:
                built = self._in_pieces(source, None, targets)
                if built is None:
                    tally = Tally()
                    built = self._in_one_pass(source, tally, part_of(None), targets, ("all",))
                    if built is None:
                        raise _nothing_left(source, tally)
                store = built["all"]
        _note_tally(source, store, notes)
        return store

    def stream(self, paths: Paths, config: Any, key: str, split: float = 0.0) -> TokenStream:
        """The stream of `paths`, counted. Raises `DataError`, also with Ray: a stream is tokenised here, window by window."""
        if self.engine == "ray":
            files = expand(paths, key)
            raise DataError(
                "--engine ray builds token stores whole, and these data would be streamed",
                path=label_of(files),
                fix=f"set streaming_threshold_gb above {total_bytes(files) / 1e9:.3g}, here and in the run",
                exit_code=2,
            )
        workers = self.workers if isinstance(self.tokenizer, ConversationTokenizer) else 0
        return open_stream(paths, config, self.tokenizer, split=split, workers=workers, key=key, progress=self.progress)

    def split(self, source: Source, share: float, notes: list[str]) -> tuple[TokenStore, TokenStore | None]:
        """Training and evaluation stores of one source. A small source holds out its lowest conversation at least."""
        named = {part: store_name(self.tokenizer, source=source.digest, part=part, split=share) for part in ("train", "eval")}
        targets = {part: self.folder / name for part, name in named.items()}
        with locked(self.folder, named["train"], named["eval"]):
            stores = {part: open_verified(target) for part, target in targets.items()}
            if any(store is None for store in stores.values()):
                built = self._split(source, int(share * _SPLIT_UNIT), targets)
                stores = {part: built[part] for part in targets}
        train, held_out = stores["train"], stores["eval"]
        assert train is not None and held_out is not None
        _note_tally(source, train, notes)
        if not len(held_out):
            return train, None
        total = len(train) + len(held_out)
        notes.append(f"{len(held_out):,} of {total:,} conversations held out for evaluation (eval_split={share:g})")
        return train, held_out

    def _split(self, source: Source, threshold: int, targets: dict[str, Path]) -> dict[str, TokenStore]:
        for target in targets.values():  # one of the two may be whole: both are written again, together
            shutil.rmtree(target, ignore_errors=True)
        built = self._in_pieces(source, threshold, targets)
        lowest, highest = _SPLIT_UNIT, -1

        def side(document: Document) -> str:
            nonlocal lowest, highest
            value = split_value(document)
            lowest, highest = min(lowest, value), max(highest, value)
            return "eval" if value < threshold else "train"

        required: tuple[str, ...] = ("train", "eval")
        while built is None:
            tally = Tally()
            built = self._in_one_pass(source, tally, side, targets, required)
            if built is None:
                if highest < 0:
                    raise _nothing_left(source, tally)
                # one side is empty: hold out exactly the lowest, or nothing when there is only one
                threshold = lowest + 1 if lowest < highest else 0
                required = ("train",)
        return built

    def _in_one_pass(
        self,
        source: Source,
        tally: Tally,
        side: Callable[[Document], str],
        targets: dict[str, Path],
        required: tuple[str, ...],
    ) -> dict[str, TokenStore] | None:
        pairs = ((side(document), document) for document in source.read(tally))
        extra = partial(_meta, source, tally)
        return build_parts(pairs, targets, self.tokenizer, extra, progress=self.progress, required=required)

    def _pieces_folder(self, name: str) -> Path:
        """Where the pieces of store `name` go. Those of another size, as another version cuts them, are removed."""
        folder = self.folder / f"{name}-{PIECE_BYTES}.pieces"
        for other in self.folder.glob(f"{name}*.pieces"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return folder

    def _in_pieces(self, source: Source, threshold: int | None, targets: dict[str, Path]) -> dict[str, TokenStore] | None:
        """The same from pieces, for a large source. None: it is small, cannot be cut, or a part came out empty."""
        by_ray = self.engine == "ray"
        if not source.files or (not by_ray and total_bytes(source.files) < PIECES_FROM):
            return None
        pieces = plan(list(source.files), source.layout, PIECE_BYTES)
        if pieces is None or (not by_ray and len(pieces) < 2):
            self.ahead.close()
            return None
        folder = self._pieces_folder(next(iter(targets.values())).name)
        job = Job(pieces, folder, self.tokenizer, threshold, part_of(threshold), self.engine, self.ahead)
        try:
            workers = self._cluster if by_ray else min(self.workers, len(pieces))
            finished = tokenise(job, workers, self.progress)
            return join(job, finished, targets, partial(_meta, source))
        except OSError as error:
            cause = f"the token store cannot be written ({error.strerror or error})"
            raise DataError(cause, path=folder, fix="free some space or set data_cache_dir", exit_code=2) from None
