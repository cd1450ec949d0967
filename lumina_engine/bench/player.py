"""Runs made for measuring: generated logs, and a process that plays a living run over the real socket.

    python -m lumina_engine.bench.player RUN [RUN …] [--rate 20] [--lines 0] [--layers 4] [--experts 8]

Everything goes through the product's own writers (RunDirectory, RunLock, MetricLog, ViewerServer). The values are a plausible
curve without meaning.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import secrets
import selectors
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..monitoring import record as rec
from ..monitoring.log import MetricLog
from ..run.directory import RunDirectory
from ..run.process import boot_id, myself
from ..run.socket import ViewerServer, socket_folder
from ..run.tail import LogTail

TURN_S = 0.01  # s between two turns of a playing process
TOTAL = 10_000_000  # steps that a played run says it has


def step_record(n: int, rng: random.Random) -> rec.Step:
    """Step `n` with 14 numbers, as the trainer writes them."""
    slow = 2 * math.sin(n / 7e3) + math.sin(n / 333)
    return rec.Step(
        step=n,
        epoch=n // 100_000,
        tokens=2048 * n,
        loss=round(1.7 + 4.2 * math.exp(-n / 3e4) + 0.02 * slow + rng.gauss(0, 0.05), 5),
        aux_loss=round(1.02 + 0.01 * rng.random(), 5),
        z_loss=round(12 + rng.random(), 4),
        lr=round(3e-4 / (1 + n / 1e5), 9),
        grad_norm=round(0.6 + 0.3 * rng.random(), 5),
        step_time=round(0.12 + 0.02 * rng.random(), 5),
        tokens_per_s=round(16_500 + 900 * rng.random(), 1),
        mfu=round(0.41 + 0.02 * rng.random(), 4),
        seq_length=256,
        batch=8,
    )


def experts_record(n: int, layers: int, experts: int, rng: random.Random) -> rec.Experts:
    """One observation of the routing of `layers` x `experts`."""
    load = [[round(100 + rng.gauss(0, 15), 1) for _ in range(experts)] for _ in range(layers)]
    imbalance = [round(max(row) * experts / sum(row), 4) for row in load]
    nothing = [0.0] * layers
    return rec.Experts(
        step=n,
        layers=list(range(layers)),
        load=load,
        imbalance=imbalance,
        entropy=[0.98] * layers,
        dead=[0] * layers,
        dropped=nothing,
        confidence=[0.6] * layers,
    )


def hardware_record(rng: random.Random) -> rec.Hardware:
    """Two devices and the host."""
    devices = [
        rec.Device(
            index=i,
            name="device",
            utilisation=round(95 + 5 * rng.random(), 1),
            memory_used=71_000_000_000,
            memory_total=80_000_000_000,
            power=round(650 + 50 * rng.random(), 1),
            power_limit=700.0,
            temperature=74.0,
        )
        for i in range(2)
    ]
    return rec.Hardware(
        devices=devices, cpu=round(100 * rng.random(), 1), cpu_count=2, memory_used=6_100_000_000, memory_total=16_000_000_000
    )


def records(first: int, last: int, rng: random.Random) -> Iterator[rec.Record]:
    """A steady run: every step, an evaluation each 2,000, a checkpoint each 10,000, now and then an alert."""
    for n in range(first, last + 1):
        yield step_record(n, rng)
        if n % 2_000 == 0:
            yield rec.Eval(step=n, loss=round(1.75 + 4.2 * math.exp(-n / 3e4), 4), perplexity=7.0, seconds=0.3)
        if n % 10_000 == 0:
            yield rec.Checkpoint(step=n, bytes=12_000_000, seconds=0.4, blocking=0.1, best=n % 20_000 == 0)
        if n % 50_000 == 0:
            yield rec.Alert(severity="warning", code="loss_spike", message="loss 6.3 sigma above the mean", step=n)


def make_run(root: Path, name: str, steps: int, state: str | None = "finished") -> RunDirectory:
    """A run directory with a log of `steps` steps; `state` None leaves it without an end."""
    run = RunDirectory.create(root, name, preset="debug")
    rng = random.Random(len(name) + steps)
    total = steps if state else TOTAL
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        log.emit(rec.Run(state="running", total_steps=total, world=1))
        for record in records(1, steps, rng):
            log.emit(record)
        if state:
            log.emit(rec.Run(state=state, exit_code=0))
    run.update_identity(state=state or "running", inc=1, total_steps=total, exit_code=0 if state else None)
    return run


class Played:
    """One living run: its lock, its socket, its log."""

    def __init__(self, path: Path, selector: selectors.BaseSelector, args: argparse.Namespace) -> None:
        self.run, self.args = RunDirectory(path), args
        self.rng = random.Random(1)
        last = self._last_step()
        self.step = last
        self.lock = self.run.lock()
        self.log = MetricLog(self.run.metrics_path, 1, sync_interval=0)
        self.tail = LogTail(self.run.metrics_path, self.log.offset, self.log.seq)
        socket = socket_folder() / f"bench-{secrets.token_hex(6)}.sock"
        self.viewers = ViewerServer(socket, selector, self._hello, _refuse)
        self.viewers.head_seq = self.tail.head_seq
        me = myself()
        place: dict[str, Any] = {"pid": me.pid, "start_time": me.start, "boot_id": boot_id(), "socket": str(socket)}
        self.run.update_identity(**place, state="running", inc=1, total_steps=TOTAL)
        self.began = time.monotonic()
        self.done = self.lines = 0

    def _last_step(self) -> int:
        from ..monitoring.log import last_records

        found = last_records(self.run.metrics_path, 1, ["step"])
        return found[0].step if found and isinstance(found[0], rec.Step) else 0

    def _hello(self) -> dict[str, Any]:
        head = {"head_seq": self.tail.head_seq, "offset": self.tail.offset}
        return {"run": self.run.name, "inc": 1, "state": "running", **head}

    def turn(self) -> None:
        """Write what is due, send it to whoever listens."""
        spent = time.monotonic() - self.began
        due = int(spent * self.args.rate)
        while self.done < due:
            self.done += 1
            self._emit()
        lines = int(spent * self.args.lines)
        if lines > self.lines:
            with self.run.log_path.open("ab") as file:
                file.write(
                    b"".join(b"line %d of the engine, as long as such lines are\n" % n for n in range(self.lines, lines))
                )
            self.lines = lines
        chunks, _ = self.tail.poll()
        self.viewers.publish(chunks)
        self.viewers.tick()

    def _emit(self) -> None:
        """One record: mostly steps, and each tenth of a second of them routing or hardware."""
        kind = self.done % 20
        if kind == 7 and self.args.layers:
            self.log.emit(experts_record(self.step, self.args.layers, self.args.experts, self.rng))
        elif kind == 13:
            self.log.emit(hardware_record(self.rng))
        else:
            self.step += 1
            self.log.emit(step_record(self.step, self.rng))

    def end(self) -> None:
        self.viewers.close("the measurement is over")
        self.log.close()
        self.tail.close()
        self.lock.release()


def _refuse(identity: str, cmd: object, args: object) -> dict[str, Any]:
    return {"op": "reply", "id": identity, "ok": False, "error": "a run made for measuring takes no commands"}


def main() -> int:
    """Play until a signal comes."""
    cli = argparse.ArgumentParser()
    cli.add_argument("runs", nargs="+", type=Path)
    cli.add_argument("--rate", type=float, default=20.0, help="records a second and run")
    cli.add_argument("--lines", type=float, default=0.0, help="lines of engine.log a second")
    cli.add_argument("--layers", type=int, default=4)
    cli.add_argument("--experts", type=int, default=8)
    args = cli.parse_args()
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    parent = os.getppid()
    with selectors.DefaultSelector() as selector:
        played = [Played(path, selector, args) for path in args.runs]
        print("playing", flush=True)
        while not stopped and os.getppid() == parent:  # never outlives who started it
            for key, _ in selector.select(TURN_S):
                key.data()
            for one in played:
                one.turn()
        for one in played:
            one.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
