"""Loss scaling for fp16: the loss is multiplied, so that small gradients do not round to zero, and the gradients divided.

The rule of Micikevicius et al., arXiv:1710.03740: a step whose gradient overflows is skipped and halves the scale; after
`WINDOW` steps without one the scale doubles.
"""

from __future__ import annotations

from dataclasses import dataclass

POWER = 16  # the scale begins at 2 to this power
WINDOW = 1000
LEAST = 0.5  # below 1 it is not the scale that is to blame
MOST = 2.0**24


@dataclass
class LossScale:
    """The scale in force and the steps since it last changed."""

    value: float = 2.0**POWER
    good: int = 0

    def update(self, overflow: bool) -> bool:
        """Take note of a step; whether an overflow lowered the scale. At the least scale it does not: the values are broken."""
        before = self.value
        if overflow:
            self.value, self.good = max(LEAST, self.value / 2), 0
            return self.value < before
        self.good += 1
        if self.good >= WINDOW:
            self.value, self.good = min(MOST, self.value * 2), 0
        return False

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good": self.good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.good = float(state["value"]), int(state["good"])
