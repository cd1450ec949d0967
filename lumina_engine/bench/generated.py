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
DISK: dict[str, tuple[list[str], list[str]]] = {
    "disk fills": ([], ["disk_low"]),
    "disk saw-tooth": ([], []),
}


def machine() -> list[Recorded]:
    """Hardware records by arithmetic, beside steady steps: growth of memory, a lost device, a disk that is full or fills."""
    runs = []
    for number in range(60):
        kinds, records, at = (MACHINE, machine_records, 200) if number < 40 else (DISK, disk_records, 100)
        kind = list(kinds)[number % len(kinds)]
        critical, warning = kinds[kind]
        held = number // len(kinds) % 2 == 1
        run = Recorded(kind, number, "machine", held=held, critical=critical, warning=warning, generated=True)
        run.at = 0 if kind == "healthy" else at
        runs.append(run.take(records(kind, random.Random(number))))
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


def disk_records(kind: str, draw: random.Random) -> Iterator[rec.Record]:
    """The records of 220 steps of 20 s. A save begins every 8 to 24 of them and takes up to 4; 2 to 12 checkpoints are kept.

    "disk fills": from step 100 on somebody else writes too, and takes what is left in 1.5 to 3 hours. "disk saw-tooth": nobody.
    """
    size, keep, every = draw.uniform(1e9, 8e9), draw.randint(2, 12), draw.randint(8, 24)
    takes = draw.randint(1, every // 6)
    work = draw.uniform(0.3, 1.0)  # share of a save's span, the rest of which it waits for a boundary
    spare = size * draw.uniform(6, 20)  # bytes beside the checkpoints
    others = (kind == "disk fills") * spare / (draw.uniform(1.5, 3) * 180)  # bytes a step
    level = draw.uniform(2, 5)
    for step in range(1, 221):
        t, (saves, since) = 20.0 * step, divmod(step, every)
        loss, norm = level * step**-0.1 * draw.lognormvariate(0, 0.03), draw.lognormvariate(0, 0.3)
        yield rec.Step(step=step, t=t, loss=loss, grad_norm=norm, lr=1e-4, step_time=20.0, batch=8, seq_length=64)
        writing = saves > 0 and since < takes
        if saves and since == takes:
            span = 20.0 * takes - 1
            yield rec.Checkpoint(step=every * saves, bytes=int(size), seconds=work * span, span=span, verified=True, t=t)
        mine = min(saves - writing, keep) + (since / takes if writing else 0.0)
        free = spare + size * (keep - mine) - others * max(0, step - 100) + draw.gauss(0, 1e-4 * spare)
        yield rec.Hardware(t=t, disk_free=int(free), disk_total=int(2 * spare))
