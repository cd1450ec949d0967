"""Files from outside (SE05): refused by name, in two seconds of work and 200 MB, and no code of theirs runs."""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lumina_engine.checkpoint.files import CheckpointError
from lumina_engine.checkpoint.foreign import read_foreign
from lumina_engine.checkpoint.manager import load_model

from .hostile_files import MAKERS, payloads

WORK_S = 2.0  # processor seconds
WALL_S = 20  # s: who waits longer hangs
MEMORY = 200 * 1_000_000  # bytes beyond what the process had


def opened(action: Callable[[], object]) -> tuple[int, int, float]:
    """Try it in a forked child under limits: (exit code, bytes more than before, wall seconds).

    Exit code 0: refused with a typed error; 3: it was taken; 4: another error; negative: killed by a limit.
    What other tests left in this process is frozen out of the child's garbage collections: walking (and so copying)
    some million objects that are not the action's took more than its two seconds at the end of a long run of tests.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 4
        try:
            gc.freeze()
            signal.setitimer(signal.ITIMER_PROF, WORK_S)
            signal.alarm(WALL_S)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            before = psutil.Process().memory_info().rss
            try:
                action()
                code = 3
            except CheckpointError as error:
                assert str(error).strip() and "\n" not in str(error).strip()
                code = 0
            signal.setitimer(signal.ITIMER_PROF, 0)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if code == 0 and peak - before > MEMORY:
                print(f"{(peak - before) / 1e6:.0f} MB more than before", file=sys.stderr)
                code = 5
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, time.monotonic() - begin


@pytest.mark.parametrize("kind", MAKERS)
def test_se05_what_comes_from_outside_is_refused(tmp_path: Path, kind: str, figure: Callable[[str, object], None]) -> None:
    canary = tmp_path / "canary"
    inside = tmp_path / "given"
    inside.mkdir()
    path = MAKERS[kind](inside, canary)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    for name, action in {"import": lambda: read_foreign(path, "lumina-1k"), "chat": lambda: load_model(path)}.items():
        code, _, seconds = opened(action)
        assert code == 0, f"{name} of {kind}: exit {code} (3 taken, 4 another error, 5 memory, <0 a limit)"
        figure("worst of a case, s", round(seconds, 1))
    assert not canary.exists() and sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["system", "eval", "exec", "nested"])
def test_se05_the_payloads_are_alive(tmp_path: Path, kind: str) -> None:
    """Unpickled as other programs do it, each creates its canary: a test that could not fail would prove nothing."""
    import pickle

    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(payloads(canary)[kind]))
    assert canary.exists()
