"""The steps at which a schedule of the learning rate turns, and the points that a curve of the loss needs: for those who follow
them and those who judge by them."""

from __future__ import annotations

from typing import Literal

LEAST_POINTS = 12  # that a curve is fitted to (`monitoring/scaling.py`)
LEAST_SPAN = 4.0  # tokens, or steps, of the last of them over those of the first


def warmup_of(warmup_steps: int | Literal["auto"], total_steps: int) -> int:
    """The last step of the warm-up: `auto` is 2 % of the steps, 2,000 at the most."""
    return min(2000, round(0.02 * total_steps)) if warmup_steps == "auto" else warmup_steps


def decay_start(total_steps: int, warmup: int, decay_ratio: float) -> int:
    """The last step of the flat part of WSD."""
    return max(warmup, total_steps - round(decay_ratio * total_steps))
