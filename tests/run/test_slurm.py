"""The batch script: its text, and what it does with a `srun` and a `scontrol` that are played."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_engine.run import slurm
from lumina_engine.run.directory import RunError
from tests.waiting import until

GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=first
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:USR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir='/data/my runs'
#SBATCH --time=1:00:00
# One supervisor in this shell; it starts an agent on each other machine with
#   srun --nodes=1 --ntasks=1 --nodelist=HOST --overlap … -m lumina_engine.run.node
python -m lumina_engine.cli train 'train_data_path=a b$(touch x).jsonl' &
run=$!
trap 'kill -USR1 "$run" 2>/dev/null' USR1
trap 'kill -TERM "$run" 2>/dev/null' TERM
# a trapped signal ends `wait` with a code of its own: only the last one, when the run has ended, has the run's
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
done
wait "$run"
code=$?
echo "lumina-engine train ended with $code"
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def made(command: list[str], folder: Path) -> str:
    return slurm.script(command, name="first", nodes=2, gpus=0, folder=folder)


def test_c061_the_batch_script_is_this_text(tmp_path: Path) -> None:
    words = ["python", "-m", "lumina_engine.cli", "train", "train_data_path=a b$(touch x).jsonl"]
    text = slurm.script(
        words, name="first", nodes=2, gpus=8, folder=Path("/data/my runs"), options=["--time=1:00:00"], package=None
    )
    assert text == GOLDEN
    path = tmp_path / "job.sh"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).stderr == b""


@pytest.mark.parametrize("word", ["a\nb", "a\0b", "a\rb"])
def test_se08_nothing_breaks_out_of_the_batch_script(word: str, tmp_path: Path) -> None:
    for command, options in (([word], []), (["true"], [word])):
        with pytest.raises(RunError, match="line break"):
            slurm.script(command, name="r", nodes=1, gpus=0, folder=tmp_path, options=options)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with a scontrol that keeps its words."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "scontrol"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {shlex.quote(str(tmp_path / "scontrol"))}\n')
    fake.chmod(0o700)
    return {**os.environ, "PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "42"}


@pytest.mark.parametrize("code", [0, 1, 2, 65, 75, 93, 130])
def test_c061_the_job_is_queued_again_on_75_only(tmp_path: Path, cluster: dict[str, str], code: int) -> None:
    (tmp_path / "job.sh").write_text(made(["sh", "-c", f"exit {code}", "$(touch canary)", "; touch canary"], tmp_path))
    done = subprocess.run(["bash", str(tmp_path / "job.sh")], env=cluster, cwd=tmp_path, capture_output=True, timeout=30)
    assert done.returncode == code
    asked = (tmp_path / "scontrol").read_text() if (tmp_path / "scontrol").exists() else ""
    assert asked == ("requeue 42\n" if code == 75 else "")
    assert not (tmp_path / "canary").exists()


def test_c061_the_batch_shell_passes_usr1_and_term_on(tmp_path: Path, cluster: dict[str, str]) -> None:
    told = tmp_path / "told"
    code = (
        "import signal,sys\n"
        f"note = lambda n, _: open({str(told)!r}, 'a').write(f'{{n}} ')\n"
        "signal.signal(signal.SIGUSR1, note)\n"
        "signal.signal(signal.SIGTERM, lambda n, f: (note(n, f), sys.exit(75)))\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\n"
        "while True: signal.pause()\n"
    )
    (tmp_path / "run.py").write_text(code)
    (tmp_path / "job.sh").write_text(made([sys.executable, str(tmp_path / "run.py")], tmp_path))
    with subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=cluster) as job:
        try:
            until(lambda: (tmp_path / "up").exists(), "the run")
            for times in (1, 2):
                job.send_signal(signal.SIGUSR1)
                until(lambda times=times: told.exists() and told.read_text().count(f"{signal.SIGUSR1} ") == times, "USR1")
            job.send_signal(signal.SIGTERM)
            assert job.wait(20) == 75
        finally:
            job.kill()
    assert told.read_text().split()[-1] == str(int(signal.SIGTERM))
    assert (tmp_path / "scontrol").read_text() == "requeue 42\n"
