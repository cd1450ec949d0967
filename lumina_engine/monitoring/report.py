"""What is known of a run when it is looked back upon, as one plain document: the JSON report, and what the page is made from.

Nothing here reads run directories: the caller brings what it found (`Subject`) and the history of the log. A part that is not
there is named in `missing` and left empty; no number stands in for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from . import record as rec
from .curves import EVAL_METRICS, ROUTING_METRICS, SMOOTHING, SPLIT, STEP_METRICS, History, reduced
from .experts import LayerLoad
from .health.timeline import HealthTimeline
from .resume_words import resume_words
from .scaling import scaling

FORMAT = 1
COLUMNS = 250  # columns that a curve is reduced to in the JSON file; a shorter one is given step by step
_EXACT = ("lr",)


@dataclass(frozen=True)
class Subject:
    """A run as its directory shows it.

    `state` is as `runs list` says; `identity` the content of run.json; `config` and `preset` flat values by key, None where
    they cannot be had; `saved` names of committed checkpoints, and of those that `best` and `latest` point at.
    """

    name: str
    path: str
    state: str
    reason: str | None = None
    exit_code: int | None = None
    alive: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    preset: Mapping[str, Any] | None = None
    saved: tuple[str, ...] = ()
    best: str | None = None
    latest: str | None = None
    sample_eval: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()


def document(subject: Subject, history: History, health: HealthTimeline, now: float | None = None) -> dict[str, Any]:
    """The report as plain values (dicts, lists, text, numbers; numbers may be NaN or infinite)."""
    return {
        "format": FORMAT,
        "made": time.time() if now is None else now,
        "run": _run(subject, history),
        "missing": [*subject.missing, *_missing(subject, history, health)],
        "summary": _summary(history),
        "curves": _curves(history),
        "evals": {"step": history.evals.step.tolist(), **{n: history.evals[n].tolist() for n in EVAL_METRICS}},
        "eval_tasks": dict(history.tasks),
        "step_split": _split(history),
        "scaling": scaling(history, subject.config),
        "routing": _routing(history),
        "health": None if health.failed else health.document(),
        "timeline": {"left_out": history.events.left_out, "entries": [_event(item) for item in history.events]},
        "checkpoints": _checkpoints(subject, history),
        "starts": [msgspec.to_builtins(item) for item in history.incarnations.values()],
        "config": _config(subject),
        "environment": _environment(subject, history),
        "sample_eval": None if subject.sample_eval is None else dict(subject.sample_eval),
    }


def _run(subject: Subject, history: History) -> dict[str, Any]:
    get = subject.identity.get
    return {
        "name": subject.name,
        "path": subject.path,
        "state": subject.state,
        "reason": subject.reason,
        "exit_code": subject.exit_code,
        "alive": subject.alive,
        "id": get("id"),
        "preset": get("preset"),
        "created": get("created"),
        "total_steps": history.total_steps if history.total_steps is not None else get("total_steps"),
    }


def _missing(subject: Subject, history: History, health: HealthTimeline) -> list[str]:
    told = []
    if not history.records:
        told.append("metrics.jsonl: no records")
    elif not len(history.steps):
        told.append("metrics.jsonl: no step was recorded")
    if history.unreadable:
        lost = sum(stop - start for start, stop in history.unreadable)
        first = history.unreadable[0][0]
        told.append(
            f"metrics.jsonl: {lost:,} bytes in {len(history.unreadable):,} places are no records, the first at {first:,}"
        )
    if len(history.steps) and not len(history.evals):
        told.append("no evaluation was recorded")
    if len(history.steps) and not history.layers:
        told.append("no routing of experts was recorded")
    if health.failed:
        told.append(f"health: the monitor failed on these records ({health.failed})")
    return told


def _summary(history: History) -> dict[str, Any]:
    steps, evals = history.steps, history.evals
    loss = steps["loss"]
    finite = np.flatnonzero(np.isfinite(loss))
    ema = history.ema("loss")
    starts = list(history.incarnations.values())
    known = np.flatnonzero(np.isfinite(evals["loss"]))
    best = known[np.argmin(evals["loss"][known])] if len(known) else None
    return {
        "step": int(steps.step[-1]) if len(steps) else None,
        "tokens": int(steps["tokens"][-1]) if len(steps) else None,
        "training_seconds": _sum(steps["step_time"]),
        "wall_seconds": starts[-1].ended - starts[0].begun if starts else None,
        "loss": float(loss[finite[-1]]) if len(finite) else None,
        "loss_ema": float(ema[finite[-1]]) if len(finite) else None,
        "lowest_loss": float(loss[finite].min()) if len(finite) else None,
        "best_eval": None if best is None else _eval(history, int(best)),
        "last_eval": _eval(history, len(evals) - 1) if len(evals) else None,
        **{
            f"{name}_{word}": value
            for name in ("tokens_per_s", "step_time", "mfu")
            for word, value in _spread(steps[name]).items()
        },
        "skipped_steps": int(np.nansum(steps["skipped"])),
        "steps_without_finite_loss": len(loss) - len(finite),
        "alerts": dict(history.alerts),
        "starts": len(starts),
        "records": history.records,
    }


def _eval(history: History, index: int) -> dict[str, Any]:
    found = {name: float(history.evals[name][index]) for name in EVAL_METRICS}
    return {"step": int(history.evals.step[index])} | {n: None if math.isnan(v) else v for n, v in found.items()}


def _sum(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.sum()) if len(values) else None


def _spread(values: np.ndarray) -> dict[str, float | None]:
    """Median, 5th and 95th percentile of the finite values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"median": None, "p5": None, "p95": None}
    p5, median, p95 = np.percentile(values, (5, 50, 95)).tolist()
    return {"median": median, "p5": p5, "p95": p95}


