"""Slurm: the machines of the job around us, and the batch script that starts a run, shown before anybody submits it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from .directory import RunError
from .hostfile import Host, check_host
from .hostfile import is_here as _is_here

_WARNING_TIME = 90  # s before the limit at which Slurm sends USR1
_MOST_HOSTS = 100_000
_PART = re.compile(r"([^,\[\]]*)\[([^\[\]]*)\]([^,\[\]]*)|[^,\[\]]+")


def in_job(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this is a job of Slurm."""
    environment = os.environ if environment is None else environment
    return "SLURM_JOB_ID" in environment and "SLURM_JOB_NODELIST" in environment


def hosts(environment: Mapping[str, str] | None = None) -> list[Host]:
    """The machines of the job around us.

    Raises:
        RunError: this is no job, or its list of machines is not understood (exit code 2).
    """
    environment = os.environ if environment is None else environment
    if not in_job(environment):
        raise RunError(
            "launcher=srun works inside a Slurm job: submit the script that `lumina-engine train … --slurm` prints, or set "
            "launcher=auto"
        )
    return [Host(name) for name in expand(environment["SLURM_JOB_NODELIST"])]


def is_here(name: str) -> bool:
    """Whether a machine of the job is this one: Slurm says how it calls it."""
    mine = os.environ.get("SLURMD_NODENAME")
    return name == mine if mine else _is_here(name)


def expand(text: str) -> list[str]:
    """The names behind Slurm's short form: `n[01-03,7],login` is n01, n02, n03, n7, login.

    Raises:
        RunError: not that form, a name that is none, or too many (exit code 2).
    """
    names: list[str] = []
    rest = text
    while rest:
        found = _PART.match(rest)
        if found is None:
            raise RunError(f"SLURM_JOB_NODELIST={text!r} is not understood at {rest[:20]!r}")
        names += [found[0]] if found[2] is None else [found[1] + number + found[3] for number in _numbers(found[2], text)]
        rest = rest[found.end() :]
        if rest and not rest.startswith(","):
            raise RunError(f"SLURM_JOB_NODELIST={text!r} is not understood at {rest[:20]!r}")
        rest = rest[1:]
    return [check_host(name, "SLURM_JOB_NODELIST") for name in names]


def _numbers(inside: str, text: str) -> list[str]:
    out: list[str] = []
    for part in inside.split(","):
        found = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", part)
        if found is None:
            raise RunError(f"SLURM_JOB_NODELIST={text!r} is not understood at {part[:20]!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < first + _MOST_HOSTS:
            raise RunError(f"SLURM_JOB_NODELIST={text!r} is not understood at {part[:20]!r}")
        out += [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    return out


def script(
    command: Sequence[str],
    *,
    name: str,
    nodes: int,
    gpus: int,
    folder: Path,
    options: Sequence[str] = (),
    package: Path | None = None,
) -> str:
    """A batch script that runs `command` (lumina-engine train …) in a job of its own.

    Slurm sends USR1 to the batch shell (`B:`) before the limit and TERM at it; the shell passes both on, since only its child
    knows what they mean. Exit code 75 is the run's word that it can go on: then, and only then, the job is queued again.

    Args:
        command: words; each is quoted.
        gpus: GPUs of each machine, 0 for none.
        folder: where the job works, the same on all machines.
        options: more lines for sbatch (`--time=1:00:00`).
        package: where Lumina lies, if it is used from a source tree.

    Raises:
        RunError: a NUL or a line break somewhere (exit code 2).
    """
    lines = [
        f"--job-name={name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        f"--signal=B:USR1@{_WARNING_TIME}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={folder}",
        *options,
    ]
    for word in (*lines, *command, str(package)):
        if any(character in word for character in "\0\n\r"):
            raise RunError(f"{word!r} holds a NUL or a line break: it cannot stand in a batch script")
    head = "\n".join(f"#SBATCH {_directive(line)}" for line in lines)
    path = [] if package is None else ["env", f"PYTHONPATH={package}"]
    return _SCRIPT.format(head=head, command=shlex.join([*path, *command]))


def _directive(line: str) -> str:
    """One word for sbatch, which splits its lines as a shell would."""
    option, sign, value = line.partition("=")
    return option + sign + shlex.quote(value) if sign else option


_SCRIPT = """\
#!/bin/bash
{head}
# One supervisor in this shell; it starts an agent on each other machine with
#   srun --nodes=1 --ntasks=1 --nodelist=HOST --overlap … -m lumina_engine.run.node
{command} &
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
