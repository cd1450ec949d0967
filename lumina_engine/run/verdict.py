"""What the end of an incarnation means: is the run over, and how; or is it started again. Needs no process."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from . import policy
from .channel import End
from .watchdog import Hang


@dataclass(frozen=True, slots=True)
class Ended:
    """What is known of an incarnation whose processes are all gone.

    Attributes:
        code: exit code of the worker or launcher, negative for a signal.
        failure: the rank that did not end well first. hang: the one that was ended for standing still.
        intent: stop, interrupt or preempt, if somebody wanted the run to end.
        pressed, killed: TERM or KILL was sent to it.
        stepped: a rank had finished a step.
        kernel_killed: the kernel has ended a process for want of memory since it began.
        log_tail: gives the end of engine.log.
    """

    code: int
    world: int
    failure: End | None
    hang: Hang | None
    intent: str | None
    pressed: bool
    killed: bool
    stepped: bool
    kernel_killed: bool
    log_tail: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`state` is that of the run, which is over; None: it is started again, as crashed unless `code` is `policy.AGAIN`."""

    state: str | None
    code: int
    reason: str | None
    hang: Hang | None = None


def judge(ended: Ended) -> Verdict:
    """The verdict on an incarnation that has ended."""
    if ended.hang is not None and ended.intent is None and ended.code != policy.FINISHED:
        return Verdict(None, policy.CRASHED, f"hang: {ended.hang}", ended.hang)
    code, reason = _first_cause(ended)
    state = policy.final_state(code)
    if state is not None:
        interrupted = ended.intent == "interrupt" and code == policy.FINISHED
        return Verdict(state, policy.INTERRUPTED if interrupted else code, reason)
    if code == policy.AGAIN:
        return Verdict(None, code, reason)
    if code == policy.HOST_LOST and ended.intent is None:
        return Verdict("failed", policy.CRASHED, reason)  # nobody but a person knows which machines are left
    reason = reason or policy.cause(code, ended.log_tail())
    return Verdict(None, code, reason) if ended.intent is None else _wanted(ended, reason)


def _first_cause(ended: Ended) -> tuple[int, str | None]:
    """Exit code and reason of the rank that failed first: a launcher turns codes into 1, and ends the others."""
    code, reason, failure = ended.code, None, ended.failure
    said = failure is not None and failure.code is not None and policy.final_state(failure.code) is not None
    if code == -signal.SIGTERM and not (ended.pressed or ended.hang or said):
        return policy.PREEMPTED, "told to leave while it still started: the newest checkpoint counts"
    if code != 0 and failure is not None and (ended.world > 1 or failure.code is not None):
        code, reason = policy.CRASHED if failure.code is None else failure.code, failure.reason
        if failure.code is None:
            reason = f"{failure.who} died without a word"
    wordless = code == -signal.SIGKILL or (failure is not None and failure.code is None)
    if wordless and not ended.killed and ended.kernel_killed:
        return policy.OUT_OF_MEMORY, "the kernel killed a rank for want of memory"
    return code, reason


def _wanted(ended: Ended, reason: str) -> Verdict:
    """It did not end well, but somebody wanted it to end."""
    if ended.intent == "preempt":
        return Verdict("preempted", policy.PREEMPTED, "it was ended before a checkpoint: the newest one counts")
    interrupted = ended.intent == "interrupt"
    if ended.pressed and not ended.stepped:
        code = policy.INTERRUPTED if interrupted else policy.FINISHED
        return Verdict("finished", code, "stopped before its first step")
    code = policy.INTERRUPTED if interrupted else policy.CRASHED
    how = "it did not stop and was killed" if ended.killed else reason
    return Verdict(policy.final_state(code) or "failed", code, f"{how}; the newest checkpoint is whole")
