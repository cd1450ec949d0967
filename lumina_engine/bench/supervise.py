"""`lumina-engine bench supervise`: what writing records costs a run, and whether viewers can slow it down.

A real supervisor, the real log and socket; in the rank's place a process that only writes records (`flooder.py`). The figures
are those that the fault matrix leaves to a bench: PS01, PS03, PS13, MX01.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from json import loads
from pathlib import Path
from statistics import median
from typing import Any

from ..monitoring import record as rec
from ..monitoring.log import read_records
from ..run import launch
from ..run.client import RunClient
from ..run.directory import RunDirectory, RunError
from .flooder import RESULT

PACE = 200.0  # records a second, where the time between them counts
STALLED = 8
_STARTER = """
import sys
from lumina_engine.run import launch
from lumina_engine.run.directory import RunDirectory
run = RunDirectory(sys.argv[1])
launch.start(run, [sys.executable, "-m", "lumina_engine.bench.flooder", str(run.path), *sys.argv[2:]])
print("started", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. `least` or `most` is the bound of the matrix, if it has one."""

    name: str
    row: str
    label: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool | None:
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


def measure(folder: Path, seconds: float = 10.0) -> Iterator[Figure]:
    """Each figure as soon as it is known. Every one of the four runs takes `seconds`."""
    alone = _flooded(folder, "alone", seconds, 0.0)
    yield Figure("records_per_s", "MX01", "records of 16 metrics, nobody watching", alone["records_per_s"], "/s", least=5000)
    yield Figure("emit_p99_us", "MX01", "one emit, p99", alone["emit_p99_us"], "us", most=200)
    yield Figure("lost", "MX01", "records lost", alone["lost"], "", most=0)
    stalled = _flooded(folder, "stalled", seconds, 0.0, _stalled_clients)
    share = 100 * stalled["records_per_s"] / alone["records_per_s"]
    yield Figure("stalled_share", "PS03", f"rate beside {STALLED} clients that never read", share, "%", least=90)
    yield Figure("stalled_emit_p99_us", "PS03", "one emit beside them, p99", stalled["emit_p99_us"], "us", most=200)
    yield Figure("stalled_emit_max_ms", "PS03", "one emit beside them, longest", stalled["emit_max_ms"], "ms", most=50)
    lags: list[float] = []
    _flooded(folder, "live", seconds, PACE, _stalled_clients, lambda run, over: _follow(run, over, lags))
    ordered = sorted(lags)
    lag = 1e3 * ordered[int(0.99 * len(ordered))] if ordered else float("nan")
    yield Figure("lag_p99_ms", "PS03", "how late a viewer that reads is beside them, p99", lag, "ms", most=250)
    hostile = _flooded(folder, "hostile", seconds, 0.0, _hostile_clients)
    share = 100 * hostile["records_per_s"] / alone["records_per_s"]
    yield Figure("hostile_share", "PS13", "rate beside clients that send garbage", share, "%", least=90)
    yield Figure("gap", "PS01", "longest step after the starter's kill / median", _gap(folder, seconds), "x", most=3)


Actor = Callable[[RunDirectory, threading.Event], None]


def _flooded(folder: Path, name: str, seconds: float, rate: float, *actors: Actor) -> dict[str, Any]:
    """What the rank of a run says of its own `emit`, with these actors beside it."""
    run = RunDirectory.create(folder, name)
    words = [sys.executable, "-m", "lumina_engine.bench.flooder", str(run.path), str(seconds), str(rate)]
    launch.start(run, words)
    over = threading.Event()
    threads = [threading.Thread(target=actor, args=(run, over), daemon=True) for actor in actors]
    for thread in threads:
        thread.start()
    code = launch.wait(run, seconds + 60)
    over.set()
    for thread in threads:
        thread.join(10)
    if code != 0:
        raise RunError(f"the measured run ended with {code}: {run.info().reason}", 1)
    return dict(loads((run.path / RESULT).read_text()))


def _stalled_clients(run: RunDirectory, over: threading.Event) -> None:
    """Clients that say hello and never read again; those that are thrown out come back."""
    clients: list[RunClient] = []
    try:
        for _ in range(STALLED):
            clients.append(RunClient(run))
        over.wait()
    finally:
        for client in clients:
            client.close()


def _follow(run: RunDirectory, over: threading.Event, lags: list[float]) -> None:
    """A viewer that reads: how old each record of the stream is when it comes."""
    with contextlib.suppress(RunError, OSError), RunClient(run) as client:
        for record in client.records():
            if isinstance(record, rec.Step) and record.seq > client.hello["head_seq"]:
                lags.append(time.time() - record.t)


def _hostile_clients(run: RunDirectory, over: threading.Event) -> None:
    """Connections one after the other, each with a line that is none."""
    chance = random.Random(1)
    path = run.info().socket
    lines = [b"{" * 20_000, b"\0" * 1000, b"[" * 10_000 + b"]" * 10_000, b"x" * 100_000, b'{"op":"hello"']
    while path is not None and not over.is_set():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(0.2)
            client.connect(path)
            client.sendall(chance.choice(lines) + (b"\n" if chance.random() < 0.7 else b""))
            client.recv(1000)
        over.wait(0.01)


def _gap(folder: Path, seconds: float) -> float:
    """Start a paced run by a process of its own, kill that, and look at the times between the records."""
    run = RunDirectory.create(folder, "starter")
    words = [sys.executable, "-c", _STARTER, str(run.path), str(seconds), str(PACE / 10)]
    starter = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert starter.stdout is not None
    starter.stdout.readline()
    threading.Event().wait(seconds / 2)
    os.killpg(starter.pid, signal.SIGKILL)
    starter.communicate()
    launch.wait(run, seconds + 60)
    times = [record.t for record in read_records(run.metrics_path) if isinstance(record, rec.Step)]
    gaps = [b - a for a, b in pairwise(times[10:])]
    return max(gaps) / median(gaps)
