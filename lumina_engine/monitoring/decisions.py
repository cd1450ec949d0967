"""The decisions of the controllers again, from a log alone: what they decided, what came of it, and whether the log agrees.

A run that was killed goes on from a checkpoint: what it had decided after that one is decided again, at the same steps from the
same figures. A rollback leaves the state of the branch that is abandoned, but its actions stay counted, and the decision for
which it was made stays in force. Between a step's record and that of its decision a kill may fall: then there is nothing to
compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import msgspec

from ..config.schema import Config
from . import record as rec
from .adaptive import ADVICE, FACTOR, OUTCOME, Back, RateController, Rules
from .balance import CAPACITY, EXPERTS, REBALANCE, WEIGHT, BalanceController, BalanceRules
from .balance import OUTCOME as BALANCE_OUTCOME
from .early_stop import EARLY_STOP, EarlyStop, EarlyStopRules, action_of, alike, saved_actions
from .early_stop import KEYS as EARLY_STOP_KEYS
from .experts import joined
from .growth_watch import OUTCOME as GROWTH_OUTCOME
from .growth_watch import GrowthWatch, is_decision

KEYS = (
    *("adaptive", "spike_window", "adaptive_cooldown_steps", "lr_multiplier_min", "max_adaptive_actions", "spike_policy"),
    *("use_moe", "load_balancing_weight", "router_bias_rate", "moe_dropless", "capacity_factor"),
    *EARLY_STOP_KEYS,
    *("expert_growth", "max_num_experts", "moe_top_k", "expert_parallel_size"),
)


@dataclass(frozen=True, slots=True)
class _Ruled:
    """A resume, and the rules from there on. `room`: `capacity_factor` before it went with the number of experts. `anew`: the
    checkpoint has nothing of early stop."""

    step: int
    rules: Rules
    balance: BalanceRules
    early_stop: EarlyStopRules
    room: float | None = None
    anew: bool = False


EVERY = 2_000  # records between two marks: at most so many are decided again when a run goes back

_Item = rec.Step | rec.Eval | rec.Change | rec.Experts | Back | _Ruled


@dataclass(frozen=True, slots=True)
class _Mark:
    """The controllers behind the first `count` items of what was kept, of which `top` is the highest step."""

    count: int
    top: int
    rules: _Ruled
    rate: Mapping[str, Any]
    balance: Mapping[str, Any]
    early_stop: Mapping[str, Any]


def of_controller(record: rec.Record) -> TypeGuard[rec.Change | rec.Alert]:
    """Whether a record is a decision of the controller of the rate, of that of balance, of early stop, or about experts."""
    if isinstance(record, rec.Change):
        names = (FACTOR, OUTCOME, WEIGHT, CAPACITY, BALANCE_OUTCOME, EARLY_STOP, EXPERTS, GROWTH_OUTCOME)
        return record.what in names and record.by == "adaptive"
    return isinstance(record, rec.Alert) and record.code in (*ADVICE, REBALANCE, EARLY_STOP)


def _is_room(record: rec.Record) -> TypeGuard[rec.Change]:
    """Whether a record is the start's, of a `capacity_factor` that goes with another number of experts."""
    return isinstance(record, rec.Change) and record.what == CAPACITY and record.by == "recovery"


def decisions_of(records: Iterable[rec.Record]) -> list[dict[str, Any]]:
    """The decisions of a log as JSON values, in order."""
    return [as_dict(record) for record in records if of_controller(record)]


def as_dict(record: rec.Change | rec.Alert) -> dict[str, Any]:
    """A decision as JSON values: a change has its evidence, an alert its severity and advice."""
    if isinstance(record, rec.Alert):
        words = {"what": record.code, "reason": record.message, "advice": record.recommendation}
        return {"step": record.step, "severity": record.severity, **words}
    return {name: getattr(record, name) for name in ("step", "what", "before", "after", "reason", "evidence")}


def backs_after(records: Iterable[rec.Record], seq: int | None) -> list[Back]:
    """The rollbacks written after record `seq`, the last one before a restored checkpoint. None: unknown, so there are none."""
    found: list[Back] = []
    actions: list[dict[str, Any]] = []  # evidence of those that are in force
    for record in records if seq is not None else []:
        if seq is None or record.seq <= seq:
            continue
        if (action := action_of(record)) is not None:
            actions.append(action)
        elif isinstance(record, rec.Change) and record.what == FACTOR and record.evidence is not None:
            actions += [record.evidence] if record.evidence["action"] != "raise" else []
        elif isinstance(record, rec.Alert) and record.code == "lower_rate":
            actions.append({"action": "advice", "step": record.step})
        elif isinstance(record, rec.Rewind):
            if record.failed_step is not None:
                found.append(back_of(record, actions))
            actions = saved_actions(actions, record)
    return found


