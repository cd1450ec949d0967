"""The channel between a rank and its supervisor, without a supervisor around it."""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumina_engine.run import rank as module
from lumina_engine.run.channel import RankServer
from lumina_engine.run.directory import RunError
from lumina_engine.run.policy import HOST_LOST
from lumina_engine.run.rank import Command, NullChannel, RankChannel
from tests.waiting import until


class Server:
    """A RankServer with its loop in a thread."""

    def __init__(self, path: Path, world: int = 2) -> None:
        self.selector = selectors.DefaultSelector()
        self.ranks = RankServer(path, self.selector, "secret", world)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def loop(self) -> None:
        while not self.stopping.is_set():
            for key, _ in self.selector.select(0.01):
                key.data()
            self.ranks.tick()

    def end(self) -> None:
        self.stopping.set()
        self.thread.join()
        self.ranks.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module.os, "_exit", lambda code: sys.exit(code))  # ends the thread instead of the tests
    made = Server(tmp_path / "s" / "a.rank")
    yield made
    made.end()


def test_without_supervisor_there_is_a_null_channel() -> None:
    for environment in ({}, {"LUMINA_NONCE": "x"}, {"LUMINA_RANK_SOCKET": "/x"}):
        channel = RankChannel.from_environment(environment)
        assert type(channel) is NullChannel and not channel.supervised
        channel.report(1, "step")
        assert channel.poll() == []
        channel.leave(0)


def test_a_supervisor_that_is_gone_refuses_the_rank(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="does not answer"):
        RankChannel(str(tmp_path / "none"), "secret", 0)


def test_commands_go_to_rank_0_only(server: Server) -> None:
    one = RankChannel(str(server.ranks.path), "secret", 1)
    until(lambda: 1 in server.ranks.ranks)
    assert server.ranks.send(Command("a", "pause")) is None, "kept until rank 0 comes"
    zero = RankChannel(str(server.ranks.path), "secret", 0)
    until(lambda: server.ranks.connected)
    assert server.ranks.send(Command("b", "set_lr", {"lr": 0.1})) is None
    got: list[Command] = []
    while len(got) < 2:
        got += until(zero.poll)
    assert got == [Command("a", "pause"), Command("b", "set_lr", {"lr": 0.1})]
    assert one.poll() == []
    one.leave(0)
    zero.leave(0)


def test_the_newest_heartbeat_counts(server: Server) -> None:
    channel = RankChannel(str(server.ranks.path), "secret", 0)
    for step in range(1000):
        channel.report(step, "forward")
    channel.report(1000, "save")
    until(lambda: 0 in server.ranks.ranks and server.ranks.ranks[0].section == "save")
    state = server.ranks.ranks[0]
    assert state.step == 1000 and server.ranks.shown()[0]["section"] == "save"
    at = state.at
    channel.report(1001, "save")
    until(lambda: state.at > at)
    channel.leave(75, "preempted")
    until(lambda: state.exit_code == 75)
    assert state.exit_reason == "preempted"


def test_the_last_beat_before_leaving_is_told(server: Server) -> None:
    channel = RankChannel(str(server.ranks.path), "secret", 0)
    until(lambda: 0 in server.ranks.ranks)
    channel.report(7, "step")
    channel.leave(0)
    until(lambda: server.ranks.ranks[0].exit_code == 0)
    assert server.ranks.ranks[0].step == 7


@pytest.mark.parametrize(
    "hello",
    [
        {"op": "hello", "nonce": "wrong", "rank": 0},
        {"op": "hello", "nonce": "secret", "rank": 2},
        {"op": "hello", "nonce": "secret", "rank": -1},
        {"op": "hello", "nonce": "secret", "rank": "0"},
        {"op": "hello", "rank": 0},
        {"op": "beat", "step": 1, "section": "x"},
        [],
    ],
)
def test_s12_strangers_are_refused(server: Server, hello: object) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(20)
        stranger.connect(str(server.ranks.path))
        stranger.send(json.dumps(hello).encode())
        assert stranger.recv(100) == b""
    assert server.ranks.ranks == {}


def test_a_second_process_cannot_be_the_same_rank(server: Server) -> None:
    channel = RankChannel(str(server.ranks.path), "secret", 0)
    until(lambda: server.ranks.connected)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as second:
        second.settimeout(20)
        second.connect(str(server.ranks.path))
        second.send(b'{"op": "hello", "nonce": "secret", "rank": 0}')
        assert second.recv(100) == b""
    assert server.ranks.connected
    channel.leave(0)


