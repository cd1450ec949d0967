"""The thread that writes checkpoints: in idle time, until somebody waits for it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.checkpoint import background, saving
from lumina_engine.checkpoint.background import Background, comes_back
from lumina_engine.checkpoint.backup import Backups
from tests.waiting import DEADLINE, until

from .helpers import Clock, manager, names_in, payload


class Held:
    """Work that ends when it is let; `policy` is that of its thread as it began."""

    def __init__(self) -> None:
        self.began, self.gate, self.thread, self.policy = threading.Event(), threading.Event(), 0, -1

    def __call__(self) -> None:
        self.thread, self.policy = threading.get_native_id(), os.sched_getscheduler(0)
        self.began.set()
        assert self.gate.wait(3 * DEADLINE)


@pytest.fixture
def held() -> Held:
    return Held()


needs_return = pytest.mark.skipif(not comes_back(), reason="a thread may not come back from idle priority here")


@needs_return
def test_c079_the_writer_takes_idle_time_until_somebody_waits(held: Held) -> None:
    writer = Background("writer")
    work = writer.start(held, 60)
    assert held.began.wait(DEADLINE)
    assert (held.policy, os.sched_getscheduler(held.thread)) == (os.SCHED_IDLE, os.SCHED_IDLE)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    waiting = threading.Thread(target=writer.finish, args=(work,))
    waiting.start()
    until(lambda: os.sched_getscheduler(held.thread) == os.SCHED_OTHER, "the usual priority")
    held.gate.set()
    waiting.join(DEADLINE)
    work.result(DEADLINE)


@needs_return
def test_c079_what_is_started_while_somebody_waits_begins_in_idle_time_again(held: Held) -> None:
    writer = Background("writer")
    writer.hurry()
    work = writer.start(held, 60)
    assert held.began.wait(DEADLINE) and held.policy == os.SCHED_IDLE
    held.gate.set()
    work.result(DEADLINE)
    assert os.sched_getscheduler(held.thread) == os.SCHED_OTHER  # so has what it starts from here on


@needs_return
def test_c079_work_that_is_hurried_before_it_begins_begins_as_all_others(held: Held) -> None:
    writer, second = Background("writer"), Held()
    writer.start(held, 60)
    work = writer.start(second, 60)
    writer.hurry()
    held.gate.set()
    assert second.began.wait(DEADLINE) and second.policy == os.SCHED_OTHER
    second.gate.set()
    work.result(DEADLINE)


def test_c079_without_the_right_to_come_back_the_priority_stays(monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    """As on a machine whose user may lower a priority but not raise it again (no CAP_SYS_NICE, RLIMIT_NICE 0)."""
    real = os.sched_setscheduler

    def refused(thread: int, policy: int, param: os.sched_param) -> None:
        if policy != os.SCHED_IDLE:
            raise PermissionError(1, "Operation not permitted")
        real(thread, policy, param)

    monkeypatch.setattr(background.os, "sched_setscheduler", refused)
    writer = Background("writer")
    work = writer.start(held, 60)
    assert held.began.wait(DEADLINE) and held.policy == os.SCHED_OTHER
    held.gate.set()
    writer.finish(work)


@needs_return
def test_c079_a_save_that_idle_time_does_not_suffice_for_competes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Held
) -> None:
    """Where other programs leave the cores no rest: whatever the training thread does meanwhile."""
    real = saving.write_files

    def write(*arguments: Any) -> Any:
        held()
        return real(*arguments)

    monkeypatch.setattr(saving, "write_files", write)
    monkeypatch.setattr(saving, "PATIENCE", 0.3)
    made = manager(tmp_path)
    made.save(payload(1), blocking=False)
    assert held.began.wait(DEADLINE)
    until(lambda: os.sched_getscheduler(held.thread) == os.SCHED_OTHER, "the usual priority")
    held.gate.set()
    (result,) = made.wait()
    assert result.failed is None


def test_c079_without_patience_work_begins_as_all_others(held: Held) -> None:
    """As the commit of several ranks whose writing has taken all of it."""
    work = Background("writer").start(held, 0.0)
    assert held.began.wait(DEADLINE) and held.policy == os.SCHED_OTHER
    held.gate.set()
    work.result(DEADLINE)


def recorded(function: Any, calls: list[int]) -> Any:
    def called(*arguments: Any) -> Any:
        calls.append(len(calls))
        return function(*arguments)

    return called


def test_c079_a_system_without_a_thread_more_fails_the_save_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    made, begun = manager(tmp_path), list[int]()
    monkeypatch.setattr(saving, "write_files", recorded(saving.write_files, begun))
    with monkeypatch.context() as patch:
        patch.setattr(background.threading.Thread, "start", refused)
        assert not comes_back()
        (result,) = made.save(payload(1), blocking=False) or made.poll()
    assert result.failed == "RuntimeError: can't start new thread" and names_in(tmp_path / "checkpoints") == []
    (result,) = made.save(payload(2), blocking=False) or made.wait()
    assert result.failed is None and len(begun) == 1  # not what has failed, too


@needs_return
def test_c079_without_a_thread_for_its_patience_work_has_none(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(background.threading.Timer, "start", refused)
    work = Background("writer").start(held, 60.0)
    assert held.began.wait(DEADLINE) and held.policy == os.SCHED_OTHER
    held.gate.set()
    work.result(DEADLINE)


@needs_return
def test_c079_a_policy_that_the_user_chose_stays(held: Held) -> None:
    """`chrt --batch` or `chrt --idle` before the command."""
    writer, found = Background("writer"), list[bool]()

    def chosen() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        found.append(comes_back())
        writer.start(held, 60).result(DEADLINE)

    held.gate.set()
    thread = threading.Thread(target=chosen)
    thread.start()
    thread.join(DEADLINE)
    assert found == [False] and held.policy == os.SCHED_BATCH


def test_c079_what_fails_after_a_commit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such name")

    monkeypatch.setattr(saving, "retain", broken)
    (result,) = manager(tmp_path).save(payload(1))
    assert result.failed is None and result.notes == ("after the commit: ValueError: no such name",)


@needs_return
def test_c084_what_a_save_takes_is_without_its_wait_for_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preemption asks whether one fits into its grace, in which training stands still."""
    clock, waits, began, real = Clock(), [0.0], threading.Event(), saving.write_files

    def write(*arguments: Any) -> Any:
        clock.now += 4
        waits[0] += 3
        began.set()
        return real(*arguments)

    monkeypatch.setattr(saving, "time", clock)
    monkeypatch.setattr(saving, "write_files", write)
    monkeypatch.setattr(background, "waited_for_core", lambda thread: waits[0])
    made = manager(tmp_path)
    made.save(payload(1), blocking=False)
    assert began.wait(DEADLINE)
    (result,) = made.wait()
    assert result.seconds == pytest.approx(1) and result.span_seconds == pytest.approx(4)
    (result,) = made.save(payload(2), blocking=True)
    assert result.seconds == pytest.approx(4), "a blocking save competes for cores as it always would"