def back_of(record: rec.Rewind, actions: list[dict[str, Any]]) -> Back:
    """What a rollback leaves behind: `actions` are those in force before it."""
    own = (action for action in actions if action["action"] == "rollback" and action["step"] == record.failed_step)
    return Back(record.to_step, next(own, None), sum(action["step"] > record.to_step for action in actions))


@dataclass(slots=True)
class Replayed:
    """The decisions of a log. `differences` are lines for a person: none, if the log has exactly what is decided again."""

    decisions: list[rec.Change | rec.Alert] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    unwritten: int = 0  # decided again after a kill that came before their record
    factor: float = 1.0
    spent: int = 0
    controlled: bool = False  # whether the log is of a run with a controller

    @property
    def agrees(self) -> bool:
        return not self.differences

    @property
    def known(self) -> bool:
        """Whether it can be said: a log that was written without a controller cannot have what is decided now."""
        return self.controlled or self.agrees


class Replay:
    """Takes the records of a log in their order. The state is marked after each `every` of those that it comes from.

    `experts`: whether the number of experts may change in it; a log without that is not looked at for it.
    """

    def __init__(self, rules: Mapping[str, Any], every: int = EVERY, *, experts: bool = True) -> None:
        self._every, self._experts_change = every, experts
        first = _Ruled(0, Rules.from_config(rules), BalanceRules.from_config(rules), EarlyStopRules.from_config(rules))
        self.controller, self._balance = RateController(first.rules), BalanceController(first.balance)
        self._early_stop = EarlyStop(first.early_stop)
        self._begun = 0  # step from which the newest start, or return, goes on
        self.result = Replayed()
        self._resumes = [(-1, dict(rules))]  # of this branch: the step of each, and the keys from there on
        self._return: tuple[_Ruled, list[Back]] | None = None  # one that is not done: rules, and rollbacks since its checkpoint
        self._kept: list[_Item] = []  # what the state of the branch comes from
        self._top = 0  # highest step in it
        self._marks = [_Mark(0, 0, first, {}, {}, {})]
        self._due: list[rec.Change | rec.Alert] = []  # decided, and not met in the log yet
        self._experts: rec.Experts | None = None  # of the newest step; a long one comes in parts, each with some of the layers
        # decides at saves, of which the log does not have all: what it would have is asked for where the log has something
        self._growth = GrowthWatch(Config(**rules), "", by_itself=True)
        self._outcome: rec.Change | None = None  # of another number of experts, not met in the log yet

    def take(self, record: rec.Record) -> None:
        """The next record."""
        if self._return is not None and (_plans(record) or isinstance(record, _BRANCH)):
            self._go_on(*self._return)  # no resume tells other rules
        self._sort(record)
        if self._experts_change and self._growth.take(record):
            self._outcome = self._growth.outcome()

    def _sort(self, record: rec.Record) -> None:
        """What the record is to the state and to the decisions."""
        if isinstance(record, rec.Experts) and (self._experts is None or self._experts.step == record.step):
            self._experts = record if self._experts is None else joined(self._experts, record)
            return
        self._route()
        if isinstance(record, rec.Experts):
            self._experts = record
        elif isinstance(record, rec.Resume):
            self._resume(record)
        elif isinstance(record, rec.Run):
            self._plan(record)
        elif isinstance(record, rec.Rewind):
            self._rewind(record)
        elif of_controller(record):
            self._compare(record)
        elif _is_room(record):
            self._follow(record)
        elif isinstance(record, rec.Step | rec.Change):
            if isinstance(record, rec.Step):
                self._missing(record.step)
            self._keep(record)
            self._due += self._decided(record)
            self._mark()
        elif isinstance(record, rec.Eval):
            self._keep(record)
            self._due += self._evaluated(record)
            self._mark()

    def _resume(self, record: rec.Resume) -> None:
        """The rules of a resume. It names what its checkpoint has otherwise, in which no later resume has left anything, nor
        an earlier one from the same checkpoint."""
        while self._resumes[-1][0] >= record.step:
            self._resumes.pop()
        values = self._resumes[-1][1] | {name: now for name, (_, now) in record.changed.items() if name in KEYS}
        self._resumes.append((record.step, values))
        anew, backs = (False, []) if self._return is None else (self._return[0].anew, self._return[1])
        early_stop = EarlyStopRules.from_config(values, self._early_stop.rules.total_steps)
        rules = Rules.from_config(values), BalanceRules.from_config(values), early_stop
        self._go_on(_Ruled(record.step, *rules, anew=anew), backs)
        self._growth.use(Config(**values))

    def _plan(self, record: rec.Run) -> None:
        """The steps that a start has planned."""
        if _plans(record):
            now = self._ruled(self._begun)
            self._go_on(replace(now, early_stop=replace(now.early_stop, total_steps=record.total_steps or 0)), [])

    def _follow(self, record: rec.Change) -> None:
        """The room of the experts goes with their number in a checkpoint, which has it so itself: the step before has not."""
        before = (record.step or 0) - 1
        while self._resumes[-1][0] > before:
            self._resumes.pop()
        values = self._resumes[-1][1] | {record.what: record.after}
        self._resumes.append((before, values))
        early_stop = EarlyStopRules.from_config(values, self._early_stop.rules.total_steps)
        ruled = _Ruled(before, Rules.from_config(values), BalanceRules.from_config(values), early_stop, record.before)
        self._keep(ruled)
        self._obey(ruled)
        self._growth.use(Config(**values))

    def _go_on(self, ruled: _Ruled, backs: list[Back]) -> None:
        """From a checkpoint, as the trainer does: its state, then the rules, then the rollbacks of which it does not know."""
        self._return = None
        if ruled != self._ruled(ruled.step):
            self._keep(ruled)
            self._obey(ruled)
        for back in backs:
            self._keep(back)
        if backs:
            self.controller.rolled_back(backs, ruled.step)

    def _keep(self, item: _Item) -> None:
        self._kept.append(item)
        # a checkpoint is older than what was done on going on from it
        at = item.to_step + 1 if isinstance(item, Back) else (item.step or 0) + isinstance(item, _Ruled | rec.Eval)
        self._top = max(self._top, at)

    def _mark(self) -> None:
        """Note the state now and then, so that going back need not begin at the start of the log."""
        if len(self._kept) - self._marks[-1].count >= self._every:
            states = self.controller.state_dict(), self._balance.state_dict(), self._early_stop.state_dict()
            self._marks.append(_Mark(len(self._kept), self._top, self._ruled(self._top), *states))

    def _ruled(self, step: int) -> _Ruled:
        """The rules in force."""
        return _Ruled(step, self.controller.rules, self._balance.rules, self._early_stop.rules)

    def _route(self) -> None:
        """All parts of a record of experts are there: give them to the controller of balance."""
        if self._experts is not None:
            whole, self._experts = self._experts, None
            self._keep(whole)
            self._due += self._balanced(whole)

    def _balanced(self, record: rec.Experts) -> list[rec.Change | rec.Alert]:
        changes = self._balance.observe(record, self.controller.spent)
        for change in changes:
            self.controller.observe(change)
        return changes

    def _decided(self, record: rec.Step | rec.Change) -> list[rec.Change | rec.Alert]:
        if isinstance(record, rec.Step):
            self._early_stop.note(record)
        return [decision.record for decision in self.controller.observe(record)]

    def _evaluated(self, record: rec.Eval) -> list[rec.Change | rec.Alert]:
        found = self._early_stop.observe(record, self.controller.spent)
        for decision in found:
            self.controller.observe(decision)
        return found

    def _obey(self, ruled: _Ruled) -> None:
        self.controller.use(ruled.rules)
        if ruled.room is None:
            self._balance.use(ruled.balance)
        else:
            self._balance.follow(ruled.balance, ruled.room)
        if ruled.anew:
            self._early_stop = EarlyStop(ruled.early_stop)
        self._early_stop.begin(ruled.early_stop, ruled.step)

    def end(self) -> Replayed:
        """No more records: the run was killed here, or is about to write what is due."""
        if self._return is not None:
            self._go_on(*self._return)
        self._route()
        self.result.unwritten += len(self._due) + (self._outcome is not None)
        self.result.factor, self.result.spent = self.controller.factor, self.controller.spent
        return self.result

    def _compare(self, record: rec.Change | rec.Alert) -> None:
        self.result.decisions.append(record)
        mine = self._expected(record)
        if is_decision(record):
            self._keep(record)
            self.controller.observe(record)
        if mine is None:
            self.result.differences.append(
                f"step {record.step}: {_name(record)} is in the log, and follows from nothing before it"
            )
            return
        same = type(mine) is type(record)
        other = [name for name in _fields(mine) if not _agrees(name, mine, record)] if same else []
        if other or not same:
            names = ", ".join(other) or _name(mine)
            self.result.differences.append(f"step {record.step}: {_name(record)} is another than what follows: {names}")

    def _expected(self, record: rec.Change | rec.Alert) -> rec.Change | rec.Alert | None:
        """What follows from the log before a decision, which must be the same."""
        if is_decision(record):
            return self._growth.wanted(record.step or 0, self.controller.spent)
        if isinstance(record, rec.Change) and record.what == GROWTH_OUTCOME:
            outcome, self._outcome = self._outcome, None
            return outcome
        return self._due.pop(0) if self._due else None

    def _missing(self, step: int) -> None:
        due: list[rec.Change | rec.Alert] = [*self._due]
        if self._outcome is not None:
            due.append(self._outcome)
            self._growth.take(self._outcome)
        for decision in due:
            self.result.differences.append(f"step {step}: before it {_name(decision)} follows, and is not in the log")
        self._due.clear()
        self._outcome = None

    def _rewind(self, record: rec.Rewind) -> None:
        """Back to the state of a step, from the records that led to it."""
        self.result.unwritten += len(self._due) + (self._outcome is not None)
        self._due.clear()
        self._outcome = None
        rules = replace(self._ruled(record.to_step), anew=not record.early_stop)
        back = None if record.failed_step is None else back_of(record, self.controller.in_force())
        since: list[Back] = []
        for item in self._to_mark(record.to_step):
            if isinstance(item, Back) and item.to_step >= record.to_step:
                since.append(item.seen_from(record.to_step))
            elif _is_before(item, record):
                self._keep(item)
                self._again(item)
        values = self._resumes[-1][1]
        while self._resumes[-1][0] >= record.to_step:
            self._resumes.pop()
        self._resumes.append((record.to_step, values))  # a rollback changes none
        self._begun = record.to_step
        self._return = rules, since
        if back is not None:
            self._go_on(rules, [*since, back])

    def _to_mark(self, to_step: int) -> list[_Item]:
        """Put back the newest mark that a run at `to_step` has behind it; what was kept after it."""
        while self._marks[-1].top > to_step:
            self._marks.pop()
        mark = self._marks[-1]
        tail, self._top = self._kept[mark.count :], mark.top
        del self._kept[mark.count :]
        self.controller, self._balance = RateController(mark.rules.rules), BalanceController(mark.rules.balance)
        self.controller.load_state_dict(mark.rate)
        self._balance.load_state_dict(mark.balance)
        self._early_stop = EarlyStop(mark.rules.early_stop)
        self._early_stop.load_state_dict(mark.early_stop)
        return tail

    def _again(self, item: _Item) -> None:
        """Take something that led to a step once more."""
        if isinstance(item, Back):
            self.controller.rolled_back([item], item.to_step)
        elif isinstance(item, _Ruled):
            self._obey(item)
        elif isinstance(item, rec.Experts):
            self._balanced(item)
        elif isinstance(item, rec.Eval):
            self._evaluated(item)
        else:
            self._decided(item)


