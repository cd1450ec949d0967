"""The other end of the chat socket, for command line and terminal. Blocking, one reply at a time; no torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from ..run.socket import peer_is_me, socket_folder
from .events import (
    MAX_LINE,
    PROTO,
    Answer,
    Bye,
    Cancel,
    ClientHello,
    Done,
    Event,
    Failed,
    Generate,
    Loading,
    Message,
    ModelInfo,
    Queued,
    Ready,
    Routed,
    ServerHello,
    Start,
    Token,
    WireError,
    WireMessage,
    decode_answer,
    encode_line,
)
from .modes import ChatError, Sampling

SUFFIX = ".chat.sock"
CONNECT_TIME = 5.0  # s for the server's hello
SETTLE_TIME = 30.0  # s for the end of a reply that was given up
POLL = 0.2  # s between two looks whether to cancel or to give up
_RECEIVE = 1 << 16
_SERVER_LINE = 1 << 20  # longest line that is believed


class ServerGone(ChatError):
    """The chat server ended or cannot be reached. The conversation is not touched by it.

    `cause` is the message without the advice for a plain terminal.
    """

    def __init__(self, cause: str, advice: str = "", exit_code: int = 1) -> None:
        super().__init__(f"{cause}: {advice}" if advice else cause, exit_code)
        self.cause = cause


def socket_path(checkpoint: Path | str, device: str = "auto", precision: str = "auto") -> Path:
    """Where the server of a checkpoint listens: the name follows from its path, so that every viewer finds it."""
    name = f"{os.path.realpath(checkpoint)}\0{device}\0{precision}"
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    return socket_folder() / f"{digest[:12]}{SUFFIX}"


def server_sockets() -> list[Path]:
    """Sockets of chat servers in this user's folder, dead or alive."""
    try:
        return sorted(socket_folder().glob(f"*{SUFFIX}"))
    except OSError:
        return []


def probe(path: Path) -> ServerHello | None:
    """What the server at `path` says of itself, loading or ready; None if nobody answers there."""
    if not path.exists():
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(CONNECT_TIME)
        try:
            connection.connect(str(path))
            if not peer_is_me(connection):
                return None
            connection.sendall(encode_line(ClientHello(PROTO, "probe")))
            with connection.makefile("rb") as lines:
                answer = decode_answer(lines.readline(_SERVER_LINE))
        except (OSError, WireError):
            return None
    return answer if isinstance(answer, ServerHello) else None


