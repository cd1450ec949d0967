"""The one interface of all detectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .. import record as rec
from .windows import Windows


@dataclass(frozen=True, slots=True)
class Sign:
    """What a detector sees in the newest record.

    `bad`: whether this is the trouble (True) or its end (False). Between the two levels a detector says nothing. An end has
    no words.
    """

    code: str
    bad: bool
    severity: rec.Severity = "warning"
    message: str = ""
    recommendation: str = ""


class Detector(ABC):
    """Looks at the windows after each record of one of its types."""

    codes: ClassVar[tuple[str, ...]]
    types: ClassVar[tuple[type, ...]]

    @abstractmethod
    def look(self, seen: Windows) -> Iterator[Sign]:
        """The signs that the newest record gives."""
