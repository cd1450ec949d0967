"""Lines about the machine and the ranks of a run: devices, host, where a step's time goes, heartbeats. No widget in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lumina_engine.monitoring.record import Device, Hardware

from .history import RECENT, History
from .paint import clean, duration, fit, size
from .ranks import Ranks
from .series import RunStore
from .widgets.sparkline import spark_values

Words = list[tuple[str, str]]  # text, role
HOT = 85.0  # degrees C
NEAR_LIMIT = 0.98  # of the power limit

# ---- the split of a step ------------------------------------------------------------------------------------------------

PARTS = (
    ("data_time", "data", "d", "warn"),
    ("forward_time", "forward", "f", "curve"),
    ("backward_time", "backward", "b", "raw"),
    ("optimizer_time", "optimizer", "o", "second"),
)
OTHER = ("other", "other", ".", "faint")


@dataclass(frozen=True)
class Part:
    """One part of a step: seconds, and its share of the whole."""

    name: str
    letter: str
    role: str
    seconds: float
    share: float


def step_split(history: History, count: int = RECENT) -> list[Part]:
    """Where the time of the newest steps went, on average; empty where nothing is known about it."""
    whole = history.mean("step_time", count)
    means = [history.mean(name, count) for name, *_ in PARTS]
    if not whole or whole <= 0 or all(mean is None for mean in means[1:]):
        return []
    known = [
        Part(title, letter, role, mean, mean / whole)
        for (_, title, letter, role), mean in zip(PARTS, means, strict=True)
        if mean is not None
    ]
    rest = max(0.0, whole - sum(part.seconds for part in known))
    _, title, letter, role = OTHER
    return [*known, Part(title, letter, role, rest, rest / whole)]


def split_bar(parts: Sequence[Part], width: int) -> Words:
    """A bar of `width` cells in which each part has its letter as often as it has a share; what is small still has one."""
    total = sum(part.share for part in parts)
    if width <= 0 or total <= 0:
        return []
    cells = [max(int(part.share > 0), round(part.share / total * width)) for part in parts]
    while sum(cells) > width and max(cells) > 0:
        cells[cells.index(max(cells))] -= 1
    cells[cells.index(max(cells))] += width - sum(cells)
    return [(part.letter * count, part.role) for part, count in zip(parts, cells, strict=True) if count]


SHORT = {"forward": "fwd", "backward": "bwd", "optimizer": "opt"}


def split_words(parts: Sequence[Part], width: int) -> Words:
    """The shares in words: `data 3 %  forward 31 % …`, shorter where there is no room, at last with the letters of the bar."""
    full = [(part.name, " %") for part in parts]
    short = [(SHORT.get(part.name, part.name), "" if part is not parts[-1] else " %") for part in parts]
    letters = [(part.letter, "") for part in parts]
    for names in (full, short, letters):
        words = [
            item
            for part, (name, unit) in zip(parts, names, strict=True)
            for item in ((f"{name} ", part.role), (f"{100 * part.share:.0f}{unit}  ", "text"))
        ]
        if sum(len(text) for text, _ in words) - 2 <= width:
            break
    return words


def split_help() -> list[Words]:
    """What the letters of the bar mean, for the help."""
    letters = [(letter, title, role) for _, title, letter, role in (*PARTS, OTHER)]
    words: Words = [("  ", "text")]
    for letter, title, role in letters:
        words += [(letter, role), (f" {title}   ", "text")]
    return [[("  A step's time, as the mean of the newest ones:", "text")], words]


# ---- devices and host ---------------------------------------------------------------------------------------------------


def hardware_lines(store: RunStore, width: int, ascii_only: bool, height: int, sparks: bool = False) -> list[Words]:
    """One line a device, then the host; the last devices are left out when there are too many."""
    now = store.hardware
    if now is None:
        return []
    host = host_lines(now, width)
    room = max(0, height - len(host))
    devices = now.devices if len(now.devices) <= room else now.devices[: max(0, room - 1)]
    lines = [device_words(device, store, width, ascii_only, sparks) for device in devices]
    if len(devices) < len(now.devices):
        lines.append([(f"and {len(now.devices) - len(devices)} more devices", "dim")])
    if sparks and not now.devices:
        for name, role in (("cpu", "curve"), ("memory", "raw")):
            if name in store.usage:
                bars = spark_values(store.usage[name], max(0, min(60, width - 5)), ascii_only, 0, 100)
                lines.append([(f"{name[:3]}  ", "dim"), (bars, role)])
    return [*host, *lines] if not now.devices else [*lines, *host]


def known(value: float | None, text: str) -> str:
    """A value in words, `-` if it is not known."""
    return text.format(value) if value is not None and math.isfinite(value) else "-"


def device_words(device: Device, store: RunStore, width: int, ascii_only: bool, sparks: bool) -> Words:
    """Utilisation, memory, power of its limit, temperature, link, and the utilisation so far as a sparkline."""
    used = "-"
    if device.memory_used is not None and device.memory_total:
        used = f"{device.memory_used / 1e9:.0f} of {device.memory_total / 1e9:.0f} GB"
    hot = device.temperature is not None and device.temperature >= HOT
    limited = device.power is not None and bool(device.power_limit) and device.power >= NEAR_LIMIT * (device.power_limit or 0)
    words: Words = [
        (f"gpu{device.index} ", "dim"),
        (fit(known(device.utilisation, "{:.0f} %"), 6, "right") + "  ", "text"),
        (fit(used, 12) + "  ", "text"),
        *_power(device, width, limited),
        (fit(known(device.temperature, "{:.0f} C"), 5, "right"), "bad" if hot else "text"),
    ]
    rest = width - sum(len(text) for text, _ in words)
    link = f"  link {size(device.link_rx)}/s in {size(device.link_tx)}/s out"
    if (device.link_rx is not None or device.link_tx is not None) and rest >= len(link) + (10 if sparks else 0):
        words.append((link, "dim"))
        rest -= len(link)
    if sparks and rest >= 8:
        usage = store.usage.get(f"gpu{device.index}", ())
        words.append(("  " + spark_values(usage, min(40, rest - 2), ascii_only, 0, 100), "curve"))
    return words


def _power(device: Device, width: int, limited: bool) -> Words:
    text = known(device.power, "{:.0f} W")
    if device.power is not None and device.power_limit and width >= 50:
        text = f"{device.power:.0f} of {device.power_limit:.0f} W"
        return [(fit(text, 12, "right") + " ", "warn" if limited else "text")]
    return [(fit(text, 6, "right") + " ", "text")]


def host_lines(now: Hardware, width: int) -> list[Words]:
    """The host in as many lines as it takes: CPU, memory, the run's own memory, disk, network."""
    memory = "-"
    if now.memory_used is not None and now.memory_total:
        memory = f"{now.memory_used / 1e9:.1f} of {now.memory_total / 1e9:.0f} GB"
    cores = f" of {now.cpu_count} cores" if now.cpu_count else ""
    network = ""
    if now.net_rx is not None or now.net_tx is not None:
        network = f"{size(now.net_rx)}/s in {size(now.net_tx)}/s out"
    parts: list[tuple[str, str]] = [
        ("cpu", known(now.cpu, "{:.0f} %") + cores),
        ("mem", memory),
        ("run", size(now.rss) if now.rss is not None else ""),
        ("disk", f"{size(now.disk_free)} free" if now.disk_free is not None else ""),
        ("net", network),
    ]
    lines: list[Words] = [[]]
    used = 0
    for label, text in parts:
        if not text:
            continue
        length = len(label) + len(text) + 3
        if used and used + length > width:
            lines.append([])
            used = 0
        lines[-1] += [(f"{label} ", "dim"), (text + "  ", "text")]
        used += length
    return lines


