"""A run whose machines are each started by hand, and started again behind an out of memory on the first one (C61, R42)."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.interface import free_port
from lumina_engine.run.launch import wait

from .conftest import TinyRuns
from .injector import Fault
from .tiny_run import start, steps

ROOT = Path(__file__).resolve().parents[2]
SECOND = """
import sys
from lumina_engine.commands.machines import join
from lumina_engine.config.schema import Config
from lumina_engine.run.directory import RunDirectory
run = RunDirectory(sys.argv[1])
config = Config.load(run.config_path).model_copy(update={"node_rank": 1})
sys.exit(join(run, config, 2))
"""


@pytest.mark.slow
def test_r42_c061_machines_started_by_hand_go_on_together_behind_out_of_memory(tiny_runs: TinyRuns) -> None:
    exact: dict[str, Any] = {"use_moe": False, "dropout": 0.0}  # a loss that does not depend on how a step is split
    whole = tiny_runs.running("whole", world=2, **exact)
    assert wait(whole, 120) == 0, whole.log_path.read_text()[-2000:]
    place: dict[str, Any] = {"launcher": "torchrun", "num_nodes": 2, "node_rank": 0, "master_addr": socket.gethostname()}
    run = tiny_runs.make("r", [Fault("oom", 6, "forward")], world=2, **exact, **place, master_port=free_port(0))
    with subprocess.Popen([sys.executable, "-c", SECOND, str(run.path)], cwd=ROOT) as second:
        try:
            start(run, world=2, restart_pause_s=0.01)
            assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
            assert second.wait(60) == 0
        finally:
            second.terminate()
    changes = [(r.what, r.before, r.after) for r in read_records(run.metrics_path) if isinstance(r, rec.Change)]
    assert changes == [("batch_size", 4, 2), ("gradient_accumulation_steps", 1, 2)]
    assert Config.load(run.config_path).batch_size == 2
    want, got = steps(whole), steps(run)
    assert sorted(got) == sorted(want) == list(range(1, 25))
    for step, record in got.items():
        assert (record.tokens, record.batch) == (want[step].tokens, want[step].batch), step
        assert record.loss == pytest.approx(want[step].loss, rel=1e-5), step
