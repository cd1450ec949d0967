"""Running checks: several at a time, each with its time limit, rows as they come."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence

from .checks import CHECKS, Check
from .row import Result, Row, fail, skipped
from .system import System

WORKERS = 3


def run_checks(
    system: System, checks: Sequence[Check] = CHECKS, *, skip: Collection[str] = (), workers: int = WORKERS
) -> Iterator[Row]:
    """The rows of each check as soon as it ends. Never raises: a check that fails itself, or takes too long, is a row.

    Args:
        skip: ids of checks that are not run; each gives a row that says so.
        workers: checks at one time; slow ones are started first.
    """
    for check in checks:
        if check.id in skip:
            yield _row(check, skipped("skipped on request"))
    waiting = deque(sorted((check for check in checks if check.id not in skip), key=lambda check: not check.slow))
    running: dict[str, tuple[Check, float]] = {}
    answers: queue.SimpleQueue[tuple[Check, list[Row]]] = queue.SimpleQueue()
    while waiting or running:
        while waiting and len(running) < workers:
            check = waiting.popleft()
            running[check.id] = (check, time.monotonic() + check.limit_s)
            # a daemon: a check that hangs in the kernel must not keep the program from ending
            threading.Thread(target=_answer, args=(system, check, answers), name=f"check-{check.id}", daemon=True).start()
        first, deadline = min(running.values(), key=lambda entry: entry[1])
        try:
            check, rows = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            del running[first.id]
            late = fail(f"no answer within {first.limit_s:g} s", f"--skip {first.id} leaves it out; {first.about}")
            yield _row(first, late)
            continue
        if running.pop(check.id, None) is not None:  # else it was given up before
            yield from rows


def _answer(system: System, check: Check, answers: queue.SimpleQueue[tuple[Check, list[Row]]]) -> None:
    rows = []
    try:
        for result in check.function(system):
            rows.append(_row(check, result))
    except Exception as error:  # shown as a row: one broken check hides no other
        rows.append(_row(check, fail(f"the check itself failed: {type(error).__name__}: {error}", "report this with the row")))
    answers.put((check, rows))


def _row(check: Check, result: Result) -> Row:
    id = f"{check.id}.{result.part}" if result.part else check.id
    return Row(id, check.group, result.status, " ".join(result.value.split()), result.fix)


def validate_environment() -> list[str]:
    """Check this machine as `lumina-engine doctor` does; takes up to a minute.

    Returns:
        One line for each failure and then each warning: what, what was measured, what to do. Empty: all is well.
    """
    rows = list(run_checks(System.here()))
    issues = [row for status in ("fail", "warn") for row in rows if row.status == status]
    return [f"{row.id}: {row.value}" + (f": {row.fix}" if row.fix else "") for row in issues]
