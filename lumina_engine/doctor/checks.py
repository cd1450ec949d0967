"""The table of all checks. A new one is a function `(system) -> Iterator[Result]` and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import devices, disk, host, network, packages, sockets, supervision
from .row import Result
from .system import System

QUICK_LIMIT = 10.0  # s
SLOW_LIMIT = packages.PROBE_LIMIT + 5.0


@dataclass(frozen=True)
class Check:
    """One check. `slow` ones take seconds; each ends after `limit_s`, with a row that says so."""

    id: str
    group: str
    function: Callable[[System], Iterable[Result]]
    slow: bool = False
    limit_s: float = QUICK_LIMIT

    @property
    def about(self) -> str:
        """What is checked, in a sentence."""
        return " ".join((self.function.__doc__ or "").split())


def _slow(id: str, group: str, function: Callable[[System], Iterable[Result]]) -> Check:
    return Check(id, group, function, True, SLOW_LIMIT)


CHECKS: tuple[Check, ...] = (
    Check("python", "python", packages.python),
    Check("package", "python", packages.packages),
    _slow("torch", "python", packages.torch),
    Check("driver", "devices", devices.driver),
    _slow("cuda", "devices", devices.cuda),
    Check("cpu", "devices", devices.cpu),
    _slow("deepspeed", "deepspeed", packages.deepspeed),
    Check("compiler", "deepspeed", packages.compiler, limit_s=25.0),
    Check("cuda_home", "deepspeed", packages.cuda_home, limit_s=15.0),
    Check("memory", "memory", host.memory),
    Check("shared_memory", "memory", host.shared_memory),
    Check("limits", "memory", host.limits),
    Check("runs", "disk", disk.runs_folder),
    Check("cache", "disk", disk.cache_folder),
    Check("tmp", "disk", disk.tmp_folder),
    Check("clock", "clock", host.clock),
    Check("socket_path", "sockets", sockets.socket_path),
    Check("socket", "sockets", sockets.socket_round_trip),
    Check("logout", "supervision", supervision.logout),
    Check("control_group", "supervision", supervision.control_group),
    Check("container", "supervision", supervision.container),
    Check("hostname", "network", network.hostname),
    Check("loopback", "network", network.loopback),
    Check("launcher", "network", network.launchers),
    Check("ssh", "ssh", network.ssh),
    Check("term", "terminal", network.term),
    Check("locale", "terminal", network.charset),
)
