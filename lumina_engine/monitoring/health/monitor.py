"""`TrainingHealthMonitor`: health for a training loop of one's own, or for the records of a run."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import record as rec
from ..log import MetricLog
from ..say import say
from .watch import KEPT, HealthWatch

_NAMES = {  # what others call the fields of a step
    "global_step": "step",
    "learning_rate": "lr",
    "tokens_per_sec": "tokens_per_s",
    "tokens_per_second": "tokens_per_s",
    "gradient_norm": "grad_norm",
}
# the fields of a step that are one number; what `repeats` and `frozen` say comes from a trainer that looks at its batches
_STEP_FIELDS = frozenset(rec.Step.__struct_fields__) - {"seq", "t", "inc", "repeats", "frozen"}
_WHOLE = frozenset({"step", "epoch", "tokens", "seq_length", "batch"})
_MOST = 2.0**63  # whole numbers of a record are below
_PLACES = ("", "memory_usage.")  # where a step has its memory
_RSS = tuple(place + name for place in _PLACES for name in ("rss", "host_rss", "process_rss", "host.rss"))
_WORDS = {place + "device.type" for place in _PLACES}  # of `get_memory_stats`, which are no numbers


class Readable(dict[str, Any]):
    """A mapping that prints as one line: `status: stable, spikes: 0.0 %`."""

    def __str__(self) -> str:
        return ", ".join(f"{key}: {value}" for key, value in self.items())


class MetricsCollector:
    """What the monitor was given: numbers that are no field of a step (the last value each) and the recent alerts."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._alerts: deque[rec.Alert] = deque(maxlen=KEPT)
        self._strange: set[str] = set()

    def get_recent_alerts(self, minutes: float = 10) -> list[rec.Alert]:
        """The alerts of the last minutes, oldest first: objects with severity, code, message, recommendation, step, t."""
        since = time.time() - 60 * minutes
        return [alert for alert in self._alerts if alert.t >= since]

    def note(self, alert: rec.Alert) -> None:
        """Keep an alert."""
        self._alerts.append(alert)

    def flatten(self, metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
        """Nested numbers by dotted names; a value that is none costs one warning for its name."""
        found: dict[str, float] = {}
        for key, value in metrics.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                found |= self.flatten(value, name + ".")
                continue
            if value is None or name in _WORDS:
                continue
            try:
                found[name] = float(value)
            except (TypeError, ValueError, OverflowError):
                if name not in self._strange and len(self._strange) < 1_000:
                    self._strange.add(name)
                    say(f"health: {name} is no number that a float can hold ({type(value).__name__}): left out")
        return found


class TrainingHealthMonitor:
    """Watches a training loop; may be given to a trainer as its logger.

    Args:
        log_dir: a folder, made if need be: every record and alert is appended to its `metrics.jsonl`.

    Raises:
        OSError: the folder or the log cannot be made.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None) -> None:
        from ..hardware import memory_limit  # here, since it loads psutil, which the supervisor does without

        self.metrics_collector = MetricsCollector()
        self.watch = HealthWatch()
        self._memory = memory_limit()  # bytes that the growth of the loop's memory is measured against
        self._log: MetricLog | None = None
        if log_dir is not None:
            folder = Path(log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._log = MetricLog(folder / "metrics.jsonl", inc=1)

    def log_step(self, metrics: Mapping[str, Any]) -> list[rec.Alert]:
        """Take the numbers of one step: `global_step` (or `step`), `loss`, `learning_rate`, `grad_norm`, `tokens_per_sec`, …

        Without a step number it is the one after the last. Memory (`memory_usage`, in bytes, also nested, as a trainer's
        `get_memory_stats` gives it) is kept too.

        Returns:
            the alerts that begin with it.
        """
        numbers = self.metrics_collector.flatten(metrics)
        fields: dict[str, Any] = {}
        for name, value in numbers.items():
            field = _NAMES.get(name, name)
            if field in _STEP_FIELDS:
                fields[field] = _typed(field, value)
            else:
                self.metrics_collector.latest[name] = value
        now = time.time()
        fields.setdefault("step", self.watch.seen.step + 1)
        if "step_time" not in fields and self.watch.seen.last is not None and "tokens_per_s" in fields:
            fields["step_time"] = max(now - self.watch.seen.last.t, 1e-9)
        begun = self.emit(rec.Step(**fields, t=now))
        memory = self._hardware(numbers)
        if memory is not None:
            memory.t = now
            begun += self.emit(memory)
        return begun

    def _hardware(self, numbers: Mapping[str, float]) -> rec.Hardware | None:
        """The memory of the process, and of the host if that is told; None without any."""
        rss = _bytes(next((numbers[name] for name in _RSS if name in numbers), None))
        available, total = (
            _bytes(next((numbers[place + name] for place in _PLACES if place + name in numbers), None))
            for name in ("host.available", "host.total")
        )
        if available is None or total is None or total > self._memory:  # a cgroup's limit: the host says nothing of its room
            return None if rss is None else rec.Hardware(rss=rss, memory_total=self._memory)
        return rec.Hardware(rss=rss, memory_used=max(0, total - available), memory_total=total)

    def emit(self, record: rec.Record) -> list[rec.Alert]:
        """Take a record (`step`, `eval`, `experts`, `hardware`, …), as a trainer gives it; the alerts that begin with it."""
        if not record.t:
            record.t = time.time()
        if self._log is not None:
            self._log.emit(record)
        if isinstance(record, rec.Alert):
            self.metrics_collector.note(record)
            return []
        begun = self.watch.observe(record)
        for alert in begun:
            self.metrics_collector.note(alert)
            if self._log is not None:
                self._log.emit(alert)
        return begun

    def get_health_summary(self) -> dict[str, Any]:
        """`health_status` (no_data, warming_up, healthy, degraded, critical), `overall_health_score` (or nan), `scores`."""
        return self.watch.summary()

    def get_training_diagnostics(self) -> dict[str, Any]:
        """The scores in words: training_stability, performance_efficiency, resource_utilization, routing, recommendations."""
        summary = self.watch.summary()
        parts = summary["scores"]
        return {
            "training_stability": Readable(
                status=_word(parts, ("convergence", "stability", "numerics"), ("stable", "uneasy", "unstable")),
                **{name: parts[name]["from"] for name in ("convergence", "stability", "numerics")},
            ),
            "performance_efficiency": Readable(
                efficiency_status=_word(parts, ("throughput",), ("good", "reduced", "poor")),
                throughput=parts["throughput"]["from"],
            ),
            "resource_utilization": Readable(
                status=_word(parts, ("resources",), ("ample", "tight", "exhausted")), resources=parts["resources"]["from"]
            ),
            "routing": Readable(
                status=_word(parts, ("routing",), ("balanced", "uneven", "skewed")), routing=parts["routing"]["from"]
            ),
            "recommendations": [
                f"{alert.code}: {alert.recommendation}" for alert in self.watch.open.values() if alert.recommendation
            ],
        }

    def save_health_report(self, path: str | os.PathLike[str]) -> Path:
        """Write summary, diagnostics and alerts as JSON at `path`; folders are made. Returns the path.

        Raises:
            OSError: it cannot be written.
        """
        return write_report(path, {**report(self.watch), "diagnostics": self.get_training_diagnostics()})

    def close(self) -> None:
        """Close the log, if there is one."""
        if self._log is not None:
            self._log.close()


def _typed(field: str, value: float) -> float | int | bool | None:
    """A number as the field of a step has it."""
    if field == "skipped":
        return bool(value)
    if field in _WHOLE:
        return int(value) if abs(value) < _MOST else 0
    return value


def _bytes(value: float | None) -> int | None:
    """A size as a record can hold it; None if it is none."""
    return int(value) if value is not None and 0 <= value < _MOST else None


def report(watch: HealthWatch) -> dict[str, Any]:
    """Summary and alerts of a watch, as JSON values but for numbers that are not finite."""
    names = ("severity", "code", "message", "recommendation", "step", "t")
    return {**watch.summary(), "alerts": [{name: getattr(alert, name) for name in names} for alert in watch.alerts]}


def write_report(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write a report as JSON; numbers that are not finite become null.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")
    part.replace(target)
    return target


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _word(parts: Mapping[str, Any], names: tuple[str, ...], words: tuple[str, str, str]) -> str:
    """One of three words by the least of these scores, "unknown" without any."""
    known = [parts[name]["value"] for name in names if parts[name]["value"] is not None]
    if not known:
        return "unknown"
    least = min(known)
    return words[0] if least >= 0.75 else words[1] if least >= 0.4 else words[2]
