"""The thread that writes checkpoints: in idle time, until somebody waits for it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.checkpoint import background, saving
from lumina_engine.checkpoint.background import Background, comes_back
from lumina_engine.checkpoint.backup import Backups
from tests.waiting import DEADLINE, until

from .helpers import manager, payload


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
    work = writer.start(held)
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
    work = writer.start(held)
    assert held.began.wait(DEADLINE) and held.policy == os.SCHED_IDLE
    held.gate.set()
    work.result(DEADLINE)
    assert os.sched_getscheduler(held.thread) == os.SCHED_OTHER  # so has what it starts from here on


@needs_return
def test_c079_work_that_is_hurried_before_it_begins_begins_as_all_others(held: Held) -> None:
    writer, second = Background("writer"), Held()
    writer.start(held)
    work = writer.start(second)
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
    work = writer.start(held)
    assert held.began.wait(DEADLINE) and held.policy == os.SCHED_OTHER
    held.gate.set()
    writer.finish(work)


@needs_return
def test_c079_a_save_that_idle_time_does_not_suffice_for_competes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Held
) -> None:
    """Where other programs leave the cores no rest; looked at from the boundaries of steps."""
    real = saving.write_files

    def write(*arguments: Any) -> Any:
        held()
        return real(*arguments)

    monkeypatch.setattr(saving, "write_files", write)
    made = manager(tmp_path)
    made.save(payload(1), blocking=False)
    assert held.began.wait(DEADLINE) and made.poll() == []
    assert os.sched_getscheduler(held.thread) == os.SCHED_IDLE
    monkeypatch.setattr(saving, "PATIENCE", 0.0)
    assert made.poll() == [] and os.sched_getscheduler(held.thread) == os.SCHED_OTHER
    held.gate.set()
    (result,) = made.wait()
    assert result.failed is None


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
