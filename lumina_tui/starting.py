"""A start, from the command to the first step: four steps with times, and the end of a start that fails. No Textual."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lumina_engine.monitoring.log import LogReader
from lumina_engine.monitoring.record import Run, Step
from lumina_engine.run.directory import RunDirectory, RunError
from lumina_engine.run.process import end_marked
from lumina_engine.text import safe_text

from .launching import Launched, LaunchError
from .paint import duration
from .widgets.text_panel import Line

STAGES = ("run directory", "supervisor", "ranks", "first step")
# what to look at where the cause alone does not say it
ADVICE = {
    "run directory": "E opens the fields; free the name, the disk or the data that the cause names",
    "supervisor": "9 Doctor checks sockets, limits and the runs folder",
    "ranks": "E opens the fields: the cause names a key, a data file or a package",
    "first step": "E opens the fields: a smaller batch_size or seq_length needs less memory",
}
_LOOK = 0.2  # s between two looks at a starting run
_GONE = 1.5  # s without a living supervisor and without a last word after which it counts as gone
_STOP_TIME = 10.0  # s that a half-started run gets to end
_LAST_LINES = 20
_REFUSED = (2, 65)  # exit codes of the command where nothing was made
_TAIL_BYTES = 64 << 10


@dataclass
class Progress:
    """When each step was reached (seconds after the start), and what the run says now."""

    begun: float = field(default_factory=time.monotonic)
    reached: dict[str, float] = field(default_factory=dict)
    now: str = "checking the configuration"
    ended: str = ""  # how the run ended before its first step

    def reach(self, stage: str) -> None:
        """Note a step, and those before it, at this moment."""
        for earlier in STAGES[: STAGES.index(stage) + 1]:
            self.reached.setdefault(earlier, time.monotonic() - self.begun)

    @property
    def done(self) -> bool:
        return STAGES[-1] in self.reached

    @property
    def waiting_for(self) -> str:
        """The step that comes next."""
        return next((stage for stage in STAGES if stage not in self.reached), STAGES[-1])


@dataclass(frozen=True)
class Failure:
    """Why a start failed: the step, the cause, the last lines of the log, what to do, and processes that would not end."""

    step: str
    cause: str
    words: tuple[str, ...]
    left: tuple[int, ...] = ()


class Watch:
    """Follows a run that is being started by its folder, its lock and its metric log. Reads the disk: for a thread."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.run, self.progress = RunDirectory(path), progress
        self._reader = LogReader(path / "metrics.jsonl")
        self._alone_since: float | None = None

    def look(self, started: bool) -> None:
        """Read what is new; `started` says that the command has ended well, so that a supervisor must be there."""
        progress = self.progress
        if not self.run.identity_path.exists():
            if started:
                progress.ended = "its folder is gone"
            return
        progress.reach("run directory")
        alive = self.run.alive
        if alive:
            progress.reach("supervisor")
        with contextlib.suppress(OSError):  # a log that is not there yet is no error
            for record in self._reader.read_new():
                self._take(record)
        if alive or not started or progress.ended or progress.done:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > _GONE:
            progress.ended = "its supervisor is gone without a word: it was killed"

    def _take(self, record: object) -> None:
        if isinstance(record, Step):
            self.progress.reach("first step")
        elif isinstance(record, Run) and record.state is not None:
            said = record.state + (f": {record.reason}" if record.reason else "")
            self.progress.now = said
            if record.state in ("compiling", "running"):
                self.progress.reach("ranks")
            elif record.state in ("failed", "preempted", "finished") and not self.progress.done:
                self.progress.ended = said


