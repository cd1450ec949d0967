"""What the configuration screens say: findings, help of a field, differences, budget, as lines of (text, role)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lumina_engine.config.budget import count_text, flops_text, gb_text
from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding

from .form import INFOS, Change, Form
from .paint import duration
from .widgets.fields import SEVERITY_MARKS
from .widgets.text_panel import Line

_WORDS = {
    "default": "the default",
    "preset": "from the preset",
    "file": "from the file",
    "cli": "command line",
    "you": "set by you",
}


def count_words(findings: Iterable[Finding]) -> str:
    """`1 error, 2 warnings`, or `none`."""
    counts = dict.fromkeys(("error", "warning", "info"), 0)
    for finding in findings:
        counts[finding.severity] += 1
    parts = [f"{n} {word}" + ("s" if n > 1 and word != "info" else "") for word, n in counts.items() if n]
    return ", ".join(parts) or "none"


def finding_lines(findings: Sequence[Finding], current: int = -1) -> list[Line]:
    """One line per finding; the current one is marked."""
    lines: list[Line] = []
    for index, finding in enumerate(findings):
        mark, role = SEVERITY_MARKS[finding.severity]
        here = index == current
        lines.append(((">" if here else " ", "accent"), (f"{mark} ", role), (finding.line(), "title" if here else "text")))
    return lines


def worst_by_field(findings: Iterable[Finding]) -> dict[str, Finding]:
    """The worst finding of each field, shown below it: the first key of a finding is the one to change."""
    rank = {"error": 0, "warning": 1, "info": 2}
    found: dict[str, Finding] = {}
    for finding in sorted(findings, key=lambda f: rank[f.severity]):
        if finding.keys and finding.keys[0] in INFOS:
            found.setdefault(finding.keys[0], finding)
    return found


def help_title(name: str) -> str:
    """The field and what it may be."""
    info = INFOS[name]
    unit = f" ({info.unit})" if info.unit else ""
    return f"{name}: {info.requirement()}{unit}"


def help_lines(name: str) -> list[Line]:
    """What a field does."""
    return [((INFOS[name].help, "text"),)]


def help_foot(form: Form, name: str) -> str:
    """Where the value comes from, what the preset has, whether a resumed run may change it."""
    base = f"preset {show(form.reference(name))}" if form.preset else f"default {show(form.reference(name))}"
    resume = "may change on resume" if INFOS[name].resume_may_change else "fixed once started"
    return f"{_WORDS[form.origin(name)]}, {base}, {resume}"


def diff_lines(changes: Sequence[Change], base: str) -> list[Line]:
    """Every change as `name  before → after`."""
    if not changes:
        return [((f"nothing differs from {base}", "dim"),)]
    width = max(len(c.name) for c in changes)
    return [((f"{c.name:<{width}}  ", "text"), (c.before, "dim"), (" → ", "dim"), (c.after, "accent")) for c in changes]


def base_name(form: Form) -> str:
    """What changes are counted against."""
    return f"preset {form.preset}" if form.preset else "the defaults"


def budget_summary(figures: Mapping[str, Any]) -> list[Line]:
    """Two lines: size and memory, then steps, time and disk."""
    parameters, device, disk = figures["parameters"], figures["device"], figures["disk"]
    over = device["total"] > device["limit"]
    short = disk["available"] is not None and disk["total"] > disk["available"]
    free = "" if disk["available"] is None else f" of {gb_text(disk['available'])} free"
    first: Line = (
        (f"{count_text(parameters['total'])} total, {count_text(parameters['active'])} active  ", "text"),
        (f"{gb_text(device['total'])} of {gb_text(device['available'])} per rank  ", "bad" if over else "good"),
        (f"{figures['tokens_per_step']:,} tokens/step", "text"),
    )
    second: Line = (
        (f"disk {gb_text(disk['total'])}{free}  ", "bad" if short else "text"),
        (time_text(figures), "dim"),
    )
    return [first, second]


def budget_details(figures: Mapping[str, Any]) -> list[Line]:
    """All parts of the budget, one a line, with what is computed and what is guessed."""
    device, host, disk, resolved = figures["device"], figures["host"], figures["disk"], figures["resolved"]
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "buckets")
    memory = ", ".join(f"{part} {gb_text(device[part])}" for part in parts if device[part])
    rows = [
        (
            "devices",
            f"{resolved['devices']}, {resolved['world']} rank{'s' if resolved['world'] > 1 else ''}, {resolved['precision']}",
        ),
        ("ZeRO", f"{resolved['zero_stage']}: {resolved['zero_reason']}"),
        ("memory", f"{memory} (computed)"),
        ("host", f"{gb_text(host['total'])} of {gb_text(host['available'])}"),
        ("disk", f"{disk['checkpoints']} checkpoints of {gb_text(disk['checkpoint'])} (computed)"),
        ("compute", f"{flops_text(figures['flops_per_token'])} per token (computed)"),
        ("time", figures["time"]["basis"]),
    ]
    lines: list[Line] = [((f"{label:<9}", "dim"), (text, "text")) for label, text in rows]
    return lines + [(("advice   ", "warn"), (text, "text")) for text in figures["advice"]]


def time_text(figures: Mapping[str, Any]) -> str:
    """Steps and the guessed time, or that the length of the data is not known yet."""
    if figures["steps"] is None:
        return "steps unknown until the data is counted"
    low, high = (duration(figures["time"][key] * 3600) for key in ("p50_h", "p90_h"))
    return f"{figures['steps']:,} steps, {low} to {high} (guessed)"
