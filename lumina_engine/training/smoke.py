"""An all-reduce over all ranks and nothing else: `python -m lumina_engine.training.smoke RUN_DIR`, for the preflight."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from .comm import Comm

NUMBERS = 1 << 20  # of float32: 4 MiB
TIMEOUT = 60.0  # s


def main() -> int:
    comm = Comm.start(timeout_s=TIMEOUT)
    numbers = torch.full((NUMBERS,), float(comm.rank + 1), device=comm.device)
    begin = time.perf_counter()
    comm.sum(numbers)
    total = float(numbers[-1])  # waits for a device
    seconds = time.perf_counter() - begin
    wanted = comm.world_size * (comm.world_size + 1) / 2
    if total != wanted:
        print(f"rank {comm.rank}: the all-reduce gave {total}, not {wanted}", file=sys.stderr, flush=True)
        return 1
    if comm.rank == 0:
        way = os.environ.get("GLOO_SOCKET_IFNAME", "its default interface")
        print(f"all-reduce of 4 MiB over {comm.world_size} ranks in {1000 * seconds:.0f} ms through {way}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
