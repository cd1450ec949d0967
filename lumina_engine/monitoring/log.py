"""The record log of a run: one writer that loses nothing, readers that stop at nothing.

`metrics.jsonl` is append-only JSON Lines. One process writes at a time (rank 0, or the supervisor while no rank 0 lives);
any number read. A record is one `write` to a descriptor opened with O_APPEND, so a killed process leaves at most one torn last
line, which the next writer cuts off before it goes on with the next `seq`.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path

import msgspec

from ..secrets import Scrubber
from . import record as rec
from .log_sync import LogSync
from .say import say

MAX_LINE = 65_536  # bytes of one line with its newline; a longer `experts` record is split by layer
_BLOCK = 65_536  # bytes read at once
_PROBE = 4_096  # bytes read for one line of a sample
_READ_LIMIT = 8 << 20  # bytes that one read_new() takes at most, so that a viewer stays responsive on a long log
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})  # cost a record, never the run
_ALERT_EVERY = 60.0  # s between two alerts about lost records: a nearly full disk must not add noise

_NUMBERS = (rec.Step, rec.Eval, rec.Experts)  # records without text, but for names of tasks
# record types that are values of one branch of the run; events for a person (alert, change, note) stay after a rewind
_BRANCH_TYPES = (rec.Step, rec.Eval, rec.Experts, rec.Checkpoint)


class Head(msgspec.Struct):
    """What a line says about itself. Any JSON object with a positive `seq` counts as a record, also of an unknown type."""

    seq: int
    type: str = ""
    inc: int = 0
    id: str | None = None
    state: str | None = None
    reason: str | None = None
    exit_code: int | None = None
    total_steps: int | None = None


_SEQ = attrgetter("seq")
_head = msgspec.json.Decoder(Head)


def head(line: bytes) -> Head | None:
    """The head of a record's line, None if the line is no record."""
    try:
        found = _head.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if found.seq > 0 else None


def lines_backward(descriptor: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line without newline) of the whole lines before byte `end`, last first. `end` must follow a newline."""
    tail = b""  # bytes from `start` on that belong to no line yet
    start = end
    while start > 0:
        size = min(_BLOCK, start)
        start -= size
        tail = os.pread(descriptor, size, start) + tail
        while True:
            cut = tail.rfind(b"\n", 0, len(tail) - 1)
            if cut < 0:
                break
            yield start + cut + 1, tail[cut + 1 : -1]
            tail = tail[: cut + 1]
    if tail:
        yield 0, tail[:-1]


def whole_end(descriptor: int) -> int:
    """The byte after the last newline: everything behind it is a torn line."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        size = min(_BLOCK, end)
        cut = os.pread(descriptor, size, end - size).rfind(b"\n")
        if cut >= 0:
            return end - size + cut + 1
        end -= size
    return 0


def whole_length(path: str | os.PathLike[str]) -> int:
    """Bytes of whole lines in the file; 0 if it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        return whole_end(descriptor)
    finally:
        os.close(descriptor)


class MetricLog:
    """The writer. `emit` is safe from several threads of one process.

    Args:
        path: the log; made with mode 0600 if it is not there.
        inc: the incarnation that writes; copied into every record.
        sync_interval: seconds between two `fdatasync` in a thread of its own; 0 leaves them to `sync()`.
        warn: told once, in one line, when records begin to be lost (default: stderr, which is engine.log).

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        inc: int,
        *,
        sync_interval: float = 2.0,
        warn: Callable[[str], None] = say,
    ) -> None:
        self.path = Path(path)
        self.inc = inc
        self.lost = 0  # records lost since the last one that was stored
        self._warn = warn
        self._scrubber = Scrubber()
        self._lock = threading.Lock()
        self._pending_alert: rec.Alert | None = None
        self._alert_at = -math.inf
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._end = whole_end(self._fd)
        if self._end < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, self._end)
        self._seq = next((found.seq for _, line in lines_backward(self._fd, self._end) if (found := head(line))), 0)
        self._sync = LogSync(self.path, self._fd, lambda: self._end, sync_interval, warn)

    @property
    def seq(self) -> int:
        """Number of the last record in the file, 0 if there is none."""
        return self._seq

    @property
    def offset(self) -> int:
        """The byte after the last record."""
        return self._end

    def emit(self, record: rec.Record) -> int:
        """Append a record: sets `seq`, `inc` and, where it is 0, `t`. Returns its seq, 0 if it was lost (full disk).

        When this returns, the record is with the operating system: a kill of this process does not lose it. A record that
        cannot be written as JSON, or is too long, is replaced by a `note` that says so.
        """
        with self._lock:
            stored = self._put(record)
            seq = self._seq if stored else 0
            if self.lost:
                self._tell_loss(stored)
            return seq

    def sync(self) -> None:
        """Return when every record emitted so far is on the disk.

        Raises:
            OSError: the disk reports an error; the records may be lost at a power cut.
        """
        self._sync.sync()

    def close(self) -> None:
        """Stop the thread, sync, close. A second call does nothing."""
        if self._fd < 0:
            return
        self._sync.close()
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, record: rec.Record) -> bool:
        record.seq, record.inc = self._seq + 1, self.inc
        if not record.t:
            record.t = time.time()
        try:
            line = rec.encode(record)
        except (TypeError, ValueError) as error:
            return self._put(rec.Note(message=f"a record of type {_tag(record)} was left out: {error}"[:1000]))
        if not isinstance(record, _NUMBERS) or getattr(record, "tasks", None):
            line = self._scrubber.line(line)
        if len(line) <= MAX_LINE:
            return self._write(line)
        if isinstance(record, rec.Experts) and len(record.layers) > 1:
            return all(self._put(part) for part in _halves(record))
        return self._put(rec.Note(message=f"a record of type {_tag(record)} was left out: {len(line)} bytes, limit {MAX_LINE}"))

    def _write(self, line: bytes) -> bool:
        try:
            done = os.write(self._fd, line)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._fail(os.strerror(error.errno or errno.EIO))
            return False
        if done < len(line):
            os.ftruncate(self._fd, self._end)
            self._fail(os.strerror(errno.ENOSPC))
            return False
        self._end += done
        self._seq += 1
        return True

    def _fail(self, reason: str) -> None:
        self.lost += 1
        now = time.monotonic()
        if self.lost > 1 or now - self._alert_at < _ALERT_EVERY:
            return
        self._alert_at = now
        self._warn(f"{self.path}: {reason}: records are lost until there is room again; training goes on")
        self._pending_alert = rec.Alert(
            severity="warning",
            code="records_lost",
            message=f"{self.path.name} cannot be written: {reason}",
            recommendation="free space on the file system of the run; training goes on meanwhile",
            t=time.time(),
        )

    def _tell_loss(self, room: bool) -> None:
        """Alert once about a loss (a short line may still fit), and with `room` again say how much was lost."""
        lost = self.lost
        if self._pending_alert is not None and self._put(self._pending_alert):
            self._pending_alert = None
        if room and self._pending_alert is None:
            told = self._put(rec.Note(message=f"{lost} records were lost because the log could not be written"))
            lost = 0 if told else lost
        self.lost = lost  # a lost alert or note is no record of the run


