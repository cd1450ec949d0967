"""MetricLog and LogReader: torn tails, garbage, full disks, long records, rewinds."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from lumina_engine.monitoring import log as log_module
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import (
    MAX_LINE,
    LogReader,
    MetricLog,
    last_records,
    lines_backward,
    read_records,
    surviving,
    whole_end,
)


def fill(path: Path, count: int, inc: int = 1) -> None:
    with MetricLog(path, inc, sync_interval=0) as log:
        for _ in range(count):
            log.emit(rec.Step(step=log.seq + 1, loss=0.5))


def seqs(path: Path) -> list[int]:
    return [record.seq for record in read_records(path)]


def test_emit_numbers_records_and_sets_the_common_fields(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path, 3) as log:
        assert [log.emit(rec.Note(message=str(n))) for n in range(3)] == [1, 2, 3]
        assert (log.seq, log.offset) == (3, path.stat().st_size)
    records = list(read_records(path))
    assert [(record.seq, record.inc) for record in records] == [(1, 3), (2, 3), (3, 3)]
    assert all(record.t > 1e9 for record in records)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_mx07_non_finite_numbers_stay_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path, 1, sync_interval=0) as log:
        log.emit(rec.Step(step=1, loss=float("nan"), grad_norm=float("inf"), lr=1e-45, tokens=2**60))
    assert json.loads(path.read_bytes())["loss"] == "nan"
    (record,) = read_records(path)
    assert isinstance(record, rec.Step) and record.loss != record.loss and record.grad_norm == float("inf")
    assert (record.lr, record.tokens) == (1e-45, 2**60)


def test_ps06_torn_at_every_byte_of_the_last_record(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    fill(whole, 3)
    data = whole.read_bytes()
    start = data[:-1].rindex(b"\n") + 1
    for cut in range(start, len(data)):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(data[:cut])
        reader = LogReader(path)
        assert [record.seq for record in reader.read_new()] == [1, 2]
        assert reader.offset == start and reader.errors == [], "a line that may still be written is no error"
        with MetricLog(path, 2, sync_interval=0) as log:
            assert path.stat().st_size == start, "the torn tail is cut off"
            assert log.emit(rec.Note(message="on")) == 3
        assert [record.seq for record in reader.read_new()] == [3]
        assert seqs(path) == [1, 2, 3]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 5000 + b"\n",
        b"not json\n",
        b"[1]\n",
        b'{"seq":9}\n',
        b'{"type":"step","step":1}\n',
        b"\xff\xfe\n",
        b"[" * 9000 + b"\n",
    ],
)
def test_ps06_garbage_in_the_middle_is_named_and_skipped(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, 2)
    first = path.stat().st_size
    with path.open("ab") as file:
        file.write(garbage)
    with MetricLog(path, 1, sync_interval=0) as log:
        if garbage.startswith(b'{"seq":9'):  # a record of a type from a later version: its number counts
            assert log.seq == 9
        else:
            assert log.seq == 2
        log.emit(rec.Note(message="after"))
    reader = LogReader(path)
    assert [type(record) for record in reader.read_new()] == [rec.Step, rec.Step, rec.Note]
    assert reader.errors == [(first, first + len(garbage))]


def test_ps06_garbage_longer_than_any_read_is_passed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, 1)
    first = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\0" * (3 * MAX_LINE + 17) + b"\n")
    fill(path, 1)
    reader = LogReader(path)
    found = []
    while batch := reader.read_new(limit=1):  # as small as it gets: one line's length
        found += batch
    assert [record.seq for record in found] == [1, 2]
    assert reader.errors == [(first, first + 3 * MAX_LINE + 18)]


def test_reader_takes_whole_lines_only_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = LogReader(path)
    assert reader.read_new() == [], "no file yet"
    line = rec.encode(rec.Note(seq=1, message="ä"))
    with path.open("ab", buffering=0) as file:
        for byte in line[:-1]:
            file.write(bytes([byte]))
            assert reader.read_new() == []
        file.write(b"\n")
    assert [record.seq for record in reader.read_new()] == [1]
    assert reader.read_new() == []


def test_reader_starts_over_when_the_file_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, 5)
    reader = LogReader(path)
    assert len(reader.read_new()) == 5
    path.unlink()
    fill(path, 1)
    assert [record.seq for record in reader.read_new()] == [1]
    assert reader.restarts == 1


def test_ps06_reading_at_once_equals_reading_line_by_line(tmp_path: Path, fault_random: random.Random) -> None:
    """Damage anywhere in a block costs only its own lines, whatever else the block holds."""
    bad = [
        b"{",
        b"[]",
        b"\0\0",
        b'{"type":"step"}',
        b'{"type":"step","step":1}',
        b'{"type":"step","step":1,"seq":0}',
        b'{"seq":3}',
        b"\xff",
    ]
    for number in range(60):
        lines = []
        for seq in range(1, fault_random.randint(2, 60)):
            step = rec.Step(step=seq, loss=fault_random.choice([1.5, float("nan"), None]))
            step.seq, step.t, step.inc = seq, 1.0, 1
            lines.append(rec.encode(step)[:-1])
            while fault_random.random() < fault_random.choice([0.0, 0.3]):
                lines.append(
                    fault_random.choice([*bad, b"", b'{"type":"step","step":1,"seq":1}{"type":"step","step":1,"seq":2}'])
                )
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        good, damaged, at = [], [], 0
        for line in lines:
            try:
                record = rec.decode(line)
                if record.seq < 1:
                    raise rec.RecordError("no seq")
                good.append(record)
            except rec.RecordError:
                damaged += range(at, at + len(line) + 1)
            at += len(line) + 1
        reader = LogReader(path)
        found = []
        while records := reader.read_new():
            found += records
        assert repr(found) == repr(good) and reader.offset == at
        assert {byte for first, last in reader.errors for byte in range(first, last)} == set(damaged)


@pytest.mark.parametrize("blank", [b"", b" "])
def test_ps06_a_line_of_two_records_and_an_empty_one_are_two_damaged_lines(tmp_path: Path, blank: bytes) -> None:
    """Together they have as many records as lines."""
    good, two = b'{"type":"step","step":1,"seq":1}', b'{"type":"step","step":2,"seq":2}{"type":"step","step":3,"seq":3}'
    for lines in ([good, two, blank], [blank, two, good], [two, blank, good], [two, blank]):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        reader = LogReader(path)
        assert [record.seq for record in reader.read_new()] == [1] * (good in lines) and len(reader.errors) == 1
        path.unlink()


def test_a_reader_sees_another_file_of_any_length_and_a_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path, 1, sync_interval=0) as log:
        log.emit(rec.Note(message="one"))
    reader = LogReader(path)
    assert len(reader.read_new()) == 1 and not reader.missing
    path.rename(tmp_path / "old")
    assert reader.read_new() == [] and reader.missing
    with MetricLog(path, 1, sync_interval=0) as log:
        for _ in range(5):
            log.emit(rec.Note(message="longer than before"))
    assert [record.seq for record in reader.read_new()] == [1, 2, 3, 4, 5] and reader.restarts == 1 and not reader.missing


def test_reader_from_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, 5)
    offset = path.stat().st_size
    fill(path, 2)
    assert [record.seq for record in LogReader(path, offset).read_new()] == [6, 7]


def test_lines_backward_over_block_borders(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    generator = random.Random(5)
    lines = [b"x" * generator.choice([0, 1, 10, 5000, 65_535, 65_536, 70_000]) for _ in range(60)]
    path.write_bytes(b"".join(line + b"\n" for line in lines) + b"torn")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = whole_end(descriptor)
        found = list(lines_backward(descriptor, end))
        assert [line for _, line in found] == lines[::-1]
        assert all(os.pread(descriptor, len(line) + 1, start) == line + b"\n" for start, line in found)
    finally:
        os.close(descriptor)


def test_last_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_records(path, 3) == []
    with MetricLog(path, 1, sync_interval=0) as log:
        for step in range(1, 6):
            log.emit(rec.Step(step=step))
            log.emit(rec.Note(message="n"))
    assert [record.seq for record in last_records(path, 3)] == [8, 9, 10]
    assert [record.seq for record in last_records(path, 2, ["step"])] == [7, 9]
    assert len(last_records(path)) == 10
    assert last_records(path, 1, ["run"], within=200) == []


def test_a_long_experts_record_is_split_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    layers, experts = 40, 600
    record = rec.Experts(
        step=7,
        layers=list(range(layers)),
        load=[[1000.5 + layer] * experts for layer in range(layers)],
        imbalance=[float(layer) for layer in range(layers)],
        dead=list(range(layers)),
    )
    assert len(rec.encode(record)) > 2 * MAX_LINE
    with MetricLog(path, 1, sync_interval=0) as log:
        last = log.emit(record)
    assert max(map(len, path.read_bytes().splitlines(keepends=True))) <= MAX_LINE
    parts = [part for part in read_records(path) if isinstance(part, rec.Experts)]
    assert [part.seq for part in parts] == list(range(1, last + 1))
    assert [layer for part in parts for layer in part.layers] == record.layers
    assert [load for part in parts for load in part.load] == record.load
    assert [value for part in parts for value in part.imbalance] == record.imbalance
    assert {part.step for part in parts} == {7} and all(part.entropy == [] for part in parts)


def test_what_cannot_be_written_becomes_a_note(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path, 1, sync_interval=0) as log:
        assert log.emit(rec.Note(message="x" * MAX_LINE)) == 1
        assert log.emit(rec.Change(what="a", after=object())) == 2
        assert log.emit(rec.Step(step=1)) == 3
    notes = [record.message for record in read_records(path) if isinstance(record, rec.Note)]
    assert "note was left out" in notes[0] and str(MAX_LINE) in notes[0]
    assert "change was left out" in notes[1]


class Disk:
    """Stands in for os.write in the log module: takes `room` bytes, then is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: float = float("inf")
        self.error = errno.ENOSPC
        write = os.write

        def limited(descriptor: int, data: bytes) -> int:
            if self.room <= 0:
                raise OSError(self.error, os.strerror(self.error))
            done = write(descriptor, data[: int(min(self.room, len(data)))])
            self.room -= done
            return done

        monkeypatch.setattr(log_module.os, "write", limited)


