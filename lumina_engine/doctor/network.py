"""Checks of what several ranks and several nodes need, of the SSH line and the terminal. No connection leaves this machine."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

from .row import Result, fail, ok, skipped, warn
from .system import System


def hostname(system: System) -> Iterator[Result]:
    """Whether this machine's own name has an address without asking a name server: ranks announce themselves by it."""
    name = (system.read("/proc/sys/kernel/hostname") or "").strip() or socket.gethostname()
    address = ""
    for line in (system.read("/etc/hosts") or "").splitlines():
        words = line.partition("#")[0].split()
        if name.lower() in (word.lower() for word in words[1:]):
            address = words[0]
            break
    switch = re.search(r"^hosts:(.*)$", system.read("/etc/nsswitch.conf") or "", re.MULTILINE)
    if address:
        loop = address.startswith("127.") or address == "::1"
        yield ok(f"{name} is {address}", "for several nodes give master_addr an address that the others reach" if loop else "")
    elif switch and re.search(r"\b(myhostname|resolve)\b", switch[1]):
        yield ok(f"{name}, known through nsswitch.conf")
    else:
        yield warn(
            f"{name} is not in /etc/hosts: finding its address needs a name server",
            f"add `127.0.1.1 {name}` to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo for one machine",
        )


def loopback(system: System) -> Iterator[Result]:
    """A TCP connection from this machine to itself: ranks meet there before they exchange anything else."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(2.0)
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=2.0) as client:
                accepted, _ = server.accept()
                with accepted:
                    accepted.settimeout(2.0)
                    client.sendall(b"lumina")
                    heard = accepted.recv(16)
    except OSError as error:
        yield fail(f"127.0.0.1: {error.strerror or error}", "ip link set lo up; check the firewall rules for lo")
        return
    yield (
        ok("127.0.0.1 works")
        if heard == b"lumina"
        else fail("127.0.0.1 answers with something else", "check the firewall rules for lo")
    )


def launchers(system: System) -> Iterator[Result]:
    """What starts ranks on other machines. One machine needs none of it."""
    advice = "runs over several machines: install it, start each with node_rank=, or use launcher=srun"
    for name in ("ssh", "pdsh"):
        path = system.which(name)
        yield ok(path, part=name) if path else skipped("not found; one machine does without", advice, name)
    slurm = system.which("srun")
    yield ok(slurm, part="srun") if slurm else skipped("not found; only a Slurm cluster has it", part="srun")


def ssh(system: System) -> Iterator[Result]:
    """Whether this is an SSH login. Nothing on this side says whether the line is compressed."""
    connection = system.environ.get("SSH_CONNECTION", "").split()
    if not connection:
        yield ok("no SSH login")
        return
    inside = "TMUX" in system.environ or "STY" in system.environ
    advice = "ssh -C (or Compression yes) makes the screen some ten times lighter"
    yield ok(
        f"from {connection[0]}; compression cannot be seen from here{', inside tmux or screen' if inside else ''}",
        advice if inside else f"{advice}; tmux or mosh keeps the screen over a lost line (runs go on anyway)",
    )


def term(system: System) -> Iterator[Result]:
    """Whether the full-screen program can run in this terminal, and with how many colours."""
    name = system.environ.get("TERM", "")
    if name in ("", "dumb"):
        yield skipped(f"TERM={name or '-'}: no full screen, lumina-engine works", "set TERM, e.g. xterm-256color, for lumina")
    elif "256color" in name or system.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        yield ok(f"TERM={name}")
    else:
        yield ok(f"TERM={name}: 16 colours", "TERM=xterm-256color shows more, if the terminal can")


def charset(system: System) -> Iterator[Result]:
    """Whether the locale has Unicode: without it charts and frames are ASCII."""
    names = ("LC_ALL", "LC_CTYPE", "LANG")
    name, value = next(((name, system.environ[name]) for name in names if system.environ.get(name)), ("LANG", ""))
    if "utf" in value.lower():
        yield ok(f"{name}={value}")
    else:
        yield warn(f"{name}={value or '-'}: charts and frames are ASCII", "export LC_ALL=C.UTF-8 (or a UTF-8 locale of yours)")
