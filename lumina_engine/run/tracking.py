"""The follower of a run that feeds one experiment tracker, in a process of its own: `lumina-engine track RUN --to NAME`.

It reads `metrics.jsonl` and nothing else, and neither a rank nor the supervisor knows of it: a tracker that is slow, hangs or
dies takes time from nobody. Its place in the log is saved only after the tracker has flushed everything before it, so whoever
follows next goes on there and nothing is lost; W&B alone cannot be told to flush, and loses its newest values if its follower
is killed (`wandb_sink.py`). The newest follower takes over from the one before, also from one that hangs inside its
tracker.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config.trackers import NAMES, to_install
from ..monitoring import record as rec
from ..monitoring.log import LogReader, last_records, whole_length
from ..monitoring.say import say
from ..monitoring.trackers.points import Sink, Subject, open_sink, points
from .directory import RunDirectory, RunError, lock_owner, open_lock, write_json
from .launch import environment
from .process import process, send_signal, wait_gone

FOLDER = "trackers"
PIECE = 1 << 20  # bytes of the log that are handed over at once
LOOK_TIME = 0.5  # s between two looks at a log that has not grown
LONGEST_PAUSE = 60.0  # s between two attempts with a tracker that fails
LAST_ATTEMPTS = 5  # in a row, once the run is over
TAKE_OVER_TIME = 5.0  # s that a follower gets to leave after TERM, and after KILL


def place(run: RunDirectory, name: str) -> Path:
    """The tracker's folder in the run."""
    return run.path / FOLDER / name


