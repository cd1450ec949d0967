"""A column cache: what was read of a long log, so that it need not be read again. Safe to delete at any time.

One file for each log, in the user's cache folder. It holds a whole `RunStore` as of a byte of the log, and says which log that
was: path, run, inode and a digest of the last block before that byte. A cache that does not fit, or is damaged, or was written
by a program with other columns, is ignored and written anew.

    8 bytes   magic
    4 + 4     length and CRC-32 of the head
    head      msgpack: Head
    body      msgpack: the store, with numbers in the place of its arrays
    arrays    one behind the other
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import secrets
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.reduce import Buffer, Pyramid
from lumina_engine.run.directory import RunDirectory, RunError

from . import history, series
from .history import History
from .places import cache_dir
from .routing import RoutingHistory
from .series import RunStore

MAGIC = b"LUMCOLS1"
LIMIT = 2 << 30  # bytes of all caches together
LEAST = 4 << 20  # bytes of log; what is shorter is read as fast as its cache
GROWN = 32 << 20  # bytes of log behind the cache after which it is written anew
BLOCK = 65_536  # bytes whose digest tells one log from another
ABANDONED_S = 3600.0  # age of a half-written file that nobody writes any more
_LEAD = struct.Struct("<8sII")
_KNOWN = {
    cls.__name__: cls
    for module in (series, history)
    for cls in vars(module).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls)
}


def _schema() -> str:
    """Changes when the columns of a store or the fields of what is kept in it change."""
    fields = [(name, [field.name for field in dataclasses.fields(cls)]) for name, cls in sorted(_KNOWN.items())]
    metrics = [(name, list(value.metrics)) for name, value in vars(RunStore()).items() if isinstance(value, History)]
    records = [(name, [field.name for field in msgspec.structs.fields(cls)]) for name, cls in sorted(rec.RECORD_TYPES.items())]
    return hashlib.sha256(repr((fields, metrics, records, history.BASES)).encode()).hexdigest()[:16]


class Head(msgspec.Struct):
    """What a cache says about itself. `offset` and `seq`: where in the log it ends; `errors`: damaged lines up to there."""

    schema: str
    path: str
    run: str
    inode: int
    offset: int
    seq: int
    digest: str
    errors: list[tuple[int, int]]
    arrays: list[tuple[str, list[int]]]  # type and shape of each
    body: int
    crc: int  # of body and arrays


@dataclass(frozen=True)
class Cached:
    """What `load` found: the store as of byte `offset` of the log."""

    store: RunStore
    offset: int
    errors: list[tuple[int, int]]


@dataclass(frozen=True)
class Snapshot:
    """A store at one moment. The arrays are views: they hold as long as nothing was cut (`intact`)."""

    body: bytes
    arrays: list[np.ndarray]
    watched: list[tuple[Buffer, int]]
    seq: int

    @property
    def intact(self) -> bool:
        return all(buffer.cuts == cuts for buffer, cuts in self.watched)


def folder() -> Path:
    """Where the caches are."""
    return cache_dir() / "columns"


def cache_path(log: Path) -> Path:
    """The cache of a log."""
    return folder() / f"{hashlib.sha256(os.fsencode(log)).hexdigest()[:32]}.columns"


# reading


def load(run: RunDirectory) -> Cached | None:
    """The cached store of a run, None if there is none that fits."""
    try:
        with cache_path(run.metrics_path).open("rb") as file:
            cached = _read(file.fileno(), run)
            os.utime(file.fileno())  # used now: others are removed first
    except (OSError, RunError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, msgspec.MsgspecError):
        return None  # whatever is wrong with it: the log has everything
    return cached


def _read(descriptor: int, run: RunDirectory) -> Cached | None:
    room = os.fstat(descriptor).st_size  # nothing is read or made that is larger: a damaged length costs no memory
    magic, length, crc = _LEAD.unpack(os.pread(descriptor, _LEAD.size, 0))
    if magic != MAGIC or length > room:
        return None
    data = os.pread(descriptor, length, _LEAD.size)
    if len(data) != length or zlib.crc32(data) != crc:
        return None
    head = msgspec.msgpack.decode(data, type=Head)
    if not 0 <= head.body <= room or head.schema != _schema() or head != _place(run, head.offset, head.seq, head):
        return None
    at = _LEAD.size + length
    body = os.pread(descriptor, head.body, at)
    at += head.body
    crc = zlib.crc32(body)
    arrays = []
    for kind, shape in head.arrays:
        dtype = np.dtype(kind)
        if dtype.kind not in "biuf" or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > room:
            return None  # made by somebody else: no array of ours
        array = np.empty(shape, dtype)
        if array.nbytes and os.preadv(descriptor, [array.data.cast("B")], at) != array.nbytes:
            return None
        crc = zlib.crc32(array.data, crc) if array.nbytes else crc
        at += array.nbytes
        arrays.append(array)
    if len(body) != head.body or crc != head.crc:
        return None
    store = _unpack(msgspec.msgpack.decode(body), arrays)
    return Cached(store, head.offset, head.errors) if isinstance(store, RunStore) else None


def _place(run: RunDirectory, offset: int, seq: int, rest: Head | None = None) -> Head | None:
    """The head for a log as it is now; None if it is shorter. `rest` gives what does not depend on the log."""
    descriptor = os.open(run.metrics_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_size < offset:
            return None
        block = os.pread(descriptor, min(BLOCK, offset), offset - min(BLOCK, offset))
    finally:
        os.close(descriptor)
    return Head(
        schema=_schema(),
        path=str(run.metrics_path),
        run=run.identity()["id"],
        inode=status.st_ino,
        offset=offset,
        seq=seq,
        digest=hashlib.sha256(block).hexdigest(),
        errors=rest.errors if rest else [],
        arrays=rest.arrays if rest else [],
        body=rest.body if rest else 0,
        crc=rest.crc if rest else 0,
    )


# writing


def snapshot(store: RunStore) -> Snapshot:
    """Take a store as it is. Call it where nothing changes the store meanwhile; the result may be written elsewhere."""
    packer = _Packer()
    body = msgspec.msgpack.encode(packer.pack(store))
    return Snapshot(body, packer.arrays, packer.watched, store.seq)


def write(run: RunDirectory, taken: Snapshot, offset: int, errors: list[tuple[int, int]]) -> bool:
    """Write the cache of a run whose store was `taken` when the log had been read up to `offset`.

    Returns whether there is one now: not if the store was cut meanwhile, the log is another one, or the disk refuses.
    """
    try:
        head = _place(run, offset, taken.seq)
        if head is None:
            return False
        target = cache_path(run.metrics_path)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        try:
            _write(temporary, head, taken, errors)
            if not taken.intact:
                return False
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        prune(target.parent)
    except (OSError, RunError):
        return False  # a full or read-only disk costs the next opening its speed, nothing else
    return True


def _write(path: Path, head: Head, taken: Snapshot, errors: list[tuple[int, int]]) -> None:
    head.errors = errors
    head.arrays = [(array.dtype.str, list(array.shape)) for array in taken.arrays]
    head.body = len(taken.body)
    head.crc = zlib.crc32(taken.body)
    for array in taken.arrays:
        head.crc = zlib.crc32(array.data, head.crc) if array.nbytes else head.crc
    data = msgspec.msgpack.encode(head)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        parts = [memoryview(part) for part in (_LEAD.pack(MAGIC, len(data), zlib.crc32(data)), data, taken.body)]
        parts += [array.data.cast("B") for array in taken.arrays if array.nbytes]
        for part in parts:
            while len(part):
                part = part[file.write(part) :]


def prune(place: Path, limit: int = LIMIT) -> None:
    """Remove the caches that were used longest ago until all together are within `limit` bytes, and half-written ones."""
    found = []
    for entry in os.scandir(place):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if entry.name.startswith(".") and time.time() - status.st_mtime > ABANDONED_S:
                Path(entry.path).unlink()
            elif entry.name.endswith(".columns"):
                found.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        Path(path).unlink(missing_ok=True)
        total -= size


# a store as plain values and arrays: lists stand as they are, everything else is [sign, content]


class _Packer:
    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.watched: list[tuple[Buffer, int]] = []

    def pack(self, value: Any) -> Any:
        """
        Raises:
            TypeError: a store holds something that is not known here.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        for kind, sign, plain in self._kinds():
            if isinstance(value, kind):
                return {sign: plain(value)}
        if type(value).__name__ in _KNOWN:
            fields = {name: self.pack(item) for name, item in vars(value).items()}
            return {type(value).__name__: fields}
        raise TypeError(f"a column cache cannot hold {type(value).__name__}")

    def _kinds(self) -> tuple[tuple[Any, str, Callable[[Any], Any]], ...]:
        return (
            (list, "list", lambda v: [self.pack(item) for item in v]),
            (tuple, "tuple", lambda v: [self.pack(item) for item in v]),
            (deque, "deque", lambda v: [v.maxlen, [self.pack(item) for item in v]]),
            (dict, "dict", lambda v: [[self.pack(key), self.pack(item)] for key, item in v.items()]),
            (rec._Record, "record", msgspec.to_builtins),
            (np.ndarray, "array", self._array),
            (Buffer, "buffer", self._buffer),
            (Pyramid, "pyramid", lambda v: self._buffer(v.raw)),
            (RoutingHistory, "routing", lambda v: {name: self._array(a.copy()) for name, a in v.to_arrays().items()}),
            (History, "history", lambda v: {name: self.pack(item) for name, item in vars(v).items() if name != "_smooth"}),
        )

    def _array(self, array: np.ndarray) -> int:
        self.arrays.append(np.ascontiguousarray(array))
        return len(self.arrays) - 1

    def _buffer(self, buffer: Buffer) -> int:
        self.watched.append((buffer, buffer.cuts))
        return self._array(buffer.values)


def _unpack(value: Any, arrays: list[np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    ((sign, content),) = value.items()

    def items(values: Any) -> list[Any]:
        return [_unpack(item, arrays) for item in values]

    match sign:
        case "list":
            return items(content)
        case "tuple":
            return tuple(items(content))
        case "deque":
            return deque(items(content[1]), maxlen=content[0])
        case "dict":
            return {_unpack(key, arrays): _unpack(item, arrays) for key, item in content}
        case "record":
            return msgspec.convert(content, rec.Record, strict=False)
        case "array":
            return arrays[content]
        case "buffer" | "pyramid":
            made = Buffer.of(arrays[content])
            return Pyramid.of(made) if sign == "pyramid" else made
        case "routing":
            return RoutingHistory.from_arrays({name: arrays[index] for name, index in content.items()})
        case "history":
            made_history = History(())
            vars(made_history).update({name: _unpack(item, arrays) for name, item in content.items()})
            return made_history
    found = object.__new__(_KNOWN[sign])
    vars(found).update({name: _unpack(item, arrays) for name, item in content.items()})
    return found
