"""The viewers' socket of a run: the log's new lines out, commands in. Nothing here ever waits for a viewer.

One thread, one selector (the supervisor's). A viewer that reads too slowly is cut back to the file with a `gap`; one that
reads nothing at all is dropped. Also here: how a Unix socket is placed safely under /tmp.

The wire: one JSON object a line. Records are the log's own lines; everything else has `op`.

    viewer      {"op": "hello", "proto": 1, "client": NAME}           first, within 2 s
    supervisor  {"op": "hello", "proto": 1, "run", "inc", "state", "head_seq", "offset", "world", "ranks", "asks"}
    viewer      {"op": "cmd", "id": ID, "cmd": CMD, "args": {…}}       supervisor {"op": "reply", "id": ID, "ok", "error"?}
    viewer      {"op": "ranks"}      if "ranks" is among `asks`        supervisor {"op": "ranks", "ranks": […]}
    supervisor  {"op": "gap", "from": SEQ, "to": SEQ, "offset": BYTE}  records that were not sent: they are in the file
    supervisor  {"op": "bye", "reason": TEXT}                          last

Each of `ranks` is {rank, pid, step, section, age_s, connected, exit_code}: where a rank is and for how long. Heartbeats change
many times a second, so they are answered when somebody asks, and are no records.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..monitoring.say import say
from .directory import RunError
from .requests import ID_PATTERN
from .tail import Chunk

PROTO = 1
PATH_LIMIT = 107  # bytes of a Unix socket's path on Linux
MAX_CLIENTS = 16
LINE_LIMIT = 65_536  # bytes of a line from a client
DEPTH_LIMIT = 32  # of its JSON
QUEUE_LIMIT = 262_144  # bytes waiting for one client
HELLO_TIME = 2.0  # s until the first line
STALL_TIME = 30.0  # s without draining anything
REBIND_TIME = 10.0  # s between two looks whether the socket is still there
_ACCEPTS = 16  # connections taken per turn, so that a storm of them delays nothing else

# the closing quote may be missing: a pattern that insists on it tries every quote of an unclosed string up to the line's end
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


def socket_folder() -> Path:
    """Where this user's sockets are: $LUMINA_SOCKETS, else /tmp/lumina-<uid>. Not XDG_RUNTIME_DIR: it ends with the login."""
    return Path(os.environ.get("LUMINA_SOCKETS") or f"/tmp/lumina-{os.geteuid()}")


def prepare_folder(folder: Path) -> None:
    """Make the folder (0700), or make sure that it is one, of this user, closed to everybody else.

    Raises:
        RunError: it is something else; the reason and what to do (exit code 65).
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    reason = None
    if not stat.S_ISDIR(found.st_mode):
        reason = f"is {_kind(found.st_mode)}, not a folder: remove it"
    elif found.st_uid != os.geteuid():
        reason = f"belongs to user {found.st_uid}: set LUMINA_SOCKETS to a folder of your own"
    elif found.st_mode & 0o077:
        reason = f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o}): run `chmod 700 {folder}`"
    if reason is not None:
        raise RunError(f"{folder} {reason}", 65)


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "no socket")


def bind_socket(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A listening, non-blocking socket at `path` (0600). A stale socket of this user's is replaced, nothing else ever is.

    Raises:
        RunError: the path is too long, its folder is not safe, or something else lies there (exit code 65).
    """
    if len(os.fsencode(path)) > PATH_LIMIT:
        raise RunError(
            f"{path}: longer than {PATH_LIMIT} bytes, no socket can be there: set LUMINA_SOCKETS to a short path", 65
        )
    prepare_folder(path.parent)
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise RunError(f"{path} is {_kind(found.st_mode)}, not a socket of yours: remove it", 65)
        if _answers(path, kind):
            raise RunError(f"{path}: another process answers there", 65)
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    listener.listen(128)
    return listener


def _answers(path: Path, kind: int) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # its queue is full, or it is of another kind: alive in any case
    return True


def unbind(path: Path, inode: int) -> None:
    """Remove the socket, if it still is the one with this inode."""
    with contextlib.suppress(OSError):  # its folder may be gone, or something else
        if path.lstat().st_ino == inode:
            path.unlink()


