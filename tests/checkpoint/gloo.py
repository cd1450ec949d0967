"""Two real ranks of a gloo group that save together, forked from a process that has torch imported already."""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path

import torch.distributed as dist

from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.run.interface import free_port
from lumina_engine.training.comm import Comm
from tests.checkpoint.helpers import kill_at, payload, settings

SURVIVOR_TIME = 15  # s after which a rank that still waits for the other one is killed by its alarm


def both(run: Path, step: int, victim: int | None = None, number: int = 0, blocking: bool = True) -> list[int]:
    """Save on two ranks, one of which dies at its `number`-th durability call; exit codes.

    0: committed, 1: the save failed, 3: the other rank was gone; negative: ended by a signal.
    """
    port = free_port(0)
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            code = 4
            try:
                code = _save(run, step, rank, port, victim, number, blocking)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _save(run: Path, step: int, rank: int, port: int, victim: int | None, number: int, blocking: bool) -> int:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    comm = Comm.start("gloo", timeout_s=60)
    comm.barrier()
    signal.alarm(SURVIVOR_TIME)
    if rank == victim:
        kill_at(number)
    made = CheckpointManager(settings(), run, comm)
    content = payload(step, model=payload(step).model if rank == 0 else {})
    try:
        results = made.save(content, blocking=blocking) or made.wait()
    except (RuntimeError, dist.DistError) as error:
        if "closed by peer" in str(error) or "reset by peer" in str(error) or "Broken pipe" in str(error):
            return 3
        raise
    return 0 if results[0].failed is None else 1
