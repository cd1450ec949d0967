"""Commands and viewers of a real run, and its engine.log."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import last_records, read_records
from lumina_engine.run import launch
from lumina_engine.run.client import RunClient, send_command
from lumina_engine.run.directory import RunError
from lumina_engine.run.process import descendants
from tests.waiting import DEADLINE, until

from .conftest import WORKER, Runs
from .looks import LAUNCHER_OF_TWO, gap_free, ranks_of, step, with_id, worker


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


def test_ps14_double_stop_and_repeated_ids(runs: Runs) -> None:
    run = runs.running(deaf=False, pace=0.05)
    with RunClient(run) as one, RunClient(run) as two:
        assert one.send_command("stop", {"save": False}, "s1")["ok"]
        assert two.send_command("stop", {"save": False}, "s1")["ok"]
    assert launch.wait(run, 20) == 0
    effects = [record for record in read_records(run.metrics_path) if getattr(record, "id", None) == "s1"]
    assert [record.state for record in effects if isinstance(record, rec.Run)] == ["stopping", "finished"]
    assert not last_records(run.metrics_path, 1, ["checkpoint"])


def test_ps14_a_stop_while_the_run_is_stopping_is_the_same_stop(runs: Runs) -> None:
    run = runs.running(gathers=2)
    with RunClient(run) as one, RunClient(run) as two:
        assert one.send_command("stop", {}, "s1")["ok"]
        assert two.send_command("stop", {}, "s2") == {"op": "reply", "id": "s2", "ok": True}
        refused = two.send_command("pause", {}, "p")
        assert not refused["ok"] and "stopping already" in refused["error"]
        assert one.send_command("stop", {"save": False}, "s3")["ok"], "the second one that the worker gets"
    assert launch.wait(run, 20) == 0
    assert isinstance(with_id(run, "s2"), rec.Note), "its effect is told, so its sender waits for nothing"
    assert not last_records(run.metrics_path, 1, ["checkpoint"]), "s3 asked for none, before the worker came to s1"
    assert run.info().state == "finished" and gap_free(run)


def test_ps14_a_command_that_died_with_its_incarnation_is_given_to_the_next(runs: Runs) -> None:
    run = runs.running(settings={"restart_pause_s": 0.001}, deaf_in=1)
    with RunClient(run) as client:
        assert client.send_command("set_lr", {"lr": 3e-4}, "once")["ok"]
        assert client.send_command("checkpoint", {}, "then")["ok"]
    os.kill(worker(run).pid, signal.SIGKILL)
    until(lambda: with_id(run, "then"), "the effect in the second incarnation")
    effects = [(record.inc, record.id) for record in read_records(run.metrics_path) if getattr(record, "id", None)]
    assert effects == [(2, "once"), (2, "then")]


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
    until(lambda: [rank for rank in ranks_of(run) if rank["step"]], "a heartbeat")
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


def test_ft02_int_to_a_deaf_worker_ends_with_130_and_finished_as_any_int(runs: Runs) -> None:
    run = runs.running(settings={"preempt_grace_s": 0.2}, deaf=True, pace=0)
    until(lambda: [rank for rank in ranks_of(run) if rank["step"]], "a heartbeat")
    os.kill(worker(run).pid, signal.SIGSTOP)
    assert run.signal(signal.SIGINT)
    assert launch.wait(run, 20) == 130
    assert run.info().state == "finished" and "was killed" in (run.info().reason or "")


def test_stop_between_two_starts(runs: Runs) -> None:
    run = runs.start(runs.make(crash={"*": "1"}), restart_pause_s=1000)
    until(lambda: run.info().state == "crashed" and run.alive)
    with RunClient(run) as client:
        refused = client.send_command("pause")
        assert not refused["ok"] and "between two starts" in refused["error"]
        assert client.send_command("stop", {}, "s1")["ok"]
    assert launch.wait(run, 20) == 0
    assert run.info().state == "finished" and with_id(run, "s1") is not None


def test_a_stop_that_a_starting_worker_never_hears_ends_it_all_the_same(runs: Runs) -> None:
    run = runs.make()
    launch.start(run, ["sleep", "600"], settings={"preempt_grace_s": 0.1})
    assert send_command(run, "stop")["ok"]
    assert launch.wait(run, 20) == 0
    assert (run.info().state, run.info().reason) == ("finished", "stopped before its first step")


@pytest.mark.parametrize("resume", [False, True])
def test_ps15_a_stop_ends_a_worker_that_goes_on_tokenising(runs: Runs, resume: bool) -> None:
    """Its reports say that it moves, and it hears no command before its first step: only the grace ends it."""
    run = runs.start(runs.make(tokenises=True), resume=resume, preempt_grace_s=0.2)
    until(lambda: [rank for rank in ranks_of(run) if rank["step"]], "a document")
    assert send_command(run, "stop")["ok"]
    assert launch.wait(run, 20) == 0
    assert (run.info().state, run.info().reason) == ("finished", "stopped before its first step")


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


def test_ps05_200_viewers_that_come_at_random_over_restarts_and_rewinds(runs: Runs, fault_seed: int) -> None:
    """Each reads file and stream from the first record to a random one behind its attachment: 1, 2, 3 … to that one."""
    crashes = {str(inc): "kill" for inc in range(1, 5)}
    settings = {"restart_pause_s": 0.001}
    run = runs.running(settings=settings, pace=0.004, crash=crashes, crash_after=130, checkpoint_every=50)
    done: list[int] = []
    wrong: list[list[int]] = []

    def watch(generator: random.Random) -> None:
        while len(done) < 200 or run.info().inc < 5:
            with RunClient(run, timeout=DEADLINE) as client:
                last = client.hello["head_seq"] + generator.randrange(1, 40)
                seqs = []
                for record in client.records():
                    seqs.append(record.seq)
                    if record.seq >= last:
                        break
            if seqs != list(range(1, len(seqs) + 1)) or len(seqs) < last:
                wrong.append(seqs)
            done.append(len(seqs))

    viewers = [threading.Thread(target=watch, args=(random.Random(f"{fault_seed}:{number}"),)) for number in range(8)]
    for viewer in viewers:
        viewer.start()
    for viewer in viewers:
        viewer.join()
    assert wrong == [] and len(done) >= 200
    rewinds = [record.to_step for record in read_records(run.metrics_path) if isinstance(record, rec.Rewind)]
    assert len(rewinds) == 4 and rewinds[0] == 100
    assert send_command(run, "stop")["ok"] and launch.wait(run, 20) == 0 and gap_free(run)


def test_ps02_100_killed_viewers_leave_nothing(runs: Runs) -> None:
    run = runs.running()
    owner = run.owner()
    assert owner is not None
    rank = worker(run)

    def counts() -> list[int]:
        folders = [Path(f"/proc/{pid}/{what}") for pid in (owner.pid, rank.pid) for what in ("fd", "task")]
        return [len(list(folder.iterdir())) for folder in folders]

    def resident() -> list[int]:
        return [psutil.Process(pid).memory_info().rss for pid in (owner.pid, rank.pid)]

    until(lambda: ranks_of(run), "the rank's connection")
    with RunClient(run, timeout=DEADLINE) as permanent:
        stop, seqs = threading.Event(), []

        def watch() -> None:
            for record in permanent.records():
                seqs.append(record.seq)
                if stop.is_set():
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        samples: list[list[int]] = []  # what is open for a moment only (run.json, the log) does not count
        until(lambda: len(samples) > 30 or samples.append(counts()))  # type: ignore[func-returns-value]
        before, memory = [min(column) for column in zip(*samples, strict=True)], resident()
        for _ in range(10):
            child = subprocess.Popen(
                [sys.executable, "-c", TEN_VIEWERS, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert child.stdout is not None and child.stdin is not None
            assert child.stdout.readline() == b"on\n"
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()
        until(lambda: all(now <= then for now, then in zip(counts(), before, strict=True)), "all to be as before")
        assert all(now - then <= 5e6 for now, then in zip(resident(), memory, strict=True))
        stop.set()
        watcher.join()
    assert seqs == list(range(1, len(seqs) + 1)) and len(seqs) > 100


TEN_VIEWERS = """
import sys
from lumina_engine.run.client import RunClient
from lumina_engine.run.directory import RunDirectory
clients = [RunClient(RunDirectory(sys.argv[1])) for _ in range(10)]
for client in clients:
    client.read_line()
