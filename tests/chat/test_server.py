"""The chat server and its client on a real socket, with a backend from a script (reliability 5, capabilities 5.5)."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.chat.client import ServerBackend, ServerGone, server_sockets, socket_path
from lumina_engine.chat.events import Done, Event, Loading, Start, Token, decode_answer, decode_request, encode_line
from lumina_engine.chat.modes import MODES, ChatError, Sampling
from lumina_engine.chat.server import ChatServer
from lumina_engine.chat.session import ChatSession
from lumina_engine.run.directory import RunError
from tests.chat.fakes import FakeBackend
from tests.waiting import until

DEADLINE = 20.0
ROOT = Path(__file__).resolve().parents[2]
HELLO = b'{"op":"hello","proto":1}\n'


class Running:
    """A ChatServer in a thread."""

    def __init__(self, path: Path, backend: FakeBackend, **options: Any) -> None:
        self.backend = backend
        self.server = ChatServer(path, lambda say: backend, **options)
        self.ended: str | BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.ended = self.server.serve()
        except BaseException as error:
            self.ended = error

    def stop(self) -> None:
        self.backend.gate.set()
        self.server.stop("the test is over")
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "sockets"
    monkeypatch.setenv("LUMINA_SOCKETS", str(place))
    return place


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "a.chat.sock"


@pytest.fixture
def running(path: Path) -> Iterator[Running]:
    server = Running(path, FakeBackend())
    yield server
    server.stop()


class Raw:
    """A client that sends what it likes."""

    def __init__(self, path: Path, hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.socket.settimeout(DEADLINE)
        self.file = self.socket.makefile("rb")
        if hello:
            self.send(HELLO)
            assert self.line()["op"] == "hello"
            while self.line()["op"] != "ready":
                pass

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def line(self) -> dict[str, Any]:
        """The next line; {} at the end."""
        try:
            data = self.file.readline()
        except ConnectionResetError:
            return {}
        return json.loads(data) if data else {}

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


def request(identity: str, text: str) -> bytes:
    messages = [{"role": "user", "content": text}]
    return json.dumps(
        {"op": "generate", "id": identity, "messages": messages, "sampling": MODES["precise"].to_dict(), "seed": 1}
    ).encode() + b"\n"  # fmt: skip


# a reply


def test_c136_a_session_talks_through_the_socket(running: Running, path: Path) -> None:
    backend = ServerBackend(path)
    assert backend.info == running.backend.info and backend.pid == os.getpid() and backend.idle_timeout_s == 1800
    session = ChatSession(backend, mode="precise", seed=3, system_prompt="s")
    events = list(session.send("hälló \x1b[2J <|im_end|>"))
    assert isinstance(events[0], Start) and isinstance(events[-1], Done)
    assert text_of(events) == "answer 1 to hälló \x1b[2J <|im_end|>"
    assert running.backend.asked[0] == (session.messages()[:-1], MODES["precise"], 3)
    assert text_of(list(session.send("more"))) == "answer 2 to more"
    backend.close()


def test_c136_the_socket_and_its_folder_are_private(running: Running, path: Path, folder: Path) -> None:
    assert oct(path.stat().st_mode & 0o777) == "0o600" and oct(folder.stat().st_mode & 0o777) == "0o700"
    assert server_sockets() == [path]
    assert len(os.fsencode(socket_path("/very/long" * 40))) < 107
    assert socket_path("a") == socket_path(Path.cwd() / "a") != socket_path("a", "cuda:1")


def test_c136_two_clients_are_answered_one_after_the_other(running: Running, path: Path) -> None:
    running.backend.gate.clear()
    first, second = Raw(path), Raw(path)
    first.send(request("1", "one"))
    assert first.line()["op"] == "start"
    second.send(request("2", "two"))
    assert second.line() == {"op": "queued", "id": "2", "ahead": 1}
    running.backend.gate.set()
    assert [running_line(first, "done")["reason"], running_line(second, "done")["reason"]] == ["stop", "stop"]
    assert [messages[-1]["content"] for messages, _, _ in running.backend.asked] == ["one", "two"]
    first.close()
    second.close()


def running_line(client: Raw, op: str) -> dict[str, Any]:
    while (line := client.line()) and line["op"] != op:
        pass
    return line


def test_c136_one_request_per_client(running: Running, path: Path) -> None:
    running.backend.gate.clear()
    client = Raw(path)
    client.send(request("1", "one") + request("2", "two"))
    assert running_line(client, "error") == {
        "op": "error",
        "id": "2",
        "error": "a reply is still being written: cancel it first",
    }
    running.backend.gate.set()
    assert running_line(client, "done")["id"] == "1"
    client.close()


# cancel


def test_c110_cancel_ends_the_reply_and_the_next_one_works(running: Running, path: Path) -> None:
    backend = ServerBackend(path)
    session = ChatSession(backend)
    events: list[Event] = []
    for event in session.send("endless"):
        events.append(event)
        if len(events) == 4:
            threading.Thread(target=session.cancel).start()
    assert isinstance(events[-1], Done) and events[-1].reason == "cancelled" and events[-1].tokens >= 3
    assert session.history[-1]["content"].startswith("answer 1")
    assert text_of(list(session.send("next"))) == "answer 2 to next"
    backend.close()


def test_c110_a_reply_closed_early_is_cancelled_and_does_not_block_the_next(running: Running, path: Path) -> None:
    backend = ServerBackend(path)
    stream = backend.generate([{"role": "user", "content": "endless"}], MODES["precise"], 1)
    assert isinstance(next(stream), Start)
    stream.close()
    events = list(backend.generate([{"role": "user", "content": "b"}], MODES["precise"], 1))
    assert text_of(events) == "answer 2 to b"
    backend.close()


def test_c110_a_client_that_leaves_takes_its_reply_with_it(running: Running, path: Path) -> None:
    client = Raw(path)
    client.send(request("1", "endless"))
    assert running_line(client, "token")["text"] == "answer "
    client.close()
    until(lambda: running.backend.cancelled, "the reply is cancelled")
    other = ServerBackend(path)
    assert text_of(list(other.generate([{"role": "user", "content": "b"}], MODES["precise"], 1))) == "answer 2 to b"
    other.close()


def test_c110_a_queued_request_can_be_cancelled(running: Running, path: Path) -> None:
    running.backend.gate.clear()
    first, second = Raw(path), Raw(path)
    first.send(request("1", "one"))
    assert first.line()["op"] == "start"
    second.send(request("2", "two"))
    assert second.line()["op"] == "queued"
    second.send(b'{"op":"cancel","id":"2"}\n')
    second.send(b'{"op":"cancel","id":"nobody"}\n{"op":"nonsense"}\n')
    assert second.line()["op"] == "error"  # so the cancel has been read
    running.backend.gate.set()
    done = running_line(second, "done")
    assert (done["id"], done["reason"], done["tokens"]) == ("2", "cancelled", 0)
    assert len(running.backend.asked) == 1
    first.close()
    second.close()


# faults


def test_c110_a_failing_answer_is_one_line_and_the_server_lives(running: Running, path: Path) -> None:
    backend = ServerBackend(path)
    running.backend.fail = ChatError("out of memory while answering: lower it")
    with pytest.raises(ChatError, match="out of memory while answering"):
        list(backend.generate([{"role": "user", "content": "a"}], MODES["precise"], 1))
    running.backend.fail = ZeroDivisionError("oops")
    with pytest.raises(ChatError, match="unexpected ZeroDivisionError: oops"):
        list(backend.generate([{"role": "user", "content": "a"}], MODES["precise"], 1))
    running.backend.fail = None
    assert isinstance(list(backend.generate([{"role": "user", "content": "a"}], MODES["precise"], 1))[-1], Done)
    backend.close()


def start_process(path: Path) -> subprocess.Popen[bytes]:
    with path.with_name("log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.chat.fakes", str(path)],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def test_c110_kill_9_in_the_middle_of_a_reply_is_one_clear_line(folder: Path, path: Path) -> None:
    folder.mkdir(mode=0o700)
    process = start_process(path)
    try:
        until(lambda: _answers(path), "the server answers")
        session = ChatSession(ServerBackend(path))
        list(session.send("first"))
        tokens = 0
        with pytest.raises(ServerGone) as error:
            for event in session.send("endless"):
                tokens += isinstance(event, Token)
                if tokens == 5:
                    process.kill()
        assert f"the chat server (process {process.pid}) is gone: start it again" in str(error.value)
        assert "\n" not in str(error.value)
        assert len(session.history) == 2 and session.unsent == "endless"
        process.wait(DEADLINE)
        with pytest.raises(ServerGone, match="no chat server answers"):
            ServerBackend(path)
        process = start_process(path)  # the stale socket is replaced
        until(lambda: _answers(path), "the new server answers")
        session.backend = ServerBackend(path)
        stream = session.retry()
        assert isinstance(next(stream), Start)
        stream.close()
    finally:
        process.kill()
        process.wait(DEADLINE)


def _answers(path: Path) -> bool:
    try:
        ServerBackend(path).close()
    except ServerGone:
        return False
    return True


def test_c110_a_server_that_leaves_while_nothing_is_asked(path: Path) -> None:
    running = Running(path, FakeBackend())
    backend = ServerBackend(path)
    list(backend.generate([{"role": "user", "content": "a"}], MODES["precise"], 1))
    assert backend.gone() is None
    running.stop()
    assert backend.gone() == "the chat server has left (the test is over)"
    assert backend.gone() == f"the chat server (process {os.getpid()}) is gone"
    backend.close()


def test_c110_a_checkpoint_that_cannot_be_loaded_is_told_to_the_client(folder: Path, path: Path) -> None:
    def load(say: Callable[[Loading], None]) -> FakeBackend:
        say(Loading("reading weights", 0.0))
        until(lambda: connected.is_set())
        raise ChatError("the checkpoint is damaged: choose another", 65)

    connected = threading.Event()
    server = ChatServer(path, load)
    failures: list[BaseException] = []

    def serve() -> None:
        with pytest.raises(ChatError) as error:
            server.serve()
        failures.append(error.value)

    thread = threading.Thread(target=serve)
    thread.start()
    seen: list[str] = []

    def loading(progress: Loading) -> None:
        seen.append(progress.detail)
        connected.set()

    with pytest.raises(ServerGone, match=r"^the checkpoint is damaged: choose another$"):
        ServerBackend(path, loading=loading)
    thread.join(DEADLINE)
    assert "damaged" in str(failures[0]) and seen and not path.exists()


def test_c110_loading_is_told_and_can_be_given_up(folder: Path, path: Path) -> None:
    go = threading.Event()

    def load(say: Callable[[Loading], None]) -> FakeBackend:
        say(Loading("reading 13.5 MB", 0.0))
        assert go.wait(DEADLINE)
        return FakeBackend()

    server = ChatServer(path, load)
    thread = threading.Thread(target=server.serve)
    thread.start()
    told: list[tuple[str, float]] = []
    with pytest.raises(ServerGone, match="given up"):
        ServerBackend(
            path, loading=lambda progress: told.append((progress.detail, progress.seconds)), given_up=lambda: len(told) > 1
        )
    assert ("reading 13.5 MB") in {detail for detail, _ in told}
    raw = Raw(path, hello=False)
    raw.send(HELLO + request("1", "early"))
    assert running_line(raw, "error")["error"].startswith("the model is still loading")
    go.set()
    assert running_line(raw, "ready")["info"]["step"] == 100
    server.stop("over")
    assert running_line(raw, "bye") == {"op": "bye", "reason": "over"}
    thread.join(DEADLINE)
    raw.close()


def test_c110_idle_time_out(path: Path) -> None:
    clock = [0.0]
    running = Running(path, FakeBackend(), idle_timeout_s=60, clock=lambda: clock[0])
    client = Raw(path)
    clock[0] = 50.0
    client.send(request("1", "one"))
    assert running_line(client, "done")
    clock[0] = 100.0
    client.send(b'{"op":"nonsense"}\n')  # no request: it does not count
    assert client.line()["op"] == "error" and running.thread.is_alive()
    clock[0] = 111.0
    assert running_line(client, "bye")["reason"] == "idle for 60 s"
    running.thread.join(DEADLINE)
    assert running.ended == "idle for 60 s" and not path.exists()
    client.close()


def test_ps10_a_deleted_socket_is_bound_again(path: Path) -> None:
    running = Running(path, FakeBackend(), rebind_time=0.0)
    until(path.exists)
    path.unlink()
    until(lambda: path.exists() and _answers(path), "the socket is back")
    running.stop()
    assert not path.exists()


def test_ps11_foreign_things_in_the_sockets_place_are_refused(folder: Path, path: Path) -> None:
    folder.mkdir(mode=0o700)
    path.write_text("precious")
    with pytest.raises(RunError, match="not a socket of yours"):
        ChatServer(path, lambda say: FakeBackend())
    assert path.read_text() == "precious"
    path.unlink()
    running = Running(path, FakeBackend())
    with pytest.raises(RunError, match="another process answers there"):
        ChatServer(path, lambda say: FakeBackend())
    running.stop()
    folder.chmod(0o755)
    with pytest.raises(RunError, match="open to other users"):
        ChatServer(path, lambda say: FakeBackend())


# hostile lines


HOSTILE = [
    (b"GET / HTTP/1.1\r\n\r\n", "the first line must be a hello"),
    (request("1", "x"), "the first line must be a hello"),
    (b'{"op":"hello","proto":99}\n', "only protocol 1"),
    (b"[" * 100_000, "too long"),
    (b"x" * 70_000, "too long"),
    (b'{"op":"hello","proto":1,"client":' + b"[" * 500 + b"]" * 500 + b"}\n", "nested too deep"),
    (b"\x00\xff\xfe\n", "the first line must be a hello"),
]


@pytest.mark.parametrize(("data", "reason"), HOSTILE)
def test_ps13_a_first_line_that_is_no_hello_ends_the_connection(running: Running, path: Path, data: bytes, reason: str) -> None:
    client = Raw(path, hello=False)
    try:
        client.send(data)
    except BrokenPipeError:
        pass
    line = client.line()
    assert line == {} or (line["op"] == "bye" and reason in line["reason"])
    client.close()
    until(lambda: _answers(path), "it answers")


BAD = [
    b'{"op":"generate"}',
    b'{"op":"generate","id":"1","messages":[],"sampling":{},"seed":1}',
    b'{"op":"generate","id":"1","messages":[{"role":"robot","content":"x"}],"sampling":{},"seed":1}',
    b'{"op":"generate","id":"1","messages":[{"role":"user","content":7}],"sampling":{},"seed":1}',
    b'{"op":"generate","id":"1","messages":[{"role":"user","content":"x"}],"sampling":{"temperature":-1},"seed":1}',
    b'{"op":"generate","id":"1","messages":[{"role":"user","content":"x"}],"sampling":{"top_p":0},"seed":1}',
    b'{"op":"generate","id":"1","messages":[{"role":"user","content":"x"}],"sampling":{},"seed":-1}',
    b'{"op":"generate","id":"1","messages":[{"role":"user","content":"x"}],"sampling":{},"seed":1,"path":"/etc/passwd"}',
    b'{"op":"generate","id":"","messages":[{"role":"user","content":"x"}],"sampling":{},"seed":1}',
    b'{"op":"generate","id":"1","messages":[{"role":"user","content":"x"}],"sampling":{},"seed":1,"alternatives":1000000}',
    b'{"op":"generate","id":"1","messages":[{"role":"user","content":"x"}],"sampling":{},"seed":1,"trace":"yes"}',
    b'{"op":"generate","id":"1","messages":[{"role":"user","content":"x"}],"sampling":{},"seed":1,"trace":1}',
    b'{"op":"load","path":"/etc/passwd"}',
    b"[]",
    b"null",
    b"",
    b"NaN",
]


def test_ps13_lines_that_are_no_requests_are_answered_and_counted(running: Running, path: Path) -> None:
    client = Raw(path)
    for line in BAD:
        client.send(line + b"\n")
        answer = client.line()
        assert answer["op"] == "error" and answer["error"].startswith("no request: "), line
    client.send(request("ok", "still here"))
    assert running_line(client, "done")["id"] == "ok"
    client.send(b"nonsense\n" * 40)
    assert running_line(client, "bye")["reason"] == "too many lines that are no requests"
    assert running.backend.asked[0][0][-1]["content"] == "still here" and len(running.backend.asked) == 1
    client.close()


def test_ps13_mutated_lines_never_end_the_server(running: Running, path: Path, fault_random: random.Random) -> None:
    good = HELLO + request("1", "some text") + b'{"op":"cancel","id":"1"}\n'
    for _ in range(60):
        data = bytearray(good)
        for _ in range(fault_random.randrange(1, 6)):
            place = fault_random.randrange(len(data))
            action = fault_random.randrange(3)
            if action == 0:
                data[place] = fault_random.randrange(256)
            elif action == 1:
                del data[place : place + fault_random.randrange(1, 20)]
            else:
                data[place:place] = bytes(fault_random.randrange(256) for _ in range(fault_random.randrange(1, 20)))
        client = Raw(path, hello=False)
        try:
            client.send(bytes(data))
        except BrokenPipeError:
            pass
        client.close()
    until(lambda: _answers(path), "it answers")
    assert running.thread.is_alive()


def test_ps13_half_a_line_and_silence_meet_the_time_limit(path: Path) -> None:
    clock = [0.0]
    running = Running(path, FakeBackend(), clock=lambda: clock[0])
    client = Raw(path, hello=False)
    client.send(b'{"op":"hel')
    until(lambda: running.server._connections)
    clock[0] = 2.5
    assert client.line() == {"op": "bye", "reason": "no hello came"}
    client.close()
    running.stop()


def test_ps13_more_clients_than_allowed_are_told(running: Running, path: Path) -> None:
    clients = [Raw(path) for _ in range(16)]
    late = Raw(path, hello=False)
    assert late.line() == {"op": "bye", "reason": "16 clients are connected already"}
    for client in [late, *clients]:
        client.close()
    until(lambda: not running.server._connections)
    for _ in range(200):
        Raw(path, hello=False).close()
    until(lambda: not running.server._connections)
    until(lambda: _answers(path), "it answers")


def test_ps13_a_reader_that_never_reads_is_dropped(running: Running, path: Path) -> None:
    running.backend.reply = " ".join(["word" * 500] * 400)
    client = Raw(path)
    client.send(request("1", "long"))
    until(lambda: not running.server._connections, "the client is dropped")
    until(lambda: not running.server._jobs, "its reply ends")
    client.close()
    until(lambda: _answers(path), "it answers")


# the client's own rules


def test_s13_a_long_conversation_loses_its_oldest_messages_and_says_so(running: Running, path: Path) -> None:
    backend = ServerBackend(path)
    messages = [{"role": "system", "content": "s"}]
    for number in range(30):
        messages += [{"role": "user", "content": f"{number} " + "x" * 2000}, {"role": "assistant", "content": "y" * 2000}]
    messages.append({"role": "user", "content": "last"})
    events = list(backend.generate(messages, MODES["precise"], 1))
    start = events[0]
    assert isinstance(start, Start) and start.dropped > 0 and start.dropped % 2 == 0
    sent = running.backend.asked[0][0]
    assert sent == [messages[0], *messages[1 + start.dropped :]]
    with pytest.raises(ChatError, match="longer than 64 KiB"):
        next(backend.generate([{"role": "user", "content": "x" * 70_000}], MODES["precise"], 1))
    backend.close()


def test_c136_nonsense_from_the_server_is_one_line(folder: Path, path: Path) -> None:
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            connection.recv(100)
            connection.sendall(b"\x1b[2J not JSON\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ServerGone, match="a line that is no answer"):
            ServerBackend(path)
        thread.join(DEADLINE)


def test_c136_every_line_survives_the_wire() -> None:
    assert decode_answer(encode_line(Token(text="a\n\x1b", token=3, id="x"))) == Token(text="a\n\x1b", token=3, id="x")
    line = request("7", "x")
    assert decode_request(line).sampling == Sampling(0.1, 0.5, 10)  # type: ignore[union-attr]


def test_the_torch_free_part_stays_free_of_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from lumina_engine.chat import client, modes, server, session\n"
        "assert not {'torch', 'deepspeed', 'textual', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
