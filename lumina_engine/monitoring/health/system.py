"""Detectors over speed, data, machine and experts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

from .. import record as rec
from .detector import Detector, Sign
from .windows import Windows

HOUR = 3_600.0
LEAST = 32  # hardware records: half of what a trend is taken from


class Throughput(Detector):
    """Median tokens/s of 32 steps below a third of the 256 before at one batch shape (from 64 on). Closed above 0.8."""

    codes = ("throughput_drop",)
    types = (rec.Step,)

    def look(self, seen: Windows) -> Iterator[Sign]:
        speed = seen.speed
        if not speed.known or seen.steps % 4 or len(speed.recent) < 32:
            return
        share = math.exp(median(speed.recent) - speed.middle)
        if share < 1 / 3:
            words = f"step {seen.step}: {share:.0%} of the usual tokens/s over 32 steps at the same batch"
            advice = "look at the machine with `lumina-engine doctor`: another program, heat, or a slow disk (num_workers=4)"
            yield Sign("throughput_drop", True, "warning", words, advice)
        elif share > 0.8:
            yield Sign("throughput_drop", False)


class LoaderWait(Detector):
    """Median share of a step that waits for data over 64 steps (from 32 on) above 30 %. Closed below 15 %."""

    codes = ("loader_wait",)
    types = (rec.Step,)

    def look(self, seen: Windows) -> Iterator[Sign]:
        if len(seen.waiting) < 32 or seen.steps % 8:
            return
        share = median(seen.waiting)
        if share > 0.3:
            words = f"step {seen.step}: steps wait for data {share:.0%} of their time"
            yield Sign(
                "loader_wait", True, "warning", words, "set num_workers=4 and prefetch_batches=4, or prepare the data first"
            )
        elif share < 0.15:
            yield Sign("loader_wait", False)


class Memory(Detector):
    """Room left in host and device memory, and growth of the run's own.

    Critical below 2 % of free host memory, a warning below that on a device; closed above 5 %. What a driver tells as used has
    in it what PyTorch's allocator keeps to hand out again, often nearly all of a device that does well.

    A leak: over the last 64 hardware records (after 32 of this start), cut into eight parts, resident memory rises from each
    part to the next by 1 % or more, none less than 0.3 of the largest rise (what a run takes while it warms up grows ever more
    slowly), and at that pace fills the machine within 4 hours. Closed by eight parts that rise by less than 1 % in all.
    """

    codes = ("memory_low", "device_memory_low", "memory_growth")
    types = (rec.Hardware,)

    def look(self, seen: Windows) -> Iterator[Sign]:
        hardware = seen.hardware
        if hardware is None:
            return
        smaller = "a smaller micro batch: batch_size=1 with more gradient_accumulation_steps, or gradient_checkpointing=true"
        free = headroom(hardware)
        if free is not None and free < 0.02:
            yield Sign("memory_low", True, "critical", f"step {seen.step}: {free:.1%} of memory is free", smaller)
        elif free is not None and free > 0.05:
            yield Sign("memory_low", False)
        index, free = fullest_device(hardware)
        if free is not None and free < 0.02:
            words = f"step {seen.step}: {free:.1%} of the memory of device {index} is free by its driver"
            held = f"{words}; what the run's allocator keeps to hand out again counts as used"
            yield Sign("device_memory_low", True, "warning", held, f"harmless by itself; after an out-of-memory {smaller}")
        elif free is not None and free > 0.05:
            yield Sign("device_memory_low", False)
        yield from self._growth(seen, hardware)

    def _growth(self, seen: Windows, hardware: rec.Hardware) -> Iterator[Sign]:
        rss = list(seen.rss)[LEAST:]
        if len(rss) < 2 * LEAST or not hardware.memory_total:
            return
        parts = parts_of(rss, 8)
        if parts[-1] <= parts[0] * 1.01:
            yield Sign("memory_growth", False)
        rises = [b - a for a, b in pairwise(parts)]
        span = rss[-1][0] - rss[0][0]
        if min(rises) < 0.01 * parts[0] or min(rises) < 0.3 * max(rises) or span <= 0:
            return
        pace = (parts[-1] - parts[0]) / (span * 7 / 8)
        left = (hardware.memory_total - seen.rss[-1][1]) / pace
        if left < 4 * HOUR:
            hours = f"{pace * HOUR / 1e9:.2g} GB/h and fills the machine in {left / HOUR:.1f} h"
            advice = "save often (save_interval=100); num_workers=0 shows whether it is the loaders"
            yield Sign("memory_growth", True, "warning", f"step {seen.step}: the run's memory grows by {hours}", advice)


class Disk(Detector):
    """Room for two checkpoints (warning) or for one (critical), by the size of the last; closed with room for three.

    A disk that fills (warning): over 64 points, 20 s or more apart, cut into eight parts, free room falls from each part to the
    next by 1 % or more, none less than 0.3 of the largest fall, and at that pace is gone within 4 hours. What falls and rises
    while the run saves is left out: its checkpoints come and go. Closed by eight parts that fall by less than 1 % in all.
    """

    codes = ("disk_full", "disk_low")
    types = (rec.Hardware, rec.Checkpoint)

    def look(self, seen: Windows) -> Iterator[Sign]:
        free = seen.hardware.disk_free if seen.hardware is not None else None
        if free is None:
            return
        size = seen.checkpoint_bytes or 0  # 0: none was saved, and room for none is asked for
        pace = _filling(seen)
        room = f"step {seen.step}: {free / 1e9:.3g} GB free on the run's disk"
        advice = "free some room, or keep fewer: keep_checkpoints=2, checkpoint_compression=zstd"
        if free < 2.2 * size:
            code, severity = ("disk_full", "critical") if free < 1.1 * size else ("disk_low", "warning")
            yield Sign(code, True, severity, f"{room}, a checkpoint takes {size / 1e9:.3g} GB", advice)  # type: ignore[arg-type]
        elif pace and free < 4 * HOUR * pace:
            words = f"{room}, less by {pace * HOUR / 1e9:.3g} GB/h beside its saves: full in {free / pace / HOUR:.1f} h"
            yield Sign("disk_low", True, "warning", words, f"find out what else writes there, {advice}")
        if free > 3.3 * size:
            yield Sign("disk_full", False)
            if pace == 0:
                yield Sign("disk_low", False)


def _filling(seen: Windows) -> float | None:
    """Bytes/s by which free room falls beside the run's saves; 0 if it does not, or too little is known; None if unsure."""
    points = _beside_saves(seen.disk, 2 * LEAST)
    if len(points) < 2 * LEAST:
        return 0.0
    parts = parts_of(points, 8)
    if parts[-1] >= 0.99 * parts[0]:
        return 0.0
    falls = [a - b for a, b in pairwise(parts)]
    if min(falls) < 0.01 * parts[0] or min(falls) < 0.3 * max(falls):
        return None
    times = parts_of([(t, t) for t, _ in points], 8)
    return (parts[0] - parts[-1]) / (times[-1] - times[0])


