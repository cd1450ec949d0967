"""`AdaptiveHyperparameterOptimizer`: the rate controller for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import record as rec
from .adaptive import CUT, RateController, Rules

_NAMES = (("loss",), ("grad_norm", "gradient_norm"), ("lr", "learning_rate"))


class AdaptiveHyperparameterOptimizer:
    """Says when the learning rate should be lowered, from the loss of each step.

    Args:
        config: its spike_window, adaptive_cooldown_steps, lr_multiplier_min, max_adaptive_actions count (default: the
            defaults of `Config`). `adaptive` does not: who asks wants an answer.
    """

    def __init__(self, config: Any = None) -> None:
        rules = Rules() if config is None else Rules.from_config(config)
        self._controller = RateController(replace(rules, mode="act", rollback=False, gives_back=False))

    def should_adjust_learning_rate(self, current_metrics: Any) -> dict[str, Any] | None:
        """Take the metrics of one step, each step once; None, or what to do about the rate.

        Args:
            current_metrics: a mapping or an object with `loss` (nats, not its logarithm), and what is known of `grad_norm`,
                `step` (or `global_step`; else one more than before), `lr` (or `learning_rate`), `skipped`. Without a loss, or
                with one that is not finite, nothing is said.

        Returns:
            `factor` (multiply the present rate by it; below 1), `reason`, `statistic`, `threshold`, `step`, and `stop`: True
            when it has been lowered twice in vain, or trouble comes while it is at `lr_multiplier_min` (which cuts of separate
            troubles reach too: here nothing is given back).

        Raises:
            TypeError: a value is no number.
        """
        loss, norm, lr = (_number(current_metrics, names) for names in _NAMES)
        at = _number(current_metrics, ("step", "global_step"))
        step = self._controller.step + 1 if at is None else int(at)
        skipped = bool(_get(current_metrics, "skipped"))
        before = self._controller.factor
        for decision in self._controller.observe(rec.Step(step=step, loss=loss, grad_norm=norm, lr=lr, skipped=skipped)):
            if decision.kind in ("cut", "stop"):
                lowered = self._controller.factor / before
                return {
                    "factor": lowered if decision.kind == "cut" else CUT,
                    "reason": decision.reason,
                    "statistic": decision.statistic,
                    "threshold": decision.threshold,
                    "step": step,
                    "stop": decision.kind == "stop",
                }
        return None


def _get(given: Any, name: str) -> Any:
    return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)


def _number(given: Any, names: tuple[str, ...]) -> float | None:
    """The first of these that is there; tensors of one value count as numbers.

    Raises:
        TypeError: it is no number.
    """
    for name in names:
        value = _get(given, name)
        if value is None:
            continue
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: must be a number, not {type(value).__name__}") from error
    return None
