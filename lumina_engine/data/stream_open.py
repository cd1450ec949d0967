"""From the settings of a run to a stream: which data are streamed, where their windows go, what to tell the user."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .conversation import READING_VERSION, DataError
from .files import Paths, expand, total_bytes
from .order import ORDER_VERSION
from .pieces import plan
from .rows import RowOptions
from .store_writer import template_digest
from .stream import STREAM_VERSION, WINDOW_PIECES, TokenStream, windows_of
from .stream_rows import StreamRows
from .token_store import Progress

_SPLIT_UNIT = 1 << 64
UNREAD = "unread:"  # before what tells a version of a file, where other sources have the digest of the content
STREAM_PIECE_BYTES = 16 << 20  # the order of a stream's rows follows from it


def is_streamed(paths: Paths | None, config: Any, key: str = "train_data_path") -> bool:
    """Whether data are above `streaming_threshold_gb`; with 0 all files are. Raises `DataError` for what names nothing."""
    if paths is None:
        return False
    threshold = float(getattr(config, "streaming_threshold_gb", 5.0))
    return threshold == 0 or total_bytes(expand(paths, key)) > threshold * 1e9


def identity(files: list[Path], layout: str) -> str:
    """What tells a version of the files without reading them: name, size and time of each, or the tag that a service gives."""
    parts = [[str(path) if hasattr(path, "version") else str(path.resolve()), *_version(path)] for path in files]
    return hashlib.sha256(json.dumps([layout, parts]).encode()).hexdigest()


def _version(path: Path) -> list[Any]:
    if hasattr(path, "version"):
        return [path.version()]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def unread_sources(files: list[Path]) -> dict[str, str]:
    """The files of a stream by name, each with what tells its version without reading it; see `changed_sources`."""
    return {str(path): UNREAD + hashlib.sha256(json.dumps(_version(path)).encode()).hexdigest() for path in files}


def open_stream(
    paths: Paths,
    config: Any,
    tokenizer: Any,
    *,
    split: float = 0.0,
    workers: int = 0,
    key: str = "train_data_path",
    piece_bytes: int = STREAM_PIECE_BYTES,
    window_pieces: int = WINDOW_PIECES,
    progress: Progress | None = None,
) -> TokenStream:
    """The stream of `paths`, counted for the rows of `config`. `split` is the share held out, as `eval_split`.

    Raises `DataError`: what names nothing, message trees, a malformed record, no conversation at all, a full disk.
    """
    from .store import part_of  # here, since it opens streams by this module

    files = expand(paths, key)
    layout = getattr(config, "data_format", "auto")
    pieces = plan(files, layout, piece_bytes)
    if pieces is None:
        raise DataError(
            f"{key}: message trees cannot be streamed, for a tree may come again in another file",
            path=files[0] if len(files) == 1 else files[0].parent,
            fix="convert them first (`lumina-engine data convert`), or raise streaming_threshold_gb",
            exit_code=2,
        )
    threshold = int(split * _SPLIT_UNIT) if split else None
    name = {
        "version": STREAM_VERSION,
        "order": ORDER_VERSION,
        "reading": READING_VERSION,
        "data": identity(files, layout),
        "tokenizer": tokenizer.digest,
        "template": template_digest(tokenizer),
        "threshold": threshold,
        "pieces": [piece_bytes, window_pieces],
    }
    folder = Path(getattr(config, "data_cache_dir", "data/cache")) / f"{_digest(name)}.stream"
    stream = TokenStream(
        folder,
        windows_of(pieces, window_pieces),
        tokenizer,
        threshold=threshold,
        part_of=part_of(threshold),
        room=float(getattr(config, "streaming_threshold_gb", 5.0)) * 1e9,
        workers=workers,
    )
    rows = stream.count(RowOptions.from_config(config), progress)
    if not rows.num_rows:
        why = "; ".join(stream.tally.lines()) or "it holds no record"
        label = files[0] if len(files) == 1 else f"{len(files)} files"
        raise DataError(f"no conversation left to train on: {why}", path=label, fix="check data_format and the records")
    return stream


def notes_of(stream: TokenStream, options: RowOptions, label: str, split: float) -> list[str]:
    """Lines for the user: that it is a stream, what was dropped, held out and cut."""
    rows = stream.count(options)
    notes = [
        f"{label}: streamed, {rows.num_rows:,} rows of {len(stream):,} conversations an epoch, "
        f"shuffled in {len(stream.windows):,} window{'s' if len(stream.windows) != 1 else ''}"
    ]
    notes += [f"{label}: {line}" for line in stream.tally.lines()]
    if stream.eval is not None:
        total = len(stream) + len(stream.eval)
        notes.append(f"{len(stream.eval):,} of {total:,} conversations held out for evaluation (eval_split={split:g})")
    return [*notes, *_cut_note(stream, rows)]


def _cut_note(stream: TokenStream, rows: StreamRows) -> list[str]:
    cut = sum(count.cut_documents for count in rows.counts)
    if not cut:
        return []
    lost = sum(count.lost_tokens for count in rows.counts)
    kinds = sorted({kind for count in rows.counts for kind in count.shortened})
    what = ", ".join(f"{kind} in {sum(count.shortened.get(kind, 0) for count in rows.counts):,}" for kind in kinds)
    return [
        f"training: {cut:,} of {len(stream):,} conversations are longer than seq_length {rows.options.seq_length:,} and were "
        f"shortened, {lost:,} tokens in all ({what}); seq_length={stream.longest:,} keeps everything"
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
