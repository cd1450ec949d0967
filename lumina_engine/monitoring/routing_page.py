"""The part of a report's page about the use of experts: what tells an expert, what each one serves, who works with whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .html import Markup, table, tag

_NAMES = {"token": "the token", "position": "its position", "task": "its task", "layer_before": "its expert one layer before"}


def sections(moe: Mapping[str, Any]) -> Iterable[Markup]:
    """The sections for the entry `moe` of a report document."""
    found = moe.get("specialisation")
    if not found:
        return
    yield tag("h2", f"What experts specialise in ({moe['checkpoint']}, {found['tokens']:,} tokens of {moe['rows']} rows)")
    yield tag(
        "p",
        "Mutual information of a token's property with the choice of its expert, less what chance gives, in bits and as share "
        "of the choice's entropy.",
        class_="dim",
    )
    yield table(("layer", "told by", "bits", "share", "by chance"), told_rows(found), right=(0, 2, 3, 4))
    for layer in found["layers"]:
        yield tag("h2", f"Experts of layer {layer['layer']}")
        yield tag(
            "div",
            table(
                ("expert", "share", "median position", "tokens far above their base rate", "tasks"),
                [
                    (
                        str(row["expert"]),
                        f"{100 * row['share']:.1f} %",
                        _figure(row["median_position"]),
                        _tokens(row),
                        _tasks(row),
                    )
                    for row in layer["experts"]
                ],
                right=(0, 1, 2),
            ),
            class_="wide",
        )
        if layer["pairs"]:
            rows = [(" and ".join(map(str, p["experts"])), f"{p['count']:,}", f"{p['lift']:.2f}") for p in layer["pairs"]]
            yield tag("p", "Experts that serve the same tokens, against what their loads give:")
            yield table(("experts", "tokens", "times expected"), rows, right=(1, 2))
    yield from _kept(moe.get("kept_experts"))


def told_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Layer, property, bits, share and chance as text."""
    return [
        (str(layer["layer"]), _NAMES[name], f"{t['bits']:.3f}", f"{100 * t['share']:.1f} %", f"{t['chance']:.3f}")
        for layer in found["layers"]
        for name, t in layer["told_by"].items()
    ]


def _kept(kept: Mapping[str, Any] | None) -> Iterable[Markup]:
    if not kept:
        return
    yield tag("h2", f"Tokens that keep their experts from {kept['from']} to {kept['to']}")
    rows = [
        (str(layer), *(f"{100 * kept[name][i]:.1f} %" for name in ("same", "overlap", "chance")))
        for i, layer in enumerate(kept["layers"])
    ]
    yield table(("layer", "all the same", "mean part that stayed", "part by chance"), rows, right=(0, 1, 2, 3))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _tokens(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{item['text']!r} x{item['lift']:.1f} ({item['count']})" for item in row["top_tokens"]) or "-"


def _tasks(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} x{lift:.2f}" for name, lift in row.get("task_lift", {}).items() if lift is not None) or "-"
