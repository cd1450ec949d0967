"""What a file is, by its content and not by its name: JSON Lines, a JSON document, text or Parquet, also where it is packed."""

from __future__ import annotations

import json
from pathlib import Path

from .conversation import DataError
from .files import excerpt, named_suffix
from .packed import DataFile, opened
from .parquet import MAGIC as PARQUET

EMPTY = "empty file"  # reason of the error about a file that holds no record
_LINES_SUFFIXES = (".jsonl", ".ndjson")
_JSON_SUFFIXES = (*_LINES_SUFFIXES, ".json")
_ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7-zip"}
_PROBE = 1 << 16  # bytes that tell the container
_AHEAD_LINES = 200  # looked at where the first ones are broken, for one that is an object by itself
_MAX_PROBE = 1 << 26  # bytes of one line, or of all these lines, that are looked at to tell the container


def container(path: Path) -> str:
    """What the file is: "jsonl" (an object a line), "json" (a list, or objects over several lines), "text" or "parquet".

    Broken lines at the beginning of a file that is named JSON Lines do not make a document over several lines of it: a line
    further on decides.

    Packed files (gzip, zstd, bzip2, xz) are looked into. Raises `DataError` for an empty file, an archive or binary content.
    """
    with opened(path) as file:
        start, lines = _beginning(file)
    if not start.strip(b" \t\r\n\x00\xef\xbb\xbf"):
        raise DataError("the file is empty", path=path, fix="name a file with conversations", reason=EMPTY)
    if start.startswith(PARQUET):
        return "parquet"
    for magic, name in _ARCHIVES.items():
        if start.startswith(magic):
            message = f"{name} archives are not read"
            raise DataError(message, path=path, fix="unpack it first", excerpt=excerpt(start, 0))
    whole = [_whole(line) for line in lines]
    objects = [isinstance(value, dict) for value in whole]
    if b"\0" in start and not any(objects):  # one bad record does not condemn a file of good ones
        at = start.index(b"\0")
        raise DataError(
            "binary content (a zero byte)",
            path=path,
            line=start.count(b"\n", 0, at) + 1,
            fix="name a UTF-8 JSON, JSON Lines, Parquet or text file",
            excerpt=excerpt(start, at),
        )
    text = start.decode("utf-8", "ignore").lstrip("\ufeff").lstrip()
    named_json = named_suffix(path) in _JSON_SUFFIXES
    if len(whole) > 1 and isinstance(whole[0], list) and objects[1]:
        return "jsonl"  # a list that ends with its line, such as [1, 2], holds none of the objects that follow
    if text.startswith("[") and (named_json or text[1:].lstrip()[:1] in ("{", "]", "")):
        return "json"
    if any(objects):  # with a broken first line the second one decides
        return "jsonl"
    if text.startswith("{"):
        whole_lines = start if len(start) < _PROBE else max(start[: start.rfind(b"\n") + 1], b"".join(lines), key=len)
        looks_on = named_suffix(path) in _LINES_SUFFIXES and _has_fault(whole_lines)
        return "jsonl" if looks_on and _object_ahead(path) else "json"
    return "jsonl" if named_json else "text"


def _beginning(file: DataFile) -> tuple[bytes, list[bytes]]:
    """The first 64 KiB, and the first two lines that are not blank; of a very long one its beginning."""
    start, lines = b"", list[bytes]()
    while len(lines) < 2 and (line := file.content.readline(_MAX_PROBE)):
        if line.strip():
            lines.append(line)
        if len(start) < _PROBE:
            start += line[: _PROBE - len(start)]
    if len(start) < _PROBE:
        start += file.content.read(_PROBE - len(start))
    return start, lines


def _has_fault(start: bytes) -> bool:
    """Whether the value that begins here is none whatever follows: its fault lies before the end of these whole lines."""
    text = start.decode("utf-8", "ignore").lstrip("\ufeff").strip()
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos < len(text)
    except (ValueError, RecursionError):
        return True
    return False


def _object_ahead(path: Path) -> bool:
    """Whether one of the first lines is an object by itself: not indented, and nothing behind it that would go on with the list
    or the object that it is in."""
    left, found = _MAX_PROBE, False
    with opened(path) as file:
        for _ in range(_AHEAD_LINES):
            line = file.content.readline(left)
            if found and line.strip() and not line.lstrip().startswith((b"]", b"}", b",")):
                return True
            if line.strip():
                found = line.startswith(b"{") and isinstance(_whole(line), dict)
            left -= len(line)
            if not line or not left:
                break
    return found


def _whole(line: bytes) -> object:
    """The JSON value of a line, None where it is not a whole one."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
