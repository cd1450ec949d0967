"""Schedules against their formulas, from step 1 (C73, R04, R29)."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lumina_engine.training.schedule import Schedule

KINDS = ["cosine", "wsd", "linear", "constant"]


def schedule(kind: str, total: int = 100, warmup: int = 10, floor: float = 0.1, decay: float = 0.2) -> Schedule:
    return Schedule(kind, 1e-3, total, warmup, floor, decay)


@pytest.mark.parametrize("kind", KINDS)
def test_r04_first_step_has_a_rate(kind: str) -> None:
    assert schedule(kind).lr(1) == pytest.approx(1e-4)
    assert schedule(kind, warmup=0).lr(1) > 0


def test_c073_cosine_is_the_formula() -> None:
    s = schedule("cosine")
    for step in range(1, 101):
        want = step / 10 if step <= 10 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert s.lr(step) == pytest.approx(1e-3 * want)


def test_c073_wsd_is_flat_then_decays_to_the_floor() -> None:
    s = schedule("wsd")
    assert [s.shape(step) for step in (11, 50, 80)] == [1.0, 1.0, 1.0]
    assert s.shape(90) == pytest.approx(0.55)
    assert s.shape(100) == pytest.approx(0.1)
    never = schedule("wsd", decay=0.0)
    assert [never.shape(step) for step in (11, 99, 100)] == [1.0, 1.0, 1.0]
    whole = schedule("wsd", decay=1.0)  # the decay begins where the warm-up ends
    assert [whole.shape(step) for step in (10, 55, 100)] == pytest.approx([1.0, 0.55, 0.1])


def test_c073_linear_and_constant() -> None:
    assert schedule("linear").shape(55) == pytest.approx(0.55)
    assert schedule("linear").shape(100) == pytest.approx(0.1)
    assert schedule("constant").shape(100) == 1.0


@given(
    kind=st.sampled_from(KINDS),
    total=st.integers(1, 3000),
    warmup=st.integers(0, 3000),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1),
)
@example(kind="cosine", total=1, warmup=0, floor=0.0, decay=0.2)
@example(kind="linear", total=1, warmup=0, floor=0.0, decay=0.2)
@example(kind="wsd", total=1, warmup=0, floor=0.0, decay=1.0)
def test_r04_rates_stay_between_floor_and_peak(kind: str, total: int, warmup: int, floor: float, decay: float) -> None:
    s = schedule(kind, total, warmup, floor, decay)
    shapes = [s.shape(step) for step in range(1, total + 3)]
    assert all(0 <= x <= 1 + 1e-12 for x in shapes)
    assert shapes[0] > 0  # the first step trains, also where it is the only one
    after = shapes[warmup:]
    assert all(x >= floor - 1e-12 for x in after)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))  # never up again after the warm-up


def test_r29_a_choice_for_a_later_step_is_taken_back_from_what_was_saved_with_it() -> None:
    schedule = Schedule("constant", 1e-3, 1000, 0, 0.1, 0.2)
    schedule.set_lr(50, 5e-4)
    schedule.set_lr(125, 2e-4)
    schedule.set_lr(125, 4e-4)
    again = Schedule("constant", 1e-3, 1000, 0, 0.1, 0.2)
    again.load_state_dict(schedule.state_dict())
    again.take_back(after=125)
    assert again.lr(125) == pytest.approx(4e-4)
    again.take_back(after=124)
    assert again.lr(125) == pytest.approx(5e-4)
    again.load_state_dict({"multiplier": 0.25})  # of an earlier version
    again.take_back(after=0)
    assert again.lr(1) == 2.5e-4


def test_r29_multiplier_scales_later_steps_and_survives_a_restart() -> None:
    s, fresh = schedule("cosine"), schedule("cosine")
    s.set_lr(40, 2e-4)
    fresh.load_state_dict(s.state_dict())
    assert fresh.lr(40) == pytest.approx(2e-4)
    assert fresh.lr(70) / schedule("cosine").lr(70) == pytest.approx(2e-4 / schedule("cosine").lr(40))