def peer_is_me(connection: socket.socket) -> bool:
    """Whether the other end is a process of this user."""
    return peer(connection)[1] == os.geteuid()


def peer(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other end, as the kernel saw them when it connected."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


def too_deep(line: bytes, limit: int = DEPTH_LIMIT) -> bool:
    """Whether the JSON on this line is nested deeper than `limit`. What follows an unclosed quote counts as its string."""
    if line.count(b"{") + line.count(b"[") <= limit:
        return False
    depth = 0
    for bracket in _BRACKETS.findall(_STRING.sub(b"", line)):
        depth += 1 if bracket in b"{[" else -1
        if depth > limit:
            return True
    return False


def _line(content: dict[str, Any]) -> bytes:
    return msgspec.json.encode(content) + b"\n"


class _Client:
    """One connection. `gap` is (seq, offset) of the first record that was dropped for it."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.connection = connection
        self.ready = False  # said hello
        self.since = now
        self.drained = now
        self.input = bytearray()
        self.output: deque[tuple[bytes, Chunk | None]] = deque()
        self.sent = 0  # bytes of the first piece that are out
        self.queued = 0
        self.gap: tuple[int, int] | None = None

    def put(self, data: bytes, chunk: Chunk | None = None) -> None:
        self.output.append((data, chunk))
        self.queued += len(data)

    def put_chunk(self, chunk: Chunk) -> None:
        """Queue records; over the limit drop all that wait and remember from where to read the file."""
        if self.gap is None and self.queued + len(chunk.data) <= QUEUE_LIMIT:
            self.put(chunk.data, chunk)
            return
        if self.gap is not None:
            return
        kept: deque[tuple[bytes, Chunk | None]] = deque()
        for index, (data, queued) in enumerate(self.output):
            if queued is None or (index == 0 and self.sent):
                kept.append((data, queued))  # answers are never dropped, nor a piece that is half out
            elif self.gap is None:
                self.gap = (queued.first, queued.start)
        self.gap = self.gap or (chunk.first, chunk.start)
        self.output = kept
        self.queued = sum(len(data) for data, _ in kept)

    def flush(self, head_seq: int, now: float) -> None:
        """Send what the kernel takes. Afterwards a gap that is not told yet stands behind something that waits.

        Raises:
            OSError: the connection is gone.
        """
        while True:
            if not self.output:
                if self.gap is None:
                    return
                (first, offset), self.gap = self.gap, None
                self.put(_line({"op": "gap", "from": first, "to": head_seq, "offset": offset}))
            data = self.output[0][0]
            try:
                done = self.connection.send(memoryview(data)[self.sent :])
            except BlockingIOError:
                return
            self.drained = now
            self.sent += done
            if self.sent == len(data):
                self.output.popleft()
                self.queued -= len(data)
                self.sent = 0


class ViewerServer:
    """Serves the viewers of one run.

    Args:
        path: where to listen.
        selector: the owner's; registered objects carry a callable as data, to be called when they are ready.
        hello: content of the answer to a hello (run, inc, state, head_seq, offset, …).
        answer: (id, cmd, args) -> the reply to a command.
        asks: what else a viewer may ask for, by op, and what makes the content of the answer.

    Raises:
        RunError: the socket cannot be placed safely.
    """

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        hello: Callable[[], dict[str, Any]],
        answer: Callable[[str, object, object], dict[str, Any]],
        *,
        asks: Mapping[str, Callable[[], dict[str, Any]]] | None = None,
        rebind_time: float = REBIND_TIME,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.head_seq = 0  # of the last record published
        self._clock = clock
        self._selector = selector
        self._hello = hello
        self._answer = answer
        self._asks = dict(asks or {})
        self._clients: dict[int, _Client] = {}
        self._rebind_time = rebind_time
        self._looked = 0.0
        self._complaint = ""
        self._listener: socket.socket | None = None
        self._listen()

    def _listen(self) -> None:
        listener = bind_socket(self.path)
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
        self._listener = listener
        self._inode = self.path.lstat().st_ino
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def publish(self, chunks: Iterable[Chunk]) -> None:
        """Send new records to everybody who has said hello."""
        for chunk in chunks:
            self.head_seq = max(self.head_seq, chunk.last)
            for client in list(self._clients.values()):
                if client.ready:
                    client.put_chunk(chunk)
                    self._flush(client)  # at once: a burst must not fill the queue of a viewer that keeps up

    def tick(self) -> None:
        """Time limits, and the socket's place. Call every turn."""
        now = self._clock()
        for client in list(self._clients.values()):
            if not client.ready and now - client.since > HELLO_TIME:
                self._bye(client, "no hello came")
            elif not client.output:
                client.drained = now
            elif now - client.drained > STALL_TIME:
                self._drop(client)
        if now - self._looked > self._rebind_time:
            self._looked = now
            self._look()

    def _look(self) -> None:
        """Bind again if the socket was deleted (a cleaner of /tmp, for example); complain once if that cannot be done."""
        with contextlib.suppress(OSError):
            if self.path.lstat().st_ino == self._inode:
                return
        try:
            self._listen()
        except (RunError, OSError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                say(f"lumina: viewers cannot connect: {error}")

    def close(self, reason: str) -> None:
        """Say bye to all and go."""
        for client in list(self._clients.values()):
            self._bye(client, reason)
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        unbind(self.path, self._inode)

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(_ACCEPTS):
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
                reason = f"{MAX_CLIENTS} viewers are connected already"
            self._clients[connection.fileno()] = client
            self._selector.register(connection, selectors.EVENT_READ, lambda client=client: self._ready(client))
            if reason is not None:
                self._bye(client, reason)
            else:
                self._ready(client)  # its hello may be there, or it may be gone already and must not take up a place

    def _ready(self, client: _Client) -> None:
        if client.connection.fileno() not in self._clients:
            return  # dropped earlier in this turn
        if client.output:
            self._flush(client)
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
            reason = self._taken(client, line) if end < LINE_LIMIT else "a line is too long"
            if reason is not None:
                self._bye(client, reason)
                return
        if len(client.input) >= LINE_LIMIT:
            self._bye(client, "a line is too long")
        elif client.output:
            self._flush(client)

    def _taken(self, client: _Client, line: bytes) -> str | None:
        """`_take`, whose failure costs this connection and not the run."""
        try:
            return self._take(client, line)
        except Exception as error:
            say(f"lumina: the line of a viewer could not be answered: {type(error).__name__}: {error}")
            return "that line could not be answered; engine.log of the run has the reason"

    def _take(self, client: _Client, line: bytes) -> str | None:
        """One line of a client; why the connection must end, or None."""
        if too_deep(line):
            return "a line is nested too deep"
        try:
            content = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return "a line is no JSON"
        if not isinstance(content, dict):
            return "a line is no JSON object"
        if not client.ready:
            if content.get("op") != "hello":
                return "the first line must be a hello"
            if content.get("proto") != PROTO:
                return f"only protocol {PROTO} is spoken here; the run's files stay readable"
            client.ready = True
            asks = {"asks": sorted(self._asks)} if self._asks else {}
            client.put(_line({"op": "hello", "proto": PROTO, **self._hello(), **asks}))
            return None
        if client.queued > QUEUE_LIMIT:
            return "answers are not read"
        op, request = content.get("op"), content.get("id")
        if isinstance(op, str) and op in self._asks:
            client.put(_line({"op": op, **self._asks[op]()}))
            return None
        if op != "cmd" or not isinstance(request, str) or not ID_PATTERN.fullmatch(request):
            return "only commands with an id are understood"
        client.put(_line(self._answer(request, content.get("cmd"), content.get("args", {}))))
        return None

    def _flush(self, client: _Client) -> None:
        try:
            client.flush(self.head_seq, self._clock())
        except OSError:
            self._drop(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.output else 0)
        if self._selector.get_key(client.connection).events != wanted:
            self._selector.modify(client.connection, wanted, lambda: self._ready(client))

    def _bye(self, client: _Client, reason: str) -> None:
        """Say why, as far as the kernel takes it, and close."""
        client.put(_line({"op": "bye", "reason": reason}))
        with contextlib.suppress(OSError):
            client.flush(self.head_seq, self._clock())
        self._drop(client)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.connection.fileno(), None) is not None:
            self._selector.unregister(client.connection)
            client.connection.close()
