"""The health of a run over its steps: its log replayed through the monitor, as the supervisor watched it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .. import record as rec
from .watch import TOLD_BY_TRAINER, HealthWatch

POINTS = 250  # steps at which a timeline keeps the scores, at most
UNKNOWN = "unknown"  # in the place of a score that has not enough data


@dataclass(frozen=True, slots=True)
class _Point:
    number: int  # of its step record, from 1 on
    summary: dict[str, Any]


class HealthTimeline:
    """Takes the records of a log in their order, keeps the monitor's scores at evenly spaced steps.

    At first at each step; where that makes more than `most` points, at every second, fourth, … step record. A point is what the
    monitor says right after the record of its step. Steps that a run left behind when it went back are taken out.

    A monitor that fails ends itself, as in the supervisor: `failed` says why.
    """

    def __init__(self, most: int = POINTS) -> None:
        self.watch = HealthWatch(TOLD_BY_TRAINER)
        self.failed: str | None = None
        self._most = most
        self._every = 1
        self._points: list[_Point] = []

    def take(self, records: Iterable[rec.Record]) -> None:
        """Go on with these records."""
        if self.failed is not None:
            return
        try:
            for record in records:
                self.watch.observe(record)
                if isinstance(record, rec.Step):
                    self._cut(record.step - 1)  # it may be written again
                    self._step()
                elif isinstance(record, rec.Rewind):
                    self._cut(record.to_step)
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"

    def document(self) -> dict[str, Any]:
        """Columns by step (`step`, `health_status`, `overall_health_score`, `scores` by name) and `last`, the newest summary.

        A score that has not enough data is "unknown".
        """
        shown = [point.summary for point in self._points]
        last = self.watch.summary()
        if not shown or shown[-1]["step"] < last["step"]:
            shown += [last] * bool(last["steps_seen"])
        return {
            "step": [one["step"] for one in shown],
            "health_status": [one["health_status"] for one in shown],
            "overall_health_score": [_known(one["overall_health_score"]) for one in shown],
            "scores": {name: [_known(one["scores"][name]["value"]) for one in shown] for name in last["scores"]},
            "last": {
                **last,
                "overall_health_score": _known(last["overall_health_score"]),
                "scores": {name: {**score, "value": _known(score["value"])} for name, score in last["scores"].items()},
            },
        }

    def _step(self) -> None:
        number = self.watch.seen.steps
        if number % self._every:
            return
        self._points.append(_Point(number, self.watch.summary()))
        while len(self._points) > self._most:
            self._every *= 2
            self._points = [point for point in self._points if point.number % self._every == 0]

    def _cut(self, to_step: int) -> None:
        while self._points and self._points[-1].summary["step"] > to_step:
            self._points.pop()


def _known(value: float | None) -> float | str:
    return UNKNOWN if value is None or not math.isfinite(value) else value
