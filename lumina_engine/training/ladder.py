"""`dynamic_precision`: a run whose steps keep being not finite goes on in a wider precision for a while.

The state is a few integers, saved in checkpoints: the same steps give the same decisions, across restarts too. It never acts
on a step that is finite, and leaves single ones to the rule that skips them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

WINDOW, MOST_SKIPPED = 100, 5  # skipped steps in that many steps are trouble
LEAST_SCALE = 1.0  # a loss scale below this is trouble too: gradients overflow without being scaled up
HOLD = 500  # steps in the wider precision before going back
MOST_RETURNS = 2  # after that many the run stays in the wider precision


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 itself, not through another type."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(_CPU_BF16 & cpu_flags())


_CPU_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def cpu_flags() -> set[str]:
    """What this CPU can do, in the kernel's words."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
            line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return set()
    return set(line.partition(":")[2].split())


def wider(name: str, has_bf16: bool) -> str | None:
    """The next rung: from fp16 to bf16 where it is native, else to fp32; from bf16 to fp32; None from fp32."""
    if name == "fp32":
        return None
    if has_bf16 and name.endswith("fp16"):
        return name.replace("fp16", "bf16")
    return "fp32"


def by_autocast(name: str) -> bool:
    """Whether weights and optimizer are in fp32, so that only the arithmetic differs from other such modes."""
    return name == "fp32" or name.startswith("mixed_")


@dataclass(frozen=True)
class Switch:
    """A decision: `precision` from the next step on."""

    precision: str
    reason: str


@dataclass
class PrecisionLadder:
    """Where a run stands. `home` is the configured precision, `current` the one in force since step `since`."""

    home: str
    has_bf16: bool
    current: str = ""
    since: int = 0
    returns: int = 0
    skipped: list[int] = field(default_factory=list)
    hold: int = HOLD

    def __post_init__(self) -> None:
        self.current = self.current or self.home

    def observe(self, step: int, applied: bool, scale: float | None = None, hopeless: bool = False) -> Switch | None:
        """Take note of a step; what to change after it.

        Args:
            applied: whether the step was finite and changed the weights.
            scale: the loss scale of fp16.
            hopeless: so many steps in a row were skipped that the run would end.
        """
        self.skipped = [s for s in self.skipped if s > step - WINDOW] + ([] if applied else [step])
        reason = ""
        if scale is not None and scale < LEAST_SCALE:
            reason = f"the loss scale fell to {scale:g}"
        elif hopeless or len(self.skipped) >= MOST_SKIPPED:
            reason = f"{len(self.skipped)} of the last {WINDOW} steps were not finite"
        if reason and (target := wider(self.current, self.has_bf16)) is not None:
            return self._switch(step, target, reason)
        if self.current != self.home and self.returns < MOST_RETURNS and step - self.since >= self.hold:
            self.returns += 1
            return self._switch(step, self.home, f"{self.hold} steps have passed (return {self.returns} of {MOST_RETURNS})")
        return None

    def _switch(self, step: int, target: str, reason: str) -> Switch:
        self.current, self.since, self.skipped = target, step, []
        return Switch(target, reason)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("home", "current", "since", "returns", "skipped", "hold"):
            setattr(self, name, state[name])
