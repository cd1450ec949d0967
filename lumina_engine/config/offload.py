"""Where training state lives when it does not fit the devices (R26), and what each place asks of the ZeRO stage.

`cpu_offload` moves the optimizer's state, at stage 3 the weights too; the other keys move one of the two. NVMe wins over host
memory for the same state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lumina_engine.config.schema import Config

Place = Literal["device", "cpu", "nvme"]


@dataclass(frozen=True, slots=True)
class Offload:
    """Where the optimizer's state and the weights are kept between uses."""

    optimizer: Place
    parameters: Place

    @property
    def any(self) -> bool:
        """Whether anything leaves the device."""
        return (self.optimizer, self.parameters) != ("device", "device")

    @property
    def nvme(self) -> bool:
        """Whether anything lies on disk."""
        return "nvme" in (self.optimizer, self.parameters)


def offload_of(config: Config, stage: int) -> Offload:
    """The places that `config` asks for at a ZeRO stage."""
    host_optimizer = config.cpu_offload or config.cpu_offload_optimizer
    host_parameters = config.cpu_offload_parameters or (config.cpu_offload and stage == 3)
    return Offload(
        optimizer="nvme" if config.nvme_offload_optimizer else "cpu" if host_optimizer else "device",
        parameters="nvme" if config.nvme_offload_parameters else "cpu" if host_parameters else "device",
    )


def least_stage(config: Config) -> tuple[int, str]:
    """The lowest ZeRO stage that can do the offload asked for, and why; (0, "") without any."""
    wanted = offload_of(config, 3)
    if wanted.nvme:
        return 3, "offload to disk needs stage 3"
    if config.cpu_offload_parameters:
        return 3, "offload of the weights needs stage 3"
    return (1, "optimizer offload needs stage 1") if wanted.any else (0, "")
