"""The user's own command for alerts (`alert_command`): an argument list, run without a shell, at most once a minute.

The alert is a JSON object on its standard input. Of several that came in between it is the worst one, with the others counted;
what waits when the run ends is told then, whenever the last command was. Lumina itself opens no connection: sending is the
command's business.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..monitoring import record as rec
from ..monitoring.say import say
from .process import Process, descendants

INTERVAL = 60.0  # s between two starts
PATIENCE = 10.0  # s that the command has
KILL_TIME = 1.0  # s in which a killed one is gone


def message_of(path: Path, alert: rec.Alert) -> dict[str, Any]:
    """What a command is told of an alert of the run in `path`."""
    words = {name: getattr(alert, name) for name in ("severity", "code", "message", "recommendation", "step", "t")}
    return {"run": path.name, "path": str(path.absolute()), **words}


class AlertCommand:
    """Runs the command for warnings and critical alerts; never waits for it.

    Args:
        argv: program and arguments; empty for none.
        path: the run's folder, and where the command is run.
    """

    def __init__(self, argv: Sequence[str], path: Path, interval: float = INTERVAL, patience: float = PATIENCE) -> None:
        self.argv, self.path, self.interval, self.patience = tuple(argv), path, interval, patience
        self._worst: dict[str, Any] | None = None  # of those that wait, and how many others do
        self._others = 0
        self._started = -float("inf")
        self._child: subprocess.Popen[bytes] | None = None

    def take(self, alert: rec.Alert) -> None:
        """Note an alert that the command is to be told."""
        if not self.argv or alert.severity == "info":
            return
        self._others += self._worst is not None
        if self._worst is None or alert.severity == "critical" or self._worst["severity"] != "critical":
            self._worst = message_of(self.path, alert)

    def tick(self, now: float) -> None:
        """Start or end the command. Call every turn."""
        if self._child is not None:
            if now - self._started > self.patience:
                self._kill()
        elif now - self._started >= self.interval:
            self._tell(now)

    def ended(self, pid: int, code: int) -> bool:
        """A child of this process has ended, with this exit code; whether it was the command."""
        if self._child is None or pid != self._child.pid:
            return False
        self._child.returncode = code
        self._child = None
        if code not in (0, -signal.SIGKILL):
            say(f"lumina: alert_command {self.argv[0]}: exit code {code}")
        return True

    def without(self, tree: list[Process]) -> list[Process]:
        """These processes of the run but for the command's: a run's end does not end it."""
        if self._child is None:
            return tree
        own = {self._child.pid, *(item.pid for item in descendants(self._child.pid))}
        return [item for item in tree if item.pid not in own]

    def finish(self) -> None:
        """The run is over: the command that runs gets the time it needs, and so does one more for what still waits."""
        self._wait()
        self._tell(time.monotonic())
        self._wait()

    def _wait(self) -> None:
        """Until the command has ended, or has had its time."""
        child = self._child
        if child is None:
            return
        left = self._started + self.patience - time.monotonic()
        try:
            self.ended(child.pid, child.wait(max(0.0, left)))
        except subprocess.TimeoutExpired:
            self._kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that cannot be killed holds up nobody
                child.wait(KILL_TIME)
            self._child = None

    def _tell(self, now: float) -> None:
        if self._worst is not None:
            message, self._worst, self._others, self._started = {**self._worst, "others": self._others}, None, 0, now
            self._start(message)

    def _start(self, message: dict[str, Any]) -> None:
        reader, writer = os.pipe()
        try:
            os.set_blocking(writer, False)  # a record is shorter than what a pipe holds: nobody waits for the reader
            os.write(writer, json.dumps(message, allow_nan=False).encode() + b"\n")
            self._child = subprocess.Popen(
                self.argv, stdin=reader, stdout=subprocess.DEVNULL, cwd=self.path, start_new_session=True
            )
        except (OSError, ValueError) as error:
            say(f"lumina: alert_command {self.argv[0]}: {getattr(error, 'strerror', None) or error}")
        finally:
            os.close(reader)
            os.close(writer)

    def _kill(self) -> None:
        """End the command and what it started; it is collected like any child."""
        assert self._child is not None
        say(f"lumina: alert_command {self.argv[0]}: not done after {self.patience:g} s, ended")
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._child = None
