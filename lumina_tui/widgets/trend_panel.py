"""Newest values of the main series with sparklines; beside them devices and host, if there is room."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..facts import hardware_lines, split_bar, split_help, split_words, step_split
from ..history import METRICS
from ..paint import Piece, duration, fit
from .readings import value_text
from .run_panel import RunPanel
from .sparkline import spark
from .text_panel import Line

RECENT = 600  # steps in a sparkline


class TrendPanel(RunPanel):
    """Rate (with MFU where it is known), gradient norm, learning rate, and where the time of a step goes."""

    METRICS = ("tokens_per_s", "grad_norm", "lr")
    stem = "trend"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(title="trend", id=id)

    def versions(self) -> tuple[object, ...]:
        return (self.store.steps.version, self.store.hardware_version)

    def prepare(self) -> None:
        self.set_title("trend", self.aged(""))

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        left = width if self.store.hardware is None else max(30, min(width - 40, width // 2)) if width >= 70 else width
        pieces = self._line(y, left) if y < height else []
        pieces.append((" " * max(0, left - sum(len(text) for text, _ in pieces)), None))
        if left < width:
            lines = hardware_lines(self.store, width - left - 2, self.look.ascii, height)
            if y < len(lines):
                pieces += [("  ", None), *((text, self.palette.of(role)) for text, role in lines[y])]
        return pieces

    def _line(self, y: int, width: int) -> list[Piece]:
        if y < len(self.METRICS):
            return self._metric(self.METRICS[y], width)
        return self._step(y - len(self.METRICS), width)

    def _metric(self, name: str, width: int) -> list[Piece]:
        metric, history = METRICS[name], self.store.steps
        label = fit(metric.label if name != "lr" else "lr", 10)
        value = fit(value_text(name, history.last(name)), 9, "right")
        text = spark(history.metrics[name], width - 22 - len(self._mfu(name)), metric.keep, self.look.ascii, RECENT)
        return [
            (f" {label} ", self.palette.dim),
            (f"{value} ", self.palette.text),
            (self._mfu(name), self.palette.dim),
            (text, self.palette.curve),
        ]

    def _mfu(self, name: str) -> str:
        value = self.store.steps.last("mfu") if name == "tokens_per_s" else None
        return f"MFU {100 * value:.0f} % " if value is not None and math.isfinite(value) else ""

    def _step(self, row: int, width: int) -> list[Piece]:
        """The time of a step: a bar of its parts, and their shares in words if there is a line for them."""
        history = self.store.steps
        parts, time = step_split(history), history.last("step_time")
        if row == 0 and time is not None:
            bar = split_bar(parts, width - 22)
            tail: list[Piece] = [(text, self.palette.of(role)) for text, role in bar]
            if not parts:
                tail = [(spark(history.metrics["step_time"], width - 22, "max", self.look.ascii, RECENT), self.palette.curve)]
            return [
                (f" {fit('step', 10)} ", self.palette.dim),
                (f"{fit(duration(time), 9, 'right')} ", self.palette.text),
                *tail,
            ]
        if row == 1 and parts:
            return [(" ", None), *((text, self.palette.of(role)) for text, role in split_words(parts, width - 2))]
        return []

    def explain(self) -> Sequence[Line]:
        """For the help: the signs of this panel."""
        return split_help()
