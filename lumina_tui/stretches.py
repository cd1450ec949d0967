"""A long log read by several processes: each turns every nth stretch of it into columns, this one puts them together.

A stretch is the lines that begin in its part of the file. A process gives the columns of a stretch's steps and its other
records; a stretch that needs a look at each record (damaged lines, a rewind, another incarnation) it only names, and whoever
asked reads that one as if there were no such process. So it does with all that follows if a process dies.

    each process -> its standard output, for each stretch: 4 bytes length, msgpack `Stretch`, then its columns (`LAYOUT`)
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import IO

import msgspec
import numpy as np

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MAX_LINE, all_records

from .history import STEP_METRICS
from .step_rows import StepRows

SIZE = 1 << 20  # bytes of the file in a stretch
LEAST = 64 << 20  # bytes of a log that is read so: a shorter one is read before the processes have started
PIPE = 1 << 20  # bytes that wait in a pipe
MOST = 4  # processes: what they cost to start is then more than another one saves
LAYOUT = (("step", np.int64), ("tokens", np.float64), ("clock", np.float64), *((m.name, np.float32) for m in STEP_METRICS))
_LENGTH = struct.Struct("<I")
_SEQ, _INC, _STEP = attrgetter("seq"), attrgetter("inc"), attrgetter("step")


class Stretch(msgspec.Struct):
    """Bytes `start` to `end` of a log. `rows`: steps whose columns follow; `others`: lines of the other records, in order.

    `plain`: not looked at, the rest means nothing. Else its records are numbered from `first` to `last` without a gap, are of
    one incarnation, and the steps rise; `t` and `words` (the step, unless the last record is another one) are the last's.
    """

    start: int
    end: int
    plain: bool = True
    first: int = 0
    last: int = 0
    inc: int = 0
    t: float = 0.0
    rows: int = 0
    epoch: int = 0
    skipped: int = 0
    others: list[bytes] = []


@dataclass(frozen=True)
class Read:
    """A stretch as it came: its steps (None without any) and its other records."""

    head: Stretch
    steps: StepRows | None
    others: list[rec.Record]


def stretch_of(descriptor: int, index: int, length: int, size: int) -> tuple[int, bytes]:
    """Where stretch `index` of the first `length` bytes (whole lines) begins, and its lines: those that begin in its part.

    Raises:
        ValueError: a line is longer than any record.
    """
    first, last = index * size, min((index + 1) * size, length)
    begin = max(first - 1, 0)  # a newline there ends the line before, so that one begins at `first`
    data = os.pread(descriptor, last - begin + MAX_LINE, begin)
    start = data.find(b"\n") + 1 if first else 0
    stop = data.find(b"\n", last - 1 - begin) + 1
    if (first and not start) or not stop or begin + start > last:
        raise ValueError("a line that is longer than any record")
    return begin + start, data[start:stop]


def examine(start: int, data: bytes) -> tuple[Stretch, StepRows | None]:
    """What a stretch holds, with the columns of its steps."""
    plain = Stretch(start, start + len(data))
    records = all_records(data)
    if not records:
        return plain, None
    steps = [record for record in records if type(record) is rec.Step]
    others = [record for record in records if type(record) is not rec.Step]
    size, first = len(records), records[0].seq
    regular = (
        np.array_equal(np.fromiter(map(_SEQ, records), np.int64, size), np.arange(first, first + size))
        and set(map(_INC, records)) == {records[0].inc}
        and not any(map(_bound, others))
    )
    rows = StepRows.of(steps) if regular and steps else None
    if not regular or (rows is not None and not (np.diff(rows.step_N) > 0).all()):
        return plain, None
    found = Stretch(
        start,
        start + len(data),
        plain=False,
        first=first,
        last=records[-1].seq,
        inc=records[0].inc,
        t=records[-1].t,
        rows=len(steps),
        epoch=rows.epoch if rows else 0,
        skipped=rows.skipped if rows else 0,
        others=[rec.encode(record) for record in others],
    )
    return found, rows


def _bound(record: rec.Record) -> bool:
    """Whether a record means something else before the steps around it than behind them."""
    return isinstance(record, rec.Rewind) or getattr(record, "step", 0) is None


def _give(out: IO[bytes], found: Stretch, rows: StepRows | None) -> None:
    head = msgspec.msgpack.encode(found)
    out.write(_LENGTH.pack(len(head)) + head)
    if rows is not None:
        for part in (rows.step_N, rows.tokens_N, rows.clock_N, *(rows.values[metric.name] for metric in STEP_METRICS)):
            out.write(part.data)
    out.flush()


def _take(source: IO[bytes]) -> Read | None:
    """The next stretch of a process; None if it gives no more.

    Raises:
        msgspec.MsgspecError, rec.RecordError: it gave something else.
    """
    lead = source.read(_LENGTH.size)
    if len(lead) < _LENGTH.size:
        return None
    head = msgspec.msgpack.decode(source.read(*_LENGTH.unpack(lead)), type=Stretch)
    columns: dict[str, np.ndarray] = {}
    for name, kind in LAYOUT:
        data = source.read(head.rows * np.dtype(kind).itemsize)
        if len(data) < head.rows * np.dtype(kind).itemsize:
            return None
        columns[name] = np.frombuffer(data, kind)
    steps = None
    if head.rows:
        step_N, tokens_N, clock_N = (columns.pop(name) for name in ("step", "tokens", "clock"))
        steps = StepRows(step_N, tokens_N, clock_N, columns, head.epoch, head.skipped)
    return Read(head, steps, [rec.decode(line) for line in head.others])


def processes() -> int:
    """How many read a log together here: one for each core that this process may use, up to `MOST`."""
    return min(MOST, len(os.sched_getaffinity(0)))


def read(descriptor: int, length: int, count: int, size: int = SIZE) -> Iterator[Read | Stretch]:
    """The stretches of a log's first `length` bytes (whole lines), in order and without a gap, read by `count` processes.

    A bare `Stretch` is to be read by the caller, and so is what is left after an early end (a process died, a line is longer
    than any record).
    """
    with contextlib.ExitStack() as stack:
        numbers = [(descriptor, length, size, index, count) for index in range(count)]
        sources = [stack.enter_context(_process(*each)) for each in numbers]
        end = index = 0
        while end < length:
            try:
                found = _take(sources[index % count])
            except (msgspec.MsgspecError, rec.RecordError):
                return
            if found is None or found.head.start != end or found.head.end > length:
                return
            yield found.head if found.head.plain else found
            end, index = found.head.end, index + 1


@contextlib.contextmanager
def _process(descriptor: int, *numbers: int) -> Iterator[IO[bytes]]:
    """One of the processes, killed at the end: what it gives."""
    words = [sys.executable, "-m", "lumina_tui.stretches", *map(str, (descriptor, *numbers))]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(descriptor,)
    ) as child:
        assert child.stdout is not None
        with contextlib.suppress(OSError):  # room for the next stretches while this side takes another process's
            fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, PIPE)
        try:
            yield child.stdout
        finally:
            child.kill()


def give(out: IO[bytes], descriptor: int, length: int, size: int, index: int, count: int) -> None:
    """Write every `count`th stretch of a log, from stretch `index` on."""
    with contextlib.suppress(BrokenPipeError, ValueError):  # nobody listens any more, or an endless line
        while index * size < length:
            _give(out, *examine(*stretch_of(descriptor, index, length, size)))
            index += count


if __name__ == "__main__":
    gc.disable()  # records hold no cycles
    give(sys.stdout.buffer, *map(int, sys.argv[1:]))
    os._exit(0)  # what is still to be torn down is given back at once
