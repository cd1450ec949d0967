"""The batch script really run: `srun` and `scontrol` are played, the run over its two machines is real."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumina_engine.run.directory import RunDirectory
from tests.runs_end import end_runs, socket_place
from tests.training.observed import conversations
from tests.waiting import until

from .tiny_run import steps

pytestmark = pytest.mark.nightly

STEPS = 200
KEYS = [
    "num_epochs=10",
    "num_layers=1",
    "hidden_size=64",
    "num_heads=4",
    "num_kv_heads=2",
    "seq_length=32",
    "batch_size=1",
    "eval_interval=0",
]
FAKE_SRUN = """#!{python}
import os, sys
at = sys.argv.index("--")
os.execvp(sys.argv[at + 1], sys.argv[at + 1:])
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job on two machines, both this one."""
    (tmp_path / "bin").mkdir()
    fakes = {
        "srun": FAKE_SRUN.format(python=sys.executable),
        "scontrol": f'#!/bin/sh\nprintf "%s\\n" "$*" >> {shlex.quote(str(tmp_path / "scontrol"))}\n',
    }
    for name, text in fakes.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o700)
    with socket_place("j") as sockets:
        path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "localhost,127.0.0.2", "SLURMD_NODENAME": "localhost"}
        yield {**os.environ, **slurm, "LUMINA_SOCKETS": str(sockets), "PATH": path, "OMP_NUM_THREADS": "1"}
        end_runs([RunDirectory(tmp_path / "runs" / "r")])


def test_c061_ft01_a_preempted_job_is_queued_again_and_ends_the_run(tmp_path: Path, job: dict[str, str]) -> None:
    conversations(tmp_path / "train.jsonl", 80)
    words = [sys.executable, "-m", "lumina_engine.cli", "train", "--run", "r", "--runs", str(tmp_path / "runs"), "--slurm"]
    words += ["num_nodes=2", "num_gpus=1", "launcher=srun", f"max_steps={STEPS}", "save_interval=50", *KEYS]
    words += [f"train_data_path={tmp_path}/train.jsonl", f"data_cache_dir={tmp_path}/cache"]
    made = subprocess.run(words, env=job, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    script = tmp_path / "job.sh"
    script.write_text(made.stdout)
    run = RunDirectory(tmp_path / "runs" / "r")

    with (tmp_path / "job.log").open("wb") as log, subprocess.Popen(["bash", str(script)], env=job, stderr=log) as first:
        try:
            until(lambda: max(steps(run), default=0) >= 5 if run.metrics_path.exists() else False, "steps", 90)
            first.send_signal(signal.SIGUSR1)
            until(lambda: run.newest_step() is not None, "the checkpoint that USR1 asks for", 60)
            first.send_signal(signal.SIGTERM)
            assert first.wait(60) == 75, (tmp_path / "job.log").read_text()
        finally:
            first.kill()
    assert run.info().state == "preempted"
    reached = max(steps(run))
    assert reached < STEPS and run.newest_step() == reached
    assert (tmp_path / "scontrol").read_text() == "requeue 42\n"

    again = subprocess.run(["bash", str(script)], env=job, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert run.info().state == "finished" and sorted(steps(run)) == list(range(1, STEPS + 1))
    assert (tmp_path / "scontrol").read_text() == "requeue 42\n", "a run that is over is not queued again"
