"""The rate controller (C98, C100): it only lowers, within its bounds, decides alike, and its log gives every decision again."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine import AdaptiveHyperparameterOptimizer
from lumina_engine.bench.corpus import read
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.adaptive import FACTOR, LEAST, OUTCOME, RECENT, Decision, RateController, Rules
from lumina_engine.monitoring.decisions import EVERY, KEYS, back_of, backs_after, of_controller, replay

ACT = Rules(mode="act", window=64, cooldown=40, lowest=0.1, most=6)
CORPUS = Path(__file__).parent / "health"
Figures = tuple[float, float, bool]


def configured(rules: Rules) -> Any:
    """The configuration that has these rules."""
    policy = "rollback" if rules.rollback else "skip"
    return SimpleNamespace(
        adaptive=rules.mode,
        spike_window=rules.window,
        adaptive_cooldown_steps=rules.cooldown,
        lr_multiplier_min=rules.lowest,
        max_adaptive_actions=rules.most,
        spike_policy=policy,
        use_moe=False,
        load_balancing_weight=0.0,
        router_bias_rate=0.0,
        moe_dropless=True,
        capacity_factor=1.25,
        early_stopping_gain=0.0,
        lr_schedule="constant",
        warmup_steps=0,
        learning_rate=1e-3,
        min_lr_ratio=0.1,
        eval_batches=0,
        decay_ratio=0.2,
        expert_growth="off",
        max_num_experts=64,
        moe_top_k=1,
        expert_parallel_size=1,
    )


def step(number: int, loss: float, norm: float = 1.0, skipped: bool = False, **more: Any) -> rec.Step:
    return rec.Step(step=number, loss=loss, grad_norm=norm, lr=1e-3, skipped=skipped, batch=4, seq_length=32, **more)


def fed(controller: RateController, losses: list[float], start: int = 1, skipped: bool = False) -> list[Decision]:
    return [d for n, loss in enumerate(losses, start) for d in controller.observe(step(n, loss, skipped=skipped))]


def noisy(level: float, count: int, seed: int = 0, spread: float = 0.05) -> list[float]:
    draw = random.Random(seed)
    return [level * math.exp(draw.gauss(0, spread)) for _ in range(count)]


# ---- a run by arithmetic --------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@dataclass
class World:
    """A run whose losses are given: it saves, goes back, is killed and resumed as the trainer does."""

    rules: Rules
    figures: Callable[[int, int], Figures]  # (branch, step) -> loss, gradient norm, left out
    steps: int = 200
    every: int = 10  # steps between saves
    chosen: dict[int, float] = field(default_factory=dict)  # step -> rate that a person sets for it
    guard: dict[int, int] = field(default_factory=dict)  # branch -> steps after its beginning, when the guard goes back too
    kill: int | None = None  # after so many records
    log: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.saves: dict[int, tuple[int, dict[str, Any], Rules]] = {}  # step -> (records before it, state, rules)
        self.controller = RateController(self.rules)
        self.step = 0
        self.factors: dict[int, float] = {}

    def emit(self, record: Any) -> None:
        record.seq = len(self.log) + 1
        self.log.append(rec.decode(rec.encode(record)))  # as a reader gets it
        if len(self.log) == self.kill:
            raise Killed

    def run(self) -> World:
        """To the end, over a kill."""
        try:
            self._go()
        except Killed:
            self.kill = None
            self.resume()
            self._go()
        return self

    def resume(self) -> None:
        """As another process: from the newest save, and with what only the log knows."""
        self.step = max(self.saves, default=0)
        seq, state, _ = self.saves.get(self.step, (None, RateController(self.rules).state_dict(), self.rules))
        self.controller = RateController(self.rules)
        self.controller.load_state_dict(copy.deepcopy(state))
        self.controller.rolled_back(backs_after(self.log, seq), self.step)
        self.emit(rec.Rewind(to_step=self.step))
        self._choose("recovery")

    def go_on(self, rules: Rules, steps: int) -> World:
        """Be killed where it is, and go on from the newest save by other rules; the proof tells what the save had."""
        self.rules, self.steps = rules, steps
        self.resume()
        before, now = vars(configured(self.saves[self.step][2])), vars(configured(rules))
        self.emit(rec.Resume(step=self.step, changed={k: (before[k], now[k]) for k in KEYS if before[k] != now[k]}))
        self._go()
        return self

    @property
    def branch(self) -> int:
        return len(self._rollbacks())

    @property
    def begun(self) -> int:
        """The step to which the last rollback went."""
        return max((r.seq, r.to_step) for r in [rec.Rewind(to_step=0, seq=0), *self._rollbacks()])[1]

    def _rollbacks(self) -> list[rec.Rewind]:
        return [r for r in self.log if isinstance(r, rec.Rewind) and r.failed_step is not None]

    def _choose(self, by: str) -> None:
        if (rate := self.chosen.get(self.step + 1)) is not None:
            record = rec.Change(what="learning_rate", step=self.step + 1, before=1e-3, after=rate, by=by)
            self.controller.observe(record)
            self.emit(record)

    def _go(self) -> None:
        while self.step < self.steps:
            self.step += 1
            self.factors[self.step] = self.controller.factor
            loss, norm, skipped = self.figures(self.branch, self.step)
            record = step(self.step, loss, norm, skipped)
            decisions = self.controller.observe(record)
            self.emit(record)
            for decision in decisions:
                self.emit(decision.record)
            self._choose("user")
            back = next((d for d in decisions if d.kind == "rollback"), None)
            if back is not None and self._back(back.first):
                continue
            if back is None and self.guard.get(self.branch) == self.step - self.begun and self._back(self.step):
                continue
            if any(d.kind == "stop" for d in decisions):
                return
            if self.step % self.every == 0:
                self.saves[self.step] = (len(self.log), copy.deepcopy(self.controller.state_dict()), self.rules)

    def _back(self, first: int) -> bool:
        target = max((at for at in self.saves if at < first), default=None)
        if target is None:
            return False
        self.saves = {at: save for at, save in self.saves.items() if at <= target}
        record = rec.Rewind(to_step=target, failed_step=self.step)
        backs = [*self.controller.backs, back_of(record, self.controller.in_force())]
        self.controller.load_state_dict(copy.deepcopy(self.saves[target][1]))
        self.controller.rolled_back(backs[len(self.controller.backs) :], target)
        self.chosen = {at: rate for at, rate in self.chosen.items() if at <= target}
        self.step = target
        self.emit(record)
        return True

    def decisions(self) -> list[Any]:
        return [r for r in self.log if of_controller(r)]


def told(records: list[Any]) -> list[Any]:
    """Decisions without their place in the log."""
    return [
        rec.encode(type(r)(**{f: getattr(r, f) for f in r.__struct_fields__ if f not in ("seq", "t", "inc")})) for r in records
    ]


def regimes(seed: int) -> Callable[[int, int], Figures]:
    """Losses of a run with trouble of some kind: jumps, slow rises, falls, single steps, left out or not finite."""

    def figures(branch: int, number: int) -> Figures:
        phase = random.Random(seed * 7919 + branch * 31 + number // 40).choice(["calm", "calm", "jump", "rise", "fall"])
        draw = random.Random(seed * 104_729 + branch * 1_299_709 + number)
        within = number % 40 / 40
        level = 2.0 * {"calm": 1.0, "jump": 2.0, "rise": 1.0 + within, "fall": 1.0 - 0.4 * within}[phase]
        odd = draw.random()
        loss = math.nan if odd < 0.02 else level * math.exp(draw.gauss(0, 0.05))
        return loss, (math.inf if 0.02 < odd < 0.03 else 1.0), odd < 0.03 or (phase == "jump" and odd < 0.1)

    return figures


RULES = st.builds(
    Rules,
    mode=st.sampled_from(["act", "advise"]),
    window=st.sampled_from([32, 64, 128]),
    cooldown=st.sampled_from([10, 25, 60]),
    lowest=st.sampled_from([0.1, 0.3, 1.0]),
    most=st.integers(0, 8),
    rollback=st.booleans(),
)


GUARD = st.dictionaries(st.integers(0, 3), st.integers(1, 60), max_size=3)


@settings(max_examples=40, deadline=None)
@given(RULES, st.integers(0, 10_000), st.dictionaries(st.integers(40, 190), st.just(5e-4), max_size=2), GUARD)
def test_c100_every_cut_lowers_within_bounds_and_budget_and_the_log_gives_it_again(
    rules: Rules, seed: int, chosen: dict[int, float], guard: dict[int, int]
) -> None:
    world = World(rules, regimes(seed), chosen=chosen, guard=guard).run()
    for record in world.decisions():
        if isinstance(record, rec.Change) and record.what == FACTOR:
            evidence = record.evidence
            assert rules.mode == "act" and rules.lowest <= record.after <= 1.0 and evidence["factor"] == record.after
            assert record.after > record.before if evidence["action"] == "raise" else record.after < record.before
            assert {"statistic", "threshold", "window", "cooldown", "factor", "rule", "level", "sigma"} <= set(evidence)
    lowered = [r for r in world.decisions() if getattr(r, "what", "") == FACTOR and r.evidence["action"] != "raise"]
    actions = lowered + [r for r in world.decisions() if getattr(r, "code", "") == "lower_rate"]
    assert len(actions) == world.controller.spent <= rules.most
    assert all(rules.lowest <= factor <= 1.0 for factor in world.factors.values())
    again = replay(world.log, configured(rules))
    assert again.differences == [] and again.unwritten == 0 and again.decisions == world.decisions()
    assert (again.factor, again.spent) == (world.controller.factor, world.controller.spent)


@settings(max_examples=60, deadline=None)
@given(RULES, st.integers(0, 10_000), st.dictionaries(st.integers(40, 190), st.just(5e-4), max_size=1), GUARD, st.floats(0, 1))
def test_c100_killed_after_any_record_it_decides_as_the_unbroken_run(
    rules: Rules, seed: int, chosen: dict[int, float], guard: dict[int, int], share: float
) -> None:
    whole = World(rules, regimes(seed), chosen=dict(chosen), guard=guard).run()
    kill = max(1, round(share * len(whole.log)))
    killed = World(rules, regimes(seed), chosen=dict(chosen), guard=guard, kill=kill).run()
    assert killed.controller.state_dict() == whole.controller.state_dict()
    assert killed.factors == whole.factors
    for every in (1, 7, EVERY):
        again = replay(killed.log, configured(rules), every)
        assert again.differences == [] and again.unwritten <= 1
        assert (again.factor, again.spent) == (whole.controller.factor, whole.controller.spent)
    kept = told(killed.decisions())
    assert [r for r in told(whole.decisions()) if r not in kept] == []


@pytest.mark.parametrize("after", [4, 25])
def test_c100_what_a_rollback_decided_outlives_the_next_one_to_the_same_checkpoint(after: int) -> None:
    def figures(branch: int, number: int) -> Figures:
        return noisy(5.0 if branch == 0 and number > 120 else 2.0, 1, number)[0], 1.0, False

    rules = replace(ACT, rollback=True)
    unsaved = World(rules, figures, every=100, guard={1: after}).run()
    assert [r.to_step for r in unsaved.log if isinstance(r, rec.Rewind)] == [100, 100]
    (failed,) = (r.evidence["step"] for r in unsaved.decisions() if (r.evidence or {}).get("action") == "rollback")
    assert (unsaved.factors[101], unsaved.factors[failed]) == (0.25, 0.25) and unsaved.controller.state_dict()["rung"] == 2
    resumed = World(rules, figures, every=100, guard={1: after}, kill=failed + 20 + after).run()
    assert resumed.controller.state_dict() == unsaved.controller.state_dict()
    assert replay(unsaved.log, configured(rules)).factor == unsaved.controller.factor


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 199))
def test_c100_a_state_put_back_decides_as_the_unbroken_one(seed: int, cut: int) -> None:
    figures = regimes(seed)
    whole, first, second = RateController(ACT), RateController(ACT), RateController(ACT)
    records = [step(n, *figures(0, n)) for n in range(1, 201)]
    for record in records[:cut]:
        assert told([d.record for d in whole.observe(record)]) == told([d.record for d in first.observe(record)])
    second.load_state_dict(rec.msgspec.json.decode(rec.msgspec.json.encode(first.state_dict())))
    for record in records[cut:]:
        assert told([d.record for d in whole.observe(record)]) == told([d.record for d in second.observe(record)])
    assert whole.state_dict() == second.state_dict()


def test_c100_actions_about_balance_in_a_checkpoint_of_an_earlier_version_count_once() -> None:
    controller = RateController(ACT)
    controller.load_state_dict({**controller.state_dict(), "elsewhere": 2})
    again = RateController(ACT)
    again.load_state_dict(controller.state_dict())
    assert controller.spent == again.spent == 2


def test_c100_what_the_log_does_not_bear_out_is_told() -> None:
    world = World(ACT, lambda branch, n: (noisy(2.0 if n < 100 else 5.0, 1, n)[0], 1.0, False)).run()
    at = next(i for i, r in enumerate(world.log) if of_controller(r))
    without = world.log[:at] + world.log[at + 1 :]
    assert any("is not in the log" in line for line in replay(without, configured(ACT)).differences)
    other = [*world.log]
    other[at] = rec.Change(what=FACTOR, step=other[at].step, before=1.0, after=0.4, by="adaptive")
    assert any("after" in line for line in replay(other, configured(ACT)).differences)
    twice = [*world.log[: at + 1], world.log[at], *world.log[at + 1 :]]
    assert any("follows from nothing" in line for line in replay(twice, configured(ACT)).differences)
    assert not replay(world.log, configured(replace(ACT, lowest=0.7))).agrees  # other rules, another log


def test_c100_rules_of_before_a_resume_are_those_that_its_record_names() -> None:
    world = World(
        replace(ACT, cooldown=25), lambda branch, n: (noisy(2.0 if n < 100 else 5.0, 1, n)[0], 1.0, False), steps=130
    ).run()
    world.rules, world.steps = replace(ACT, cooldown=60), 300
    world.step = max(world.saves)
    world.controller = RateController(world.rules)
    world.controller.load_state_dict(world.saves[world.step][1])
    world.emit(rec.Rewind(to_step=world.step))
    world.emit(rec.Resume(step=world.step, changed={"adaptive_cooldown_steps": (25, 60)}))
    world.run()
    cooldowns = [r.evidence["cooldown"] for r in world.decisions() if getattr(r, "what", "") == FACTOR]
    assert set(cooldowns) == {25, 60}
    assert all(replay(world.log, configured(world.rules), every).differences == [] for every in (1, 7, EVERY))


def restarted(steps: int, each: int, back: int) -> list[Any]:
    """The log of a calm run that is killed after each so many steps and goes back by some."""
    log: list[Any] = []
    for begin in range(0, steps, each):
        log += [step(n, noisy(2.0, 1, n)[0]) for n in range(max(1, begin - back + 1), begin + each + 1)]
        log.append(rec.Rewind(to_step=begin + each - back))
    return log


def test_c100_a_log_with_many_restarts_is_decided_in_the_time_of_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each return costs at most what lies between two marks, however long the run was before."""
    seen, inner = [0], RateController.observe

    def observe(self: RateController, record: Any) -> Any:
        seen[0] += 1
        return inner(self, record)

    monkeypatch.setattr(RateController, "observe", observe)
    log = restarted(steps=12_000, each=300, back=20)
    written, returns = sum(isinstance(r, rec.Step) for r in log), sum(isinstance(r, rec.Rewind) for r in log)
    assert replay(log, configured(ACT), every=100).agrees and seen[0] <= written + 100 * returns
    seen[0] = 0
    assert replay(log, configured(ACT)).agrees and seen[0] <= written + EVERY * returns


