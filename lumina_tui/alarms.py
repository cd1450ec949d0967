"""Critical alerts of the run that is watched: which ones are new, and the user's own command for them.

The command is an argument list, run without a shell, at most once in `INTERVAL_S`; the alert is a JSON object on its standard
input. Alerts that come in between are counted in the next one. What was critical before the run was opened rings, but is no
reason to run a command.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_engine.run.alarm import message_of

if TYPE_CHECKING:
    from lumina_engine.monitoring.record import Alert

INTERVAL_S = 30.0
PATIENCE_S = 10.0  # that the command has


class Alarms:
    """Tells new critical alerts from those already seen, and when the command is to be run.

    Args:
        command: program and arguments; empty for none.
        clock: seconds since 1970.
    """

    def __init__(self, command: Sequence[str] = (), clock: Callable[[], float] = time.time) -> None:
        self.command, self.clock = tuple(command), clock
        self._seen: dict[Path, int] = {}
        self._since: dict[Path, float] = {}
        self._waiting: deque[dict[str, Any]] = deque(maxlen=1000)
        self._ran = float("-inf")

    def look(self, run: Path, alerts: Sequence[Alert]) -> list[Alert]:
        """The critical ones among `alerts` (in the order of the log) that were not there at the last look."""
        since = self._since.setdefault(run, self.clock())
        seen = self._seen.get(run, 0)
        new = [alert for alert in alerts if alert.seq > seen]
        if new:
            self._seen[run] = max(alert.seq for alert in new)
        critical = [alert for alert in new if alert.severity == "critical"]
        if self.command:
            self._waiting += [message_of(run, alert) for alert in critical if alert.t >= since]
        return critical

    def due(self) -> dict[str, Any] | None:
        """The alert to run the command for now: the newest, with how many others came since the last; None if not yet."""
        now = self.clock()
        if not self._waiting or now - self._ran < INTERVAL_S:
            return None
        self._ran = now
        newest = {**self._waiting[-1], "others": len(self._waiting) - 1}
        self._waiting.clear()
        return newest


async def run_command(command: Sequence[str], message: dict[str, Any], patience: float = PATIENCE_S) -> str:
    """Run the command with `message` as JSON on its input; gives what went wrong in one sentence, or ""."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return f"alert_command {command[0]}: {getattr(error, 'strerror', None) or error}; see settings.yaml"
    text = (json.dumps(message, allow_nan=False) + "\n").encode()
    try:
        _, said = await asyncio.wait_for(process.communicate(text), patience)
    except (asyncio.TimeoutError, asyncio.CancelledError) as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
        return f"alert_command {command[0]}: not done after {patience:g} s, ended"
    if process.returncode:
        last = said.decode(errors="replace").strip().rpartition("\n")[2][:200]
        return f"alert_command {command[0]}: exit code {process.returncode}{f': {last}' if last else ''}"
    return ""
