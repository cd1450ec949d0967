"""Who survives whom: launcher, terminal, viewers, ranks, supervisor; what signals do."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import last_records, read_records
from lumina_engine.run import launch
from lumina_engine.run.client import RunClient, send_command
from lumina_engine.run.process import descendants, marked, process
from tests.waiting import until

from .conftest import WORKER, Runs
from .looks import LAUNCHER_OF_TWO, gap_free, ranks_of, states, step, worker

LAUNCHER = """
import json, sys
from lumina_engine.run import launch
from lumina_engine.run.directory import RunDirectory
run = RunDirectory(sys.argv[1])
launch.start(run, [sys.executable, sys.argv[2], str(run.path)])
print("started", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["kill", "terminal", "hangup"])
def test_ps01_the_run_outlives_its_launcher_and_terminal(runs: Runs, end: str) -> None:
    run = runs.make(pace=0.005)
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run.path), WORKER],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: _controlling_terminal(0),
    )
    os.close(slave)
    output = b""
    while b"started" not in output:
        output += os.read(master, 1000)
    until(lambda: step(run) > 3)
    if end == "kill":
        os.killpg(child.pid, signal.SIGKILL)
    elif end == "hangup":
        owner = run.owner()
        assert owner is not None
        for target in (owner, *descendants(owner.pid)):
            os.kill(target.pid, signal.SIGHUP)
        child.kill()
    os.close(master)
    if end == "terminal":
        child.wait(20)  # the hang-up of its terminal ends it
    child.kill()
    child.wait()
    at = step(run)
    until(lambda: step(run) > at + 20, "steps after the launcher's death")
    steps = [record.step for record in read_records(run.metrics_path) if isinstance(record, rec.Step)]
    assert steps == list(range(1, len(steps) + 1)) and states(run) == [(1, "preparing"), (1, "running")]
    assert send_command(run, "stop")["ok"]
    assert launch.wait(run, 20) == 0