def test_c100_rules_that_a_return_did_not_take_back_hold_in_what_is_decided_again() -> None:
    """A run that goes on by other rules from before the step of its resume keeps them at its next return too."""
    rules = replace(ACT, cooldown=25)
    world = World(rules, lambda branch, n: (noisy(2.0 if n < 100 else 5.0, 1, n)[0], 1.0, False), steps=90).run()
    saves = dict(world.saves)
    world.rules = replace(ACT, cooldown=60)
    world.emit(rec.Rewind(to_step=90))
    world.emit(rec.Resume(step=90, changed={"adaptive_cooldown_steps": (25, 60)}))
    for to_step, until in ((80, 130), (120, 300)):  # the checkpoint of step 90 was damaged
        world.step, world.steps = to_step, until
        world.controller = RateController(world.rules)
        world.controller.load_state_dict((saves if to_step == 80 else world.saves)[to_step][1])
        world.emit(rec.Rewind(to_step=to_step))
        world.run()
    assert {r.evidence["cooldown"] for r in world.decisions() if getattr(r, "what", "") == FACTOR} == {60}
    assert all(replay(world.log, configured(world.rules), every).differences == [] for every in (1, 7, EVERY))


ADVISE = replace(ACT, mode="advise")


def rising(branch: int, number: int) -> Figures:
    """Calm until step 90, then three times as high."""
    return noisy(2.0 if number < 90 else 6.0, 1, number)[0], 1.0, False


