"""A long log that several processes read: the store is the one that one reader makes of it, whatever the log holds."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MAX_LINE, LogReader, MetricLog, whole_length
from lumina_engine.run.directory import RunDirectory
from lumina_tui import stretches
from lumina_tui.long_log import Told, read_whole
from lumina_tui.series import RunStore

from .test_columns import EVENTS, content, long_run, records_of, row


@contextlib.contextmanager
def here(descriptor: int, *numbers: int) -> Iterator[IO[bytes]]:
    """What one of the processes gives, made in this one."""
    with tempfile.TemporaryFile() as out:
        stretches.give(out, descriptor, *numbers)
        out.seek(0)
        yield out


def plain(run: RunDirectory) -> tuple[RunStore, LogReader]:
    reader = LogReader(run.metrics_path)
    store = RunStore()
    while records := reader.read_new():
        store.apply(records)
    return store, reader


def together(
    run: RunDirectory, count: int, size: int, taken: list[bool] | None = None, told: Told = lambda share: 0 <= share <= 1
) -> tuple[RunStore, LogReader]:
    """As a feed reads a log that is long. `taken` gets of each stretch whether its columns were used."""
    reader = LogReader(run.metrics_path)
    original = RunStore.apply_stretch

    def noted(store: RunStore, stretch: stretches.Read) -> bool:
        result = original(store, stretch)
        if taken is not None:
            taken.append(result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunStore, "apply_stretch", noted)
        patch.setattr(stretches, "processes", lambda logs: count)
        patch.setattr(stretches, "LEAST", 0)
        patch.setattr(stretches.read, "__defaults__", (size,))
        return read_whole(reader, told), reader


def equal(one: tuple[RunStore, LogReader], other: tuple[RunStore, LogReader]) -> None:
    np.testing.assert_equal(content(one[0]), content(other[0]))
    assert (one[1].offset, one[1].errors) == (other[1].offset, other[1].errors)


GARBAGE = st.sampled_from(
    [b"\n", b"\0\n", b"{}\n", b'{"type":"step"\n', b'{"type":"step","step":1}\n', b"\xff\xfe\n", b"x" * 900 + b"\n"]
)
STEPS = st.lists(st.tuples(st.just("step"), row), min_size=3, max_size=8)
MANY = st.one_of(STEPS, STEPS, STEPS, st.lists(EVENTS, min_size=1, max_size=4))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.lists(MANY, min_size=4), st.lists(GARBAGE, max_size=1)), min_size=1, max_size=4),
    count=st.integers(2, 5),
    size=st.integers(200, 4000),
    torn=st.booleans(),
)
def test_c133_read_by_several_or_by_one_is_the_same(tmp_path_factory, parts, count, size, torn):
    run = RunDirectory.create(tmp_path_factory.mktemp("run"), "x")
    for index, (events, garbage) in enumerate(parts):
        with MetricLog(run.metrics_path, index // 2 + 1, sync_interval=0) as log:
            observed = 0
            for record in records_of([event for some in events for event in some]):
                if not isinstance(record, rec.Experts) or record.step > observed:  # an observation is written once
                    log.emit(record)
                observed = record.step if isinstance(record, rec.Experts) else observed
        with run.metrics_path.open("ab") as file:
            file.write(b"".join(garbage))
    if torn:
        with run.metrics_path.open("ab") as file:
            file.write(b'{"type":"st')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretches, "_process", here)
        got = together(run, count, size)
    equal(got, plain(run))


@pytest.mark.parametrize(
    "between",
    [
        rec.Change(what="lr", before=1, after=2),
        rec.Alert(severity="info", code="x", message="m"),
        rec.Rewind(to_step=30),
        rec.Rewind(to_step=50),
    ],
)
def test_what_belongs_to_the_step_before_it_stays_there(tmp_path, between):
    run = RunDirectory.create(tmp_path, "x")
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        for step in range(1, 41):
            log.emit(rec.Step(step=step, loss=1.0 * step))
        log.emit(between)
        for step in range(31 if getattr(between, "to_step", 50) < 40 else 41, 61):
            log.emit(rec.Step(step=step, loss=1.0 * step))
    got = together(run, 2, whole_length(run.metrics_path) // 2 + 1)  # amid the second of two
    equal(got, plain(run))


def test_most_of_a_log_is_taken_as_columns(tmp_path):
    """Else reading it together would gain nothing."""
    engine = long_run(tmp_path)
    length = whole_length(engine.run.metrics_path)
    with engine.run.metrics_path.open("rb") as file:
        found = list(stretches.read(file.fileno(), length, 2, 1 << 16))
    assert sum(isinstance(each, stretches.Read) for each in found) >= len(found) - 2 > 8
    heads = [each.head if isinstance(each, stretches.Read) else each for each in found]
    assert [each.start for each in heads] == [0, *(each.end for each in heads[:-1])] and heads[-1].end == length
    used: list[bool] = []
    equal(together(engine.run, 2, 1 << 16, used), plain(engine.run))
    assert sum(used) >= len(found) - 2


@pytest.mark.parametrize("line", [b"x" * (2 * MAX_LINE), b"x" * (1 << 18)])
def test_a_line_without_end_does_not_end_the_reading(tmp_path, line):
    engine = long_run(tmp_path)
    data = engine.run.metrics_path.read_bytes()
    cut = data.index(b"\n", len(data) // 2) + 1
    engine.run.metrics_path.write_bytes(data[:cut] + line + b"\n" + data[cut:])
    got = together(engine.run, 2, 1 << 16)
    equal(got, plain(engine.run))
    assert got[1].errors == [(cut, cut + len(line) + 1)]


@pytest.mark.parametrize("gone", ["at once", "half way"])
def test_a_process_that_dies_costs_nothing(tmp_path, monkeypatch, gone):
    engine = long_run(tmp_path)
    original = stretches._process

    @contextlib.contextmanager
    def dying(descriptor: int, length: int, size: int, index: int, count: int) -> Iterator[IO[bytes]]:
        with original(descriptor, length, size, index, count) as source:
            if not index:
                yield source
                return
            data = source.read()
            with tempfile.TemporaryFile() as half:
                half.write(data[: 0 if gone == "at once" else len(data) // 2])
                half.seek(0)
                yield half

    monkeypatch.setattr(stretches, "_process", dying)
    equal(together(engine.run, 2, 1 << 16), plain(engine.run))


def test_processes_end_with_the_reading(tmp_path):
    engine = long_run(tmp_path)
    with engine.run.metrics_path.open("rb") as file:
        reading = stretches.read(file.fileno(), whole_length(engine.run.metrics_path), 2, 1 << 14)
        next(reading)
        children = set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        assert len(children) >= 2
        reading.close()  # type: ignore[attr-defined]
        assert not children & set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xffhello", b"\x01\x00\x00\x00\xc1", b"Warning: a module prints\n" * 99])
def test_something_else_on_the_pipe_is_no_stretch(tmp_path, monkeypatch, garbage):
    engine = long_run(tmp_path)

    @contextlib.contextmanager
    def printing(*_: int) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as out:
            out.write(garbage)
            out.seek(0)
            yield out

    monkeypatch.setattr(stretches, "_process", printing)
    equal(together(engine.run, 2, 1 << 16), plain(engine.run))


def test_modules_of_the_working_folder_are_not_run_and_an_unbuffered_python_gives_all(tmp_path, monkeypatch):
    engine = long_run(tmp_path)
    for name in ("numpy", "msgspec", "lumina_tui"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    used: list[bool] = []
    equal(together(engine.run, 2, 1 << 16, used), plain(engine.run))
    assert sum(used) > 8 and not (tmp_path / "ran").exists()


def test_a_reading_that_is_given_up_ends_the_processes(tmp_path, monkeypatch):
    engine = long_run(tmp_path)
    monkeypatch.setattr(stretches, "processes", lambda logs: 2)
    monkeypatch.setattr(stretches, "LEAST", 0)
    monkeypatch.setattr(stretches.read, "__defaults__", (1 << 14,))
    before = set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    reader = LogReader(engine.run.metrics_path)
    store = read_whole(reader, lambda share: False)
    assert 0 < reader.offset < whole_length(engine.run.metrics_path) and len(store.steps) > 0
    assert set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()) <= before


def test_a_log_that_is_replaced_meanwhile_is_read_anew(tmp_path):
    engine, other = long_run(tmp_path), long_run(tmp_path, steps=1000, name="other")

    def replacing(share: float) -> bool:
        if other.run.metrics_path.exists():
            other.run.metrics_path.replace(engine.run.metrics_path)
        return True

    store, reader = together(engine.run, 2, 1 << 14, told=replacing)
    assert store.step == 1000 and reader.restarts == 1
    np.testing.assert_equal(content(store), content(plain(engine.run)[0]))


def test_processes_are_shared_by_the_logs_that_are_opened_together(monkeypatch):
    monkeypatch.setattr(stretches, "core_count", lambda: 16)
    assert [stretches.processes(logs) for logs in (1, 4, 8, 99)] == [stretches.MOST, 4, 2, 0]
    monkeypatch.setattr(stretches, "core_count", lambda: 1)
    assert stretches.processes() == 1
