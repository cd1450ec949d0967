"""Two machines (network namespaces with an sshd each): a run over both, one of them lost, the run goes on on the other."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.launch import wait
from lumina_engine.run.process import marked
from tests.runs_end import end_runs, socket_place
from tests.training.observed import BASE, conversations
from tests.waiting import until

from .netns import Machines, missing
from .tiny_run import steps

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(missing() is not None, reason=missing() or "")]

LUMINA = [sys.executable, "-c", "import sys; from lumina_engine.cli import main; sys.exit(main())"]
STEPS = 24
TIMEOUT = 10.0  # s: hang_timeout_s; a machine that is silent for half of it is lost
KEYS = {
    **BASE,
    "num_layers": 1,
    "seq_length": 32,
    "dropout": 0.1,
    "max_steps": STEPS,
    "save_interval": 4,
    "eval_interval": 0,
    "log_interval": 1,
    "async_save": False,
}


class Cluster:
    """Two machines, data, and runs over them."""

    def __init__(self, machines: Machines, folder: Path, sockets: Path) -> None:
        self.machines, self.folder = machines, folder
        conversations(folder / "train.jsonl", 80)
        (folder / "hosts").write_text("10.77.0.2 slots=2\n10.77.0.1 slots=2  # where the run starts\n")
        self.environment = machines.environment(
            {"LUMINA_SOCKETS": str(sockets), "LUMINA_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
        )

    def train(self, name: str, *words: str, detach: bool = True) -> subprocess.CompletedProcess[str]:
        argv = self.machines.inside(0, [*LUMINA, "train", "--run", name, *words, *(["--detach"] if detach else [])])
        return subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=150)

    def keys(self, name: str) -> list[str]:
        path = self.folder / f"{name}.yaml"
        own = {"train_data_path": str(self.folder / "train.jsonl"), "data_cache_dir": str(self.folder / "cache")}
        path.write_text(json.dumps({**KEYS, **own}))
        return ["--config", str(path)]

    def two(self) -> list[str]:
        return ["num_nodes=2", "num_gpus=1", f"hostfile={self.folder / 'hosts'}", f"hang_timeout_s={TIMEOUT:g}"]

    def over_both(self, name: str) -> RunDirectory:
        answer = self.train(name, *self.keys(name), *self.two())
        assert answer.returncode == 0, answer.stderr
        return self.run(name)

    def run(self, name: str) -> RunDirectory:
        return RunDirectory(self.folder / "runs" / name)

    def end(self) -> None:
        end_runs(RunDirectory(path) for path in (self.folder / "runs").glob("*"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "net").mkdir()
    with socket_place("c") as sockets:
        machines = Machines(tmp_path / "net")
        made = Cluster(machines, tmp_path, sockets)
        try:
            yield made
        finally:
            machines.close()
            made.end()


def reached(run: RunDirectory, step: int) -> None:
    def there() -> bool:
        ended = run.info().state in rec.FINAL_STATES
        assert not ended, f"{run.info()}: {run.log_path.read_text()[-2000:]}"
        return max(steps(run), default=0) >= step

    until(there, lambda: f"step {step}: {run.info()}", 90)


def on_one(cluster: Cluster, run: RunDirectory) -> int:
    """Resume on the first machine alone, with as many ranks; the step from which it went on."""
    one = ["num_nodes=1", "num_gpus=2", "master_addr=auto", "launcher=auto"]
    answer = cluster.train(run.name, "--resume", *one, detach=False)
    assert answer.returncode == 0, answer.stderr + run.log_path.read_text()[-2000:]
    return [r.to_step for r in read_records(run.metrics_path) if isinstance(r, rec.Rewind)][-1]


def same_batches(cluster: Cluster, run: RunDirectory) -> None:
    """The whole run equals one that was never disturbed: the same rows at each step, and their losses."""
    answer = cluster.train("whole", *cluster.keys("whole"), "num_gpus=2", detach=False)
    assert answer.returncode == 0, answer.stderr
    whole, found = steps(cluster.run("whole")), steps(run)
    assert sorted(found) == sorted(whole) == list(range(1, STEPS + 1))
    for step, record in found.items():
        assert (record.tokens, record.epoch, record.lr) == (whole[step].tokens, whole[step].epoch, whole[step].lr), step
        assert record.loss == pytest.approx(whole[step].loss, abs=1e-6), step


@pytest.mark.parametrize("how", ["link", "silent", "agent"])
def test_ft_c061_a_lost_machine_ends_the_run_which_goes_on_on_the_other(
    cluster: Cluster, how: str, fault_random: random.Random, figure: Callable[[str, object], None]
) -> None:
    run = cluster.over_both("r")
    at = fault_random.randint(5, STEPS - 8)
    reached(run, at)
    begun = time.monotonic()
    if how == "agent":
        (agent,) = cluster.machines.running(1, "lumina_engine.run.node")
        os.kill(agent, signal.SIGKILL)
    else:
        cluster.machines.cut(how)
    until(lambda: run.info().state == "failed", lambda: str(run.info()), TIMEOUT + 15)
    figure("seconds to the end", round(time.monotonic() - begun, 1))
    row = run.info()
    assert row.exit_code == 1 and "host 10.77.0.2 is lost" in (row.reason or ""), row
    until(lambda: marked(run.identity()["nonce"]) == [], "the ranks on both machines to end", TIMEOUT + 15)
    assert at <= max(steps(run)) < STEPS
    newest = run.newest_step()
    assert newest is not None and on_one(cluster, run) == newest
    assert run.info().state == "finished"
    same_batches(cluster, run)


def test_ft07_a_rank_that_stands_still_on_the_other_machine_is_named_with_it(
    cluster: Cluster, fault_random: random.Random
) -> None:
    run = cluster.over_both("r")
    reached(run, fault_random.randint(5, STEPS - 8))
    (rank,) = cluster.machines.running(1, "lumina_engine.training.worker")
    os.kill(rank, signal.SIGSTOP)
    assert wait(run, 200) == 0, run.log_path.read_text()[-2000:]
    (alert,) = [r for r in read_records(run.metrics_path) if isinstance(r, rec.Alert) and r.code == "hang"]
    said = re.fullmatch(
        r"rank (\d)( on 10\.77\.0\.2)? is \d+ s in \w+ of step \d+(, so is rank 1 on 10\.77\.0\.2)?", alert.message
    )
    assert said is not None and (said[1] == "1") == bool(said[2]) and "on 10.77.0.2" in alert.message, alert.message
    same_batches(cluster, run)


def test_ft_c061_a_machine_that_cannot_be_reached_is_named(cluster: Cluster) -> None:
    cluster.machines.cut("link")
    answer = cluster.train("r", *cluster.keys("r"), *cluster.two())
    assert answer.returncode == 1 and "reach.10.77.0.2: no answer: ssh ended with 255" in answer.stderr, answer.stderr
    assert not cluster.run("r").path.exists(), "nothing was made"


def test_c061_the_preflight_tells_each_machine_and_lets_the_ranks_meet(cluster: Cluster) -> None:
    answer = cluster.train("r", "--check", "--json", *cluster.keys("r"), *cluster.two(), detach=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    rows = {row["id"]: row for row in json.loads(answer.stdout)}
    names = ("reach", "versions", "data", "folder", "clock")
    assert sorted(rows) == sorted([*(f"{name}.10.77.0.2" for name in names), "ranks"])
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["ranks"]["value"].startswith("all-reduce of 4 MiB over 2 ranks") and "through eth0" in rows["ranks"]["value"]


def test_c061_each_machine_started_by_hand(cluster: Cluster) -> None:
    by_hand = ["num_nodes=2", "num_gpus=1", "master_addr=10.77.0.1"]
    argv = cluster.machines.inside(1, [*LUMINA, "train", "--run", "r", *cluster.keys("r"), *by_hand, "node_rank=1"])
    with subprocess.Popen(argv, env=cluster.environment, stderr=subprocess.PIPE, text=True) as second:
        try:
            answer = cluster.train("r", *cluster.keys("r"), *by_hand, "node_rank=0", detach=False)
            assert answer.returncode == 0, answer.stderr + cluster.run("r").log_path.read_text()[-2000:]
            assert second.wait(30) == 0
        finally:
            second.kill()
    same_batches(cluster, cluster.run("r"))