def _tag(record: rec.Record) -> str:
    return str(record.__struct_config__.tag)


def _halves(record: rec.Experts) -> tuple[rec.Experts, rec.Experts]:
    """The first and the second half of the layers of one observation."""
    middle = len(record.layers) // 2
    lists = [name for name, value in msgspec.structs.asdict(record).items() if isinstance(value, list)]
    parts = []
    for span in (slice(None, middle), slice(middle, None)):
        parts.append(msgspec.structs.replace(record, **{name: getattr(record, name)[span] for name in lists}))
    return parts[0], parts[1]


class LogReader:
    """Reads a log that may still grow, from byte `offset` on.

    `offset` is the byte after the last whole line read. `errors` holds (first byte, byte after the last) of lines that are no
    records; they are skipped. A line without its newline is left for the next call. If the file was replaced by another one,
    or cut, reading starts over and `restarts` counts up.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int = 0) -> None:
        self.path = Path(path)
        self.offset = offset
        self.errors: list[tuple[int, int]] = []
        self.restarts = 0
        self.missing = False  # whether the last call found no file
        self._inode: int | None = None

    def read_new(self, limit: int = _READ_LIMIT) -> list[rec.Record]:
        """The records written since the last call, from at most `limit` bytes: an empty list means that all was read.

        Raises:
            OSError: the file is there but cannot be read. A missing file is an empty log.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.missing = True
            return []
        self.missing = False
        try:
            return self._read(descriptor, max(limit, MAX_LINE))
        finally:
            os.close(descriptor)

    def begin(self, descriptor: int) -> None:
        """Take this open file for the one that is read: another one at the path later is a replacement."""
        self._inode = os.fstat(descriptor).st_ino

    def take(self, data: bytes) -> list[rec.Record]:
        """The records of whole lines that follow what was read: the bytes from `offset` on."""
        records: list[rec.Record] = []
        self._lines(data, records)
        return records

    def _read(self, descriptor: int, limit: int) -> list[rec.Record]:
        status = os.fstat(descriptor)
        size, known = status.st_size, self._inode
        self._inode = status.st_ino
        if size < self.offset or (known is not None and known != status.st_ino):
            self.offset, self.restarts, self.errors = 0, self.restarts + 1, []
        records: list[rec.Record] = []
        while not records and self.offset < size:  # go on while there is nothing but garbage
            data = os.pread(descriptor, limit, self.offset)
            cut = data.rfind(b"\n") + 1
            if cut == 0:
                if len(data) < limit:
                    break
                cut = len(data)  # longer than any record and still no newline: garbage
            self._lines(data[:cut], records)
        return records

    def _lines(self, data: bytes, records: list[rec.Record]) -> None:
        found = all_records(data)
        if found is None:
            self._one_by_one(data, records)
            return
        records += found
        self.offset += len(data)

    def _one_by_one(self, data: bytes, records: list[rec.Record]) -> None:
        start, last = 0, len(data)
        while start < last:
            stop = data.find(b"\n", start) + 1 or last
            line = data[start:stop]
            start = stop
            end = self.offset + len(line)
            try:
                found = rec.decode(line)
                good = found.seq > 0
            except rec.RecordError:
                good = False
            if good:
                records.append(found)
            else:
                self._error(self.offset, end)
            self.offset = end

    def _error(self, start: int, end: int) -> None:
        if self.errors and self.errors[-1][1] == start:
            start = self.errors.pop()[0]
        self.errors.append((start, end))


