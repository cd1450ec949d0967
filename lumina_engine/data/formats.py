"""Reading conversations from files of any known layout, and converting them to the project's own.

The container (JSON Lines, JSON, text) and the layout are told by content, not by name; see `layouts.py` for the rules.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from .container import EMPTY, container
from .conversation import DataError, Document, nearest, shown
from .files import REJECTS_SUFFIX, OnError, Paths, Record, expand, line_range, records, texts
from .layouts import READERS, layout_of, parts, strict
from .oasst import OasstOptions, OasstReader
from .parquet import parquet_rows
from .remote import local_output
from .tally import Tally

T = TypeVar("T")

FORMATS = ("auto", "messages", "oasst", "alpaca", "sharegpt", "text")

_log = logging.getLogger("lumina_engine.data")
_REPORT_EVERY = 1000  # records between calls of a progress callback
_PROBED = 200  # records without a known layout after which a file has none


def detect_format(path: str | os.PathLike[str]) -> str:
    """The layout of one file, by its content. Raises `DataError` when it is none that can be read."""
    return _detect(Path(path))[1]


def _detect(path: Path) -> tuple[str, str]:
    """(container, layout)."""
    kind = container(path)
    if kind == "text":
        return kind, "text"
    return kind, _first_layout(path, kind)


def _first_layout(path: Path, kind: str) -> str:
    """The layout of the first record that tells one, so that a bad record at the beginning is one bad record.

    Raises `DataError`, the fault of the first record, where none of the first 200 does.
    """
    faults: list[DataError] = []

    def untold(error: DataError) -> None:
        faults.append(error)
        if len(faults) == _PROBED:
            raise faults[0]

    for record in records(path, kind, untold):
        try:
            layout = layout_of(record.value)
        except DataError as error:  # a Parquet value that cannot be read
            untold(error)
            continue
        if layout is not None:
            return layout
        untold(_unknown(record))
    if faults:
        raise faults[0]
    raise DataError("it holds no record", path=path, fix="name a file with conversations", reason=EMPTY)


def _unknown(record: Record) -> DataError:
    value = record.value
    keys = ", ".join(sorted(map(str, value))[:8]) if isinstance(value, Mapping) else shown(value)
    return DataError(
        f"no known layout (found: {shown(keys, 120)})",
        path=record.path,
        line=record.line,
        fix="known are messages [role, content], sharegpt conversations [from, value], alpaca instruction and output, "
        "oasst trees, text",
        reason="unknown layout",
    )


def _as(path: Path, layout: str) -> tuple[str, str]:
    """(container, layout) where the user named the layout."""
    kind = container(path)
    if kind == "text" and layout != "text":
        raise DataError(f"plain text, not {layout}", path=path, line=1, fix="let auto tell the format of each file")
    if kind != "text" and layout == "text":
        try:
            told = _first_layout(path, kind)
        except DataError:  # not JSON after all, such as source code that begins with a brace
            told = None
        if told != "text":
            kind = "text"
    return kind, layout


def check_format(name: str) -> str:
    """`name` if it is a layout that can be read; `DataError` otherwise."""
    if name in FORMATS:
        return name
    like = nearest(name, FORMATS)
    raise DataError(
        f"unknown data format {name!r}",
        fix=(f"did you mean {like}? " if like else "") + "formats: " + ", ".join(FORMATS),
        exit_code=2,
    )


def layout_at(path: Path, format: str = "auto") -> tuple[str, str]:
    """(container, layout) of a file, told by its content or as the user named it. Raises `DataError`."""
    return _detect(path) if format == "auto" else _as(path, check_format(format))


def read_lines(path: Path, layout: str, start: int, stop: int, tally: Tally) -> Iterator[Document]:
    """The conversations of the lines of a JSON Lines file that begin in bytes `start` to `stop`; see `read_located`.

    Not for message trees, which may spread over lines. Lines in errors count from the first one of the range.
    """
    read = READERS[layout] if layout != "messages" else strict
    for record in line_range(path, start, stop):
        yield from read(record, tally)


def read_groups(path: Path, layout: str, groups: range, tally: Tally) -> Iterator[Document]:
    """The conversations of some row groups of a Parquet file; see `read_located`. Rows in errors count in the whole file."""
    read = READERS[layout] if layout != "messages" else strict
    for number, row, offset in parquet_rows(path, groups):
        yield from read(Record(path, number, row, offset), tally)


def read_conversations(
    paths: Paths,
    format: str = "auto",
    *,
    tally: Tally | None = None,
    tidy: bool = False,
    on_error: OnError | None = None,
    on_empty: OnError | None = None,
    key: str = "data path",
    oasst: OasstOptions | None = None,
) -> Iterator[Document]:
    """Every conversation of files, folders and globs, in order, one in memory at a time. See `read_located`."""
    located = read_located(paths, format, tally=tally, tidy=tidy, on_error=on_error, on_empty=on_empty, key=key, oasst=oasst)
    return (document for _, document in located)


def read_located(
    paths: Paths,
    format: str = "auto",
    *,
    tally: Tally | None = None,
    tidy: bool = False,
    on_error: OnError | None = None,
    on_empty: OnError | None = None,
    key: str = "data path",
    oasst: OasstOptions | None = None,
) -> Iterator[tuple[Record, Document]]:
    """Every conversation with the record that it comes from.

    `format` "auto" detects each file by itself. `tidy` also tidies the messages layout, which is read strictly otherwise.
    `tally` counts. `oasst` says what is taken from message trees. Raises `DataError` with file:line for a malformed record;
    with `on_error` it is handed there instead and reading goes on behind it. `on_empty` gets the error of a file without a
    record, and the next file is read.
    """
    check_format(format)
    tally = tally if tally is not None else Tally()
    trees = OasstReader(oasst or OasstOptions(), tally, on_error)
    for path in expand(paths, key):
        try:
            kind, layout = layout_at(path, format)
        except DataError as error:
            if on_empty is None or error.reason != EMPTY:
                raise
            on_empty(error)
            continue
        source = texts(path) if kind == "text" else records(path, kind, on_error)
        if layout == "oasst":
            yield from trees.read(source)
            continue
        read = READERS[layout] if layout != "messages" or tidy else strict
        for whole in source:
            for record in _handed(parts(whole) if layout == "alpaca" else iter((whole,)), on_error):
                for document in _handed(read(record, tally), on_error):
                    yield record, document


def _handed(found: Iterator[T], on_error: OnError | None) -> Iterator[T]:
    """What is found; a `DataError` ends it, and is handed to `on_error` if there is one."""
    try:
        yield from found
    except DataError as error:
        if on_error is None:
            raise
        on_error(error)


@dataclass(frozen=True, slots=True)
class Converted:
    """Result of `convert`: conversations written, what became of everything read, and the file of rejects if there is one."""

    written: int
    tally: Tally
    rejects: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON: read = written + sum of dropped."""
        return {"written": self.written, **self.tally.to_dict(), "rejects": str(self.rejects) if self.rejects else None}


