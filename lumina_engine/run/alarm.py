"""The user's own command for alerts (`alert_command`): an argument list, run without a shell, at most once a minute.

The alert is a JSON object on its standard input; what came in between is counted in the next one. Lumina itself opens no
connection: sending is the command's business.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..monitoring import record as rec
from ..monitoring.say import say
from .process import Process, descendants

INTERVAL = 60.0  # s between two starts
PATIENCE = 10.0  # s that the command has


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
        self._waiting: deque[dict[str, Any]] = deque(maxlen=1_000)
        self._started = -float("inf")
        self._child: subprocess.Popen[bytes] | None = None

    def take(self, alert: rec.Alert) -> None:
        """Note an alert that the command is to be told."""
        if self.argv and alert.severity != "info":
            self._waiting.append(message_of(self.path, alert))

    def tick(self, now: float) -> None:
        """Start or end the command. Call every turn."""
        if self._child is not None:
            if now - self._started > self.patience:
                say(f"lumina: alert_command {self.argv[0]}: not done after {self.patience:g} s, ended")
                self._kill()
        elif self._waiting and now - self._started >= self.interval:
            self._started = now
            self._start({**self._waiting[-1], "others": len(self._waiting) - 1})
            self._waiting.clear()

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
        """The run is over: what still waits gets its command, if one is due, and the time it needs."""
        now = time.monotonic()
        self.tick(now)
        if self._child is not None:
            left = self.patience - (now - self._started)
            try:
                self.ended(self._child.pid, self._child.wait(max(0.0, left)))
            except subprocess.TimeoutExpired:
                self._kill()

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
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._child = None
