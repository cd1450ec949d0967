"""Early stop on the fitted curve: a run ends when what its evaluation loss can still gain is surely less than asked for.

The gain is the fall of `eval_loss` from the newest evaluation to the last planned step, in nats. The curve through the
run's own evaluations after the warm-up (`scaling.py`, 12 of them over a factor of 4 in tokens) gives it with a 95 % interval,
whose upper end is what counts. Where the points allow no fit there is no answer, and the run goes on.

A rate that still falls brings more than the curve tells: it lowers the noise of the weights as well. On a quadratic with noise
the curve alone missed up to half of the gain under a linear schedule; the straight line through the newest 12 evaluations (the
upper end of its slope, to the last step) missed a tenth at worst, in single evaluations, none of which ended a run with more
left than asked for. So the larger of the two counts, unless the rate is constant. A cosine is nearly flat at its top, where no
line tells of the fall to come: nothing is decided before the middle of its decay, from where on its slope only flattens. In WSD
the loss of the flat part tells nothing of what the decay brings: only evaluations within the decay count.

Evaluations tell of one another while the rate goes one course to one end, over one global batch and on the same questions:
after a resume that changes any of these, only those after its step count. A checkpoint of a version without early stop has no
evaluations: after a resume from it, too, only later ones count.

Nothing but records enters, so the log alone gives each decision again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..config.steps import LEAST_POINTS, decay_start, warmup_of
from . import record as rec
from .balance import action_of as action_of_balance
from .balance import reader
from .scaling import RANGE, TooLittle, fit, student

EARLY_STOP = "early_stop"  # `what` of the change that ends a run, and code of the alert that advises it
# that it goes by, beside those of all controllers
KEYS = ("early_stopping_gain", "lr_schedule", "learning_rate", "warmup_steps", "min_lr_ratio", "decay_ratio", "eval_batches")
_RULE = "remaining_gain"
_DIGITS = 9  # of a figure; the last bits of a fit differ between processors


@dataclass(frozen=True, slots=True)
class EarlyStopRules:
    """What the machine goes by. `total_steps` are those planned (0: not known yet), `run` the name that advice gives."""

    mode: str = "advise"
    gain: float = 0.0
    most: int = 20
    schedule: str = "constant"
    warmup_steps: Any = 0
    decay_ratio: float = 0.2
    peak: float = 0.0  # learning_rate
    floor: float = 0.0  # min_lr_ratio
    batches: int = 0  # eval_batches
    total_steps: int = 0
    run: str = "RUN"

    @classmethod
    def from_config(cls, config: Any, total_steps: int = 0, run: str = "RUN") -> EarlyStopRules:
        """The rules of a configuration: any object or mapping with its keys."""
        get = reader(config)
        return cls(
            mode=str(get("adaptive")),
            gain=float(get("early_stopping_gain")),
            most=int(get("max_adaptive_actions")),
            schedule=str(get("lr_schedule")),
            warmup_steps=get("warmup_steps"),
            decay_ratio=float(get("decay_ratio")),
            peak=float(get("learning_rate")),
            floor=float(get("min_lr_ratio")),
            batches=int(get("eval_batches")),
            total_steps=total_steps,
            run=run,
        )

    @property
    def on(self) -> bool:
        """Whether anything may be decided."""
        return self.mode != "off" and self.gain > 0 and self.total_steps > 0

    @property
    def after(self) -> int:
        """The step after which evaluations count."""
        warmup = self.warmup
        return decay_start(self.total_steps, warmup, self.decay_ratio) if self.schedule == "wsd" else warmup

    @property
    def course(self) -> list[Any]:
        """What evaluations that tell of one another have in common, as JSON values: their batches, and the rate's course."""
        falling = [] if self.schedule == "constant" else [self.warmup, self.floor, self.decay_ratio, self.total_steps]
        return [self.batches, self.schedule, self.peak, *falling]

    @property
    def earliest(self) -> float:
        """The step before which nothing is decided."""
        return (self.warmup + self.total_steps) / 2 if self.schedule == "cosine" else 0

    @property
    def warmup(self) -> int:
        """The last step of the warm-up."""
        return warmup_of(self.warmup_steps, self.total_steps)