@pytest.mark.parametrize(
    ("rules", "tried"),
    [
        (ADVISE, ACT),
        (replace(ACT, cooldown=20), replace(ADVISE, cooldown=20)),
        (ACT, replace(ACT, window=32)),
        (replace(ACT, cooldown=20), replace(ACT, cooldown=20, lowest=0.9)),
    ],
    ids=["advise, act tried", "act, advise tried", "a shorter window tried", "a higher bound tried"],
)
def test_c100_a_key_that_a_resume_changed_and_the_next_one_set_back_was_never_another(rules: Rules, tried: Rules) -> None:
    """No save came between them, so the second is no change against the checkpoint, and the first left nothing in it."""
    world = World(rules, rising, steps=120, every=40).run()
    world.go_on(tried, 150).go_on(rules, 400)
    first, second = (r for r in world.log if isinstance(r, rec.Resume))
    assert first.step == second.step == 120 and first.changed and not second.changed
    assert len(world.decisions()) > 1
    for every in (1, 7, EVERY):
        again = replay(world.log, configured(rules), every)
        assert again.differences == [] and (again.factor, again.spent) == (world.controller.factor, world.controller.spent)


@settings(max_examples=60, deadline=None)
@given(RULES, st.lists(st.tuples(RULES, st.integers(1, 80)), min_size=1, max_size=4), st.integers(0, 10_000), GUARD)
def test_c100_the_log_gives_all_again_whatever_each_resume_changed(
    rules: Rules, resumes: list[tuple[Rules, int]], seed: int, guard: dict[int, int]
) -> None:
    world = World(rules, regimes(seed), steps=70, guard=guard).run()
    for other, further in resumes:
        world.go_on(other, world.step + further)
    for every in (1, 7, EVERY):
        again = replay(world.log, configured(world.rules), every)
        assert again.differences == [] and again.decisions == world.decisions()
        assert (again.factor, again.spent) == (world.controller.factor, world.controller.spent)


