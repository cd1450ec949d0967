"""What `train` in the foreground shows, and returns: the code that the run ended with, also where the log does not say it."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from lumina_engine.commands.follow import LINE_TIME, _Follower, follow
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.run.client import send_command
from lumina_engine.run.directory import RunDirectory
from tests.waiting import until

from .conftest import Runs
from .looks import ranks_of


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


def test_c36_a_terminal_shows_how_far_the_tokenising_is_in_one_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.start(runs.make(tokenises=True), preempt_grace_s=0.2)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(_Follower(run, 1, quiet=False, tty=True).run()))
    thread.start()
    said = ""

    def counts() -> list[int]:
        nonlocal said
        said += capsys.readouterr().err
        return [
            int(found.replace(",", "")) for found in re.findall(r"\r\x1b\[2Ktokenising: ([\d,]+) conversations so far", said)
        ]

    until(lambda: len(set(counts())) >= 2, "two counts")
    assert send_command(run, "stop")["ok"]
    until(lambda: codes == [0], "the follower to end with the run")
    thread.join()
    found = counts()
    assert found == sorted(found) and said.startswith("preparing\n")
    assert "conversations so far\n" not in said, "each in the place of the one before"


def test_c36_elsewhere_the_tokenising_is_a_line_now_and_then(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.start(runs.make(tokenises=True))
    until(lambda: [rank for rank in ranks_of(run) if rank["step"]], "a document")
    follower = _Follower(run, 1, quiet=False, tty=False)
    follower.show(rec.Run(state="preparing"))
    start = time.monotonic()
    for seconds in (0.5, 0.9, 1.1, 1.5, 2.0, 2.2):
        follower.look(start + seconds * LINE_TIME)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "preparing" and len(lines) == 3, "one at once 1.1 and one at 2.2 times the time"
    assert all(re.fullmatch(r"tokenising: [\d,]+ conversations so far", line) for line in lines[1:])
    follower.show(rec.Run(state="running"))
    follower.look(start + 9 * LINE_TIME)
    assert capsys.readouterr().err == "running\n", "the log tells from here on"


def test_c36_a_follower_that_is_to_be_quiet_or_finds_nobody_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in (True, False):
        follower = _Follower(ended(tmp_path / str(quiet)), 1, quiet, tty=True)
        follower.show(rec.Run(state="preparing"))
        follower.look(time.monotonic() + LINE_TIME)
        assert capsys.readouterr().err == ("" if quiet else "preparing\n")
