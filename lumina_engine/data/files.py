"""From paths to records: which files, what is in them, one JSON object at a time with its line.

JSON Lines is read line by line and a JSON list element by element, so memory holds one record, not the file. Which of them a
file is, `container.py` tells.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..text import safe_text
from .conversation import DataError, nearest, shown
from .packed import SUFFIXES as PACKED_SUFFIXES
from .packed import DataFile, opened, unreadable
from .parquet import parquet_rows
from .remote import is_remote, local, remote_file, remote_files

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
OnError = Callable[[DataError], None]

# what a folder is searched for; a file named directly may have any name
FOLDER_SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
REJECTS_SUFFIX = ".rejects.jsonl"  # what `data convert` dropped: no data, though it lies beside them
_NAMED = 3  # files that are not read of which a note gives the names
_CHUNK = 1 << 20  # characters read at a time from a JSON list
_SPACE = " \t\r\n"
_BEFORE, _BEHIND = 24, 32  # bytes or characters shown before a fault, and from it on
MAX_RECORD = 1 << 26  # bytes or characters of one record
_MAX_TEXT = 1 << 15  # characters of one plain-text document; longer files are cut at an empty line or a line end


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON value and the line (from 1) where it begins. `offset`: bytes of the file that were read when it was whole."""

    path: Path
    line: int
    value: object
    offset: int = 0


def excerpt(data: bytes | str, at: int) -> tuple[str, str]:
    """What stands before place `at` and from there on, made visible: bytes outside printable ASCII as \\xNN."""
    before, behind = data[max(0, at - _BEFORE) : at], data[at : at + _BEHIND]
    return _visible(before), _visible(behind)


def _visible(data: bytes | str) -> str:
    if isinstance(data, str):
        return safe_text(data).replace("\n", "␊").replace("\t", "␉")
    return "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in data)


def expand(paths: Paths, key: str = "data path", most: int | None = None) -> list[Path]:
    """The files that `paths` (files, folders, globs, URLs) name, each once: list order, sorted within a folder or a glob.

    What `data convert` rejected (`*.rejects.jsonl`) is read only where it is named.

    Raises `DataError` for what names nothing, and for a folder or glob of more than `most` entries; `key` is the setting to
    blame.
    """
    entries = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not entries:
        raise DataError(f"{key} is an empty list", fix=f"name at least one file, or set {key}=null", exit_code=2)
    found: dict[Path, Path] = {}
    for entry in entries:
        name = local(os.fspath(entry))
        remote = is_remote(name)
        for path in remote_files(name, key, FOLDER_SUFFIXES, REJECTS_SUFFIX) if remote else _expand_one(name, key, most):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def located(name: str) -> Path:
    """The file of a name as `expand` gave it."""
    return remote_file(name) if is_remote(name) else Path(name)


def unread_note(paths: Paths | None) -> list[str]:
    """A line on the files in the folders among `paths` that are not read, for their names are of no data, and one on the
    folders in them that cannot be listed; none without any."""
    entries = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths or [])
    names = [local(os.fspath(entry)) for entry in entries]
    folders = [Path(name).expanduser() for name in names if not is_remote(name)]
    inside = [_folder(folder, str(folder), "data path", None) for folder in folders if folder.is_dir()]
    left, closed = ([str(path) for found in inside for path in found[kind]] for kind in (1, 2))
    notes = []
    if left:
        count = f"{len(left):,} file{'s' * (len(left) > 1)}"
        others = f"whose names end on none of {', '.join(FOLDER_SUFFIXES)} ({_first(left)})"
        notes.append(f"not read: {count} {others}; name them to read them")
    if closed:
        count = f"{len(closed):,} folder{'s' * (len(closed) > 1)}"
        notes.append(f"not read: {count} that cannot be listed ({_first(closed)}); give the rights to read them")
    return notes


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _folder(root: Path, entry: str, key: str, most: int | None) -> tuple[list[Path], list[Path], list[Path]]:
    """(files of data, other files, folders that cannot be listed) below a folder and the folders that links in it lead to, each
    sorted; no hidden ones."""
    closed: list[Path] = []
    inside = [path for path in _bounded(_walk(root, closed), entry, key, most) if not path.name.endswith(REJECTS_SUFFIX)]
    data = {path for path in inside if named_suffix(path) in FOLDER_SUFFIXES and path.is_file()}
    return sorted(data), sorted(path for path in inside if path not in data and not path.is_dir()), sorted(closed)


