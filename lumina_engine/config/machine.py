"""What a machine offers to a run. Filled in by `monitoring.hardware.detect`, or by hand to plan for another machine."""

from __future__ import annotations

from dataclasses import dataclass, field

GB = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One GPU. `bf16` says whether it computes bfloat16 natively."""

    name: str
    memory_bytes: int
    bf16: bool = True


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices of one node, host memory, cores and free disk. Without devices training runs on the CPU, in host memory."""

    devices: list[Accelerator] = field(default_factory=list)
    host_memory_bytes: int = 16 * GB
    cpu_count: int = 1
    disk_free_bytes: int | None = None

    @property
    def label(self) -> str:
        """The devices in words: `2 x H100 80 GB`, or `CPU, 4 cores, 16 GB`."""
        if not self.devices:
            return f"CPU, {self.cpu_count} cores, {gb_text(self.host_memory_bytes)}"
        first = self.devices[0]
        return f"{len(self.devices)} x {first.name} {gb_text(first.memory_bytes)}"


def gb_text(count: float) -> str:
    """Bytes for a person, 10-based, three digits: 6.76 MB, 80 GB, 1.52 TB."""
    return scaled(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)), " B")


def count_text(count: float) -> str:
    """A number of parameters or tokens for a person, three digits: 494 K, 7.35 B, 1.66 T."""
    return scaled(count, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)), "")


def flops_text(count: float) -> str:
    """Floating point operations for a person: 4.14 MFLOP, 2,400 TFLOP."""
    return scaled(count, (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("KFLOP", 1e3)), " FLOP")


def scaled(count: float, units: tuple[tuple[str, float], ...], last: str) -> str:
    """A number in the largest unit that is at most as large, with three digits."""
    for unit, size in units:
        value = count / size
        if value >= 0.9995:
            digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
            text = f"{value:,.{digits}f}"
            return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"
    return f"{count:.0f}{last}"


def parse_devices(text: str) -> list[Accelerator]:
    """`8x80GB`, `2 x H100 80GB` or `cpu` as a list of devices. Raises ValueError with the accepted form."""
    import re

    if text.strip().lower() == "cpu":
        return []
    found = re.fullmatch(r"\s*(\d{1,6})\s*x\s*(?:([A-Za-z][\w .-]*?)[\s,]+)?(\d+(?:\.\d+)?)\s*GB\s*", text, re.IGNORECASE)
    if not found or int(found[1]) < 1 or float(found[3]) <= 0:
        raise ValueError(f"{text}: devices are written like 8x80GB, 2xH100 80GB or cpu")
    name = found[2] or "GPU"
    return [Accelerator(name, int(float(found[3]) * GB))] * int(found[1])
