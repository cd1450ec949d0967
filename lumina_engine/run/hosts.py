"""The ranks of a run on its machines: `python -m lumina_engine.run.hosts … -- COMMAND`, a child of the supervisor.

It starts this machine's ranks itself and, over ssh or srun, one agent (node.py) on each other machine. For each rank there it
holds a connection to the supervisor, so that the supervisor sees all ranks alike. A machine whose line ends, or is silent for
the time-out, ends the run: its ranks report HOST_LOST with the machine's name, the others are killed. It ends by TERM itself
where a rank did that did not listen yet and that nobody here had told to leave.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .hostfile import check_host
from .interface import free_port, interface_of, socket_variables
from .launchers import REMOTE, agent_words, carried, check_words
from .line import Line
from .local_ranks import LocalRanks, rank_variables
from .node import ALIVE_TIME
from .policy import CRASHED, HOST_LOST
from .process import end_as, held, leash
from .signals import SignalQueue

START_TIME = 60.0  # s until every agent must have answered
LEAVE_TIME = 30.0  # s that the other ranks get to leave after one has failed


class Remote:
    """One other machine: its agent's process here, the line to it, and its ranks' connections to the supervisor."""

    def __init__(self, name: str, node: int, ranks: range, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None and child.stdout is not None
        self.name, self.node, self.ranks, self.child = name, node, ranks, child
        self.line = Line(os.dup(child.stdout.fileno()), os.dup(child.stdin.fileno()))
        child.stdout.close()
        child.stdin.close()
        self.up = False
        self.pids: dict[int, int] = {}  # connection -> pid of the rank there
        self.connections: dict[int, socket.socket] = {}
        self.rank_of: dict[int, int] = {}
        self.left = set(ranks)
        self.done = False


class Hosts:
    """Starts and watches the ranks on all machines.

    Args:
        options: `parse`.
        environment: LUMINA_RANK_SOCKET and LUMINA_NONCE name the supervisor; without them there is none to tell.
    """

    def __init__(self, options: argparse.Namespace, environment: Mapping[str, str]) -> None:
        self.options, self.environment = options, dict(environment)
        self.selector = selectors.DefaultSelector()
        self.signals = SignalQueue(
            self.selector,
            (signal.SIGTERM, signal.SIGQUIT),
            (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2),
        )
        self.world = options.ranks * len(options.host)
        self.codes: dict[int, int] = {}
        self.failed_at: float | None = None
        self.lost: str | None = None
        self.asked = False  # somebody sent us a TERM
        self.left_early = False  # a rank ended by a TERM that was not the end of another one's fault
        self.local: LocalRanks | None = None
        self.remotes: list[Remote] = []
        self.begun = time.monotonic()
        self._said = 0.0

    # --- start ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the agents, then this machine's ranks.

        Raises:
            OSError: ssh, srun or the ranks' program cannot be started.
            RunError: a variable of the environment cannot go over, or there is no free port.
        """
        options = self.options
        for node, name in enumerate(options.host[1:], 1):
            first = node * options.ranks
            remote = Remote(name, node, range(first, first + options.ranks), self._connect(name))
            self.remotes.append(remote)
            self.selector.register(remote.line.reading, selectors.EVENT_READ, self._reader(remote))
            remote.line.send(op="start", **self._order(node, first))
        port = options.port or free_port(0)  # 0: this machine alone
        variables = rank_variables(0, options.ranks, self.world, 0, options.address, port)
        own = {**self.environment, **self._interface()}
        self.local = LocalRanks(self.selector, options.command, variables, own, self._ended)

    def _interface(self) -> dict[str, str]:
        """Ranks of one machine meet on loopback only; with others, on the interface that leads to them."""
        if len(self.options.host) > 1:
            return socket_variables(self.environment, self.options.host[1])
        found = interface_of("127.0.0.1")
        return {"GLOO_SOCKET_IFNAME": found} if found and "GLOO_SOCKET_IFNAME" not in self.environment else {}

    def _connect(self, name: str) -> subprocess.Popen[bytes]:
        tie = leash(os.getpid())

        def prepare() -> None:
            tie()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the ranks there are told over the line, which must stay

        argv = REMOTE[self.options.by](name, agent_words())
        with held():
            return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=prepare)

    def _order(self, node: int, first: int) -> dict[str, Any]:
        options = self.options
        return {
            "argv": options.command,
            "environment": carried(self.environment),
            "folder": str(Path.cwd()),  # the run's folder, at the same path on every machine
            "first": first,
            "count": options.ranks,
            "world": self.world,
            "node": node,
            "address": options.address,
            "port": options.port,
            "timeout": options.timeout,
        }

    # --- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Watch until all ranks have ended; the exit code: 0, that of the first rank that failed, -SIGTERM or HOST_LOST."""
        while len(self.codes) < self.world and self.lost is None:
            before = time.monotonic()
            for key, _ in self.selector.select(ALIVE_TIME / 4):
                key.data()
            now = time.monotonic()
            self._watch(now, stopped=now - before > ALIVE_TIME * 2)
            for number in self.signals.take():
                self.asked |= number == signal.SIGTERM
                self._pass_on(number)
            if self.failed_at is not None and now - self.failed_at > LEAVE_TIME:
                self._kill()
        if self.lost is not None:
            self._kill()
            return HOST_LOST
        if self.left_early:
            return -signal.SIGTERM
        return next((code if code > 0 else CRASHED for code in self.codes.values() if code), 0)

    def _watch(self, now: float, stopped: bool) -> None:
        alive = now - self._said > ALIVE_TIME
        if alive:
            self._said = now
        for remote in self.remotes:
            if remote.done:
                continue
            if stopped:
                remote.line.heard_at = now  # it was we who did not listen
            if alive:
                remote.line.send(op="alive")
            remote.line.flush()
            for text in remote.line.noise:
                print(f"{remote.name}: {text}", file=sys.stderr, flush=True)
            remote.line.noise.clear()
            if remote.line.ended and not remote.left:
                remote.done = True
            elif remote.line.ended:
                self._lose(remote, self._why_ended(remote))
            elif not remote.up and now - self.begun > START_TIME:
                self._lose(remote, f"its agent did not start within {START_TIME:g} s")
            elif remote.up and remote.line.silent_s > self.options.timeout:
                self._lose(remote, f"no sign of life for {self.options.timeout:g} s: the machine or the line to it is down")

    def _why_ended(self, remote: Remote) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            remote.child.wait(1.0)
        code = remote.child.returncode
        ended = "" if code is None else f" ({self.options.by} ended with {code})"
        if remote.up:
            return f"its agent ended without a word{ended}"
        return f"its agent cannot be started{ended}: engine.log has what {self.options.by} says"

    def _lose(self, remote: Remote, why: str) -> None:
        """The run cannot go on without this machine. The supervisor hears it from each of its ranks."""
        remote.done = True
        self.lost = f"host {remote.name} is lost: {why}; resume on the others (num_nodes, hostfile), or here when it is back"
        print(f"lumina: {self.lost}", file=sys.stderr, flush=True)
        word = json.dumps({"op": "exit", "code": HOST_LOST, "reason": self.lost}).encode()
        known = [remote.connections[number] for number in remote.rank_of if number in remote.connections]
        for connection in known or filter(None, [self._introduce(remote)]):
            with contextlib.suppress(OSError):  # no supervisor: nobody to tell
                connection.send(word)

    def _introduce(self, remote: Remote) -> socket.socket | None:
        """A connection in the name of the first rank of a machine whose ranks never came."""
        connection = self._supervisor()
        if connection is not None:
            hello = {"op": "hello", "nonce": self.environment.get("LUMINA_NONCE"), "rank": remote.ranks[0], "host": remote.name}
            connection.send(json.dumps(hello).encode())
        return connection

    def _supervisor(self) -> socket.socket | None:
        path = self.environment.get("LUMINA_RANK_SOCKET")
        if path is None:
            return None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connection.connect(path)
        except OSError:
            connection.close()
            return None
        connection.setblocking(False)
        return connection

    def _pass_on(self, number: int) -> None:
        """The supervisor signals the ranks here itself; those elsewhere are signalled through us."""
        for remote in self.remotes:
            remote.line.send(op="signal", number=number)
        if number == signal.SIGTERM and self.local is not None:
            self.local.signal(number)

    def _kill(self) -> None:
        if self.local is not None:
            self.local.kill()
        for remote in self.remotes:
            if not remote.done:
                remote.line.send(op="end")

    def _ended(self, rank: int, code: int, told: bool) -> None:
        """A rank has ended; when one failed the others are asked to leave, as launchers do."""
        self.codes[rank] = code
        self.left_early |= code == -signal.SIGTERM and (self.asked or not told)
        if code != 0 and self.failed_at is None:
            self.failed_at = time.monotonic()
            self._pass_on(signal.SIGTERM)

    # --- from the agents -----------------------------------------------------------------------------------------------

    def _reader(self, remote: Remote) -> Callable[[], None]:
        def read() -> None:
            for message in remote.line.receive():
                self._take(remote, message)
            if remote.line.ended:
                self.selector.unregister(remote.line.reading)

        return read

    def _take(self, remote: Remote, message: Mapping[str, Any]) -> None:
        op, number = message["op"], message.get("id")
        if op == "up":
            remote.up = True
        elif op == "open" and isinstance(number, int):
            remote.pids[number] = int(message["pid"])
            self._open(remote, number)
        elif op == "data" and number in remote.connections:
            self._pass_up(remote, number, base64.b64decode(message["data"]))
        elif op == "close" and number in remote.connections:
            self._close(remote, number)
        elif op == "ended" and message.get("rank") in remote.left:
            remote.left.discard(message["rank"])
            if message["code"]:
                print(
                    f"lumina: rank {message['rank']} on {remote.name} ended with {message['code']}", file=sys.stderr, flush=True
                )
            self._ended(int(message["rank"]), int(message["code"]), bool(message.get("told")))
        elif op == "bye":
            remote.done = True

    def _open(self, remote: Remote, number: int) -> None:
        connection = self._supervisor()
        if connection is None:
            remote.line.send(op="close", id=number)
            return
        remote.connections[number] = connection
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._pass_down(remote, number))

    def _pass_up(self, remote: Remote, number: int, data: bytes) -> None:
        if number not in remote.rank_of:  # its first word: who it is, to which we add where
            hello = json.loads(data)
            remote.rank_of[number] = hello.get("rank")
            data = json.dumps({**hello, "host": remote.name, "pid": remote.pids[number]}).encode()
        with contextlib.suppress(OSError):  # the supervisor is slow (the next heartbeat will do) or gone (we are about to go)
            remote.connections[number].send(data)

    def _pass_down(self, remote: Remote, number: int) -> None:
        if not remote.line.carry(number, remote.connections[number]):
            self._close(remote, number)

    def _close(self, remote: Remote, number: int) -> None:
        connection = remote.connections.pop(number)
        self.selector.unregister(connection)
        connection.close()


