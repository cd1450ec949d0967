"""The viewers' socket: hello, whole lines, gaps, limits, hostile lines."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.run import socket as module
from lumina_engine.run.socket import MAX_CLIENTS, QUEUE_LIMIT
from lumina_engine.run.tail import Chunk
from tests.waiting import DEADLINE, until

from .viewers import Server, Viewer, closing_word, emit


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.end()


def test_ps05_hello_names_the_head_and_its_offset(server: Server) -> None:
    emit(server, 5)
    until(lambda: server.tail.head_seq == 5)
    viewer = Viewer(server)
    assert viewer.hello == {
        "op": "hello", "proto": 1, "run": "r", "inc": 1, "state": "running", "head_seq": 5, "offset": server.log.offset,
    }  # fmt: skip
    emit(server, 1)
    line = viewer.file.readline()
    assert line == server.metrics.read_bytes().splitlines(keepends=True)[5], "the record exactly as in the file"
    viewer.close()


def test_ps05_attach_at_random_seq_50_times(server: Server, fault_random: random.Random) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            emit(server, 1, 40)
            if server.log.seq % 37 == 0:  # garbage between records must not shift anything
                os.write(server.log._fd, b"\0\0 not a record\n")
                server.log._end += 16
            stop.wait(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            viewer = Viewer(server)
            head = viewer.follow(viewer.hello["head_seq"] + fault_random.randrange(1, 8))
            assert head == list(range(1, head[-1] + 1))
            viewer.close()
    finally:
        stop.set()
        writer.join()


def test_a_line_arrives_only_whole(server: Server) -> None:
    viewer = Viewer(server)
    line = rec.encode(rec.Note(seq=1, message="half"))
    os.write(server.log._fd, line[:10])
    emitted = threading.Event()
    viewer.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        viewer.socket.recv(1)
    viewer.socket.settimeout(DEADLINE)
    os.write(server.log._fd, line[10:])
    emitted.set()
    assert viewer.socket.recv(1000) == line
    viewer.close()


def test_ps03_eight_that_never_read_and_one_that_misses_nothing(server: Server) -> None:
    stalled = [Viewer(server) for _ in range(8)]
    good = Viewer(server)
    last = emit(server, 6000, 200)  # ~1.5 MB: far more than a socket and 256 KiB hold
    assert good.follow(last) == list(range(1, last + 1))
    until(lambda: server.tail.head_seq == last)
    queued = [client.queued for client in server.viewers._clients.values()]
    assert max(queued) <= QUEUE_LIMIT
    for viewer in stalled:  # whoever reads at last is led back to the file
        assert viewer.follow(last) == list(range(1, last + 1))
        assert viewer.gaps >= 1
        viewer.close()
    good.close()


def stalled(server: Server) -> int:
    """Viewers for whom something waits, and not only for a moment."""
    counts: list[int] = []

    def look() -> bool:
        counts.append(sum(bool(client.output) for client in list(server.viewers._clients.values())))
        return len(counts) == 6

    until(look)
    return min(counts)


class Blocked:
    """A connection that takes nothing until it is opened."""

    def __init__(self) -> None:
        self.open = False
        self.got = b""

    def send(self, data: memoryview) -> int:
        if not self.open:
            raise BlockingIOError
        self.got += bytes(data)
        return len(data)


def test_ps03_a_client_for_whom_everything_was_dropped_still_hears_of_the_gap() -> None:
    connection = Blocked()
    client = module._Client(connection, 0.0)  # type: ignore[arg-type]
    for number in range(6):
        client.put_chunk(Chunk(b"x" * 65_536, 65_536 * number, number + 1, number + 1))
        client.flush(number + 1, 0.0)
    connection.open = True
    client.flush(6, 0.0)
    gap, _, rest = connection.got.partition(b"\n")
    assert json.loads(gap) == {"op": "gap", "from": 1, "to": 5, "offset": 0} and rest == b"x" * 65_536
    assert not client.output and client.gap is None and client.queued == 0


def test_ps03_stalled_for_too_long_is_dropped(server: Server) -> None:
    viewer = Viewer(server)
    idle = Viewer(server)
    until(lambda: emit(server, 500, 200) and stalled(server) > 0)
    last = emit(server, 1)
    assert idle.follow(last)[-1] == last
    idle.socket.settimeout(0.05)
    until(lambda: not read_away(idle) and stalled(server) == 1)
    idle.socket.settimeout(DEADLINE)
    server.clock = lambda: time.monotonic() + module.STALL_TIME + 5
    until(lambda: len(server.viewers._clients) == 1)
    emit(server, 1)
    assert read_away(idle), "a viewer with nothing to read is not stalled"
    viewer.close()
    idle.close()


def read_away(viewer: Viewer) -> bool:
    """Throw away what has come; whether there was something."""
    try:
        return bool(viewer.socket.recv(1 << 20))
    except TimeoutError:
        return False


def test_answers_survive_a_cut(server: Server) -> None:
    viewer = Viewer(server)
    until(lambda: emit(server, 500, 200) and stalled(server) > 0)
    viewer.send({"op": "cmd", "id": "a1", "cmd": "pause", "args": {}})
    until(lambda: server.applied)
    last = emit(server, 4000, 200)
    until(lambda: server.tail.head_seq == last)
    answers: list[dict[str, Any]] = []
    while not answers:
        content = viewer.read()
        if content.get("op") == "reply":
            answers.append(content)
        assert content.get("seq") != last, "all records came, the answer did not"
    assert answers == [{"op": "reply", "id": "a1", "ok": True}]
    viewer.close()


def test_answers_that_nobody_reads_end_the_connection(server: Server) -> None:
    viewer = Viewer(server)
    line = json.dumps({"op": "cmd", "id": "same", "cmd": "pause"}).encode() + b"\n"
    viewer.socket.settimeout(0.2)
    try:
        for _ in range(2000):
            viewer.socket.sendall(line * 100)
            if not server.viewers._clients:
                break
    except OSError:
        pass
    until(lambda: not server.viewers._clients)
    assert len(server.applied) == 1
    viewer.close()


def test_ps13_a_line_that_fails_in_the_answer_ends_its_connection_only(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    other = Viewer(server)

    def broken(*_: object) -> dict[str, Any]:
        raise OverflowError("int too large to convert to float")

    server.viewers._answer = broken
    assert "could not be answered" in closing_word(server, b'{"op":"cmd","id":"a","cmd":"stop"}\n')
    last = emit(server, 1)
    assert other.follow(last)[-1] == last
    assert "OverflowError: int too large" in capfd.readouterr().err
    other.close()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\n", "no JSON"),
        (b"hello\n", "no JSON"),
        (b"\0\0\0\n", "no JSON"),
        (b"\xff\xfe\xfd\n", "no JSON"),
        (b"[]\n", "no JSON object"),
        (b"5\n", "no JSON object"),
        (b'{"op":"what"}\n', "only commands"),
        (b'{"op":"cmd"}\n', "only commands"),
        (b'{"op":"cmd","id":5,"cmd":"stop"}\n', "only commands"),
        (b'{"op":"cmd","id":"../x","cmd":"stop"}\n', "only commands"),
        (b'{"op":"cmd","id":"' + b"a" * 65 + b'","cmd":"stop"}\n', "only commands"),
        (b'{"op":"cmd","id":"a","cmd":"set_lr","args":{"lr":NaN}}\n', "no JSON"),
        (b"[" * 10_000 + b"\n", "nested too deep"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"\n", "nested too deep"),
        (b"x" * 70_000 + b"\n", "too long"),
        (b"x" * 10_000_000, "too long"),
    ],
)
def test_ps13_hostile_lines_end_their_connection_only(server: Server, data: bytes, word: str) -> None:
    other = Viewer(server)
    said = closing_word(server, data)
    assert word in said or (len(data) > 65_536 and said == "")  # unread input may reset the connection before the last word
    last = emit(server, 1)
    assert other.follow(last)[-1] == last
    assert server.applied == []
    other.close()


def test_ps13_10000_random_and_mutated_lines(server: Server, fault_random: random.Random) -> None:
    valid = json.dumps({"op": "cmd", "id": "m1", "cmd": "set_lr", "args": {"lr": 1e-4}}).encode()
    process = psutil.Process()
    for number in range(5_000):  # two lines each
        if number == 500:  # what the allocator and the log of the test keep is there by now
            before = process.memory_info().rss
        data = bytearray(valid)
        for _ in range(fault_random.randrange(1, 6)):
            data[fault_random.randrange(len(data))] = fault_random.randrange(256)
        noise = fault_random.randbytes(30)
        until(lambda: len(server.viewers._clients) < MAX_CLIENTS // 2)
        closing = Viewer(server)
        with contextlib.suppress(OSError):  # the server may have closed after the first line
            closing.socket.sendall(bytes(data) + b"\n")
            closing.socket.sendall(noise + b"\n")
        closing.close()
    until(lambda: not server.viewers._clients)
    assert process.memory_info().rss - before <= 10e6
    last = emit(server, 1)
    viewer = Viewer(server)
    assert viewer.follow(last)[-1] == last
    assert all(cmd == "set_lr" and 0 < args["lr"] <= 1 for _, cmd, args in server.applied)
    viewer.close()


@pytest.mark.parametrize(
    ("first", "word"),
    [
        ({"op": "hello", "proto": 2}, "only protocol 1"),
        ({"op": "hello"}, "only protocol 1"),
        ({"op": "cmd", "id": "a", "cmd": "stop"}, "must be a hello"),
    ],
)
def test_the_first_line_must_be_a_known_hello(server: Server, first: dict[str, Any], word: str) -> None:
    assert word in closing_word(server, json.dumps(first).encode() + b"\n", hello=False)
    assert server.applied == []


def test_no_hello_in_time(server: Server) -> None:
    viewer = Viewer(server, {})
    until(lambda: server.viewers._clients)
    server.clock = lambda: time.monotonic() + module.HELLO_TIME + 1
    assert viewer.read() == {"op": "bye", "reason": "no hello came"}
    viewer.close()


def test_half_a_line_then_silence_harms_nobody(server: Server) -> None:
    half = Viewer(server)
    half.socket.sendall(b'{"op":"cmd","id":"h')
    other = Viewer(server)
    last = emit(server, 3)
    assert other.follow(last)[-1] == last and half.follow(last)[-1] == last
    half.socket.sendall(b'1","cmd":"pause"}\n')
    assert half.read() == {"op": "reply", "id": "h1", "ok": True}
    half.close()
    other.close()


def test_the_seventeenth_viewer_is_told_why(server: Server) -> None:
    viewers = [Viewer(server) for _ in range(MAX_CLIENTS)]
    extra = Viewer(server, {})
    assert "16 viewers" in extra.read()["reason"]
    extra.close()
    viewers[0].close()
    until(lambda: len(server.viewers._clients) < MAX_CLIENTS)
    again = Viewer(server)
    assert again.hello["op"] == "hello"
    for viewer in [*viewers[1:], again]:
        viewer.close()


def test_ps12_another_uid_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "peer", lambda connection: (1, os.geteuid() + 1))
    viewer = Viewer(server, {})
    assert viewer.read()["reason"] == "another user's process"
    viewer.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_ps12_a_real_second_uid_cannot_connect(server: Server) -> None:
    server.path.parent.chmod(0o755)  # even if somebody opened the folder
    server.path.chmod(0o777)
    for parent in server.path.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    script = (
        "import os,socket,sys\nos.setuid(65534)\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\nprint(s.recv(999))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(server.path)], capture_output=True, text=True, timeout=DEADLINE)
    assert "another user" in done.stdout, done.stderr


def test_ps13_a_storm_of_connections(server: Server) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(1000):
        with socket.socket(socket.AF_UNIX) as quick:
            quick.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # the queue is full for a moment
                quick.connect(str(server.path))
    until(lambda: not server.viewers._clients)
    viewer = Viewer(server)
    last = emit(server, 1)
    assert viewer.follow(last)[-1] == last
    viewer.close()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # noqa: PTH208
