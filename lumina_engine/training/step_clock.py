"""Where the time of a step goes, without ever waiting for the device.

On the CPU the wall clock tells. On a GPU kernels run behind it, so events are put into the device's stream and read once they
have passed. A step reads its gradient norm before it updates, which is when everything up to the backward pass has passed;
its optimizer's kernels have not. They run at the beginning of the next step's time, and are counted there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..config.budget import device_peak
from ..config.counts import training_flops_per_token

PARTS = ("forward", "backward", "optimizer")


class Stamp(Protocol):
    """A moment; `torch.cuda.Event` is one."""

    def query(self) -> bool: ...
    def elapsed_time(self, end: Any) -> float: ...


class WallStamp:
    """Now, by the wall clock."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        """Whether it has passed: always."""
        return True

    def elapsed_time(self, end: WallStamp) -> float:
        """Milliseconds up to a later moment."""
        return 1000 * (end.at - self.at)


def _event() -> Stamp:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class StepClock:
    """Times the parts of each step: `start(part)` ends the part before, `stop()` the last one, `times()` ends the step.

    Args:
        device: where the kernels run.
        stamp: makes a moment; chosen by the device when absent.
    """

    def __init__(self, device: torch.device, stamp: Callable[[], Stamp] | None = None) -> None:
        self.behind = device.type == "cuda"  # kernels run behind the wall clock
        self._stamp = stamp or (_event if self.behind else WallStamp)
        self._spans: dict[str, list[tuple[Stamp, Stamp]]] = {}
        self._open: tuple[str, Stamp] | None = None
        self._update: list[tuple[Stamp, Stamp]] = []  # the optimizer's of the step before, where kernels run behind

    def start(self, part: str) -> None:
        """A part of the step begins."""
        stamp = self.stop()
        self._open = (part, stamp)

    def stop(self) -> Stamp:
        """The part that runs ends here; the moment."""
        stamp = self._stamp()
        if self._open is not None:
            part, since = self._open
            self._spans.setdefault(part, []).append((since, stamp))
            self._open = None
        return stamp

    def times(self) -> dict[str, float | None]:
        """Seconds of each part; None where they are not known yet. The next step begins."""
        self.stop()
        spans, self._spans = self._spans, {}
        if self.behind:
            spans["optimizer"], self._update = self._update, spans.get("optimizer", [])
        return {part: _seconds(spans.get(part, [])) for part in PARTS}


def _seconds(spans: list[tuple[Stamp, Stamp]]) -> float | None:
    if not spans or not all(end.query() for _, end in spans):
        return None
    return sum(begin.elapsed_time(end) for begin, end in spans) / 1000


class Utilisation:
    """Model FLOPs utilisation: the operations that the model needs, as a share of what the devices can do.

    Unknown on a CPU, on devices whose peak is not known, and in fp32, for which the table of peaks does not hold.

    Args:
        shape: the model's config.
        precision: as in the config.
        device: of this rank; all ranks are taken to have the same.
        world: number of ranks.
    """

    def __init__(self, shape: Any, precision: str, device: torch.device, world: int) -> None:
        self._peak: float | None = None
        if device.type == "cuda" and precision != "fp32":
            peak = device_peak(torch.cuda.get_device_name(device))
            self._peak = peak * world if peak is not None else None
        # what is computed twice to save memory is no use
        self._shape = shape.model_copy(update={"gradient_checkpointing": False})

    def flops_per_token(self, seq_length: int) -> float:
        """Operations of forward and backward for one token of a row of `seq_length`."""
        return training_flops_per_token(self._shape, seq_length)

    def of(self, tokens_per_s: float, seq_length: int) -> float | None:
        """The share, 0-1, at rows of `seq_length` tokens; None if unknown."""
        return None if self._peak is None else tokens_per_s * self.flops_per_token(seq_length) / self._peak
