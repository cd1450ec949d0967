"""How a run is started: the ranks' argv and environment, and the supervisor as a process of its own.

The supervisor is a session of its own with nothing of its starter's: no terminal, no descriptors, no pipe. It survives the
program, the shell and the login that started it.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import CheckpointError, require_unlinked
from . import slurm
from .directory import RunDirectory, RunError, RunInfo
from .hostfile import HOST_PATTERN, Host, choose, read_hostfile
from .hosts import hosts_argv
from .interface import address_towards, free_port
from .launchers import carried, torchrun_argv
from .output import last_lines

if TYPE_CHECKING:
    from ..config.schema import Config

WORKER = "lumina_engine.training.worker"
START_TIME = 60.0  # s until the supervisor must have reported
MASTER_PORT = 29_500  # as torchrun has it
TORCHRUN_PORTS = (20_000, 30_000)  # below those that Linux gives to outgoing connections (32,768 on)
LOST_TIME = 30.0  # s of silence after which a machine is lost where hang_timeout_s is 0
LEAST_LOST_TIME = 3.0  # s
_VERSIONS = ("lumina", "torch", "deepspeed", "numpy", "msgspec")
_OWN = (
    "LUMINA_RUN_DIR",
    "LUMINA_RANK_SOCKET",
    "LUMINA_NONCE",
    "LUMINA_INC",
    "LUMINA_RESUME",
    "LUMINA_AFTER",
    "LUMINA_ACCEPT_DATA_CHANGE",
    "LUMINA_SUPERVISOR",
)
# what a launcher around us may have set; each rank gets its own
_RANK_KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank_argv(config: Config, run_dir: str | os.PathLike[str], world: int) -> list[str]:
    """The command that runs the ranks, as a list; no shell ever sees it.

    One rank is the worker itself. More are started by hosts.py, on this machine or with agents on the others, or by torchrun;
    both end them all when one fails and never restart them: that is the supervisor's business.

    Raises:
        RunError: a launcher that cannot start this, a host name that is none, machines that are not listed (exit code 2).
    """
    nodes = config.num_nodes
    ranks = max(1, world // nodes)
    worker = ["-m", WORKER, os.fspath(run_dir)]
    command = [sys.executable, *worker]
    if nodes == 1 and config.launcher != "torchrun":
        if world == 1:
            return command
        return hosts_argv(command, ["localhost"], ranks, address=_own_address(config), port=_own_port(config))
    if config.launcher == "torchrun" or (config.launcher == "auto" and config.node_rank is not None):
        address = _own_address(config) if nodes == 1 else config.master_addr
        # torchrun keeps its port over restarts, so it is none that the system gives to connections meanwhile
        port = (_own_port(config) or free_port(random.randrange(*TORCHRUN_PORTS))) if nodes == 1 else _common_port(config)
        place = {"nodes": nodes, "ranks": ranks, "node_rank": config.node_rank or 0}
        return torchrun_argv(worker, **place, address=address, port=port)
    hosts = [host.name for host in machines(config, ranks)]
    carried()  # raises here, before anything is made, what could not go over
    by = "srun" if config.launcher == "srun" else "ssh"
    # half of what counts as hung: the ranks that wait for a lost machine are not to be started again, with it
    timeout = max(LEAST_LOST_TIME, config.hang_timeout_s / 2) if config.hang_timeout_s else LOST_TIME
    address = _meeting_place(hosts) if config.master_addr == "auto" else config.master_addr
    return hosts_argv(command, hosts, ranks, by=by, address=address, port=_common_port(config), timeout=timeout)


def _own_address(config: Config) -> str:
    """Where the ranks of one machine meet: on loopback, unless the user has chosen."""
    return "127.0.0.1" if config.master_addr == "auto" else config.master_addr


def _own_port(config: Config) -> int:
    """Where the ranks of one machine meet: what the user has chosen, unless it is taken. 0: any, when they start."""
    return 0 if config.master_port == "auto" else free_port(config.master_port)


def _common_port(config: Config) -> int:
    """Where ranks of several machines meet: no machine can look for a free port on another."""
    return MASTER_PORT if config.master_port == "auto" else config.master_port


def machines(config: Config, ranks: int) -> list[Host]:
    """The machines of a run over several: those of the Slurm job around us, or those of the hostfile.

    Raises:
        RunError: there is no such list, or it does not give what the configuration asks for (exit code 2).
    """
    if config.launcher == "srun":
        return choose(slurm.hosts(), config.num_nodes, ranks, "the Slurm job", slurm.is_here)
    if config.hostfile is None:
        raise RunError(
            f"num_nodes = {config.num_nodes} needs a list of machines: set hostfile, or launcher=srun in a Slurm job, or start "
            "each machine by hand with node_rank"
        )
    return choose(read_hostfile(config.hostfile), config.num_nodes, ranks, config.hostfile)


def _meeting_place(hosts: Sequence[str]) -> str:
    """This machine's address on the way to the second one: its name may mean another address elsewhere."""
    found = address_towards(hosts[1])
    return found if found is not None and HOST_PATTERN.fullmatch(found) else hosts[0]


