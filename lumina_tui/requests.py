"""Commands to a run, as their sender follows them: sent, accepted, and over only with the record that answers them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from .paint import duration

WAITS_S = 10.0  # after which a command says what it waits for


class Phase(Enum):
    """How far a command has come."""

    SENT = "sent"
    ACCEPTED = "accepted"
    APPLIED = "applied"
    REFUSED = "refused"


@dataclass
class Request:
    """A command to the run. `text` is what it does, for a person; `note` how it ended or what it waits for."""

    id: str
    cmd: str
    args: dict[str, Any]
    text: str
    sent: float
    phase: Phase = Phase.SENT
    note: str = ""

    @property
    def open(self) -> bool:
        return self.phase in (Phase.SENT, Phase.ACCEPTED)

    def line(self, now: float) -> str:
        """One line for the screen."""
        if self.phase is Phase.REFUSED:
            return f"{self.text}: refused: {self.note}"
        if self.phase is Phase.APPLIED:
            return f"{self.text}: {self.note}"
        waits = f", waits for a step boundary ({duration(now - self.sent)})" if now - self.sent >= WAITS_S else ""
        return f"{self.text}: {self.phase.value}{waits}"