def _curves(history: History) -> dict[str, Any]:
    """Every metric that has a value: step (the last of the column), min, max, mean, and the average at that step."""
    found: dict[str, Any] = {}
    for name in (*STEP_METRICS, *ROUTING_METRICS):
        columns = history.routing if name in ROUTING_METRICS else history.steps
        if not np.isfinite(columns[name]).any():
            continue
        curve = reduced(columns.step, columns[name], COLUMNS)
        found[name] = {key: values.tolist() for key, values in curve.items()}
        if name in STEP_METRICS and name not in _EXACT:
            at = np.searchsorted(columns.step, curve["step"])
            found[name] |= {"ema": history.ema(name)[at].tolist(), "ema_weight": SMOOTHING}
    return found


def _split(history: History) -> dict[str, Any] | None:
    """Medians of the parts of a step and of what remains, in seconds and as share of the median step; None if unknown."""
    whole = _spread(history.steps["step_time"])["median"]
    parts = {name: _spread(history.steps[name])["median"] for name in SPLIT}
    known = {name: value for name, value in parts.items() if value is not None}
    if not known or not whole:
        return None
    rest = np.full(len(history.steps), 0.0) + history.steps["step_time"]
    for name in known:
        rest = rest - history.steps[name]
    known["rest"] = _spread(rest)["median"] or 0.0
    return {"step_time": whole, "seconds": known, "share": {name: value / whole for name, value in known.items()}}


def _routing(history: History) -> dict[str, Any] | None:
    layers = history.layers
    if not layers:
        return None
    rows = [{"layer": index, **_layer(layer)} for index, layer in layers.items()]
    return {"step": max(layer.step for layer in layers.values()), "layers": rows}


def _layer(layer: LayerLoad) -> dict[str, Any]:
    """The record's figures, and those that follow from the load: min/mean, CV, share of the fair load of each expert."""
    load = np.array(layer.load, np.float64)
    mean = float(load.mean()) if len(load) else 0.0
    fair = (load / mean).tolist() if mean > 0 else None
    return {
        "step": layer.step,
        "load": layer.load,
        "fair_share": fair,
        "max_mean": layer.imbalance,
        "min_mean": min(fair) if fair else None,
        "cv": float(load.std() / mean) if mean > 0 else None,
        "entropy": layer.entropy,
        "dead": layer.dead,
        "dropped": layer.dropped,
        "bias_range": layer.bias_range,
        "confidence": layer.confidence,
    }


def _event(item: rec.Record) -> dict[str, Any]:
    """One line of the timeline: when, at which step, what kind, how grave, in words, and what to do."""
    entry: dict[str, Any] = {
        "t": item.t,
        "inc": item.inc,
        "step": None,
        "kind": "",
        "severity": "info",
        "text": "",
        "advice": None,
    }
    match item:
        case rec.Alert():
            entry |= {"step": item.step, "kind": item.code, "severity": item.severity, "text": item.message}
            entry["advice"] = item.recommendation
        case rec.Change():
            reason = f" ({item.reason})" if item.reason else ""
            text = f"{item.what}: {item.before} to {item.after}, by {item.by or 'unknown'}{reason}"
            entry |= {"step": item.step, "kind": "change", "text": text}
        case rec.Rewind():
            text = item.reason or f"back to step {item.to_step:,}"
            entry |= {"step": item.to_step, "kind": "rewind", "severity": "warning", "text": text}
        case rec.Resume():
            entry |= {"step": item.step, "kind": "resume", "text": ". ".join(resume_words(item))}
        case rec.Checkpoint():
            entry |= {"step": item.step, "kind": "checkpoint failed", "severity": "warning", "text": item.failed or ""}
        case rec.Run():
            bad = item.state in ("failed", "crashed")
            code = f" (exit code {item.exit_code})" if item.exit_code else ""
            entry |= {"kind": "run", "severity": "critical" if bad else "info"}
            entry["text"] = item.state + (f": {item.reason}" if item.reason else "") + code
        case rec.Note():
            entry |= {"step": item.step, "kind": "note", "text": item.message}
    return entry


def _checkpoints(subject: Subject, history: History) -> dict[str, Any]:
    rows = [
        {
            "step": c.step,
            "t": c.t,
            "bytes": c.bytes,
            "seconds": c.seconds,
            "blocking": c.blocking,
            "verified": c.verified,
            "best": c.best,
        }
        for c in history.checkpoints
    ]
    return {"recorded": rows, "on_disk": list(subject.saved), "best": subject.best, "latest": subject.latest}


def _config(subject: Subject) -> dict[str, Any]:
    """The keys whose value in force differs from the preset's."""
    differences = None
    if subject.config is not None and subject.preset is not None:
        differences = [
            {"key": key, "preset": subject.preset.get(key), "run": value}
            for key, value in subject.config.items()
            if value != subject.preset.get(key)
        ]
    return {"preset": subject.identity.get("preset"), "differences": differences}


def _environment(subject: Subject, history: History) -> dict[str, Any]:
    get, hardware = subject.identity.get, history.hardware
    found: dict[str, Any] = {"versions": get("versions"), "host": get("host"), "world": get("world"), "argv": get("argv")}
    if hardware is not None:
        found["devices"] = [msgspec.to_builtins(device) for device in hardware.devices]
        found["cpu_count"], found["memory_total"] = hardware.cpu_count, hardware.memory_total
    return found