@pytest.mark.parametrize("room", [0, 1, 30])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_ck07_full_disk_costs_records_never_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, error: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    disk = Disk(monkeypatch)
    warnings: list[str] = []
    log = MetricLog(path, 1, sync_interval=0, warn=warnings.append)
    for step in range(1, 4):
        log.emit(rec.Step(step=step))
    whole = path.read_bytes()
    disk.room, disk.error = room, error
    for step in range(4, 104):
        assert log.emit(rec.Step(step=step)) == 0
        assert path.read_bytes() == whole, "a short write is truncated back at once"
    assert (log.lost, len(warnings)) == (100, 1)
    disk.room = float("inf")
    assert log.emit(rec.Step(step=104)) == 4
    assert log.emit(rec.Step(step=105)) == 7
    log.close()
    records = list(read_records(path))
    assert [record.seq for record in records] == list(range(1, 8)), "no gap"
    assert [record.severity for record in records if isinstance(record, rec.Alert)] == ["warning"]
    notes = [record.message for record in records if isinstance(record, rec.Note)]
    assert len(notes) == 1 and notes[0].startswith("100 records were lost")


def test_ck07_the_alert_comes_at_once_if_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    disk = Disk(monkeypatch)
    with MetricLog(path, 1, sync_interval=0, warn=lambda _: None) as log:
        disk.room = 0
        log._alert_at = float("-inf")
        write = log._put

        def refuse_long(record: rec.Record) -> bool:
            disk.room = 0 if isinstance(record, rec.Step) else 10_000
            return write(record)

        monkeypatch.setattr(log, "_put", refuse_long)
        for step in range(5):
            log.emit(rec.Step(step=step))
        assert [type(record) for record in read_records(path)] == [rec.Alert]
        assert log.lost == 5


