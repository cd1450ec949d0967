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

from .conversation import DataError, Document
from .cut import Samples
from .files import Paths, digest_files, expand, total_bytes
from .formats import read_conversations
from .store_writer import locked
from .tally import Tally
from .token_store import Progress, TokenStore, build_parts, build_store, open_verified, store_name

__all__ = ["Data", "TokenStore", "build_store", "open_data", "open_train"]

_SPLIT_UNIT = 1 << 64  # split values are below this


@dataclass
class Data:
    """What a run trains and evaluates on. `notes` are lines for the user: what was dropped, cut, held out."""

    train: TokenStore
    eval: TokenStore | None
    notes: list[str] = field(default_factory=list)
    is_sample: bool = False


@dataclass(frozen=True)
class Source:
    """Conversations with a digest that changes when they do."""

    label: str
    digest: str
    read: Callable[[Tally], Iterable[Document]]


def open_data(config: Any, tokenizer: Any, progress: Progress | None = None) -> Data:
    """The stores for `config`, built where the cache has none.

    `train_data_path` null is the built-in corpus with its own held-out split. Without `eval_data_path`, `eval_split` of the
    conversations is held out by digest of their id (or content), so a conversation stays on its side when others are added.

    Raises `DataError`: missing or empty file, malformed record (file:line), no conversation left, vocabulary too small.
    """
    check_vocabulary(config, tokenizer)
    cache = Path(getattr(config, "data_cache_dir", "data/cache"))
    train_path = getattr(config, "train_data_path", None)
    eval_path = getattr(config, "eval_data_path", None)
    split = float(getattr(config, "eval_split", 0.0))
    notes: list[str] = []
    held_out: TokenStore | None = None
    if train_path is None:
        train = _store(sample_source("train"), tokenizer, cache, progress, notes)
        if eval_path is None:
            held_out = _store(sample_source("eval"), tokenizer, cache, progress, notes)
    else:
        source = file_source(train_path, config, "train_data_path")
        if eval_path is None and split > 0:
            train, held_out = _split_stores(source, split, tokenizer, cache, progress, notes)
        else:
            train = _store(source, tokenizer, cache, progress, notes)
    if eval_path is not None:
        held_out = _store(file_source(eval_path, config, "eval_data_path"), tokenizer, cache, progress, notes)
    cut = getattr(config, "packing", "fit") != "concat"
    for name, store in (("training", train), ("evaluation", held_out)):
        note = Samples(store, int(config.seq_length)).note(name) if store is not None and cut else None
        notes += [note] if note else []
    if held_out is not None:
        shared = len(np.intersect1d(train.digests, held_out.digests))
        if shared:
            notes.append(
                f"warning: {shared:,} conversations are in both training and evaluation data; evaluation flatters the model"
            )
    else:
        notes.append("no evaluation data: set eval_data_path or eval_split")
    return Data(train, held_out, notes, is_sample=train_path is None)


def open_train(
    data_path: Paths | None, tokenizer: Any, config: Any, progress: Progress | None = None
) -> tuple[TokenStore, list[str]]:
    """The store of all conversations of `data_path` (None: the built-in corpus), and notes. Raises `DataError`."""
    check_vocabulary(config, tokenizer)
    notes: list[str] = []
    cache = Path(getattr(config, "data_cache_dir", "data/cache"))
    source = sample_source("train") if data_path is None else file_source(data_path, config, "data_path")
    store = _store(source, tokenizer, cache, progress, notes)
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
    """Files, folders and globs as a source. Raises `DataError` for what is missing or above the streaming threshold."""
    files = expand(paths, key)
    layout = getattr(config, "data_format", "auto")
    size, limit = total_bytes(files), float(getattr(config, "streaming_threshold_gb", 5.0)) * 1e9
    if size > limit:
        raise DataError(
            f"{key} has {size / 1e9:.1f} GB, above streaming_threshold_gb={limit / 1e9:g}; streaming is not available yet",
            path=files[0] if len(files) == 1 else files[0].parent,
            fix="use less data",
            exit_code=2,
        )
    label = str(files[0]) if len(files) == 1 else f"{len(files)} files"
    digest = hashlib.sha256(f"{layout}\n{digest_files(files)}".encode()).hexdigest()
    return Source(label, digest, lambda tally: read_conversations(list(files), layout, tally=tally, key=key))


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


def _store(source: Source, tokenizer: Any, cache: Path, progress: Progress | None, notes: list[str]) -> TokenStore:
    """The store of a whole source."""
    name = store_name(tokenizer, source=source.digest, part="all")
    with locked(cache, name):
        store = open_verified(cache / name)
        if store is None:
            tally = Tally()
            pairs = (("all", document) for document in source.read(tally))
            built = build_parts(
                pairs, {"all": cache / name}, tokenizer, lambda: _meta(source, tally), progress=progress, required=["all"]
            )
            if built is None:
                raise _nothing_left(source, tally)
            store = built["all"]
    _note_tally(source, store, notes)
    return store


def split_value(document: Document) -> int:
    """Where a conversation falls between 0 and 2^64: the digest of its id, or of its content when it has none."""
    digest = hashlib.sha256(f"id\n{document.id}".encode()).digest() if document.id is not None else document.digest()
    return int.from_bytes(digest[:8], "big")


def _split_stores(
    source: Source, share: float, tokenizer: Any, cache: Path, progress: Progress | None, notes: list[str]
) -> tuple[TokenStore, TokenStore | None]:
    """Training and evaluation stores of one source, in one pass. A small source holds out its lowest conversation at least."""
    names = {part: store_name(tokenizer, source=source.digest, part=part, split=share) for part in ("train", "eval")}
    targets = {part: cache / name for part, name in names.items()}
    with locked(cache, names["train"]):
        stores = {part: open_verified(target) for part, target in targets.items()}
        if any(store is None for store in stores.values()):
            built = _build_split(source, int(share * _SPLIT_UNIT), targets, tokenizer, progress)
            stores = {part: built[part] for part in targets}
    train, held_out = stores["train"], stores["eval"]
    assert train is not None and held_out is not None
    _note_tally(source, train, notes)
    if not len(held_out):
        return train, None
    total = len(train) + len(held_out)
    notes.append(f"{len(held_out):,} of {total:,} conversations held out for evaluation (eval_split={share:g})")
    return train, held_out


def _build_split(
    source: Source, threshold: int, targets: dict[str, Path], tokenizer: Any, progress: Progress | None
) -> dict[str, TokenStore]:
    for target in targets.values():  # one of the two may be whole: both are written again, together
        stale = open_verified(target)
        if stale is not None:
            shutil.rmtree(target)
    lowest, highest = _SPLIT_UNIT, -1

    def sides(tally: Tally) -> Iterator[tuple[str, Document]]:
        nonlocal lowest, highest
        for document in source.read(tally):
            value = split_value(document)
            lowest, highest = min(lowest, value), max(highest, value)
            yield ("eval" if value < threshold else "train"), document

    required: tuple[str, ...] = ("train", "eval")
    while True:
        tally = Tally()
        extra = partial(_meta, source, tally)
        built = build_parts(sides(tally), targets, tokenizer, extra, progress=progress, required=required)
        if built is not None:
            return built
        if highest < 0:
            raise _nothing_left(source, tally)
        # one side is empty: hold out exactly the lowest, or nothing when there is only one
        threshold = lowest + 1 if lowest < highest else 0
        required = ("train",)
