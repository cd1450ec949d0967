"""What a chart shows and how it looks when finished: curves, the user's options, axes, the picture. No Textual in here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..history import Base, History
from ..series import RunStore
from .canvas import Frame

MOST_RUNS = 8  # in one chart: as many colours can be told apart
LETTERS = "abcdefgh"

# style numbers of a frame, in the order of STYLE_ROLES; a run's colour is RUN + its slot
NONE, FAINT, LABEL, RAW, CURVE, EVAL, GOOD, WARN, BAD, CROSS, TAIL, ACCENT, RUN = range(13)
STYLE_ROLES = (
    *("text", "faint", "dim", "raw", "curve", "second", "good", "warn", "bad", "title", "faint", "accent"),
    *(f"run{slot}" for slot in range(MOST_RUNS)),
)


@dataclass(frozen=True)
class Curve:
    """One run in a chart. `slot` is its colour; `letter` stands at the line's end where several runs lie over each other."""

    store: RunStore
    name: str = ""
    slot: int = 0
    letter: str = ""

    def history(self, metric: str) -> History:
        """The history that holds a metric."""
        return self.store.history(metric)


def colour_slots(identities: Iterable[str]) -> dict[str, int]:
    """A colour for each of up to MOST_RUNS runs: by a hash of the run's identity, the next free one where two runs collide.

    The same set of runs always gets the same colours, in whatever order it is given.
    """
    slots: dict[str, int] = {}
    wanted = {name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") for name in identities}
    for name in sorted(wanted, key=lambda name: (wanted[name], name)):
        slot = wanted[name] % MOST_RUNS
        while slot in slots.values() and len(slots) < MOST_RUNS:
            slot = (slot + 1) % MOST_RUNS
        slots[name] = slot
    return slots


@dataclass(frozen=True)
class Options:
    """What the user chose for a chart. `view` None: everything, following the newest point; x values in `base`."""

    metric: str = "loss"
    base: Base = "step"
    weight: float = 0.9
    outliers: bool = True
    log_y: bool = False
    log_x: bool = False
    view: tuple[float, float] | None = None
    abandoned: bool = False
    cross: float | None = None
    pin: float | None = None


@dataclass(frozen=True)
class Limits:
    """The axes of the picture before, so that the next one does not tremble."""

    x_end: float | None = None
    y: tuple[float, float] | None = None
    gutter: int = 0
    key: tuple[object, ...] = ()


@dataclass(frozen=True)
class Along:
    """The X axis: values from `low` to `high` over `columns` cells; `log`: both above 0."""

    low: float = 0.0
    high: float = 1.0
    columns: int = 0
    log: bool = False

    def _warp(self, x: float) -> float:
        return (math.log10(x) if x > 0 else -400.0) if self.log else x

    def _unwarp(self, place: float) -> float:
        return float(10.0 ** min(300.0, max(-300.0, place))) if self.log else place

    @property
    def _ends(self) -> tuple[float, float]:
        return self._warp(self.low), self._warp(self.high)

    def x_at(self, column: float) -> float:
        """The X value in the middle of a column of cells."""
        low, high = self._ends
        return self._unwarp(low + (column + 0.5) / max(1, self.columns) * (high - low))

    def column_of(self, x: float) -> int:
        """The column of cells of an X value; may lie outside."""
        low, high = self._ends
        return math.floor((self._warp(x) - low) / ((high - low) or 1.0) * self.columns)

    def columns_of(self, x_N: np.ndarray) -> np.ndarray:
        """The columns of cells of many X values, as whole numbers in float64; may lie outside."""
        low, high = self._ends
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                x_N = np.where(x_N > 0, np.log10(x_N), -400.0)
        return np.floor((x_N - low) / ((high - low) or 1.0) * self.columns)

    def around(self, column: int) -> tuple[float, float]:
        """The X values at which a column of cells begins and ends."""
        return self.x_at(column - 0.5), self.x_at(column + 0.5)

    def bounds(self, count: int) -> np.ndarray:
        """The `count`+1 edges of that many equal parts."""
        low, high = self._ends
        places = np.linspace(low, high, count + 1)
        return 10.0**places if self.log else places

    def moved(self, columns: float) -> tuple[float, float]:
        """The ends after a shift by so many columns."""
        low, high = self._ends
        shift = columns * (high - low) / max(1, self.columns)
        return self._unwarp(low + shift), self._unwarp(high + shift)

    def zoomed(self, about: float, factor: float) -> tuple[float, float]:
        """The ends after stretching the range by `factor` about an X value."""
        low, high = self._ends
        place = self._warp(about)
        return self._unwarp(place - (place - low) * factor), self._unwarp(place + (high - place) * factor)


@dataclass
class Plot:
    """A finished picture."""

    frame: Frame
    left: int = 0  # cells before the first column of dots
    axis: Along = field(default_factory=Along)
    limits: Limits = field(default_factory=Limits)
    notes: list[str] = field(default_factory=list)

    @property
    def across(self) -> int:
        """Columns of cells with dots."""
        return self.axis.columns
