"""The machines of a run: a hostfile as DeepSpeed and Open MPI read it, and the rule for the names of machines (S10)."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .directory import RunError

HOST_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
_LIMIT = 1 << 20  # bytes of a hostfile
_SLOTS = re.compile(r"slots=(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Host:
    """One machine and how many ranks it may carry; None: as many as the run puts on each."""

    name: str
    slots: int | None = None


def check_host(name: str, where: str) -> str:
    """The name, if it is one.

    Raises:
        RunError: it could be taken for an option or a command (exit code 2); `where` says where it stands.
    """
    if not HOST_PATTERN.fullmatch(name):
        raise RunError(f"{where}: {name!r} is no host name: use letters, digits, '.' and '-', the first one a letter or digit")
    return name


def read_hostfile(path: str | Path) -> list[Host]:
    """The machines in a file of lines `host slots=N`; `#` begins a comment, empty lines are nothing.

    Raises:
        RunError: unreadable, empty, a line that is none, a machine that stands there twice: file and line (exit code 2).
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LIMIT + 1)
        text = data.decode()
    except OSError as error:
        raise RunError(f"hostfile {path}: {error.strerror}: set hostfile to a file of lines `host slots=N`") from None
    except UnicodeDecodeError:
        raise RunError(f"hostfile {path}: no text: write lines `host slots=N`") from None
    if len(data) > _LIMIT:
        raise RunError(f"hostfile {path}: larger than {_LIMIT:,} bytes: write lines `host slots=N`")
    lines: dict[str, int] = {}
    hosts = []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].split(" ") if "\0" not in line else [line]
        words = [word for item in words for word in item.split("\t") if word.rstrip("\r")]
        if not words:
            continue
        host = _host(words, f"{path}:{number}")
        if host.name in lines:
            raise RunError(f"{path}:{number}: {host.name} stands in line {lines[host.name]} already: one line per machine")
        lines[host.name] = number
        hosts.append(host)
    if not hosts:
        raise RunError(f"hostfile {path}: names no machine: write lines `host slots=N`")
    return hosts


def _host(words: list[str], where: str) -> Host:
    name = check_host(words[0].rstrip("\r"), where)
    slots = None
    for word in words[1:]:
        found = _SLOTS.fullmatch(word.rstrip("\r"))
        if found is None or slots is not None:
            raise RunError(f"{where}: {word!r} is not understood: a line is `host slots=N`")
        slots = int(found[1])
    if slots == 0:
        raise RunError(f"{where}: slots=0: leave the machine out, or give it a rank")
    return Host(name, slots)


def is_here(name: str) -> bool:
    """Whether a machine's name or address is that of this one: an address of it can be bound here."""
    if name.lower() in ("localhost", socket.gethostname().lower()):
        return True
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def choose(hosts: list[Host], nodes: int, ranks: int, where: str, here: Callable[[str], bool] = is_here) -> list[Host]:
    """The first `nodes` machines, this one at the head: rank 0 runs where its supervisor is.

    Args:
        hosts: as listed.
        ranks: ranks of each machine.
        where: the file or variable that lists them.

    Raises:
        RunError: too few machines or slots, or this machine is none of them (exit code 2).
    """
    if nodes > len(hosts):
        raise RunError(f"num_nodes = {nodes}, but {where} lists {len(hosts)}: set num_nodes={len(hosts)} or list more machines")
    mine = next((host for host in hosts if here(host.name)), None)
    if mine is None:
        names = ", ".join(host.name for host in hosts[:8])
        raise RunError(f"{where} does not list this machine ({socket.gethostname()}): start the run on one of {names}")
    chosen = [mine, *[host for host in hosts if host is not mine]][:nodes]
    for host in chosen:
        if host.slots is not None and host.slots < ranks:
            raise RunError(
                f"{where}: {host.name} has {host.slots} slots, the run puts {ranks} ranks on each machine: "
                f"set num_gpus={host.slots}"
            )
    return chosen
