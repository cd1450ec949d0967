"""The guard of a step: what is not finite or far from its recent values is told, and left out where the policy says so.

The deviation of a value x is z = (ln x − median) / (1.4826 · MAD) over the last finite values of the same quantity; 1.4826
makes the median absolute deviation a standard deviation of normal values. Median and MAD, since one wild value moves neither.
Where the loss falls steeply the window is wide from the fall itself, and a bad batch would hide in it: so z is also half the
deviation from the median of the newest 32 in units of the noise, which successive differences give without the trend (Rice
1984). Half, since the noise of small batches is not normal: in 68 healthy runs it reached 7.8, bad batches began at 16.
Only upward deviations count. Non-finite values never enter the window: with a mean and a deviation over it, one NaN would make
every step skip until it has left.

A loss beyond `spike_sigma` deviations is a spike. A gradient norm beyond them is one only if the loss stands out with it (by
half as many deviations), or if it is a hundred times its median. Gradient norms have a heavy upper tail: where a model suddenly
learns something, single norms of healthy runs are 3.4 times their median, 8 deviations of the other values (and 9 by their mean
and standard deviation, the rule of OLMo-core), while the loss falls; with batches of two short rows they are 13 times it. Such
a step does no harm: clipping, and Adam's division by the root of the second moment, bound an update however long its gradient.
What is harmful, a bad batch or broken weights, shows in the loss as well, or is of another order of magnitude.

Losses and gradients of another shape of the global batch do not compare: where a curriculum lengthens the rows, the loss may
step up for good, and that is no spike. With another shape the windows begin anew.

The decision is a pure function of saved numbers and of figures that are the same on every rank, so all ranks decide alike and
a resumed run decides as the unbroken one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_VALUES = 32  # before that there is no spread to speak of
MOST_LEFT_OUT = 3  # steps of one episode: a bad batch is over by then, and a bad state of the model does not pass by waiting
LEAST_SPREAD = 0.01  # of ln x: a flat window makes no spike of a value one percent above it
WITH_LOSS = 0.5  # of spike_sigma: a loss that is so far out makes a spike of a gradient norm beyond spike_sigma
ALONE = 100.0  # times its median: a gradient norm that is a spike whatever the loss says
STEEP = 2.0  # times spike_sigma: how far out a value is a spike by the level and noise of the newest values alone
_TINY = 1e-30
QUANTITIES = {"loss": "loss", "grad_norm": "gradient norm"}


@dataclass(frozen=True, slots=True)
class Spike:
    """A value `sigmas` deviations above its window. `first`: it opens the episode."""

    quantity: str
    value: float
    sigmas: float
    first: bool = False

    @property
    def words(self) -> str:
        return f"{QUANTITIES[self.quantity]} {self.value:.4g} is {self.sigmas:.1f} sigma above its recent median"


def deviation(window: deque[float], value: float) -> tuple[float, float]:
    """z of `value` (> 0) against a window of logarithms, and its ratio to the median; (0, 1) while the window is short."""
    if len(window) < LEAST_VALUES:
        return 0.0, 1.0
    logs = np.fromiter(window, dtype=np.float64, count=len(window))
    median, log = float(np.median(logs)), math.log(max(value, _TINY))
    spread = max(1.4826 * float(np.median(np.abs(logs - median))), LEAST_SPREAD)
    noise = max(1.4826 / math.sqrt(2) * float(np.median(np.abs(np.diff(logs)))), LEAST_SPREAD)
    steep = (log - float(np.median(logs[-LEAST_VALUES:]))) / noise / STEEP
    return max((log - median) / spread, steep), math.exp(min(log - median, 700.0))


class StepGuard:
    """Watches loss and gradient norm of each step.

    Args:
        config: reads spike_sigma, spike_window, spike_recover_steps, spike_policy.

    `open_since` is the step whose spike opened the present episode, None in calm; it closes after `spike_recover_steps` values
    inside the bound. Every finite value enters the window, so the median follows a new level.
    """

    def __init__(self, config: Any) -> None:
        self.sigma = float(config.spike_sigma)
        self.recover = int(config.spike_recover_steps)
        self.policy = str(config.spike_policy)
        self.windows = {name: deque[float](maxlen=int(config.spike_window)) for name in QUANTITIES}
        self.shape: tuple[int, int] | None = None  # rows of the global batch and tokens of a row that the windows are of
        self.open_since: int | None = None
        self.calm = 0  # values inside the bound since the last spike of the episode
        self.left_out = 0  # steps of the episode that were not applied

    def meet(self, rows: int, length: int) -> None:
        """Take note of the shape of the step that comes: `rows` of the global batch, of `length` tokens. Before `allows`."""
        if self.shape is not None and self.shape != (rows, length):
            for window in self.windows.values():
                window.clear()
        self.shape = rows, length

    def spike(self, loss: float, grad_norm: float) -> Spike | None:
        """The larger deviation that counts as a spike, if any; None for what is not finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return None
        of_loss, _ = deviation(self.windows["loss"], loss)
        of_norm, ratio = deviation(self.windows["grad_norm"], grad_norm)
        found = []
        if of_loss > self.sigma:
            found.append(Spike("loss", loss, of_loss))
        if of_norm > self.sigma and (ratio >= ALONE or of_loss > WITH_LOSS * self.sigma):
            found.append(Spike("grad_norm", grad_norm, of_norm))
        return max(found, key=lambda spike: spike.sigmas, default=None)

    def allows(self, loss: float, grad_norm: float) -> bool:
        """Whether a step with these figures may change parameters. Asked before the update; changes nothing here."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        return self.policy == "alert" or self.left_out >= MOST_LEFT_OUT or self.spike(loss, grad_norm) is None

    def observe(self, step: int, loss: float, grad_norm: float, applied: bool) -> Spike | None:
        """Take note of a step that is over. Returns its spike; a step that is not finite leaves everything as it was."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return None
        spike = self.spike(loss, grad_norm)
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            self.windows[name].append(math.log(max(value, _TINY)))
        if spike is not None:
            spike = Spike(spike.quantity, spike.value, spike.sigmas, first=self.open_since is None)
            self.open_since = step if spike.first else self.open_since
            self.calm = 0
            self.left_out += not applied
        elif self.open_since is not None:
            self.calm += 1
            if self.calm >= self.recover:
                self.open_since, self.calm, self.left_out = None, 0, 0
        return spike

    def state_dict(self) -> dict[str, Any]:
        windows = {name: list(window) for name, window in self.windows.items()}
        counts = {"open_since": self.open_since, "calm": self.calm, "left_out": self.left_out}
        return {"windows": windows, "shape": None if self.shape is None else list(self.shape), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, window in self.windows.items():
            window.clear()
            window.extend(state["windows"][name])
        shape = state.get("shape")  # not in a checkpoint of an earlier version
        self.shape = None if shape is None else (int(shape[0]), int(shape[1]))
        self.open_since, self.calm, self.left_out = state["open_since"], state["calm"], state["left_out"]
