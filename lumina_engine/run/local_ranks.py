"""The ranks of one machine as children of the process that starts them: leashed, watched, ended together."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from .process import Process, descendants, held, leash, process, send_all, send_signal


def rank_variables(first: int, count: int, world: int, node: int, address: str, port: int) -> list[dict[str, str]]:
    """What each rank of a machine finds in its environment, as torchrun would set it.

    Args:
        first: global number of its first rank. count: ranks on this machine. node: number of the machine.
    """
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    return [shared | {"RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(count)]


class LocalRanks:
    """Starts one process per set of variables. The main thread must do it: PR_SET_PDEATHSIG follows the starting thread.

    Args:
        argv: the ranks' command.
        variables: `rank_variables`.
        environment: what all have in common.
        output: where stdout and stderr go; None: where ours go.
        ended: called with (rank, exit code, whether we sent it a TERM) when one has ended.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        argv: Sequence[str],
        variables: Sequence[Mapping[str, str]],
        environment: Mapping[str, str],
        ended: Callable[[int, int, bool], None],
        output: int | None = None,
    ) -> None:
        self._selector = selector
        self._ended = ended
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._told: set[int] = set()  # pids that we sent a TERM
        if len(variables) > 1:
            environment = {"OMP_NUM_THREADS": "1", **environment}  # as torchrun does: several ranks share the cores
        for own in variables:
            with held():
                child = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**environment, **own},
                    preexec_fn=leash(os.getpid()),
                )
            self._children[int(own["RANK"])] = child
            self._watch(int(own["RANK"]), child)

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        descriptor = os.pidfd_open(child.pid)  # readable once the process has ended

        def reap() -> None:
            self._selector.unregister(descriptor)
            os.close(descriptor)
            del self._children[rank]
            self._ended(rank, child.wait(), child.pid in self._told)

        self._selector.register(descriptor, selectors.EVENT_READ, reap)

    @property
    def living(self) -> list[Process]:
        """The ranks that have not ended."""
        found = [process(child.pid) for child in self._children.values()]
        return [item for item in found if item is not None and item.alive]

    def signal(self, number: int) -> None:
        """Signal the ranks themselves."""
        for item in self.living:
            if number == signal.SIGTERM:
                self._told.add(item.pid)
            send_signal(item, number)

    def kill(self) -> None:
        """Kill the ranks and everything below them."""
        for item in self.living:
            send_all([item, *descendants(item.pid)], signal.SIGKILL)