print("on", flush=True)
sys.stdin.read()
"""


def test_the_hello_knows_the_ranks(runs: Runs) -> None:
    run = runs.running()

    (rank,) = until(lambda: [item for item in ranks_of(run) if item["step"]], "a heartbeat")
    assert rank["rank"] == 0 and rank["pid"] == worker(run).pid and rank["section"] in ("data", "step", "save")
    assert 0 <= rank["age_s"] < 20


def test_c131_ranks_are_told_whenever_a_viewer_asks(runs: Runs) -> None:
    run = runs.running()
    with RunClient(run) as client:
        assert client.hello["asks"] == ["ranks"] and client.hello["world"] == 1
        (first,) = until(lambda: [item for item in client.ask("ranks")["ranks"] if item["step"]], "a heartbeat")
        until(lambda: client.ask("ranks")["ranks"][0]["step"] > first["step"], "the heartbeat to go on")
        (rank,) = client.ask("ranks")["ranks"]
        assert (rank["rank"], rank["pid"], rank["connected"], rank["exit_code"]) == (0, worker(run).pid, True, None)
        assert isinstance(rank["age_s"], float) and client.send_command("checkpoint")["ok"], "commands work beside it"


def test_c131_a_rank_that_has_died_is_told_while_the_others_wait_for_it(runs: Runs) -> None:
    run = runs.make(ranks=["kill", "stuck"])
    launch.start(run, [sys.executable, LAUNCHER_OF_TWO, str(run.path)], world=2, settings={"survivors_s": 60.0})
    with RunClient(run) as client:
        ranks = until(
            lambda: [item for item in client.ask("ranks")["ranks"] if not item["connected"]] and client.ask("ranks")["ranks"],
            "the first rank to die",
        )
    assert [(item["rank"], item["connected"], item["exit_code"]) for item in ranks] == [(0, False, None), (1, True, None)]


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


def test_ps16_a_worker_without_output_goes_on(runs: Runs) -> None:
    run = runs.running(close_output=True)
    until(lambda: step(run) > 50, "steps without stdout and stderr")
    assert send_command(run, "stop")["ok"] and launch.wait(run, 20) == 0 and run.info().inc == 1


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