def _beside_saves(disk: Sequence[tuple[float, float, bool]], most: int) -> list[tuple[float, float]]:
    """The newest `most` points (s up to the newest, free bytes) as they were without the time, and the change, of saves."""
    if not disk:
        return []
    found = [(0.0, disk[-1][1])]
    for place in range(len(disk) - 1, 0, -1):
        (before, was, _), (t, free, saving) = disk[place - 1], disk[place]
        if not saving and t > before:
            found.append((found[-1][0] - (t - before), found[-1][1] + was - free))
        if len(found) == most:
            break
    return found[::-1]


class Devices(Detector):
    """A device that is gone (critical), or at 90 °C or more (warning; closed below 85)."""

    codes = ("device_lost", "device_hot")
    types = (rec.Hardware,)

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._inc = 0

    def look(self, seen: Windows) -> Iterator[Sign]:
        if seen.hardware is None:
            return
        there = {device.index for device in seen.hardware.devices}
        if seen.inc != self._inc:
            self._known, self._inc = there, seen.inc
        gone = sorted(self._known - there)
        self._known |= there
        if gone:
            words = f"step {seen.step}: device {', '.join(map(str, gone))} does not answer any more"
            yield Sign(
                "device_lost", True, "critical", words, "look at it with `lumina-engine doctor`; go on with fewer: num_gpus=1"
            )
        else:
            yield Sign("device_lost", False)
        heat = max((device.temperature or 0.0 for device in seen.hardware.devices), default=0.0)
        if heat >= 90:
            yield Sign(
                "device_hot", True, "warning", f"step {seen.step}: a device is at {heat:.0f} °C and slows down", "cool it"
            )
        elif heat < 85:
            yield Sign("device_hot", False)