def _walk(root: Path, closed: list[Path]) -> Iterator[Path]:
    """What is below a folder. A folder that was there already, by a link in a circle, is not entered again.

    Folders below it that cannot be listed, such as the lost+found of a disk, are added to `closed`. Raises OSError where the
    folder itself cannot.
    """

    def refused(error: OSError) -> None:
        if error.filename is None or Path(error.filename) == root:
            raise error
        closed.append(Path(error.filename))

    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(root, onerror=refused, followlinks=True):
        found = Path(place).stat()
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*folders, *names]:
            if not name.startswith("."):
                yield Path(place) / name


def _bounded(entries: Iterator[Path], entry: str, key: str, most: int | None) -> Iterator[Path]:
    for number, path in enumerate(entries):
        if most is not None and number >= most:
            raise _unusable(f"{key}: more than {most:,} entries", entry, "name a folder that holds data only")
        yield path


def _expand_one(entry: str, key: str, most: int | None) -> list[Path]:
    try:
        path = Path(entry).expanduser()
    except RuntimeError:  # ~name of nobody
        raise _unusable(f"{key}: there is no such home folder", entry, "write the whole path") from None
    try:
        if path.is_dir():
            files, others, _ = _folder(path, entry, key, most)
            if not files:
                but = f", but {others[0].name}" if others else ""
                raise _unusable(f"{key}: the folder holds no {', '.join(FOLDER_SUFFIXES)} file{but}", path, "name the files")
            return files
        if path.is_file():
            return [path]
        if path.exists():
            raise _unusable(f"{key}: not a regular file", path, "name a file, a folder or a glob")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unusable(f"{key}: cannot be read ({error.__class__.__name__})", entry, "check the name and rights") from None
    if glob.has_magic(entry):
        root = Path(path.anchor or ".")
        matches = _bounded(root.glob(str(path.relative_to(path.anchor))), entry, key, most)
        rejects = path.name.endswith(REJECTS_SUFFIX)  # asked for
        files = sorted(p for p in matches if p.is_file() and (rejects or not p.name.endswith(REJECTS_SUFFIX)))
        if files:
            return files
        raise _unusable(f"{key}: the pattern matches no file", entry, "check the pattern")
    folder = path.parent
    if not folder.is_dir():
        raise _unusable(f"{key}: no such file; there is no folder {folder} either", entry, "check the name")
    like = nearest(path.name, sorted(p.name for p in folder.iterdir())[:10_000])
    raise _unusable(f"{key}: no such file", entry, f"did you mean {folder / like}?" if like else "check the name")


def _unusable(message: str, path: object, fix: str) -> DataError:
    return DataError(message, path=path, fix=fix, exit_code=2)


def named_suffix(path: Path) -> str:
    """The ending that tells what is in a file, ".jsonl" for x.jsonl.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED_SUFFIXES else suffix


def total_bytes(files: Sequence[Path]) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in files)


def digest_files(files: Sequence[Path]) -> str:
    """SHA-256 (hex) over the contents in order; names do not count, so a moved file keeps its digest."""
    return joined_digest(digests_of(files))


def joined_digest(digests: Iterable[str]) -> str:
    """SHA-256 (hex) of files by the digests of each."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def digests_of(files: Iterable[Path]) -> list[str]:
    """SHA-256 (hex) of the contents of each file."""
    found = []
    for path in files:
        try:
            with path.open("rb") as handle:
                one = hashlib.sha256()
                while block := handle.read(1 << 20):
                    one.update(block)
        except OSError as error:
            raise unreadable(path, error) from None
        found.append(one.hexdigest())
    return found


