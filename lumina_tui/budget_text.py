"""The budget of a run as lines: memory by component against what there is, steps, time, disk, and what would make it fit."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from lumina_engine.config.budget import count_text, flops_text, gb_text

from .paint import duration
from .widgets.text_panel import Line

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buckets", "working")
_LABEL = 13
_NAMES = {"working": "temporaries"}
_MOMENTS = {"loss": "in the loss", "backward": "in the backward pass", "update": "in the update"}


def verdict(figures: Mapping[str, Any]) -> tuple[str, str]:
    """In words whether the memory of a rank fits, and the role of the words."""
    device = figures["device"]
    if device["total"] > device["limit"]:
        return f"does not fit: {gb_text(device['limit'])} may be planned for", "bad"
    if device["total"] > 0.9 * device["limit"]:
        return f"fits tightly: {gb_text(device['limit'])} may be planned for", "warn"
    return "fits", "good"


def bar(part: float, whole: float, cells: int) -> str:
    """A bar of `cells` cells, full at `whole`; what is there but too small to see has one cell."""
    if whole <= 0 or cells <= 0:
        return ""
    full = min(cells, max(int(part > 0), round(cells * part / whole)))
    return "█" * full + "░" * (cells - full)


def summary_lines(figures: Mapping[str, Any], width: int) -> list[Line]:
    """Memory of a rank as a bar with the verdict; size, tokens per step and disk; steps and time."""
    parameters, device = figures["parameters"], figures["device"]
    word, role = verdict(figures)
    most = max(PARTS, key=lambda part: device[part])
    memory = f"{gb_text(device['total'])} of {gb_text(device['available'])} per rank: "
    tail = f", most {_NAMES.get(most, most)} {gb_text(device[most])}"
    room = width - len(memory) - len(word) - 1
    if room - len(tail) < 8:
        tail = ""
    first: Line = (
        (bar(device["total"], device["available"], min(30, room - len(tail))) + " ", role),
        (memory, "text"),
        (word, role),
        (tail, "dim"),
    )
    disk, disk_role = disk_text(figures)
    second: Line = (
        (f"{count_text(parameters['total'])} ({count_text(parameters['active'])} active), ", "text"),
        (f"{figures['tokens_per_step']:,} tokens/step, ", "text"),
        (f"disk {disk}", disk_role),
    )
    return [first, second, ((time_text(figures), "dim"),)]


def memory_lines(figures: Mapping[str, Any], width: int) -> list[Line]:
    """One bar per component against what one device has; the experts are a part of the weights.

    The components are not all there at once: the last bar is the highest moment of a step.
    """
    device = figures["device"]
    cells = max(4, min(40, width - _LABEL - 11))
    rows = [(_NAMES.get(name, name), device[name]) for name in PARTS]
    rows.insert(1, ("  experts", device["experts"]))
    lines: list[Line] = []
    for name, value in rows:
        role = "dim" if name.startswith(" ") else "text"
        lines.append(
            (
                (f"{name:<{_LABEL}}", role),
                (bar(value, device["available"], cells) + " ", "dim" if role == "dim" else "accent"),
                (f"{gb_text(value):>9}", role),
            )
        )
    word, role = verdict(figures)
    lines.append(
        (
            (f"{'at once':<{_LABEL}}", "title"),
            (bar(device["total"], device["available"], cells) + " ", role),
            (f"{gb_text(device['total']):>9}", role),
        )
    )
    place = f", most {_MOMENTS[device['moment']]}"
    return [*lines, ((f"{'':<{_LABEL}}of {gb_text(device['available'])}: ", "text"), (word, role), (place, "dim"))]


def detail_lines(figures: Mapping[str, Any], width: int) -> list[Line]:
    """All of the budget: bars, host, disk, steps, time with its source, the ZeRO stage with its reason, advice."""
    host, disk, resolved, basis = figures["host"], figures["disk"], figures["resolved"], figures["basis"]
    ranks = f"{resolved['world']} rank{'s' if resolved['world'] > 1 else ''}"
    rows = [
        ("devices", f"{resolved['devices']}, {ranks}, {resolved['precision']}", "text"),
        ("ZeRO", f"{resolved['zero_stage']}: {resolved['zero_reason']}", "text"),
        ("host", f"{gb_text(host['total'])} of {gb_text(host['available'])} (processes guessed)", _role(host)),
        *([("", f"saving a checkpoint {gb_text(host['saving'])}", "dim")] if host["saving"] else []),
        ("disk", f"{disk_text(figures)[0]} (computed)", disk_text(figures)[1]),
        ("", f"{_kept(disk)} of {gb_text(disk['checkpoint'])}", "dim"),
        ("tokens/step", f"{figures['tokens_per_step']:,} (computed)", "text"),
        ("steps", f"{_steps(figures)} ({basis['steps']})", "text"),
        *([] if figures["steps"] is None else [("time", time_text(figures), "text")]),
        ("time" if figures["steps"] is None else "", figures["time"]["basis"], "dim"),
        ("compute", f"{flops_text(figures['flops_per_token'])} per token (computed)", "text"),
        *_data_rows(figures, width),
    ]
    lines: list[Line] = memory_lines(figures, width)
    if figures["advice"]:
        lines.append((("what would make it fit:", "warn"),))
    lines += [((f"  {text}", "text"),) for text in figures["advice"]]
    return lines + [((f"{label:<{_LABEL}}", "dim"), (text, role)) for label, text, role in rows]


def _data_rows(figures: Mapping[str, Any], width: int) -> list[tuple[str, str, str]]:
    """What becomes of the data in rows, wrapped."""
    told = figures.get("data", {}).get("lines", [])
    lines = [row for text in told for row in textwrap.wrap(text, max(20, width - _LABEL))]
    return [("data" if number == 0 else "", text, "text") for number, text in enumerate(lines)]


def _kept(disk: Mapping[str, Any]) -> str:
    backups = f" and {disk['backups']} backups" if disk["backups"] else ""
    return f"{disk['checkpoints']} checkpoints{backups}"


def _steps(figures: Mapping[str, Any]) -> str:
    return "-" if figures["steps"] is None else f"{figures['steps']:,}"


def _role(part: Mapping[str, Any]) -> str:
    return "bad" if part["total"] > part["available"] else "text"


def disk_text(figures: Mapping[str, Any]) -> tuple[str, str]:
    """What the checkpoints and logs take of the free disk, and the role of it; unknown free space is left out."""
    disk = figures["disk"]
    if disk["available"] is None:
        return gb_text(disk["total"]), "text"
    short = disk["total"] > disk["available"]
    text = f"{gb_text(disk['total'])} of {gb_text(disk['available'])} free"
    return (f"{gb_text(disk['total'])} > {gb_text(disk['available'])} free", "bad") if short else (text, "text")


def time_text(figures: Mapping[str, Any]) -> str:
    """Steps and time with its source, or that the length of the data is not known yet."""
    source = figures["basis"]["time"]
    if figures["steps"] is None:
        return "steps and time unknown: max_steps is null, the data is counted at the start"
    steps, (low, high) = figures["steps"], (figures["time"][key] * 3600 for key in ("p50_h", "p90_h"))
    span = f"{duration(low)} to {duration(high)}" if high >= 1 else "less than 1 s"
    return f"{steps:,} step{'s' if steps != 1 else ''}, {span} ({source})"
