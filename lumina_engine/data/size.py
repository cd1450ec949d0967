"""A look at the data that a configuration names, before training reads it: files, bytes, digest, tokens, room in the cache.

Names and sizes only, but for `content_digest`, which reads the files, and `check_head`, which reads their beginning. Never
imports a tokenizer.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.task_checks import train_paths
from ..config.tokenizers import TOKENIZER_IDS
from .conversation import READING_VERSION, DataError
from .files import Paths, expand
from .formats import read_conversations
from .order import ORDER_VERSION
from .stream_open import identity, is_streamed

if TYPE_CHECKING:
    from ..config.schema import Config

# Guesses: bytes of conversation files per token, and bytes of a token store per byte of them (at most a token for two bytes,
# five bytes a token, and the offsets and digests of the conversations).
BYTES_PER_TOKEN = 4.0
_STORE_SHARE = 3.0
_CONVERSATION_TOKENS = 250.0  # of a usual conversation, also a guess
_DIGESTED = 1_000_000_000  # bytes of data up to which reading all of it for its average length is worth the wait
_WINDOWS_BYTES = 1_500_000_000  # room of the windows of a stream that are in use, at most
_CORPUS_STORE_BYTES = 64_000_000  # room that the built-in corpus takes at most
MAX_STORES = 1_000  # folders of the cache that are looked at


@dataclass(frozen=True, slots=True)
class Counted:
    """A token store of this data that is in the cache: tokens and conversations as counted, and its fingerprint."""

    tokens: int
    documents: int
    fingerprint: str


def data_files(value: str | Sequence[str] | None) -> list[Path]:
    """The files that a data path names, as training finds them; what names nothing is left out."""
    found: list[Path] = []
    for text in [value] if isinstance(value, str) else value or []:
        with contextlib.suppress(DataError):
            found += [path for path in expand(text) if path not in found]
    return found


def data_bytes(value: str | Sequence[str] | None) -> int:
    """Bytes of the files that a data path names."""
    size = 0
    for path in data_files(value):
        with contextlib.suppress(OSError):  # removed since it was listed
            size += path.stat().st_size
    return size


def train_tokens(config: Config, given: int | None = None) -> tuple[int | None, str]:
    """Tokens of one epoch and how they are known: given, guessed from the files' size, or unknown (the built-in corpus)."""
    if given:
        return given, "given"
    size = sum(data_bytes(value) for value in train_paths(config).values())
    return (int(size / BYTES_PER_TOKEN), "guessed from the size of the files") if size else (None, "")


def average_tokens(config: Config) -> tuple[float, str]:
    """Tokens of one conversation, and how they are known: measured in the prepared data of this tokenizer, or guessed."""
    size = sum(data_bytes(value) for value in train_paths(config).values())
    found = counted(config, content_digest(config)) if size <= _DIGESTED else None
    if found is None or not found.documents:
        return _CONVERSATION_TOKENS, "guessed"
    return found.tokens / found.documents, "measured"


def cache_bytes(config: Config) -> int:
    """Room that the token stores of a configuration may take in `data_cache_dir` (guessed), in bytes."""
    values = list(train_paths(config).values())
    sizes = [data_bytes(value) for value in values]
    train, most = 0.0, config.streaming_threshold_gb * 1e9
    for source in sizes:
        store = source * _STORE_SHARE
        # of a stream no more than the threshold stays, and what is held out
        train += store if source <= most else min(store, most + _WINDOWS_BYTES + store * config.eval_split)
    size = int(train + data_bytes(config.eval_data_path) * _STORE_SHARE)
    return size + (_CORPUS_STORE_BYTES if None in values else 0)


def content_digest(config: Config) -> str:
    """The digest of the training data as a store names its source (64 hex digits); those of tasks joined by "+".

    Reads all of it, unless it is streamed: then the digest is one of names, sizes and times.

    Raises:
        DataError: files that are missing, unreadable or too large.
    """
    from .tasks import train_sources

    streamed = {key: value for key, value in train_paths(config).items() if value and is_streamed(value, config, key)}
    found = [identity(expand(value, key), config.data_format) for key, value in streamed.items() if value]
    return "+".join([*found, *(source.digest for source in train_sources(config, without=streamed).values())])


def counted(config: Config, digest: str) -> Counted | None:
    """What the cache knows of training data with this digest under the configured tokenizer; None if it was never prepared."""
    found = [stored(config, part) for part in digest.split("+")]
    metas = [entry[1] for entry in found if entry is not None]
    if len(metas) < len(found):
        return None
    fingerprint = "+".join(str(meta["fingerprint"]) for meta in metas)
    return Counted(sum(int(m["tokens"]) for m in metas), sum(int(m["documents"]) for m in metas), fingerprint)


def stored(config: Config, digest: str) -> tuple[Path, dict[str, Any]] | None:
    """The store of a source with this digest under the configured tokenizer, and what its meta.json says.

    A vocabulary file is known by its path and time, since it is not read here: a store that is older than the file is none.
    """
    best: tuple[Path, dict[str, Any]] | None = None
    name, since = _tokenizer(config.tokenizer)
    for path, meta in _stores(Path(config.data_cache_dir).expanduser()):
        try:
            if meta["source"]["digest"] != digest or meta["tokenizer"]["name"] != name:
                continue
            if (meta["order"], meta["reading"]) != (ORDER_VERSION, READING_VERSION):  # a run would build it again
                continue
            if since and (path / "meta.json").stat().st_mtime_ns < since:
                continue
            larger = int(meta["documents"]) > 0 and (best is None or int(meta["tokens"]) > int(best[1]["tokens"]))
        except (KeyError, TypeError, ValueError, OSError):
            continue
        if larger and isinstance(meta.get("fingerprint"), str):  # the larger part is the one that is trained on
            best = path, meta
    return best


def _tokenizer(name: str) -> tuple[str, int]:
    """The name of a tokenizer as stores have it, and of a file its time in nanoseconds, else 0."""
    if name in TOKENIZER_IDS:
        return name, 0
    try:
        path = Path(os.path.abspath(Path(name).expanduser()))  # noqa: PTH100
        return str(path), path.stat().st_mtime_ns
    except (OSError, ValueError, RuntimeError):  # no such file, name or home: no store is its
        return name, 0


def _stores(cache: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    try:
        folders = sorted(cache.iterdir())[:MAX_STORES]
    except OSError:
        return
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            yield folder, json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def check_head(paths: Paths, format: str = "auto", *, key: str = "data path", conversations: int = 2_000) -> None:
    """Read the first conversations of every file as training would; `conversations` are shared out over the files.

    Raises `DataError`: what names nothing, an empty file, an unknown layout, a malformed record at the head of a file.
    """
    files = expand(paths, key)
    share = max(1, conversations // len(files))
    for path in files:
        for _ in islice(read_conversations(path, format, key=key), share):
            pass
