"""JSON lines between two processes over a pair of pipes, never waiting: the other end may be slow, silent or gone."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from .rank import MESSAGE_LIMIT

LINE_LIMIT = 1 << 20  # bytes of one line
_WAITING = 4 << 20  # bytes that the other end may be behind
_PIECE = 1 << 16


class Line:
    """One end of the line.

    Args:
        reading, writing: descriptors of pipes or sockets; they become non-blocking and belong to the line.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self._writing = reading, writing
        for descriptor in (reading, writing):
            os.set_blocking(descriptor, False)
        self.ended = False  # the other end is gone, or does not take what it is told
        self.heard_at = time.monotonic()
        self.noise: list[str] = []  # lines that are no messages: a login's greeting
        self._in = b""
        self._out = b""

    @property
    def silent_s(self) -> float:
        """Seconds since the other end said anything."""
        return time.monotonic() - self.heard_at

    def send(self, **content: Any) -> None:
        """Give the other end a message, now or with a later `flush`."""
        self._out += json.dumps(content).encode() + b"\n"
        self.flush()

    def carry(self, number: int, connection: socket.socket) -> bool:
        """Tell the other end what came over a local connection: its data, or its end. Whether the connection goes on."""
        try:
            data = connection.recv(MESSAGE_LIMIT)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if data:
            self.send(op="data", id=number, data=base64.b64encode(data).decode())
        else:
            self.send(op="close", id=number)
        return bool(data)

    def flush(self) -> None:
        """Hand on what waits, as far as the pipe takes it."""
        if self.ended or not self._out:
            return
        try:
            self._out = self._out[os.write(self._writing, self._out) :]
        except BlockingIOError:
            self.ended = len(self._out) > _WAITING
        except OSError:
            self.ended = True

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages that have come. `ended` is set at the end of the line."""
        try:
            piece = os.read(self.reading, _PIECE)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self.ended = True
            return
        self.heard_at = time.monotonic()
        self._in += piece
        *lines, self._in = self._in.split(b"\n")
        self.ended = self.ended or len(self._in) > LINE_LIMIT
        for text in lines:
            content = None
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(text)
            if isinstance(content, dict) and isinstance(content.get("op"), str):
                yield content
            elif text.strip():
                self.noise.append(text.decode("utf-8", "replace")[:500])

    def close(self) -> None:
        """Close both descriptors; the other end reads the end."""
        self.ended = True
        for descriptor in {self.reading, self._writing}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