class Start:
    """One start. `run()` ends with the first step, or with a `failure` behind which no process of the run is left.

    Args:
        arguments: those of `lumina-engine train`.
        path: the folder that the run will have.
        launch: starts the command; raises `LaunchError`.
        changed: called after each look.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        path: Path,
        launch: Callable[[Sequence[str]], Awaitable[Launched]],
        changed: Callable[[], None],
    ) -> None:
        self.path, self.progress = path, Progress()
        self.failure: Failure | None = None
        self._arguments, self._launch, self._changed = list(arguments), launch, changed

    async def run(self) -> None:
        """Start the command and follow the run. Cancelling this stops nothing."""
        taken = await asyncio.to_thread(self.path.exists)  # then it is not ours before the command says so
        command = asyncio.ensure_future(self._launch(self._arguments))
        watch = Watch(self.path, self.progress)
        try:
            while not self.progress.done:
                started = command.done()
                if started and (error := command.exception()) is not None:
                    await self._fail(str(error) or type(error).__name__, error, taken)
                    return
                if started and command.result().path != self.path:
                    self.path, taken = command.result().path, False
                    watch = Watch(self.path, self.progress)
                if started or not taken:
                    await asyncio.to_thread(watch.look, started)
                if self.progress.ended:
                    await self._fail(f"run {self.path.name} {self.progress.ended}", None, False)
                    return
                self._changed()
                await asyncio.sleep(_LOOK)
        finally:
            self._changed()

    async def _fail(self, cause: str, error: BaseException | None, taken: bool) -> None:
        """Note the failure, and end what was started; a run that was refused is not ours and is left alone."""
        refused = taken or (isinstance(error, LaunchError) and error.code in _REFUSED)
        words = [safe_text(text) for text in error.output.splitlines()] if isinstance(error, LaunchError) else []
        left: list[int] = []
        if not refused:
            words = await asyncio.to_thread(last_lines, self.path / "engine.log") or words
            self.progress.now = "ending what was started"
            self._changed()
            left = await asyncio.to_thread(end_run, self.path)
        self.failure = Failure(self.progress.waiting_for, cause, tuple(words[-_LAST_LINES:]), tuple(left))


def end_run(path: Path, seconds: float = _STOP_TIME) -> list[int]:
    """End a half-started run with all of its processes; the pids of those that would not end. Waits: for a thread."""
    run = RunDirectory(path)
    deadline = time.monotonic() + seconds
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):  # the second one makes the supervisor kill its ranks
        if not run.alive:
            break
        run.signal(number)
        until = min(deadline, time.monotonic() + seconds / 3)
        while run.alive and time.monotonic() < until:
            time.sleep(0.05)
    try:
        nonce = run.identity().get("nonce")
    except RunError:
        return []
    left = [item.pid for item in end_marked(nonce, 5.0)] if isinstance(nonce, str) else []
    owner = run.owner()
    return left if owner is None or not run.alive or owner.pid in left else [*left, owner.pid]


def last_lines(path: Path, count: int = _LAST_LINES) -> list[str]:
    """The last lines of a log, safe to show; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [safe_text(line) for line in text.splitlines()[-count:]]


def progress_lines(start: Start) -> list[Line]:
    """The four steps with their times, and what is waited for."""
    progress, lines = start.progress, list[Line]()
    for stage in STAGES:
        at = progress.reached.get(stage)
        if at is not None:
            lines.append((("ok  ", "good"), (f"{stage:<15}", "text"), (f"after {duration(at)}", "dim")))
        elif stage == progress.waiting_for:
            lines.append((("…   ", "accent"), (f"{stage:<15}", "title"), (progress.now, "dim")))
        else:
            lines.append((("    ", "dim"), (stage, "dim")))
    return [*lines, (("", "text"),), ((f"run {start.path.name}; Enter opens its monitor now", "dim"),)]


def failure_lines(failure: Failure, progress: Progress) -> list[Line]:
    """Step, cause, what to do, the last lines of the log, and whether anything is left running."""
    lines: list[Line] = []
    for stage in STAGES:
        if stage in progress.reached:
            lines.append((("ok  ", "good"), (f"{stage:<15}", "text"), (f"after {duration(progress.reached[stage])}", "dim")))
    lines.append((("!   ", "bad"), (f"{failure.step:<15}", "title"), ("failed", "bad")))
    lines.append(((failure.cause, "bad"),))
    lines.append(((ADVICE[failure.step] + "; r reviews again", "text"),))
    if failure.left:
        pids = ", ".join(str(pid) for pid in failure.left)
        lines.append(((f"these processes do not end: {pids}; kill -9 ends them", "bad"),))
    else:
        lines.append((("nothing is left running", "dim"),))
    if failure.words:
        lines.append(((f"last {len(failure.words)} lines of the log", "title"),))
    return lines + [((word, "dim"),) for word in failure.words]
