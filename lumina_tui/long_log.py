"""The first reading of a run's whole log, for a thread: what other cores can read is taken together, the rest plainly."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import LogReader, sampled_records

from . import stretches
from .series import RunStore

SLICE = 1 << 20  # bytes of the log decoded at once
BATCH = 10_000  # records that are taken into columns together

Told = Callable[[float], bool]


def preview(path: Path) -> RunStore:
    """A store made of some lines of a log."""
    store = RunStore(preview=True)
    store.apply(sampled_records(path))
    return store


def length_of(reader: LogReader) -> int:
    """Bytes of the log; 0 where it is not there."""
    try:
        return reader.path.stat().st_size
    except OSError:
        return 0


def read_whole(reader: LogReader, told: Told, together: int = 1) -> RunStore:
    """A store of all that the log holds; `reader` stands behind it then.

    Args:
        told: gets the share that is read, 0-1; the reading ends where it answers False.
        together: logs that are read at the same time and share the cores.
    """
    length, restarts = length_of(reader), reader.restarts
    store, going_on = RunStore(), True
    count = stretches.processes(together)
    if count > 1 and length >= stretches.LEAST:
        going_on = _read_together(reader, store, length, count, told)
    waiting: list[rec.Record] = []
    while going_on and (records := reader.read_new(SLICE)):
        if reader.restarts != restarts:  # the file was replaced: begin again with what it has
            restarts, store, waiting = reader.restarts, RunStore(), []
        waiting += records
        if len(waiting) > BATCH:
            store.apply(waiting)
            waiting = []
            _reserve(store, reader, length)
        going_on = told(min(1.0, reader.offset / max(1, length)))
    store.apply(waiting)
    for pyramid in store.steps.metrics.values():
        pyramid.build()
    return store


def _read_together(reader: LogReader, store: RunStore, length: int, count: int, told: Told) -> bool:
    """Take what `count` processes can read of a log in its whole lines up to `length`. False where it shall end."""
    with contextlib.suppress(OSError), reader.path.open("rb", buffering=0) as file:
        reader.begin(file.fileno())
        with contextlib.closing(stretches.read(file.fileno(), length, count)) as reading:
            for found in reading:
                _take(reader, store, file.fileno(), found)
                _reserve(store, reader, length)
                if not told(reader.offset / length):
                    return False
    return True


def _take(reader: LogReader, store: RunStore, descriptor: int, found: stretches.Read | stretches.Stretch) -> None:
    head = found if isinstance(found, stretches.Stretch) else found.head
    if isinstance(found, stretches.Stretch) or not store.apply_stretch(found):
        store.apply(reader.take(os.pread(descriptor, head.end - head.start, head.start)))
    reader.offset = head.end


def _reserve(store: RunStore, reader: LogReader, length: int) -> None:
    """Room for the steps that the rest of the log will bring, as far as can be told from what was read."""
    store.steps.reserve(round(1.02 * len(store.steps) * length / reader.offset))
