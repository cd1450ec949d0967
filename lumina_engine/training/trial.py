"""A trial in a process of its own on every rank: what runs out of memory there, or is killed, takes no run along.

The processes of a trial are ranks among themselves, with the numbers of the ranks that started them. Nothing of them is left
when `run_trial` returns, so a run is as it was before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.schema import Config
from ..run.interface import free_port
from ..run.process import die_with_parent
from .comm import Comm
from .memory import is_out_of_memory

OUT_OF_MEMORY = 3  # exit code of a trial that could say so itself
_LOOK = 0.05  # s between two looks at a running trial
_KILLED = (-signal.SIGKILL, -signal.SIGABRT)  # by the kernel for want of memory; by C++ when an allocation fails


@dataclass(frozen=True)
class Outcome:
    """How a trial ended on one rank. `code` is its exit code, None where it was ended because another rank's had failed."""

    code: int | None
    result: dict[str, Any] | None = None

    @property
    def out_of_memory(self) -> bool:
        """Whether it ran out of memory, or was killed as a process is that runs out of memory."""
        return self.code == OUT_OF_MEMORY or self.code in _KILLED

    @property
    def text(self) -> str:
        """The end in words."""
        if self.code == OUT_OF_MEMORY:
            return "out of memory"
        if self.code is not None and self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


class TrialError(RuntimeError):
    """A trial failed for another reason than memory."""


def run_trial(module: str, config: Config, comm: Comm, facts: Mapping[str, Any] | None = None) -> list[Outcome]:
    """Run `python -m module ORDER RESULT` once per rank and return how it ended on each. A collective.

    Args:
        module: calls `trial_main`.
        config: resolved; what the trial is made from.
        facts: more for the trial, as JSON values.

    Raises:
        TrialError: on every rank, if one of them failed otherwise than by memory (engine.log has its traceback).
    """
    port = comm.broadcast(free_port(0) if comm.rank == 0 else None)
    with tempfile.TemporaryDirectory(prefix="lumina-trial-") as folder:
        order, result = Path(folder) / "order.json", Path(folder) / "result.json"
        order.write_text(json.dumps({"config": config.to_dict(sectioned=False), **(facts or {})}))
        argv = [sys.executable, "-m", module, str(order), str(result)]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=_environment(comm, port)) as process:
            try:
                code = _wait(process, comm)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        told = json.loads(result.read_text()) if code == 0 else None
    outcomes = [Outcome(**item) for item in comm.all_gather(asdict(Outcome(code, told)))]
    failed = [o for o in outcomes if o.code not in (0, None) and not o.out_of_memory]
    if failed and not any(o.out_of_memory for o in outcomes):
        raise TrialError(f"{module.rpartition('.')[2]}: the trial {failed[0].text}; engine.log says why")
    return outcomes


def _environment(comm: Comm, port: int) -> dict[str, str]:
    """The rank's own, but for the channel to the supervisor and the meeting place; a rank alone is told that it is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LUMINA_RANK", "TORCHELASTIC_"))}
    return kept | {
        "RANK": str(comm.rank),
        "WORLD_SIZE": str(comm.world_size),
        "LOCAL_RANK": str(comm.local_rank),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": str(port),
    }


def _wait(process: subprocess.Popen[bytes], comm: Comm) -> int | None:
    """Wait for the trial of every rank. When one fails the others wait for it in a collective: they are ended."""
    while True:
        code = process.poll()
        states = torch.tensor([code not in (None, 0), code is None], dtype=torch.int32, device=comm.device)
        failed, running = (bool(n) for n in comm.max(states).tolist())
        if not running or failed:
            break
        time.sleep(_LOOK)
    if code is None:
        process.kill()
        process.wait()
    return code


def local_ranks(comm: Comm) -> int:
    """Ranks on this host: they share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(comm.world_size)))


def trial_main(trial: Callable[[Config, dict[str, Any]], dict[str, Any]], argv: list[str]) -> int:
    """The main program of a trial: reads the order, writes what `trial(config, order)` returns, tells want of memory apart."""
    die_with_parent()
    with contextlib.suppress(OSError):  # where memory runs out this process goes first, not the run
        Path("/proc/self/oom_score_adj").write_text("1000")
    order = json.loads(Path(argv[1]).read_text())
    try:
        told = trial(Config(**order["config"]), order)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        print(
            f"lumina: a trial ran out of memory: {type(error).__name__} {' '.join(str(error).split())[:200]}",
            file=sys.stderr,
            flush=True,
        )
        return OUT_OF_MEMORY
    Path(argv[2]).write_text(json.dumps(told))
    return 0


def leave(code: int) -> None:
    """End a trial at once: whatever the other ranks do, nothing of it is worth an orderly end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