def remaining_gain(tokens_N: np.ndarray, loss_N: np.ndarray, end: float, falling: bool) -> dict[str, float]:
    """What the loss still falls from the last of N evaluations to `end` tokens: `gain` (estimate), `low`, `high` in nats.

    Args:
        falling: whether the learning rate falls on the way.

    Returns:
        the figures to 9 digits.

    Raises:
        TooLittle: the evaluations allow no fit.
    """
    found = fit(tokens_N, loss_N).gain(end)
    if falling:
        found["high"] = max(found["high"], _straight(tokens_N[-LEAST_POINTS:], loss_N[-LEAST_POINTS:], end))
    return {name: float(f"{value:.{_DIGITS}g}") for name, value in found.items()}


def _straight(tokens_N: np.ndarray, loss_N: np.ndarray, end: float) -> float:
    """The fall to `end` along the line through all points, at the upper end of its slope."""
    x_N, y_N = tokens_N - tokens_N.mean(), loss_N - loss_N.mean()
    squares = float((x_N**2).sum())
    slope, degrees = float((x_N * y_N).sum()) / squares, len(x_N) - 2
    error = math.sqrt(float(((y_N - slope * x_N) ** 2).sum()) / degrees / squares)
    return (student(degrees) * error - slope) * (end - float(tokens_N[-1]))


