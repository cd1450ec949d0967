"""Ranks on several machines: what goes to ssh and srun, the agents, the line; the other machines are played by this one."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_engine.run import launch, launchers
from lumina_engine.run.directory import RunDirectory, RunError
from lumina_engine.run.hosts import hosts_argv
from lumina_engine.run.line import Line
from lumina_engine.run.policy import HOST_LOST
from lumina_engine.run.process import Process, descendants, marked
from tests.waiting import until

from .conftest import Runs
from .looks import ranks_of, states, worker
from .test_hostfile import BAD_HOSTS

# ssh and srun as the network sees them: the words are kept, and run here by the shell that sshd would use, or as they are
FAKE = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
at = sys.argv.index("--")
if os.path.basename(sys.argv[0]) == "ssh":
    os.execv("/bin/sh", ["sh", "-c", sys.argv[at + 2]])
os.execvp(sys.argv[at + 1], sys.argv[at + 1:])
"""
AT_ONCE = {"restart_pause_s": 0.001}  # a restart would show
EVIL = ["$(touch canary)", "; touch canary", "`touch canary`", "a b", "'", '"', "*", "\\", "-oProxyCommand=touch canary"]


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with an ssh and an srun that lead back here; the file in which their argv are kept."""
    log = tmp_path / "argv.jsonl"
    (tmp_path / "bin").mkdir()
    for name in ("ssh", "srun"):
        fake = tmp_path / "bin" / name
        fake.write_text(FAKE.format(python=sys.executable, log=str(log)))
        fake.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    return log


def kept(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("by", ["ssh", "srun"])
def test_se08_words_arrive_as_they_are_and_the_environment_in_no_argv(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv("LUMINA_SOCKETS", f"/tmp/lh-{os.getpid()}")
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanary")
    monkeypatch.chdir(tmp_path)
    code = (
        "import json,os,sys; open('rank-' + os.environ['RANK'], 'w').write(json.dumps([sys.argv[1:], os.environ['HF_TOKEN']]))"
    )
    argv = hosts_argv([sys.executable, "-c", code, *EVIL], ["here", "there"], 2, by=by)
    assert argv[-len(EVIL) :] == EVIL, "one element each"
    assert subprocess.run(argv, timeout=60).returncode == 0
    for rank in range(4):
        assert json.loads((tmp_path / f"rank-{rank}").read_text()) == [EVIL, "hf_canarycanarycanary"]
    (words,) = kept(network)
    assert words[0] == by and "hf_canary" not in network.read_text()
    assert not (tmp_path / "canary").exists()


def test_c060_runs_that_start_together_meet_at_ports_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # it listens where it is told to, so that both ports are in use at once
    code = (
        "import os, socket, sys, time; rank, port = os.environ['RANK'], int(os.environ['MASTER_PORT']); "
        "held = rank == '0' and socket.create_server(('127.0.0.1', port)); "
        "open(sys.argv[1] + rank, 'w').write(str(port)); "
        "list(iter(lambda: time.sleep(0.01) or len(os.listdir('.')), 4))"
    )
    runs = [hosts_argv([sys.executable, "-c", code, name], ["localhost"], 2, port=0) for name in ("a", "b")]
    started = [subprocess.Popen(argv) for argv in runs]
    assert [process.wait(60) for process in started] == [0, 0]
    ports = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert ports["a0"] == ports["a1"] != ports["b0"] == ports["b1"] and 0 not in ports.values()


def test_se08_the_other_shell_gets_the_same_words(fault_random: random.Random) -> None:
    letters = "ab $`'\"\\;|&<>*?[]{}()~#!-=\té\x01"
    for _ in range(30):
        words = ["".join(fault_random.choices(letters, k=fault_random.randint(0, 12))) for _ in range(4)]
        code = "import sys; sys.stdout.write('\\0'.join(sys.argv[1:]))"
        remote = launchers.ssh_argv("a", [sys.executable, "-c", code, *words])[-1]
        assert shlex.split(remote)[3:] == words
        told = subprocess.run(["sh", "-c", remote], capture_output=True, check=True).stdout
        assert told.decode().split("\0") == words


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_se08_no_launcher_takes_a_bad_host(host: str) -> None:
    for build in (launchers.ssh_argv, launchers.srun_argv):
        with pytest.raises(RunError, match="is no host name"):
            build(host, ["true"])
    with pytest.raises(RunError, match="is no host name"):
        hosts_argv(["true"], ["a", host], 1)
    with pytest.raises(RunError, match="is no host name"):
        launchers.torchrun_argv(["true"], nodes=2, ranks=1, node_rank=0, address=host, port=1)


@pytest.mark.parametrize("word", ["a\0b", "a\nb", "a\rb"])
def test_se08_no_nul_and_no_line_break_goes_over(word: str) -> None:
    for build in (launchers.ssh_argv, launchers.srun_argv):
        with pytest.raises(RunError, match="line break"):
            build("a", ["echo", word])
    with pytest.raises(RunError, match="line break"):
        hosts_argv(["echo", word], ["a", "b"], 1)
    with pytest.raises(RunError, match="NCCL_X"):
        launchers.carried({"NCCL_X": word})


def test_what_goes_over_with_the_ranks() -> None:
    given = {
        "NCCL_DEBUG": "1",
        "HOME": "/h",
        "PATH": "/b",
        "LUMINA_INC": "3",
        "LUMINA_RANK_SOCKET": "/s",
        "GLOO_SOCKET_IFNAME": "x",
    }
    assert launchers.carried(given) == {"NCCL_DEBUG": "1", "LUMINA_INC": "3"}


def of_two(run_path: Path) -> list[str]:
    worker = Path(__file__).with_name("fake_rank.py")
    return hosts_argv([sys.executable, str(worker), str(run_path)], ["here", "there"], 1, timeout=5)


def test_c061_the_supervisor_sees_ranks_elsewhere_like_its_own(network: Path, runs: Runs) -> None:
    run = runs.make(ranks=["preempt", "preempt"])
    launch.start(run, of_two(run.path), world=2)
    until(lambda: [rank["step"] for rank in ranks_of(run)] == [1, 1], "both ranks")
    here, there = ranks_of(run)
    assert (here["host"], there["host"]) == (None, "there")
    assert Path(f"/proc/{there['pid']}/cmdline").read_bytes().split(b"\0")[1].endswith(b"fake_rank.py")
    assert run.signal(signal.SIGTERM)
    assert launch.wait(run, 20) == 75 and run.info().state == "preempted"


@pytest.mark.parametrize(("ranks", "words"), [(["polite", "kill"], "rank 1 on there died"), ([3, "polite"], "rank 0 says 3")])
def test_ft09_a_rank_elsewhere_tells_why(network: Path, runs: Runs, ranks: list[str | int], words: str) -> None:
    run = runs.make(ranks=ranks)
    launch.start(run, of_two(run.path), world=2, settings={"max_restarts": 0, "survivors_s": 0.1})
    assert launch.wait(run, 20) == 1
    assert words in (run.info().reason or "") and marked(run.identity()["nonce"]) == []


@pytest.mark.parametrize(
    ("other", "where"),
    [*((other, where) for other in ("starting", "polite", "bereft") for where in ("here", "there")), ("stuck", "there")],
)
def test_ft03_a_rank_told_to_leave_before_it_listens_preempts_the_run(
    network: Path, runs: Runs, other: str, where: str
) -> None:
    """Whether the other one leaves by the TERM of the launcher or by its flag, fails without its partner, or must be killed."""
    run = runs.make(ranks=[other, "starting"] if where == "there" else ["starting", other])
    launch.start(run, of_two(run.path), world=2, settings={**AT_ONCE, "survivors_s": 0.1 if other == "stuck" else 10.0})
    until(lambda: [rank["step"] for rank in ranks_of(run)] == [1, 1], "both ranks")
    os.kill(ranks_of(run)[where == "there"]["pid"], signal.SIGTERM)
    assert launch.wait(run, 20) == 75
    assert states(run)[-1] == (1, "preempted") and marked(run.identity()["nonce"]) == []


def test_ft03_a_rank_told_to_leave_before_it_has_said_a_word(runs: Runs) -> None:
    run = runs.make()
    launch.start(run, hosts_argv(["sleep", "600"], ["localhost"], 2), world=2, settings=AT_ONCE)
    os.kill(until(lambda: sleepers(run), "both ranks")[1].pid, signal.SIGTERM)
    assert launch.wait(run, 20) == 75 and states(run)[-1] == (1, "preempted")


def test_ft03_a_launcher_told_to_leave_while_its_ranks_start(runs: Runs) -> None:
    run = runs.make()
    launch.start(run, hosts_argv(["sleep", "600"], ["localhost"], 2), world=2, settings=AT_ONCE)
    until(lambda: sleepers(run), "both ranks")
    os.kill(worker(run).pid, signal.SIGTERM)
    assert launch.wait(run, 20) == 75 and states(run)[-1] == (1, "preempted")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_ft09_a_rank_that_dies_before_it_has_said_a_word_is_a_crash(runs: Runs, number: int) -> None:
    """Although the launcher's TERM is the end of the other one."""
    run = runs.make()
    launch.start(run, hosts_argv(["sleep", "600"], ["localhost"], 2), world=2, settings={"max_restarts": 0})
    os.kill(until(lambda: sleepers(run), "both ranks")[1].pid, number)
    assert launch.wait(run, 20) == 1
    assert states(run) == [(1, "preparing"), (1, "crashed"), (1, "failed")]