class Routing(Detector):
    """Which experts get tokens, by layer.

    Collapse (critical, from step 64 on): a layer works with no more than 1.25 experts, measured by exp(entropy of the load),
    or half of its experts get no token. Warnings, from step 200 on (before, a router finds its way) and in 5 records in a row:
    dead experts, an expert with more than 4 times its share, more than 30 % of choices dropped. Closed by one record inside
    half of the bound.
    """

    codes = ("routing_collapse", "dead_experts", "hot_expert", "dropped_tokens")
    types = (rec.Experts,)

    def __init__(self) -> None:
        self._row: dict[tuple[str, int], int] = {}  # code, first layer of the line (a long record is several) -> lines in a row

    def look(self, seen: Windows) -> Iterator[Sign]:
        experts = seen.experts
        if experts is None or experts.step < LEAST_STEP or not experts.load:
            return
        count = max(len(load) for load in experts.load)
        if count < 2:
            return
        used = min((math.exp(e * math.log(count)) for e in experts.entropy if math.isfinite(e)), default=math.nan)
        dead = max(experts.dead, default=0)
        hot = max((i for i in experts.imbalance if math.isfinite(i)), default=0.0)
        dropped = max((d for d in experts.dropped if math.isfinite(d)), default=0.0)
        rebalance = "set load_balancing_weight=0.02 or router_bias_rate=0.001"
        found = (
            ("routing_collapse", used < COLLAPSED or 2 * dead >= count, used > 1.5 * COLLAPSED and 4 * dead < count, "critical",
             f"a layer works with {used:.1f} of {count} experts, {dead} get no token",
             f"go back to an earlier checkpoint; {rebalance}"),
            ("dead_experts", dead > 0, dead == 0, "warning", f"{dead} of {count} experts of a layer get no token", rebalance),
            ("hot_expert", hot > HOT, hot < HOT / 2, "warning", f"an expert gets {hot:.1f} times its share", rebalance),
            ("dropped_tokens", dropped > DROPPED, dropped < DROPPED / 2, "warning",
             f"{dropped:.0%} of a layer's choices are dropped", f"set capacity_factor=2.0, or {rebalance}"),
        )  # fmt: skip
        for code, bad, well, severity, words, advice in found:
            place = code, experts.layers[0] if experts.layers else 0
            self._row[place] = self._row.get(place, 0) + 1 if bad and (severity == "critical" or experts.step >= SETTLED) else 0
            if self._row[place] >= (1 if severity == "critical" else LASTING):
                yield Sign(code, True, severity, f"step {experts.step}: {words}", advice)  # type: ignore[arg-type]
            elif well and not any(count for (of, _), count in self._row.items() if of == code):
                yield Sign(code, False)


COLLAPSED = 1.25  # experts
LASTING = 5  # records in a row
LEAST_STEP, SETTLED = 64, 200
HOT = 4.0  # times the mean
DROPPED = 0.3


def headroom(hardware: rec.Hardware) -> float | None:
    """The free share of host memory, None if unknown."""
    used, total = hardware.memory_used, hardware.memory_total
    return 1 - used / total if used is not None and total else None


def fullest_device(hardware: rec.Hardware) -> tuple[int, float | None]:
    """The device with the smallest free share of memory, and that share; None if no device tells."""
    told = [(device.index, device.memory_used, device.memory_total) for device in hardware.devices]
    shares = [(1 - used / total, index) for index, used, total in told if used is not None and total]
    free, index = min(shares, default=(None, 0))
    return index, free


def parts_of(series: Sequence[tuple[float, float]], count: int) -> list[float]:
    """Medians of the values of `count` consecutive parts."""
    values = [value for _, value in series]
    size = len(values) / count
    return [median(values[int(i * size) : int((i + 1) * size)]) for i in range(count)]