def alike(mine: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two processors may have found what two ends of a run rest on: figures next to each other are rounded apart."""
    if mine is None or other is None or mine.keys() != other.keys():
        return mine == other
    near = 2 * 10.0 ** (1 - _DIGITS)  # twice the last digit of the least that is written with so many
    return all(
        math.isclose(value, other[name], rel_tol=near) if isinstance(value, float) else value == other[name]
        for name, value in mine.items()
    )


def action_of(record: rec.Record) -> dict[str, Any] | None:
    """What an action of this machine or of that of balance rests on, or its advice to take one; None for every other record."""
    if isinstance(record, rec.Change) and record.what == EARLY_STOP:
        return record.evidence
    if isinstance(record, rec.Alert) and record.code == EARLY_STOP:
        return {"action": "advice", "rule": _RULE, "step": record.step}
    return action_of_balance(record)


def saved_actions(actions: Iterable[dict[str, Any]], back: rec.Rewind) -> list[dict[str, Any]]:
    """Of the actions up to a return those that its checkpoint has: what comes of an evaluation after the save comes again."""

    def has(action: Mapping[str, Any]) -> bool:
        own = action["step"] == back.to_step and action.get("rule") == _RULE
        return back.evaluated if own else action["step"] <= back.to_step

    return [action for action in actions if has(action)]


def has_evaluation(state: Mapping[str, Any], step: int) -> bool:
    """Whether the state in the checkpoint of `step` has the evaluation of that very step.

    A save of an interval comes before it; that of an emergency, or of the end by an evaluation, after it.
    """
    return any(item[0] == step for item in state.get("evals", []))


@dataclass(slots=True)
class _State:
    """Everything that the decisions depend on beside the rules; part of a checkpoint."""

    evals: list[list[float]] = field(default_factory=list)  # step, tokens, loss
    step: int = 0  # of the newest record of a step, and the tokens so far
    tokens: int = 0
    advised: list[float] | None = None  # the gain of which it was advised, and the step
    course: list[Any] | None = None  # of the rules (None: the planned steps are not known yet)
    size: int = 0  # tokens of a global batch, with padding
    since: int = 0  # the step after which evaluations count
    base: list[int] = field(default_factory=lambda: [0, 0])  # step and tokens from which those of a step are counted


class EarlyStop:
    """The machine. `note` each `step` and `eval` record once, in the order of the log; `judge` after one of an evaluation, and
    `adopt` what that gave. `observe` does all three."""

    def __init__(self, rules: EarlyStopRules) -> None:
        self.rules = rules
        self._s = _State()

    def use(self, rules: EarlyStopRules) -> None:
        """Go on by other rules, which change neither the course of the rate nor what is evaluated."""
        self.rules = rules

    def begin(self, rules: EarlyStopRules, step: int) -> None:
        """Go on by these rules from the checkpoint of `step`: on another course, earlier evaluations count no more."""
        s, self.rules = self._s, rules
        if rules.total_steps:
            if s.course not in (None, rules.course):
                s.since, s.base = step, [s.step, s.tokens]
            s.course = rules.course

    def observe(self, record: rec.Step | rec.Eval, spent: int) -> list[rec.Change | rec.Alert]:
        """The decision that this record brings; `spent` actions have been taken in the run, by whatever controller."""
        decision = self.judge(spent) if self.note(record) else None
        self.adopt(decision)
        return [] if decision is None else [decision]

    def note(self, record: rec.Step | rec.Eval) -> bool:
        """Take a record. Returns whether it is an evaluation to judge by."""
        s = self._s
        if isinstance(record, rec.Step):
            size = (record.batch or 0) * (record.seq_length or 0)  # a curriculum makes more rows as it makes them shorter
            if s.size and size and size != s.size:
                s.since, s.base = record.step, [record.step, record.tokens]
            s.size = size or s.size
            s.step, s.tokens = record.step, record.tokens
            return False
        if record.loss is None or not math.isfinite(record.loss) or not s.step:
            return False
        tokens = self._tokens(record.step)
        s.evals = [item for item in s.evals if item[1] >= tokens / RANGE] + [[record.step, tokens, record.loss]]
        return True

    def judge(self, spent: int) -> rec.Change | rec.Alert | None:
        """What the newest evaluation decides."""
        s, rules = self._s, self.rules
        known = [item for item in s.evals if item[0] > max(rules.after, s.since)]
        if not rules.on or spent >= rules.most or not known or (rules.mode == "advise" and self._advised):
            return None
        step = known[-1][0]
        if not rules.earliest <= step < rules.total_steps:
            return None
        end = self._tokens(rules.total_steps)
        points_N3 = np.array(known)
        try:
            found = remaining_gain(points_N3[:, 1], points_N3[:, 2], end, rules.schedule != "constant")
        except TooLittle:
            return None
        return self._decision(int(step), len(known), found) if found["high"] < rules.gain else None

    def adopt(self, decision: rec.Change | rec.Alert | None) -> None:
        """Take note of what was decided, here or by rank 0."""
        if isinstance(decision, rec.Alert):
            self._s.advised = [self.rules.gain, float(decision.step or 0)]

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return asdict(self._s)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back the state that a checkpoint has; what it does not have is as at a start."""
        evals = [list(item) for item in state.get("evals", [])]
        advised = state.get("advised")
        advised = None if advised is None else list(advised)
        numbers = {name: int(state.get(name, 0)) for name in ("step", "tokens", "size", "since")}
        base = list(state.get("base", (0, 0)))
        self._s = _State(evals, advised=advised, course=state.get("course"), base=base, **numbers)

    def _tokens(self, step: int) -> float:
        """Tokens up to a step that has no record (`log_interval`) or is still to come, by those of the newest steps."""
        s = self._s
        (step_0, tokens_0) = s.base if s.step > s.base[0] else (0, 0)
        return s.tokens + (step - s.step) * (s.tokens - tokens_0) / (s.step - step_0)

    @property
    def _advised(self) -> bool:
        """Whether the same has been advised already."""
        return self._s.advised is not None and self._s.advised[0] == self.rules.gain

    def _decision(self, step: int, points: int, found: Mapping[str, float]) -> rec.Change | rec.Alert:
        """The end of the run, or the advice to end it, with what it rests on."""
        rules = self.rules
        gain, low, high = found["gain"], found["low"], found["high"]
        words = (
            f"eval_loss can fall by at most {high:.3g} to step {rules.total_steps} (95 %; the curve through {points} "
            f"evaluations gives {gain:.3g}, at least {low:.3g}), less than early_stopping_gain={rules.gain:g}"
        )
        if rules.mode == "advise":
            advice = f"end it: lumina-engine runs stop {rules.run}"
            message = f"step {step}: {words}"
            return rec.Alert(severity="info", code=EARLY_STOP, message=message, recommendation=advice, step=step)
        evidence = {
            "action": "stop",
            "rule": _RULE,
            "statistic": high,
            "threshold": rules.gain,
            "window": points,
            "cooldown": 0,  # nothing comes after it
            "gain": gain,
            "low": low,
            "step": step,
        }
        return rec.Change(
            what=EARLY_STOP, step=step, before=rules.total_steps, after=step, by="adaptive", reason=words, evidence=evidence
        )
