"""An engine without torch: writes a real run directory and serves the real wire, driven by a script of calls.

In a test it lives in the test's loop (`async with FakeEngine(...)`); as a program it plays a run for demonstrations:
`python tests/tui/fake_engine.py RUNS_ROOT [--name demo] [--steps 400] [--rate 8] [--layers 4] [--experts 8] [--gpus 0]`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import secrets
import sys
from pathlib import Path
from typing import Any

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.run.directory import RunDirectory, RunLock
from lumina_engine.run.process import boot_id, myself


class FakeEngine:
    """A run under one's control. `refuse` maps a command to the error it is answered with; `mute` answers no command."""

    def __init__(self, root: Path, name: str = "demo", *, preset: str | None = "debug", total_steps: int | None = 1000) -> None:
        self.run = RunDirectory.create(root, name, preset=preset)
        self.total_steps = total_steps
        self.inc = 0
        self.step_number = 0
        self.refuse: dict[str, str] = {}
        self.silent_to_commands = False
        self.hold_live = False  # records go to the file only: the next one that is sent makes a jump
        self.commands: list[dict[str, Any]] = []
        self.hellos = 0
        self.ranks: list[dict[str, Any]] = []  # where the ranks are, for whoever asks
        self.t = 0.0  # fixed time of the next records; 0: the clock's
        self._clients: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._log: MetricLog | None = None
        self._random = random.Random(0)
        self._lock: RunLock | None = None
        self._socket = Path(f"/tmp/lumina-test-{os.getpid()}-{secrets.token_hex(6)}.sock")
        self._next_inc()

    def _next_inc(self) -> None:
        self.inc += 1
        if self._log is not None:
            self._log.close()
        self._log = MetricLog(self.run.metrics_path, self.inc, sync_interval=0)

    # life

    async def __aenter__(self) -> FakeEngine:
        await self.serve()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def serve(self, socket: bool = True) -> None:
        """Become the living supervisor; without `socket` nobody answers on it."""
        if socket:
            self._socket.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._client, str(self._socket))
        if self._lock is None:
            self._lock = self.run.lock()
        me = myself()
        self.run.update_identity(
            pid=me.pid,
            start_time=me.start,
            boot_id=boot_id(),
            socket=str(self._socket),
            inc=self.inc,
            total_steps=self.total_steps,
            state="running",
        )

    async def end(self) -> None:
        """Close sockets and files; the run directory stays as it is."""
        for client in list(self._clients):
            client.close()
        self._clients.clear()
        if self._server is not None:
            self._server.close()
            self._server = None
        self._socket.unlink(missing_ok=True)
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    async def crash(self) -> None:
        """As if the supervisor had been killed: no goodbye, no final state, the lock is free."""
        await self.end()
        self.run.update_identity(pid=2**22 + 1, start_time=1)

    async def finish(self, state: str = "finished", reason: str | None = None, code: int = 0) -> None:
        """The proper end of a run."""
        self.emit(rec.Run(state=state, reason=reason, exit_code=code))
        self.run.update_identity(state=state, reason=reason, exit_code=code, pid=2**22 + 1, start_time=1)
        for client in list(self._clients):
            self._line(client, {"op": "bye", "reason": state})
        await self.end()

    async def restart(self, to_step: int) -> None:
        """A new incarnation that goes on from `to_step`."""
        self._next_inc()
        await self.serve()
        self.emit(rec.Run(state="running", total_steps=self.total_steps))
        self.emit(rec.Rewind(to_step=to_step, reason="resumed"))
        self.step_number = to_step

    # records

    def emit(self, record: rec.Record) -> int:
        """Write a record to the file and send it to everybody attached."""
        assert self._log is not None
        if self.t:
            record.t = self.t
        seq = self._log.emit(record)
        if not self.hold_live:
            line = rec.encode(record)
            for client in list(self._clients):
                if not client.is_closing():
                    client.write(line)
        return seq

    def state(self, state: str, reason: str | None = None, id: str | None = None) -> None:
        self.emit(rec.Run(state=state, reason=reason, total_steps=self.total_steps, world=1, id=id))
        self.run.update_identity(state=state, reason=reason)

    def steps(self, count: int, **fixed: Any) -> None:
        """`count` plausible steps; `fixed` replaces values."""
        for _ in range(count):
            self.step_number += 1
            n = self.step_number
            values: dict[str, Any] = {
                "loss": 1.7 + 4.2 * math.exp(-n / 90) + self._random.gauss(0, 0.05),
                "aux_loss": 1.02 + abs(self._random.gauss(0, 0.01)),
                "z_loss": 12.0 + self._random.gauss(0, 0.2),
                "lr": 1e-3 * min(1.0, n / 40) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, n / 1000)))),
                "grad_norm": 0.6 + abs(self._random.gauss(0, 0.15)),
                "step_time": 0.12,
                "data_time": 0.003,
                "forward_time": 0.041,
                "backward_time": 0.058,
                "optimizer_time": 0.014,
                "tokens_per_s": 16_500 + self._random.gauss(0, 600),
            }
            self.emit(rec.Step(step=n, epoch=n // 300, tokens=2048 * n, seq_length=256, batch=8, **{**values, **fixed}))

    def experts(self, layers: int = 2, experts: int = 8, hot: int | None = None, dead: int | None = None) -> None:
        """One observation of the routing."""
        load, dead_L, imbalance = [], [], []
        for layer in range(layers):
            row = [max(1.0, 100 + self._random.gauss(0, 12)) for _ in range(experts)]
            if hot is not None and layer == 0:
                row[hot] = 330.0
            if dead is not None and layer == layers - 1:
                row[dead] = 0.0
            load.append([round(value, 1) for value in row])
            dead_L.append(sum(value == 0 for value in row))
            imbalance.append(max(row) / (sum(row) / experts))
        share = [[value / sum(row) for value in row] for row in load]
        entropy = [-sum(p * math.log(p) for p in row if p > 0) / math.log(max(2, experts)) for row in share]
        self.emit(
            rec.Experts(
                step=self.step_number,
                layers=list(range(layers)),
                load=load,
                imbalance=imbalance,
                entropy=entropy,
                dead=dead_L,
                dropped=[0.0] * layers,
                confidence=[0.6] * layers,
            )
        )

    def hardware(self, gpus: int = 0) -> None:
        devices = [
            rec.Device(
                index=i,
                name="NVIDIA H100 80GB HBM3",
                utilisation=98.0 - i,
                memory_used=int(71e9),
                memory_total=int(80e9),
                power=688.0,
                power_limit=700.0,
                temperature=74.0,
                link_rx=3.1e9,
                link_tx=1.2e9,
            )
            for i in range(gpus)
        ]
        self.emit(
            rec.Hardware(
                devices=devices,
                cpu=85 + self._random.gauss(0, 6),
                cpu_count=os.cpu_count(),
                memory_used=int(6.1e9),
                memory_total=int(16e9),
                rss=int(1.9e9),
                disk_free=int(1.1e12),
                disk_total=int(2e12),
                net_rx=1.5e6,
                net_tx=2.5e5,
            )
        )

    def log(self, *lines: str) -> None:
        """Lines of engine.log, as bytes would come."""
        with self.run.log_path.open("ab") as file:
            file.write("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))

    # wire

    @staticmethod
    def _line(client: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            client.write(json.dumps(message).encode() + b"\n")

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = json.loads(await reader.readline() or b"{}")
            self.hellos += 1
            if hello.get("proto") != 1:
                self._line(writer, {"op": "bye", "reason": "unknown protocol"})
                return
            assert self._log is not None
            head = {"head_seq": self._log.seq, "offset": self._log.offset}
            about = {"run": self.run.name, "inc": self.inc, "state": "running", "asks": ["ranks"], **self._ranks()}
            self._line(writer, {"op": "hello", "proto": 1, **about, **head})
            self._clients.add(writer)
            while line := await reader.readline():
                self._command(writer, json.loads(line))
        except (OSError, ValueError, asyncio.CancelledError):
            pass
        finally:
            self._clients.discard(writer)
            writer.close()

    def _ranks(self) -> dict[str, Any]:
        return {"world": len(self.ranks) or None, "ranks": self.ranks}

    def beat(self, rank: int, section: str, step: int | None = None, age: float = 0.1, **more: Any) -> None:
        """A rank is somewhere."""
        where = {"rank": rank, "pid": 1000 + rank, "step": step or self.step_number, "section": section, "age_s": age, **more}
        self.ranks = [*(item for item in self.ranks if item["rank"] != rank), where]

    def gap(self) -> None:
        """Tell everybody that records were not sent."""
        assert self._log is not None
        for client in list(self._clients):
            self._line(client, {"op": "gap", "from": 1, "to": self._log.seq, "offset": 0})

    def _command(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        if message.get("op") == "ranks":
            self._line(writer, {"op": "ranks", **self._ranks()})
            return
        self.commands.append(message)
        if self.silent_to_commands:
            return
        cmd, identity, args = message["cmd"], message["id"], message.get("args", {})
        error = self.refuse.get(cmd)
        reply = {"op": "reply", "id": identity, "ok": error is None}
        self._line(writer, reply if error is None else {**reply, "error": error})
        if error is None:
            self.effect(cmd, identity, args)

    def effect(self, cmd: str, identity: str, args: dict[str, Any]) -> None:
        """What a command does, as a record."""
        match cmd:
            case "checkpoint":
                self.emit(rec.Checkpoint(step=self.step_number, bytes=12_000_000, seconds=0.4, blocking=0.1, id=identity))
            case "pause":
                self.state("paused", id=identity)
            case "resume":
                self.state("running", id=identity)
            case "set_lr":
                change = rec.Change(
                    what="learning_rate", step=self.step_number, before=1e-3, after=args["lr"], by="user", id=identity
                )
                self.emit(change)
            case "stop":
                self.state("stopping", id=identity)


async def play(args: argparse.Namespace) -> None:
    """A run at a steady rate, for looking at the screens."""
    engine = FakeEngine(Path(args.root), args.name, total_steps=args.steps)
    async with engine:
        engine.log(
            "lumina engine starts", "device: cpu, 2 threads", "building the model: 0.55 M parameters active, 3.3 M in all"
        )
        engine.state("preparing")
        await asyncio.sleep(args.prepare)
        engine.state("running")
        while engine.step_number < args.steps:
            engine.steps(1)
            n = engine.step_number
            if n % 5 == 0:
                engine.experts(args.layers, args.experts, hot=3 if n % 40 == 0 else None, dead=5)
            if n % 12 == 0:
                engine.hardware(args.gpus)
            if n % 25 == 0:
                engine.emit(rec.Eval(step=n, loss=1.75 + 4.2 * math.exp(-n / 90), perplexity=7.0, seconds=0.3))
                engine.log(f"step {n}: evaluated")
            if n % 60 == 0:
                engine.emit(rec.Checkpoint(step=n, bytes=12_000_000, seconds=0.4, blocking=0.1, best=n % 120 == 0))
            if n == 80:
                engine.emit(
                    rec.Alert(
                        severity="warning",
                        code="loss_spike",
                        message="loss 6.3 sigma above the mean, step skipped",
                        recommendation="Nothing to do.",
                        step=n,
                    )
                )
                engine.steps(1, loss=9.0, skipped=True)
            if n == 130:
                engine.steps(1, loss=math.nan, skipped=True)
            await asyncio.sleep(1 / args.rate if n > args.burst else 0)
        await engine.finish()


def main() -> int:
    cli = argparse.ArgumentParser()
    cli.add_argument("root")
    cli.add_argument("--name", default="demo")
    cli.add_argument("--steps", type=int, default=400)
    cli.add_argument("--rate", type=float, default=8.0)
    cli.add_argument("--burst", type=int, default=0, help="steps written at once")
    cli.add_argument("--layers", type=int, default=4)
    cli.add_argument("--experts", type=int, default=8)
    cli.add_argument("--gpus", type=int, default=0)
    cli.add_argument("--prepare", type=float, default=1.0)
    asyncio.run(play(cli.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
