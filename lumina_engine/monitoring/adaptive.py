"""The adaptive controller of the learning rate: a machine over the records of a run. It lowers the rate where training is hurt.

Schedules do the work; the machine only handles trouble, and never goes above the schedule. It takes `step` and `change` records
in their order and gives its decisions as records. Nothing else enters, no clock and no tensor, so every rank decides alike, a
resumed run decides as the unbroken one, and the log alone gives all decisions again (`decisions.py`).

**What is trouble.** The newest 16 losses against what the run had before: all in logarithms, since the noise of a loss is a
ratio. The *level* is the least median of 16 that the last `spike_window` calm steps had; the *noise* comes from successive
differences of the same steps, which a falling loss does not widen (Rice 1984). Both stand still while the newest losses are
out, for a rate that is too high lifts the loss step by step, and a window that goes along calls each new height normal: by
deviations from a moving median and MAD a run with ten times its rate gave no decision at all. Then one of

- `loss_level`: 8 of the 16 beyond 3 deviations of the noise above the level;
- `loss_rise`: their median beyond 2 deviations in each of 4 looks (a look is every 8 steps): a slow rise, or a lasting one;
- `skips`: the guard of steps has left out 3 finite steps within 64.

The first two count from a rise of 5 % on, and not while the loss comes down again by itself: a cut would come after the
trouble. After an action that takes longer: there is trouble again when one cooldown has brought no new lowest median. Values
that are not finite have a rule of their own and are not looked at.

**What is done** (`adaptive=act`), with a cooldown between any two actions: the rate is halved; if that does not help, or
trouble comes again within two cooldowns, the run goes back to a checkpoint where `spike_policy` allows it, and the rate is
halved again; a third time, or at the lower bound, the run ends. After 4 calm cooldowns each further one gives back a tenth, up
to the schedule's own rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from . import record as rec
from .balance import reader
from .early_stop import action_of
from .health.windows import TINY, noise

FACTOR = "learning_rate_factor"  # `what` of a change of the factor on the schedule's rate
OUTCOME = "learning_rate_outcome"  # and of what came of it
ADVICE = ("lower_rate", "rate_ladder_end", "adaptive_spent")  # codes of the machine's alerts
RECENT = 16  # newest losses, which are judged
LEAST = 32  # losses before them from which there is a level
LOOK = 8  # steps between two looks
FAR, SHARE = 3.0, 8  # deviations, and how many of the newest must be beyond them
HIGH, LASTING = 2.0, 4  # deviations of their median, and for how many looks
RISEN = math.log(1.05)  # least rise that counts, whatever the noise
FALLING, SINKING = 1.0, 0.5  # deviations: within the values beyond `FAR`, and between medians of 16
INSIDE = 1.0  # deviations within which the loss is back
SKIPS, SKIP_SPAN = 3, 64
WARM = 32  # first steps of a run in which nothing is decided
CUT, RAISE, CALM = 0.5, 1.1, 4  # factors, and cooldowns without trouble before the first raise

Kind = Literal["cut", "rollback", "stop", "raise", "outcome", "advice"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What the machine may do. `run` is the name that its advice gives to commands."""

    mode: str = "advise"
    window: int = 128  # calm steps that are remembered
    cooldown: int = 200
    lowest: float = 0.1
    most: int = 20
    rollback: bool = False
    gives_back: bool = True  # whether a calm run gets its rate back
    run: str = "RUN"

    @classmethod
    def from_config(cls, config: Any, run: str = "RUN") -> Rules:
        """The rules of a configuration: any object or mapping with its keys."""
        get = reader(config)
        return cls(
            mode=str(get("adaptive")),
            window=int(get("spike_window")),
            cooldown=int(get("adaptive_cooldown_steps")),
            lowest=float(get("lr_multiplier_min")),
            most=int(get("max_adaptive_actions")),
            rollback=get("spike_policy") == "rollback",
            run=run,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What the machine decided in a step: its record, and what is to be done. `first` is the step in which trouble began."""

    kind: Kind
    record: rec.Change | rec.Alert
    first: int = 0
    statistic: float = 0.0
    threshold: float = 0.0

    @property
    def reason(self) -> str:
        """Why, in words."""
        return str(self.record.reason if isinstance(self.record, rec.Change) else self.record.message)


@dataclass(frozen=True, slots=True)
class Back:
    """A rollback, as the controller is told of it.

    Attributes:
        decision: the evidence of the decision for which the run went back; None if another guard did, then nothing is kept.
        dropped: actions after `to_step` that are not in force any more; they count all the same.
    """

    to_step: int
    decision: dict[str, Any] | None
    dropped: int

    def seen_from(self, step: int) -> Back:
        """The same for a run that is back at `step` or before it: a decision from behind it is not in force any more."""
        return self if self.to_step <= step else Back(step, None, self.dropped)


@dataclass(slots=True)
class _Trouble:
    """A rule that is met."""

    rule: str
    statistic: float
    threshold: float
    window: int
    first: int
    words: str


@dataclass(slots=True)
class _State:
    """Everything that the decisions depend on beside the rules; part of a checkpoint."""

    recent: list[float] = field(default_factory=list)
    recent_steps: list[int] = field(default_factory=list)  # their numbers: not every step has a record (`log_interval`)
    before: list[float] = field(default_factory=list)  # calm losses before the recent ones
    levels: list[float] = field(default_factory=list)  # medians of 16 at calm looks
    medians: list[float] = field(default_factory=list)  # at the last looks, calm or not
    skips: list[int] = field(default_factory=list)  # finite steps of the last 64 that were left out
    seen: int = 0  # finite steps
    step: int = 0  # number of the last one
    shape: list[int | None] = field(default_factory=lambda: [None, None])  # rows and length of a batch
    lr: float | None = None
    out: int = 0  # looks in a row that are high
    first: int = 0  # step in which that began
    factor: float = 1.0
    rung: int = 0
    acted: int | None = None  # step of the last action against trouble
    ended: bool = True  # whether the trouble of the last action is over
    uneasy: int = 0  # last step with trouble in it
    low: float | None = None  # lowest median of 16 since the last action, and the step in which it was met
    low_at: int = 0
    raised: int = 0
    spent_told: bool = False
    actions: list[dict[str, Any]] = field(default_factory=list)  # their evidence; those on balance and experts too
    dropped: int = 0  # actions in branches that rollbacks left
    backs: list[list[Any]] = field(default_factory=list)  # all rollbacks: fields of `Back`
    waiting: dict[str, Any] | None = None  # evidence of the decision whose outcome is still to come
    chosen: int | None = None  # step for which a person has set the rate


class RateController:
    """The machine. `observe` each record once, in the order of the log; `factor` is what the schedule's rate is times now."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._s = _State()

    @property
    def factor(self) -> float:
        """In [`lr_multiplier_min`, 1]; 1 from the choice of a person on."""
        return 1.0 if self._s.chosen is not None else self._s.factor

    @property
    def step(self) -> int:
        """Number of the last step whose figures were finite."""
        return self._s.step

    @property
    def spent(self) -> int:
        """Actions of the run so far, those of abandoned branches, of the controller of balance and on experts with them."""
        return len(self._s.actions) + self._s.dropped

    @property
    def backs(self) -> list[Back]:
        """The rollbacks so far. What a checkpoint has is the beginning of it: the rest came after it."""
        return [Back(*item) for item in self._s.backs]

    def in_force(self) -> list[dict[str, Any]]:
        """The evidence of the actions of this branch."""
        return list(self._s.actions)

    def observe(self, record: rec.Record) -> list[Decision]:
        """The decisions that this record brings."""
        if self.rules.mode == "off":
            return []
        if isinstance(record, rec.Change) and record.what == "learning_rate" and record.by in ("user", "recovery"):
            self._s.chosen = record.step
        elif isinstance(record, rec.Step):
            return self._step(record)
        elif (action := action_of(record)) is not None:
            self._s.actions.append(action)
        return []

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {name: _copy(getattr(self._s, name)) for name in _State.__slots__}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a state back; what it does not have is as at a start."""
        self._s = _State(**{name: _copy(state[name]) for name in _State.__slots__ if name in state})
        self._s.dropped += int(state.get("elsewhere", 0))  # a checkpoint of an earlier version counts those of balance there
        self.use(self.rules)

    def use(self, rules: Rules) -> None:
        """Go on by other rules. What may not act any more has no factor."""
        s, self.rules = self._s, rules
        s.before = s.before[-rules.window :]
        s.factor = max(s.factor, rules.lowest)
        if rules.mode != "act":
            s.factor, s.rung, s.waiting = 1.0, 0, None

    def rolled_back(self, backs: Iterable[Back], step: int) -> None:
        """The state of the checkpoint of `step` has been put back; `backs` are the rollbacks since it was saved, in order."""
        s = self._s
        for back in (item.seen_from(step) for item in backs):
            s.backs = [*s.backs, [back.to_step, back.decision, back.dropped]]
            s.dropped += back.dropped
            if s.chosen is not None and s.chosen > back.to_step:
                s.chosen = None
            if back.decision is not None:
                s.factor = min(s.factor, float(back.decision["factor"]))
                s.rung, s.acted, s.uneasy = int(back.decision["rung"]), back.to_step, back.to_step
                s.low, s.low_at, s.ended = None, back.to_step, False
                s.waiting = {**back.decision, "since": back.to_step, "due": back.to_step + self.rules.cooldown}
        self.use(self.rules)

    # ---- one step -------------------------------------------------------------------------------------------------------

    def _step(self, record: rec.Step) -> list[Decision]:
        s = self._s
        if s.chosen is not None and record.step >= s.chosen:
            self._take_choice()
        loss, norm = record.loss, record.grad_norm
        if loss is None or not (math.isfinite(loss) and (norm is None or math.isfinite(norm))):
            return []
        shape = [record.batch, record.seq_length]
        if s.shape != shape:  # losses of another length or number of rows do not compare
            s.recent, s.recent_steps, s.before, s.levels, s.medians, s.out, s.shape = [], [], [], [], [], 0, shape
            s.low, s.low_at, s.ended, s.waiting = None, record.step, True, None
        s.seen += 1
        s.step = record.step
        s.lr = record.lr
        self._push(math.log(max(loss, TINY)), record.step)
        s.skips = [number for number in s.skips if number > record.step - SKIP_SPAN] + [record.step] * record.skipped
        looks = s.seen % LOOK == 0 and len(s.recent) == RECENT
        trouble = self._look(record.step) if looks else None
        if trouble is None and record.skipped and len(s.skips) >= SKIPS:
            words = f"{len(s.skips)} steps were left out by the guard within {SKIP_SPAN}"
            trouble = _Trouble("skips", float(len(s.skips)), float(SKIPS), SKIP_SPAN, s.skips[0], words)
        found = [self._outcome(record.step)] if self._known() else []
        if trouble is not None and record.step > WARM:
            s.uneasy = record.step
            found.append(self._against(trouble, record.step))
        elif s.out:
            s.uneasy = record.step
        else:
            found.append(self._raise(record.step))
        return [decision for decision in found if decision is not None]

    def _take_choice(self) -> None:
        """A person has set the rate: that is the rate, whatever was done before; a new ladder begins."""
        s = self._s
        s.chosen, s.factor, s.rung, s.acted, s.waiting = None, 1.0, 0, None, None
        s.skips = []

    def _push(self, value: float, step: int) -> None:
        s = self._s
        s.recent_steps = [*s.recent_steps[1 - RECENT :], step]
        if len(s.recent) == RECENT:
            left = s.recent.pop(0)
            if not s.out:
                s.before = [*s.before[1 - self.rules.window :], left]
        s.recent.append(value)

    def _look(self, step: int) -> _Trouble | None:
        """Judge the newest losses; calm ones become part of the level."""
        s = self._s
        middle = median(s.recent)
        s.medians = [*s.medians[-2:], middle]
        if len(s.before) < LEAST or not s.levels:
            s.levels.append(middle)
            return None
        level, sigma = min(s.levels), noise(s.before)
        rise = middle - level
        if rise <= max(HIGH * sigma, RISEN):
            s.out, s.ended = 0, True
            s.levels = [*s.levels[1 - max(2, self.rules.window // LOOK) :], middle]
            return None
        s.out += 1
        if s.out == 1:
            s.first = s.recent_steps[0]
        if s.low is None or middle < s.low - SINKING * sigma:
            s.low, s.low_at = middle, step
        if s.acted is not None and not s.ended and step - s.low_at < self.rules.cooldown:
            return None  # it helps
        far = [value for value in s.recent if value - level > FAR * sigma]
        words = f"the loss went from {math.exp(level):.4g} to {math.exp(middle):.4g}"
        if len(far) >= SHARE and not _falls(far, sigma):
            words = f"{words}: {len(far)} of the last {RECENT} are {FAR:g} sigma above"
            return _Trouble("loss_level", float(len(far)), float(SHARE), RECENT, s.first, words)
        if s.out >= LASTING and middle >= s.medians[0] - SINKING * sigma:
            words = f"{words}: {rise / sigma:.1f} sigma above over {(LASTING - 1) * LOOK + RECENT} steps"
            return _Trouble("loss_rise", rise / sigma, HIGH, (LASTING - 1) * LOOK + RECENT, s.first, words)
        return None

    # ---- decisions ------------------------------------------------------------------------------------------------------

    def _against(self, trouble: _Trouble, step: int) -> Decision | None:
        """What is to be done about trouble, if it is time for it."""
        s, rules = self._s, self.rules
        if s.acted is not None and step - s.acted < rules.cooldown:
            return None
        if self.spent >= rules.most:
            return self._spent(trouble, step)
        if rules.mode == "advise":
            s.acted = step
            s.actions.append({"action": "advice", "step": step})
            return self._alert("advice", "warning", "lower_rate", trouble, step)
        again = s.acted is not None and (step - s.acted <= 2 * rules.cooldown or not s.ended)
        rung = s.rung + 1 if again else 1
        if rung > 2 or s.factor <= rules.lowest:
            s.acted = step
            return self._alert("stop", "critical", "rate_ladder_end", trouble, step)
        kind: Kind = "rollback" if rung == 2 and rules.rollback else "cut"
        decision = self._change(kind, trouble, step, max(rules.lowest, s.factor * CUT), rung)
        s.rung, s.acted, s.skips = rung, step, []
        s.low, s.low_at, s.ended = None, step, False
        return decision

    def _change(self, kind: Kind, trouble: _Trouble, step: int, factor: float, rung: int) -> Decision:
        """Another factor, with its evidence."""
        s = self._s
        level = min(s.levels) if s.levels else (median(s.recent) if s.recent else 0.0)
        evidence = {
            "action": kind,
            "rule": trouble.rule,
            "statistic": trouble.statistic,
            "threshold": trouble.threshold,
            "window": trouble.window,
            "cooldown": self.rules.cooldown,
            "factor": factor,
            "rung": rung,
            "first": trouble.first,
            "step": step,
            "level": level,
            "sigma": noise(s.before) if len(s.before) > 1 else 0.0,
            "loss": median(s.recent),
        }
        record = rec.Change(
            what=FACTOR, step=step + 1, before=s.factor, after=factor, by="adaptive", reason=trouble.words, evidence=evidence
        )
        s.factor = factor
        if kind != "raise":  # what gives back is no action against trouble
            s.actions.append(evidence)
            s.waiting = {**evidence, "since": step, "due": step + self.rules.cooldown}
        return Decision(kind, record, trouble.first, trouble.statistic, trouble.threshold)

    def _raise(self, step: int) -> Decision | None:
        """A tenth back, when nothing was wrong for long."""
        s, rules = self._s, self.rules
        calm = step - max(s.uneasy, s.acted or 0)
        if s.factor >= 1.0 or rules.mode != "act" or not rules.gives_back:
            return None
        if calm < CALM * rules.cooldown or step - s.raised < rules.cooldown:
            return None
        s.raised = step
        words = f"{calm} steps without trouble"
        trouble = _Trouble("calm", float(calm), float(CALM * rules.cooldown), CALM * rules.cooldown, step, words)
        return self._change("raise", trouble, step, min(1.0, s.factor * RAISE), s.rung)

    def _known(self) -> bool:
        """Whether an outcome is due, and enough losses came since the action."""
        s = self._s
        if s.waiting is None or s.step < s.waiting["due"] or len(s.recent) < RECENT:
            return False
        since, enough = s.waiting["since"], min(RECENT, s.waiting["due"] - s.waiting["since"])
        return sum(step > since for step in s.recent_steps) >= enough

    def _outcome(self, step: int) -> Decision | None:
        """Whether the loss is back where it was before the trouble, one cooldown after the action."""
        s = self._s
        assert s.waiting is not None
        decided, s.waiting = s.waiting, None
        middle, level = median(s.recent), float(decided["level"])
        bound = max(INSIDE * float(decided["sigma"]), RISEN)
        recovered = middle - level <= bound
        found = f"{math.exp(middle):.4g}, before the trouble {math.exp(level):.4g}"
        evidence = {
            "action": "outcome",
            "of": decided["step"],
            "recovered": recovered,
            "statistic": middle - level,
            "threshold": bound,
            "window": RECENT,
        }
        reason = f"{'recovered' if recovered else 'not recovered'}: the loss is {found}"
        before = math.exp(float(decided["loss"]))
        record = rec.Change(
            what=OUTCOME, step=step, before=before, after=math.exp(middle), by="adaptive", reason=reason, evidence=evidence
        )
        return Decision("outcome", record)

    def _ladder_words(self) -> str:
        """Why nothing is left to be done."""
        factor, lowest = self._s.factor, self.rules.lowest
        if lowest >= 1.0:
            return "lr_multiplier_min=1 allows no lower rate: the run ends"
        if factor <= lowest:
            return f"the rate is {factor:.3g} of the schedule's already, the lowest allowed (lr_multiplier_min): the run ends"
        return f"the rate is {factor:.3g} of the schedule's already, and that did not help: the run ends"

    def _spent(self, trouble: _Trouble, step: int) -> Decision | None:
        """The budget is used up: said once."""
        if self._s.spent_told:
            return None
        self._s.spent_told = True
        return self._alert("advice", "warning", "adaptive_spent", trouble, step)

    def _alert(self, kind: Kind, severity: rec.Severity, code: str, trouble: _Trouble, step: int) -> Decision:
        """An alert with the command that does what is advised."""
        run = self.rules.run
        lower = f"lumina-engine runs set-lr {run} {self._s.lr * CUT:.3g}" if self._s.lr else "halve learning_rate"
        words = {
            "lower_rate": ("the learning rate is too high for it", f"halve the rate: {lower}"),
            "adaptive_spent": (f"all {self.rules.most} actions of the run are used up (max_adaptive_actions)", lower),
            "rate_ladder_end": (
                self._ladder_words(),
                f"see `lumina-engine runs decisions {run}`; start from an earlier checkpoint with a lower learning_rate",
            ),
        }[code]
        message = f"step {step}: {trouble.words} ({trouble.rule}); {words[0]}"
        record = rec.Alert(severity=severity, code=code, message=message, recommendation=words[1], step=step)
        return Decision(kind, record, trouble.first, trouble.statistic, trouble.threshold)


def _falls(values: list[float], sigma: float) -> bool:
    """Whether the later half of them is well below the earlier one."""
    half = len(values) // 2
    return median(values[-half:]) < median(values[:half]) - FALLING * sigma


def _copy(value: Any) -> Any:
    """Lists and mappings as their own."""
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value