class _Rejects:
    """One JSON line for each record that was dropped: file, line, reason, message. Appears beside the output, if at all.

    Bytes of a file name that are not UTF-8 stand as JSON escapes, from which `json.loads` makes the name again.
    """

    def __init__(self, target: Path, staging: Path) -> None:
        self.target, self._staging = target, staging
        self._handle: IO[str] | None = None
        self.first: DataError | None = None

    def add(self, error: DataError) -> None:
        if self._handle is None:
            self._handle = self._staging.open("x", encoding="utf-8", errors="backslashreplace", newline="\n")
            self.first = error
        entry = {"file": error.path, "line": error.line, "reason": error.reason, "message": error.message}
        self._handle.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def commit(self) -> Path | None:
        """Put the file in place; without a reject an older one of that name goes."""
        if self._handle is None:
            self.target.unlink(missing_ok=True)
            return None
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._staging.replace(self.target)
        return self.target

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        self._staging.unlink(missing_ok=True)


def rejects_path(output: str | os.PathLike[str]) -> Path:
    """Where `convert` lists what it drops unless told otherwise: OUTPUT.rejects.jsonl."""
    return Path(f"{Path(output)}{REJECTS_SUFFIX}")


def convert(
    inputs: Paths,
    output: str | os.PathLike[str],
    format: str = "auto",
    *,
    strict: bool = False,
    oasst: OasstOptions | None = None,
    rejects: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Converted:
    """Write the conversations of `inputs` to `output` as JSON Lines of the messages layout (text documents as `{"text"}`).

    `output` appears whole or not at all, and replaces a file of that name. A record that is malformed or has nothing to train
    on is dropped and counted, with a line in `rejects` (default: `rejects_path`), which replaces a file of that name; where
    none is dropped that file goes. A file that holds no record counts as a dropped one. With `strict` the first one that would
    be dropped or cut is an error. `oasst` says what is taken from message trees. `progress` gets the number read so far. Raises
    `DataError`, also where the rest of a file cannot be read.
    """
    target = local_output(output)
    bad = local_output(rejects) if rejects is not None else rejects_path(target)
    files = expand(inputs, "input")
    for place in (target, bad):
        if place.exists() and any(isinstance(path, Path) and place.samefile(path) for path in files):  # no URL is a file here
            raise DataError("the output is one of the inputs", path=place, fix="name another output", exit_code=2)
    nonce = secrets.token_hex(4)
    staging = target.with_name(f".{target.name}.{nonce}.tmp")
    rejected = _Rejects(bad, bad.with_name(f".{bad.name}.{nonce}.tmp"))
    tally = Tally(strict=strict, rejects=rejected.add)

    def malformed(error: DataError) -> None:
        if error.rest_lost:
            raise error
        tally.malformed(error)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        bad.parent.mkdir(parents=True, exist_ok=True)
        try:
            with staging.open("x", encoding="utf-8", newline="\n") as handle:
                documents = read_conversations(
                    files, format, tally=tally, tidy=True, on_error=malformed, on_empty=tally.malformed, oasst=oasst
                )
                written = _write(handle, documents, tally, progress)
                if not written:
                    raise _nothing_left(rejected.first, tally, files[0])
                handle.flush()
                os.fsync(handle.fileno())
            rejects_file = rejected.commit()
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
            rejected.close()
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror or error})",
            path=target,
            fix="check the folder and the free space",
            exit_code=2,
        ) from None
    return Converted(written, tally, rejects_file)