@needs_return
def test_c084_a_wait_that_is_counted_late_is_counted(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts it when the thread gets a core, which is after it was hurried."""
    waits, found = [0.0], list[float]()
    monkeypatch.setattr(background, "waited_for_core", lambda thread: waits[0])
    writer = Background("writer")

    def work() -> None:
        held()
        found.extend([writer.waited(), writer.waited()])

    future = writer.start(work, 60)
    assert held.began.wait(DEADLINE)
    writer.hurry()
    waits[0] = 5.0
    held.gate.set()
    writer.finish(future)
    waits[0] = 9.0  # what it waited for as all others
    assert found == [5.0, 5.0] and writer.waited() == 5.0


def test_c084_a_thread_that_has_a_core_waits_for_none() -> None:
    me = threading.get_native_id()
    before = background.waited_for_core(me)
    assert 0 <= before <= background.waited_for_core(me) < time.monotonic()
    assert background.waited_for_core(2**22 + 1) == 0.0


@needs_return
def test_c083_a_backup_begun_by_the_writer_has_the_usual_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Held
) -> None:
    monkeypatch.setattr(Backups, "_copy", lambda *_: held())
    made = manager(tmp_path, backup_every_n_hours=1e-9, backup_path=str(tmp_path / "elsewhere"))
    made.save(payload(1), blocking=False)
    assert held.began.wait(DEADLINE) and held.policy == os.SCHED_OTHER
    held.gate.set()
    assert made.close()[0].failed is None
