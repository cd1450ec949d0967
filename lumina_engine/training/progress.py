"""Where a run is, and how it leaves its loop."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a run must go back: steps `first` to `last` were bad. Not `fatal`: without a checkpoint from before it goes on."""

    first: int
    last: int
    reason: str
    fatal: bool = True


class Stop(Exception):
    """The run ends at this boundary. `state` and `exit_code` as in the table of exit codes."""

    def __init__(self, state: str, exit_code: int, reason: str, *, save: bool = True, id: str | None = None) -> None:
        super().__init__(reason)
        self.state, self.exit_code, self.reason, self.save, self.id = state, exit_code, reason, save, id


@dataclass
class Progress:
    """Where training is: everything global that a resumed run needs besides tensors."""

    step: int = 0
    epoch: int = 0
    index: int = 0  # next row of the epoch's row order
    tokens: int = 0
    samples: int = 0  # full rows processed
    skipped: int = 0
    nonfinite_in_row: int = 0
    eval_batch: int = 0  # rows that count as one batch of evaluation, so that figures compare whatever the micro batch
    best: float | None = None  # best evaluation (or training) loss
    evals_since_best: int = 0
    wall_seconds: float = 0.0
    last_eval: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Progress:
        return cls(**{name: state[name] for name in cls.__dataclass_fields__ if name in state})
