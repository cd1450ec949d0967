"""The clients of a chat server's socket: accepting, lines in and out, limits. What the lines mean is the server's business.

Same rules as a run's socket (`run.socket`): folder 0700, socket 0600, peers of this user only, hello first, bounded lines and
queues, nothing waits for a client.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Callable
from pathlib import Path

from ..run.socket import (
    HELLO_TIME,
    LINE_LIMIT,
    MAX_CLIENTS,
    QUEUE_LIMIT,
    REBIND_TIME,
    STALL_TIME,
    bind_socket,
    peer_is_me,
    too_deep,
    unbind,
)
from .events import Bye, encode_line


class Client:
    """One connection."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.connection = connection
        self.greeted = False  # said hello
        self.bad_lines = 0
        self.since = now
        self.drained = now
        self.input = bytearray()
        self.output = bytearray()

    @property
    def open(self) -> bool:
        return self.connection.fileno() >= 0


class Connections:
    """All clients of one socket, on the owner's selector (whose registered data are callables).

    Args:
        take: one line of a client -> why the connection must end, or None. It sets `greeted`.
        left: called once for each client that is gone.

    Raises:
        RunError: the socket cannot be placed safely, or another server answers there (exit code 65).
    """

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        take: Callable[[Client, bytes], str | None],
        left: Callable[[Client], None],
        clock: Callable[[], float],
        rebind_time: float = REBIND_TIME,
    ) -> None:
        self.path = path
        self._selector = selector
        self._take, self._left, self._clock = take, left, clock
        self._rebind_time = rebind_time
        self._looked = clock()
        self._clients: dict[int, Client] = {}
        self._listen()

    def __len__(self) -> int:
        return len(self._clients)

    def _listen(self) -> None:
        self._listener = bind_socket(self.path)
        self._inode = self.path.lstat().st_ino
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def tick(self) -> None:
        """Time limits, and the socket's place: bound again if it was deleted."""
        now = self._clock()
        for client in list(self._clients.values()):
            if not client.greeted and now - client.since > HELLO_TIME:
                self.bye(client, "no hello came")
            elif client.output and now - client.drained > STALL_TIME:
                self.drop(client)
        if now - self._looked > self._rebind_time:
            self._looked = now
            with contextlib.suppress(FileNotFoundError):
                if self.path.lstat().st_ino == self._inode:
                    return
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listen()

    def close(self, reason: str) -> None:
        """Say bye to all and go."""
        for client in list(self._clients.values()):
            self.bye(client, reason)
        self._selector.unregister(self._listener)
        self._listener.close()
        unbind(self.path, self._inode)

    # in

    def _accept(self) -> None:
        for _ in range(MAX_CLIENTS):
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # nobody waits any more, or the client left again at once
            connection.setblocking(False)
            client = Client(connection, self._clock())
            reason = None
            if not peer_is_me(connection):
                reason = "another user's process"
            elif len(self._clients) >= MAX_CLIENTS:
                reason = f"{MAX_CLIENTS} clients are connected already"
            self._clients[connection.fileno()] = client
            self._selector.register(connection, selectors.EVENT_READ, self._reader(client))
            if reason is not None:
                self.bye(client, reason)

    def _reader(self, client: Client) -> Callable[[], None]:
        return lambda: self._read(client)

    def _read(self, client: Client) -> None:
        if client.open:
            self._flush(client)
        if not client.open:
            return  # dropped earlier in this turn, or just now
        try:
            data = client.connection.recv(LINE_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(client)
            return
        client.input += data
        while (end := client.input.find(b"\n")) >= 0 and client.open:
            line = bytes(client.input[:end])
            del client.input[: end + 1]
            reason = self._line(client, line)
            if reason is not None:
                self.bye(client, reason)
                return
        if len(client.input) >= LINE_LIMIT:
            self.bye(client, "a line is too long")

    def _line(self, client: Client, line: bytes) -> str | None:
        if len(line) >= LINE_LIMIT:
            return "a line is too long"
        return "a line is nested too deep" if too_deep(line) else self._take(client, line)

    # out

    def send(self, client: Client, line: bytes) -> None:
        """Queue a line; a client that reads nothing is dropped, since a reply is far smaller than its queue."""
        if not client.open:
            return
        client.output += line
        if len(client.output) > QUEUE_LIMIT:
            self.drop(client)
        else:
            self._flush(client)

    def send_all(self, line: bytes) -> None:
        """Queue a line for everybody who has said hello."""
        for client in list(self._clients.values()):
            if client.greeted:
                self.send(client, line)

    def _flush(self, client: Client) -> None:
        try:
            while client.output:
                sent = client.connection.send(client.output)
                client.drained = self._clock()
                del client.output[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.drop(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.output else 0)
        if self._selector.get_key(client.connection).events != wanted:
            self._selector.modify(client.connection, wanted, self._reader(client))

    def bye(self, client: Client, reason: str) -> None:
        """Say why, as far as the kernel takes it, and close."""
        client.output += encode_line(Bye(reason))
        with contextlib.suppress(OSError):
            client.connection.send(client.output)
        self.drop(client)

    def drop(self, client: Client) -> None:
        """Close without a word."""
        if self._clients.pop(client.connection.fileno(), None) is None:
            return
        self._selector.unregister(client.connection)
        client.connection.close()
        self._left(client)
