"""The chat server: one loaded checkpoint behind a Unix socket. Same socket rules as a run's (`run.socket`).

One thread serves the socket; another loads the model and then answers one request after the other. A client that goes away
takes its reply with it. Losing the server loses no conversation: clients keep the history.
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec

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
from .events import (
    PROTO,
    Backend,
    Bye,
    Cancel,
    ClientHello,
    Done,
    Event,
    Failed,
    Generate,
    Loading,
    Message,
    Queued,
    Ready,
    Request,
    ServerHello,
    WireError,
    decode_request,
    encode_line,
)
from .modes import ChatError

TICK = 0.25  # s between two looks at the time limits
LOADING_TIME = 0.5  # s between two words about loading
IDLE_TIMEOUT = 1800.0  # s without a request until the server leaves
MAX_BAD_LINES = 32  # unreadable lines until a client is sent away

Load = Callable[[Callable[[str], None]], Backend]  # (say what is being done) -> backend


class _Client:
    """One connection, and the request it waits for."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.connection = connection
        self.hello = False
        self.since = now
        self.drained = now
        self.input = bytearray()
        self.output = bytearray()
        self.bad_lines = 0
        self.job: _Job | None = None


class _Job:
    """One request on its way through the answering thread."""

    def __init__(self, client: _Client, request: Generate) -> None:
        self.client = client
        self.request = request
        self.cancelled = threading.Event()
        self.started = False


