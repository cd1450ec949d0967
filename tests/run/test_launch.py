"""argv and environment of ranks, waiting, restart decisions, engine.log."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina_engine.run import launch, output, policy
from lumina_engine.run.directory import RunDirectory, RunError
from lumina_engine.run.interface import free_port
from lumina_engine.run.process import boot_id, descendants, held, leash, myself, process, wait_gone


def config(**changes: Any) -> Any:
    one = {"launcher": "auto", "master_addr": "auto", "master_port": "auto", "num_nodes": 1, "node_rank": None}
    return SimpleNamespace(**{**one, "hostfile": None, "hang_timeout_s": 60.0, **changes})


def test_c060_one_rank_is_the_worker_itself() -> None:
    assert launch.rank_argv(config(), "/runs/a b", 1) == [sys.executable, "-m", "lumina_engine.training.worker", "/runs/a b"]


def test_c060_more_ranks_are_started_here_and_meet_on_loopback() -> None:
    argv = launch.rank_argv(config(), "/runs/$(touch x)", 4)
    assert argv[:3] == [sys.executable, "-m", "lumina_engine.run.hosts"]
    assert argv[-5:] == ["--", *launch.rank_argv(config(), "/runs/$(touch x)", 1)], "one element, no shell"
    assert {"--ranks=4", "--host=localhost", "--address=127.0.0.1", "--port=0"} <= set(argv)


def test_c060_torchrun_where_it_is_asked_for() -> None:
    argv = launch.rank_argv(config(launcher="torchrun"), "/runs/$(touch x)", 4)
    assert argv[:3] == [sys.executable, "-m", "lumina_engine.training.torchrun"]
    assert argv[-3:] == ["-m", "lumina_engine.training.worker", "/runs/$(touch x)"], "one element, no shell"
    assert {"--nproc-per-node=4", "--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", "--max-restarts=0"} <= set(argv)


def test_c061_torchrun_on_each_machine() -> None:
    by_hand = config(num_nodes=3, node_rank=2, master_addr="10.0.0.1", master_port=31_000)
    argv = launch.rank_argv(by_hand, "/r", 12)
    assert {"--nproc-per-node=4", "--nnodes=3", "--node-rank=2", "--master-addr=10.0.0.1", "--master-port=31000"} <= set(argv)


def test_c061_machines_of_a_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-b slots=4\nlocalhost slots=2\nnode-c\n")
    several = config(num_nodes=2, hostfile=str(tmp_path / "hosts"), master_addr="10.0.0.1", hang_timeout_s=7.0)
    argv = launch.rank_argv(several, "/r", 4)
    assert [word for word in argv if word.startswith("--host=")] == ["--host=localhost", "--host=node-b"], "this one first"
    assert {"--ranks=2", "--by=ssh", "--address=10.0.0.1", "--port=29500", "--timeout=3.5"} <= set(argv)


def test_c061_machines_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "gpu[08-10]")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu09")
    argv = launch.rank_argv(config(num_nodes=3, launcher="srun", master_addr="gpu09"), "/r", 3)
    assert [word for word in argv if word.startswith("--host=")] == ["--host=gpu09", "--host=gpu08", "--host=gpu10"]
    assert "--by=srun" in argv


def test_c060_torchrun_knows_the_options() -> None:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    source = (Path(found.origin).parent / "distributed" / "run.py").read_text()
    for word in launch.rank_argv(config(launcher="torchrun"), "/r", 2)[3:-3]:
        assert f'"{word.partition("=")[0]}"' in source, word


@pytest.mark.parametrize(
    ("changes", "world", "word"),
    [
        ({"launcher": "srun", "num_nodes": 2}, 2, "works inside a Slurm job"),
        ({"num_nodes": 2}, 2, "needs a list of machines"),
        ({"launcher": "torchrun", "master_addr": "-oProxyCommand=x"}, 2, "is no host name"),
        ({"num_nodes": 2, "node_rank": 0, "master_addr": "a$(touch x)"}, 2, "is no host name"),
        ({"master_addr": "-oProxyCommand=x"}, 2, "is no host name"),
        ({"master_addr": "a;touch x"}, 2, "is no host name"),
        ({"master_addr": "a\n"}, 2, "is no host name"),
    ],
)
def test_se08_what_cannot_be_launched(changes: dict[str, Any], world: int, word: str) -> None:
    with pytest.raises(RunError, match=word) as caught:
        launch.rank_argv(config(**changes), "/r", world)
    assert caught.value.exit_code == 2


def test_a_port_in_use_is_not_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert free_port(taken) not in (taken, 0)


def test_the_environment_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(tmp_path, "r")
    base = {"HOME": "/h", "RANK": "7", "LUMINA_RESUME": "1", "LUMINA_NONCE": "old", "PYTHONPATH": "/a:/b", "HF_TOKEN": "kept"}
    environment = launch.environment(run, base)
    assert environment["HOME"] == "/h" and environment["HF_TOKEN"] == "kept"
    assert {"RANK", "LUMINA_RESUME", "LUMINA_NONCE"}.isdisjoint(environment), "marks of another run"
    package = str(Path(launch.__file__).parents[2])
    assert environment["PYTHONPATH"] == os.pathsep.join([package, "/a", "/b"])
    added = launch.rank_environment(run, channel=Path("/c"), nonce="n", inc=3, resume=True, world=1)
    assert added["LUMINA_INC"] == "3" and added["LUMINA_RESUME"] == "1" and added["LUMINA_SUPERVISOR"] == str(os.getpid())
    assert (added["RANK"], added["WORLD_SIZE"], added["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    more = launch.rank_environment(run, channel=Path("/c"), nonce="n", inc=1, resume=False, world=2)
    assert "RANK" not in more and "LUMINA_RESUME" not in more


def test_se09_no_secret_in_run_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(tmp_path, "r")
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    launch.start(run, [sys.executable, "-c", "import sys; sys.exit(65)"])
    assert launch.wait(run, 20) == 65
    for path in run.path.rglob("*"):
        assert not path.is_file() or b"hf_abcdefghij" not in path.read_bytes()


def test_se05_a_run_with_linked_checkpoints_is_not_started(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", "r")
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(tmp_path)
    with pytest.raises(RunError, match=f"r/checkpoints is a symbolic link to {tmp_path}") as caught:
        launch.start(run, ["true"], resume=True)
    assert caught.value.exit_code == 65 and not run.log_path.exists()


def test_wait_gives_up_at_its_deadline(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "r")
    lock = run.lock()
    me = myself()
    run.update_identity(pid=me.pid, start_time=me.start, boot_id=boot_id(), state="running")
    before = time.monotonic()
    assert launch.wait(run, 0.05) is None
    assert time.monotonic() - before < 20
    lock.release()


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (0, "finished"),
        (2, "failed"),
        (65, "failed"),
        (75, "preempted"),
        (93, "failed"),
        (130, "finished"),
        (1, None),
        (-9, None),
    ],
)
def test_exit_codes_and_states(code: int, state: str | None) -> None:
    assert policy.final_state(code) == state


def test_ft08_pauses_double_and_progress_resets_them() -> None:
    rule = policy.RestartPolicy(3)
    assert [rule.crashed() for _ in range(4)] == [1.0, 2.0, 4.0, None]
    rule = policy.RestartPolicy(3)
    pauses = []
    for step in (100, 100, 150, 150):
        rule.verified(step)
        pauses.append(rule.crashed())
    assert pauses == [1.0, 2.0, 1.0, 2.0], "a first checkpoint is progress, the same step again is none"
    rule = policy.RestartPolicy(100)
    assert [rule.crashed() for _ in range(100)][-1] == 60.0
    assert policy.RestartPolicy(0).crashed() is None


def test_ft08_a_start_from_a_newer_step_is_progress_and_one_from_an_older_step_is_none() -> None:
    rule = policy.RestartPolicy(3)
    rule.resumed(10)
    assert [rule.crashed(), rule.crashed()] == [1.0, 2.0]
    rule.resumed(12)  # an emergency save: no checkpoint of that step was ever told
    assert rule.crashed() == 1.0
    rule.resumed(5)  # what was newer did not pass its digests
    assert rule.crashed() == 2.0
    rule.verified(10)
    assert rule.crashed() == 1.0


@pytest.mark.parametrize(
    ("code", "tail", "text"),
    [
        (-9, "", "the worker was killed by SIGKILL (by hand, or by the kernel for want of memory)"),
        (-11, "", "the worker was killed by SIGSEGV"),
        (-64, "", "the worker was killed by SIGRTMAX"),
        (-99, "", "the worker was killed by signal 99"),
        (3, "", "the worker ended with exit code 3"),
        (
            1,
            "x\n  torch.OutOfMemoryError: no room\nbye\n",
            "the worker ended with exit code 1: torch.OutOfMemoryError: no room",
        ),
        (1, "Error rate 5\nTraceback:\n", "the worker ended with exit code 1"),
    ],
)
def test_ft09_causes(code: int, tail: str, text: str) -> None:
    assert policy.cause(code, tail) == text


def test_ps16_the_cap_keeps_one_copy_and_appends_go_on(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    with path.open("ab", buffering=0) as file:
        file.write(b"a" * 1000)
        output.cap(path, 1000)
        assert not (tmp_path / "engine.log.1").exists()
        file.write(b"b")
        output.cap(path, 1000)
        file.write(b"next\n")
    assert path.read_bytes() == b"next\n"
    assert (tmp_path / "engine.log.1").read_bytes() == b"a" * 1000 + b"b"
    output.cap(tmp_path / "missing", 10)


def test_ck07_the_cap_frees_space_even_if_the_copy_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine.log"
    path.write_bytes(b"a" * 100)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.shutil, "copyfile", full)
    output.cap(path, 10)
    assert path.read_bytes() == b""


def test_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_text("old\n")
    mark = path.stat().st_size
    with path.open("a") as file:
        file.write("one\n\ntwo\nthree\nfour\n")
    assert output.last_lines(path, mark) == "two | three | four"
    assert output.last_lines(path, mark, 9) == "one | two | three | four"
    assert output.last_lines(tmp_path / "missing") == ""


@pytest.mark.parametrize("handler", [lambda *_: None, signal.SIG_IGN], ids=["caught", "ignored"])
def test_ft03_term_before_the_program_is_executed_is_not_lost(handler: Any) -> None:
    """Between fork and exec, with a starter that catches TERM (the supervisor, hosts.py) or ignores it (the agent)."""
    tie = leash(os.getpid())

    def prepare() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        tie()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with held():
            child = subprocess.Popen(["sleep", "600"], preexec_fn=prepare)
        try:
            code = child.wait(10)
        finally:
            child.kill()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == (-signal.SIGTERM)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ft03_term_ends_a_program_that_does_not_listen_whatever_its_starter_does() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        child = subprocess.Popen(["sleep", "600"], preexec_fn=leash(os.getpid()))
    finally:
        signal.signal(signal.SIGTERM, before)
    child.terminate()
    try:
        assert child.wait(10) == -signal.SIGTERM
    finally:
        child.kill()


@pytest.mark.parametrize("code", [0, 3, -signal.SIGTERM])
def test_a_process_ends_as_it_says(code: int) -> None:
    program = f"import signal; from lumina_engine.run.process import end_as; signal.signal(15, lambda *_: 0); end_as({code})"
    assert subprocess.run([sys.executable, "-c", program]).returncode == code


def test_processes_are_named_for_ever() -> None:
    child = subprocess.Popen(["sleep", "600"])
    found = process(child.pid)
    assert found is not None and found.alive and found.parent == os.getpid()
    assert child.pid in [item.pid for item in descendants(os.getpid())]
    assert not wait_gone([found], 0.01)
    child.send_signal(signal.SIGKILL)
    assert wait_gone([found], 20)
    assert not found.alive, "a zombie has ended"
    child.wait()
    assert process(child.pid) is None and wait_gone([found], 0)
