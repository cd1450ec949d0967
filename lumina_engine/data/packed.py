"""Opening data files, packed or not. What a file is packed with is told by its first bytes, not by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from .conversation import DataError

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
# Windows of zstd and dictionaries of xz are memory that the file asks for; 128 MiB is what their tools unpack by default.
_MAX_WINDOW = 1 << 27
_BLOCK = 1 << 16  # bytes read from a file at a time
_PIECE = 128  # bytes of zstd unpacked at a time


@dataclass(frozen=True, slots=True)
class DataFile:
    """An open file: `content` gives unpacked bytes; `offset()` how many bytes of the file itself were read for that."""

    content: IO[bytes]
    offset: Callable[[], int]


def _gzip(raw: IO[bytes]) -> Any:
    return gzip.GzipFile(fileobj=raw)


class _Zstd(io.RawIOBase):
    """Frames of zstd one after the other. The library's own reader ends a file that was cut off as if it were whole."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._packed, self._ready = b"", b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._packed:
                self._packed = self._raw.read(_BLOCK)
                if not self._packed:
                    if self._frame is not None:
                        raise EOFError("it ends inside a frame")
                    return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
            # a few bytes at a time: four may stand for 128 KiB, and the library has no bound on what it returns
            piece, self._packed = self._packed[:_PIECE], self._packed[_PIECE:]
            self._ready = self._frame.decompress(piece)
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data + self._packed, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _xz(raw: IO[bytes]) -> Any:
    return lzma.LZMAFile(raw)


_OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": _gzip,
    b"\x28\xb5\x2f\xfd": _Zstd,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": _xz,
}


def unreadable(path: Path, error: OSError) -> DataError:
    """The fault of a file that the system does not give."""
    return DataError(f"cannot be read ({error.strerror or error})", path=path, fix="check the file and its rights")


def is_packed(path: Path) -> bool:
    """Whether a file is packed in a way that `opened` unpacks. Raises `DataError`."""
    try:
        with path.open("rb") as raw:
            return raw.read(6).startswith(tuple(_OPENERS))
    except OSError as error:
        raise unreadable(path, error) from None


@contextmanager
def opened(path: Path) -> Iterator[DataFile]:
    """The content of a file, unpacked while it is read. Raises `DataError` for what cannot be read or is damaged."""
    try:
        with path.open("rb") as raw:
            start = raw.read(6)
            raw.seek(0)
            opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
            if opener is None:
                yield DataFile(raw, raw.tell)
            else:
                yield DataFile(cast(IO[bytes], io.BufferedReader(opener(raw), 1 << 16)), raw.tell)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(
            f"the packed file is damaged ({error})", path=path, fix="fetch or pack it again", reason="damaged file"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
