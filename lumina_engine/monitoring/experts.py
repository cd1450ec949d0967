"""Records of experts: taken apart, one object for each layer, for reports and for the screen; and put together again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from . import record as rec


@dataclass
class LayerLoad:
    """Routing of one expert layer as of `step`: load per expert in tokens, and the figures of its record; None if unknown."""

    step: int
    load: list[float]
    imbalance: float | None = None
    entropy: float | None = None
    dead: int | None = None
    dropped: float | None = None
    bias_range: float | None = None
    confidence: float | None = None


_FIGURES = ("imbalance", "entropy", "dead", "dropped", "bias_range", "confidence")


def layers_of(record: rec.Experts) -> Iterator[tuple[int, LayerLoad]]:
    """The layers of a record by their index in the model; what its lists do not reach is unknown."""
    for place, load in enumerate(record.load):
        figures: dict[str, Any] = {name: values[place] for name in _FIGURES if place < len(values := getattr(record, name))}
        yield (record.layers[place] if place < len(record.layers) else place), LayerLoad(record.step, load, **figures)


def joined(first: rec.Experts, second: rec.Experts) -> rec.Experts:
    """One record of two parts of it: a line that would be too long is split by layer."""
    lists = {name: value for name, value in msgspec.structs.asdict(first).items() if isinstance(value, list)}
    return msgspec.structs.replace(first, **{name: value + getattr(second, name) for name, value in lists.items()})
