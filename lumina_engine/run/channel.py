"""The supervisor's end of the channel to its ranks: who they are, where they are, commands for rank 0 (see rank.py)."""

from __future__ import annotations

import hmac
import json
import os
import selectors
import socket
import time
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .place import read_place
from .policy import HOST_LOST, PREEMPTED
from .process import Process, process
from .rank import MESSAGE_LIMIT, Command
from .socket import HELLO_TIME, bind_socket, peer, unbind

_WAITING = 64  # commands kept for a rank 0 that has not connected yet
_UNAPPLIED = 256  # commands kept in case rank 0 dies before it has obeyed


def named(rank: int, host: str | None) -> str:
    """A rank for a person, with its machine if that is another one."""
    return f"rank {rank}" + (f" on {host}" if host else "")


@dataclass(slots=True)
class RankState:
    """What a rank said last. `at` is the supervisor's monotonic time of the last change of (step, section).

    `steps` counts those finished since this start; `p99` is the 99th percentile of each section's durations and `work` the
    median forward time of a step, in seconds, as the rank measured them.
    Of a rank on another machine `process` is the one here that passes its words on, `host` and `pid` are its own.
    """

    process: Process
    step: int | None = None
    section: str | None = None
    at: float = 0.0
    exit_code: int | None = None
    exit_reason: str | None = None
    connected: bool = True
    steps: int = 0
    p99: dict[str, float] = field(default_factory=dict)
    work: float | None = None
    place: int | None = None  # descriptor of what the rank says at every change (see place.py); None for one far away
    host: str | None = None
    pid: int = 0

    def beat(self, content: dict[str, Any]) -> None:
        """Take over a heartbeat; what is malformed in it is left out."""
        self.step, self.section, self.at = content["step"], str(content.get("section"))[:32], time.monotonic()
        if isinstance(content.get("steps"), int):
            self.steps = content["steps"]
        if isinstance(content.get("p99"), dict):
            self.p99 = {str(name)[:32]: float(span) for name, span in content["p99"].items() if _is_time(span)}
        if "work" in content:
            self.work = float(content["work"]) if _is_time(content["work"]) else None

    def look_closer(self) -> None:
        """Take step and section from the rank's own memory: it may have moved on after its last heartbeat, and frozen then."""
        found = None if self.place is None else read_place(self.place)
        if found is not None:
            self.step, self.section = found

    def forget(self) -> None:
        """Close what belongs to it."""
        if self.place is not None:
            os.close(self.place)
            self.place = None


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


@dataclass(frozen=True, slots=True)
class End:
    """How the first rank that did not end well ended: with which code, or without a word (None)."""

    rank: int
    code: int | None
    reason: str | None
    at: float
    host: str | None = None

    @property
    def who(self) -> str:
        """The rank, and its machine if that is another one."""
        return named(self.rank, self.host)


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

    def tell(self, command: Command) -> bool:
        """Give rank 0 something that is worth nothing later; whether it took it."""
        connection = self._connection(0)
        return connection is not None and self._deliver(connection, command)

    def applied(self, request: str) -> None:
        """The effect of this command is in the log."""
        self._unapplied.pop(request, None)

    @property
    def connected(self) -> bool:
        """Whether rank 0 is there."""
        return self._connection(0) is not None

    def shown(self) -> list[dict[str, Any]]:
        """The ranks for a viewer: rank, host (None: here), pid there, step, section, seconds in it, connected, exit code."""
        now = time.monotonic()
        return [
            {
                "rank": rank,
                "host": state.host,
                "pid": state.pid,
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
        for state in self.ranks.values():
            state.forget()
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
        descriptors: list[int] = []
        try:
            data, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_LIMIT, 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            content = json.loads(data)
            known = isinstance(content, dict) and self._take(connection, content, descriptors)
        except (ValueError, RecursionError):
            known = False
        for descriptor in descriptors:  # of a stranger, or none that we asked for
            os.close(descriptor)
        if not known:
            self._drop(connection)

    def _take(self, connection: socket.socket, content: dict[str, Any], descriptors: list[int]) -> bool:
        """One message; False ends the connection. A descriptor that is kept is taken out of the list."""
        rank = self._connections[connection]
        if rank is None:
            greeted = self._greet(connection, content)
            if greeted and descriptors:
                self.ranks[content["rank"]].place = descriptors.pop()
            return greeted
        state = self.ranks[rank]
        if content.get("op") == "beat" and isinstance(content.get("step"), int):
            state.beat(content)
        elif content.get("op") == "exit" and isinstance(content.get("code"), int):
            state.exit_code = content["code"]
            state.exit_reason = str(content["reason"])[:1000] if content.get("reason") else None
            if state.exit_code != 0:
                self._failed(End(rank, state.exit_code, state.exit_reason, time.monotonic(), state.host))
        return True

    def _failed(self, end: End) -> None:
        """The first one tells why. But a lost machine is the cause also if others fell first, and a rank that left as it was
        told is none: its word may come before that of the one whose end it was told for."""
        told = self.failure is not None and self.failure.code == PREEMPTED and end.code != PREEMPTED
        if self.failure is None or told or end.code == HOST_LOST:
            self.failure = end

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
        if rank in self.ranks:
            self.ranks[rank].forget()
        host, there = content.get("host"), content.get("pid")
        state = RankState(found, at=time.monotonic(), pid=there if isinstance(there, int) else pid)
        state.host = host[:253] if isinstance(host, str) else None
        self.ranks[rank] = state
        while rank == 0 and self._waiting and self._deliver(connection, self._waiting[0]):
            self._waiting.popleft()
        return True

    def _drop(self, connection: socket.socket) -> None:
        rank = self._connections.pop(connection)
        self._since.pop(connection, None)
        if rank is not None:
            self.ranks[rank].connected = False
            if self.ranks[rank].exit_code is None:
                self._failed(End(rank, None, None, time.monotonic(), self.ranks[rank].host))
        self._selector.unregister(connection)
        connection.close()
