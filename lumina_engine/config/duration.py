"""How long a run takes: guessed from a table of devices, or from the throughput that a run measured.

Guesses rest on the model's floating point operations and a share of the device's peak that training usually reaches, less where
experts or layers are too small to keep a device busy. Two figures: half of such runs take at most `p50`, nine in ten at most
`p90`. Times in seconds unless a name ends in `_h`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lumina_engine.config.machine import Machine, flops_text
from lumina_engine.config.schema import Config, DeepSeekConfig

# Dense peak of a device in FLOP/s: bf16 and fp16, TF32, fp32 without it (makers' data sheets).
_PEAK = {
    "B200": (2250e12, 1100e12, 75e12),
    "H200": (989e12, 495e12, 67e12),
    "H100": (989e12, 495e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40": (181e12, 90e12, 90e12),
    "4090": (165e12, 82e12, 82e12),
    "3090": (71e12, 35e12, 35e12),
}
_UNKNOWN = (300e12, 150e12, 20e12)
# of one core in fp32; bf16 without matrix units is not faster
_CPU_CORE = 70e9
# share of the peak that training reaches: typical, and what nine in ten runs exceed
_SHARES = (0.4, 0.15)
# width of a matrix product at which half of that share is reached
_HALF_WIDTH = {True: 48, False: 384}  # CPU, GPU
# seconds until the first step: imports, process group, data in the cache
_START = (15.0, 60.0)
WARM_UP_STEPS = 10


@dataclass(frozen=True, slots=True)
class Speed:
    """Throughput of training in tokens per second over all ranks, and what comes on top, each typical and cautious.

    `eval_s` is None where no evaluation was seen. `basis` begins with guessed or measured.
    """

    tokens_per_s: tuple[float, float]
    basis: str
    start_s: tuple[float, float] = _START
    eval_s: tuple[float, float] | None = None
    save_s: tuple[float, float] = (0.0, 0.0)

    @property
    def is_measured(self) -> bool:
        return self.basis.startswith("measured")

    def scaled(self, factor: float, basis: str) -> Speed:
        """The same of a run whose steps are `factor` times as fast."""
        rates = (self.tokens_per_s[0] * factor, self.tokens_per_s[1] * factor)
        return Speed(rates, basis, self.start_s, self.eval_s, self.save_s)


class Hours(float):
    """Hours that a run takes (the typical figure), with `p50`, `p90` and `device_hours` (p50 x ranks) in hours, and `basis`."""

    p50: float
    p90: float
    device_hours: float
    basis: str

    def __new__(cls, p50: float, p90: float, device_hours: float, basis: str) -> Hours:
        hours = super().__new__(cls, p50)
        hours.p50, hours.p90, hours.device_hours, hours.basis = p50, p90, device_hours, basis
        return hours


def device_peak(name: str, precision: str = "bf16", tf32: bool = True) -> float | None:
    """Dense peak of a GPU (FLOP/s) by its product name and the precision of training, None if it is not in the table."""
    row = next((value for key, value in _PEAK.items() if key in name), None)
    return None if row is None else row[_column(precision, tf32)]


def _column(precision: str, tf32: bool) -> int:
    return 0 if precision != "fp32" else 1 if tf32 else 2


def guessed_speed(config: Config, model: DeepSeekConfig, machine: Machine, world: int, precision: str, flops: float) -> Speed:
    """Tokens per second before anything was measured. `flops` are those of one trained token, forward and backward."""
    if machine.devices:
        tf32 = not config.deterministic
        known = device_peak(machine.devices[0].name, precision, tf32)
        peak = (known or _UNKNOWN[_column(precision, tf32)]) * world
    else:
        peak = _CPU_CORE * machine.cpu_count
    width = min(model.hidden_size, model.expert_width)
    busy = width / (width + _HALF_WIDTH[not machine.devices])
    typical, cautious = (share * busy for share in _SHARES)
    basis = f"guessed: {typical:.0%} (p50) or {cautious:.0%} (p90) of {flops_text(peak)}/s"
    return Speed((peak * typical / flops, peak * cautious / flops), basis)


def duration(
    config: Config, model: DeepSeekConfig, speed: Speed, *, world: int, steps: int | None, done: int, train_tokens: int | None
) -> dict[str, Any]:
    """`p50_h`, `p90_h`, `device_hours` (p50 x ranks), `tokens_per_s`, `basis` of the optimizer steps from `done` to `steps`.

    The hours are None while `steps` is unknown. Evaluations and saves are counted as the intervals say.
    """
    found: dict[str, Any] = {"p50_h": None, "p90_h": None, "device_hours": None, "steps_done": done}
    found["tokens_per_s"] = speed.tokens_per_s[0]
    if steps is None:
        return found | {"basis": "unknown: max_steps is null and the data has not been counted; " + speed.basis}
    left = max(0, steps - done)
    tokens = left * config.batch_size * config.gradient_accumulation_steps * world * config.seq_length
    evaluations = _times(config.eval_interval, left) if _evaluates(config) else 0
    saves = _times(config.save_interval, left)
    p50, p90 = (
        speed.start_s[i]
        + tokens / speed.tokens_per_s[i]
        + evaluations * _evaluation(config, model, speed, i, world, train_tokens)
        + saves * speed.save_s[i]
        for i in (0, 1)
    )
    return found | {"p50_h": p50 / 3600, "p90_h": p90 / 3600, "device_hours": p50 * world / 3600, "basis": speed.basis}


def _times(interval: int, steps: int) -> int:
    """How often something is due in so many steps, once at the end included."""
    return 0 if not steps else -(-steps // interval) if interval else 1


def _evaluates(config: Config) -> bool:
    return bool(config.eval_data_path) or config.eval_split > 0 or config.train_data_path is None


def _evaluation(config: Config, model: DeepSeekConfig, speed: Speed, i: int, world: int, train_tokens: int | None) -> float:
    """Seconds of one evaluation: as measured, or a forward pass (a third of the operations) over what is held back."""
    if speed.eval_s is not None:
        return speed.eval_s[i]
    batches = config.eval_batches or 100
    tokens = batches * config.batch_size * world * config.seq_length
    if train_tokens and not config.eval_data_path and 0 < config.eval_split < 1:
        tokens = min(tokens, int(train_tokens * config.eval_split))
    return tokens / speed.tokens_per_s[i] / 3


def scaled_by_flops(speed: Speed, measured_flops: float, flops: float, measured_world: int, world: int) -> Speed:
    """The speed of a run whose tokens cost `flops`, from one whose tokens cost `measured_flops`."""
    factor = measured_flops / flops * world / measured_world
    return (
        speed
        if abs(factor - 1) < 0.005
        else speed.scaled(factor, f"{speed.basis}, x {factor:.3g} for other operations or ranks")
    )
