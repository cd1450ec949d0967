"""Records of experts taken apart: one object for each layer, for reports and for the screen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
