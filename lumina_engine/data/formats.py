"""Reading conversations from files of any known layout, and converting them to the project's own.

The container (JSON Lines, JSON, text) and the layout are told by content, not by name; see `layouts.py` for the rules.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conversation import DataError, Document, nearest, shown
from .files import OnError, Paths, Record, container, expand, records, texts
from .layouts import READERS, Tally, layout_of, strict

FORMATS = ("auto", "messages", "alpaca", "sharegpt", "text")
NOT_YET = ("oasst",)

_log = logging.getLogger("lumina_engine.data")
_REPORT_EVERY = 1000  # records between calls of a progress callback


def detect_format(path: str | os.PathLike[str]) -> str:
    """The layout of one file, by its content. Raises `DataError` when it is none that can be read."""
    return _detect(Path(path))[1]


def _detect(path: Path) -> tuple[str, str]:
    """(container, layout)."""
    kind = container(path)
    if kind == "text":
        return kind, "text"
    first = next(records(path, kind), None)
    if first is None:
        raise DataError("the list is empty", path=path, fix="name a file with conversations", reason="empty file")
    layout = layout_of(first.value)
    if layout == "oasst":
        raise _not_yet("oasst", path)
    if layout is None:
        keys = ", ".join(sorted(map(str, first.value))[:8]) if isinstance(first.value, Mapping) else shown(first.value)
        raise DataError(
            f"no known layout (found: {shown(keys, 120)})",
            path=path,
            line=first.line,
            fix="known are messages [role, content], sharegpt conversations [from, value], alpaca instruction and output, text",
            reason="unknown layout",
        )
    return kind, layout


def _as(path: Path, layout: str) -> tuple[str, str]:
    """(container, layout) where the user named the layout."""
    kind = container(path)
    if kind == "text" and layout != "text":
        raise DataError(f"plain text, not {layout}", path=path, line=1, fix="set data_format=auto")
    if kind != "text" and layout == "text":
        try:
            first = next(records(path, kind), None)
        except DataError:  # not JSON after all, such as source code that begins with a brace
            first = None
        if first is None or layout_of(first.value) != "text":
            kind = "text"
    return kind, layout


def _not_yet(layout: str, path: object = None) -> DataError:
    return DataError(
        f"the {layout} layout is not available yet",
        path=path,
        fix="give the conversations as messages, sharegpt or alpaca",
        exit_code=2,
    )


def check_format(name: str) -> str:
    """`name` if it is a layout that can be read; `DataError` otherwise."""
    if name in FORMATS:
        return name
    if name in NOT_YET:
        raise _not_yet(name)
    like = nearest(name, FORMATS)
    raise DataError(
        f"unknown data format {name!r}",
        fix=(f"did you mean {like}? " if like else "") + "formats: " + ", ".join(FORMATS),
        exit_code=2,
    )


def read_conversations(
    paths: Paths,
    format: str = "auto",
    *,
    tally: Tally | None = None,
    tidy: bool = False,
    on_error: OnError | None = None,
    key: str = "data path",
) -> Iterator[Document]:
    """Every conversation of files, folders and globs, in order, one in memory at a time. See `read_located`."""
    located = read_located(paths, format, tally=tally, tidy=tidy, on_error=on_error, key=key)
    return (document for _, document in located)


def read_located(
    paths: Paths,
    format: str = "auto",
    *,
    tally: Tally | None = None,
    tidy: bool = False,
    on_error: OnError | None = None,
    key: str = "data path",
) -> Iterator[tuple[Record, Document]]:
    """Every conversation with the record that it comes from.

    `format` "auto" detects each file by itself. `tidy` also tidies the messages layout, which is read strictly otherwise.
    `tally` counts. Raises `DataError` with file:line for a malformed record; with `on_error` it is handed there instead and
    reading goes on behind it.
    """
    check_format(format)
    tally = tally if tally is not None else Tally()
    for path in expand(paths, key):
        kind, layout = _detect(path) if format == "auto" else _as(path, format)
        source = texts(path) if kind == "text" else records(path, kind, on_error)
        read = READERS[layout] if layout != "messages" or tidy else strict
        for record in source:
            try:
                for document in read(record, tally):
                    yield record, document
            except DataError as error:
                if on_error is None:
                    raise
                on_error(error)


@dataclass(frozen=True, slots=True)
class Converted:
    """Result of `convert`: conversations read and written, dropped and changed by reason (read = written + dropped)."""

    read: int
    written: int
    dropped: dict[str, int]
    changed: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"read": self.read, "written": self.written, "dropped": self.dropped, "changed": self.changed}


def convert(
    inputs: Paths,
    output: str | os.PathLike[str],
    format: str = "auto",
    *,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Converted:
    """Write the conversations of `inputs` to `output` as JSON Lines of the messages layout (text documents as `{"text"}`).

    `output` appears whole or not at all. With `strict` a record that would be dropped or cut is an error. `progress` gets the
    number read so far. Raises `DataError`.
    """
    target = Path(output)
    files = expand(inputs, "input")
    if target.exists() and any(target.samefile(path) for path in files):
        raise DataError("the output is one of the inputs", path=target, fix="name another output", exit_code=2)
    tally = Tally(strict=strict)
    written = 0
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with staging.open("x", encoding="utf-8", newline="\n") as handle:
                for document in read_conversations(files, format, tally=tally, tidy=True):
                    handle.write(json.dumps(document.to_record(), ensure_ascii=False) + "\n")
                    written += 1
                    if progress and tally.read % _REPORT_EVERY == 0:
                        progress(tally.read)
                if not written:
                    reasons = "; ".join(tally.lines()) or "the input is empty"
                    raise DataError(f"no conversation left to write ({reasons})", path=files[0], fix="check --format")
                handle.flush()
                os.fsync(handle.fileno())
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror or error})",
            path=target,
            fix="check the folder and the free space",
            exit_code=2,
        ) from None
    return Converted(tally.read, written, dict(tally.dropped), dict(tally.changed))


def convert_to_conversation_format(input_file: Paths, output_file: str | os.PathLike[str], format_type: str = "auto") -> int:
    """Convert to conversation JSON Lines and return the number written; what was dropped or cut is logged as a warning.

    `format_type`: auto, messages, alpaca, sharegpt or text. Raises `DataError` (file:line) for a malformed record.
    """
    result = convert(input_file, output_file, format_type)
    for line in Tally(read=result.read, dropped=Counter(result.dropped), changed=Counter(result.changed)).lines():
        _log.warning("%s: %s", output_file, line)
    return result.written