def records(path: Path, kind: str, on_error: OnError | None = None) -> Iterator[Record]:
    """Every record of a "jsonl", "json" or "parquet" file.

    A malformed one raises `DataError` with its line; with `on_error` it is reported there and reading goes on where the next
    record can be told (`DataError.rest_lost` says where not).
    """
    if kind == "parquet":
        for number, row, offset in parquet_rows(path):
            yield Record(path, number, row, offset)
        return
    with opened(path) as file:
        yield from _lines(file, path, on_error) if kind == "jsonl" else _values(file, path, on_error)


def line_range(path: Path, start: int, stop: int) -> Iterator[Record]:
    """Records of the lines of an unpacked JSON Lines file that begin in bytes `start` to `stop`; lines count from 1 there."""
    with opened(path) as file:
        if start:
            file.content.seek(start - 1)
            skip_line(file)
        yield from _lines(file, path, None, start, stop)


def lines_before(path: Path, offset: int) -> int:
    """Line ends in the bytes before `offset`, and before the next line that begins there or behind it."""
    count = 0
    with opened(path) as file:
        while file.offset() < offset and file.content.readline():
            count += 1
    return count


def _lines(file: DataFile, path: Path, on_error: OnError | None, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    number = 0
    while (stop is None or file.offset() < stop) and (line := file.content.readline(MAX_RECORD + 1)):
        number += 1
        if number == 1 and not start:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            if len(line) > MAX_RECORD:
                skip_line(file)
                raise _too_long(path, number)
            value = _loads(line, path, number)
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        yield Record(path, number, value, file.offset())


def skip_line(file: DataFile) -> None:
    """Read to the end of a line."""
    while (rest := file.content.readline(_CHUNK)) and not rest.endswith(b"\n"):
        pass


def _too_long(path: Path, line: int) -> DataError:
    fix = "write one conversation per record"
    return DataError(
        f"the record is longer than {MAX_RECORD >> 20} MiB", path=path, line=line, fix=fix, reason="record too long"
    )


class _RepeatedKey(ValueError):
    """A key stands twice in one object; which value was meant nobody can tell."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _RepeatedKey(f"the key {shown(key)} comes twice in an object")
    return made


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_object)  # made once: that costs what a line costs
_ANY_KEYS = json.JSONDecoder(parse_constant=_no_constant)
_ONE_KEY = "keep one of them"


def loads(text: str) -> object:
    """A JSON value; `ValueError` for what is none, and for an object in which a key comes twice."""
    return _DECODER.decode(text)


def _loads(line: bytes, path: Path, number: int) -> object:
    seen = None
    try:
        return loads(line.decode("utf-8"))
    except _RepeatedKey as error:
        raise DataError(str(error), path=path, line=number, fix=_ONE_KEY, reason="repeated key") from None
    except UnicodeDecodeError as error:
        cause, fix = f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8"
        seen = excerpt(line, error.start)
    except json.JSONDecodeError as error:
        cause, fix = f"not valid JSON: {error.msg} at column {error.colno}", "write one complete JSON object per line"
        seen = excerpt(error.doc, error.pos)
    except ValueError as error:  # from _no_constant, or a number of more digits than int() takes
        cause, fix = f"not valid JSON: {error}", "write one complete JSON object per line"
    except RecursionError:
        cause, fix = "not valid JSON: nested too deeply", "write one complete JSON object per line"
    raise DataError(cause, path=path, line=number, fix=fix, reason="malformed JSON", excerpt=seen)


class _Window:
    """A sliding piece of a text file: what is still to parse, and the line it begins in."""

    def __init__(self, handle: IO[bytes], path: Path) -> None:
        self._handle, self._path = handle, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def more(self, size: int = _CHUNK) -> bool:
        """Read on, dropping what was parsed. False at the end of the file."""
        if self.ended:
            return False
        block = self._handle.read(size)
        try:
            piece = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + error.object[: error.start].count(b"\n")
            raise DataError(
                "not UTF-8",
                path=self._path,
                line=line,
                fix="save the file as UTF-8",
                reason="malformed JSON",
                excerpt=excerpt(bytes(error.object), error.start),
            ) from None
        self.text, self.at, self.ended = self.text[self.at :] + piece, 0, not block
        return True

    def skip(self, end: int) -> None:
        """Move to position `end`, counting lines."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in _SPACE:
                end += 1
            self.skip(end)
            if end < len(self.text):
                return self.text[end]
            if not self.more():
                return ""

    def piece(self, limit: int) -> str:
        """Up to `limit` characters, cut at an empty line, else after a line end, else anywhere; "" at the end of the file."""
        while len(self.text) - self.at < limit and self.more():
            pass
        end = min(len(self.text), self.at + limit)
        if end < len(self.text) or not self.ended:
            for border in ("\n\n", "\n"):
                found = self.text.rfind(border, self.at, end)
                if found > self.at:
                    end = found + len(border)
                    break
        return self.text[self.at : end]


def _values(file: DataFile, path: Path, on_error: OnError | None) -> Iterator[Record]:
    """Elements of a JSON list, or objects that follow one another over several lines."""
    window = _Window(file.content, path)
    try:
        in_list = window.peek() == "["
        if in_list:
            window.skip(window.at + 1)
        while window.peek() not in ("", "]" if in_list else ""):
            line = window.line
            value = _next_value(window, path)
            if isinstance(value, DataError):
                if on_error is None:
                    raise value
                on_error(value)
            else:
                yield Record(path, line, value, file.offset())
            if in_list and window.peek() == ",":
                window.skip(window.at + 1)
                if window.peek() in ("]", ""):
                    raise DataError("a comma without a value after it", path=path, line=window.line, reason="malformed JSON")
            elif in_list and window.peek() not in ("]",):
                raise DataError(
                    "the list is not closed or a comma is missing",
                    path=path,
                    line=window.line,
                    fix="the file may be cut off",
                    reason="malformed JSON",
                )
        if in_list:
            if not window.peek():
                raise DataError(
                    "the list is not closed",
                    path=path,
                    line=window.line,
                    fix="the file may be cut off",
                    reason="malformed JSON",
                )
            window.skip(window.at + 1)
            if window.peek():
                raise DataError("text after the end of the list", path=path, line=window.line, reason="malformed JSON")
    except DataError as error:
        error.rest_lost = True  # what follows a fault inside a list cannot be told apart
        if on_error is None:
            raise
        on_error(error)


def _next_value(window: _Window, path: Path) -> object:
    """The value at the window's position, or the `DataError` of one that is whole but holds a key twice.

    Reads on while it may be incomplete. Raises `DataError` where its end cannot be told.
    """
    size, line, decoder = _CHUNK, window.line, _DECODER
    fault: DataError | None = None
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
        except _RepeatedKey as error:
            fault, decoder = DataError(str(error), path=path, line=line, fix=_ONE_KEY, reason="repeated key"), _ANY_KEYS
            continue
        except json.JSONDecodeError as error:
            if len(window.text) - window.at > MAX_RECORD:
                raise _too_long(path, window.line) from None
            if window.more(size):
                size *= 2  # so that a long value is parsed a few times, not once per chunk
                continue
            line = window.line + window.text.count("\n", window.at, error.pos)
            fix = "the file may be cut off, or a quote, comma or bracket is missing"
            raise DataError(
                f"not valid JSON: {error.msg}",
                path=path,
                line=line,
                fix=fix,
                reason="malformed JSON",
                excerpt=excerpt(window.text, error.pos),
            ) from None
        except (ValueError, RecursionError) as error:
            cause = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise DataError(f"not valid JSON: {cause}", path=path, line=window.line, reason="malformed JSON") from None
        if end == len(window.text) and not isinstance(value, (dict, list)) and window.more(size):
            continue  # a number or word that may go on in the next chunk
        window.skip(end)
        return fault or value


def texts(path: Path) -> Iterator[Record]:
    """A plain-text file as documents of at most 32,768 characters, cut at an empty line, else at a line end."""
    with opened(path) as file:
        window = _Window(file.content, path)
        while text := window.piece(_MAX_TEXT):
            line = window.line
            window.skip(window.at + len(text))
            if text.strip():
                yield Record(path, line, {"text": text}, file.offset())
