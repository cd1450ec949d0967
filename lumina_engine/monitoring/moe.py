"""Routing analytics from what a model or a run has counted: balance, trend, what to change, stability between checkpoints.

Shape letters: N observations, L expert layers, E experts. Which token or task went where is in no record: specialisation.py has
that from a checkpoint.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..config.schema import Config, DeepSeekConfig
from . import record as rec
from .experts import layers_of
from .log import read_records, surviving

WINDOW = 100  # steps of a run, forwards of a model
WARN = 0.7  # balance score below which something should be done
LEAST = 4  # observations for a trend
STEADY = 0.05  # difference of the score between the halves of the window that is no trend
DROPPED = 0.05  # share of choices lost to capacity that is too much


@dataclass(frozen=True, slots=True)
class Routing:
    """One observation: choices per expert and layer (L, E), share of dropped choices by layer (L,)."""

    step: int
    load_LE: np.ndarray
    dropped_L: np.ndarray


def balance_score(load_LE: np.ndarray) -> float:
    """Mean over layers of mean ÷ max load: 1 = balanced, 1/E = one expert takes all; nan without a token."""
    most_L = load_LE.max(axis=-1)
    return float((load_LE.mean(axis=-1)[most_L > 0] / most_L[most_L > 0]).mean()) if (most_L > 0).any() else math.nan


def observations(records: Iterable[rec.Record]) -> tuple[list[int], list[Routing]]:
    """The expert layers and the routing at each step since the number of experts is what it is; a record that was split over
    several lines is put together again."""
    layers, seen = _all_observations(records)
    before = [place for place, item in enumerate(seen) if item.load_LE.shape != seen[-1].load_LE.shape]
    return layers, seen[before[-1] + 1 if before else 0 :]


def _all_observations(records: Iterable[rec.Record]) -> tuple[list[int], list[Routing]]:
    """The same of the whole run, in which the number of experts may have changed."""
    steps: dict[int, dict[int, tuple[list[float], float]]] = {}
    for record in surviving(records):
        if isinstance(record, rec.Experts):
            for layer, seen in layers_of(record):
                steps.setdefault(record.step, {})[layer] = (seen.load, seen.dropped or 0.0)
    layers = sorted({layer for found in steps.values() for layer in found})
    whole = [(step, found) for step, found in sorted(steps.items()) if sorted(found) == layers]
    return layers, [
        Routing(step, np.array([found[k][0] for k in layers], np.float64), np.array([found[k][1] for k in layers], np.float64))
        for step, found in whole
    ]


def stability(records: Iterable[rec.Record]) -> list[dict[str, Any]]:
    """How far the load moved from each checkpoint to the next: by layer, the total variation between the shares of the experts
    (0 = the same shares, 1 = other experts), from the last observation at or before each checkpoint. Nothing is told of two
    checkpoints with other numbers of experts: their shares do not compare."""
    kept = list(records)
    layers, seen = _all_observations(kept)
    saved = sorted({item.step for item in surviving(kept) if isinstance(item, rec.Checkpoint) and item.failed is None})
    at = [(step, [item for item in seen if item.step <= step][-1:]) for step in saved]
    known = [(step, found[0]) for step, found in at if found]
    rows = []
    for (before, old), (after, new) in pairwise(known):
        if old.load_LE.shape != new.load_LE.shape:
            continue
        moved_L = np.abs(_shares(old.load_LE) - _shares(new.load_LE)).sum(axis=-1) / 2
        rows.append({"from_step": before, "to_step": after, "layers": layers, "moved": moved_L.tolist()})
    return rows


def _shares(load_LE: np.ndarray) -> np.ndarray:
    return load_LE / np.maximum(load_LE.sum(axis=-1, keepdims=True), 1)


class MoEOptimizationManager:
    """Diagnoses the routing of a model or a run.

    Args:
        config: a `Config` (or `DeepSeekConfig`): the keys that the recommendations start from.
    """

    def __init__(self, config: Config | DeepSeekConfig) -> None:
        self.config = config
        self._path: Path | None = None
        self._layers: list[int] = []
        self._forwards: deque[Any] = deque(maxlen=WINDOW)  # router statistics, on their device

    def attach(self, source: Any) -> MoEOptimizationManager:
        """Look at `source` from now on, and return self: a `DeepSeekTransformer`, whose forwards with `return_aux=True` (all of
        training) are taken from a forward hook, or a run: its folder, or an object with `metrics_path`.

        Raises:
            TypeError: it is neither. FileNotFoundError: no such run.
        """
        if hasattr(source, "register_forward_hook"):
            shape = source.config
            self._path, self._layers = None, list(range(shape.num_dense_layers, shape.num_layers)) if shape.use_moe else []
            self._forwards.clear()
            source.register_forward_hook(self._take)
        elif hasattr(source, "metrics_path") or isinstance(source, str | os.PathLike):
            path = source.metrics_path if hasattr(source, "metrics_path") else Path(source) / "metrics.jsonl"
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no records of a run there")
            self._path = path
        else:
            raise TypeError(f"attach needs a model or a run, not {type(source).__name__}")
        return self

    def _take(self, model: Any, inputs: Any, output: Any) -> None:
        router = getattr(output, "router", None)
        if router is not None:
            self._forwards.append((router.counts_LE.detach().clone(), router.dropped_L.detach().clone()))

    def _observed(self) -> tuple[list[int], list[Routing]]:
        if self._path is not None:
            layers, seen = observations(read_records(self._path))
            return layers, [item for item in seen if item.step > seen[-1].step - WINDOW]
        found = []
        for number, (counts, dropped) in enumerate(self._forwards, start=1):
            load_LE, lost_L = np.array(counts.tolist(), np.float64), np.array(dropped.tolist(), np.float64)
            found.append(Routing(number, load_LE, lost_L / np.maximum(load_LE.sum(axis=-1), 1)))
        return self._layers, found

    def get_routing_diagnostics(self) -> dict[str, Any]:
        """Figures of the last 100 steps (of a model: forwards).

        Returns:
            `status` (no_data, balanced, imbalanced), `expert_balance_score` (mean over layers of mean ÷ max load; nan without
            data), `load_balance_trend` (improving, stable, worsening, unknown: the score of the second half against that of the
            first), `worst_layer`, `dead_experts` (layer and expert without a token), `dropped` (worst layer), `observations`,
            `recommendations` (each begins with a setting).
        """
        layers, seen = self._observed()
        load_LE = sum((item.load_LE for item in seen), np.zeros((len(layers), 1)))
        score = balance_score(load_LE) if seen else math.nan
        if math.isnan(score):
            return {
                "status": "no_data",
                "expert_balance_score": math.nan,
                "load_balance_trend": "unknown",
                "worst_layer": None,
                "dead_experts": [],
                "dropped": math.nan,
                "observations": 0,
                "recommendations": [],
            }
        by_layer = [balance_score(row[None]) for row in load_LE]
        dead = [{"layer": layers[at], "expert": int(expert)} for at, expert in zip(*np.nonzero(load_LE == 0), strict=True)]
        dropped = float(np.mean([item.dropped_L for item in seen], axis=0).max())
        return {
            "status": "balanced" if score >= WARN else "imbalanced",
            "expert_balance_score": score,
            "load_balance_trend": _trend(seen),
            "worst_layer": layers[int(np.nanargmin(by_layer))],
            "dead_experts": dead,
            "dropped": dropped,
            "observations": len(seen),
            "recommendations": self._advice(score, len(dead), dropped),
        }

    def _advice(self, score: float, dead: int, dropped: float) -> list[str]:
        """Settings, each with its reason. Balance first: capacity only moves what an uneven router drops."""
        config, found = self.config, []
        if score < WARN:
            weight = max(0.02, 2 * config.load_balancing_weight)
            found.append(f"load_balancing_weight={min(weight, 10.0):g}: the balance score is {score:.2f}, below {WARN}")
        if (score < WARN or dead) and config.router_bias_rate == 0:
            why = f"{dead} experts get no token" if dead else "the bias balances without touching the loss"
            found.append(f"router_bias_rate=0.001: {why}")
        if dropped > DROPPED and not config.moe_dropless:
            factor = min(64.0, max(2.0, 1.5 * config.capacity_factor))
            found.append(f"capacity_factor={factor:g}: {100 * dropped:.1f} % of the choices are dropped in the worst layer")
        return found

    def create_deepspeed_moe_config(self, base_config: Mapping[str, Any]) -> dict[str, Any]:
        """`base_config` as DeepSpeed may have it for this model: every key checked, and with experts spread over ranks a ZeRO
        stage of at most 2 without offload of parameters. Experts need no block of their own: they are ours, in two stacked
        parameters a layer, and DeepSpeed reads no `moe` block.

        Raises:
            ConfigError: keys that DeepSpeed does not read (a `moe` block among them), contradictions.
        """
        Config.from_deepspeed(base_config)
        found: dict[str, Any] = deepcopy(dict(base_config))
        zero = found.get("zero_optimization")
        if self.config.use_moe and self.config.expert_parallel_size > 1 and isinstance(zero, dict):
            if zero.get("stage", 0) > 2:
                zero["stage"] = 2
                for name in [name for name in zero if name.startswith("stage3_")]:
                    del zero[name]
            zero.pop("offload_param", None)
        return found


def _trend(seen: list[Routing]) -> str:
    if len(seen) < LEAST:
        return "unknown"
    half = len(seen) // 2
    before, after = (balance_score(sum(part, np.zeros(1))) for part in _loads(seen, half))
    if math.isnan(before) or math.isnan(after):
        return "unknown"
    return "stable" if abs(after - before) < STEADY else "improving" if after > before else "worsening"


def _loads(seen: list[Routing], half: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    loads = [item.load_LE for item in seen]
    return loads[:half], loads[half:]
