"""The guard of a step, the skip list, and where a rollback goes: pure rules (FT05, FT06, D7)."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.data.skip_list import SkipList
from lumina_engine.monitoring import record as rec
from lumina_engine.training.guard import LEAST_VALUES, MOST_LEFT_OUT, StepGuard
from lumina_engine.training.history import rates_after, rollbacks_after
from lumina_engine.training.rollback import Recovery, Trouble, targets


def guard(**keys: object) -> StepGuard:
    given = {"spike_sigma": 6.0, "spike_window": 128, "spike_recover_steps": 32, "spike_policy": "skip"} | keys
    return StepGuard(SimpleNamespace(**given))


def fed(count: int, seed: int = 1, **keys: object) -> StepGuard:
    """A guard after `count` ordinary steps."""
    watch, draw = guard(**keys), random.Random(seed)
    for step in range(1, count + 1):
        watch.observe(step, 2.0 * math.exp(draw.gauss(0, 0.05)), math.exp(draw.gauss(0, 0.3)), True)
    return watch


def test_ft06_a_value_beyond_the_bound_is_refused_and_one_inside_is_not() -> None:
    watch = fed(200)
    assert watch.allows(2.0, 1.0) and watch.allows(2.0 * math.exp(5 * 0.05 * 0.8), 1.0)
    assert not watch.allows(2.0 * math.exp(20 * 0.05), 1.0)
    assert not watch.allows(2.0, math.exp(20 * 0.3))
    assert watch.allows(1e-6, 1e-6)  # downwards is no spike
    assert guard().allows(1e9, 1e9) and fed(LEAST_VALUES - 1).allows(1e9, 1e9)  # too few values for a spread
    assert not fed(LEAST_VALUES).allows(1e9, 1.0)
    assert fed(200, spike_policy="alert").allows(1e9, 1.0)


def test_ft06_one_event_an_episode_that_closes_after_calm_values() -> None:
    watch = fed(200, spike_recover_steps=4)
    first = watch.observe(201, 2.0 * math.exp(1.0), 1.0, False)
    assert first is not None and first.first and first.quantity == "loss" and first.sigmas > 15 and watch.open_since == 201
    again = watch.observe(202, 2.0 * math.exp(1.0), 1.0, False)
    assert again is not None and not again.first
    for step in range(203, 206):
        assert watch.observe(step, 2.0, 1.0, True) is None and watch.open_since == 201
    watch.observe(206, 2.0, 1.0, True)
    assert watch.open_since is None


def test_ft04_non_finite_values_never_enter_the_window() -> None:
    watch = fed(200)
    before = watch.state_dict()
    for loss, norm in ((math.nan, 1.0), (2.0, math.inf), (math.inf, math.nan)):
        assert not watch.allows(loss, norm) and not guard(spike_policy="alert").allows(loss, norm)
        assert watch.observe(201, loss, norm, False) is None
    assert watch.state_dict() == before and watch.allows(2.0, 1.0)


def test_ft06_a_new_level_is_not_left_out_for_ever() -> None:
    watch, left_out, steps = fed(200, spike_recover_steps=8), 0, 0
    while not (watch.open_since is None and steps):
        steps += 1
        applied = watch.allows(8.0 + 0.01 * (steps % 7), 1.0)
        left_out += not applied
        watch.observe(200 + steps, 8.0 + 0.01 * (steps % 7), 1.0, applied)
    assert left_out == MOST_LEFT_OUT and steps < 128


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("shape", [(8, 256), (16, 256), (8, 128)])
def test_ft06_a_loss_that_steps_up_with_the_shape_of_the_batch_is_no_spike(shape: tuple[int, int], policy: str) -> None:
    watch, draw = guard(spike_policy=policy), random.Random(1)
    for step in range(1, 201):
        watch.meet(16, 128)
        assert watch.observe(step, 2.0 * math.exp(draw.gauss(0, 0.02)), 1.0, True) is None
    assert not watch.allows(2.5, 1.0), "at the same shape it is one"
    for step in range(201, 401):
        watch.meet(*shape)
        loss = 2.5 * math.exp(draw.gauss(0, 0.02))
        assert watch.allows(loss, 1.0) and watch.observe(step, loss, 1.0, True) is None
    assert not watch.allows(3.2, 1.0), "and the new level has its own"


def test_rs04_the_shape_of_the_windows_is_put_back_and_one_that_is_not_known_begins_none_anew() -> None:
    first, second = fed(200), guard()
    first.meet(16, 128)
    second.load_state_dict(first.state_dict())
    second.meet(16, 128)
    assert second.state_dict() == first.state_dict() and not second.allows(9.0, 1.0)
    second.meet(8, 256)
    assert second.allows(9.0, 1.0) and second.state_dict()["shape"] == [8, 256]
    earlier = {name: value for name, value in first.state_dict().items() if name != "shape"}
    second.load_state_dict(earlier)
    second.meet(8, 256)
    assert not second.allows(9.0, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_ft06_a_thousand_ordinary_steps_give_no_event(seed: int) -> None:
    watch, draw = fed(0), random.Random(seed)
    for step in range(1, 1001):  # a falling loss with noise, as in training
        level = 2.0 + 8.0 * math.exp(-step / 100)
        assert watch.observe(step, level * math.exp(draw.gauss(0, 0.05)), math.exp(draw.gauss(0, 0.3)), True) is None


BURST = 3.43  # times its median: the gradient norm of step 213 of a healthy debug run, 7.7 deviations out, the loss at 0.73


@pytest.mark.parametrize("seed", range(20))
def test_ft06_a_burst_of_the_gradient_while_the_loss_falls_is_no_spike(seed: int) -> None:
    watch, draw = guard(), random.Random(seed)
    for step in range(1, 201):
        watch.observe(step, 1.4 * math.exp(draw.gauss(0, 0.2)), math.exp(draw.gauss(0, 0.16)), True)
    assert watch.allows(1.0, BURST) and watch.observe(201, 1.0, BURST, True) is None and watch.open_since is None
    assert not watch.allows(1.4 * math.exp(5 * 0.2), BURST)  # together with a loss that stands out it is one
    spike = watch.observe(202, 1.4 * math.exp(5 * 0.2), BURST, False)
    assert spike is not None and spike.quantity == "grad_norm" and spike.first
    assert not watch.allows(1.0, 120.0)  # and so is a norm of another order of magnitude


def test_ft06_a_gradient_norm_alone_is_judged_by_the_ratio_to_its_median() -> None:
    watch = guard()
    for step in range(1, 129):
        watch.observe(step, 1.0, 2.0, True)
    assert watch.allows(1.0, 2.0 * 99.9) and not watch.allows(1.0, 2.0 * 100.1)


def test_ft06_a_bad_batch_does_not_hide_in_a_steep_fall() -> None:
    watch, draw = guard(), random.Random(1)
    for step in range(1, 101):
        watch.observe(step, 8.0 * math.exp(-step / 60 + draw.gauss(0, 0.05)), math.exp(draw.gauss(0, 0.3)), True)
    level = 8.0 * math.exp(-101 / 60)
    assert watch.allows(level * 1.3, 1.0) and not watch.allows(level * 3, 1.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 50) | st.just(math.nan), min_size=1, max_size=200), st.integers(0, 199))
def test_rs04_a_guard_put_back_decides_as_the_unbroken_one(values: list[float], cut: int) -> None:
    whole, first = guard(), guard()
    for step, value in enumerate(values[:cut]):
        whole.observe(step, value, 1.0, whole.allows(value, 1.0))
        first.observe(step, value, 1.0, first.allows(value, 1.0))
    second = guard()
    second.load_state_dict(first.state_dict())
    for step, value in enumerate(values[cut:]):
        assert second.allows(value, 1.0) == whole.allows(value, 1.0)
        assert second.observe(step, value, 1.0, True) == whole.observe(step, value, 1.0, True)
    assert second.state_dict() == whole.state_dict()


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda p: (min(p), max(p))), max_size=6)


@settings(max_examples=200, deadline=None)
@given(RANGES)
def test_rs08_the_skip_list_is_the_endless_list_without_its_ranges(ranges: list[tuple[int, int]]) -> None:
    skip = SkipList.of(ranges)
    gone = {row for begin, end in ranges for row in range(begin, end)}
    taken = [row for row in range(200) if row not in gone]
    assert [skip.row(place) for place in range(100)] == taken[:100]
    assert [skip.place(row) for row in taken] == list(range(len(taken)))
    assert [skip.row(skip.place(row)) for row in range(100)] == [min(r for r in taken if r >= row) for row in range(100)]
    assert len(skip) == len(gone) and SkipList.of(skip.ranges) == skip == skip | skip


def test_ft05_where_a_rollback_goes() -> None:
    trouble = Trouble(503, 505, "")
    every = [(step, False) for step in range(10, 510, 10)]
    assert targets(every, trouble, 10)[:2] == [400, 390]  # 100 steps back and more
    assert targets([(480, False), (490, False), (500, False)], trouble, 10) == [490, 480, 500]  # else one interval
    assert targets([(500, False)], trouble, 10) == [500]
    assert targets([(390, False), (400, True), (500, True)], trouble, 10) == [390]  # a suspect one never
    assert targets([(503, False), (504, False)], trouble, 1) == []  # nor one from within
    assert targets([], trouble, 10) == []


def test_ft05_too_many_rollbacks_in_a_thousand_steps() -> None:
    known = Recovery(failures=[505, 530])
    assert known.exhausted(420, 2) and known.exhausted(1500, 2)
    assert not known.exhausted(1505, 2) and not known.exhausted(420, 3)
    assert Recovery.from_state_dict(known.state_dict()) == known


def change(step: int, rate: float, by: str = "user") -> rec.Change:
    return rec.Change(what="learning_rate", step=step, before=1.0, after=rate, by=by)


def test_d6b_a_rate_of_an_abandoned_branch_does_not_come_back() -> None:
    a, b, back = change(10, 0.5), change(7, 0.25), rec.Rewind(to_step=5)
    assert rates_after([a, back], 5) == {10: 0.5}  # killed: it is set again at its own step
    assert rates_after([a, back, change(10, 0.5, by="recovery")], 5) == {10: 0.5}
    assert rates_after([a, back, b, back], 5) == {7: 0.25}  # the newer choice took it back
    assert rates_after([a, back, change(12, 0.1), back], 5) == {10: 0.5, 12: 0.1}
    assert rates_after([a, change(12, 0.1)], 10) == {12: 0.1}
    rollback = rec.Rewind(to_step=8, failed_step=13, skip=[(0, 4)])
    assert rates_after([b, a, change(12, 0.1), rollback], 5) == {7: 0.25}  # not after a rollback


def test_rs08_rollbacks_that_no_checkpoint_knows_are_in_the_log() -> None:
    records = [rec.Rewind(seq=3, to_step=2), rec.Rewind(seq=5, to_step=4, failed_step=9, skip=[(8, 18)])]
    assert rollbacks_after(records, 4) == records[1:] and rollbacks_after(records, 5) == rollbacks_after(records, None) == []
    known = Recovery(SkipList.of([(0, 2)]), [3]).after(rollbacks_after(records, 4))
    assert known == Recovery(SkipList.of([(0, 2), (8, 18)]), [3, 9])