def test_garbage_from_a_rank_ends_its_connection_only(server: Server) -> None:
    channel = RankChannel(str(server.ranks.path), "secret", 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.settimeout(20)
        other.connect(str(server.ranks.path))
        other.send(b'{"op": "hello", "nonce": "secret", "rank": 0}')
        for message in (b'{"op": "beat", "step": "x"}', b'{"op": "exit", "code": null}', b'{"op": "unknown"}'):
            other.send(message)
        other.send(b"[" * 60_000)
        assert other.recv(100) == b""
    assert server.ranks.ranks[0].step is None and server.ranks.ranks[0].exit_code is None
    channel.report(3, "data")
    until(lambda: server.ranks.ranks[1].step == 3)
    channel.leave(0)


def test_too_many_waiting_commands_are_refused(server: Server) -> None:
    answers = [server.ranks.send(Command(str(number), "pause")) for number in range(100)]
    assert answers[0] is None and "too many" in (answers[-1] or "")
    server.ranks.reset()
    assert server.ranks.send(Command("x", "pause")) is None


def test_ps10_a_deleted_socket_is_there_again_for_the_next_start(tmp_path: Path) -> None:
    made = RankServer(tmp_path / "s" / "a.rank", selectors.DefaultSelector(), "secret", 1)
    made.path.unlink()
    made.path.parent.rmdir()
    made.renew()
    inode = made.path.lstat().st_ino
    made.renew()
    assert made.path.lstat().st_ino == inode
    made.path.unlink()
    made.path.write_text("mine")
    with pytest.raises(RunError, match="remove it"):
        made.renew()


def test_ps07_the_end_of_the_channel_ends_the_process(tmp_path: Path) -> None:
    made = Server(tmp_path / "s" / "a.rank")
    script = (
        "import sys, threading; from lumina_engine.run.rank import RankChannel\n"
        "RankChannel(sys.argv[1], 'secret', 0)\nprint('on', flush=True)\nthreading.Event().wait()"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(made.ranks.path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"on\n"
    until(lambda: made.ranks.connected)
    made.end()
    assert child.wait(20) == module.ORPHAN_EXIT_CODE
    child.stdout.close()


def test_the_channel_is_standard_library_only() -> None:
    script = (
        "import sys; before = set(sys.modules); import lumina_engine.run.rank\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*loaded - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lumina_engine"]


def test_a_lost_machine_is_the_cause_whoever_fell_first(server: Server) -> None:
    zero = RankChannel(str(server.ranks.path), "secret", 0)
    until(lambda: server.ranks.connected)
    zero.leave(1, "RuntimeError: connection closed by peer")
    until(lambda: server.ranks.failure)
    relay = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    relay.connect(str(server.ranks.path))
    hello = {"op": "hello", "nonce": "secret", "rank": 1, "host": "node-b", "pid": 77}
    relay.send(json.dumps(hello).encode())
    until(lambda: 1 in server.ranks.ranks)
    shown = {item["rank"]: (item["host"], item["pid"]) for item in server.ranks.shown()}
    assert shown == {0: (None, os.getpid()), 1: ("node-b", 77)}
    relay.send(json.dumps({"op": "exit", "code": HOST_LOST, "reason": "node-b is gone"}).encode())
    failure = until(lambda: server.ranks.failure and server.ranks.failure.code == HOST_LOST and server.ranks.failure)
    assert (failure.who, failure.reason) == ("rank 1 on node-b", "node-b is gone")
    relay.close()


@pytest.mark.parametrize("how", ["an error", "without a word"])
def test_ft09_a_rank_that_left_as_it_was_told_is_not_the_cause(server: Server, how: str) -> None:
    """The word of the one that was ended may come before that of the one that it was ended for."""
    zero = RankChannel(str(server.ranks.path), "secret", 0)
    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.connect(str(server.ranks.path))
    one.send(json.dumps({"op": "hello", "nonce": "secret", "rank": 1}).encode())
    until(lambda: len(server.ranks.ranks) == 2)
    zero.leave(75, "told to leave")
    until(lambda: server.ranks.failure)
    if how == "an error":
        one.send(json.dumps({"op": "exit", "code": 1, "reason": "RuntimeError: x"}).encode())
    else:
        one.close()
    failure = until(lambda: server.ranks.failure and server.ranks.failure.rank == 1 and server.ranks.failure)
    assert failure.code == (1 if how == "an error" else None)
