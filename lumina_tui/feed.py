"""Keeps a `RunStore` up to date: the file is the truth, the socket only makes it fresh (wire: one JSON object a line).

One asyncio task per attached run, no thread of its own; the file is read in slices in a worker thread. The feed calls no
widget. A run without a live supervisor, or one that refuses the socket, is polled from its file each second. A long log is
opened from its column cache, or else shown as a preview while a thread reads all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import LogReader
from lumina_engine.run.directory import RunDirectory, RunError
from lumina_engine.run.output import last_lines

from . import columns
from .badge import Badge, Mode, badge_of
from .long_log import SLICE, length_of, preview, read_whole
from .ranks import Beat, Ranks, beats
from .requests import Phase, Request
from .series import RunStore

PROTO = 1
READ = 1 << 16  # bytes taken from the socket at once
GATHER_S = 0.05  # for which records wait for others, so that they are taken together
POLL_S = 1.0  # of the file, without a connection
LOCK_S = 0.5  # between two looks at the lock
RETRY_S = 1.0  # before the socket is tried again
HELLO_S = 2.0
QUIET_S = 20.0  # at least, before a silent run is called quiet
LINE_LIMIT = 1 << 20
ASK_S = 2.0  # between two questions where the ranks are
RESYNC = 5_000  # live records after which the place in the file is brought up to date


@dataclass
class Feed:
    """Attached to one run. `start()` it inside a running loop, `await close()` it; look at `store`, `badge()`, `requests`."""

    run: RunDirectory
    hz: float = 4.0
    clock: Callable[[], float] = time.time
    store: RunStore = field(default_factory=RunStore)
    mode: Mode = Mode.LOADING
    progress: float = 0.0  # of the first reading, 0-1
    why: str = ""  # why there is no live connection
    error: str = ""  # why nothing can be shown at all
    requests: list[Request] = field(default_factory=list)
    alive: bool = False
    attachments: int = 0
    gaps: int = 0
    together: int = 1  # logs that are opened at the same time
    caching: bool = True  # whether a column cache is written; one that is there is used in any case

    def __post_init__(self) -> None:
        self.reader = LogReader(self.run.metrics_path)
        self._task: asyncio.Task[None] | None = None
        self._lock_task: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._wake = asyncio.Event()
        self._since_file = 0
        self._restarts = 0
        self._cached = 0  # byte of the log up to which the column cache goes
        self._closed = False
        self.shown = asyncio.Event()  # there is something to look at: everything, or a preview
        self.opened = asyncio.Event()  # the first reading is over
        self._saving: asyncio.Task[bool] | None = None
        self.log_end = ""  # the last line of engine.log, once the run is quiet
        self.arrived = self.clock()  # when the newest record came
        self._beats: list[Beat] = []  # the newest word about the ranks, and when it came
        self._world: int | None = None
        self._answered = self._asked = 0.0
        self._asks: list[str] = []  # what the supervisor can be asked for

    # life

    def start(self) -> None:
        """Begin reading."""
        self._task = asyncio.create_task(self._run(), name=f"feed {self.run.name}")
        self._task.add_done_callback(self._ended)
        self._lock_task = asyncio.create_task(self._watch_lock(), name=f"lock {self.run.name}")

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A defect must not leave a screen that looks alive: it is shown where read errors are."""
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            self.mode, self.error = Mode.FILE, f"reading stopped: {type(error).__name__}: {error}; r reads the run again"

    async def close(self) -> None:
        """Let go of the run. The run does not notice."""
        self._closed = True
        self.shown.set()
        self.opened.set()
        for task in (self._task, self._lock_task):
            while task is not None and not task.done():  # wait_for of Python 3.10 and 3.11 can swallow a cancellation
                task.cancel()
                await asyncio.wait([task], timeout=0.2)
        self._hang_up()
        if self._saving is not None:
            await asyncio.wait([self._saving])
        if self.mode is not Mode.LOADING:
            self._keep(columns.GROWN // 4)
            if self._saving is not None:
                await asyncio.wait([self._saving])

    @property
    def closed(self) -> bool:
        """Whether `close()` was called: nothing is known any more about what the run does."""
        return self._closed

    def wake(self) -> None:
        """Read the file and try the socket now."""
        self._wake.set()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)
        self._wake.clear()

    # the file

    async def _open(self) -> None:
        """The first reading. A long log comes from its column cache; without one a preview stands in for it meanwhile."""
        try:
            length = await asyncio.to_thread(length_of, self.reader)
            if length >= columns.LEAST and not await self._from_cache():
                await self._from_scratch()
        except OSError as error:  # what was read so far is not the whole: the next look begins again
            self.error = f"{self.reader.path}: {error.strerror or error}"
            self.reader = LogReader(self.reader.path)
            self.store.become(RunStore())
            return
        await self._read_file()
        self._keep(columns.GROWN)

    async def _from_cache(self) -> bool:
        cached = await asyncio.to_thread(columns.load, self.run)
        if cached is None:
            return False
        self.reader.offset, self.reader.errors = cached.offset, cached.errors
        self._cached = cached.offset
        self.store.become(cached.store)
        self.shown.set()
        return True

    async def _from_scratch(self) -> None:
        """Show a preview, read all of the log in a thread, then show that."""
        self.store.become(await asyncio.to_thread(preview, self.reader.path))
        self.shown.set()
        self.store.become(await asyncio.to_thread(read_whole, self.reader, self._told, self.together))
        self._restarts = self.reader.restarts

    def _told(self, share: float) -> bool:
        """How far the first reading is. Whether it shall go on."""
        self.progress = share
        return not self._closed

    async def _read_file(self, upto: int | None = None) -> None:
        """Take everything the file has now, in slices, yielding between them."""
        while upto is None or self.reader.offset < upto:
            try:
                records, length = await asyncio.to_thread(self._slice, self.mode is Mode.LOADING)
            except OSError as error:
                self.error = f"{self.reader.path}: {error.strerror or error}"
                return
            self.error = ""
            if self.reader.restarts != self._restarts:  # the file was replaced: begin again with what it has
                self._restarts = self.reader.restarts
                self._cached = 0
                self.store.become(RunStore())
            if not records:
                if self.reader.missing and self.reader.offset:
                    self.error = f"{self.reader.path} is gone: what was read of it stays here until lumina ends"
                break
            self._apply(records)
            if self.mode is Mode.LOADING:
                self.progress = min(1.0, self.reader.offset / max(1, length))
            await asyncio.sleep(0)
        self._since_file = 0

    def _slice(self, sized: bool) -> tuple[list[rec.Record], int]:
        """New records, and the length of the log if it is asked for (else 0). Runs in a thread: a network disk may be slow."""
        return self.reader.read_new(SLICE), length_of(self.reader) if sized else 0

    def _keep(self, grown: int) -> None:
        """Write the column cache in a thread if the log is long and has `grown` since, unless that is being done."""
        busy = not self.caching or (self._saving is not None and not self._saving.done())
        offset, fresh = self.reader.offset, self.reader.offset - self._cached
        if busy or offset < columns.LEAST or (fresh < grown and self._cached) or not self.store.seq or self.store.preview:
            return
        taken = columns.snapshot(self.store)
        self._cached = offset
        work = asyncio.to_thread(columns.write, self.run, taken, offset, list(self.reader.errors))
        self._saving = asyncio.create_task(work, name=f"columns {self.run.name}")

    def _apply(self, records: list[rec.Record]) -> None:
        before = self.store.seq
        self.store.apply(records)
        if self.store.seq != before:
            self.arrived = self.clock()
        self._answer()

    # the socket

    async def _run(self) -> None:
        await self._open()
        self.shown.set()
        self.opened.set()
        self.alive = await asyncio.to_thread(lambda: self.run.alive)
        self._settle()
        while True:
            if self.alive:
                try:
                    await self._attached()
                except (OSError, EOFError, ValueError, asyncio.TimeoutError) as error:
                    self.why = self.why or f"the supervisor's socket does not answer: {error or type(error).__name__}"
                finally:
                    self._hang_up()
            await self._read_file()
            self._settle()
            await self._pause(RETRY_S if self.alive else POLL_S)

    def _settle(self) -> None:
        """The mode while there is no connection."""
        if self.alive or self.store.final or not self.store.seq:
            self.mode = Mode.FILE
        else:
            self.mode = Mode.DEAD

    async def _watch_lock(self) -> None:
        while True:
            await asyncio.sleep(LOCK_S)
            alive = await asyncio.to_thread(lambda: self.run.alive)
            if alive != self.alive:
                self.alive = alive
                if not alive:
                    self._hang_up()
                self.wake()
            if self.mode in (Mode.FILE, Mode.DEAD):
                self._settle()
            elif self.quiet:
                self.log_end = await asyncio.to_thread(last_lines, self.run.log_path, 0, 1)

    def _socket_path(self) -> str:
        try:
            path = self.run.identity().get("socket")
        except RunError as error:
            raise OSError(str(error)) from error
        if not isinstance(path, str) or not path:
            raise OSError("run.json names no socket")
        return path

    async def _attached(self) -> None:
        """One connection, from hello to its end. Returns when the other side says bye.

        Raises:
            OSError, EOFError, ValueError, TimeoutError: no connection, or it broke.
        """
        path = await asyncio.to_thread(self._socket_path)
        reader, self._writer = await asyncio.open_unix_connection(path, limit=LINE_LIMIT)
        self._send({"op": "hello", "proto": PROTO, "client": "lumina"})
        first = json.loads(await asyncio.wait_for(reader.readline(), HELLO_S) or b"{}")
        if not isinstance(first, dict) or first.get("op") != "hello":
            reason = first.get("reason") if isinstance(first, dict) else None
            self.why = f"refused: {reason or 'no hello'}"
            raise EOFError(self.why)
        if first.get("proto") != PROTO:
            self.why = f"the run speaks protocol {first.get('proto')}, this program {PROTO}"
            raise EOFError(self.why)
        offset = first.get("offset", 0)
        if not isinstance(offset, int):
            self.why = "refused: its hello names no place in the log"
            raise EOFError(self.why)
        await self._read_file(offset)
        self.why, self.mode = "", Mode.LIVE
        self._asks = first["asks"] if isinstance(first.get("asks"), list) else []
        self._take_ranks(first)
        self.attachments += 1
        pending = b""
        while data := await reader.read(READ):
            cut = data.rfind(b"\n") + 1
            whole, pending = pending + data[:cut] if cut else b"", data[cut:] if cut else pending + data
            if whole and not self._take_at_once(whole):
                await self._take(whole.split(b"\n"))
            if len(pending) > LINE_LIMIT:
                raise ValueError("a line of more than 1 MiB")
            await asyncio.sleep(GATHER_S if len(data) < READ else 0)  # many records cost little more than one
        raise EOFError("the supervisor closed the connection")

    def _take_at_once(self, lines: bytes) -> bool:
        """Take lines that are the next records and nothing else; False if each has to be looked at."""
        if b'"op"' in lines:
            return False
        try:
            records = rec.decode_lines(lines)
        except rec.RecordError:
            return False
        first = self.store.seq + 1
        if [record.seq for record in records] != list(range(first, first + len(records))):
            return False
        if self._since_file + len(records) > RESYNC:
            return False
        self._since_file += len(records)
        self._apply(records)
        return True

    async def _take(self, lines: list[bytes]) -> None:
        records: list[rec.Record] = []
        expected = self.store.seq + 1
        for line in lines:
            if not line:
                continue
            if b'"op"' in line[:32] or not line.startswith(b'{"type"'):
                message = json.loads(line)
                if isinstance(message, dict) and "seq" not in message:
                    self._apply(records)
                    records = []
                    await self._control(message)
                    expected = self.store.seq + 1
                    continue
            try:
                record = rec.decode(line)
            except rec.RecordError:
                continue  # the file's reader names damaged lines; the next record shows the jump
            if record.seq < expected:
                continue
            if record.seq > expected:  # a jump: what lies between is in the file
                self._apply(records)
                records = []
                self.gaps += 1
                await self._read_file()
                expected = self.store.seq + 1
                if record.seq < expected:
                    continue
            records.append(record)
            expected = record.seq + 1
        self._apply(records)
        self._since_file += len(records)
        if self._since_file > RESYNC:
            await self._read_file()
            self._keep(columns.GROWN)

    async def _control(self, message: dict[str, Any]) -> None:
        match message.get("op"):
            case "gap":
                self.gaps += 1
                await self._read_file()
            case "reply":
                self._reply(message)
            case "ranks":
                self._take_ranks(message)
            case "bye":
                self.why = f"the supervisor closed the connection: {message.get('reason', 'no reason given')}"
                raise EOFError(self.why)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(message).encode() + b"\n")

    def _hang_up(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._beats = []
        for request in self.requests:
            if request.phase is Phase.SENT:
                request.phase, request.note = (
                    Phase.REFUSED,
                    "the connection was lost before the run answered; look, then repeat",
                )

    # the ranks

    def ask_ranks(self) -> None:
        """Ask where the ranks are, every two seconds at most. Whoever shows them calls this on each tick."""
        if self.mode is Mode.LIVE and self._writer is not None and "ranks" in self._asks:
            now = time.monotonic()
            if now - self._asked >= ASK_S:
                self._asked = now
                self._send({"op": "ranks"})

    @property
    def ranks(self) -> Ranks:
        """Where the ranks are, as far as the supervisor has told; none without a connection."""
        since = max(0.0, self.clock() - self._answered)
        return Ranks(self._beats, self._world, since, self.store.median_step_time())

    def _take_ranks(self, message: dict[str, Any]) -> None:
        world = message.get("world")
        self._beats, self._world = beats(message.get("ranks")), world if isinstance(world, int) else None
        self._answered = self.clock()

    # commands

    def why_no_commands(self) -> str | None:
        """Why a command cannot be sent now; None if it can."""
        if self.mode is Mode.LIVE and self._writer is not None:
            return None
        if self.mode is Mode.LOADING:
            return "the run's file is still being read"
        if self.mode is Mode.DEAD:
            return "the run is dead: its supervisor is gone; R on Home resumes it"
        if self.store.final:
            return f"the run is {self.store.state}; R on Home resumes it"
        return self.why or "no connection to the run's supervisor"

    def command(self, cmd: str, text: str, **args: Any) -> Request:
        """Send a command; its effect is a record. Refused at once without a connection."""
        request = Request(uuid.uuid4().hex, cmd, args, text, self.clock())
        self.requests = [*[old for old in self.requests if old.open], request]
        reason = self.why_no_commands()
        if reason is not None:
            request.phase, request.note = Phase.REFUSED, reason
        else:
            self._send({"op": "cmd", "id": request.id, "cmd": cmd, "args": args})
        return request

    def _reply(self, message: dict[str, Any]) -> None:
        for request in self.requests:
            if request.id == message.get("id") and request.phase is Phase.SENT:
                if message.get("ok"):
                    request.phase = Phase.ACCEPTED
                else:
                    request.phase, request.note = Phase.REFUSED, str(message.get("error", "no reason given"))
        self._answer()

    def _answer(self) -> None:
        for request in self.requests:
            record = self.store.answers.get(request.id) if request.open else None
            if record is None:
                continue
            request.phase = Phase.APPLIED
            step = getattr(record, "step", None)
            step = step if step is not None else self.store.step
            request.note = f"applied at step {step:,}" if step is not None else "applied"
            if isinstance(record, rec.Checkpoint) and record.failed:
                request.phase, request.note = Phase.REFUSED, record.failed
            elif isinstance(record, rec.Note):
                request.note += f": {record.message}"

    # badge

    def silence(self) -> float:
        """Seconds since the newest record arrived here."""
        return max(0.0, self.clock() - self.arrived)

    def quiet_after(self) -> float:
        """Seconds of silence that are more than this run's habit."""
        step = self.store.median_step_time() or 0.0
        return max(QUIET_S, 5 * step, 2 * self.store.longest_save())

    @property
    def quiet(self) -> bool:
        """Whether a run that should be working has been silent for longer than its habit: perhaps it hangs."""
        return self.mode is Mode.LIVE and self.store.state == "running" and self.silence() > self.quiet_after()

    def badge(self) -> Badge:
        """The state of the feed in a few words."""
        return badge_of(self)
