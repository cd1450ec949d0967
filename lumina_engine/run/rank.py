"""A rank's end of the channel to its supervisor. Standard library only; every call returns at once.

The supervisor listens on a Unix socket of whole messages (SOCK_SEQPACKET) and gives each rank its path and a nonce in the
environment. Upwards go a hello, heartbeats and the exit code; downwards, to rank 0 only, the commands. When the supervisor
ends, the channel ends, and the rank leaves with `os._exit`: no rank outlives its supervisor.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .place import Place
from .process import die_with_parent
from .sections import SectionTimes

MESSAGE_LIMIT = 65_536  # bytes of one message
BEAT_INTERVAL = 0.1  # s: heartbeats in between are merged, the newest counts
ORPHAN_EXIT_CODE = 1  # of a rank whose supervisor is gone; nobody is left to read it


@dataclass(frozen=True, slots=True)
class Command:
    """Something a user asked for. The record of its effect carries `id`.

    `cmd` is stop (args save: bool), checkpoint, pause, resume, set_lr (args lr: float), or preempt (args grace: seconds until
    the kill): leave with exit code 75.
    """

    id: str
    cmd: str
    args: dict[str, Any] = field(default_factory=dict)


class NullChannel:
    """The channel of a rank without supervisor (a trainer in a plain script): no commands, reports go nowhere."""

    supervised = False

    def report(self, step: int, section: str) -> None:
        """Nobody to report to."""

    def poll(self) -> list[Command]:
        """No commands."""
        return []

    def leave(self, code: int, reason: str | None = None) -> None:
        """Nobody to tell."""


class RankChannel(NullChannel):
    """The channel of a supervised rank. Made by `from_environment`.

    Args:
        path: the supervisor's rank socket.
        nonce: proves that this process belongs to the run.
        rank: global rank; rank 0 gets the commands.

    Raises:
        ConnectionError: the supervisor does not answer, so this rank must not start.
    """

    supervised = True

    def __init__(self, path: str, nonce: str, rank: int) -> None:
        self._commands: deque[Command] = deque()
        self._state: tuple[int, str] | None = None  # written by the caller, read by the thread
        self._sent: tuple[int, str] | None = None
        self._times = SectionTimes()
        self._place = Place()
        self._beaten = 0.0  # monotonic time of the last heartbeat
        self._sending = threading.Lock()  # the caller only tries it
        self._leaving = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(BEAT_INTERVAL)  # poll() underneath: select() fails above 1,024 descriptors
            self._socket.connect(path)
            hello = json.dumps({"op": "hello", "nonce": nonce, "rank": rank}).encode()
            socket.send_fds(self._socket, [hello], [self._place.descriptor])
        except OSError as error:
            self._socket.close()
            raise ConnectionError(f"{path}: the run's supervisor does not answer: {error.strerror}") from error
        self._thread = threading.Thread(target=self._serve, name="rank-channel", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> NullChannel:
        """The channel that LUMINA_RANK_SOCKET, LUMINA_NONCE and RANK name, or a null channel without them.

        Under a supervisor it also ties this process to its parent (PR_SET_PDEATHSIG) and makes SIGQUIT print all stacks to
        stderr. Call it first thing, from the main thread.

        Raises:
            ConnectionError: the supervisor named by the environment is gone.
        """
        environment = os.environ if environment is None else environment
        path, nonce = environment.get("LUMINA_RANK_SOCKET"), environment.get("LUMINA_NONCE")
        if not path or not nonce:
            return NullChannel()
        die_with_parent()
        faulthandler.register(signal.SIGQUIT, all_threads=True, chain=False)
        return cls(path, nonce, int(environment.get("RANK", "0")))

    def report(self, step: int, section: str) -> None:
        """Say where this rank is (section: tokenise, data, forward, backward, step, save, eval, compile, …).

        Costs little and never waits. The word goes out at once if none did for BEAT_INTERVAL, so that whatever happens next in
        a section that takes its time, the supervisor knows which it was; else the thread sends the newest one.
        """
        now = time.monotonic()
        self._times.enter(section, now)
        self._place.put(step, section)
        self._state = (step, section)
        if now - self._beaten >= BEAT_INTERVAL and self._sending.acquire(blocking=False):
            try:
                self._beat()
            except OSError:
                pass  # the supervisor is slow, or gone: the thread finds out
            finally:
                self._sending.release()

    def poll(self) -> list[Command]:
        """The commands that came since the last call, oldest first. Always empty on ranks other than 0."""
        commands = []
        while self._commands:
            commands.append(self._commands.popleft())
        return commands

    def leave(self, code: int, reason: str | None = None) -> None:
        """Tell the supervisor with which code this rank is about to exit; launchers hide the codes of their ranks.

        After this the end of the channel no longer ends the process.
        """
        self._leaving.set()
        with contextlib.suppress(OSError):  # the supervisor may be gone already: then nobody needs the code
            self._flush()
            self._send({"op": "exit", "code": code, "reason": reason})

    def _send(self, message: dict[str, Any]) -> None:
        self._socket.send(json.dumps(message).encode())

    def _flush(self) -> None:
        with self._sending:
            self._beat(stats=True)

    def _beat(self, stats: bool = False) -> None:
        state = self._state
        if state is None or state is self._sent:
            return
        message = {"op": "beat", "step": state[0], "section": state[1], "steps": self._times.steps}
        if stats:  # the thread's business: they cost more than the caller should pay
            message |= self._times.stats(time.monotonic()) or {}
        try:
            os.write(self._socket.fileno(), json.dumps(message).encode())  # the descriptor does not block, unlike send()
        except BlockingIOError:
            return  # the supervisor does not read at the moment: a newer word will do
        self._sent, self._beaten = state, time.monotonic()

    def _serve(self) -> None:
        """The daemon thread: commands in, the newest heartbeat out, the end when the supervisor ends."""
        while True:
            message: bytes | None
            try:
                message = self._receive_some()
                self._flush()
            except OSError:
                message = b""
            if message == b"":
                if self._leaving.is_set():
                    return
                os._exit(ORPHAN_EXIT_CODE)
            if message:
                self._take(message)

    def _receive_some(self) -> bytes | None:
        """A message, b"" at the end of the channel, None after BEAT_INTERVAL without either."""
        try:
            return self._socket.recv(MESSAGE_LIMIT)
        except TimeoutError:
            return None

    def _take(self, message: bytes) -> None:
        content = json.loads(message)
        if content.get("op") == "cmd":
            self._commands.append(Command(str(content["id"]), str(content["cmd"]), dict(content.get("args") or {})))
