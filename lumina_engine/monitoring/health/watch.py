"""The health of a run from its records: feed them in the order of the log, get the alerts. The same log gives the same alerts.

An alert is told once while its trouble lasts: it opens at one level, closes at another (each detector's own), and does not open
again within `QUIET_STEPS` of its end. Trouble that begins in a quiet time and outlasts it is told then. A run that goes back
tries anew: what it left behind has no quiet time, since a rollback that did not help is news.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

from .. import record as rec
from . import optimisation, system
from .detector import Detector, Sign
from .scores import overall, scores, status
from .windows import Windows

QUIET_STEPS = 100
TOLD_BY_TRAINER = frozenset({"nonfinite_step", "loss_spike"})  # a run of ours tells them itself, in the step
KEPT = 1_000  # alerts


def detectors() -> list[Detector]:
    """All of them, new."""
    return [
        optimisation.NonFinite(),
        optimisation.RateJump(),
        optimisation.Divergence(),
        optimisation.Spike(),
        optimisation.GradientTail(),
        optimisation.Plateau(),
        optimisation.Overfitting(),
        optimisation.RepeatedData(),
        optimisation.FrozenLayer(),
        system.Throughput(),
        system.LoaderWait(),
        system.Memory(),
        system.Disk(),
        system.Devices(),
        system.Routing(),
    ]


class HealthWatch:
    """Takes records, gives alerts.

    Args:
        leave_out: codes that somebody else tells (`TOLD_BY_TRAINER` for a run of ours).
        run: the name by which commands know the run, for advice; None for a training loop of one's own.
    """

    def __init__(self, leave_out: Collection[str] = (), run: str | None = None) -> None:
        self.seen = Windows(run)
        self.alerts: deque[rec.Alert] = deque(maxlen=KEPT)
        self.open: dict[str, rec.Alert] = {}
        self._closed: dict[str, int] = {}  # code -> step count at its end
        self._left: set[str] = set()  # open codes of a branch that was left: no sign of them since, and no end either
        self._leave_out = frozenset(leave_out)
        self._by_type: dict[type, list[Detector]] = {}
        for detector in detectors():
            for kind in detector.types:
                self._by_type.setdefault(kind, []).append(detector)

    def observe(self, record: rec.Record) -> list[rec.Alert]:
        """The alerts that begin with this record."""
        self.seen.take(record)
        if isinstance(record, rec.Rewind):
            self._closed.clear()
            self._left = set(self.open)
        interested = self._by_type.get(type(record))
        if interested is None:
            return []
        begun: list[rec.Alert] = []
        for detector in interested:
            for sign in detector.look(self.seen):
                if (alert := self._judge(sign, record)) is not None:
                    begun.append(alert)
        return begun

    def replay(self, records: Iterable[rec.Record]) -> list[rec.Alert]:
        """The alerts of a whole log."""
        return [alert for record in records for alert in self.observe(record)]

    def _judge(self, sign: Sign, record: rec.Record) -> rec.Alert | None:
        code = sign.code
        if not sign.bad:
            if self.open.pop(code, None) is not None and code not in self._left:
                self._closed[code] = self.seen.steps
            self._left.discard(code)
            return None
        self._left.discard(code)
        quiet = self.seen.steps - self._closed.get(code, -QUIET_STEPS) < QUIET_STEPS
        if code in self.open or code in self._leave_out or quiet:
            return None
        alert = rec.Alert(
            severity=sign.severity,
            code=code,
            message=sign.message,
            recommendation=sign.recommendation,
            step=self.seen.step,
            t=record.t,
        )
        self.open[code] = alert
        self.alerts.append(alert)
        return alert

    def summary(self) -> dict[str, Any]:
        """`health_status`, `overall_health_score`, each sub-score with its words, and what is open."""
        found = scores(self.seen)
        total = overall(found)
        alarmed = any(alert.severity == "critical" and code not in self._left for code, alert in self.open.items())
        return {
            "health_status": status(self.seen, total, alarmed),
            "overall_health_score": total,
            "step": self.seen.step,
            "steps_seen": self.seen.steps,
            "scores": {name: {"value": score.value, "from": score.words} for name, score in found.items()},
            "open_alerts": sorted(self.open),
        }