def device_title(now: Hardware | None) -> str:
    """What the devices are: `2 x NVIDIA H100`; empty without any."""
    if now is None or not now.devices:
        return ""
    names = {clean(device.name) for device in now.devices}
    return f"{len(now.devices)} x {names.pop()}" if len(names) == 1 else f"{len(now.devices)} devices"


# ---- ranks --------------------------------------------------------------------------------------------------------------


def rank_lines(ranks: Ranks, height: int) -> list[Words]:
    """A line a rank if they fit, else one for all and those that are late or dead; these first in either case."""
    if not ranks.beats or height <= 0:
        return []
    bad = [beat for beat in ranks.beats if ranks.trouble(beat) in ("DEAD", "LATE")]
    bad.sort(key=lambda beat: (ranks.trouble(beat) != "DEAD", -ranks.age(beat)))
    shown = [*bad, *(beat for beat in ranks.beats if beat not in bad)] if len(ranks.beats) <= height else bad[: height - 1]
    lines: list[Words] = [] if len(ranks.beats) <= height else [[(ranks.summary(), "text")]]
    for beat in shown:
        trouble = ranks.trouble(beat)
        role = "bad" if trouble == "DEAD" else "warn" if trouble == "LATE" else "text"
        lines.append([(f"rank {beat.rank:<2} ", "dim"), (f"{trouble} " if trouble else "", role), (ranks.words(beat), role)])
    return lines


def rank_warning(ranks: Ranks) -> str:
    """The rank that deserves a look, in a sentence; empty if none does."""
    worst = ranks.worst()
    if worst is None:
        return ""
    if ranks.trouble(worst) == "DEAD":
        return f"rank {worst.rank} {ranks.words(worst)}; the others wait for it"
    return f"rank {worst.rank} is {duration(ranks.age(worst))} in {worst.section} of step {worst.step or '-'}"
