"""What the manifests tell of `best_metric` at the checkpoints of a run: what `best` may name, and has to be beaten by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .keep import list_steps
from .tensors import unpack
from .verify import Report, read_manifest


def best_values(checkpoints: Path, metric: str, *more: Report) -> dict[str, float]:
    """Name -> value of `metric` of the committed checkpoints, as far as sound manifests tell; suspect ones are left out.

    A manifest has the loss of its own step. An eval_loss is measured after the save, so it stands in later manifests, as that
    of the step which was best then.

    Args:
        more: reports of checkpoints in another folder (emergency/), which may tell of those in this one.
    """
    here = [read_manifest(checkpoints / name) for name in list_steps(checkpoints)]
    names = {report.path.name for report in here if not _suspect(report)}
    values: dict[str, float] = {}
    for report in sorted([*here, *more], key=lambda report: report.step or 0):
        own, told = _own(report, metric), report.manifest.get("best")
        if report.ok and own is not None:
            values[report.path.name] = own
        if report.ok and isinstance(told, dict) and told.get("metric") == metric:
            value = finite(told.get("value"))
            values |= {} if value is None else {str(told.get("name")): value}
    return {name: value for name, value in values.items() if name in names}


def finite(value: Any) -> float | None:
    """The number, if it is one and finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _suspect(report: Report) -> bool:
    flags = report.manifest.get("flags")
    return isinstance(flags, dict) and bool(flags.get("suspect"))


def _own(report: Report, metric: str) -> float | None:
    metrics = report.manifest.get("metrics")
    return finite(unpack(metrics.get(metric))) if isinstance(metrics, dict) else None
