"""Rig S: the unmodified program under strace, which kills it at a rename or fails an fsync in the kernel's place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.helpers import valid_steps

SCRIPT = """
import sys
from pathlib import Path
from tests.checkpoint.helpers import manager, payload
made = manager(Path(sys.argv[1]), async_save=False)
for step in (1, 2, 3):
    (result,) = made.save(payload(step))
    print(step, result.failed or "committed", flush=True)
"""
ROOT = Path(__file__).resolve().parents[2]


def traced(folder: Path, calls: str, injection: str) -> tuple[int, dict[int, str]]:
    """Save three steps under an injection; exit code, and what the program said of each step."""
    words = ["strace", "-f", "-qq", "-o", str(folder.with_suffix(".trace"))]
    if "signal" not in injection:
        words.append("--seccomp-bpf")  # stops at these calls only, but injects no signal
    words += ["-e", f"trace={calls}", "-e", f"inject={calls}:{injection}"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, env=environment)
    return done.returncode, {int(line.split()[0]): line.partition(" ")[2] for line in done.stdout.splitlines()}


@pytest.fixture(scope="module", autouse=True)
def tracer() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run(["strace", "-f", "-qq", "-o", os.devnull, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()[:100]}")


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_ck01_killed_in_the_kernel_at_every_rename(tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    for number in range(1, 100):
        folder = tmp_path / str(number)
        code, said = traced(folder, "rename,renameat,renameat2", f"signal=SIGKILL:when={number}")
        if code == 0:
            break
        there = valid_steps(folder / "checkpoints") if (folder / "checkpoints").exists() else []
        committed = max((step for step, word in said.items() if word == "committed"), default=0)
        # the injected signal comes when the call returns: the step in flight may be committed already
        newest = int(there[0][5:]) if there else 0
        assert newest in (committed, committed + 1), (number, said, there)
    assert 3 < number < 99 and said == {1: "committed", 2: "committed", 3: "committed"}
    figure("kill points by strace", number - 1)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_ck08_an_fsync_that_fails_in_the_kernel_is_no_commit(tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    failures = 0
    for number in range(1, 12):
        folder = tmp_path / str(number)
        code, said = traced(folder, "fsync,fdatasync", f"error=EIO:when={number}")
        assert code == 0 and sorted(said) == [1, 2, 3], (number, said)
        failed = [step for step, word in said.items() if word != "committed"]
        failures += len(failed)
        assert failed in ([], [1]) and said[3] == "committed", (number, said)
        assert not set(valid_steps(folder / "checkpoints")) & {f"step-{step:06d}" for step in failed}
    assert failures >= 6
    figure("failed fsyncs by strace", failures)
