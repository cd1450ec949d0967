"""The way from the Chat screen to a chat server: starting it, waiting for it, streaming replies. No widget, no torch.

Blocking work runs in daemon threads that put updates into a queue; the screen takes them out when it repaints. A terminal that
is frozen or gone never holds a reply up, and a reply never holds the terminal up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeAlias

from lumina_engine.chat.client import ServerBackend, ServerGone, probe, socket_path
from lumina_engine.chat.events import Event, Loading, Message, ModelInfo
from lumina_engine.chat.modes import ChatError, Sampling
from lumina_engine.chat.session import ChatSession
from lumina_engine.run.process import process, send_signal

START_TIME = 90.0  # s until `serve --detach` must have answered
POLL = 0.05


class Phase(Enum):
    """What the link is doing."""

    IDLE = "idle"  # no checkpoint chosen
    CONNECTING = "connecting"
    READY = "ready"
    REPLYING = "replying"
    GONE = "gone"  # no server; the conversation is kept


@dataclass(frozen=True)
class Progress:
    """What is being done while connecting, since when (seconds), and the share of the weights that is read, if known."""

    detail: str
    seconds: float
    share: float | None = None


@dataclass(frozen=True)
class Connected:
    """A server answers; `notice` says why this checkpoint."""

    backend: ServerBackend
    notice: str = ""


@dataclass(frozen=True)
class Lost:
    """No server: it could not be started, or it ended. The error is one line; the screen knows the keys that help."""

    error: str


@dataclass(frozen=True)
class Refused:
    """This reply failed; the server goes on."""

    error: str


@dataclass(frozen=True)
class Saved:
    """The conversation was written after a turn, or why not."""

    path: Path | None
    error: str = ""


Update: TypeAlias = Progress | Connected | Lost | Refused | Saved | Event
Starter: TypeAlias = Callable[[Path, Callable[[], bool]], int]  # (checkpoint, given up?) -> pid of the server


@dataclass
class _Attempt:
    """One try to connect. `given_up` ends its thread."""

    path: Path
    given_up: threading.Event = field(default_factory=threading.Event)


class ChatLink:
    """One conversation's connection. Call everything from the screen's thread; `drain` gives what has happened.

    Args:
        starter: starts a detached server and returns its pid once it answers.
        save: write the conversation after every turn; None: `session.save`.
    """

    def __init__(self, starter: Starter | None = None, *, save: Callable[[], Path | None] | None = None) -> None:
        self.phase = Phase.IDLE
        self.session: ChatSession | None = None
        self.path: Path | None = None
        self._starter = starter or start_server
        self.save = save
        self._updates: deque[Update] = deque()
        self._attempt: _Attempt | None = None
        self._backend: ServerBackend | None = None

    def drain(self) -> list[Update]:
        """Everything since the last call, in order; the phase follows it."""
        updates = []
        while self._updates:
            update = self._updates.popleft()
            self._follow(update)
            updates.append(update)
        return updates

    def _follow(self, update: Update) -> None:
        if isinstance(update, Connected):
            self._backend = update.backend
            if self.session is not None:
                self.session.backend = update.backend
            self.phase = Phase.READY
        elif isinstance(update, Lost):
            self.phase = Phase.GONE
        elif isinstance(update, Refused | Saved):
            self.phase = Phase.READY

    def watch(self) -> None:
        """Notice a server that leaves while nothing is asked of it."""
        if self.phase is Phase.READY and self._backend is not None and (reason := self._backend.gone()):
            self._updates.append(Lost(reason))

    # connecting

    def connect(self, path: Path, notice: str = "") -> None:
        """Attach to the server of a committed checkpoint, starting it if it does not run."""
        self.disconnect()
        self.path = path
        self.phase = Phase.CONNECTING
        attempt = self._attempt = _Attempt(path)
        threading.Thread(target=self._connect, args=(attempt, notice, self._updates), name="chat-connect", daemon=True).start()

    def disconnect(self) -> None:
        """Leave the server, or stop waiting for it. It goes on for others until its idle time is over."""
        if self._attempt is not None:
            self._attempt.given_up.set()
            self._attempt = None
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        self._updates = deque()  # threads of the old connection keep the old queue
        self.phase = Phase.IDLE

    def _connect(self, attempt: _Attempt, notice: str, updates: deque[Update]) -> None:
        began = time.monotonic()

        def tell(update: Update) -> None:
            if not attempt.given_up.is_set():
                updates.append(update)

        def loading(progress: Loading) -> None:
            share = progress.bytes_read / progress.bytes_total if progress.bytes_read and progress.bytes_total else None
            tell(Progress(progress.detail, time.monotonic() - began, share))

        given_up = attempt.given_up.is_set
        started = 0
        try:
            place = socket_path(attempt.path)
            if probe(place) is None:
                loading(Loading("starting the chat server", 0.0))
                started = self._starter(attempt.path, given_up)
            backend = ServerBackend(place, client="lumina", loading=loading, given_up=given_up)
            if given_up():
                backend.close()
            tell(Connected(backend, notice))
        except (ChatError, OSError) as error:
            tell(Lost(error.cause if isinstance(error, ServerGone) else str(error)))
        if given_up() and started:
            stop_server(started)  # nobody waits for its model any more

    # replying

    def send(self, text: str, seed: int | None = None) -> None:
        """Send a message; events come through `drain`. `seed` is for this reply only."""
        assert self.session is not None
        self._reply(self.session.send(text, seed))

    def retry(self, seed: int | None = None) -> None:
        """Answer the last message again."""
        assert self.session is not None
        self._reply(self.session.retry(seed))

    def cancel(self) -> None:
        """End the reply."""
        if self.session is not None and self.phase is Phase.REPLYING:
            self.session.cancel()

    def _reply(self, stream: Generator[Event, None, None]) -> None:
        self.phase = Phase.REPLYING
        threading.Thread(target=self._pump, args=(stream, self._updates), name="chat-reply", daemon=True).start()

    def _pump(self, stream: Generator[Event, None, None], updates: deque[Update]) -> None:
        try:
            for event in stream:
                updates.append(event)
        except ServerGone as error:
            updates.append(Lost(error.cause))
            return
        except ChatError as error:
            updates.append(Refused(str(error)))
            return
        updates.append(self._saved())

    def _saved(self) -> Saved:
        if self.session is None:
            return Saved(None)
        try:
            return Saved(self.save() if self.save is not None else self.session.save())
        except ChatError as error:
            return Saved(None, str(error))


class NoBackend:
    """Stands for a server that is not there: a conversation can be read, but not answered."""

    def __init__(self, path: str, step: int | None = None, digest: str | None = None) -> None:
        self.info = ModelInfo(path=path, step=step, digest=digest)

    def generate(
        self, messages: Sequence[Message], sampling: Sampling, seed: int, *, alternatives: int = 0, trace: bool = False
    ) -> Generator[Event, None, None]:
        """Nobody answers.

        Raises:
            ServerGone: always.
        """
        raise ServerGone(f"no chat server has {self.info.path} loaded")
        yield  # a generator, as in every backend

    def cancel(self) -> None:
        """Nothing is being answered."""

    def close(self) -> None:
        """Nothing is open."""


def serve_argv(path: Path) -> list[str]:
    """The command that starts a detached chat server."""
    return [sys.executable, "-m", "lumina_engine.cli", "serve", str(path), "--detach"]


def start_server(path: Path, given_up: Callable[[], bool], argv: list[str] | None = None) -> int:
    """Run `lumina-engine serve PATH --detach` and return the server's pid as soon as it answers, loading or ready.

    The child reads nothing, writes to files and leads its own session; it ends by itself, and the server is nobody's child.

    Raises:
        ChatError: refused, failed, given up, or not answered within START_TIME; the engine's own last line.
    """
    place = socket_path(path)
    with tempfile.TemporaryDirectory(prefix="lumina-serve-") as folder:
        err_path = Path(folder) / "err"
        with err_path.open("wb") as err:
            child = subprocess.Popen(
                argv or serve_argv(path),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
            )
        end = time.monotonic() + START_TIME
        while (code := _wait(child)) is None:
            if hello := probe(place):
                threading.Thread(target=child.wait, name="chat-start", daemon=True).start()
                return hello.pid
            if given_up() or time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGTERM)
                child.wait()
                raise ChatError("given up" if given_up() else f"the chat server did not answer in {START_TIME:.0f} s")
        errors = err_path.read_text(errors="replace").strip()
    if code == 0 and (hello := probe(place)):
        return hello.pid
    last = errors.splitlines()[-1] if errors else f"lumina-engine serve ended with exit code {code}"
    raise ChatError(last.removeprefix("lumina-engine: "))


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(POLL)
    except subprocess.TimeoutExpired:
        return None


def stop_server(pid: int) -> None:
    """TERM for a server that this program started."""
    if found := process(pid):
        send_signal(found, signal.SIGTERM)
