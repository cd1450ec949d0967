"""The adaptive controller of expert balance: a machine over `experts` records that presses harder where balancing is weak.

Balance comes before growth (`growth.py`). Balancing is weak in a run without a router bias whose `load_balancing_weight` is
below 0.02. Where, over one cooldown, the hottest expert of a layer gets more than twice its share, the weight of the balance
loss is doubled; where no expert is hot and a layer drops more than a twentieth of its choices, the room of each expert
(`capacity_factor`). Each of them once in a run, so neither is ever more than doubled; and one cooldown later the outcome is
told. With `adaptive=advise` nothing is changed: each decision is an alert with the command, and has no outcome. Nothing but
records enters, so all ranks decide alike and the log alone gives the decisions again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import record as rec
from .experts import layers_of

HOT = 2.0  # times the equal share
DROPPED = 0.05  # share of a layer's choices
WEAK = 0.02  # load_balancing_weight below which balancing is weak, while there is no bias
WEIGHT, CAPACITY = "load_balancing_weight", "capacity_factor"  # `what` of a change of them, and their keys
OUTCOME = "expert_balance_outcome"  # and of what came of it
REBALANCE = "rebalance"  # code of the alert that advises one of them
EXPERTS = "num_experts"  # `what` of a change of their number, and its key
TIMES = 2.0  # what either is at most times its key
MOST_CAPACITY = 64.0  # of the key capacity_factor
_ACTION = {"act": "rebalance", "advise": "advice"}  # by mode


def reader(config: Any) -> Callable[[str], Any]:
    """What gives the keys of a configuration, which is any object or mapping with them."""
    return config.__getitem__ if isinstance(config, Mapping) else partial(getattr, config)


def action_of(record: rec.Record) -> dict[str, Any] | None:
    """What an action of the machine rests on, its advice to take one, or a change of the number of experts; None for every
    other record."""
    if isinstance(record, rec.Change):
        return record.evidence if record.what in (WEIGHT, CAPACITY, EXPERTS) and record.by == "adaptive" else None
    if isinstance(record, rec.Alert) and record.code == REBALANCE:
        return {"action": "advice", "step": record.step}
    return None


@dataclass(frozen=True, slots=True)
class BalanceRules:
    """What the machine may do. `capacity` is None where nothing is dropped, `run` the name that advice gives to commands."""

    mode: str = "advise"
    cooldown: int = 200
    most: int = 20
    weight: float = 0.0
    bias_rate: float = 0.0
    capacity: float | None = None
    run: str = "RUN"

    @classmethod
    def from_config(cls, config: Any, run: str = "RUN") -> BalanceRules:
        """The rules of a configuration: any object or mapping with its keys."""
        get = reader(config)
        return cls(
            mode=str(get("adaptive")) if get("use_moe") else "off",
            cooldown=int(get("adaptive_cooldown_steps")),
            most=int(get("max_adaptive_actions")),
            weight=float(get(WEIGHT)),
            bias_rate=float(get("router_bias_rate")),
            capacity=None if get("moe_dropless") else float(get(CAPACITY)),
            run=run,
        )


@dataclass(frozen=True, slots=True)
class _Load:
    """The worst of a window: the layer and expert that are hottest, and the layer that drops most."""

    layer: int
    expert: int
    experts: int
    peak: float  # times the equal share
    worst: int
    dropped: float


@dataclass(slots=True)
class _State:
    """Everything that the decisions depend on beside the rules; part of a checkpoint."""

    seen: list[dict[str, Any]] = field(default_factory=list)  # step, and load and dropped by layer: a cooldown and one before
    doubled: dict[str, float] = field(default_factory=dict)  # the keys that were, and their own values then
    advised: dict[str, float] = field(default_factory=dict)  # those of which it was advised
    waiting: dict[str, Any] | None = None  # evidence of the decision whose cooldown is not over


class BalanceController:
    """The machine. `observe` each step's whole `experts` record once, in the order of the log."""

    def __init__(self, rules: BalanceRules) -> None:
        self.rules = rules
        self._s = _State()

    @property
    def weight(self) -> float:
        """`load_balancing_weight` in force."""
        return self.rules.weight * (TIMES if WEIGHT in self._s.doubled else 1.0)

    @property
    def capacity(self) -> float | None:
        """`capacity_factor` in force; None where nothing is dropped."""
        if self.rules.capacity is None or CAPACITY not in self._s.doubled:
            return self.rules.capacity
        return min(MOST_CAPACITY, TIMES * self.rules.capacity)

    @property
    def spent(self) -> int:
        """Actions of this branch of the run."""
        return len(self._s.doubled)

    def use(self, rules: BalanceRules) -> None:
        """Go on by other rules. What may not act any more doubles nothing, nor a key that has another value now."""
        s, self.rules = self._s, rules
        now = {WEIGHT: rules.weight, CAPACITY: rules.capacity}
        s.doubled = {key: value for key, value in s.doubled.items() if rules.mode == "act" and now[key] == value}
        s.advised = {key: value for key, value in s.advised.items() if rules.mode == "advise" and now[key] == value}
        if s.waiting is not None and s.waiting["action"] != _ACTION.get(rules.mode):
            s.waiting = None
        if rules.mode == "off":
            s.seen = []

    def follow(self, rules: BalanceRules, before: float) -> None:
        """Go on by rules whose room goes with the number of experts; it was `before`. What was doubled of it stays doubled."""
        if rules.capacity is not None:
            self._s.doubled = carried(self.state_dict(), before, rules.capacity)["doubled"]
        self.use(rules)

    def observe(self, record: rec.Experts, spent: int) -> list[rec.Change | rec.Alert]:
        """The decisions that this record brings; `spent` actions have been taken in the run, by whatever controller."""
        s, rules = self._s, self.rules
        if rules.mode == "off":
            return []
        layers = {str(layer): [seen.load, seen.dropped or 0.0] for layer, seen in layers_of(record)}
        s.seen = [item for item in s.seen if _same_experts(item["layers"], layers)]  # other experts than these are no window
        s.seen.append({"step": record.step, "layers": layers})
        start = record.step - rules.cooldown
        later = [item for item in s.seen if item["step"] > start]
        covered = len(later) < len(s.seen)  # the record before them tells that they are all of this cooldown
        s.seen = s.seen[-len(later) - 1 :]
        span = record.step - s.seen[0]["step"]  # a cooldown or more, as far as the records go
        load = _load_of(later) if covered else None
        if load is None:
            return []
        if s.waiting is not None:
            return self._outcome(load, record.step, span) if record.step >= s.waiting["due"] else []
        return self._against(load, record.step, span) if spent < rules.most else []

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        s = self._s
        return {"seen": list(s.seen), "doubled": dict(s.doubled), "advised": dict(s.advised), "waiting": s.waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a state back; what it does not have is as at a start."""
        doubled, advised = dict(state.get("doubled", {})), dict(state.get("advised", {}))
        self._s = _State(list(state.get("seen", [])), doubled, advised, state.get("waiting"))
        self.use(self.rules)

    def _against(self, load: _Load, step: int, span: int) -> list[rec.Change | rec.Alert]:
        rules = self.rules
        done = {**self._s.doubled, **self._s.advised}  # one of them is empty
        if rules.bias_rate > 0 or self.weight >= WEAK:
            return []
        if load.peak > HOT:
            if rules.weight == 0 or WEIGHT in done:
                return []
            values = rules.weight, TIMES * rules.weight
            words = f"expert {load.expert} of layer {load.layer} got {load.peak:.1f} times its share of 1/{load.experts}"
            return [self._rebalance(WEIGHT, "hot_expert", values, (load.peak, HOT, words), step, span)]
        room = rules.capacity
        if load.dropped > DROPPED and room is not None and room < MOST_CAPACITY and CAPACITY not in done:
            values = room, min(MOST_CAPACITY, TIMES * room)
            words = f"layer {load.worst} dropped {100 * load.dropped:.1f} % of its choices though no expert is hot"
            return [self._rebalance(CAPACITY, "dropped", values, (load.dropped, DROPPED, words), step, span)]
        return []

    def _rebalance(
        self, what: str, rule: str, values: tuple[float, float], found: tuple[float, float, str], step: int, span: int
    ) -> rec.Change | rec.Alert:
        """Another value for a key, or the advice to set it."""
        (before, after), (statistic, threshold, words) = values, found
        evidence = {
            "action": _ACTION[self.rules.mode],
            "rule": rule,
            "statistic": statistic,
            "threshold": threshold,
            "window": span,
            "cooldown": self.rules.cooldown,
            "step": step,
        }
        self._s.waiting = {**evidence, "due": step + self.rules.cooldown}
        reason = f"{words} over {span} steps"
        if self.rules.mode == "advise":
            self._s.advised[what] = before
            return self._advice(f"{what}={after:g}", reason, evidence)
        self._s.doubled[what] = before
        return rec.Change(what=what, step=step + 1, before=before, after=after, by="adaptive", reason=reason, evidence=evidence)

    def _advice(self, setting: str, reason: str, evidence: Mapping[str, Any]) -> rec.Alert:
        """The alert with the command, and in words the evidence that an action would have."""
        run, step = self.rules.run, evidence["step"]
        figures = f"{evidence['rule']} {evidence['statistic']:.3g}, threshold {evidence['threshold']:.3g}"
        how = f"window {evidence['window']}, cooldown {evidence['cooldown']}"
        return rec.Alert(
            severity="info",
            code=REBALANCE,
            message=f"step {step}: {reason} ({figures}, {how})",
            recommendation=f"lumina-engine runs stop {run} && lumina-engine train --run {run} --resume {setting}",
            step=step,
        )

    def _outcome(self, load: _Load, step: int, span: int) -> list[rec.Change | rec.Alert]:
        """Whether the cooldown after an action is better than the one before it; of advice there is nothing to tell."""
        assert self._s.waiting is not None
        decided, self._s.waiting = self._s.waiting, None
        if decided["action"] == "advice":
            return []
        hot = decided["rule"] == "hot_expert"
        now, before, threshold = (load.peak if hot else load.dropped), decided["statistic"], decided["threshold"]
        recovered = now <= threshold
        unit = "times the share of the hottest expert" if hot else "of the choices of the worst layer dropped"
        reason = f"{'recovered' if recovered else 'not recovered'}: {now:.3g} {unit}, before {before:.3g}"
        evidence = {
            "action": "outcome",
            "of": decided["step"],
            "recovered": recovered,
            "statistic": now,
            "threshold": threshold,
            "window": span,
        }
        return [rec.Change(what=OUTCOME, step=step, before=before, after=now, by="adaptive", reason=reason, evidence=evidence)]


def carried(state: Mapping[str, Any], before: float, after: float) -> dict[str, Any]:
    """The state of a controller whose `capacity_factor` becomes another one with the number of experts: no choice of anyone."""
    doubled = dict(state.get("doubled", {}))
    if doubled.get(CAPACITY) == before:
        doubled[CAPACITY] = after
    return {**state, "doubled": doubled}


def _same_experts(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the layers that both know have as many experts in both."""
    return all(len(before[layer][0]) == len(load) for layer, (load, _) in now.items() if layer in before)


def _load_of(seen: list[dict[str, Any]]) -> _Load | None:
    """The worst of some records together; None where no token was routed."""
    peaks: list[tuple[float, int, int, int]] = []
    lost: list[tuple[float, int]] = []
    for layer in seen[-1]["layers"]:
        found = [item["layers"][layer] for item in seen if layer in item["layers"]]
        load = [sum(values) for values in zip(*(loads for loads, _ in found), strict=True)]
        lost.append((sum(dropped for _, dropped in found) / len(found), int(layer)))
        if len(load) > 1 and sum(load) > 0:
            expert = max(range(len(load)), key=load.__getitem__)
            peaks.append((load[expert] * len(load) / sum(load), int(layer), expert, len(load)))
    if not peaks:
        return None
    (peak, layer, expert, experts), (dropped, worst) = max(peaks), max(lost)
    return _Load(layer, expert, experts, peak, worst, dropped)
