"""Decisions of the supervisor that need no process: what an exit code means, when to start again, what to say about a death."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .directory import RunError

if TYPE_CHECKING:
    from ..config.schema import Config

FINISHED, CRASHED, USAGE, REFUSED, PREEMPTED, NO_PROGRESS, INTERRUPTED = 0, 1, 2, 65, 75, 93, 130
# Between a rank and its supervisor only; the run goes on.
OUT_OF_MEMORY = 91  # a smaller micro batch is left: start again with it
AGAIN = 92  # a checkpoint is taken and the configuration changed: start again from it
HOST_LOST = 94  # a machine of the run is gone: the same start would miss it too
MAX_PAUSE = 60.0  # s between two starts

_FINAL = {  # exit code of the worker -> state of the run; any other code is a crash
    FINISHED: "finished",
    USAGE: "failed",
    REFUSED: "failed",
    PREEMPTED: "preempted",
    NO_PROGRESS: "failed",
    INTERRUPTED: "finished",
}
_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit|Failure)(:.*)?")


@dataclass(frozen=True, slots=True)
class Settings:
    """What launch.start may set; the first six and `alert_command` are config keys."""

    max_restarts: int = 3
    preempt_grace_s: float = 30.0
    engine_log_mb: float = 64
    hang_timeout_s: float = 60.0
    hang_factor: float = 5.0
    startup_timeout_s: float = 1_800.0
    hang_grace_s: float = 30.0  # between TERM and KILL of a hung incarnation
    rows_grow: int = 0  # 1: a curriculum makes steps longer, so a rank's own best says nothing
    restart_pause_s: float = 1.0  # first pause before a restart
    survivors_s: float = 10.0  # what the other ranks get to leave after one has died
    rebind_s: float = 10.0  # how often the socket's place is looked at
    alert_command: tuple[str, ...] = ()

    @classmethod
    def of_config(cls, config: Config) -> dict[str, Any]:
        """The settings that a configuration makes."""
        names = (
            "max_restarts",
            "preempt_grace_s",
            "engine_log_mb",
            "hang_timeout_s",
            "hang_factor",
            "startup_timeout_s",
            "alert_command",
        )
        return {name: getattr(config, name) for name in names} | {"rows_grow": int(config.curriculum_learning)}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Settings:
        """
        Raises:
            RunError: a name that is none, or a value that is no number from 0 up.
        """
        unknown = set(values) - {item.name for item in fields(cls)}
        if unknown:
            raise RunError(f"unknown settings for the supervisor: {', '.join(sorted(unknown))}")
        argv = values.get("alert_command", ())
        if not isinstance(argv, list | tuple) or not all(isinstance(word, str) for word in argv):
            raise RunError(f"alert_command={argv!r}: the supervisor needs a list of words")
        values = {**values, "alert_command": tuple(argv)}
        for name, value in values.items():
            if name == "alert_command":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise RunError(f"{name}={value!r}: the supervisor needs a number from 0 up")
        return cls(**values)


def final_state(code: int) -> str | None:
    """The state in which a worker with this exit code leaves the run, None for a crash."""
    return _FINAL.get(code)


@dataclass(slots=True)
class RestartPolicy:
    """How often a crashed run is started again: `limit` times in a row without a newer verified checkpoint.

    Pauses are 1, 2, 4 … 60 times `unit` seconds; progress starts the count afresh. What counts is what was read back: a save
    that was verified, or a step that a start resumed from (an emergency save shows only there); never the name of a folder.
    """

    limit: int
    unit: float = 1.0
    newest: int | None = field(default=None, init=False)  # step of the newest verified checkpoint; None: unknown, not 0
    failures: int = field(default=0, init=False)

    def verified(self, step: int) -> None:
        """A checkpoint of this step was committed and read back."""
        if self.newest is None or step > self.newest:
            self.newest, self.failures = step, 0

    def resumed(self, step: int) -> None:
        """A start went on from this step: newer checkpoints, if there were any, are no good."""
        if self.newest is not None and step > self.newest:
            self.failures = 0
        self.newest = step

    def crashed(self) -> float | None:
        """Seconds until the next start, None if there must be none."""
        self.failures += 1
        return None if self.failures > self.limit else min(MAX_PAUSE, 2.0 ** min(self.failures - 1, 16)) * self.unit


def cause(code: int, log_tail: str) -> str:
    """Why a worker died, in one line for a person.

    Args:
        code: exit code, negative for a signal.
        log_tail: the end of engine.log: the last line that looks like an exception is quoted.
    """
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        text = f"the worker was killed by {name}"
        if -code == signal.SIGKILL:
            text += " (by hand, or by the kernel for want of memory)"
        return text
    text = f"the worker ended with exit code {code}"
    lines = [line.strip() for line in log_tail.splitlines() if _ERROR_LINE.fullmatch(line.strip())]
    return f"{text}: {lines[-1][:300]}" if lines else text
