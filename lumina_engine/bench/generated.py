"""Runs by arithmetic: faults of the machine, which cannot be had for real on every machine that records."""

from __future__ import annotations

import random
from collections.abc import Iterator

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
ROOM: dict[str, tuple[list[str], list[str]]] = {
    "memory low": (["memory_low"], []),
    "device memory low": ([], ["device_memory_low"]),
    "device hot": ([], ["device_hot"]),
    "near the bounds": ([], []),
}


def machine() -> list[Recorded]:
    """Hardware records by arithmetic, beside steady steps: growth of memory, a lost device, a disk that is full or fills, a
    machine near its bounds and beyond one of them."""
    runs: list[Recorded] = []
    groups = (MACHINE, machine_records, 200, 40), (DISK, disk_records, 100, 20), (ROOM, room_records, 200, 32)
    for kinds, records, at, count in groups:
        for number in range(len(runs), len(runs) + count):
            kind = list(kinds)[number % len(kinds)]
            critical, warning = kinds[kind]
            held = number // len(kinds) % 2 == 1
            run = Recorded(kind, number, "machine", held=held, critical=critical, warning=warning, generated=True)
            run.at = 0 if kind == "healthy" else at
            runs.append(run.take(records(kind, random.Random(number))))
    return runs


def _steady(step: int, level: float, draw: random.Random) -> rec.Step:
    """A step of about 2 s, told 2 s after the one before it, of a loss that sinks from `level`."""
    loss, norm = level * step**-0.1 * draw.lognormvariate(0, 0.03), draw.lognormvariate(0, 0.3)
    took = 2 * draw.lognormvariate(0, 0.05)
    return rec.Step(
        step=step, t=2.0 * step, loss=loss, grad_norm=norm, lr=1e-4, step_time=took, data_time=0.01, batch=8, seq_length=64
    )


def machine_records(kind: str, draw: random.Random) -> Iterator[rec.Record]:
    """The records of 400 steps of 2 s; the fault begins at step 200."""
    yield rec.Checkpoint(step=0, bytes=int(4e9), t=1.0)
    rss, level = 4e9 * draw.uniform(0.5, 2), draw.uniform(2, 5)
    for step in range(1, 401):
        t, over = 2.0 * step, max(0, step - 200)
        yield _steady(step, level, draw)
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


def room_records(kind: str, draw: random.Random) -> Iterator[rec.Record]:
    """The records of 400 steps of 2 s on a machine near its bounds: 95 to 97 % of host memory is used, 95 to 97.5 % of the
    device's, which has 84 to 88 °C.

    From step 200 on one of them goes beyond its bound and stays there: host memory is 98.5 to 99.5 % full within 16 steps, as
    by another program, the device's within 30; the device has 92 to 97 °C within 60. "near the bounds": none.
    """
    level, steady = draw.uniform(2, 5), (draw.uniform(0.953, 0.967), draw.uniform(0.952, 0.973), draw.uniform(85, 87))
    ends = {"memory low": (0.985, 0.995, 16), "device memory low": (0.985, 0.995, 30), "device hot": (92.0, 97.0, 60)}
    low, high, most = ends.get(kind, (0.0, 0.0, 1))
    end, takes = draw.uniform(low, high), draw.randint(1, most)
    for step in range(1, 401):
        yield _steady(step, level, draw)
        over = min(1.0, max(0, step - 200) / takes)
        used, filled, heat = (
            usual + (end - usual) * over * (fault == kind) + draw.uniform(-noise, noise)
            for fault, usual, noise in zip(ends, steady, (0.003, 0.002, 1.0), strict=True)
        )
        device = rec.Device(index=0, name="GPU", memory_used=int(filled * 80e9), memory_total=int(80e9), temperature=heat)
        memory = {"memory_used": int(used * 64e9), "memory_total": int(64e9), "rss": int(8e9)}
        yield rec.Hardware(t=2.0 * step, devices=[device], disk_free=int(100e9), disk_total=int(200e9), **memory)