def _controlling_terminal(descriptor: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


def test_ps07_a_killed_supervisor_takes_its_ranks_along(runs: Runs) -> None:
    run = runs.running(grandchild=True)
    nonce = run.identity()["nonce"]
    rank = worker(run)
    grandchild = int((run.path / "grandchild").read_text())
    assert {found.pid for found in marked(nonce)} >= {rank.pid, grandchild}
    assert run.signal(signal.SIGKILL)
    until(lambda: run.info().state == "crashed", "the crash to show")
    until(lambda: not rank.alive, "the rank to die")
    # what left the session and ignored the channel is found by the nonce when the run starts again
    assert process(grandchild) is not None
    runs.start(run, resume=True)
    until(lambda: run.info().state == "running")
    assert grandchild not in [found.pid for found in marked(nonce)]
    assert run.info().inc == 2 and gap_free(run)
    assert states(run)[-2:] == [(2, "preparing"), (2, "running")]


def test_ps07_a_worker_that_never_connected_dies_with_its_supervisor(runs: Runs) -> None:
    run = runs.make()
    launch.start(run, ["sleep", "600"])
    rank = worker(run)
    assert run.signal(signal.SIGKILL)
    until(lambda: not rank.alive, "the worker to die")


def test_ps07_a_rank_that_holds_on_leaves_at_the_end_of_its_channel(runs: Runs) -> None:
    """As above, without PR_SET_PDEATHSIG: the rank is a grandchild, as below a launcher that does not pass it on."""
    script = textwrap.dedent(
        """
        import ctypes, os, signal, sys, threading
        from lumina_engine.run.rank import RankChannel
        channel = RankChannel.from_environment()
        ctypes.CDLL(None).prctl(1, 0)
        open(os.path.join(os.environ["LUMINA_RUN_DIR"], "pid"), "w").write(str(os.getpid()))
        threading.Event().wait()
        """
    )
    run = runs.make()
    launch.start(run, [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"])
    pid = run.path / "pid"
    rank = until(lambda: pid.exists() and pid.read_text() and process(int(pid.read_text())), "the rank")
    with RunClient(run) as client:
        until(lambda: ranks_of(run), "the rank to be known")
        assert client.hello["op"] == "hello"
    run.signal(signal.SIGKILL)
    until(lambda: not rank.alive, "the rank to leave")


def test_mx10_ft09_a_killed_rank_is_restarted_and_shown(runs: Runs) -> None:
    run = runs.running(settings={"restart_pause_s": 0.001}, grandchild=True, checkpoint_every=5)
    until(lambda: run.newest_step() is not None)
    first, grandchild = worker(run), int((run.path / "grandchild").read_text())
    with RunClient(run) as viewer:
        os.kill(first.pid, signal.SIGKILL)
        seen = []
        for record in viewer.records():
            if isinstance(record, rec.Run):
                seen.append((record.inc, record.state))
            if seen and seen[-1] == (2, "running"):
                break
    assert seen == [(1, "preparing"), (1, "running"), (1, "crashed"), (2, "preparing"), (2, "running")]
    left = process(grandchild)
    assert left is None or not left.alive, "nothing of the old incarnation lives"
    assert gap_free(run)


def test_ft01_term_preempts_with_75(runs: Runs) -> None:
    run = runs.running()
    until(lambda: step(run) > 2)
    assert run.signal(signal.SIGTERM)
    assert launch.wait(run, 20) == 75
    assert run.info().state == "preempted" and run.newest_step() == step(run)


def test_ft02_int_stops_with_130(runs: Runs) -> None:
    run = runs.running()
    assert run.signal(signal.SIGINT)
    assert launch.wait(run, 20) == 130
    assert run.info().state == "finished" and run.newest_step() == step(run)
    (last,) = last_records(run.metrics_path, 1, ["run"])
    assert isinstance(last, rec.Run) and last.exit_code == 130, "log and run.json agree"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_ft02_usr_saves_and_goes_on(runs: Runs, number: int) -> None:
    run = runs.running()
    assert run.signal(number)
    until(lambda: last_records(run.metrics_path, 1, ["checkpoint"]), "a checkpoint")
    at = step(run)
    until(lambda: step(run) > at)


def test_ft02_usr_harms_neither_ranks_that_do_not_listen_yet_nor_their_launcher(runs: Runs) -> None:
    """A scheduler sends USR1 to every process of a job."""
    run = runs.make(ranks=["preempt", "preempt"])
    launch.start(run, [sys.executable, LAUNCHER_OF_TWO, str(run.path)], world=2)
    until(lambda: [rank["step"] for rank in ranks_of(run)] == [1, 1], "both ranks")
    owner = run.owner()
    assert owner is not None
    tree = descendants(owner.pid)
    assert len(tree) == 3
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        for target in tree:
            os.kill(target.pid, number)
    assert send_command(run, "checkpoint")["ok"], "a turn of the supervisor later"
    assert [target for target in tree if not target.alive] == []
    assert run.signal(signal.SIGTERM)
    assert launch.wait(run, 20) == 75


def test_ft02_hup_pipe_and_quit_change_nothing_but_quit_prints_stacks(runs: Runs) -> None:
    run = runs.running()
    for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT):
        assert run.signal(number)
    until(lambda: "fake_worker.py" in run.log_path.read_text(), "the stacks")
    at = step(run)
    until(lambda: step(run) > at + 5)
    assert run.alive and run.info().inc == 1


def test_ft02_stop_and_cont_are_no_fault(runs: Runs) -> None:
    run = runs.running()
    rank = worker(run)
    os.kill(rank.pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{rank.pid}/stat").read_text().split()[2] == "T")
    with RunClient(run) as client:
        assert client.hello["state"] == "running"
    os.kill(rank.pid, signal.SIGCONT)
    at = step(run)
    until(lambda: step(run) > at)
    assert run.info().inc == 1


def test_ft02_a_second_term_kills_the_tree(runs: Runs) -> None:
    run = runs.running(deaf=True, grandchild=True)
    rank = worker(run)
    assert run.signal(signal.SIGTERM)
    # signals less than a second after the first are repeats of launchers, later ones are meant: send until it works
    until(lambda: run.signal(signal.SIGTERM) is False or not rank.alive, "the kill")
    assert launch.wait(run, 20) == 75
    assert run.info().state == "preempted" and "newest one counts" in (run.info().reason or "")
    assert marked(run.identity()["nonce"]) == []


def test_ft01_the_grace_ends_a_deaf_run(runs: Runs) -> None:
    run = runs.running(settings={"preempt_grace_s": 0.2}, deaf=True, grandchild=True)
    assert run.signal(signal.SIGTERM)
    assert launch.wait(run, 20) == 75
    assert run.info().state == "preempted" and marked(run.identity()["nonce"]) == []
    assert "did not leave within 0.2 s" in run.log_path.read_text()


@pytest.mark.parametrize(("number", "code", "state"), [(signal.SIGTERM, 75, "preempted"), (signal.SIGINT, 130, "finished")])
def test_ft01_ft02_a_signal_while_the_worker_still_starts(runs: Runs, number: int, code: int, state: str) -> None:
    run = runs.make()
    launch.start(run, [sys.executable, "-c", "import threading; threading.Event().wait()"])
    assert run.signal(number)
    assert launch.wait(run, 20) == code
    assert run.info().state == state


def test_ft01_term_between_two_starts(runs: Runs) -> None:
    run = runs.start(runs.make(crash={"*": "1"}), restart_pause_s=1000)
    until(lambda: run.info().state == "crashed" and run.alive)
    assert run.signal(signal.SIGTERM)
    assert launch.wait(run, 20) == 75
    assert run.info().state == "preempted"
