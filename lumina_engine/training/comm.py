"""The process group as the rest of training sees it: sums, JSON and a device. One rank needs no group at all."""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..run.interface import socket_variables


class Comm:
    """Collectives of one run. Every method must be called by all ranks in the same order."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, device: torch.device | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.device = device or torch.device("cpu")

    @classmethod
    def start(cls, backend: str = "auto", timeout_s: float = 1800.0) -> Comm:
        """Join the process group that is there, else make one from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        Without these variables this is a run of one process. `auto` is nccl with GPUs and gloo without; nccl without a GPU
        becomes gloo. Idempotent: a group that the caller (or DeepSpeed) made before is used as it is.
        """
        rank = int(os.environ.get("RANK", "0"))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)
        if backend == "auto" or (backend == "nccl" and not cuda):
            backend = "nccl" if cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if world_size == 1:
            # a store in memory: a run of one process needs no rendezvous
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            _choose_interface(world_size)
            store = _own_store(rank, world_size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        return cls(rank, world_size, local_rank, device)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place; returns the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The maximum over ranks, in place; returns the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's JSON value, in order of rank."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = data.numel()
        self.sum(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        if self.world_size == 1:
            return value
        return self.all_gather(value if self.rank == 0 else None)[0]


def _choose_interface(world_size: int) -> None:
    """Have the ranks listen on the interface that leads to where they meet, unless somebody has chosen already.

    gloo would listen where the machine's own name leads, which often is loopback: no other machine gets there. NCCL is told
    for several machines only: on one it needs no interface.
    """
    if "MASTER_ADDR" not in os.environ:
        return
    found = socket_variables(os.environ, os.environ["MASTER_ADDR"])
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == world_size:
        found.pop("NCCL_SOCKET_IFNAME", None)
    os.environ.update(found)


def _own_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """The ranks' store at MASTER_ADDR and MASTER_PORT; None where torchrun has made one already.

    torch's own set-up listens on every interface of the machine. This listens on the one address where the ranks meet: on
    loopback for one machine.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    if rank > 0:
        return dist.TCPStore(address, int(port), world_size, is_master=False, timeout=timeout)
    family, _, _, _, place = socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
    except OSError as error:
        listener.close()
        raise ConnectionError(
            f"rank 0 cannot listen on {address}:{port}: {error.strerror}: set master_addr, master_port"
        ) from error
    listener.listen(world_size + 16)
    return dist.TCPStore(address, int(port), world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())
