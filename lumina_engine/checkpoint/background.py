"""One thread for the writing of checkpoints, which takes what time the processor has to spare (standard library only).

Training on a CPU keeps all cores busy, and each thread of a product waits for the one that something else has held up. So the
writing runs with Linux's policy for idle time, which leaves a core at once to a thread of training, unless somebody waits for
it (`hurry`). Only where a thread may come back from that policy, which asks for CAP_SYS_NICE or RLIMIT_NICE: elsewhere a save
that a busy machine keeps from running could never be hurried. Figures in tests/bench/README.md.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs one piece of work after the other, as `start` is called, in a thread of its own that lives on between them."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._may_idle: bool | None = None  # not tried yet
        self._thread: int | None = None  # the native id of the thread while its work is at idle priority
        self._hurried = False

    def start(self, work: Callable[[], None]) -> Future[None]:
        """Begin when the work before it has ended."""
        self._hurried = False
        return self._pool.submit(self._run, work)

    def hurry(self) -> None:
        """Let the work under way go on at the priority of all others, and the next one start so until `start` is called."""
        with self._lock:
            self._hurried = True
            self._restore()

    def finish(self, work: Future[None]) -> None:
        """Wait for it, at the priority of all others. How it ended, the work itself tells."""
        self.hurry()
        wait([work])

    def _run(self, work: Callable[[], None]) -> None:
        if self._may_idle is None:
            self._may_idle = comes_back()
        with self._lock:
            if self._may_idle and not self._hurried:
                self._thread = threading.get_native_id()
                set_idle(self._thread, True)
        try:
            work()
        finally:
            with self._lock:
                self._restore()

    def _restore(self) -> None:
        if self._thread is not None:
            set_idle(self._thread, False)
            self._thread = None


def set_idle(thread: int, wanted: bool) -> bool:
    """Let a thread of this process (its native id, 0: this one) run in idle time only, or as all others; whether it does."""
    try:
        os.sched_setscheduler(thread, os.SCHED_IDLE if wanted else os.SCHED_OTHER, os.sched_param(0))
    except (AttributeError, OSError):  # not Linux; not allowed
        return False
    return True


def comes_back() -> bool:
    """Whether a thread may run in idle time and then as all others again. Tried by one that ends with it."""
    found: list[bool] = []
    trial = threading.Thread(target=lambda: found.append(set_idle(0, True) and set_idle(0, False)), name="checkpoint-priority")
    trial.start()
    trial.join()
    return found == [True]
