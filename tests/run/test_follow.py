"""What `train` in the foreground returns: the code that the run ended with, also where the log does not say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina_engine.commands.follow import follow
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.run.directory import RunDirectory


def ended(root: Path, inc: int = 1, **identity: object) -> RunDirectory:
    """A run whose supervisor is gone."""
    run = RunDirectory.create(root, "r")
    run.update_identity(pid=0, inc=inc, **identity)
    return run


def test_ck07_the_last_record_was_lost_to_a_full_disk(tmp_path: Path) -> None:
    run = ended(tmp_path, state="finished", exit_code=0)
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        log.emit(rec.Run(state="running"))
    assert follow(run, quiet=True, tty=False) == 0


def test_a_start_that_is_refused_at_once_behind_a_long_log(tmp_path: Path) -> None:
    run = ended(tmp_path, inc=2, state="failed", exit_code=65)
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        for _ in range(300):
            log.emit(rec.Note(message="x" * 60_000))
    with MetricLog(run.metrics_path, 2, sync_interval=0) as log:
        log.emit(rec.Run(state="failed", exit_code=65, reason="the data changed"))
    assert run.metrics_path.stat().st_size > 16 << 20
    assert follow(run, quiet=True, tty=False) == 65


def test_ck11_a_start_from_scratch_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ended(tmp_path, state="finished", exit_code=0)
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        log.emit(rec.Rewind(to_step=0, reason="no checkpoint yet: starting again at step 0"))
        log.emit(rec.Run(state="finished", exit_code=0))
    assert follow(run, quiet=False, tty=False) == 0
    assert "back to step 0: no checkpoint yet: starting again at step 0" in capsys.readouterr().err


def test_ps07_a_killed_supervisor_has_no_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ended(tmp_path, state="running")
    assert follow(run, quiet=False, tty=False) == 1
    assert "the supervisor of this run died" in capsys.readouterr().err
