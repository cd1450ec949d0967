"""A viewers' server in a thread over a real log, and a viewer in plain socket terms."""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import LogReader, MetricLog
from lumina_engine.run.requests import RequestBook
from lumina_engine.run.socket import ViewerServer
from lumina_engine.run.tail import LogTail
from tests.waiting import DEADLINE, until


class Server:
    """A ViewerServer with its loop in a thread, and the log that it serves."""

    def __init__(self, folder: Path, rebind_time: float = 10.0) -> None:
        self.path = folder / "sockets" / "a.sock"
        self.metrics = folder / "metrics.jsonl"
        self.log = MetricLog(self.metrics, 1, sync_interval=0)
        self.applied: list[tuple[str, str, dict[str, Any]]] = []
        self.refuse: str | None = None
        self.clock: Callable[[], float] = time.monotonic
        self.selector = selectors.DefaultSelector()
        self.tail = LogTail(self.metrics, 0, 0)
        self.book = RequestBook(self.apply)
        self.viewers = ViewerServer(
            self.path, self.selector, self.hello, self.book.answer, rebind_time=rebind_time, clock=lambda: self.clock()
        )
        self.stopping = threading.Event()
        self.failed: BaseException | None = None
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def apply(self, request: str, cmd: str, args: dict[str, Any]) -> str | None:
        self.applied.append((request, cmd, args))
        return self.refuse

    def hello(self) -> dict[str, Any]:
        return {"run": "r", "inc": 1, "state": "running", "head_seq": self.tail.head_seq, "offset": self.tail.offset}

    def loop(self) -> None:
        try:
            while not self.stopping.is_set():
                for key, _ in self.selector.select(0.01):
                    key.data()
                chunks, heads = self.tail.poll()
                for item in heads:
                    if item.id:
                        self.book.note(item.id)
                self.viewers.publish(chunks)
                self.viewers.tick()
            self.viewers.close("over")
        except BaseException as error:
            self.failed = error
            raise

    def end(self) -> None:
        self.stopping.set()
        self.thread.join(DEADLINE)
        self.log.close()
        assert self.failed is None


class Viewer:
    """A client in plain socket terms; keeps `seen` as a viewer should: file up to the head, then the stream."""

    def __init__(self, server: Server, hello: dict[str, Any] | None = None) -> None:
        self.server = server
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        until(lambda: self.socket.connect_ex(str(server.path)) == 0, "room in the queue of connections")
        self.file = self.socket.makefile("rb")
        self.seqs: list[int] = []
        self.gaps = 0
        if hello is None or hello:
            self.send(hello or {"op": "hello", "proto": 1, "client": "test"})
            self.hello = self.read()
        self.reader = LogReader(server.metrics)

    def send(self, content: Any) -> None:
        self.socket.sendall(json.dumps(content).encode() + b"\n")

    def read(self) -> dict[str, Any]:
        line = self.file.readline()
        assert line, "the server closed the connection"
        return dict(json.loads(line))

    def read_file(self, upto: int) -> None:
        while (self.seqs[-1] if self.seqs else 0) < upto:
            batch = self.reader.read_new(65_536)
            assert batch, f"the file has no record {upto}"
            self.seqs += [record.seq for record in batch if record.seq > (self.seqs[-1] if self.seqs else 0)]

    def follow(self, upto: int) -> list[int]:
        """All seqs until `upto` has been seen, from file and stream."""
        self.read_file(self.hello["head_seq"])
        while not self.seqs or self.seqs[-1] < upto:
            content = self.read()
            if content.get("op") == "gap":
                self.gaps += 1
                assert content["from"] <= content["to"]
                assert LogReader(self.server.metrics, content["offset"]).read_new()[0].seq == content["from"]
                self.read_file(content["to"])
            elif "seq" in content and (not self.seqs or content["seq"] > self.seqs[-1]):
                assert content["seq"] == (self.seqs[-1] if self.seqs else 0) + 1
                self.seqs.append(content["seq"])
        return self.seqs

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def emit(server: Server, count: int, size: int = 0) -> int:
    for _ in range(count):
        server.log.emit(rec.Note(message="x" * size))
    return server.log.seq


def closing_word(server: Server, data: bytes, hello: bool = True) -> str:
    """What the server says when it closes on this input; empty if it just closes."""
    viewer = Viewer(server, None if hello else {})
    try:
        viewer.socket.sendall(data)
    except BrokenPipeError:
        pass  # it has closed already; its last word is still to be read
    try:
        content = json.loads(viewer.file.readline() or b"{}")
    except ConnectionResetError:
        content = {}
    viewer.close()
    return str(content.get("reason", ""))