class ChatServer:
    """Serves one checkpoint until it is stopped, idle for too long, or cannot be loaded.

    Args:
        path: where to listen.
        load: makes the backend; called in the answering thread with a function that tells clients what is being done.
        idle_timeout_s: leave after so many seconds without a request; 0 = never.

    Raises:
        RunError: the socket cannot be placed safely, or another server answers there (exit code 65).
    """

    def __init__(
        self,
        path: Path,
        load: Load,
        *,
        idle_timeout_s: float = IDLE_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        rebind_time: float = REBIND_TIME,
    ) -> None:
        self.path = path
        self.backend: Backend | None = None
        self._load = load
        self._clock = clock
        self._idle_timeout = idle_timeout_s
        self._rebind_time = rebind_time
        self._clients: dict[int, _Client] = {}
        self._jobs: deque[_Job] = deque()  # the first is being answered
        self._todo: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._posts: deque[Callable[[], None]] = deque()  # from the answering thread to this one
        self._detail = "starting"
        self._failure: BaseException | None = None
        self._stop: str | None = None
        self._started = self._active = self._looked = self._said = clock()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, self._woken)
        self._listen()

    # life

    def serve(self, ready: Callable[[Backend], None] | None = None) -> str:
        """Serve until the end; returns why it ended. `ready` is called once the model is loaded.

        Raises:
            BaseException: whatever `load` raised, after every client was told.
        """
        self._answering = threading.Thread(target=self._answer_all, name="chat-answers", daemon=True)
        self._answering.start()
        announced = False
        try:
            while self._stop is None and self._failure is None:
                for key, _ in self._selector.select(TICK):
                    key.data()
                while self._posts:
                    self._posts.popleft()()
                if self.backend is not None and not announced:
                    announced = True
                    if ready is not None:
                        ready(self.backend)
                self._look_at_the_time()
        finally:
            self._leave(self._stop or (str(self._failure) if self._failure is not None else "interrupted"))
        if self._failure is not None:
            raise self._failure
        self._answering.join(timeout=5.0)
        return self._stop or ""

    @property
    def still_loading(self) -> bool:
        """Whether the answering thread lives on after `serve`: it is inside a call that cannot be interrupted."""
        return self._answering.is_alive()

    def stop(self, reason: str) -> None:
        """End `serve` soon. Safe from a signal handler and from any thread."""
        self._stop = reason
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")

    def _leave(self, reason: str) -> None:
        for job in self._jobs:
            job.cancelled.set()
        if self.backend is not None:
            self.backend.cancel()
        self._todo.put(None)
        for client in list(self._clients.values()):
            self._bye(client, reason)
        self._selector.close()
        self._listener.close()
        unbind(self.path, self._inode)
        self._wake_in.close()
        self._wake_out.close()

    # the answering thread

    def _answer_all(self) -> None:
        try:
            backend = self._load(self._say)
        except BaseException as error:  # the other thread tells the clients and raises it again
            self._failure = error
            self._post(lambda: None)
            return
        self._post(lambda: self._loaded(backend))
        while (job := self._todo.get()) is not None:
            self._answer(backend, job)

    def _say(self, detail: str) -> None:
        self._detail = detail

    def _answer(self, backend: Backend, job: _Job) -> None:
        request = job.request
        messages: list[Message] = [{"role": message.role, "content": message.content} for message in request.messages]
        stream = backend.generate(messages, request.sampling, request.seed, alternatives=request.alternatives)
        last: Event | Failed | None = None
        try:
            if job.cancelled.is_set():  # while it waited for its turn
                last = Done(reason="cancelled", tokens=0, seconds=0.0, seed=request.seed)
            else:
                for event in stream:
                    if isinstance(event, Done):
                        last = event
                    else:
                        self._post_line(job, event)
                    if job.cancelled.is_set():
                        backend.cancel()
        except ChatError as error:
            last = Failed(str(error))
        except Exception as error:  # a defect in one answer must not take the other clients with it
            last = Failed(f"unexpected {type(error).__name__}: {error}")
        finally:
            stream.close()
        end = last or Failed("the reply ended without a result")
        self._post(lambda: self._finished(job, end))

    def _post_line(self, job: _Job, event: Event) -> None:
        line = encode_line(msgspec.structs.replace(event, id=job.request.id))
        self._post(lambda: self._send(job.client, line))

    def _post(self, action: Callable[[], None]) -> None:
        self._posts.append(action)
        with contextlib.suppress(OSError):  # full: it is awake already; closed: nobody listens any more
            self._wake_in.send(b"\0")

    # results, in the serving thread

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(4096)

    def _loaded(self, backend: Backend) -> None:
        self.backend = backend
        self._active = self._clock()
        for client in list(self._clients.values()):
            if client.hello:
                self._send(client, encode_line(Ready(backend.info)))

    def _finished(self, job: _Job, end: Event | Failed) -> None:
        self._jobs.remove(job)
        job.client.job = None
        self._active = self._clock()
        self._send(job.client, encode_line(msgspec.structs.replace(end, id=job.request.id)))

    # clients

    def _listen(self) -> None:
        self._listener = bind_socket(self.path)
        self._inode = self.path.lstat().st_ino
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _look_at_the_time(self) -> None:
        now = self._clock()
        for client in list(self._clients.values()):
            if not client.hello and now - client.since > HELLO_TIME:
                self._bye(client, "no hello came")
            elif client.output and now - client.drained > STALL_TIME:
                self._drop(client)
        if self.backend is None and now - self._said > LOADING_TIME:
            self._said = now
            line = encode_line(Loading(self._detail, round(now - self._started, 1)))
            for client in list(self._clients.values()):
                if client.hello:
                    self._send(client, line)
        if now - self._looked > self._rebind_time:
            self._looked = now
            self._rebind_if_gone()
        if self.backend is not None and not self._jobs and 0 < self._idle_timeout < now - self._active:
            self._stop = f"idle for {self._idle_timeout:g} s"

    def _rebind_if_gone(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self._inode:
                return
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listen()

    def _accept(self) -> None:
        for _ in range(MAX_CLIENTS):
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # nobody waits any more, or the client left again at once
            connection.setblocking(False)
            client = _Client(connection, self._clock())
            reason = None
            if not peer_is_me(connection):
                reason = "another user's process"
            elif len(self._clients) >= MAX_CLIENTS:
                reason = f"{MAX_CLIENTS} clients are connected already"
            self._clients[connection.fileno()] = client
            self._selector.register(connection, selectors.EVENT_READ, self._ready_for(client))
            if reason is not None:
                self._bye(client, reason)

    def _ready_for(self, client: _Client) -> Callable[[], None]:
        return lambda: self._read(client)

    def _read(self, client: _Client) -> None:
        if client.connection.fileno() not in self._clients:
            return  # dropped earlier in this turn
        self._flush(client)
        if client.connection.fileno() < 0:
            return
        try:
            data = client.connection.recv(LINE_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        client.input += data
        while (end := client.input.find(b"\n")) >= 0 and client.connection.fileno() >= 0:
            line = bytes(client.input[:end])
            del client.input[: end + 1]
            reason = self._take(client, line) if end < LINE_LIMIT else "a line is too long"
            if reason is not None:
                self._bye(client, reason)
                return
        if len(client.input) >= LINE_LIMIT:
            self._bye(client, "a line is too long")

    def _take(self, client: _Client, line: bytes) -> str | None:
        """One line of a client; why the connection must end, or None."""
        if too_deep(line):
            return "a line is nested too deep"
        try:
            request = decode_request(line)
        except WireError as error:
            client.bad_lines += 1
            if not client.hello or client.bad_lines > MAX_BAD_LINES:
                return "the first line must be a hello" if not client.hello else "too many lines that are no requests"
            self._send(client, encode_line(Failed(f"no request: {error}")))
            return None
        if not client.hello:
            return self._greet(client, request)
        if isinstance(request, Bye):
            return "bye"
        if isinstance(request, Cancel):
            if client.job is not None and client.job.request.id == request.id:
                self._cancel(client.job)
        elif isinstance(request, Generate):
            self._take_job(client, request)
        return None

    def _greet(self, client: _Client, request: Request) -> str | None:
        if not isinstance(request, ClientHello):
            return "the first line must be a hello"
        if request.proto != PROTO:
            return f"only protocol {PROTO} is spoken here"
        client.hello = True
        self._active = self._clock()
        state = "loading" if self.backend is None else "ready"
        hello = ServerHello(pid=os.getpid(), state=state, detail=self._detail, idle_timeout_s=self._idle_timeout)  # type: ignore[arg-type]
        self._send(client, encode_line(hello))
        if self.backend is not None:
            self._send(client, encode_line(Ready(self.backend.info)))
        return None

    def _take_job(self, client: _Client, request: Generate) -> None:
        reason = None
        if self.backend is None:
            reason = f"the model is still loading ({self._detail})"
        elif client.job is not None:
            reason = "a reply is still being written: cancel it first"
        if reason is not None:
            self._send(client, encode_line(Failed(reason, request.id)))
            return
        self._active = self._clock()
        client.job = _Job(client, request)
        self._jobs.append(client.job)
        if len(self._jobs) > 1:
            self._send(client, encode_line(Queued(request.id, len(self._jobs) - 1)))
        self._todo.put(client.job)

    def _cancel(self, job: _Job) -> None:
        job.cancelled.set()
        if self._jobs and self._jobs[0] is job:
            cast(Backend, self.backend).cancel()

    # lines out

    def _send(self, client: _Client, line: bytes) -> None:
        if client.connection.fileno() not in self._clients or self._clients[client.connection.fileno()] is not client:
            return
        client.output += line
        if len(client.output) > QUEUE_LIMIT:
            self._drop(client)  # it does not read: a reply is far smaller
            return
        self._flush(client)

    def _flush(self, client: _Client) -> None:
        try:
            while client.output:
                sent = client.connection.send(client.output)
                client.drained = self._clock()
                del client.output[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.output else 0)
        if self._selector.get_key(client.connection).events != wanted:
            self._selector.modify(client.connection, wanted, self._ready_for(client))

    def _bye(self, client: _Client, reason: str) -> None:
        """Say why, as far as the kernel takes it, and close."""
        client.output += encode_line(Bye(reason))
        with contextlib.suppress(OSError):
            client.connection.send(client.output)
        self._drop(client)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.connection.fileno(), None) is None:
            return
        self._selector.unregister(client.connection)
        client.connection.close()
        if client.job is not None:
            self._cancel(client.job)