# ---- the rules ------------------------------------------------------------------------------------------------------------


def test_c098_a_jump_that_stays_is_cut_once_and_its_outcome_told() -> None:
    controller = RateController(ACT)
    assert fed(controller, noisy(2.0, 100)) == []
    found = fed(controller, noisy(3.0, 30, 1), 101)
    assert [d.kind for d in found] == ["cut"] and controller.factor == 0.5
    evidence = found[0].record.evidence
    assert found[0].record.step <= 101 + 2 * RECENT and found[0].first <= 101 + RECENT
    assert evidence["rule"] == "loss_level" and math.exp(evidence["level"]) == pytest.approx(2.0, rel=0.05)
    back = fed(controller, noisy(2.0, 60, 2), 131)
    assert [d.record.what for d in back] == [OUTCOME] and back[0].record.evidence["recovered"]


def test_c098_lower_than_the_worst_is_not_recovered() -> None:
    controller = RateController(ACT)
    fed(controller, noisy(2.0, 100) + noisy(5.0, 30, 1))
    found = [d for d in fed(controller, noisy(3.0, 60, 2), 131) if d.record.what == OUTCOME]
    assert len(found) == 1 and not found[0].record.evidence["recovered"]


def test_c098_a_slow_rise_is_found_though_every_window_goes_along() -> None:
    controller = RateController(ACT)
    rising = [loss * math.exp(0.004 * n) for n, loss in enumerate(noisy(2.0, 150, 3))]
    found = fed(controller, noisy(2.0, 100) + rising)
    assert found and found[0].kind == "cut" and found[0].record.evidence["rule"] in ("loss_rise", "loss_level")


