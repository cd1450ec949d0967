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
import select
import struct
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import IO

import msgspec
import numpy as np

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.cgroup import core_count
from lumina_engine.monitoring.log import MAX_LINE, all_records

from .history import STEP_METRICS
from .step_rows import StepRows

SIZE = 1 << 20  # bytes of the file in a stretch
LEAST = 64 << 20  # bytes of a log that is read so: a shorter one is read before the processes have started
PATIENCE_S = 20.0  # a process that gives nothing for so long is given up
PIPE = 1 << 20  # bytes that wait in a pipe
MOST = 4  # processes: what they cost to start is then more than another one saves
LAYOUT = (("step", np.int64), ("tokens", np.float64), ("clock", np.float64), *((m.name, np.float32) for m in STEP_METRICS))
_LENGTH = struct.Struct("<I")
_SEQ, _INC = attrgetter("seq"), attrgetter("inc")
# what `-c` runs: the modules of this process, never those of the folder that lumina was started in
_START = "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); from lumina_tui.stretches import main; main(sys.argv[1:])"


class BrokenStretch(ValueError):
    """What a process gave is no stretch, or the file holds a line that is longer than any record."""


class Stretch(msgspec.Struct):
    """Bytes `start` to `end` of a log. `rows`: steps whose columns follow; `others`: lines of the other records, in order.

    `plain`: not looked at, the rest means nothing. Else its records are numbered from `first` to `last` without a gap, are of
    one incarnation, and the steps rise; `t` is the last time that one of them tells.
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
        BrokenStretch: a line is longer than any record.
    """
    first, last = index * size, min((index + 1) * size, length)
    begin = max(first - 1, 0)  # a newline there ends the line before, so that one begins at `first`
    data = os.pread(descriptor, last - begin + MAX_LINE, begin)
    start = data.find(b"\n") + 1 if first else 0
    stop = data.find(b"\n", last - 1 - begin) + 1
    if (first and not start) or not stop or begin + start > last:
        raise BrokenStretch("a line that is longer than any record")
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
    if not regular or (rows is not None and not (rows.step_N[1:] > rows.step_N[:-1]).all()):
        return plain, None
    found = Stretch(
        start,
        start + len(data),
        plain=False,
        first=first,
        last=records[-1].seq,
        inc=records[0].inc,
        t=next((record.t for record in reversed(records) if record.t), 0.0),
        rows=len(steps),
        epoch=rows.epoch if rows else 0,
        skipped=rows.skipped if rows else 0,
        others=[rec.encode(record) for record in others],
    )
    return found, rows


def _bound(record: rec.Record) -> bool:
    """Whether a record means something else before the steps around it than behind them."""
    return isinstance(record, rec.Rewind) or (isinstance(record, rec.Alert | rec.Change) and record.step is None)


def _give(out: IO[bytes], found: Stretch, rows: StepRows | None) -> None:
    head = msgspec.msgpack.encode(found)
    out.write(_LENGTH.pack(len(head)) + head)
    if rows is not None:
        for part in (rows.step_N, rows.tokens_N, rows.clock_N, *(rows.values[metric.name] for metric in STEP_METRICS)):
            out.write(part.data)
    out.flush()


def _take(source: IO[bytes], size: int) -> Read:
    """The next stretch of a process that reads stretches of `size` bytes.

    Raises:
        BrokenStretch: it gives no more, or something else.
    """
    try:
        (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
        if length > 2 * (size + MAX_LINE) + PIPE:  # the lines of the other records, written anew
            raise BrokenStretch(f"a head of {length} bytes")
        head = msgspec.msgpack.decode(_exactly(source, length), type=Stretch)
        if not 0 <= head.rows <= size + MAX_LINE:
            raise BrokenStretch(f"{head.rows} steps")
        columns = {name: np.frombuffer(_exactly(source, head.rows * np.dtype(kind).itemsize), kind) for name, kind in LAYOUT}
        others = [rec.decode(line) for line in head.others]
    except (msgspec.MsgspecError, rec.RecordError) as error:
        raise BrokenStretch(str(error)) from error
    steps = None
    if head.rows:
        step_N, tokens_N, clock_N = (columns.pop(name) for name in ("step", "tokens", "clock"))
        steps = StepRows(step_N, tokens_N, clock_N, columns, head.epoch, head.skipped)
    return Read(head, steps, others)


def _exactly(source: IO[bytes], size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise BrokenStretch("the process has ended")
    return data


def processes(logs: int = 1) -> int:
    """How many read a log together where `logs` are opened at once: the cores that this process may use, up to `MOST`."""
    return min(MOST, core_count() // max(1, logs))


def read(descriptor: int, length: int, count: int, size: int = SIZE) -> Generator[Read | Stretch, None, None]:
    """The stretches of a log's first `length` bytes (whole lines), in order and without a gap, read by `count` processes.

    A bare `Stretch` is to be read by the caller, and so is what is left after an early end (a process died or stands still, a
    line is longer than any record).
    """
    with contextlib.ExitStack() as stack:
        numbers = [(descriptor, length, size, index, count) for index in range(count)]
        sources = [stack.enter_context(_process(*each)) for each in numbers]
        end = index = 0
        while end < length:
            source = sources[index % count]
            try:
                if not _ready(source):
                    return
                found = _take(source, size)
            except BrokenStretch:
                return
            if found.head.start != end or found.head.end > length:
                return
            yield found.head if found.head.plain else found
            end, index = found.head.end, index + 1


def _ready(source: IO[bytes]) -> bool:
    """Whether a process has begun to give a stretch, or ended, within `PATIENCE_S`."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    return bool(poll.poll(1000 * PATIENCE_S))


@contextlib.contextmanager
def _process(descriptor: int, *numbers: int) -> Iterator[IO[bytes]]:
    """One of the processes, killed at the end: what it gives."""
    words = [sys.executable, "-c", _START, "\n".join(sys.path), *map(str, (descriptor, *numbers))]
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
    with contextlib.suppress(BrokenPipeError, BrokenStretch):  # nobody listens any more, or an endless line
        while index * size < length:
            _give(out, *examine(*stretch_of(descriptor, index, length, size)))
            index += count


def main(words: list[str]) -> None:
    """One of the processes. Words: descriptor of the log, its length, bytes of a stretch, which process, of how many."""
    gc.disable()  # records hold no cycles
    with open(1, "wb", closefd=False) as out:  # sys.stdout may be unbuffered, and then writes only a part
        give(out, *map(int, words))
    os._exit(0)  # what is still to be torn down is given back at once
