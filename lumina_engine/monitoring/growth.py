"""Whether a run should get or lose an expert: balance first, growth last. `growth_watch.py` asks it over a log.

All levels are relative to an equal share, 1/E; they come with the figure that crossed them. Nothing here changes anything.

Shapes: L expert layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from ..config.schema import Config, DeepSeekConfig
from .balance import DROPPED, HOT, WEAK

COLD = 0.1  # of the equal share
SUSTAINED = 1_000  # steps that the load must cover before an expert is called dead, or growth is thought of
GIVEN_UP = 2_000  # steps after which a dead expert is not worth reviving
STATE_BYTES = 16  # of a parameter in training: weight, gradient, two moments in fp32


class ArchitectureEvolution:
    """Suggests a change to the experts of a run.

    Args:
        config: the keys that suggestions start from (default: a `Config` with its defaults). Without one the size of what would
            be added is unknown.
    """

    def __init__(self, config: Config | DeepSeekConfig | None = None) -> None:
        self.config = config

    def should_add_expert(self, *, expert_utilization: Any, performance_metrics: Any = None) -> dict[str, Any] | None:
        """None, or what to do about the experts.

        Args:
            expert_utilization: tokens or shares per expert: a list, a mapping by expert, lists or mappings by layer, an
                `experts` record or any object with `load` (and `layers`).
            performance_metrics: a mapping or an object with what is known of `steps` (that the load covers), `dropped` (share
                of choices, a number or one by layer), `eval_loss` (the values in order; one alone says nothing of a trend).

        Returns:
            `action` (rebalance, revive_expert, remove_expert, add_expert), `reasoning`, `layer`, `expert`, `statistic` (value,
            threshold, and of what), `parameters_added`, `memory_added` (bytes in fp32 training; None where no config was given)
            and `setting` (key and value to set; empty for those that need the checkpoint to be rewritten).

        Raises:
            TypeError: the utilization is none of these.
        """
        loads = loads_of(expert_utilization)
        steps = _number(_get(performance_metrics, "steps"))
        dropped = _dropped(performance_metrics, expert_utilization, list(loads))
        shares = {
            layer: np.asarray(load, np.float64) / sum(load) for layer, load in loads.items() if len(load) > 1 and sum(load) > 0
        }
        if not shares:
            return None
        hot = max(shares, key=lambda layer: float(shares[layer].max() * len(shares[layer])))
        peak = float(shares[hot].max() * len(shares[hot]))
        worst = max(dropped, key=lambda layer: dropped[layer], default=hot)
        lost = dropped.get(worst, 0.0)
        if (peak > HOT or lost > DROPPED) and self._weak:
            return self._rebalance(hot, shares[hot], peak, worst, lost)
        if steps is not None and steps >= SUSTAINED and (found := self._cold(shares, steps)) is not None:
            return found
        crowded = peak > HOT and dropped.get(hot, 0.0) > DROPPED
        falling = _falling(_get(performance_metrics, "eval_loss"))
        if crowded and falling and steps is not None and steps >= SUSTAINED and self._may_grow(len(shares[hot])):
            return self._add(hot, shares[hot], peak, dropped[hot], steps)
        return None

    @property
    def _keys(self) -> Config | DeepSeekConfig:
        return self.config if self.config is not None else Config()

    @property
    def _weak(self) -> bool:
        return self._keys.router_bias_rate == 0 and self._keys.load_balancing_weight < WEAK

    @property
    def spread(self) -> bool:
        """Whether the experts are spread over ranks, where their number cannot change."""
        return self._keys.expert_parallel_size > 1

    def _may_grow(self, experts: int) -> bool:
        keys = self._keys
        most = getattr(keys, "max_num_experts", 64)
        return keys.moe_top_k == 1 and keys.expert_parallel_size == 1 and experts < most

    def _rebalance(self, hot: int, share_E: np.ndarray, peak: float, worst: int, lost: float) -> dict[str, Any]:
        keys, experts = self._keys, len(share_E)
        weight = keys.load_balancing_weight
        if peak > HOT:
            setting: dict[str, Any] = {"load_balancing_weight": 2 * weight} if weight > 0 else {"router_bias_rate": 0.001}
            reason = f"an expert of layer {hot} gets {peak:.1f} times its share of 1/{experts}"
            return self._told("rebalance", reason, hot, int(share_E.argmax()), ("share of 1/E", peak, HOT), setting)
        setting = {"capacity_factor": min(64.0, 2 * keys.capacity_factor)}
        reason = f"layer {worst} drops {100 * lost:.1f} % of its choices though no expert is hot"
        return self._told("rebalance", reason, worst, None, ("dropped", lost, DROPPED), setting)

    def _cold(self, shares: Mapping[int, np.ndarray], steps: float) -> dict[str, Any] | None:
        layer = min(shares, key=lambda layer: float(shares[layer].min() * len(shares[layer])))
        share_E = shares[layer]
        least = float(share_E.min() * len(share_E))
        if least >= COLD:
            return None
        expert = int(share_E.argmin())
        reason = f"expert {expert} of layer {layer} had {least:.2f} of its share of 1/{len(share_E)} over {steps:,.0f} steps"
        statistic = ("share of 1/E", least, COLD)
        if steps < GIVEN_UP or len(share_E) - 1 < max(1, self._keys.moe_top_k):
            setting = {"router_bias_rate": 0.001} if self._keys.router_bias_rate == 0 else {}
            return self._told("revive_expert", reason, layer, expert, statistic, setting)
        return self._told("remove_expert", reason, layer, expert, statistic, {}, -1)

    def _add(self, layer: int, share_E: np.ndarray, peak: float, lost: float, steps: float) -> dict[str, Any]:
        reason = (
            f"an expert of layer {layer} gets {peak:.1f} times its share and {100 * lost:.1f} % of the layer's choices are "
            f"dropped over {steps:,.0f} steps although balancing is on, and the evaluation loss still falls"
        )
        return self._told("add_expert", reason, layer, int(share_E.argmax()), ("share of 1/E", peak, HOT), {}, 1)

    def _told(
        self,
        action: str,
        reasoning: str,
        layer: int,
        expert: int | None,
        statistic: tuple[str, float, float],
        setting: dict[str, Any],
        experts: int = 0,
    ) -> dict[str, Any]:
        added = None if self.config is None else experts * _expert_parameters(self.config)
        name, value, threshold = statistic
        return {
            "action": action,
            "reasoning": reasoning,
            "layer": layer,
            "expert": expert,
            "statistic": {"name": name, "value": value, "threshold": threshold},
            "parameters_added": added,
            "memory_added": None if added is None else STATE_BYTES * added,
            "setting": setting,
        }


def _expert_parameters(config: Config | DeepSeekConfig) -> int:
    """Parameters of one expert and its router row in each expert layer, since all layers change together."""
    shape = config if isinstance(config, DeepSeekConfig) else DeepSeekConfig.from_config(config)
    return shape.expert_layers * shape.hidden_size * (3 * shape.expert_width + 1)


def loads_of(given: Any) -> dict[int, list[float]]:
    """Load per expert by layer, whatever the form; what has no layers is layer 0.

    Raises:
        TypeError: no numbers in it.
    """
    if hasattr(given, "load"):
        layers = list(getattr(given, "layers", []))
        rows = loads_of(given.load)
        return {layers[place] if place < len(layers) else place: load for place, load in rows.items()}
    if isinstance(given, np.ndarray):
        given = given.tolist()
    values = list(given.values()) if isinstance(given, Mapping) else list(given) if isinstance(given, Sequence) else None
    if values is None or isinstance(given, str):
        raise TypeError(f"expert_utilization: lists, mappings or an object with `load`, not {type(given).__name__}")
    if values and all(isinstance(value, Real) for value in values):
        return {0: [float(value) if math.isfinite(value) and value > 0 else 0.0 for value in values]}
    names = [_index(name, place) for place, name in enumerate(given)] if isinstance(given, Mapping) else range(len(values))
    return {name: loads_of(value).get(0, []) for name, value in zip(names, values, strict=True)}


def _index(name: object, place: int) -> int:
    """The number of a layer: itself, or the digits at the end of its name."""
    if isinstance(name, int):
        return name
    digits = str(name).rstrip()[-4:]
    tail = "".join(character for character in digits if character.isdigit())
    return int(tail) if tail else place


def _get(given: Any, name: str) -> Any:
    return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _dropped(metrics: Any, utilization: Any, layers: list[int]) -> dict[int, float]:
    """Share of dropped choices by layer; one number is that of every layer."""
    value = _get(metrics, "dropped")
    value = _get(utilization, "dropped") if value is None and not isinstance(utilization, Mapping | Sequence) else value
    if isinstance(value, Mapping):
        return {_index(layer, place): float(share) for place, (layer, share) in enumerate(value.items())}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {layer: float(share) for layer, share in zip(layers, value, strict=False) if math.isfinite(share)}
    number = _number(value)
    return {} if number is None else dict.fromkeys(layers, number)


def _falling(losses: Any) -> bool:
    """Whether the last evaluation is below all before it; one alone says nothing."""
    known = [float(v) for v in losses if math.isfinite(v)] if isinstance(losses, Sequence) else []
    return len(known) >= 2 and known[-1] < min(known[:-1])