class ServerBackend:
    """Answers through a chat server; a `Backend`.

    Args:
        path: the server's socket.
        loading: told what the server does while it loads its model.
        patience_s: how long loading may take.
        given_up: asked while waiting; true ends the wait with `ServerGone`.

    Raises:
        ServerGone: nobody answers at `path`, or the server ended while loading (its reason is in the message).
    """

    def __init__(
        self,
        path: Path,
        *,
        client: str = "chat",
        loading: Callable[[Loading], None] | None = None,
        patience_s: float = 3600.0,
        given_up: Callable[[], bool] | None = None,
    ) -> None:
        self.path = path
        self.pid = 0
        self.idle_timeout_s = 0.0
        self.traces = False  # whether this server can tell where tokens went
        self._input = bytearray()
        self._cancel_wanted = False
        self._answering = False
        self._info: ModelInfo | None = None
        self._given_up_request = ""  # closed early: its end is still to come
        self._given_up = given_up or (lambda: False)
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT_TIME)
        try:
            self._socket.connect(str(path))
            if not peer_is_me(self._socket):
                raise ServerGone(f"{path} belongs to another user's process: it is not used", exit_code=65)
            self._send(encode_line(ClientHello(PROTO, client)))
            self._socket.settimeout(POLL)
            self._info = self._wait_until_ready(loading, patience_s)
        except OSError as error:
            self.close()
            raise ServerGone(f"no chat server answers at {path} ({error.strerror or error})", _RESTART) from error
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> ModelInfo:
        """The checkpoint that answers."""
        assert self._info is not None  # the constructor returns only once it is known
        return self._info

    def _wait_until_ready(self, loading: Callable[[Loading], None] | None, patience_s: float) -> ModelInfo:
        began = time.monotonic()
        patience = [CONNECT_TIME]  # the hello must come soon, the model may take its time
        for answer in self._answers(lambda: time.monotonic() - began > patience[0]):
            if isinstance(answer, ServerHello):
                patience[0] = patience_s
                if answer.proto != PROTO:
                    raise ServerGone(
                        f"the chat server speaks protocol {answer.proto}, this program {PROTO}: restart the server"
                    )
                self.pid, self.idle_timeout_s, self.traces = answer.pid, answer.idle_timeout_s, answer.trace
                if loading is not None and answer.state == "loading":
                    loading(Loading(answer.detail, 0.0))
            elif isinstance(answer, Loading) and loading is not None:
                loading(answer)
            elif isinstance(answer, Ready):
                return answer.info
        raise ServerGone(f"the chat server at {self.path} did not become ready", _RESTART)

    # replies

    def generate(
        self, messages: Sequence[Message], sampling: Sampling, seed: int, *, alternatives: int = 0, trace: bool = False
    ) -> Generator[Event, None, None]:
        """See `Backend`. Closing the generator early cancels the reply. A server without traces gives none.

        Raises:
            ServerGone: the server ended.
            ChatError: the server refused or failed to answer.
        """
        request = uuid.uuid4().hex
        line, dropped = _request_line(request, messages, sampling, seed, alternatives, trace and self.traces)
        self._settle()
        self._cancel_wanted, self._answering = False, True
        ended = False
        try:
            self._send(line)
            for answer in self._answers(request=request):
                if getattr(answer, "id", request) != request:
                    continue  # the rest of a reply that was given up
                if isinstance(answer, Failed):
                    ended = True
                    raise ChatError(answer.error)
                if isinstance(answer, Start) and dropped:
                    answer = Start(
                        prompt_tokens=answer.prompt_tokens, context_limit=answer.context_limit, dropped=answer.dropped + dropped
                    )
                if isinstance(answer, Start | Token | Routed | Done):
                    ended = isinstance(answer, Done)
                    yield answer
                    if ended:
                        return
        finally:
            self._answering = False
            if not ended and not self._closed:
                self._given_up_request = request
                with contextlib.suppress(ChatError):
                    self._send(encode_line(Cancel(request)))

    def _settle(self) -> None:
        """Read to the end of a reply that was closed early, so that the server takes the next request."""
        request, self._given_up_request = self._given_up_request, ""
        if not request:
            return
        began = time.monotonic()
        for answer in self._answers(lambda: time.monotonic() - began > SETTLE_TIME):
            if isinstance(answer, Done | Failed) and answer.id == request:
                return

    def cancel(self) -> None:
        """End the reply that is being generated. Safe from any thread and from a signal handler: the reader sends the word."""
        self._cancel_wanted = self._answering

    def gone(self) -> str | None:
        """Why the server is gone, None while it is there. Never waits; only while no reply is being read."""
        try:
            if not select.select([self._socket], [], [], 0)[0]:
                return None
            data = self._socket.recv(_RECEIVE)
        except (OSError, ValueError):  # ValueError: closed by us
            data = b""
        self._input += data
        try:
            for _ in self._answers(late=lambda: True):
                pass
        except ServerGone as error:
            return error.cause
        return None if data else self._gone().cause

    def close(self) -> None:
        """Leave the server; it goes on for others until its idle time is over."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    # lines

    def _send(self, line: bytes) -> None:
        try:
            self._socket.sendall(line)
        except OSError as error:
            raise self._gone() from error

    def _answers(self, late: Callable[[], bool] = lambda: False, request: str = "") -> Generator[Answer, None, None]:
        """Lines of the server as they come, until `late`; sends a cancel for `request` when one is wanted.

        Raises:
            ServerGone: the server ended, said bye or nonsense, or the user gave up waiting.
        """
        while True:
            while (end := self._input.find(b"\n")) >= 0:
                line = bytes(self._input[:end])
                del self._input[: end + 1]
                try:
                    answer = decode_answer(line)
                except WireError as error:
                    raise ServerGone(f"the chat server sent a line that is no answer ({error})", _RESTART) from error
                if isinstance(answer, Bye):
                    reason = answer.reason or "no reason given"
                    raise ServerGone(f"the chat server has left ({reason})", _RESTART) if self._info else ServerGone(reason)
                if not isinstance(answer, Queued):
                    yield answer
            if len(self._input) > _SERVER_LINE:
                raise ServerGone(f"the chat server sent a line of more than {_SERVER_LINE >> 20} MiB", _RESTART)
            if self._given_up():
                raise ServerGone("given up waiting for the chat server")
            if self._cancel_wanted:
                self._cancel_wanted = False
                self._send(encode_line(Cancel(request)))
            if late():
                return
            try:
                data = self._socket.recv(_RECEIVE)
            except TimeoutError:
                continue
            except OSError as error:
                raise self._gone() from error
            if not data:
                raise self._gone()
            self._input += data

    def _gone(self) -> ServerGone:
        who = f" (process {self.pid})" if self.pid else ""
        return ServerGone(f"the chat server{who} is gone", _RESTART)


_RESTART = "start it again with `lumina-engine serve CHECKPOINT`; the conversation is kept"


def _request_line(
    request: str, messages: Sequence[Message], sampling: Sampling, seed: int, alternatives: int, trace: bool
) -> tuple[bytes, int]:
    """The request, without as many of the oldest messages as a line cannot hold; and how many those are.

    Raises:
        ChatError: the last message alone is too long.
    """
    head = 1 if messages and messages[0]["role"] == "system" else 0
    dropped = 0
    while True:
        kept = [*messages[:head], *messages[head + dropped :]]
        line = encode_line(
            Generate(
                id=request,
                messages=[WireMessage(message["role"], message["content"]) for message in kept],  # type: ignore[arg-type]
                sampling=sampling,
                seed=seed,
                alternatives=alternatives,
                trace=trace,
            )
        )
        if len(line) <= MAX_LINE:
            return line, dropped
        if len(kept) <= head + 1:
            raise ChatError(f"the message is longer than {MAX_LINE >> 10} KiB: shorten it", 2)
        dropped += 1
        while head + dropped < len(messages) - 1 and messages[head + dropped]["role"] != "user":
            dropped += 1
