"""Runs by arithmetic: faults of the machine, which cannot be had for real on every machine that records."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from ..monitoring import record as rec
from .corpus import Recorded

MACHINE: dict[str, tuple[list[str], list[str]]] = {
    "healthy": ([], []),
    "leak": ([], ["memory_growth"]),
    "device lost": (["device_lost"], []),
    "disk full": (["disk_full"], ["disk_low"]),
}


def machine() -> list[Recorded]:
    """Hardware records by arithmetic, beside steady steps: growth of memory, a lost device, a full disk."""
    runs = []
    for number in range(40):
        kind = list(MACHINE)[number % len(MACHINE)]
        critical, warning = MACHINE[kind]
        run = Recorded(kind, number, "machine", held=number // 4 % 2 == 1, critical=critical, warning=warning, generated=True)
        run.at = 0 if kind == "healthy" else 200
        runs.append(run.take(machine_records(kind, random.Random(number))))
    return runs


def machine_records(kind: str, draw: random.Random) -> Iterator[rec.Record]:
    """The records of 400 steps of 2 s; the fault begins at step 200."""
    yield rec.Checkpoint(step=0, bytes=int(4e9), t=1.0)
    rss, level = 4e9 * draw.uniform(0.5, 2), draw.uniform(2, 5)
    values: dict[str, Any] = {"data_time": 0.01, "batch": 8, "seq_length": 64}
    for step in range(1, 401):
        t, over = 2.0 * step, max(0, step - 200)
        loss, norm = level * step**-0.1 * draw.lognormvariate(0, 0.03), draw.lognormvariate(0, 0.3)
        yield rec.Step(step=step, t=t, loss=loss, grad_norm=norm, lr=1e-4, step_time=2 * draw.lognormvariate(0, 0.05), **values)
        grown = rss * (1 + 0.5 * (1 - 0.5 ** (step / 30))) + (0.004 * rss * over if kind == "leak" else 0.0)
        free = max(5e8, 100e9 - over * 6e9) if kind == "disk full" else 100e9 + draw.gauss(0, 1e8)
        devices = [
            rec.Device(index=i, name="GPU", memory_used=int(60e9), memory_total=int(80e9), temperature=draw.gauss(70, 3))
            for i in ([0] if kind == "device lost" and over else [0, 1])
        ]
        memory = {"memory_used": int(8e9 + grown), "memory_total": int(64e9), "rss": int(grown)}
        yield rec.Hardware(t=t, devices=devices, disk_free=int(free), disk_total=int(200e9), **memory)
