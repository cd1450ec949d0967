"""Figures that are shown keep their value until they changed materially: what jitters is not painted again and again."""

from __future__ import annotations


class Steady:
    """The shown values of some figures, by name."""

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}

    def __call__(self, name: str, value: float, band: float) -> float:
        """What to show for `value`: the value shown before as long as it is less than `band` (above 0) away from `value`.

        A figure that was just replaced has the whole band on both sides of it, so jitter cannot move it back and forth.
        """
        shown = self._shown.get(name)
        if shown is None or not abs(value - shown) < band:
            shown = self._shown[name] = value
        return shown
