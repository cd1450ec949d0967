"""What `train` does where there is more than this machine: check the others, join a run from one of them, a Slurm script."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import common

if TYPE_CHECKING:
    from ..config.schema import Config
    from ..doctor.row import Row
    from ..run.directory import RunDirectory

_STARTING = ("preparing", "compiling", "running")
_LOOK = 0.5  # s between two looks at the run's state
_APPEAR_TIME = 600.0  # s that the first machine gets to begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="ask every machine: reachable, versions, data, folder, clock, all-reduce; no start"
    )
    parser.add_argument("--slurm", action="store_true", help="print a batch script for sbatch that runs this; start nothing")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="with --slurm: one more line, e.g. --sbatch=--time=1:00:00",
    )


def by_hand(config: Config) -> bool:
    """Whether each machine of a resolved configuration is started by hand."""
    return config.num_nodes > 1 and config.launcher == "torchrun"


def check(args: argparse.Namespace, config: Config, world: int, root: Path) -> int:
    """`--check`: every row; 1 if one failed."""
    from ..doctor.row import counts, summary
    from .doctor import describe

    rows = []
    for row in _rows(config, world, root, meet=True):
        rows.append(row)
        if not args.json:
            print(common.safe(describe(row)), flush=True)
    if args.json:
        common.print_json([row.to_dict() for row in rows])
    else:
        print(summary(rows) if rows else "one machine: `lumina-engine doctor` looks at it")
    return 1 if counts(rows)["fail"] else 0


def require(config: Config, world: int, root: Path) -> None:
    """Refuse a start that would fail on another machine, before anything is made.

    Raises:
        UserError: what failed, on which machine, and what to do.
    """
    failed = [row for row in _rows(config, world, root, meet=False) if row.status == "fail"]
    if failed:
        raise common.UserError(
            "\n  ".join(["the machines are not ready:", *(f"{r.id}: {r.value}: {r.fix}" for r in failed)]), 1
        )


def _rows(config: Config, world: int, root: Path, *, meet: bool) -> Iterator[Row]:
    from ..doctor.preflight import preflight, smoke_command
    from ..run.launch import WORKER, machines, rank_argv

    if config.num_nodes == 1 or by_hand(config):
        return
    names = [host.name for host in machines(config, max(1, world // config.num_nodes))]
    argv = rank_argv(config, root, world)  # raises what the start would raise
    by = "srun" if config.launcher == "srun" else "ssh"
    yield from preflight(config, names, root, by=by, meet=smoke_command(argv, WORKER) if meet else None)


def slurm_script(args: argparse.Namespace, config: Config, ranks: int, gpus: int, root: Path) -> int:
    """`--slurm`: print the batch script of this very command."""
    from ..run.slurm import script

    words = [sys.executable, "-m", "lumina_engine.cli", "train", "--run", config.experiment_name, "--resume"]
    words += ["--runs", str(root.absolute())]
    words += ["--preset", args.preset] if args.preset else []
    words += ["--config", str(Path(args.config).absolute())] if args.config else []
    words += [word for word in args.overrides if not word.startswith("experiment_name=")]
    if config.num_nodes > 1 and config.launcher != "srun":
        words.append("launcher=srun")
    place = Path.cwd()
    text = script(
        words,
        name=config.experiment_name,
        nodes=config.num_nodes,
        gpus=min(gpus, ranks),
        folder=place,
        options=args.sbatch,
        package=_package(),
    )
    print(text, end="")
    return 0


def _package() -> Path | None:
    """Where the package lies, if it is used from a source tree."""
    package = Path(__file__).parents[2]
    return None if package.name in ("site-packages", "dist-packages") else package


def join(directory: RunDirectory, config: Config, world: int) -> int:
    """Run this machine's ranks of a run that the first machine has, start by start, until it is over; its exit code.

    How each start is to be made (from a checkpoint, with a smaller micro batch) rank 0 tells all ranks.

    Args:
        directory: the run's folder, on a file system that the machines share.
    """
    from ..run.launch import rank_argv
    from ..run.policy import CRASHED, INTERRUPTED, PREEMPTED

    argv = rank_argv(config, directory.path, world)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    served, began = _served(directory), False
    print(f"waiting for run {directory.name} on {config.master_addr}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + _APPEAR_TIME
    while True:
        row = directory.head() if directory.identity_path.exists() else None
        if row is not None and row.alive and row.state in _STARTING and (row.id != served[0] or row.inc > served[1]):
            served, began = (row.id, row.inc), True
            code = _ranks(argv, directory, inc=row.inc, asked=asked)
            print(f"the ranks of this machine ended with {code}", file=sys.stderr, flush=True)
        elif asked:
            return INTERRUPTED if asked[0] == signal.SIGINT else PREEMPTED
        elif began and row is not None and not row.alive:
            return CRASHED if row.exit_code is None else row.exit_code
        elif not began and time.monotonic() > deadline:
            raise common.UserError(f"run {directory.name} did not begin within {_APPEAR_TIME:g} s: start node_rank=0 first", 1)
        time.sleep(_LOOK)


def _served(directory: RunDirectory) -> tuple[str | None, int]:
    """The start that is over already: id of the run and incarnation."""
    if not directory.identity_path.exists():
        return None, 0
    row = directory.head()
    return row.id, row.inc - 1 if row.alive else row.inc


def _ranks(argv: list[str], directory: RunDirectory, *, inc: int, asked: list[int]) -> int:
    """Start the ranks of one incarnation and wait for their end; a signal asks them to save and leave with all others."""
    from ..run.launch import environment
    from ..run.process import leash

    whole = environment(directory) | {"LUMINA_INC": str(inc)}
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, cwd=directory.path, env=whole, preexec_fn=leash(os.getpid()))
    told = False
    while True:
        try:
            return child.wait(_LOOK)
        except subprocess.TimeoutExpired:
            if asked and not told:
                told = True
                child.send_signal(signal.SIGTERM)