def all_records(data: bytes) -> list[rec.Record] | None:
    """The records of these lines; None if one of the lines is none, so that each has to be looked at."""
    try:
        found = rec.decode_lines(data)
    except rec.RecordError:
        return None
    # the decoder also takes empty lines and several objects on a line, of which one may make up for the other
    lines = data.count(b"\n")
    whole = len(found) == lines == data.count(b"}\n{") + 1 and data[:1] == b"{"
    return found if whole and min(map(_SEQ, found)) > 0 else None


def read_records(path: str | os.PathLike[str], types: Iterable[str] = ()) -> Iterator[rec.Record]:
    """Every record in the file, first to last; lines that are no records are skipped (LogReader names them).

    With `types` only records of these types: a long log is nearly all steps, and lines of other types are not decoded.
    """
    reader = _Chosen(path, types) if types else LogReader(path)
    while records := reader.read_new():
        yield from records


class _Chosen(LogReader):
    """Only records of some types. What is wrong with other lines is not looked at, and `errors` stays empty."""

    def __init__(self, path: str | os.PathLike[str], types: Iterable[str]) -> None:
        super().__init__(path)
        self._beginnings = _beginnings(types)

    def _lines(self, data: bytes, records: list[rec.Record]) -> None:
        lines = [line for line in data.splitlines(keepends=True) if line.startswith(self._beginnings)]
        end = self.offset + len(data)
        super()._lines(b"".join(lines), records)
        self.offset, self.errors = end, []


def _beginnings(types: Iterable[str]) -> tuple[bytes, ...]:
    """How lines of these types begin."""
    return tuple(b'{"type":"%s"' % name.encode() for name in types)


def sampled_records(path: str | os.PathLike[str], lines: int = 2_000, near_end: int = 1 << 20) -> list[rec.Record]:
    """What a long log looks like before it is read: its first block, `lines` lines at even offsets, its last bytes in full.

    Oldest first, each record once. Lines longer than a few KiB are left out between the two ends; a missing file has none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        end = whole_end(descriptor)
        last = max(0, end - near_end)
        pieces = [os.pread(descriptor, min(_BLOCK, last), 0)]
        for place in range(_BLOCK, last, max(1, last // max(1, lines))):
            _, _, rest = os.pread(descriptor, _PROBE, place).partition(b"\n")
            line, newline, _ = rest.partition(b"\n")
            pieces.append(line + newline)
        tail = os.pread(descriptor, end - last, last)
        pieces.append(tail if last == 0 else tail.partition(b"\n")[2])
    finally:
        os.close(descriptor)
    found: list[rec.Record] = []
    for piece in pieces:
        for line in piece[: piece.rfind(b"\n") + 1].splitlines():
            try:
                record = rec.decode(line)
            except rec.RecordError:
                continue
            if record.seq > (found[-1].seq if found else 0):
                found.append(record)
    return found


def last_records(
    path: str | os.PathLike[str],
    count: int | None = None,
    types: Iterable[str] = (),
    *,
    within: int | None = None,
    end: int | None = None,
) -> list[rec.Record]:
    """The last `count` records (None: all), oldest first; a missing file has none.

    Args:
        types: only records of these types, if any are named.
        within: look at no more than about this many bytes before the end.
        end: take this byte, which must follow a newline, for the end.
    """
    wanted = _beginnings(types)
    found: list[rec.Record] = []
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        end = whole_end(descriptor) if end is None else end
        for start, line in lines_backward(descriptor, end):
            if (count is not None and len(found) >= count) or (within is not None and end - start > within):
                break
            if wanted and not line.startswith(wanted):
                continue
            try:
                found.append(rec.decode(line))
            except rec.RecordError:
                continue
    finally:
        os.close(descriptor)
    return found[::-1]


def surviving(records: Iterable[rec.Record]) -> list[rec.Record]:
    """The records without the values of abandoned branches.

    A `rewind` to step S drops the `step`, `eval`, `experts` and `checkpoint` records of later steps that stand before it.
    Alerts, changes and notes stay: they are what happened, not the curve.
    """
    kept: list[rec.Record] = []
    limit = math.inf
    for record in reversed(list(records)):
        if isinstance(record, rec.Rewind):
            limit = min(limit, record.to_step)
        elif isinstance(record, _BRANCH_TYPES) and record.step > limit:
            continue
        kept.append(record)
    return kept[::-1]