def test_c098_the_ladder_and_its_end() -> None:
    for rollback, kinds in ((False, ["cut", "cut", "stop"]), (True, ["cut", "rollback", "stop"])):
        controller = RateController(replace(ACT, rollback=rollback))
        found = fed(controller, noisy(2.0, 100) + noisy(5.0, 150, 1))
        assert [d.kind for d in found if getattr(d.record, "what", "") != OUTCOME][:3] == kinds
        assert controller.factor == 0.25
        evidence = [d.record.evidence for d in found if d.kind in ("cut", "rollback")]
        assert len({(e["level"], e["sigma"]) for e in evidence}) == 1  # what it is compared with stands still
        steps = [d.record.step for d in found if d.kind in kinds]
        assert all(b - a >= ACT.cooldown for a, b in pairwise(steps))
    controller = RateController(replace(ACT, lowest=0.6))
    found = [d for d in fed(controller, noisy(2.0, 100) + noisy(5.0, 150, 1)) if getattr(d.record, "what", "") != OUTCOME]
    assert [d.kind for d in found][:2] == ["cut", "stop"] and controller.factor == 0.6
    assert found[1].record.code == "rate_ladder_end" and found[1].record.severity == "critical"
    assert "the lowest allowed (lr_multiplier_min)" in found[1].record.message
    controller = RateController(replace(ACT, lowest=1.0))
    (stop,) = fed(controller, noisy(2.0, 100) + noisy(5.0, 30, 1))
    assert stop.kind == "stop" and "lr_multiplier_min=1 allows no lower rate" in stop.reason


