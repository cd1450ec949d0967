"""Rules about machines: how many, how they are found, who starts their ranks (R23)."""

from __future__ import annotations

from collections.abc import Iterator

from lumina_engine.config.finding import Finding, Severity
from lumina_engine.config.schema import Config


def nodes(config: Config) -> Iterator[Finding]:
    """Several machines need a list of them, or one start on each."""
    yield from _one(config) if config.num_nodes == 1 else _several(config)


def _finding(severity: Severity, keys: str, message: str, fix: str) -> Finding:
    return Finding("nodes", severity, tuple(keys.split()), message, fix)


def _one(config: Config) -> Iterator[Finding]:
    if config.node_rank:
        message = f"node_rank = {config.node_rank} with num_nodes = 1: there is no such machine"
        yield _finding("error", "node_rank num_nodes", message, "set num_nodes, or node_rank=null")
    if config.hostfile is not None:
        message = "hostfile has no effect with num_nodes = 1: all ranks run on this machine"
        yield _finding("info", "hostfile num_nodes", message, "set num_nodes to the number of machines, or hostfile=null")
    if config.launcher == "torchrun":
        message = "launcher = torchrun: its store listens on every interface of this machine, not on loopback alone"
        yield _finding("info", "launcher", message, "set launcher=auto")


def _several(config: Config) -> Iterator[Finding]:
    count = config.num_nodes
    by_hand = config.launcher == "torchrun" or (config.launcher == "auto" and config.node_rank is not None)
    if config.launcher == "none":
        message = f"launcher = none with num_nodes = {count}: it starts ranks on this machine only"
        yield _finding("error", "launcher num_nodes", message, "set launcher=deepspeed and hostfile, or launcher=srun")
    if config.master_addr == "localhost" or config.master_addr.startswith("127."):
        message = f"master_addr = {config.master_addr} with num_nodes = {count}: no other machine reaches it"
        yield _finding("error", "master_addr num_nodes", message, "set master_addr to an address of this machine")
    elif by_hand:
        yield from _by_hand(config)
    elif config.launcher != "srun" and config.hostfile is None:
        message = f"num_nodes = {count}, but nothing says which machines"
        fix = "set hostfile, or launcher=srun in a Slurm job, or start each machine by hand with node_rank=0, 1 …"
        yield _finding("error", "num_nodes hostfile", message, fix)
    if config.launcher == "srun" and config.hostfile is not None:
        message = "hostfile has no effect with launcher = srun: the Slurm job has its own machines"
        yield _finding("info", "hostfile launcher", message, "set hostfile=null")
    if not by_hand and config.node_rank is not None:
        message = (
            f"node_rank = {config.node_rank} has no effect with launcher = {config.launcher}: one start serves all machines"
        )
        yield _finding("error", "node_rank launcher", message, "set node_rank=null, or launcher=torchrun")


def _by_hand(config: Config) -> Iterator[Finding]:
    count = config.num_nodes
    if config.node_rank is None:
        message = f"launcher = torchrun with num_nodes = {count}: each machine is started by hand and must know its number"
        yield _finding("error", "node_rank num_nodes", message, f"set node_rank=0 here, 1 to {count - 1} on the others")
    elif config.node_rank >= count:
        message = f"node_rank = {config.node_rank}: the numbers of {count} machines go from 0 to {count - 1}"
        yield _finding(
            "error", "node_rank num_nodes", message, f"set node_rank={count - 1}, or num_nodes={config.node_rank + 1}"
        )
    if config.master_addr == "auto":
        message = "master_addr = auto, but a machine that is started by hand cannot know where the first one is"
        yield _finding("error", "master_addr node_rank", message, "set master_addr to an address of the first machine")
    if config.hostfile is not None:
        message = "hostfile has no effect where each machine is started by hand"
        yield _finding("info", "hostfile node_rank", message, "set hostfile=null, or node_rank=null and launcher=auto")
