"""Signals, crashes and crash loops of real runs (FT01-03, FT08, FT09), and what of the supervision only they can show."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lumina_engine.checkpoint.verify import verify
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import last_records, read_records
from lumina_engine.run.client import send_command
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.launch import wait
from lumina_engine.run.process import Process, descendants, marked
from tests.waiting import until

from .conftest import TinyRuns
from .injector import Fault, fired
from .tiny_run import ends, final_manifest, prepare, start, steps

PHASES = ("data", "forward", "backward", "step", "save", "eval")
LONG: dict[str, Any] = {"max_steps": 80, "num_epochs": 6}  # room for ten stops
ENDLESS: dict[str, Any] = {"max_steps": 100_000, "num_epochs": 10_000}
RESUME = {"resume": True, "restart_pause_s": 0.01}


def whole(run: RunDirectory) -> tuple[dict[int, float], dict[str, Any]]:
    """All losses, and the digests of weights and state of every rank at the end."""
    files = {f["path"]: f["chunks"] for f in final_manifest(run)["files"] if f["path"].endswith(".safetensors")}
    assert files
    return {step: record.loss for step, record in steps(run).items()}, files


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        run = start(prepare(tmp_path_factory.mktemp("unbroken"), "unbroken", **LONG))
        assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    return whole(run)


def checkpoints_are_whole(run: RunDirectory) -> None:
    found = [path for path in run.checkpoints.iterdir() if path.name.startswith("step-")]
    assert found and all(verify(path).ok for path in found)
    assert not list(run.checkpoints.glob(".tmp-*")) and not list(run.checkpoints.glob("*.corrupt"))


def ranks(run: RunDirectory) -> list[Process]:
    owner = run.owner()
    assert owner is not None
    return descendants(owner.pid)


def last_end(run: RunDirectory) -> rec.Run:
    """The record of how the run, or its latest incarnation, ended: its own word for when."""
    return [r for r in read_records(run.metrics_path) if isinstance(r, rec.Run) and r.state in rec.FINAL_STATES][-1]


def reached(run: RunDirectory, step: int, deadline: float = 60) -> None:
    until(lambda: (run.info().step or 0) >= step, f"step {step}", deadline)


def test_ft01_term_at_ten_phases_of_a_run(
    tiny_runs: TinyRuns, unbroken: Any, fault_random: random.Random, figure: Callable[[str, object], None]
) -> None:
    """A chain of ten preemptions and resumes; the eleventh start finishes what the unbroken run did."""
    phases = [*PHASES, *fault_random.choices(PHASES[:4], k=4)]
    fault_random.shuffle(phases)
    phases.remove("data")
    phases.insert(fault_random.randint(1, 9), "start")
    plan = [
        Fault(
            "signal",
            None,
            "data" if phase == "start" else phase,  # the rank reads its data, and does not listen to signals yet
            inc=inc,
            count=1 if phase in ("start", "save", "eval") else fault_random.randint(2, 5),
            value=signal.SIGTERM,
            to="rank" if phase == "start" else fault_random.choice(("rank", "supervisor")),
        )
        for inc, phase in enumerate(phases, start=1)
    ]
    run = tiny_runs.make(faults=plan, **LONG)
    slowest = 0.0
    for inc in range(1, len(plan) + 1):
        start(run, **(RESUME if inc > 1 else {}))
        until(lambda inc=inc: len(fired(run.path)) == inc, f"fault {inc}", 60)
        until(lambda: not run.alive, f"the end after TERM in {phases[inc - 1]}", 60)
        slowest = max(slowest, last_end(run).t - fired(run.path)[-1]["t"])
        assert run.info().exit_code == 75 and run.info().state == "preempted"
        assert run.newest_step() == run.info().step, "at the boundary that was reached"
    start(run, **RESUME)
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    figure("slowest exit, s", round(slowest, 1))
    assert slowest <= 10.0
    assert whole(run) == unbroken
    checkpoints_are_whole(run)


@pytest.mark.slow
@pytest.mark.fast
def test_ft02_each_signal_does_what_the_table_says(tiny_runs: TinyRuns, unbroken: Any) -> None:
    run = tiny_runs.running(**ENDLESS, save_interval=0, eval_interval=0, log_interval=1)
    reached(run, 5)
    (rank,) = ranks(run)
    for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT):
        assert run.signal(number)
    until(lambda: "most recent call first" in run.log_path.read_text(), "the stacks")
    for target, number in ((None, signal.SIGUSR1), (None, signal.SIGUSR2), (rank, signal.SIGUSR1), (rank, signal.SIGUSR2)):
        before = len(last_records(run.metrics_path, None, ["checkpoint"]))
        if target is None:
            assert run.signal(number)
        else:
            os.kill(target.pid, number)
        until(lambda before=before: len(last_records(run.metrics_path, None, ["checkpoint"])) > before, "a checkpoint")
    os.kill(rank.pid, signal.SIGSTOP)
    end = time.monotonic() + 5.0
    until(lambda: time.monotonic() > end)
    os.kill(rank.pid, signal.SIGCONT)
    reached(run, (run.info().step or 0) + 3)
    assert run.signal(signal.SIGINT)
    assert wait(run, 60) == 130 and run.info().state == "finished"
    assert {inc for inc, _, _ in ends(run)} == {1} and run.newest_step() == run.info().step
    losses = {step: record.loss for step, record in steps(run).items()}
    assert sorted(losses) == list(range(1, len(losses) + 1))
    checkpoints_are_whole(run)


@pytest.mark.slow
@pytest.mark.fast
def test_ft02_a_second_term_kills_and_the_newest_checkpoint_counts(
    tiny_runs: TinyRuns, unbroken: Any, fault_random: random.Random
) -> None:
    at = fault_random.randint(6, 20)
    run = tiny_runs.running(faults=[Fault("sleep", at, fault_random.choice(PHASES[:4]))], **LONG)
    until(lambda: fired(run.path), "the fault", 60)
    (rank,) = ranks(run)
    until(lambda: run.signal(signal.SIGTERM) is False or not rank.alive, "the kill")
    assert wait(run, 60) == 75 and run.info().state == "preempted"
    assert run.newest_step() == (at - 1) // 4 * 4  # save_interval
    start(run, **RESUME)
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    assert whole(run) == unbroken


@pytest.mark.slow
@pytest.mark.fast
def test_ps07_a_killed_supervisor_takes_a_real_rank_along_and_the_restart_is_exact(
    tiny_runs: TinyRuns, unbroken: Any, fault_random: random.Random
) -> None:
    run = tiny_runs.running(**LONG, log_interval=1, faults=[Fault("slow", None, "data", value=0.02, times=None)])
    reached(run, fault_random.randint(9, 30))
    (rank,) = ranks(run)
    killed = time.time()
    assert run.signal(signal.SIGKILL)
    until(lambda: not run.alive, "the lock to be free")
    assert run.info().state == "crashed", "at the first look"
    until(lambda: not rank.alive, "the rank to die")
    assert max(record.t for record in read_records(run.metrics_path)) - killed <= 2.0, "it trained on"
    start(run, **RESUME)
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    assert whole(run) == unbroken


def test_ft01_a_preemption_does_not_wait_for_a_backup_on_a_slow_disk(tiny_runs: TinyRuns) -> None:
    """It comes while the first file is copied, and that never ends: the rank leaves all the same, with its checkpoint."""
    faults = [Fault("backup", 1, "forward"), Fault("slow", None, "data", value=0.02, times=None)]
    run = tiny_runs.running(faults=faults, **LONG, async_save=False, backup_every_n_hours=1e-9)
    assert wait(run, 120) == 75, run.log_path.read_text()[-2000:]
    at = max(steps(run))
    assert (run.info().reason, run.newest_step()) == (f"preempted at step {at}", at)
    assert any("it is given up" in r.message for r in read_records(run.metrics_path) if isinstance(r, rec.Note))
    assert [path.name.startswith(".tmp-step-000004-") for path in run.backups.iterdir()] == [True]
    start(run, **RESUME)
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    left = [path.name for path in run.backups.iterdir()]
    assert left and all(name.startswith("step-") and verify(run.backups / name).ok for name in left)


@pytest.mark.slow
@pytest.mark.fast
def test_ps14_a_stop_in_a_save_lets_it_finish(tiny_runs: TinyRuns, fault_random: random.Random) -> None:
    at = 4 * fault_random.randint(1, 5)
    run = tiny_runs.running(faults=[Fault("slow", at, "save", value=1.0)], **ENDLESS, eval_interval=0)
    until(lambda: fired(run.path), "the save", 60)
    assert send_command(run, "stop")["ok"]
    assert wait(run, 60) == 0
    saved = [
        record.step for record in last_records(run.metrics_path, None, ["checkpoint"]) if isinstance(record, rec.Checkpoint)
    ]
    assert at in saved and saved[-1] == run.info().step
    checkpoints_are_whole(run)


@pytest.mark.slow
@pytest.mark.fast
def test_ft09_each_way_to_die_is_named_and_leaves_nothing(tiny_runs: TinyRuns, fault_random: random.Random) -> None:
    ways = {
        "raise": "InjectedError: injected at rank 0",
        "abort": "SIGABRT",
        "segfault": "SIGSEGV",
        "exit": "exit code 3",
        "kill": "SIGKILL",
        "oom": "out of memory with micro batches of 4 rows",
    }
    order = fault_random.sample(sorted(ways), len(ways))
    places = [(how, "forward" if how == "oom" else fault_random.choice(PHASES[:4])) for how in order]
    faults = [Fault(how, 2 + inc, section, inc=inc) for inc, (how, section) in enumerate(places, start=1)]
    run = tiny_runs.running(faults=faults, max_steps=10, save_interval=1, settings={"max_restarts": 2})
    nonce = run.identity()["nonce"]
    assert wait(run, 200) == 0, run.log_path.read_text()[-2000:]
    crashes = [r for r in read_records(run.metrics_path) if isinstance(r, rec.Run) and r.state == "crashed"]
    assert [record.inc for record in crashes] == list(range(1, 7))
    for record, how in zip(crashes, order, strict=True):
        assert ways[how] in (record.reason or "") and record.exit_code not in (None, 0), how
    assert sorted(steps(run)) == list(range(1, 11)) and marked(nonce) == []


@pytest.mark.slow
@pytest.mark.fast
def test_ft08_the_same_step_each_time_ends_with_93(tiny_runs: TinyRuns, fault_random: random.Random) -> None:
    at, section = fault_random.randint(5, 8), fault_random.choice(PHASES[:4])
    run = tiny_runs.running(faults=[Fault("exit", at, section, inc=None, times=None)], max_steps=10)
    assert wait(run, 200) == 93
    assert [state for _, state, _ in ends(run)].count("crashed") == 4
    assert "3 restarts without a newer checkpoint; last cause: the worker ended with exit code 3" in (run.info().reason or "")
    assert run.newest_step() == 4


def test_ft10_a_loader_that_fails_is_named_and_its_rank_started_again(tiny_runs: TinyRuns, fault_random: random.Random) -> None:
    """Rows are made by threads of the rank: there is no process that could be killed beside it."""
    run = tiny_runs.running(faults=[Fault("loader", fault_random.randint(3, 10), "data")], max_steps=20, num_workers=2)
    until(lambda: ranks(run) and (run.info().step or 0) >= 1, "the first step", 60)
    (rank,) = ranks(run)
    assert descendants(rank.pid) == []
    until(lambda: fired(run.path), "the fault", 60)
    crashed = until(
        lambda: [r for r in read_records(run.metrics_path) if isinstance(r, rec.Run) and r.state == "crashed"], "an end", 60
    )
    assert crashed[0].t - fired(run.path)[0]["t"] <= 10.0, "it hung"
    assert "OSError: injected in lumina-data" in (crashed[0].reason or "")
    assert wait(run, 120) == 0 and sorted(steps(run)) == list(range(1, 21))


@pytest.mark.nightly
def test_ft08_a_loop_that_does_progress_goes_on(tiny_runs: TinyRuns) -> None:
    faults = [Fault("kill", None, "step", inc=None, count=6, times=None)]
    run = tiny_runs.running(faults=faults, max_steps=24, settings={"max_restarts": 1})
    assert wait(run, 200) == 0, run.log_path.read_text()[-2000:]
    assert [state for _, state, _ in ends(run)].count("crashed") >= 3


@pytest.mark.nightly
@pytest.mark.parametrize("use_deepspeed", [False, True], ids=["plain", "deepspeed"])
def test_ft03_term_to_one_of_two_ranks(tiny_runs: TinyRuns, use_deepspeed: bool, fault_random: random.Random) -> None:
    at, section = fault_random.randint(3, 9), fault_random.choice(PHASES[1:4])
    fault = Fault("signal", at, section, rank=1, value=signal.SIGTERM)
    keys: dict[str, Any] = {"max_steps": 12, "use_deepspeed": use_deepspeed}
    run = tiny_runs.running(faults=[fault], world=2, **keys)
    until(lambda: len(ranks(run)) >= 3, "launcher and ranks", 60)
    for target in ranks(run):  # a scheduler sends it to everybody, also while they start
        os.kill(target.pid, signal.SIGUSR1)
    assert wait(run, 200) == 75, run.log_path.read_text()[-2000:]
    assert run.info().state == "preempted" and run.newest_step() == run.info().step == at
    manifest = final_manifest(run)
    assert len([f for f in manifest["files"] if Path(f["path"]).name.startswith("rank-")]) >= 2
    checkpoints_are_whole(run)
    start(run, world=2, **RESUME)
    assert wait(run, 200) == 0, run.log_path.read_text()[-2000:]
    reference = tiny_runs.running("unbroken", world=2, **keys)
    assert wait(reference, 200) == 0
    assert whole(run) == whole(reference)


def of_rank(run: RunDirectory, number: int) -> psutil.Process | None:
    """The process of a rank, from its first instruction on."""
    for item in ranks(run):
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(item.pid)
            if found.environ().get("RANK") == str(number):
                return found
    return None


def cpu(found: psutil.Process) -> float:
    """Seconds of processor time that a process has taken; without end once it has ended."""
    try:
        spent = found.cpu_times()
    except psutil.NoSuchProcess:
        return float("inf")
    return spent.user + spent.system


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", ["auto", "torchrun"])
def test_ft03_term_to_one_of_two_ranks_that_still_start(
    tiny_runs: TinyRuns, launcher: str, fault_random: random.Random, figure: Callable[[str, object], None]
) -> None:
    """At moments over the start, counted in processor time; and where the rank is known already, but does not listen."""
    keys: dict[str, Any] = {**ENDLESS, "launcher": launcher, "save_interval": 0, "eval_interval": 0}
    measured = tiny_runs.running("measured", world=2, **keys)
    first = until(lambda: of_rank(measured, 1), "rank 1", 120)
    reached(measured, 1, 240)
    whole_start = cpu(first)
    assert send_command(measured, "stop", {"save": False})["ok"] and wait(measured, 200) == 0
    moments = [0.0, *(fault_random.uniform(0, whole_start) for _ in range(4))]
    for number, moment in enumerate(moments):
        run = tiny_runs.running(f"drawn-{number}", world=2, **keys)
        target = until(lambda run=run: of_rank(run, fault_random.randrange(2)), "a rank", 120)
        until(lambda target=target, moment=moment: cpu(target) >= moment, f"{moment:.2f} s of its start", 240)
        target.terminate()
        assert wait(run, 200) == 75, (moment, run.log_path.read_text()[-2000:])
        assert {(inc, state) for inc, state, _ in ends(run)} >= {(1, "preempted")} and run.info().inc == 1
        assert "crashed" not in [state for _, state, _ in ends(run)]
    figure("start, s of CPU", round(whole_start, 1))
    known = tiny_runs.running("known", [Fault("signal", None, "data", rank=1, value=signal.SIGTERM)], world=2, **keys)
    assert wait(known, 200) == 75 and fired(known.path), known.log_path.read_text()[-2000:]
    assert known.info().inc == 1 and "still started" in (known.info().reason or "")


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["auto", "torchrun"])
@pytest.mark.parametrize("how", ["kill", "exit"])
def test_ft03_ft09_one_of_two_ranks_that_dies_while_it_starts_is_a_crash(tiny_runs: TinyRuns, launcher: str, how: str) -> None:
    """Although the launcher's TERM is the end of the other one, which does not listen either."""
    fault = Fault(how, None, "data", rank=1)
    run = tiny_runs.running(faults=[fault], world=2, launcher=launcher, max_steps=2, save_interval=0, eval_interval=0)
    assert wait(run, 200) == 0, run.log_path.read_text()[-2000:]
    assert [(inc, state) for inc, state, _ in ends(run) if state == "crashed"] == [(1, "crashed")] and run.info().inc == 2