def test_c098_what_helps_is_given_time() -> None:
    controller = RateController(ACT)
    slowly = [loss * math.exp(-0.003 * n) for n, loss in enumerate(noisy(6.0, 250, 1, 0.02))]
    found = fed(controller, noisy(2.0, 100) + slowly)
    assert [d.kind for d in found] == ["cut", "outcome"]


def test_c098_given_back_after_four_calm_cooldowns_never_above_the_schedule() -> None:
    controller = RateController(replace(ACT, most=1))  # and that is no action
    fed(controller, noisy(2.0, 100) + noisy(5.0, 20, 1))
    assert controller.factor == 0.5
    found = [d for d in fed(controller, noisy(2.0, 1000, 2), 121) if d.kind == "raise"]
    steps, factors = [d.record.step for d in found], [d.record.after for d in found]
    assert steps[0] >= 121 + 4 * ACT.cooldown and all(b - a == ACT.cooldown for a, b in pairwise(steps))
    assert factors == pytest.approx([0.5 * 1.1**k for k in range(1, 8)] + [1.0]) and factors[-1] == 1.0


def test_c098_three_skips_in_64_and_no_fewer() -> None:
    for gap, cut in ((10, True), (40, False)):
        controller = RateController(ACT)
        left_out = {100, 100 + gap, 100 + 2 * gap}
        found = [
            d for n, loss in enumerate(noisy(2.0, 200), 1) for d in controller.observe(step(n, loss, skipped=n in left_out))
        ]
        assert [d.record.evidence["rule"] for d in found if d.kind == "cut"] == (["skips"] if cut else [])