def environment(run: RunDirectory, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the supervisor and, with `rank_environment`, of its ranks: the caller's, without another run's marks.

    The package is found again from the run's folder, also when it is used from a source tree and not installed.
    """
    base = os.environ if base is None else base
    kept = {name: value for name, value in base.items() if name not in _RANK_KEYS and name not in _OWN}
    package = Path(__file__).parents[2]
    if package.name not in ("site-packages", "dist-packages"):
        path = [entry for entry in kept.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(package)]
        kept["PYTHONPATH"] = os.pathsep.join([str(package), *path])
    kept["PYTHONUNBUFFERED"] = "1"
    kept["LUMINA_RUN_DIR"] = str(run.path)
    return kept


def rank_environment(
    run: RunDirectory, *, channel: Path, nonce: str, inc: int, resume: bool, world: int, after: str | None = None
) -> dict[str, str]:
    """What the supervisor adds for the ranks of one incarnation; `after` says why the one before ended, where it matters."""
    added = {
        "LUMINA_RUN_DIR": str(run.path),
        "LUMINA_RANK_SOCKET": str(channel),
        "LUMINA_NONCE": nonce,
        "LUMINA_INC": str(inc),
        "LUMINA_SUPERVISOR": str(os.getpid()),
    }
    if resume:
        added["LUMINA_RESUME"] = "1"
    if after is not None:
        added["LUMINA_AFTER"] = after
    if world == 1:
        added |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port(0)),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # gloo listens even for a group of one
        }
    return added


def versions() -> dict[str, str]:
    """Versions of what a run depends on, from the packages' metadata: nothing is imported."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def start(
    run: RunDirectory,
    argv: Sequence[str],
    *,
    world: int = 1,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    accept_data_change: bool = False,
    timeout: float = START_TIME,
) -> RunInfo:
    """Start the supervisor of a run and return when it owns the run, listens, and has started the ranks.

    Args:
        run: an existing folder (`RunDirectory.create`), with everything in it that the worker reads.
        argv: the ranks' command (`rank_argv`).
        world: number of ranks.
        resume: the ranks must go on from the newest checkpoint (LUMINA_RESUME=1).
        accept_data_change: they may do so with other data than it was saved with (LUMINA_ACCEPT_DATA_CHANGE=1).
        settings: fields of supervisor.Settings (max_restarts, preempt_grace_s, engine_log_mb).

    Raises:
        RunError: the run is running already or has a link in the place of its checkpoints (65), or could not be started: the
            reason, with the last lines of engine.log.
    """
    if run.alive:
        run.lock().release()  # raises with the owner's pid, unless it ended this instant
    try:
        require_unlinked(run.checkpoints, run.emergency)
    except CheckpointError as error:
        raise RunError(str(error), error.exit_code) from None
    order = {
        "argv": list(argv),
        "world": world,
        "resume": resume,
        "settings": dict(settings or {}),
        "versions": versions(),
        "host": socket.gethostname(),
    }
    log = os.open(run.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    mark = os.fstat(log).st_size
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-m", "lumina_engine.run.supervisor", str(run.path), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=run.path,
                env=environment(run) | ({"LUMINA_ACCEPT_DATA_CHANGE": "1"} if accept_data_change else {}),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                umask=0o077,
            )
            os.close(log)
        answer = _ask(ours, order, timeout)
    child.wait()  # it forks and leaves at once
    if answer.get("ok"):
        return run.info()
    reason = answer.get("error") or "the supervisor ended without a word"
    tail = last_lines(run.log_path, mark)
    raise RunError(
        f"run {run.name} did not start: {reason}" + (f"; engine.log says: {tail}" if tail else ""), answer.get("code", 1)
    )


def _ask(link: socket.socket, order: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Send the order to the supervisor and return what it answers: {} if it ended first."""
    link.settimeout(timeout)
    data = b""
    try:
        link.sendall(json.dumps(order).encode() + b"\n")
        while not data.endswith(b"\n"):
            piece = link.recv(65_536)
            if not piece:
                return {}
            data += piece
    except TimeoutError:
        return {"error": f"no answer from the supervisor within {timeout:.0f} s"}
    except OSError:
        return {}
    return dict(json.loads(data))


def wait(run: RunDirectory, timeout: float | None = None) -> int | None:
    """Wait until the run's supervisor has ended; its exit code, None if it has not ended in `timeout` seconds.

    A run that was killed has no exit code of its own: 1.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while run.alive:
        owner = run.owner()
        pause = 0.2 if deadline is None else min(0.2, max(0.0, deadline - time.monotonic()))
        if owner is not None:
            try:
                descriptor = os.pidfd_open(owner.pid)
            except ProcessLookupError:
                continue
            try:
                select.select([descriptor], [], [], pause)
            finally:
                os.close(descriptor)
        else:
            select.select([], [], [], pause)
        if deadline is not None and time.monotonic() >= deadline and run.alive:
            return None
    code = run.info().exit_code
    return 1 if code is None else code