def sleepers(run: RunDirectory) -> list[Process]:
    """Both ranks, once they are `sleep`."""
    owner = run.owner()
    assert owner is not None
    found = [item for item in descendants(owner.pid) if Path(f"/proc/{item.pid}/comm").read_text() == "sleep\n"]
    return found if len(found) == 2 else []


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_ft_a_machine_that_is_gone_ends_the_run_and_is_named(network: Path, runs: Runs, how: str) -> None:
    run = runs.make(ranks=["stuck", "stuck"])
    launch.start(run, of_two(run.path), world=2)
    until(lambda: [rank["step"] for rank in ranks_of(run)] == [1, 1], "both ranks")
    rank = ranks_of(run)[1]["pid"]
    agent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(agent, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    assert launch.wait(run, 20) == 1
    row = run.info()
    why = "ended without a word" if how == "kill" else "no sign of life for 5 s"
    assert row.state == "failed" and "host there is lost" in (row.reason or "") and why in (row.reason or "")
    assert marked(run.identity()["nonce"]) == []


def test_ft_the_end_of_the_line_ends_the_ranks_elsewhere(network: Path, runs: Runs) -> None:
    run = runs.make(ranks=["stuck", "stuck"])
    launch.start(run, of_two(run.path), world=2)
    until(lambda: [rank["step"] for rank in ranks_of(run)] == [1, 1], "both ranks")
    owner, nonce = run.owner(), run.identity()["nonce"]
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    until(lambda: marked(nonce) == [], "all ranks to end with the supervisor")


def test_c061_an_agent_that_cannot_start_is_a_lost_machine(network: Path, runs: Runs) -> None:
    (network.parent / "bin" / "ssh").write_text("#!/bin/sh\necho 'ssh: there: no route' >&2\nexit 255\n")
    run = runs.make(ranks=["stuck", "stuck"])
    launch.start(run, of_two(run.path), world=2)
    assert launch.wait(run, 20) == 1
    assert "host there is lost: its agent cannot be started (ssh ended with 255)" in (run.info().reason or "")
    assert "no route" in run.log_path.read_text()


def test_a_line_skips_a_greeting_and_ends_when_nobody_takes_it() -> None:
    reading, writing = os.pipe()
    back, out = os.pipe()
    line = Line(reading, out)
    os.write(writing, b'welcome!\n{"op": "up"}\n[1]\n{"no": 1}\n{"op": "al')
    assert [message["op"] for message in line.receive()] == ["up"]
    assert line.noise == ["welcome!", "[1]", '{"no": 1}']
    os.write(writing, b'ive"}\n')
    assert [message["op"] for message in line.receive()] == ["alive"]
    while not line.ended:
        line.send(op="x", data="y" * 100_000)
    os.close(back)
    line.close()
    os.close(writing)
    assert HOST_LOST not in (0, 1, 2, 65, 75, 93, 130)
