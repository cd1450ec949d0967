"""Processes named so that a recycled pid is never mistaken: pid with start time, signals through pidfds, trees (Linux).

Standard library only: the supervisor and every rank import it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ASKING = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Process:
    """One process for ever: `start` is its start time in clock ticks since boot (field 22 of /proc/<pid>/stat)."""

    pid: int
    start: int
    parent: int = 0

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        found = _stat(self.pid)
        return found is not None and found[0].start == self.start and found[1] not in "ZX"

    @property
    def stopped(self) -> bool:
        """Whether a signal (or a debugger) has stopped it."""
        found = _stat(self.pid)
        return found is not None and found[0].start == self.start and found[1] in "Tt"


def _stat(pid: int) -> tuple[Process, str] | None:
    """The process and its state letter, None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold spaces and parentheses
    return Process(pid, int(fields[19]), int(fields[1])), fields[0]


def process(pid: int) -> Process | None:
    """The process that has this pid now."""
    found = _stat(pid)
    return found[0] if found else None


def myself() -> Process:
    """The calling process."""
    found = process(os.getpid())
    assert found is not None
    return found


def boot_id() -> str:
    """Changes with every boot, so that pids of an earlier boot are never believed."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _all() -> list[tuple[Process, str]]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [found for pid in pids if (found := _stat(pid)) is not None]


def descendants(root: int) -> list[Process]:
    """The living processes below `root`, parents before children; a subreaper finds adopted orphans too."""
    below: dict[int, list[Process]] = {}
    for found, state in _all():
        if state not in "ZX":
            below.setdefault(found.parent, []).append(found)
    tree: list[Process] = []
    level = [root]
    while level:
        children = [child for pid in level for child in below.get(pid, ())]
        tree += children
        level = [child.pid for child in children]
    return tree


def marked(nonce: str) -> list[Process]:
    """The living processes of this user that were started with LUMINA_NONCE=`nonce`, whoever their parent is now."""
    wanted = f"LUMINA_NONCE={nonce}".encode()
    found = []
    for candidate, state in _all():
        if state in "ZX" or candidate.pid == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{candidate.pid}/environ").read_bytes()
        except OSError:
            continue  # gone, or another user's: not ours to see
        if wanted in environment.split(b"\0"):
            found.append(candidate)
    return found


def send_signal(target: Process, number: int) -> bool:
    """Signal exactly this process; False if it is gone or its pid belongs to another one by now."""
    try:
        descriptor = os.pidfd_open(target.pid)
    except ProcessLookupError:
        return False
    try:
        found = process(target.pid)  # the pidfd holds the process: equal now means equal when the signal goes out
        if found is None or found.start != target.start:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def send_all(targets: Iterable[Process], number: int) -> int:
    """Signal each process; the number that were still there."""
    return sum(send_signal(target, number) for target in targets)


def wait_gone(targets: Iterable[Process], timeout: float) -> bool:
    """Wait until all have ended (a zombie has); False if some have not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    for target in targets:
        try:
            descriptor = os.pidfd_open(target.pid)
        except ProcessLookupError:
            continue
        try:
            if target.alive and not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
        finally:
            os.close(descriptor)
    return True


def end_marked(nonce: str, timeout: float) -> list[Process]:
    """Kill the processes with this nonce and wait for their end; those that still live after `timeout` seconds."""
    left = marked(nonce)
    send_all(left, signal.SIGKILL)
    wait_gone(left, timeout)
    return [item for item in left if item.alive]


def become_subreaper() -> None:
    """Orphans below this process become its children, so that none escapes by a double fork."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that started it ends. Survives execve, not fork."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leash(parent: int) -> Callable[[], None]:
    """For `preexec_fn` of a process started by `parent`: it dies with its parent, also if that is dead already.

    What asks a rank for stacks or a checkpoint is ignored until the program listens, and by launchers for ever: to a process
    that does not, these signals (a scheduler sends them to everybody) are its end. So is the terminal's interrupt.
    TERM ends it until it listens, whatever its starter does with it; also one that came while it was `held`.
    """
    library = ctypes.CDLL(None, use_errno=True)  # loaded here: after the fork as little as possible is done

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in _ASKING:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        if os.getppid() != parent:
            os._exit(1)

    return prepare


@contextlib.contextmanager
def held() -> Iterator[None]:
    """TERM waits, here and in a process started inside, until `leash` lets it through there.

    A child has its starter's handlers until it executes its program: what they catch in it nobody would ever take up.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_as(code: int) -> NoReturn:
    """End this process with an exit code or, if it is negative, by that signal (not KILL), as `subprocess` counts."""
    if code < 0:
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _prctl(option: int, value: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
