"""`lumina-engine bench health`: how often the health monitor is right, on recorded runs whose faults are known.

A fault is caught if one of its critical codes is told within `WITHIN` steps of it. Any critical alert in a healthy run, before
the fault, or where the fault is none of its kind is a false alarm. A warning is true if it is one of its fault's, after the
fault. Runs with the mark `held` played no part in choosing the bounds of a detector and are counted apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..monitoring import record as rec
from ..monitoring.health.watch import HealthWatch
from .corpus import Recorded

WITHIN = 20  # steps


@dataclass(slots=True)
class Counts:
    """What happened in a set of runs."""

    runs: int = 0
    healthy: int = 0
    critical: int = 0  # runs whose fault asks for a critical alert
    caught: int = 0
    delays: list[int] = field(default_factory=list)
    critical_false: int = 0
    warnings_true: int = 0
    warnings_false: int = 0

    def add(self, run: Recorded, alerts: list[rec.Alert]) -> None:
        """Count one run and what was told in it."""
        self.runs += 1
        self.healthy += run.fault == "healthy"
        after = [(alert, (alert.step or 0) - run.at) for alert in alerts]
        found = [delay for alert, delay in after if alert.severity == "critical" and alert.code in run.critical and delay >= 0]
        if run.critical:
            self.critical += 1
            if found and min(found) <= WITHIN:
                self.caught += 1
                self.delays.append(min(found))
        for alert, delay in after:
            if alert.severity == "info":
                continue
            due = run.fault != "healthy" and delay >= 0
            if alert.severity == "critical":
                self.critical_false += not (due and alert.code in run.critical)
            elif due and alert.code in (*run.warning, *run.critical):
                self.warnings_true += 1
            else:
                self.warnings_false += 1

    def figures(self) -> dict[str, Any]:
        """Shares, None where nothing was to be counted."""
        told = self.warnings_true + self.warnings_false
        return {
            "critical_recall": self.caught / self.critical if self.critical else None,
            "critical_false_alarms": self.critical_false,
            "warning_precision": self.warnings_true / told if told else None,
            "runs": self.runs,
            "healthy_runs": self.healthy,
            "critical_runs": self.critical,
            "warnings": told,
            "median_delay_steps": median(self.delays) if self.delays else None,
        }


@dataclass(slots=True)
class Told:
    """In how many runs of a fault one of its codes was told, in how many of those set apart, and how many steps after it."""

    runs: int = 0
    held: int = 0
    delays: list[int] = field(default_factory=list)

    def add(self, run: Recorded, delay: int) -> None:
        """Count a run in which it was told `delay` steps after the fault."""
        self.runs += 1
        self.held += run.held
        self.delays.append(delay)

    def figures(self) -> dict[str, Any]:
        return {"runs": self.runs, "held": self.held, "median_delay_steps": _middle(self.delays)}


def measure(runs: Iterable[Recorded]) -> dict[str, Any]:
    """Replay the runs; the figures of all, of those set apart (`held`), by fault (`table`) and by code (`codes`).

    A row of the table says for each code of its fault in how many of the runs it was `told`; `untold` are those without any.
    """
    whole, held, chosen = Counts(), Counts(), Counts()
    by_fault: dict[str, Counts] = {}
    missed: dict[str, int] = {}
    told: dict[str, dict[str, Told]] = {}
    codes: dict[str, dict[str, Any]] = {}
    records = 0
    seconds = 0.0
    for run in runs:
        stream = list(run.records())
        watch = HealthWatch()
        begin = time.perf_counter()
        alerts = watch.replay(stream)
        seconds += time.perf_counter() - begin
        records += len(stream)
        for counts in (whole, held if run.held else chosen, by_fault.setdefault(run.fault, Counts())):
            counts.add(run, alerts)
        first = _first(run, alerts)
        if run.warning and not first:
            missed[run.fault] = missed.get(run.fault, 0) + 1
        for code, delay in first.items():
            told.setdefault(run.fault, {}).setdefault(code, Told()).add(run, delay)
        for alert in alerts:
            _count_code(codes, run, alert)
    table = [
        {
            "fault": fault,
            **counts.figures(),
            "untold": missed.get(fault, 0),
            "told": {code: found.figures() for code, found in sorted(told.get(fault, {}).items())},
        }
        for fault, counts in sorted(by_fault.items())
    ]
    return {
        **whole.figures(),
        "held": held.figures(),
        "chosen": chosen.figures(),
        "records_per_s": records / seconds if seconds else None,
        "table": table,
        "codes": [{"code": code, **row, "delays": _middle(row["delays"])} for code, row in sorted(codes.items())],
    }


def _delay(run: Recorded, alert: rec.Alert) -> int | None:
    """Steps from the fault to an alert of one of its codes; None if it is none of them, or came before."""
    delay = (alert.step or 0) - run.at
    return delay if run.fault != "healthy" and delay >= 0 and alert.code in (*run.warning, *run.critical) else None


def _first(run: Recorded, alerts: Iterable[rec.Alert]) -> dict[str, int]:
    """Steps from the fault to the first alert of each of its codes."""
    found: dict[str, int] = {}
    for alert in alerts:
        if (delay := _delay(run, alert)) is not None:
            found.setdefault(alert.code, delay)
    return found


def _count_code(codes: dict[str, dict[str, Any]], run: Recorded, alert: rec.Alert) -> None:
    row = codes.setdefault(alert.code, {"severity": alert.severity, "true": 0, "false": 0, "delays": []})
    delay = _delay(run, alert)
    row["false" if delay is None else "true"] += 1
    if delay is not None:
        row["delays"].append(delay)


def _middle(values: list[int]) -> float | None:
    return median(values) if values else None
