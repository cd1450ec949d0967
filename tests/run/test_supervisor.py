"""The supervisor over real processes."""

from __future__ import annotations

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run import launch

from .conftest import Runs


def test_ft_finished_run_end_to_end(runs: Runs) -> None:
    run = runs.start(runs.make(steps=20))
    assert launch.wait(run, 20) == 0
    info = run.info()
    assert (info.state, info.step, info.total_steps, info.exit_code, info.alive) == ("finished", 20, 20, 0, False)
    records = list(read_records(run.metrics_path))
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert [record.state for record in records if isinstance(record, rec.Run)] == ["preparing", "running", "finished"]