def test_c098_steps_are_counted_where_only_each_tenth_has_a_record() -> None:
    controller = RateController(replace(ACT, rollback=True))
    losses = noisy(2.0, 100) + noisy(5.0, 60, 1)
    found = [d for n, loss in enumerate(losses, 1) for d in controller.observe(step(10 * n, loss))]
    cut = next(d for d in found if d.kind == "cut")
    assert 1000 - 10 * RECENT < cut.first <= 1000  # a rollback must go to a step before it
    outcome = next(d for d in found if d.kind == "outcome")
    assert outcome.record.step >= cut.record.step - 1 + 10 * RECENT  # all of its losses are from after the cut
    for gap, kinds in ((20, ["cut"]), (300, [])):
        controller, left_out = RateController(ACT), {1003, 1003 + gap, 1003 + 2 * gap}
        found = []
        for n, loss in enumerate(noisy(2.0, 2000), 1):
            if n % 10 == 0 or n in left_out:
                found += controller.observe(step(n, loss, skipped=n in left_out))
        assert [d.kind for d in found if d.kind == "cut"] == kinds
    controller = RateController(ACT)  # warm-up is over after 32 steps, not after 32 records
    found = [d for n in range(40, 400, 10) for d in controller.observe(step(n, 2.0, skipped=160 <= n <= 180))]
    assert [d.kind for d in found][:1] == ["cut"]


def test_c098_an_outcome_compares_losses_of_one_length() -> None:
    controller = RateController(ACT)
    assert [d.kind for d in fed(controller, noisy(2.0, 100) + noisy(5.0, 30, 1))] == ["cut"]
    longer = [rec.Step(step=n, loss=2.0, grad_norm=1.0, lr=1e-3, batch=4, seq_length=64) for n in range(131, 280)]
    assert [d for record in longer for d in controller.observe(record)] == []
    state = controller.state_dict()
    assert state["low"] is None and state["waiting"] is None and state["ended"]


def test_c098_silent_in_warm_up_and_on_what_is_not_finite() -> None:
    controller = RateController(ACT)
    assert fed(controller, noisy(2.0, LEAST), skipped=True) == []
    controller = RateController(ACT)
    before = controller.state_dict() if fed(controller, noisy(2.0, 100)) == [] else {}
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)):
        assert all(controller.observe(step(n, loss, norm, True)) == [] for n in range(101, 120))
    assert controller.state_dict() == before
    assert fed(RateController(replace(ACT, mode="off")), noisy(2.0, 100) + noisy(9.0, 100)) == []


def test_c098_one_bad_batch_and_a_batch_of_another_shape_are_nothing() -> None:
    controller = RateController(ACT)
    assert fed(controller, [*noisy(2.0, 100), 40.0, *noisy(2.0, 100, 1)]) == []
    longer = [rec.Step(step=n, loss=4.0, grad_norm=1.0, lr=1e-3, batch=4, seq_length=64) for n in range(202, 300)]
    assert not any(controller.observe(record) for record in longer)


def test_c098_the_rate_of_a_person_is_the_rate() -> None:
    controller = RateController(ACT)
    fed(controller, noisy(2.0, 100) + noisy(5.0, 20, 1))
    assert controller.factor == 0.5
    for by in ("user", "recovery"):
        controller.observe(rec.Change(what="learning_rate", step=121, before=1.0, after=2.0, by=by))
        assert controller.factor == 1.0
    found = fed(controller, noisy(5.0, 100, 2), 121)  # and what it does to the loss is looked at as before
    assert next(d.kind for d in found if d.kind != "outcome") == "cut" and found[0].record.after == 0.5


