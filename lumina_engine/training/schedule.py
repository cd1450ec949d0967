"""Learning-rate schedules: a pure function of the step, times a multiplier that run-time changes set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..config.steps import decay_start, warmup_of


@dataclass
class Schedule:
    """Warm-up, then cosine, WSD, linear or constant.

    Steps count from 1, and the rate of step 1 is never 0 (`peak / warmup_steps` while warming up, the peak where it is the only
    step). After `total_steps` the floor holds. WSD (warm-up, stable, decay) follows MiniCPM, arXiv:2404.06395, with a linear
    decay over the last `decay_ratio` of all steps. `multiplier` scales every rate; it is part of the saved state, so a change
    made at run time survives a restart. `factor` does so too: the rate controller's, which keeps it (`adaptive.py`).
    """

    kind: str
    peak: float
    total_steps: int
    warmup_steps: int
    min_lr_ratio: float
    decay_ratio: float
    multiplier: float = 1.0
    factor: float = 1.0
    chosen_at: int = 0  # step for which the multiplier was set, and what it was before
    replaced: float = 1.0

    @classmethod
    def from_config(cls, config: Any, total_steps: int) -> Schedule:
        """The schedule of a configuration; `warmup_steps: auto` becomes a number."""
        warmup = warmup_of(config.warmup_steps, total_steps)
        return cls(config.lr_schedule, config.learning_rate, total_steps, warmup, config.min_lr_ratio, config.decay_ratio)

    def shape(self, step: int) -> float:
        """The rate of `step` (from 1) as a share of the peak, without the multiplier."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if step == 1 == self.total_steps:  # all of the decay would fall on it
            return 1.0
        floor = self.min_lr_ratio
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            start = decay_start(self.total_steps, self.warmup_steps, self.decay_ratio)
            share = (step - start) / max(1, self.total_steps - start)
            return 1.0 - (1.0 - floor) * min(1.0, max(0.0, share))
        share = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        if self.kind == "cosine":
            return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share))
        if self.kind == "linear":
            return 1.0 - (1.0 - floor) * share
        raise ValueError(f"lr_schedule {self.kind!r}: must be cosine, wsd, linear or constant")

    def lr(self, step: int) -> float:
        """The learning rate of `step`, counted from 1."""
        return self.peak * self.shape(step) * self.multiplier * self.factor

    def set_lr(self, step: int, lr: float) -> float:
        """Choose the multiplier so that `step` has the rate `lr`; later steps keep the schedule's shape. Returns it."""
        self.factor = 1.0
        if step != self.chosen_at:  # of two choices for one step the second replaces the first
            self.chosen_at, self.replaced = step, self.multiplier
        self.multiplier = lr / (self.peak * self.shape(step))
        return self.multiplier

    def take_back(self, after: int) -> None:
        """Undo what was set for a later step than this. The checkpoint of a step may have what was set for the next one."""
        if self.chosen_at > after:
            self.multiplier, self.chosen_at = self.replaced, 0

    def state_dict(self) -> dict[str, float]:
        return {"multiplier": self.multiplier, "chosen_at": self.chosen_at, "replaced": self.replaced}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.multiplier = float(state["multiplier"])
        self.chosen_at, self.replaced = int(state.get("chosen_at", 0)), float(state.get("replaced", 1.0))