_BRANCH = rec.Step | rec.Eval | rec.Change | rec.Experts | rec.Rewind


def _plans(record: rec.Record) -> bool:
    """Whether a trainer begins, or goes on, and tells its steps."""
    return isinstance(record, rec.Run) and record.state == "running" and record.total_steps is not None


def _is_before(item: _Item, back: rec.Rewind) -> bool:
    """Whether the checkpoint of a return has something in it: other rules came after the checkpoint that they began from, and
    the evaluation of its own step is in it where the return says so."""
    if isinstance(item, Back):
        return item.to_step < back.to_step
    if isinstance(item, rec.Eval):
        return item.step < back.to_step + back.evaluated
    return item.step < back.to_step if isinstance(item, _Ruled) else (item.step or 0) <= back.to_step


def _name(record: rec.Change | rec.Alert) -> str:
    if isinstance(record, rec.Alert):
        return record.code
    return f"{record.what} {(record.evidence or {}).get('action', '')}".rstrip()


def _agrees(name: str, mine: rec.Change | rec.Alert, other: rec.Change | rec.Alert) -> bool:
    """Whether a field of two decisions is the same."""
    values = getattr(mine, name), getattr(other, name)
    if name == "evidence" and isinstance(mine, rec.Change) and mine.what == EARLY_STOP:
        return alike(*values)
    return bool(values[0] == values[1])


def _fields(record: rec.Change | rec.Alert) -> list[str]:
    """What must be equal: not the place in the log, nor the advice, which has the run's name in it."""
    return [name for name in msgspec.structs.asdict(record) if name not in ("seq", "t", "inc", "recommendation")]


def replay(records: Iterable[rec.Record], config: Any, every: int = EVERY) -> Replayed:
    """Decide a whole log again.

    Args:
        config: the configuration of the run as it is now (keys `KEYS`); what it was before a resume is in the log.
        every: records between two marks of the state, which a run that goes back is decided again from.
    """
    known = list(records)
    values = {name: getattr(config, name) for name in KEYS}
    for record in reversed(known):
        if isinstance(record, rec.Resume):
            values |= {name: before for name, (before, _) in record.changed.items() if name in KEYS}
        elif _is_room(record):
            values[record.what] = record.before
    again = Replay(values, every, experts=any(map(is_decision, known)))
    for record in known:
        again.take(record)
    found = again.end()
    found.controlled = any(of_controller(r) or (isinstance(r, rec.Run) and r.adaptive is not None) for r in known)
    return found
