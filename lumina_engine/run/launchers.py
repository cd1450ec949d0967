"""How a command gets onto another machine, and which part of the environment goes with it. Lists of words, no local shell.

`ssh` and `srun` start one agent (node.py) on each machine, DeepSpeed's convention of one launcher process per machine, with
its standard streams as the line to it. The environment of the ranks goes over that line: it stands in no argv and no file.
ssh hands its words to the shell of the other side as one string, so each is quoted for it.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .directory import RunError
from .hostfile import check_host

AGENT = "lumina_engine.run.node"
TORCHRUN = "lumina_engine.training.torchrun"
CONNECT_TIME = 15  # s until a machine must have answered
# What another machine needs to compute the same; names of devices, paths of this login and the like stay at home.
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "CUBLAS_", "OMP_", "MKL_", "LUMINA_", "PYTHON", "XDG_", "HF_", "TRITON_", "DS_")
_NOT = ("LUMINA_RANK_SOCKET", "LUMINA_SUPERVISOR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # of one machine only


def check_words(words: Sequence[str]) -> list[str]:
    """The words, if every one can be an argument on any machine.

    Raises:
        RunError: a NUL or a line break in one of them (exit code 2).
    """
    for word in words:
        if any(character in word for character in "\0\n\r"):
            raise RunError(f"{word!r} holds a NUL or a line break: no launcher passes that on")
    return list(words)


def agent_words(module: str = AGENT, package: Path | None = None) -> list[str]:
    """The command of an agent: this interpreter, which must lie at the same path on every machine."""
    package = Path(__file__).parents[2] if package is None else package
    found = [] if package.name in ("site-packages", "dist-packages") else ["env", f"PYTHONPATH={package}"]
    return [*found, sys.executable, "-m", module]


def ssh_argv(host: str, words: Sequence[str]) -> list[str]:
    """`words` on `host` through ssh: no terminal, no question, and a dead line is noticed by ssh itself too."""
    check_host(host, "ssh")
    options = ("BatchMode=yes", f"ConnectTimeout={CONNECT_TIME}", "ServerAliveInterval=15", "ServerAliveCountMax=4")
    flags = [part for option in options for part in ("-o", option)]
    return ["ssh", "-T", "-x", "-a", *flags, "--", host, shlex.join(check_words(words))]


def srun_argv(host: str, words: Sequence[str]) -> list[str]:
    """`words` on `host` as a step of the Slurm job around us, which may use all of that machine that the job has."""
    check_host(host, "srun")
    flags = ["--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap", "--cpu-bind=none", "--mem=0", "--unbuffered"]
    return ["srun", *flags, "--", *check_words(words)]


REMOTE = {"ssh": ssh_argv, "srun": srun_argv}


def torchrun_argv(worker: Sequence[str], *, nodes: int, ranks: int, node_rank: int, address: str, port: int) -> list[str]:
    """torchrun for one machine of `nodes`. It ends its ranks when one fails and never restarts them.

    Raises:
        RunError: an address that is no host name (exit code 2).
    """
    options = {
        "nnodes": str(nodes),
        "nproc-per-node": str(ranks),
        "node-rank": str(node_rank),
        "master-addr": check_host(address, "master_addr"),
        "master-port": str(port),
        "max-restarts": "0",
        "signals-to-handle": "SIGTERM",  # HUP, INT and QUIT are not for the launcher to pass on
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", TORCHRUN, *flags, *check_words(worker)]


def carried(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that ranks on other machines get from here.

    Raises:
        RunError: a value with a NUL or a line break: it would not arrive as it is (exit code 2).
    """
    environment = os.environ if environment is None else environment
    kept = {name: value for name, value in environment.items() if name.startswith(_PREFIXES) and name not in _NOT}
    for name, value in kept.items():
        if any(character in name + value for character in "\0\n\r"):
            raise RunError(f"the environment variable {name!r} holds a NUL or a line break: unset it, or write it in one line")
    return kept
