"""C130 with the real engine: the run outlives `lumina` killed at any step, and nothing is left of a start that fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lumina_engine.monitoring.log import read_records
from lumina_engine.monitoring.record import Step
from lumina_engine.run.directory import RunDirectory
from lumina_tui.launching import LaunchError, launch
from lumina_tui.starting import STAGES, Start, Watch, end_run, failure_lines

pytestmark = [pytest.mark.slow]
LINE = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n"
KEYS = [
    "hidden_size=64",
    "num_layers=1",
    "num_heads=1",
    "num_kv_heads=1",
    "intermediate_size=64",
    "seq_length=64",
    "batch_size=2",
]
KEYS += ["tokenizer=lumina-1k", "lr_schedule=constant", "eval_interval=0"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    (tmp_path / "d.jsonl").write_text(LINE * 64)


def words(*more: str) -> list[str]:
    return ["--preset", "debug", *KEYS, "train_data_path=d.jsonl", *more, "--run", "mine"]


def started(*more: str, launcher: Callable[..., Any] | None = None) -> Start:
    async def run(arguments: Any) -> Any:
        return await (launcher or launch)(arguments, Path("runs"))

    return Start(words(*more), Path("runs/mine"), run, lambda: None)


def of_run() -> list[int]:
    """Processes that work for the run."""
    mine = str(Path("runs/mine").absolute())
    return [p.pid for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or ())]


def nothing_left() -> None:
    deadline = time.monotonic() + 20
    while of_run():
        assert time.monotonic() < deadline, of_run()
        time.sleep(0.1)
    assert not RunDirectory("runs/mine").alive


def reached_step(run: RunDirectory, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        if run.metrics_path.exists() and any(isinstance(r, Step) and r.step >= step for r in read_records(run.metrics_path)):
            return
        assert time.monotonic() < deadline, run.log_path.read_text() if run.log_path.exists() else "no log"
        time.sleep(0.1)


async def test_c130_four_steps_of_a_real_start_then_the_end() -> None:
    start = started("max_steps=3")
    await start.run()
    assert start.failure is None and [*start.progress.reached] == list(STAGES)
    times = list(start.progress.reached.values())
    assert times == sorted(times) and times[0] > 0
    await asyncio.to_thread(reached_step, RunDirectory("runs/mine"), 3)


VIEWER = """
import asyncio, sys
from pathlib import Path
from lumina_tui.launching import launch
from lumina_tui.starting import Start
async def main():
    def shown():
        print(*start.progress.reached, flush=True)
    start = Start(sys.argv[1:], Path("runs/mine"), lambda words: launch(words, Path("runs")), shown)
    print("begun", flush=True)
    await start.run()
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.row("PS01")
@pytest.mark.parametrize("stage", ["begun", *STAGES])
def test_c130_the_run_outlives_the_viewer_killed_at_each_step(stage: str) -> None:
    viewer = subprocess.Popen(
        [sys.executable, "-c", VIEWER, *words("max_steps=4")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert viewer.stdout is not None
    for line in viewer.stdout:
        if stage in line:
            break
    if stage == "begun":  # the command itself must be there to go on
        deadline = time.monotonic() + 30
        while not any(
            "lumina_engine.cli" in " ".join(c.cmdline()) for c in psutil.Process(viewer.pid).children(recursive=True)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    os.killpg(viewer.pid, signal.SIGKILL)
    viewer.wait()
    reached_step(RunDirectory("runs/mine"), 4)


async def test_c130_data_that_vanishes_after_the_review_fails_with_step_and_cause() -> None:
    start = started("num_epochs=1")
    Path("d.jsonl").unlink()
    await start.run()
    assert start.failure is not None and start.failure.step == "run directory" and "no such file" in start.failure.cause
    assert not Path("runs/mine").exists()
    nothing_left()


async def test_c130_a_config_that_is_refused_makes_nothing() -> None:
    start = started("num_heads=3", "num_kv_heads=2")
    await start.run()
    assert start.failure is not None and start.failure.step == "run directory" and "num_kv_heads" in start.failure.cause
    assert not Path("runs/mine").exists()


async def test_c130_a_full_disk_in_the_ranks_shows_the_log_and_leaves_no_process() -> None:
    limit = "import resource,os,sys; resource.setrlimit(resource.RLIMIT_FSIZE,(6000,6000)); os.execv(sys.argv[1],sys.argv[1:])"

    async def small(arguments: Any, root: Path) -> Any:
        argv = [
            sys.executable,
            "-c",
            limit,
            sys.executable,
            "-m",
            "lumina_engine.cli",
            "train",
            *arguments,
            "--detach",
            "--json",
        ]
        environment = {**os.environ, "LUMINA_RUNS": str(root)}
        process = await asyncio.create_subprocess_exec(
            *argv, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        if process.returncode:
            raise LaunchError(err.decode().strip().splitlines()[-1], process.returncode, err.decode())
        from lumina_tui.launching import Launched

        facts = json.loads(out.decode().splitlines()[-1])
        return Launched(facts["run"], Path(facts["path"]))

    Path("d.jsonl").write_text(LINE * 3000)  # the token store meets the limit
    start = started("max_steps=3", "max_restarts=0", launcher=small)
    await start.run()
    assert start.failure is not None and start.failure.left == ()
    text = " ".join(t for line in failure_lines(start.failure, start.progress) for t, _ in line)
    assert start.failure.step in text and start.failure.cause in text and "nothing is left running" in text
    assert "Traceback" not in start.failure.cause
    nothing_left()


@pytest.mark.row("PS07")
@pytest.mark.parametrize("stage", ["supervisor", "ranks"])
async def test_c130_a_supervisor_killed_at_a_step_is_seen_and_its_ranks_end(stage: str) -> None:
    start = started("max_steps=100000")
    task = asyncio.ensure_future(start.run())
    while stage not in start.progress.reached and not task.done():
        await asyncio.sleep(0.05)
    owner = RunDirectory("runs/mine").owner()
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    await asyncio.wait_for(task, 60)
    if start.failure is None:  # the first step came before the kill was seen: the monitor shows the rest
        assert start.progress.done
        await asyncio.to_thread(end_run, Path("runs/mine"))
    else:
        assert "supervisor" in start.failure.cause and start.failure.left == ()
    await asyncio.to_thread(nothing_left)


async def test_c130_a_half_started_run_is_ended_with_its_ranks() -> None:
    start = started("max_steps=100000")
    task = asyncio.ensure_future(start.run())
    while "ranks" not in start.progress.reached and not task.done():
        await asyncio.sleep(0.05)
    assert of_run()
    assert await asyncio.to_thread(end_run, Path("runs/mine")) == []
    await asyncio.to_thread(nothing_left)
    await task


def test_c130_a_watch_of_nothing_says_so(tmp_path: Path) -> None:
    from lumina_tui.starting import Progress

    progress = Progress()
    watch = Watch(tmp_path / "none", progress)
    watch.look(False)
    assert not progress.ended
    watch.look(True)
    assert "folder is gone" in progress.ended
