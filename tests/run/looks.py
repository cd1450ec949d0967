"""What tests of the supervisor look at in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.client import RunClient
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.process import Process, descendants
from tests.waiting import until

LAUNCHER_OF_TWO = str(Path(__file__).with_name("fake_launcher.py"))


def states(run: RunDirectory) -> list[tuple[int, str]]:
    return [(record.inc, record.state) for record in read_records(run.metrics_path) if isinstance(record, rec.Run)]


def reasons(run: RunDirectory) -> list[str]:
    return [record.reason or "" for record in read_records(run.metrics_path) if isinstance(record, rec.Run)]


def gap_free(run: RunDirectory) -> bool:
    seqs = [record.seq for record in read_records(run.metrics_path)]
    return seqs == list(range(1, len(seqs) + 1))


def worker(run: RunDirectory) -> Process:
    """The fake worker below the run's supervisor."""
    owner = run.owner()
    assert owner is not None
    return until(lambda: next(iter(descendants(owner.pid)), None), "a worker")


def step(run: RunDirectory) -> int:
    return run.info().step or 0


def with_id(run: RunDirectory, request: str) -> rec.Record | None:
    return next((record for record in read_records(run.metrics_path) if getattr(record, "id", None) == request), None)


def ranks_of(run: RunDirectory) -> list[dict[str, Any]]:
    with RunClient(run) as client:
        return list(client.hello["ranks"])
