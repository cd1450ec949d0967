"""One thread for the writing of checkpoints, which takes what time the processor has to spare (standard library only).

Training on a CPU keeps all cores busy, and each thread of a product waits for the one that something else has held up. So the
writing runs with Linux's policy for idle time, which leaves a core at once to a thread of training, until somebody waits for
it (`hurry`) or its patience is over. Only where a thread may come back from that policy, which asks for CAP_SYS_NICE or
RLIMIT_NICE: elsewhere a save that a busy machine keeps from running could never be hurried. Figures in tests/bench/README.md.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

TRIAL_TIME = 1.0  # s for a thread to come back from idle time, before it counts as one that does not


class Background:
    """Runs one piece of work after the other, as `start` is called, in a thread of its own that lives on between them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool = self._new_pool()
        self._lock = threading.Lock()
        self._may_idle: bool | None = None  # not tried yet
        self._hurried = False
        self._idle: int | None = None  # the native id of the thread while it is at idle priority
        self._waited = 0.0  # s for a core in idle time
        self._open: int | None = None  # the thread whose wait since then is not in them yet
        self._before = 0.0  # s that it had waited by then

    def start(self, work: Callable[[], None], patience: float) -> Future[None]:
        """Begin when the work before it has ended, in idle time for so many seconds.

        Raises:
            RuntimeError: the system has no thread for it.
        """
        with self._lock:
            self._hurried = patience <= 0
        try:
            return self._pool.submit(self._run, work, patience)
        except RuntimeError:
            self._pool.shutdown(wait=False, cancel_futures=True)  # or its first thread would begin with this work
            self._pool = self._new_pool()
            raise

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix=self._name)

    def hurry(self) -> None:
        """Let the work under way go on at the priority of all others, and the next one start so until `start` is called."""
        with self._lock:
            self._hurried = True
            self._restore()

    def finish(self, work: Future[None]) -> None:
        """Wait for it, at the priority of all others. How it ended, the work itself tells."""
        self.hurry()
        wait([work])

    def waited(self) -> float:
        """Seconds for which the work has waited for a core in idle time: it would not have, if somebody had waited for it.

        To be asked by the work: a thread's wait is counted once it has got a core.
        """
        with self._lock:
            if self._open is None:
                return self._waited
            total = self._waited + waited_for_core(self._open) - self._before
            if self._idle is None:
                self._waited, self._open = total, None
            return total

    def _run(self, work: Callable[[], None], patience: float) -> None:
        if self._may_idle is None:
            self._may_idle = comes_back()
        timer = self._timer(patience) if self._may_idle and patience > 0 else None
        with self._lock:
            lowers = timer is not None and not self._hurried
            if lowers:
                self._idle = self._open = threading.get_native_id()
                self._before = waited_for_core(self._idle)
        if lowers and set_idle(0, True) and self._hurried:
            set_idle(0, False)  # hurried between the two: not under the lock, for which nobody should wait at idle priority
        try:
            work()
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                self._restore()
            self.waited()

    def _timer(self, patience: float) -> threading.Timer | None:
        """What ends the patience. Made by the thread of the work, since a start of one waits until it runs."""
        timer = threading.Timer(patience, self.hurry)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # no thread more: nobody would end it
            return None
        return timer

    def _restore(self) -> None:
        if self._idle is not None:
            set_idle(self._idle, False)
            self._idle = None


def set_idle(thread: int, wanted: bool) -> bool:
    """Let a thread of this process (its native id, 0: this one) run in idle time only, or as all others; whether it does."""
    try:
        os.sched_setscheduler(thread, os.SCHED_IDLE if wanted else os.SCHED_OTHER, os.sched_param(0))
    except (AttributeError, OSError):  # not Linux; not allowed
        return False
    return True


def waited_for_core(thread: int) -> float:
    """Seconds that a thread of this process (its native id) was ready to run and had no core (proc(5), schedstat)."""
    try:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # a kernel that does not count them
        return 0.0


def comes_back() -> bool:
    """Whether this thread has the usual policy, and may run in idle time and then as all others again.

    Tried by a thread that ends with it, and that nobody waits for where it does not come back.
    """
    found: list[bool] = []
    name = "checkpoint-priority"
    trial = threading.Thread(target=lambda: found.append(set_idle(0, True) and set_idle(0, False)), name=name, daemon=True)
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False
        trial.start()
    except (AttributeError, OSError, RuntimeError):  # not Linux; not allowed; no thread more
        return False
    trial.join(TRIAL_TIME)
    return found == [True]
