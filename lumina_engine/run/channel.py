"""The supervisor's end of the channel to its ranks: who they are, where they are, commands for rank 0 (see rank.py)."""

from __future__ import annotations

import hmac
import json
import selectors
import socket
import time
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .process import Process, process
from .rank import MESSAGE_LIMIT, Command
from .socket import HELLO_TIME, bind_socket, peer, unbind

_WAITING = 64  # commands kept for a rank 0 that has not connected yet
_UNAPPLIED = 256  # commands kept in case rank 0 dies before it has obeyed


@dataclass(slots=True)
class RankState:
    """What a rank said last. `at` is the supervisor's monotonic time of the last change of (step, section)."""

    process: Process
    step: int | None = None
    section: str | None = None
    at: float = 0.0
    exit_code: int | None = None
    exit_reason: str | None = None
    connected: bool = True


@dataclass(frozen=True, slots=True)
class End:
    """How the first rank that did not end well ended: with which code, or without a word (None)."""

    rank: int
    code: int | None
    reason: str | None
    at: float


class RankServer:
    """Listens for the ranks of one supervisor.

    Args:
        path: where to listen.
        nonce: only processes that know it are ranks of this run.
        world: number of ranks.

    Raises:
        RunError: the socket cannot be placed safely.
    """

    def __init__(self, path: Path, selector: selectors.BaseSelector, nonce: str, world: int) -> None:
        self.path = path
        self.ranks: dict[int, RankState] = {}
        self.failure: End | None = None  # the others are ended by it, so only the first one tells why
        self._nonce = nonce
        self._world = world
        self._selector = selector
        self._connections: dict[socket.socket, int | None] = {}  # the rank once it is known
        self._since: dict[socket.socket, float] = {}  # of those that have not said hello
        self._waiting: deque[Command] = deque()
        self._unapplied: OrderedDict[str, Command] = OrderedDict()  # accepted, its effect not in the log yet
        self._listen()

    def _listen(self) -> None:
        self._listener = bind_socket(self.path, socket.SOCK_SEQPACKET)
        self._inode = self.path.lstat().st_ino
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def send(self, command: Command) -> str | None:
        """Give a command to rank 0, at once or when it connects; why that cannot be, or None.

        One that was accepted is given to the next incarnation too, until `applied` says that its effect is in the log.
        """
        connection = self._connection(0)
        if connection is None:
            if len(self._waiting) >= _WAITING:
                return "too many commands wait for the run to start"
            self._waiting.append(command)
        elif not self._deliver(connection, command):
            return "the run does not take commands at the moment: try again"
        self._unapplied[command.id] = command
        while len(self._unapplied) > _UNAPPLIED:
            self._unapplied.popitem(last=False)
        return None

    def applied(self, request: str) -> None:
        """The effect of this command is in the log."""
        self._unapplied.pop(request, None)

    @property
    def connected(self) -> bool:
        """Whether rank 0 is there."""
        return self._connection(0) is not None

    def shown(self) -> list[dict[str, Any]]:
        """The ranks for a viewer: rank, pid, step, section, seconds in it, whether it is there, its exit code if it has one."""
        now = time.monotonic()
        return [
            {
                "rank": rank,
                "pid": state.process.pid,
                "step": state.step,
                "section": state.section,
                "age_s": now - state.at,
                "connected": state.connected,
                "exit_code": state.exit_code,
            }
            for rank, state in sorted(self.ranks.items())
        ]

    def renew(self) -> None:
        """Make ready for a new incarnation: of the old one only what it was told and did not do, and a socket in its place.

        Raises:
            RunError: something else lies there now.
        """
        self.reset()
        self._waiting.extend(self._unapplied.values())
        if not self.path.exists() or self.path.lstat().st_ino != self._inode:
            self._unlisten()
            self._listen()

    def reset(self) -> None:
        """Forget the ranks of the incarnation that has ended."""
        for connection in list(self._connections):
            self._drop(connection)
        self.ranks.clear()
        self.failure = None
        self._waiting.clear()

    def tick(self) -> None:
        """Time limits. Call every turn."""
        now = time.monotonic()
        for connection, since in list(self._since.items()):
            if now - since > HELLO_TIME:
                self._drop(connection)

    def close(self) -> None:
        """Close everything; ranks that still live leave at once."""
        self.reset()
        self._unlisten()
        unbind(self.path, self._inode)

    def _unlisten(self) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()

    def _connection(self, rank: int) -> socket.socket | None:
        return next((connection for connection, of in self._connections.items() if of == rank), None)

    def _deliver(self, connection: socket.socket, command: Command) -> bool:
        try:
            connection.send(json.dumps({"op": "cmd", **asdict(command)}).encode())
        except OSError:
            return False
        return True

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._connections[connection] = None
        self._since[connection] = time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._ready(connection))

    def _ready(self, connection: socket.socket) -> None:
        if connection not in self._connections:
            return
        try:
            data = connection.recv(MESSAGE_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            content = json.loads(data)
            known = isinstance(content, dict) and self._take(connection, content)
        except (ValueError, RecursionError):
            known = False
        if not known:
            self._drop(connection)

    def _take(self, connection: socket.socket, content: dict[str, Any]) -> bool:
        """One message; False ends the connection."""
        rank = self._connections[connection]
        if rank is None:
            return self._greet(connection, content)
        state = self.ranks[rank]
        if content.get("op") == "beat" and isinstance(content.get("step"), int):
            state.step, state.section, state.at = content["step"], str(content.get("section"))[:32], time.monotonic()
        elif content.get("op") == "exit" and isinstance(content.get("code"), int):
            state.exit_code = content["code"]
            state.exit_reason = str(content["reason"])[:1000] if content.get("reason") else None
            if state.exit_code != 0:
                self._failed(End(rank, state.exit_code, state.exit_reason, time.monotonic()))
        return True

    def _failed(self, end: End) -> None:
        self.failure = self.failure or end

    def _greet(self, connection: socket.socket, content: dict[str, Any]) -> bool:
        rank = content.get("rank")
        pid = peer(connection)[0]
        found = process(pid)
        if (
            content.get("op") != "hello"
            or not hmac.compare_digest(str(content.get("nonce")).encode(), self._nonce.encode())
            or not isinstance(rank, int)
            or not 0 <= rank < self._world
            or self._connection(rank) is not None
            or found is None
        ):
            return False
        del self._since[connection]
        self._connections[connection] = rank
        self.ranks[rank] = RankState(found, at=time.monotonic())
        while rank == 0 and self._waiting and self._deliver(connection, self._waiting[0]):
            self._waiting.popleft()
        return True

    def _drop(self, connection: socket.socket) -> None:
        rank = self._connections.pop(connection)
        self._since.pop(connection, None)
        if rank is not None:
            self.ranks[rank].connected = False
            if self.ranks[rank].exit_code is None:
                self._failed(End(rank, None, None, time.monotonic()))
        self._selector.unregister(connection)
        connection.close()
