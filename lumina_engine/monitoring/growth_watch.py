"""What a log says about more or fewer experts: advice, or with `expert_growth=act` the change that a save is to make.

The change is decided here, and done at a save (`training/boundary.py`) and the start behind it (`training/experts.py`).

Shapes: E experts.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeGuard, TypeVar

import numpy as np

from ..config.schema import Config
from . import record as rec
from .balance import CAPACITY, DROPPED, EXPERTS, WEIGHT
from .experts import layers_of
from .growth import COLD, GIVEN_UP, SUSTAINED, ArchitectureEvolution
from .say import say

OUTCOME = "expert_growth_outcome"  # `what` of the change that tells what came of another number of experts
FAILED = "expert_growth_failed"  # code of the alert that tells why nothing came of it
REFUSALS = 2  # of one action, after which it is not decided again: each costs a restart, and one of `max_adaptive_actions`
_T = TypeVar("_T")


def is_decision(record: rec.Record) -> TypeGuard[rec.Change]:
    """Whether a record is a decision of the run about the number of its experts."""
    return isinstance(record, rec.Change) and record.what == EXPERTS and record.by == "adaptive"


def failure(change: rec.Change, reason: str) -> rec.Alert:
    """The alert that nothing came of a decision, and why."""
    message = f"step {change.step}: the run stays with {change.before} experts: {' '.join(reason.split())}"
    advice = (
        f"expert_growth=act looks again once the new load has lasted, and gives up after {REFUSALS} refusals; "
        "expert_growth=advise only tells"
    )
    return rec.Alert(severity="warning", code=FAILED, message=message, recommendation=advice, step=change.step)


class LoadWindow:
    """What `experts` records told of the last `GIVEN_UP` steps, and their sum by layer. A row is added once and taken out once.

    A row of a layer is the load per expert and, last, the share of dropped choices: (E + 1,). Loads are counts: their sums in
    float64 are exact below 2^53, however often rows come and go.
    """

    def __init__(self) -> None:
        self.steps: deque[tuple[int, dict[int, np.ndarray]]] = deque()  # rows by layer of each step, the oldest first
        self._sums: dict[int, np.ndarray] = {}
        self._rows: Counter[int] = Counter()  # how many a sum is of

    def take(self, record: rec.Experts) -> bool:
        """Add a record, or a part of one that is long; whether all layers of its step are there.

        Where a layer has another number of experts than before, the window begins anew with it.
        """
        self.go_back(record.step)
        if any(len(seen.load) != self.experts(layer) for layer, seen in layers_of(record) if layer in self._sums):
            self.clear()
        if not self.steps or self.steps[-1][0] < record.step:
            self.steps.append((record.step, {}))
        rows = self.steps[-1][1]
        for layer, seen in layers_of(record):
            if layer in rows:
                self._subtract(layer, rows.pop(layer))
            rows[layer] = np.array([*seen.load, seen.dropped or 0.0], np.float64)
            self._add(layer, rows[layer])
        self._forget(record.step)
        return len(rows) == len(self._sums)

    def go_back(self, step: int) -> None:
        """Take out what is of later steps than this."""
        while self.steps and self.steps[-1][0] > step:
            self._take_out(self.steps.pop()[1])

    def clear(self) -> None:
        """Forget everything."""
        self.steps.clear()
        self._sums.clear()
        self._rows.clear()

    def experts(self, layer: int) -> int:
        """How many a layer has."""
        return len(self._sums[layer]) - 1

    def loads(self) -> dict[int, list[float]]:
        """Load per expert by layer, over all steps."""
        return {layer: self._sums[layer][:-1].tolist() for layer in sorted(self._sums)}

    def dropped(self) -> dict[int, float]:
        """Mean share of dropped choices by layer."""
        return {layer: float(total[-1]) / self._rows[layer] for layer, total in self._sums.items()}

    @property
    def span(self) -> int:
        """Steps from the first record to the last, both counted."""
        return self.steps[-1][0] - self.steps[0][0] + 1 if self.steps else 0

    def _forget(self, now: int) -> None:
        """Leave what covers `GIVEN_UP` steps up to `now`: the oldest goes only where the next one reaches as far back."""
        while len(self.steps) > 1 and now - self.steps[1][0] + 1 >= GIVEN_UP:
            self._take_out(self.steps.popleft()[1])

    def _take_out(self, rows: Mapping[int, np.ndarray]) -> None:
        for layer, row in rows.items():
            self._subtract(layer, row)

    def _add(self, layer: int, row: np.ndarray) -> None:
        self._sums[layer] = self._sums[layer] + row if layer in self._sums else row.copy()
        self._rows[layer] += 1

    def _subtract(self, layer: int, row: np.ndarray) -> None:
        self._sums[layer] = self._sums[layer] - row
        self._rows[layer] -= 1
        if not self._rows[layer]:
            del self._sums[layer]


class GrowthWatch:
    """The suggestions over the records of a run: as alerts with the command to run, each told once until it changes; and, where
    `expert_growth` is act, as the change that a save is to make (`wanted`).

    A rebalance is not told here: the controller of balance advises it, or does it (`balance.py`). The watch is rank 0's and not
    the supervisor's, which has neither the configuration nor numpy in memory.

    A change of the number of experts that stands in the log begins the window anew, whatever became of it: what follows is
    judged by what is in force then, and nothing is tried again before the load has lasted as long once more. What has been
    refused `REFUSALS` times in a run, in whatever branch of it, is not tried any more.

    Args:
        config: the configuration in force.
        run: the name by which commands know the run.
        by_itself: whether somebody would start the run again; without that nothing is done by itself.
    """

    def __init__(self, config: Config, run: str, by_itself: bool = False) -> None:
        self._run, self._by_itself = run, by_itself
        self._window = LoadWindow()
        self._evals: deque[tuple[int, float]] = deque(maxlen=5)  # (step, loss)
        self._doubled: list[rec.Change] = []  # what the controller of balance did in this branch
        self._told: tuple[str, int, int | None] | None = None
        self._change: rec.Change | None = None  # of the number of experts, whose outcome is still to come
        self._before: LoadWindow | None = None  # the window that it was decided by
        self._refused: set[tuple[str, int]] = set()  # action and step of each decision that was refused
        self.use(config)

    def use(self, config: Config) -> None:
        """Go on by another configuration."""
        self._config = config
        self._evolution = ArchitectureEvolution(self._in_force())
        self._on = config.use_moe and config.expert_growth != "off" and config.adaptive != "off"
        self._acts = self._on and self._by_itself and config.expert_growth == config.adaptive == "act"
        self._most = config.max_adaptive_actions

    def replay(self, records: Iterable[rec.Record]) -> None:
        """Fill the windows from a log. What is to be said at its end counts as told."""
        for record in records if self._on else ():
            self._safely(partial(self.take, record))
        self._safely(self._news)

    def observe(self, record: rec.Record) -> rec.Alert | rec.Change | None:
        """The alert that begins with this record, or the outcome of a change. A watch that fails ends itself, with a word in
        engine.log, never the run."""
        return self._safely(partial(self._look, record))

    def wanted(self, step: int, spent: int) -> rec.Change | None:
        """The change of the number of experts that the checkpoint of `step` is to be rewritten for, if one is to be made.

        Its evidence names an expert of each layer. `spent` actions have been taken in the run, by whatever controller.
        """
        return self._safely(partial(self._wanted, step)) if self._acts and spent < self._most else None

    def loads(self) -> dict[int, list[float]]:
        """Load per expert by layer in the window."""
        return self._window.loads()

    def _safely(self, work: Callable[[], _T]) -> _T | None:
        if not self._on:
            return None
        try:
            return work()
        except Exception as error:
            self._on = False
            say(f"lumina: expert_growth: no more advice in this start: {type(error).__name__}: {error}")
            return None

    def _look(self, record: rec.Record) -> rec.Alert | rec.Change | None:
        if not self.take(record):
            return None
        if (outcome := self.outcome()) is not None:
            self.take(outcome)
            return outcome
        found = self._news()
        if found is None:
            return None
        step = self._window.steps[-1][0]
        return rec.Alert(
            severity="info",
            code=found["action"],
            message=f"step {step}: {found['reasoning']}",
            recommendation=self._advice(found),
            step=step,
        )

    def take(self, record: rec.Record) -> bool:
        """Add a record to the windows; whether it completes what is known of the experts at a step."""
        if isinstance(record, rec.Eval) and record.loss is not None:
            self._forget_evals(record.step - 1)  # a resumed run evaluates its step once more
            self._evals.append((record.step, record.loss))
        elif isinstance(record, rec.Rewind):  # what followed is of an abandoned branch
            self._go_back(record.to_step)
        elif is_decision(record):
            self._change, self._before, self._window, self._told = record, self._window, LoadWindow(), None
        elif isinstance(record, rec.Change) and record.what == OUTCOME:
            self._change = self._before = None
        elif isinstance(record, rec.Alert) and record.code == FAILED:
            self._refuse(record.step)
        elif isinstance(record, rec.Change) and record.what in (WEIGHT, CAPACITY) and record.by == "adaptive":
            self._doubled.append(record)
            self._evolution.config = self._in_force()
        return isinstance(record, rec.Experts) and self._window.take(record)

    def _refuse(self, step: int | None) -> None:
        """Nothing came of the decision of a step. A log may be gone through twice, so it counts by its step."""
        change = self._change
        if change is not None and change.evidence is not None and change.step == step:
            self._refused.add((change.evidence["action"], change.step or 0))

    def _may(self, action: str) -> bool:
        """Whether an action has not been refused too often."""
        return sum(name == action for name, _ in self._refused) < REFUSALS

    def _go_back(self, step: int) -> None:
        """Back to a step; a decision behind it was never made."""
        if self._change is not None and self._before is not None and step < (self._change.step or 0):
            self._change, self._window, self._before = None, self._before, None
        self._window.go_back(step)
        self._forget_evals(step)
        # a change is decided in the step before its own, and the checkpoint of that one has it
        self._doubled = [change for change in self._doubled if (change.step or 0) <= step + 1]
        self._evolution.config = self._in_force()

    def _forget_evals(self, after: int) -> None:
        self._evals = deque((item for item in self._evals if item[0] <= after), maxlen=self._evals.maxlen)

    def _in_force(self) -> Config:
        """The configuration with what `adaptive=act` has doubled, unless the key was given another value since."""
        keys = self._config
        if keys.adaptive != "act":
            return keys
        return keys.model_copy(update={c.what: c.after for c in self._doubled if c.before == getattr(keys, c.what)})

    def _news(self) -> dict[str, Any] | None:
        """What is suggested and has not been told yet; it counts as told from here on."""
        found = self._suggestion()
        place = None if found is None else (found["action"], found["layer"], found["expert"])
        if found is None or found["action"] == "rebalance" or place == self._told:
            return None
        self._told = place
        return found

    def _suggestion(self) -> dict[str, Any] | None:
        window = self._window
        losses = [loss for _, loss in self._evals]
        metrics = {"steps": window.span, "dropped": window.dropped(), "eval_loss": losses}
        return self._evolution.should_add_expert(expert_utilization=window.loads(), performance_metrics=metrics)

    def _wanted(self, step: int) -> rec.Change | None:
        found, window = self._suggestion(), self._window
        by = {"add_expert": 1, "remove_expert": -1}.get(found["action"], 0) if found is not None else 0
        if found is None or not by or self._evolution.spread or not self._may(found["action"]):
            return None
        loads, layer, statistic = window.loads(), found["layer"], found["statistic"]
        most = max if by > 0 else min  # the hottest expert of each layer gets a twin, the coldest goes
        chosen = {name: most(range(len(load)), key=load.__getitem__) for name, load in loads.items()} | {layer: found["expert"]}
        evidence = {
            "action": found["action"],
            "rule": "hot_and_dropped" if by > 0 else "dead_expert",
            "statistic": statistic["value"],
            "threshold": statistic["threshold"],
            "window": window.span,
            "cooldown": SUSTAINED,
            "step": step,
            "layer": layer,
            "layers": {str(name): expert for name, expert in chosen.items()},
            "dropped": window.dropped().get(layer, 0.0),
            "eval_loss": self._evals[-1][1] if self._evals else None,
        }
        before, reason = window.experts(layer), found["reasoning"]
        return rec.Change(
            what=EXPERTS, step=step, before=before, after=before + by, by="adaptive", reason=reason, evidence=evidence
        )

    def outcome(self) -> rec.Change | None:
        """What came of the last change of the number of experts, once the new load has lasted; due until it is taken.

        Nothing comes of a change that was refused: its alert has told that.
        """
        change, window = self._change, self._window
        if not self._on or change is None or change.evidence is None or window.span < SUSTAINED:
            return None
        layer = change.evidence["layer"]
        load = window.loads().get(layer, [])
        if len(load) != change.after or not sum(load):
            return None
        loss = self._evals[-1][1] if self._evals else None
        return _outcome(change, change.evidence, load, window.dropped()[layer], loss, window)

    def _advice(self, found: Mapping[str, Any]) -> str:
        if self._acts and found["action"] in ("add_expert", "remove_expert") and self._may(found["action"]):
            return "it is done at a save that save_interval makes, if it still holds then (expert_growth=act)"
        if found["action"] == "revive_expert":
            setting = ", ".join(f"{key}={value:g}" for key, value in found["setting"].items())
            return f"set {setting}" if setting else "wait: the router's bias draws tokens to it"
        verb = "grow" if found["action"] == "add_expert" else "shrink"
        where = f"--expert {found['layer']}:{found['expert']}"
        return f"after a checkpoint: lumina-engine checkpoint {verb} {self._run}@latest --run {self._run[:50]}-{verb} {where}"


def _outcome(
    change: rec.Change, decided: Mapping[str, Any], load_E: list[float], dropped: float, loss: float | None, window: LoadWindow
) -> rec.Change:
    """Whether the layer that another number of experts was decided for is better with it.

    Args:
        decided: the evidence of the decision.
        load_E, dropped: of that layer, over the window since.
        loss: of the last evaluation.
    """
    layer, lost, before = decided["layer"], decided["dropped"], decided["eval_loss"]
    figures = f"layer {layer} drops {100 * dropped:.1f} % of its choices, before {100 * lost:.1f} %"
    if change.after > change.before:
        value, threshold, recovered = dropped, DROPPED, dropped <= DROPPED
    else:
        value, threshold = min(load_E) * len(load_E) / sum(load_E), COLD
        recovered = value >= COLD
        figures = f"the coldest expert of layer {layer} has {value:.2f} of its share; {figures}"
    if loss is not None and before is not None:
        figures += f"; the evaluation loss is {loss:.4g}, before {before:.4g}"
    return rec.Change(
        what=OUTCOME,
        step=window.steps[-1][0],
        before=change.before,
        after=change.after,
        by="adaptive",
        reason=f"{'recovered' if recovered else 'not recovered'}: {figures}",
        evidence={
            "action": "outcome",
            "of": change.step,
            "recovered": recovered,
            "statistic": value,
            "threshold": threshold,
            "window": window.span,
            "dropped": [lost, dropped],
            "eval_loss": [before, loss],
        },
    )
