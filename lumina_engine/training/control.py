"""Commands and signals, agreed by all ranks at a step boundary.

Handlers only set a flag. At the boundary the flags of all ranks are combined (one rank's flag counts for all) and rank 0's
commands are made known to everybody, so that each rank takes the same action at the same step.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from .comm import Comm


@dataclass(frozen=True)
class Request:
    """One thing to do at a boundary: a command of a viewer (with its id) or a signal (without)."""

    cmd: str
    args: dict[str, Any]
    id: str | None = None


class Control:
    """Collects what was asked for. `channel` offers `.poll() -> list` of commands with `.id`, `.cmd` and `.args`."""

    SIGNALS = {signal.SIGTERM: "preempt", signal.SIGUSR1: "checkpoint", signal.SIGUSR2: "checkpoint"}

    def __init__(self, comm: Comm, channel: Any | None = None) -> None:
        self.comm = comm
        self.channel = channel
        self._flags = {"preempt": False, "checkpoint": False}

    def install_signals(self) -> None:
        """TERM asks for a preemption, USR1 and USR2 for a checkpoint; INT is the supervisor's business, not a rank's."""
        for number in self.SIGNALS:
            signal.signal(number, self._handle)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._flags[self.SIGNALS[signal.Signals(number)]] = True

    def agree(self) -> list[Request]:
        """All requests since the last call, the same on every rank. A collective when there are several ranks."""
        mine = (
            [{"cmd": c.cmd, "args": dict(c.args), "id": c.id} for c in self.channel.poll()] if self.channel is not None else []
        )
        names = sorted(self._flags)
        # one swap, then read: a signal in between lands in the old dictionary (read now) or in the new one (read next time)
        taken, self._flags = self._flags, dict.fromkeys(names, False)
        flags = [taken[name] for name in names]
        if self.comm.world_size > 1:
            shared = torch.tensor([bool(mine), *flags], dtype=torch.int32, device=self.comm.device)
            has_commands, *flags = (bool(n) for n in self.comm.max(shared).tolist())
            mine = self.comm.broadcast(mine) if has_commands else []
        requests = [Request(**item) for item in mine]
        requests += [Request(name, {}) for name, flag in zip(names, flags, strict=True) if flag]
        return requests
