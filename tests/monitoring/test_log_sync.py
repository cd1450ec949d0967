"""What the log promises of the disk (MX03): nobody is told "on the disk" for a record that is not."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog, read_records
from tests.waiting import until


class SlowDisk:
    """`fdatasync` of a test: stands still until `go`, fails with `error`, and knows what is on the disk."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.durable = 0  # bytes that a power cut leaves
        self.entered, self.go = threading.Event(), threading.Event()
        self.error: int | None = None
        self._real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, descriptor: int) -> None:
        end = self.path.stat().st_size  # written later: not covered
        self.entered.set()
        assert self.go.wait(20)
        if self.error is not None:
            error, self.error = self.error, None
            raise OSError(error, os.strerror(error))
        self._real(descriptor)
        self.durable = max(self.durable, end)


def test_mx03_sync_waits_for_the_sync_of_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread is in its fdatasync, and the committer asks: it must not hear "clean"."""
    path = tmp_path / "metrics.jsonl"
    disk = SlowDisk(path, monkeypatch)
    log = MetricLog(path, 1, sync_interval=0.01)
    log.emit(rec.Note(message="x"))
    assert disk.entered.wait(20)
    told: list[int] = []

    def commit() -> None:
        log.sync()
        told.append(disk.durable)

    committer = threading.Thread(target=commit)
    committer.start()
    committer.join(0.2)  # time enough to be wrong
    assert told == [], "told that the log is on the disk while its fdatasync was still going on"
    disk.go.set()
    committer.join(20)
    assert told == [path.stat().st_size]
    log.close()


def test_mx03_a_failed_sync_of_the_thread_is_told_to_the_committer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fdatasync the kernel may have dropped the pages: the next one alone proves nothing."""
    path = tmp_path / "metrics.jsonl"
    disk = SlowDisk(path, monkeypatch)
    disk.error = errno.EIO
    disk.go.set()
    warnings: list[str] = []
    log = MetricLog(path, 1, sync_interval=0.01, warn=warnings.append)
    log.emit(rec.Note(message="x"))
    until(lambda: warnings, "the warning of the thread")
    with pytest.raises(OSError, match="Input/output"):
        log.sync()
    log.emit(rec.Note(message="y"))
    log.sync()  # the doubtful bytes were written a second time, and this sync covered them
    assert disk.durable == path.stat().st_size
    assert [r.message for r in read_records(path) if isinstance(r, rec.Note)] == ["x", "y"]
    log.close()
    assert len(warnings) == 1 and "power cut" in warnings[0]


def test_mx03_after_a_power_cut_everything_that_sync_covered_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault_random: random.Random, figure: Callable[[str, object], None]
) -> None:
    """POWER model: many committers ask while others write; a cut leaves what was durable, which is never behind a promise."""
    path = tmp_path / "metrics.jsonl"
    disk = SlowDisk(path, monkeypatch)
    disk.go.set()
    log = MetricLog(path, 1, sync_interval=0.005)
    promises: list[tuple[int, int]] = []  # (seq promised, bytes durable when it was)
    pauses = [fault_random.random() / 2000 for _ in range(200)]

    def commit() -> None:
        for pause in pauses:
            threading.Event().wait(pause)
            seq = log.emit(rec.Step(step=1, loss=1.0))
            log.sync()
            promises.append((seq, disk.durable))

    committers = [threading.Thread(target=commit) for _ in range(4)]
    for thread in committers:
        thread.start()
    for thread in committers:
        thread.join()
    log.close()
    data = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == 10]
    assert len(promises) == len(ends) == 800
    assert [seq for seq, durable in promises if durable < ends[seq - 1]] == []
    figure("commits checked", len(promises))


def test_mx03_no_record_waits_longer_than_two_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's clock is counted in its own ticks: what was emitted before tick n is durable after it (2 s in a run)."""
    path = tmp_path / "metrics.jsonl"
    disk = SlowDisk(path, monkeypatch)
    disk.go.set()
    with MetricLog(path, 1, sync_interval=0.01) as log:
        for _ in range(20):
            log.emit(rec.Note(message="x"))
            wanted = log.offset
            until(lambda wanted=wanted: disk.durable >= wanted, "the next sync of the thread")
    assert MetricLog.__init__.__kwdefaults__["sync_interval"] * 2 <= 5.0  # P7: at most 5 s of records
