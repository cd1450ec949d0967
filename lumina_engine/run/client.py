"""A viewer's end of a run's socket: blocking, small, for the command line and for tests.

The file is the truth and the socket the doorbell: `RunClient.records` reads history from the file and takes what comes after
it from the socket; wherever the socket leaves something out, it reads the file again.
"""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec

from ..monitoring import record as rec
from ..monitoring.log import LogReader
from .directory import RunDirectory, RunError
from .socket import PROTO

REPLY_TIME = 10.0  # s within which a supervisor answers


class RunClient:
    """A connection to the supervisor of a living run.

    Args:
        run: the run.
        name: who connects, for the supervisor.
        timeout: seconds that one read may take.

    Raises:
        RunError: nobody answers: the run is not running.
    """

    def __init__(self, run: RunDirectory, name: str = "lumina-engine", timeout: float | None = REPLY_TIME) -> None:
        self.run = run
        self._buffer = b""
        path = run.info().socket
        if path is None:
            raise RunError(f"run {run.name} was never started")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._connect(path)
            self._send({"op": "hello", "proto": PROTO, "client": name})
            hello = self.read() or {}
        except OSError as error:
            self._socket.close()
            raise RunError(f"run {run.name} does not answer ({info_line(run)})", 1) from error
        if hello.get("op") != "hello":
            self._socket.close()
            raise RunError(f"run {run.name} refused: {hello.get('reason', 'it closed the connection')}", 1)
        self.hello: dict[str, Any] = hello

    def _connect(self, path: str) -> None:
        """Connect; while the queue of connections is full the kernel says "try again", so do, for a second."""
        deadline = time.monotonic() + 1.0
        while True:
            try:
                return self._socket.connect(path)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def fileno(self) -> int:
        """The socket, for a selector."""
        return self._socket.fileno()

    def read_line(self) -> bytes | None:
        """The next line without its newline; None at the end.

        Raises:
            TimeoutError: nothing came in time.
        """
        while (end := self._buffer.find(b"\n")) < 0:
            piece = self._socket.recv(65_536)
            if not piece:
                return None
            self._buffer += piece
        line, self._buffer = self._buffer[:end], self._buffer[end + 1 :]
        return line

    def read(self) -> dict[str, Any] | None:
        """The next object; None at the end."""
        line = self.read_line()
        return None if line is None else msgspec.json.decode(line)

    def send_command(self, cmd: str, args: dict[str, Any] | None = None, request: str | None = None) -> dict[str, Any]:
        """Send a command and return its reply {op, id, ok, error?}; records that come in between are skipped.

        Raises:
            RunError: the supervisor ended without an answer.
        """
        request = request or uuid.uuid4().hex
        self._send({"op": "cmd", "id": request, "cmd": cmd, "args": args or {}})
        with contextlib.suppress(OSError):
            while (content := self.read()) is not None:
                if content.get("op") == "reply" and content.get("id") == request:
                    return content
                if content.get("op") == "bye":
                    raise RunError(f"run {self.run.name} closed the connection: {content.get('reason')}", 1)
        raise RunError(f"run {self.run.name} did not answer ({info_line(self.run)})", 1)

    def ask(self, op: str) -> dict[str, Any]:
        """Ask for what the hello lists in `asks` and return the answer; records that come in between are skipped.

        Raises:
            RunError: this supervisor does not know it, or ended without an answer.
        """
        if op not in self.hello.get("asks", ()):
            raise RunError(f"the supervisor of run {self.run.name} does not tell its {op}: it is of an older version", 1)
        self._send({"op": op})
        with contextlib.suppress(OSError):
            while (content := self.read()) is not None:
                if content.get("op") == op:
                    return content
        raise RunError(f"run {self.run.name} did not answer ({info_line(self.run)})", 1)

    def records(self) -> Iterator[rec.Record]:
        """Every record of the run, from seq 1 until the supervisor ends, each once and in order.

        Raises:
            TimeoutError: nothing came for the timeout given.
        """
        reader = LogReader(self.run.metrics_path)
        seen = 0
        target = self.hello["head_seq"]
        while True:
            while seen < target and (batch := reader.read_new()):
                for record in batch:
                    if record.seq > seen:
                        seen = record.seq
                        yield record
            line = self.read_line()
            if line is None:
                break
            content = msgspec.json.decode(line)
            if content.get("op") == "gap":
                target = content["to"]
            elif "seq" in content and content["seq"] == seen + 1:
                seen += 1
                yield rec.decode(line)
            elif "seq" in content and content["seq"] > seen:
                target = content["seq"]
        for record in reader.read_new():
            if record.seq > seen:
                seen = record.seq
                yield record

    def close(self) -> None:
        """Leave; the run goes on."""
        self._socket.close()

    def __enter__(self) -> RunClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, content: dict[str, Any]) -> None:
        self._socket.sendall(msgspec.json.encode(content) + b"\n")


def info_line(run: RunDirectory) -> str:
    """State and reason of a run, for an error message."""
    info = run.info()
    return info.state + (f": {info.reason}" if info.reason else "")


def send_command(run: RunDirectory, cmd: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send one command to a living run and return the reply.

    Raises:
        RunError: the run is not running, or refuses the command.
    """
    if not run.alive:
        raise RunError(f"run {run.name} is not running ({info_line(run)})", 1)
    with RunClient(run) as client:
        reply = client.send_command(cmd, args)
    if not reply.get("ok"):
        raise RunError(f"run {run.name} refused: {reply.get('error')}", 1)
    return reply