def hosts_argv(
    command: Sequence[str],
    hosts: Sequence[str],
    ranks: int,
    *,
    by: str = "ssh",
    address: str = "127.0.0.1",
    port: int = 29_500,
    timeout: float = 60.0,
) -> list[str]:
    """The command of this program.

    Args:
        command: of every rank.
        hosts: names of the machines, this one first. ranks: ranks on each.
        by: ssh or srun. timeout: seconds of silence after which a machine is lost.
        port: where the ranks meet; 0 is any that is free when they start, for one machine.

    Raises:
        RunError: a name that is no host name, a word that cannot go over (exit code 2).
    """
    words = [sys.executable, "-m", "lumina_engine.run.hosts", f"--ranks={ranks}", f"--by={by}"]
    words += [f"--host={check_host(name, 'hosts')}" for name in hosts]
    words += [f"--address={check_host(address, 'master_addr')}", f"--port={port}", f"--timeout={timeout:g}"]
    return [*words, "--", *check_words(command)]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The words of `hosts_argv`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--by", choices=sorted(REMOTE), default="ssh")
    parser.add_argument("--host", action="append", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("command", nargs="+")
    return parser.parse_args(list(argv))


def main() -> int:
    hosts = Hosts(parse(sys.argv[1:]), os.environ)
    hosts.start()
    return hosts.run()


if __name__ == "__main__":
    end_as(main())