def test_ck07_real_limit_of_file_size(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = f"""
import resource, signal
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
log = MetricLog({str(path)!r}, 1, sync_interval=0)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
for step in range(200): log.emit(rec.Step(step=step, loss=1.0))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
log.emit(rec.Step(step=200))
log.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("records are lost") == 1
    records = list(read_records(path))
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    kept = sum(isinstance(record, rec.Step) for record in records)
    (note,) = [record for record in records if isinstance(record, rec.Note)]
    assert note.message.startswith(f"{201 - kept} records were lost")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4000


def test_ck07_a_warning_that_cannot_be_printed_either_costs_nothing() -> None:
    """engine.log lies on the disk that is full: standard error is /dev/full."""
    script = "from lumina_engine.monitoring.say import say; say('full'); print('on')"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.stdout == "on\n"


def test_other_errors_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    log = MetricLog(tmp_path / "m", 1, sync_interval=0)
    disk.room, disk.error = 0, errno.EBADF
    with pytest.raises(OSError, match="descriptor"):
        log.emit(rec.Note(message="x"))


def test_threads_share_one_sequence(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path, 1) as log:
        threads = [threading.Thread(target=lambda: [log.emit(rec.Step(step=n)) for n in range(500)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seqs(path) == list(range(1, 2001))


def test_mx03_the_thread_syncs_and_close_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    fdatasync = os.fdatasync

    def seen(descriptor: int) -> None:
        fdatasync(descriptor)
        synced.set()

    monkeypatch.setattr(log_module.os, "fdatasync", seen)
    log = MetricLog(tmp_path / "m", 1, sync_interval=0.01)
    log.emit(rec.Note(message="x"))
    assert synced.wait(10)
    log.close()
    synced.clear()
    log = MetricLog(tmp_path / "m", 1, sync_interval=1e6)
    log.emit(rec.Note(message="x"))
    log.close()
    assert synced.is_set()
    log.close()


def test_sync_reports_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    warnings: list[str] = []
    log = MetricLog(tmp_path / "m", 1, sync_interval=0, warn=warnings.append)
    log.emit(rec.Note(message="x"))
    monkeypatch.setattr(log_module.os, "fdatasync", broken)
    with pytest.raises(OSError, match="Input/output"):
        log.sync()
    log.emit(rec.Note(message="y"))
    log.close()
    assert len(warnings) == 1 and "power cut" in warnings[0]


FLOOD = """
import os, sys
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
log = MetricLog(sys.argv[1], int(sys.argv[2]))
while True:
    os.write(1, b"%d\\n" % log.emit(rec.Step(step=1, loss=1.0, aux_loss=1.0, z_loss=1.0, lr=1.0, grad_norm=1.0, tokens=1,
        step_time=1.0, tokens_per_s=1.0, mfu=1.0, seq_length=1, batch=1, data_time=1.0, forward_time=1.0, backward_time=1.0)))
"""


def test_mx02_every_record_whose_emit_returned_survives_a_kill(
    tmp_path: Path, fault_random: random.Random, figure: Callable[[str, object], None]
) -> None:
    """The real writer of a flood of 16 metrics, killed 50 times; each next one goes on in the same file."""
    path = tmp_path / "metrics.jsonl"
    kept = torn = 0
    for attempt in range(1, 51):
        child = subprocess.Popen([sys.executable, "-c", FLOOD, str(path), str(attempt)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        wanted = kept + fault_random.randrange(1, 1000)
        last = b""
        for line in child.stdout:
            last = line
            if int(line) >= wanted:
                break
        child.send_signal(signal.SIGKILL)
        told = [line for line in (last + child.stdout.read()).split(b"\n") if line]
        child.wait()
        child.stdout.close()
        if not (path.read_bytes().endswith(b"\n")):
            torn += 1
        # a number that was cut off by the kill is shorter: the largest one is the newest
        promised = max(map(int, told))
        with MetricLog(path, attempt, sync_interval=0) as log:  # cuts off a torn line, as the next incarnation does
            assert log.seq >= promised, f"kill {attempt}: seq {promised} was promised, {log.seq} is there"
            kept = log.seq
    reader = LogReader(path)
    found: list[int] = []
    while records := reader.read_new():
        found += [record.seq for record in records]
    assert found == list(range(1, kept + 1)) and reader.errors == []
    figure("kills", 50)
    figure("torn tails", torn)


def step(number: int, inc: int = 1) -> rec.Step:
    return rec.Step(step=number, inc=inc)


Case = tuple[Callable[[], list[rec.Record]], list[tuple[int, int]]]


@pytest.mark.parametrize(
    ("records", "kept"),
    [
        ([step(1), step(2)], [(1, 1), (2, 1)]),
        ([step(1), step(2), step(3), rec.Rewind(to_step=1), step(2, 2)], [(1, 1), (2, 2)]),
        ([step(1), step(2), rec.Rewind(to_step=0), step(1, 2), step(2, 2)], [(1, 2), (2, 2)]),
        (
            [step(1), step(2), step(3), rec.Rewind(to_step=2), step(3, 2), rec.Rewind(to_step=1), step(2, 3)],
            [(1, 1), (2, 3)],
        ),
        ([step(1), rec.Rewind(to_step=5), step(2, 2)], [(1, 1), (2, 2)]),
    ],
)
def test_rs10_surviving_branch(records: list[rec.Record], kept: list[tuple[int, int]]) -> None:
    assert [(item.step, item.inc) for item in surviving(records) if isinstance(item, rec.Step)] == kept


def test_rs10_values_go_and_events_stay() -> None:
    gone: list[rec.Record] = [rec.Step(step=9), rec.Eval(step=9), rec.Experts(step=9), rec.Checkpoint(step=9)]
    stay: list[rec.Record] = [
        rec.Alert(severity="warning", code="c", message="m", step=9),
        rec.Change(what="learning_rate", step=9),
        rec.Note(message="n", step=9),
        rec.Run(state="crashed"),
        rec.Hardware(),
        rec.Rewind(to_step=8),
    ]
    assert surviving([*gone, *stay]) == stay


def test_rs10_records_of_some_types_are_read_without_decoding_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run wants the few rewinds of a log of steps. Garbage and a line without its end are passed over as ever."""
    path, records = tmp_path / "metrics.jsonl", []
    for number in range(1, 400):
        records.append(rec.Step(step=number))
        if number % 50 == 0:
            records += [rec.Rewind(to_step=number - 5), rec.Eval(step=number, loss=1.0)]
    lines = [rec.encode(msgspec.structs.replace(record, seq=seq)) for seq, record in enumerate(records, 1)]
    lines[3:3] = [b"\n", b'{"type":"rewind"\n', b"\xff{}\n", b'{"type":"rewind","seq":0,"to_step":1}\n', b'{"type":"step",\n']
    path.write_bytes(b"".join(lines) + rec.encode(rec.Rewind(to_step=7, seq=10_000))[:-1])
    decoded: list[int] = []

    def counted(data: bytes) -> list[rec.Record]:
        decoded.append(data.count(b"\n"))
        return decode(data)

    decode = rec.decode_lines
    wanted = [r for r in read_records(path) if isinstance(r, rec.Rewind | rec.Eval)]
    monkeypatch.setattr(rec, "decode_lines", counted)
    assert list(read_records(path, ("rewind", "eval"))) == wanted and len(wanted) == 14
    assert sum(decoded) == 16  # the two of the garbage that begin like a rewind
    assert list(read_records(path, ("note",))) == [] and list(read_records(tmp_path / "none", ("note",))) == []
