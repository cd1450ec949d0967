"""Network interfaces by the way that a connection takes, and ports that are free. Nothing is sent."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from .directory import RunError


def address_towards(host: str) -> str | None:
    """The address of this machine that a connection to `host` comes from; None if there is no way to it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # a datagram socket: only the route is looked up
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The interface that has this address."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def interface_towards(host: str) -> str | None:
    """The interface on the way to `host`; None where nobody knows."""
    address = address_towards(host)
    return None if address is None else interface_of(address)


def socket_variables(environment: Mapping[str, str], address: str) -> dict[str, str]:
    """The interface that gloo and NCCL are to use, unless the user has chosen: the one on the way to `address`."""
    found = interface_towards(address)
    names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in environment]
    return dict.fromkeys(names, found) if found else {}


def free_port(preferred: int) -> int:
    """`preferred` if nobody listens there on loopback, else a port that is free now (0: at once).

    Raises:
        RunError: there is none (exit code 1).
    """
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RunError("no free port on 127.0.0.1 for the ranks to meet", 1)
