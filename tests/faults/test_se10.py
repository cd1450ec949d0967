"""SE10: which TCP ports listen because of a run, read from /proc/net/tcp and tcp6."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from pathlib import Path

import pytest

from lumina_engine.run.process import descendants
from tests.waiting import until

from .conftest import TinyRuns
from .tiny_run import steps

LISTENS = "0A"


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of a line of /proc/net: words of four bytes in the machine's order."""
    data = b"".join(bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8))
    return ipaddress.ip_address(data)


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """(address, port) of every socket of these processes that listens."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").glob("*") if Path(f"/proc/{pid}/fd").exists() else ():
            try:
                inodes.add(str(entry.readlink()))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and f"socket:[{words[9]}]" in inodes:
                place, _, port = words[1].partition(":")
                found.add((str(address(place)), int(port, 16)))
    return found


def test_the_look_finds_what_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as two:
        wanted = {("127.0.0.1", one.getsockname()[1]), ("0.0.0.0", two.getsockname()[1])}
        assert wanted <= listening([os.getpid()])


@pytest.mark.parametrize("world", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.fast]), 2])
def test_se10_a_run_listens_on_loopback_only(tiny_runs: TinyRuns, world: int) -> None:
    """A rank alone has no rendezvous, but gloo makes a listener for a group of one too; nobody connects to it."""
    run = tiny_runs.running(world=world, max_steps=100_000, save_interval=0, eval_interval=0)
    until(lambda: len(steps(run)) >= 2, lambda: f"steps: {run.info()}: {run.log_path.read_text()[-1500:]}", 90)
    owner = run.owner()
    assert owner is not None
    found = listening([owner.pid, *[item.pid for item in descendants(owner.pid)]])
    places = {place for place, _ in found}
    assert places == {"127.0.0.1"}, found
    assert world > 1 or len(found) == 1, found
    assert run.signal(signal.SIGINT)
