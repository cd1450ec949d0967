"""Work that needs the engine's libraries: a `lumina-engine … --json` subprocess with progress, never in the way of the loop.

The child reads nothing, writes to files without a name and leads its own session: neither a frozen terminal nor the end of
this process can hold it up or damage it, and nothing is left behind. Its stdout is one JSON document; lines on stderr are
progress (JSON objects with a `progress` key) or words for the user.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

POLL_TIME = 0.2  # s between two looks at a running job
GRACE = 3.0  # s from SIGTERM to SIGKILL
MAX_RESULT = 64 << 20  # bytes of an answer
_MAX_READ = 1 << 20  # bytes of stderr taken at one look


class JobState(Enum):
    """What a job is doing."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job:
    """One engine command.

    Args:
        arguments: the words behind `lumina-engine`, two verbs first, without `--json` and `--progress`.
        keep: let it go on when the program ends; otherwise it ends with it.
        changed: called in the loop's thread after each change of `state` or `progress`.
        told: called in the loop's thread with every line of progress.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        keep: bool = False,
        changed: Callable[[Job], None] = lambda job: None,
        told: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        self.arguments = tuple(arguments)
        self.keep = keep
        self.state = JobState.WAITING
        self.progress: dict[str, Any] = {}
        self.result: Any = None
        self.error = ""
        self.code: int | None = None
        self.seconds = 0.0
        self._changed = changed
        self._told = told
        self._process: asyncio.subprocess.Process | None = None
        self._cancelled = False
        self._words: deque[str] = deque(maxlen=20)
        self._read = 0
        self._torn = b""

    @property
    def argv(self) -> list[str]:
        """The exact command. What it prints is asked for behind the two verbs: words behind `--` are no options."""
        verbs, words = self.arguments[:2], self.arguments[2:]
        return [sys.executable, "-m", "lumina_engine.cli", *verbs, "--json", "--progress", "json", *words]

    @property
    def words(self) -> list[str]:
        """The last lines that it said on stderr, oldest first."""
        return list(self._words)

    @property
    def over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.state in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)

    async def run(self) -> None:
        """Start it and follow it to its end. Failures are in `state` and `error`, never raised."""
        if self._cancelled:
            self._end(JobState.CANCELLED, "")
            return
        wrong = next((word for word in self.argv if "\0" in word), None)
        if wrong is not None:
            self._end(JobState.FAILED, f"an argument holds a NUL: {wrong!r}")
            return
        begun = time.monotonic()
        try:
            with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
                self._process = await asyncio.create_subprocess_exec(
                    *self.argv, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
                self.state = JobState.RUNNING
                self._changed(self)
                if self._cancelled:
                    self._signal(signal.SIGTERM)
                self.code = await self._follow(err.fileno(), begun)
                self._end(*await asyncio.to_thread(self._outcome, out.fileno()))
        except OSError as error:
            self._end(JobState.FAILED, f"the engine did not start: {error.strerror or error}")
        except asyncio.CancelledError:  # the program ends
            if not self.keep:
                self._signal(signal.SIGTERM)
            raise

    async def _follow(self, errors: int, begun: float) -> int:
        """Wait for the end; tell of progress on the way."""
        assert self._process is not None
        waiting = asyncio.ensure_future(self._process.wait())
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=POLL_TIME)
                self.seconds = time.monotonic() - begun
                if self._read_words(errors) and not done:
                    self._changed(self)
                if done:
                    while self._read_words(errors):
                        pass
                    return waiting.result()
        finally:
            waiting.cancel()

    def _read_words(self, errors: int) -> bool:
        """Take what is new on stderr; the child writes through the same file, so its offset is not touched."""
        data = os.pread(errors, _MAX_READ, self._read)
        self._read += len(data)
        *lines, self._torn = (self._torn + data).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace").strip())
        return bool(data)

    def _take(self, line: str) -> None:
        found = None
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line) if line.startswith("{") else None
        if isinstance(found, dict) and "progress" in found:
            self.progress = found
            self._told(found)
        elif line:
            self._words.append(line)

    def _outcome(self, answer: int) -> tuple[JobState, str]:
        """State and error after the end; reads the answer."""
        if self._cancelled:
            return JobState.CANCELLED, ""
        if self._torn:
            self._take(self._torn.decode(errors="replace").strip())
        last = self._words[-1].removeprefix("lumina-engine: ") if self._words else ""
        try:
            if os.fstat(answer).st_size > MAX_RESULT:
                return JobState.FAILED, f"the engine answered more than {MAX_RESULT >> 20} MiB"
            self.result = json.loads(os.pread(answer, MAX_RESULT, 0))
        except (OSError, ValueError, RecursionError):
            return JobState.FAILED, last or f"lumina-engine {self.arguments[0]} ended with {self._ended()} and no answer"
        if self.code not in (0, 1):  # 1: a check that found something
            return JobState.FAILED, last or f"lumina-engine {self.arguments[0]} ended with {self._ended()}"
        return JobState.DONE, ""

    def _ended(self) -> str:
        if self.code is not None and self.code < 0:
            return f"signal {signal.Signals(-self.code).name}"
        return f"exit code {self.code}"

    def _end(self, state: JobState, error: str) -> None:
        self.state, self.error = state, error
        self._changed(self)

    async def cancel(self) -> None:
        """End it: SIGTERM to its whole group, SIGKILL to what is left after three seconds."""
        if self.over or self._cancelled:
            return
        self._cancelled = True
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while not self.over and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if not self.over:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
