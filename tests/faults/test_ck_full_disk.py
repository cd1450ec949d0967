"""A disk that is full under a real run: nothing of the run may need it (CK07)."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.client import RunClient, send_command
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.launch import wait
from lumina_engine.run.process import descendants
from tests.waiting import until

from .conftest import TinyRuns


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a file system of its own needs root and mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    filler = place / "filler"
    with filler.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return filler


def step(run: RunDirectory) -> int:
    """By the rank's own word: its log cannot grow."""
    with RunClient(run) as client:
        return max([rank["step"] or 0 for rank in client.ask("ranks")["ranks"]], default=0)


def test_ck07_a_full_disk_stops_no_real_run(tiny_runs: TinyRuns, small_disk: Path) -> None:
    tiny_runs.root = small_disk
    run = tiny_runs.running(max_steps=100_000, num_epochs=10_000, save_interval=20, eval_interval=0)
    until(lambda: run.newest_step() is not None, "a checkpoint", 60)
    filler = fill(small_disk)
    at = step(run)
    until(lambda: step(run) >= at + 100, "100 steps more", 60)
    filler.unlink()
    until(lambda: "records_lost" in run.metrics_path.read_text(), "the warning")
    records = list(read_records(run.metrics_path))
    assert [r.seq for r in records] == list(range(1, len(records) + 1))
    assert len([r for r in records if isinstance(r, rec.Alert) and r.code == "records_lost"]) == 1
    assert len([r for r in records if isinstance(r, rec.Note) and "records were lost" in r.message]) == 1
    before = run.newest_step()
    assert before is not None
    until(lambda: (run.newest_step() or 0) > before, "the next checkpoint", 60)
    assert {r.inc for r in records} == {1}
    assert send_command(run, "stop")["ok"] and wait(run, 60) == 0


@pytest.mark.slow
@pytest.mark.fast
def test_ck07_a_rank_that_dies_on_a_full_disk_is_started_again_all_the_same(tiny_runs: TinyRuns, small_disk: Path) -> None:
    tiny_runs.root = small_disk
    run = tiny_runs.running(max_steps=100_000, num_epochs=10_000, save_interval=20, eval_interval=0)
    until(lambda: run.newest_step() is not None, "a checkpoint", 60)
    filler = fill(small_disk)
    owner = run.owner()
    assert owner is not None
    (rank,) = descendants(owner.pid)
    os.kill(rank.pid, signal.SIGKILL)
    until(lambda: not rank.alive, "its end")
    until(lambda: run.alive and step(run) >= 20, "steps of the next start", 60)
    at = step(run)
    until(lambda: step(run) >= at + 20, "20 steps more", 60)
    filler.unlink()
    assert send_command(run, "stop")["ok"] and wait(run, 60) == 0
    assert run.info().state == "finished"