def test_c100_advice_is_a_command_with_the_rate_and_changes_nothing() -> None:
    controller = RateController(replace(ACT, mode="advise", run="first"))
    found = fed(controller, noisy(2.0, 100) + noisy(5.0, 60, 1))
    assert [d.record.code for d in found] == ["lower_rate"] * len(found) and found and controller.factor == 1.0
    assert found[0].record.recommendation == "halve the rate: lumina-engine runs set-lr first 0.0005"


# ---- for a loop of one's own ----------------------------------------------------------------------------------------------


def asked(losses: list[float], form: Callable[[dict[str, Any]], Any] = dict, **config: Any) -> list[dict[str, Any]]:
    optimizer = AdaptiveHyperparameterOptimizer(SimpleNamespace(**vars(configured(ACT)) | config))
    answers = [optimizer.should_adjust_learning_rate(form({"step": n, "loss": loss})) for n, loss in enumerate(losses, 1)]
    return [answer for answer in answers if answer is not None]


@pytest.mark.parametrize("form", [dict, lambda given: SimpleNamespace(**given)])
def test_c098_a_mapping_or_an_object_gives_the_factor_and_why(form: Callable[[dict[str, Any]], Any]) -> None:
    first, second, third = asked(noisy(2.0, 100) + noisy(5.0, 120, 1), form)[:3]
    assert first["factor"] == second["factor"] == 0.5 and not first["stop"] and third["stop"] and third["factor"] < 1
    assert 100 < first["step"] <= 132 and first["statistic"] >= first["threshold"] == 8 and "loss went from" in first["reason"]
    assert asked(noisy(2.0, 400), form) == []


def test_c098_an_emergency_never_raises_the_rate() -> None:
    for seed in range(20):
        figures = regimes(seed)
        answers = asked([figures(0, n)[0] for n in range(1, 600)], adaptive_cooldown_steps=10, max_adaptive_actions=50)
        assert all(0 < answer["factor"] < 1 for answer in answers)
    assert asked([math.nan] * 300) == [] == asked([math.inf] * 300)


def test_c098_without_a_step_each_call_is_one_and_what_is_no_number_is_named() -> None:
    optimizer = AdaptiveHyperparameterOptimizer()
    answers = [optimizer.should_adjust_learning_rate({"loss": loss}) for loss in noisy(2.0, 100) + noisy(5.0, 40, 1)]
    (found,) = (answer for answer in answers if answer)
    assert answers.index(found) + 1 == found["step"]
    with pytest.raises(TypeError, match="loss: must be a number, not str"):
        optimizer.should_adjust_learning_rate({"loss": "much"})


# ---- recorded runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decided() -> dict[str, list[tuple[int, list[Decision]]]]:
    """fault -> (step of the fault, decisions by the default window) of each recorded run."""
    found: dict[str, list[tuple[int, list[Decision]]]] = {}
    for run in read(CORPUS):
        controller = RateController(Rules(mode="act"))
        decisions = [d for record in run.records() for d in controller.observe(record)]
        found.setdefault(run.fault, []).append((run.at, decisions))
    return found


def test_c098_no_action_in_healthy_runs(decided: Any) -> None:
    acted = [decisions for _, decisions in decided["healthy"] if decisions]
    assert len(decided["healthy"]) >= 50 and len(acted) <= 0.05 * len(decided["healthy"])
    assert not [d for _, d in decided["one bad batch"] if d]


def test_c098_lasting_trouble_in_real_runs_is_cut(decided: Any) -> None:
    for fault, least in (("bad data", 8), ("broken weights", 6)):
        cut = [decisions[0].record.step - at for at, decisions in decided[fault] if decisions]
        assert len(cut) >= least and all(0 < delay <= 45 for delay in cut)
