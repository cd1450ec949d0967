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

import msgspec

from ..run.socket import QUEUE_LIMIT, REBIND_TIME
from .card import own_card, remove_card, write_card
from .connections import Client, Connections
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
    Routed,
    ServerHello,
    Token,
    WireError,
    decode_request,
    encode_line,
)
from .modes import ChatError

TICK = 0.25  # s between two looks at the time limits
LOADING_TIME = 0.5  # s between two words about loading
IDLE_TIMEOUT = 1800.0  # s without a request until the server leaves
MAX_BAD_LINES = 32  # unreadable lines until a client is sent away

TRACE_QUEUE = QUEUE_LIMIT // 4  # bytes waiting for a client from which on its reply goes without a trace

Load = Callable[[Callable[[Loading], None]], Backend]  # (say what is being done) -> backend


class _Job:
    """One request on its way through the answering thread, which looks at `cancelled` between two tokens.

    Only that thread tells the backend to cancel: it alone knows which request the backend is answering.
    """

    def __init__(self, client: Client, request: Generate) -> None:
        self.client = client
        self.request = request
        self.cancelled = threading.Event()


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
        self._jobs: deque[_Job] = deque()  # the first is being answered
        self._todo: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._posts: deque[Callable[[], None]] = deque()  # from the answering thread to this one
        self._loading = Loading("starting", 0.0)
        self._failure: BaseException | None = None
        self._stop: str | None = None
        self._started = self._active = self._said = clock()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, self._woken)
        self._connections = Connections(path, self._selector, self._take, self._left, clock, rebind_time)
        self._used()

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
        self._connections.close(reason)
        remove_card(self.path)
        self._selector.close()
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

    def _say(self, progress: Loading) -> None:
        self._loading = progress

    def _answer(self, backend: Backend, job: _Job) -> None:
        request = job.request
        messages: list[Message] = [{"role": message.role, "content": message.content} for message in request.messages]
        stream = backend.generate(
            messages, request.sampling, request.seed, alternatives=request.alternatives, trace=request.trace
        )
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
        bare = line
        if isinstance(event, Routed):
            bare = b""
        elif isinstance(event, Token) and event.alternatives:
            bare = encode_line(Token(text=event.text, token=event.token, id=job.request.id))

        def send() -> None:  # a client that falls behind loses the trace, not the reply
            if chosen := bare if len(job.client.output) > TRACE_QUEUE else line:
                self._connections.send(job.client, chosen)

        self._post(send)

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
        self._used()
        self._connections.send_all(encode_line(Ready(backend.info)))

    def _finished(self, job: _Job, end: Event | Failed) -> None:
        self._jobs.remove(job)
        self._used()
        self._connections.send(job.client, encode_line(msgspec.structs.replace(end, id=job.request.id)))

    def _used(self) -> None:
        """Now counts as use; the card beside the socket tells it."""
        self._active = self._clock()
        info = self.backend.info if self.backend is not None else None
        known = {"checkpoint": info.path, "name": info.name, "device": info.device} if info is not None else {}
        card = own_card(
            **known,
            state="loading" if info is None else "ready",
            weights_bytes=info.weights_bytes if info is not None else None,
            active=None if self._jobs else time.time(),
            idle_timeout_s=self._idle_timeout,
        )
        write_card(self.path, card)

    def _look_at_the_time(self) -> None:
        now = self._clock()
        self._connections.tick()
        if self.backend is None and now - self._said > LOADING_TIME:
            self._said = now
            progress = msgspec.structs.replace(self._loading, seconds=round(now - self._started, 1))
            self._connections.send_all(encode_line(progress))
        if self.backend is not None and not self._jobs and 0 < self._idle_timeout < now - self._active:
            self._stop = f"idle for {self._idle_timeout:g} s"

    # requests

    def _take(self, client: Client, line: bytes) -> str | None:
        """One line of a client; why the connection must end, or None."""
        try:
            request = decode_request(line)
        except WireError as error:
            client.bad_lines += 1
            if not client.greeted:
                return "the first line must be a hello"
            if client.bad_lines > MAX_BAD_LINES:
                return "too many lines that are no requests"
            self._connections.send(client, encode_line(Failed(f"no request: {error}")))
            return None
        if not client.greeted:
            return self._greet(client, request)
        if isinstance(request, Bye):
            return "bye"
        if isinstance(request, Cancel):
            for job in self._jobs_of(client):
                if job.request.id == request.id:
                    job.cancelled.set()
        elif isinstance(request, Generate):
            self._take_job(client, request)
        return None

    def _greet(self, client: Client, request: Request) -> str | None:
        if not isinstance(request, ClientHello):
            return "the first line must be a hello"
        if request.proto != PROTO:
            return f"only protocol {PROTO} is spoken here"
        client.greeted = True
        self._used()
        hello = ServerHello(
            pid=os.getpid(),
            state="loading" if self.backend is None else "ready",
            detail=self._loading.detail,
            idle_timeout_s=self._idle_timeout,
            trace=True,
        )
        self._connections.send(client, encode_line(hello))
        if self.backend is not None:
            self._connections.send(client, encode_line(Ready(self.backend.info)))
        return None

    def _take_job(self, client: Client, request: Generate) -> None:
        reason = None
        if self.backend is None:
            reason = f"the model is still loading ({self._loading.detail})"
        elif self._jobs_of(client):
            reason = "a reply is still being written: cancel it first"
        if reason is not None:
            self._connections.send(client, encode_line(Failed(reason, request.id)))
            return
        job = _Job(client, request)
        self._jobs.append(job)
        self._used()
        if len(self._jobs) > 1:
            self._connections.send(client, encode_line(Queued(request.id, len(self._jobs) - 1)))
        self._todo.put(job)

    def _jobs_of(self, client: Client) -> list[_Job]:
        return [job for job in self._jobs if job.client is client]

    def _left(self, client: Client) -> None:
        for job in self._jobs_of(client):
            job.cancelled.set()