def _nothing_left(first: DataError | None, tally: Tally, path: Path) -> DataError:
    reasons = "; ".join(tally.lines()) or "the input is empty"
    message = f"no conversation left to write ({reasons})"
    if first is None:
        return DataError(message, path=path, fix="check --format")
    return DataError(f"{first.message}; {message}", path=first.path, line=first.line, fix="check --format")


def _write(handle: IO[str], documents: Iterator[Document], tally: Tally, progress: Callable[[int], None] | None) -> int:
    """Write each document as a line; how many there were."""
    written = 0
    for document in documents:
        handle.write(json.dumps(document.to_record(), ensure_ascii=False) + "\n")
        written += 1
        if progress and tally.read % _REPORT_EVERY == 0:
            progress(tally.read)
    return written


def convert_to_conversation_format(input_file: Paths, output_file: str | os.PathLike[str], format_type: str = "auto") -> int:
    """Convert to conversation JSON Lines and return the number written; what was dropped or cut is logged as a warning.

    `format_type`: auto, messages, oasst, alpaca, sharegpt or text. A malformed record is dropped, counted and listed in
    `OUTPUT.rejects.jsonl`. Raises `DataError` where nothing is left, or a file cannot be read.
    """
    result = convert(input_file, output_file, format_type)
    for line in result.tally.lines():
        _log.warning("%s: %s", output_file, line)
    return result.written


def process_oasst_data(input_file: Paths, output_file: str | os.PathLike[str]) -> int:
    """Best-ranked path of each Open Assistant tree (nested, flat or linear) to conversation JSON Lines; returns the number
    written. Raises `DataError`."""
    return convert_to_conversation_format(input_file, output_file, "oasst")
