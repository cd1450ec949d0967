"""The supervisor over real processes: ends, restarts, signals, commands, and who survives whom."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import last_records, read_records
from lumina_engine.run import launch
from lumina_engine.run.client import RunClient, send_command
from lumina_engine.run.directory import RunDirectory, RunError
from lumina_engine.run.process import Process, descendants, marked, process

from .conftest import WORKER, Runs, until

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


# --- ends and exit codes ------------------------------------------------------------------------------------------------


def test_ft_a_run_from_start_to_end(runs: Runs) -> None:
    run = runs.start(runs.make(steps=20))
    assert launch.wait(run, 20) == 0
    info = run.info()
    assert (info.state, info.step, info.total_steps, info.exit_code, info.alive) == ("finished", 20, 20, 0, False)
    assert states(run) == [(1, "preparing"), (1, "running"), (1, "finished")] and gap_free(run)
    assert not Path(info.socket or "").exists() and list(Path(info.socket or "").parent.iterdir()) == []
    identity = run.identity()
    assert identity["world"] == 1 and identity["argv"][0] == sys.executable and "python" in identity["versions"]


@pytest.mark.parametrize(("code", "state"), [(65, "failed"), (93, "failed"), (2, "failed")])
def test_ft_codes_that_are_final(runs: Runs, code: int, state: str) -> None:
    run = runs.start(runs.make(steps=2, code=code))
    assert launch.wait(run, 20) == code
    assert run.info().state == state and states(run)[-1] == (1, state)


def test_ft_a_code_without_a_word_is_recorded_by_the_supervisor(runs: Runs) -> None:
    run = runs.start(runs.make(crash={"*": "65"}))
    assert launch.wait(run, 20) == 65
    assert states(run)[-1] == (1, "failed") and run.info().exit_code == 65


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("kill", "killed by SIGKILL"),
        ("abort", "killed by SIGABRT"),
        ("3", "exit code 3"),
        ("raise", "exit code 1: RuntimeError: the fake worker was told to raise"),
    ],
)
def test_ft09_the_cause_of_a_crash_is_named(runs: Runs, how: str, cause: str) -> None:
    run = runs.start(runs.make(crash={"*": how}), max_restarts=0)
    assert launch.wait(run, 20) == 1
    assert [state for _, state in states(run)] == ["preparing", "running", "crashed", "failed"]
    assert cause in reasons(run)[-2] and cause in (run.info().reason or "")


def test_ft08_a_crash_loop_without_progress_ends_with_93(runs: Runs) -> None:
    run = runs.start(runs.make(crash={"*": "1"}), restart_pause_s=0.001)
    assert launch.wait(run, 30) == 93
    assert [state for _, state in states(run)].count("crashed") == 4
    assert [inc for inc, state in states(run) if state == "preparing"] == [1, 2, 3, 4]
    assert "3 restarts without a newer checkpoint" in (run.info().reason or "") and gap_free(run)


def test_ft08_a_crash_loop_with_progress_goes_on(runs: Runs) -> None:
    run = runs.start(
        runs.make(steps=12, crash={"*": "1"}, crash_after=4, checkpoint_every=4), max_restarts=1, restart_pause_s=0.001
    )
    assert launch.wait(run, 40) == 0, "three crashes, each with progress"
    rewinds = [record.to_step for record in read_records(run.metrics_path) if isinstance(record, rec.Rewind)]
    assert rewinds == [4, 8, 12]


def test_ft_a_crash_then_success(runs: Runs) -> None:
    run = runs.start(runs.make(steps=6, crash={"1": "kill"}), restart_pause_s=0.001)
    assert launch.wait(run, 20) == 0
    assert [state for _, state in states(run)] == ["preparing", "running", "crashed", "preparing", "running", "finished"]
    assert [inc for inc, _ in states(run)] == [1, 1, 1, 2, 2, 2]
    assert last_records(run.metrics_path, 1, ["rewind"])


# --- several ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "code", "words"),
    [
        ([65, "polite"], 65, "rank 0 says 65"),
        (["polite", "kill"], 1, "rank 1 died without a word"),
        (["stuck", "kill"], 1, "rank 1 died without a word"),
        ([0, 0], 0, ""),
    ],
)
def test_ft09_the_first_rank_to_fail_tells_why(runs: Runs, ranks: list[str | int], code: int, words: str) -> None:
    run = runs.make(ranks=ranks)
    settings = {"max_restarts": 0, "survivors_s": 0.1}
    launch.start(run, [sys.executable, LAUNCHER_OF_TWO, str(run.path)], world=2, settings=settings)
    assert launch.wait(run, 20) == code
    assert words in (run.info().reason or "") and marked(run.identity()["nonce"]) == []


def test_ft03_two_ranks_are_preempted_together(runs: Runs) -> None:
    run = runs.make(ranks=["preempt", "preempt"])
    launch.start(run, [sys.executable, LAUNCHER_OF_TWO, str(run.path)], world=2)

    until(lambda: [rank["step"] for rank in ranks_of(run)] == [1, 1], "both ranks")
    assert run.signal(signal.SIGTERM)
    assert launch.wait(run, 20) == 75
    assert run.info().state == "preempted"


# --- start --------------------------------------------------------------------------------------------------------------


def test_ck13_a_second_start_is_refused_and_harms_nothing(runs: Runs) -> None:
    run = runs.running()
    owner = run.owner()
    assert owner is not None
    before = run.identity()
    with pytest.raises(RunError, match=f"process {owner.pid}") as caught:
        runs.start(run)
    assert caught.value.exit_code == 65 and run.identity() == before
    at = step(run)
    until(lambda: step(run) > at, "the first one to go on")


def test_a_program_that_cannot_be_started_is_a_reason(runs: Runs) -> None:
    run = runs.make()
    with pytest.raises(RunError, match=r"did not start.*No such file") as caught:
        launch.start(run, ["/nonexistent/python"])
    assert "\n" not in str(caught.value)
    assert run.info().state == "failed" and not run.alive


def test_a_supervisor_that_dies_shows_the_log(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.make()
    broken = runs.root / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no such thing' >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(launch.sys, "executable", str(broken))
    with pytest.raises(RunError, match=r"ended without a word; engine\.log says: ImportError: no such thing"):
        launch.start(run, ["true"])


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"nonsense": 1}, "unknown settings"), ({"max_restarts": "x"}, "number"), ({"restart_pause_s": -1}, "number")],
)
def test_wrong_settings_are_refused(runs: Runs, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(RunError, match=word):
        launch.start(runs.make(), ["true"], settings=settings)


def test_ps11_something_in_the_socket_s_place_refuses_the_start(runs: Runs) -> None:
    run = runs.make()
    folder = Path(os.environ["LUMINA_SOCKETS"])
    folder.mkdir(mode=0o700)
    (folder / f"{run.identity()['id']}.sock").write_text("mine")
    with pytest.raises(RunError, match="is a file, not a socket of yours") as caught:
        runs.start(run)
    assert caught.value.exit_code == 65 and not run.alive


def test_ps11_the_stale_sockets_of_a_killed_supervisor_are_replaced(runs: Runs) -> None:
    run = runs.running()
    run.signal(signal.SIGKILL)
    until(lambda: not run.alive)
    assert Path(run.info().socket or "").exists()
    runs.start(run, resume=True)
    until(lambda: run.info().state == "running")
    assert run.info().inc == 2 and RunClient(run).hello["op"] == "hello"


def test_ps10_a_run_folder_of_150_characters(runs: Runs) -> None:
    runs.root = runs.root / ("d" * 150)
    run = runs.running("n" * 64, steps=1_000_000)
    assert send_command(run, "stop")["ok"] and launch.wait(run, 20) == 0


def test_ps17_descriptors_session_and_environment_of_the_supervisor(runs: Runs) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        run = runs.running()
        owner = run.owner()
        assert owner is not None and owner.parent != os.getpid()
        for pid in (owner.pid, worker(run).pid):
            targets = {entry.name: str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
            assert (targets["0"], targets["1"], targets["2"]) == ("/dev/null", str(run.log_path), str(run.log_path))
            allowed = ("/dev/null", str(run.path), "socket:", "anon_inode:")
            assert [target for target in targets.values() if not target.startswith(allowed)] == []
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(r"^Umask:\s+0077$", status, re.M)
            assert os.getsid(pid) not in (os.getsid(0), owner.pid), "a session of its own, and not its leader"
            assert Path(f"/proc/{pid}/cwd").readlink() == run.path
    finally:
        os.close(reader)
        os.close(writer)


def test_the_supervisor_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pydantic", "textual", "asyncio", "psutil")
    script = f"import sys, lumina_engine.run.supervisor; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- who survives whom --------------------------------------------------------------------------------------------------


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
    until(lambda: run.info().state == "crashed", "the crash to show", 5)
    until(lambda: not rank.alive, "the rank to die", 5)
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
    until(lambda: not rank.alive, "the worker to die", 5)


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
    until(lambda: not rank.alive, "the rank to leave", 5)


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


# --- signals ------------------------------------------------------------------------------------------------------------


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


def test_ft01_term_while_the_worker_still_starts(runs: Runs) -> None:
    run = runs.make()
    launch.start(run, [sys.executable, "-c", "import threading; threading.Event().wait()"])
    assert run.signal(signal.SIGTERM)
    assert launch.wait(run, 20) == 75
    assert run.info().state == "preempted"


def test_ft01_term_between_two_starts(runs: Runs) -> None:
    run = runs.start(runs.make(crash={"*": "1"}), restart_pause_s=1000)
    until(lambda: run.info().state == "crashed" and run.alive)
    assert run.signal(signal.SIGTERM)
    assert launch.wait(run, 20) == 75
    assert run.info().state == "preempted"


# --- commands -----------------------------------------------------------------------------------------------------------


def test_c134_each_command_has_its_record(runs: Runs) -> None:
    run = runs.running()
    with RunClient(run) as client:
        for cmd, args, kind in (
            ("checkpoint", {}, rec.Checkpoint),
            ("pause", {}, rec.Run),
            ("resume", {}, rec.Run),
            ("set_lr", {"lr": 5e-4}, rec.Change),
            ("stop", {"save": True}, rec.Run),
        ):
            request = f"id-{cmd}"
            assert client.send_command(cmd, args, request) == {"op": "reply", "id": request, "ok": True}
            record = until(lambda request=request: with_id(run, request), f"the effect of {cmd}")
            assert isinstance(record, kind)
    assert launch.wait(run, 20) == 0
    change = last_records(run.metrics_path, 1, ["change"])[0]
    assert isinstance(change, rec.Change) and change.after == 5e-4


def with_id(run: RunDirectory, request: str) -> rec.Record | None:
    return next((record for record in read_records(run.metrics_path) if getattr(record, "id", None) == request), None)


def test_ps14_double_stop_and_repeated_ids(runs: Runs) -> None:
    run = runs.running(deaf=False, pace=0.05)
    with RunClient(run) as one, RunClient(run) as two:
        assert one.send_command("stop", {"save": False}, "s1")["ok"]
        assert two.send_command("stop", {"save": False}, "s1")["ok"]
        second = two.send_command("stop", {}, "s2")
        assert not second["ok"] and "stopping already" in second["error"]
    assert launch.wait(run, 20) == 0
    effects = [record for record in read_records(run.metrics_path) if getattr(record, "id", None) == "s1"]
    assert [record.state for record in effects if isinstance(record, rec.Run)] == ["stopping", "finished"]
    assert not last_records(run.metrics_path, 1, ["checkpoint"])


def test_ps14_pause_and_resume_50_times(runs: Runs) -> None:
    run = runs.running()
    with RunClient(run) as client:
        for number in range(50):
            assert client.send_command("pause", {}, f"p{number}")["ok"]
            assert client.send_command("resume", {}, f"r{number}")["ok"]
    until(lambda: with_id(run, "r49"))
    changes = [record.id for record in read_records(run.metrics_path) if isinstance(record, rec.Run) and record.id]
    assert changes == [name for number in range(50) for name in (f"p{number}", f"r{number}")]
    at = step(run)
    until(lambda: step(run) > at)


def test_ps14_an_id_of_an_earlier_start_is_known(runs: Runs) -> None:
    run = runs.running()
    with RunClient(run) as client:
        client.send_command("set_lr", {"lr": 1e-4}, "once")
    until(lambda: with_id(run, "once"))
    send_command(run, "stop")
    launch.wait(run, 20)
    runs.start(run, resume=True)
    with RunClient(run) as client:
        assert client.send_command("set_lr", {"lr": 9e-4}, "once")["ok"]
        assert client.send_command("set_lr", {"lr": 2e-4}, "twice")["ok"]
    until(lambda: with_id(run, "twice"))
    changes = [record.after for record in read_records(run.metrics_path) if isinstance(record, rec.Change)]
    assert changes == [1e-4, 2e-4]


def test_ps15_a_deaf_worker_and_its_setsid_grandchild_end_by_stop(runs: Runs) -> None:
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    run = runs.running(settings={"preempt_grace_s": 0.2}, deaf=True, grandchild=True, pace=0)
    (run.path / "plan.json").write_text("{}")
    owner = run.owner()
    assert owner is not None
    tree = descendants(owner.pid)
    os.kill(worker(run).pid, signal.SIGSTOP)  # neither hears TERM nor moves
    assert send_command(run, "stop")["ok"]
    assert launch.wait(run, 20) == 1
    assert "did not stop and was killed" in (run.info().reason or "")
    assert [found for found in tree if found.alive] == [] and len(tree) == 2
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_stop_between_two_starts(runs: Runs) -> None:
    run = runs.start(runs.make(crash={"*": "1"}), restart_pause_s=1000)
    until(lambda: run.info().state == "crashed" and run.alive)
    with RunClient(run) as client:
        refused = client.send_command("pause")
        assert not refused["ok"] and "between two starts" in refused["error"]
        assert client.send_command("stop", {}, "s1")["ok"]
    assert launch.wait(run, 20) == 0
    assert run.info().state == "finished" and with_id(run, "s1") is not None


def test_commands_before_the_worker_listens_are_kept(runs: Runs) -> None:
    run = runs.start(runs.make())
    assert send_command(run, "stop")["ok"]
    assert launch.wait(run, 20) == 0
    assert run.info().state == "finished"


def test_a_dead_run_is_named_by_the_client(runs: Runs) -> None:
    run = runs.start(runs.make(steps=1))
    launch.wait(run, 20)
    with pytest.raises(RunError, match=r"run r is not running \(finished"):
        send_command(run, "stop")
    with pytest.raises(RunError, match=r"does not answer \(finished"):
        RunClient(run)
    with pytest.raises(RunError, match="never started"):
        RunClient(runs.make("s"))


# --- viewers ------------------------------------------------------------------------------------------------------------


def test_ps05_viewers_that_come_at_random_see_everything(runs: Runs) -> None:
    run = runs.running(
        settings={"restart_pause_s": 0.001}, steps=400, pace=0.002, crash={"1": "kill"}, crash_after=150, checkpoint_every=50
    )
    generator = random.Random(7)
    results: list[list[int]] = []

    def watch(start: int) -> None:
        until(lambda: step(run) >= start or not run.alive)
        try:
            with RunClient(run, timeout=20) as client:
                results.append([record.seq for record in client.records()])
        except RunError:
            pass  # the run was over before this viewer came

    viewers = [threading.Thread(target=watch, args=(generator.randrange(300),)) for _ in range(12)]
    for viewer in viewers:
        viewer.start()
    assert launch.wait(run, 30) == 0
    for viewer in viewers:
        viewer.join()
    last = [record.seq for record in read_records(run.metrics_path)]
    assert len(results) >= 6 and all(result == last for result in results)
    assert run.info().inc == 2


def test_ps02_killed_viewers_leave_nothing(runs: Runs) -> None:
    run = runs.running()
    owner = run.owner()
    assert owner is not None

    def counts() -> tuple[int, int]:
        return len(list(Path(f"/proc/{owner.pid}/fd").iterdir())), len(list(Path(f"/proc/{owner.pid}/task").iterdir()))

    until(lambda: ranks_of(run), "the rank's connection")
    samples: list[tuple[int, int]] = []  # what is open for a moment only (that viewer, run.json) does not count
    until(lambda: len(samples) > 30 or samples.append(counts()))  # type: ignore[func-returns-value]
    before = min(samples)
    script = (
        "import sys; from lumina_engine.run.client import RunClient; from lumina_engine.run.directory import RunDirectory\n"
        + textwrap.dedent(
            """
        clients = [RunClient(RunDirectory(sys.argv[1])) for _ in range(10)]
        for client in clients: client.read_line()
        print("on", flush=True)
        sys.stdin.read()
        """
        )
    )
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", script, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"on\n"
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    until(lambda: counts() <= before, "descriptors and threads to be as before")


def ranks_of(run: RunDirectory) -> list[dict[str, Any]]:
    with RunClient(run) as client:
        return list(client.hello["ranks"])


def test_the_hello_knows_the_ranks(runs: Runs) -> None:
    run = runs.running()

    (rank,) = until(lambda: [item for item in ranks_of(run) if item["step"]], "a heartbeat")
    assert rank["rank"] == 0 and rank["pid"] == worker(run).pid and rank["section"] in ("data", "step", "save")
    assert 0 <= rank["age_s"] < 20


# --- engine.log ---------------------------------------------------------------------------------------------------------


def test_ps16_a_flood_on_stdout_is_capped(runs: Runs) -> None:
    run = runs.running(settings={"engine_log_mb": 1}, flood=True, pace=0.001)
    old = run.log_path.with_name("engine.log.1")
    until(old.exists, "the first copy")
    size = old.stat().st_size
    assert size > 1 << 20 and old.stat().st_mode & 0o777 == 0o600
    at = step(run)
    until(lambda: step(run) > at + 50)
    assert run.log_path.stat().st_size < 200 << 20
    assert send_command(run, "stop")["ok"] and launch.wait(run, 20) == 0


def test_ck07_a_full_disk_stops_neither_run_nor_supervisor(runs: Runs) -> None:
    """RLIMIT_FSIZE stands for the full disk: every file of worker and supervisor that would grow over it fails."""
    script = textwrap.dedent(
        """
        import resource, sys
        from lumina_engine.run import launch
        from lumina_engine.run.directory import RunDirectory
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        run = RunDirectory(sys.argv[1])
        launch.start(run, [sys.executable, sys.argv[2], str(run.path)])
        """
    )
    run = runs.make(steps=300, pace=0)
    subprocess.run([sys.executable, "-c", script, str(run.path), WORKER], check=True, timeout=30)
    assert launch.wait(run, 20) == 0
    assert run.info().state == "finished" and run.metrics_path.stat().st_size <= 4000 and gap_free(run)
    assert run.log_path.read_text().count("records are lost") == 2, "once by the worker, once by the supervisor"
    assert json.loads(run.identity_path.read_text())["exit_code"] == 0
