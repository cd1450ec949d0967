"""The agent of a run on another machine: `python -m lumina_engine.run.node`, started by hosts.py over ssh or srun.

Standard input and output are the line to the run's own machine. The first message is the order: command, environment and
numbers of the ranks. Each rank connects to a Unix socket of the agent as it would to its supervisor; the agent passes every
message on in both directions without looking at it. When the line ends, or is silent for too long, the ranks are killed.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from .interface import socket_variables
from .line import Line
from .local_ranks import LocalRanks, rank_variables
from .process import become_subreaper, descendants, myself, send_all, wait_gone
from .socket import bind_socket, peer, peer_is_me, socket_folder, unbind

ALIVE_TIME = 1.0  # s between two signs of life in either direction
ORDER_TIME = 60.0  # s until the order must have come
CLEAR_TIME = 10.0  # s that killed processes get to end
_PASSED = (signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1)  # what may be passed on to the ranks


class Agent:
    """Lives as long as its ranks, and no longer than its line."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.selector = selectors.DefaultSelector()
        self.selector.register(line.reading, selectors.EVENT_READ, self._told)
        self.ranks: LocalRanks | None = None
        self.left = 0  # ranks that have not ended
        self.timeout = ORDER_TIME
        self.path = socket_folder() / f"{secrets.token_hex(6)}.node"
        self._listener: socket.socket | None = None
        self._connections: dict[int, socket.socket] = {}
        self._count = 0
        self._said = 0.0

    def run(self) -> int:
        """Serve until the ranks have ended (0), or the line has (1)."""
        become_subreaper()
        self.line.send(op="up", host=socket.gethostname(), pid=os.getpid())
        try:
            while not self.line.ended and not (self.ranks is not None and self.left == 0):
                before = time.monotonic()
                for key, _ in self.selector.select(ALIVE_TIME / 4):
                    key.data()
                now = time.monotonic()
                if now - before > ALIVE_TIME * 2:
                    self.line.heard_at = now  # it was we who were stopped
                if self.line.silent_s > self.timeout:
                    print(f"lumina: {socket.gethostname()}: no word for {self.timeout:g} s", file=sys.stderr, flush=True)
                    return 1
                self._say(now)
            if not self.line.ended:
                self.line.send(op="bye")
            return 1 if self.line.ended else 0
        finally:
            self._clear()

    def _say(self, now: float) -> None:
        if now - self._said > ALIVE_TIME:
            self._said = now
            self.line.send(op="alive")
        self.line.flush()

    def _clear(self) -> None:
        left = [item for item in descendants(os.getpid()) if item != myself()]
        send_all(left, signal.SIGKILL)
        wait_gone(left, CLEAR_TIME)
        for connection in self._connections.values():
            connection.close()
        if self._listener is not None:
            inode = self.path.lstat().st_ino if self.path.exists() else -1
            self._listener.close()
            unbind(self.path, inode)

    # --- from the run's machine ----------------------------------------------------------------------------------------

    def _told(self) -> None:
        for message in self.line.receive():
            op = message["op"]
            if op == "start" and self.ranks is None:
                self._start(message)
            elif op == "data":
                self._pass_down(message)
            elif op == "close" and (connection := self._connections.get(message.get("id", -1))) is not None:
                self._drop(message["id"], connection)
            elif op == "signal" and message.get("number") in _PASSED and self.ranks is not None:
                self.ranks.signal(message["number"])
            elif op == "end" and self.ranks is not None:
                self.ranks.kill()

    def _start(self, order: Mapping[str, Any]) -> None:
        self.timeout = float(order["timeout"])
        self._listener = bind_socket(self.path, socket.SOCK_SEQPACKET)
        self.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        variables = rank_variables(
            order["first"], order["count"], order["world"], order["node"], order["address"], order["port"]
        )
        environment = {**os.environ, **order["environment"], "LUMINA_RANK_SOCKET": str(self.path)}
        environment |= socket_variables(environment, order["address"])
        self.left = len(variables)
        os.chdir(order["folder"])
        self.ranks = LocalRanks(self.selector, order["argv"], variables, environment, self._ended, output=2)

    def _pass_down(self, message: Mapping[str, Any]) -> None:
        connection = self._connections.get(message.get("id", -1))
        if connection is not None:
            with contextlib.suppress(OSError):  # the rank is gone: its end is told already
                connection.send(base64.b64decode(message["data"]))

    # --- from the ranks ------------------------------------------------------------------------------------------------

    def _ended(self, rank: int, code: int, told: bool) -> None:
        self.left -= 1
        self.line.send(op="ended", rank=rank, code=code, told=told)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if not peer_is_me(connection):
            connection.close()
            return
        connection.setblocking(False)
        self._count += 1
        number = self._count
        self._connections[number] = connection
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._pass_up(number, connection))
        self.line.send(op="open", id=number, pid=peer(connection)[0])

    def _pass_up(self, number: int, connection: socket.socket) -> None:
        if not self.line.carry(number, connection):
            self._drop(number, connection)

    def _drop(self, number: int, connection: socket.socket) -> None:
        if self._connections.pop(number, None) is not None:
            self.selector.unregister(connection)
            connection.close()


def main() -> int:
    # a scheduler signals everybody: what concerns the ranks comes over the line, and its end is ours
    for number in (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGPIPE,
    ):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)
    return Agent(Line(0, 1)).run()


if __name__ == "__main__":
    sys.exit(main())