def read_state(run: RunDirectory, name: str) -> dict[str, Any]:
    """What the followers of this tracker have saved: offset, step, mark, state, error, t; {} before the first."""
    try:
        found = json.loads((place(run, name) / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{place(run, name) / 'state.json'}: {error}: remove it to send the whole log again", 65) from None
    return found if isinstance(found, dict) else {}


def status(run: RunDirectory, name: str) -> dict[str, Any]:
    """A row for a person: tracker, state, step, records behind in bytes, last error, folder."""
    state = read_state(run, name)
    offset = int(state.get("offset", 0))
    return {
        "tracker": name,
        "state": state.get("state", "never started"),
        "step": state.get("step", 0),
        "behind_bytes": max(0, whole_length(run.metrics_path) - offset),
        "error": state.get("error"),
        "folder": str(place(run, name)),
    }


def start(run: RunDirectory, names: Sequence[str]) -> list[int]:
    """Start a follower for each tracker in a session of its own, its output in `tracker.log`; their pids.

    Raises:
        OSError: a folder cannot be made or a process not started.
    """
    pids = []
    for name in names:
        folder = _folder(run, name)
        log = os.open(folder / "tracker.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            command = [sys.executable, "-m", "lumina_engine.run.tracking", str(run.path), name]
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=run.path,
                env=environment(run),
                start_new_session=True,
                umask=0o077,
            )
        finally:
            os.close(log)
        threading.Thread(target=child.wait, daemon=True).start()  # no zombie in a program that stays
        pids.append(child.pid)
    return pids


def _folder(run: RunDirectory, name: str) -> Path:
    (run.path / FOLDER).mkdir(mode=0o700, exist_ok=True)
    folder = place(run, name)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Turn:
    """The right to feed a tracker: one follower at a time, the newest one."""

    def __init__(self, path: Path) -> None:
        self._fd = open_lock(path)

    def take(self) -> None:
        """Take it, from whoever has it.

        Raises:
            RunError: the one that has it cannot be ended (another user's, or on another machine).
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            owner = self._holder()
            holder = process(owner) if owner > 0 else None
            # the lock is asked again: only the process that still holds it is meant
            if holder is not None and lock_owner(self._fd) == holder.pid and send_signal(holder, number):
                wait_gone([holder], TAKE_OVER_TIME)
        deadline = time.monotonic() + TAKE_OVER_TIME
        while owner := self._holder():
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)  # a killed process of many threads gives up its lock a little after it can be seen to be gone
        else:
            return
        raise RunError(f"another process follows this run for the tracker and cannot be ended (process {owner})", 65)

    def _holder(self) -> int:
        """0 once the lock is ours, else the pid that has it (negative: in another pid namespace)."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock_owner(self._fd) or -1
        return 0


class Follower:
    """Feeds one tracker until the run is over.

    Args:
        run: the run's folder.
        name: the tracker.
        opener: makes the sink (`open_sink`).
        pause: seconds before the second attempt with a tracker that fails; it doubles up to a minute.
    """

    def __init__(
        self, run: RunDirectory, name: str, opener: Callable[[str, Subject, Any], Sink] = open_sink, pause: float = 1.0
    ) -> None:
        self.run, self.name, self.opener, self.pause = run, name, opener, pause
        self.folder = _folder(run, name)
        self.leaving = threading.Event()
        self.sink: Sink | None = None
        self.failures = 0
        self.state: dict[str, Any] = {}
        self.unsaved = False  # whether the state is in memory only: the disk took no more
        self.reader = LogReader(run.metrics_path)

    def follow(self) -> int:
        """Deliver the log; 0 when all of it is delivered and the run is over, 1 when the tracker kept failing at the end.

        Raises:
            RunError: another follower cannot be ended; a saved state that is damaged.
        """
        Turn(self.folder / "lock").take()
        self.state = read_state(self.run, self.name)
        self._go_back()
        while not self.leaving.is_set():
            alive = self.run.alive  # looked at before the log is read: nothing can have been written since
            if self._deliver():
                continue
            if self.failures:
                if not alive and self.failures >= LAST_ATTEMPTS:
                    return 1
                self.leaving.wait(min(LONGEST_PAUSE, self.pause * 2 ** (self.failures - 1)))
            elif alive:
                self.leaving.wait(LOOK_TIME)
            else:
                return self._finish()
        if self.sink is not None:
            self.sink.close(None)
        return 0

    def _deliver(self) -> bool:
        """Hand over what the log has; whether there was anything and the tracker has it safe."""
        try:
            if self.sink is None:
                self.sink = self.opener(self.name, self._subject(), self.state.get("mark"))
            records = self.reader.read_new(PIECE)
            if not records:
                self.failures = 0
                if self.unsaved:
                    self._save()
                return False
            step = int(self.state.get("step", 0))
            taken = list(points(records, step))
            self.sink.write(taken)
            mark = self.sink.flush()
        except Exception as error:  # whatever a tracker raises costs a pause, never a record
            self._failed(error)
            return False
        newest = taken[-1].step if taken else step
        saved = self._save(offset=self.reader.offset, step=newest, mark=mark, state="following", error=None)
        self.failures = 0 if saved else 1  # a pause in which the disk may get room; what was delivered is not sent again
        return saved

    def _finish(self) -> int:
        last = last_records(self.run.metrics_path, 1, {"run"})
        state = last[0].state if last and isinstance(last[0], rec.Run) else None
        try:
            if self.sink is not None:
                self.sink.close(state if state in rec.FINAL_STATES else "crashed")
        except Exception as error:
            self._save(state="failed", error=_words(error))
            return 1
        self._save(state="done", error=None)
        return 0

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        say(f"lumina: tracker {self.name}: {_words(error)}")
        self._save(state="failing", error=_words(error))
        sink, self.sink = self.sink, None
        try:
            if sink is not None:
                sink.close(None)
        except Exception as second:
            say(f"lumina: tracker {self.name}: while closing: {_words(second)}")
        self._go_back()

    def _go_back(self) -> None:
        """Read on from where the tracker has everything."""
        self.reader = LogReader(self.run.metrics_path, int(self.state.get("offset", 0)))

    def _subject(self) -> Subject:
        from ..config.schema import Config

        config = Config.load(self.run.config_path).to_dict(sectioned=False) if self.run.config_path.exists() else {}
        return Subject(self.run.name, str(self.run.identity()["id"]), self.folder, config)

    def _save(self, **changes: Any) -> bool:
        """Note the state; whether it is on the disk. Where that is full it stays in memory, and the next save has it."""
        self.state = {**self.state, **changes, "t": time.time(), "pid": os.getpid()}
        try:
            write_json(self.folder / "state.json", self.state)
        except OSError as error:
            if not self.unsaved:
                words = "how far it is cannot be saved, and a restart would send again what was sent since"
                say(f"lumina: tracker {self.name}: {words}: {_words(error)}")
            self.unsaved = True
            return False
        self.unsaved = False
        return True


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def main(argv: list[str] | None = None) -> int:
    """`python -m lumina_engine.run.tracking RUN_DIR TRACKER`: follow until the run is over."""
    path, name = sys.argv[1:] if argv is None else argv
    if name not in NAMES:
        raise RunError(f"unknown tracker {name!r}: {', '.join(NAMES)}")
    install = to_install(name)
    if install:
        raise RunError(f"tracker {name}: its package is not installed: pip install {install}")
    follower = Follower(RunDirectory(path), name)
    signal.signal(signal.SIGTERM, lambda *_: follower.leaving.set())
    signal.signal(signal.SIGINT, lambda *_: follower.leaving.set())
    return follower.follow()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunError as refused:
        say(f"lumina: {refused}")
        sys.exit(refused.exit_code)
