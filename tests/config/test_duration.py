"""C113, section 7.8: more data never takes less time; a measured speed replaces the guess and says so."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.config.budget import budget
from lumina_engine.config.duration import Speed
from lumina_engine.config.machine import GB, Accelerator, Machine
from lumina_engine.config.presets import ConfigPresets
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.speed import measured_speed

CPU = Machine([], 16 * GB, 4, None)


def hours(tokens: int, machine: Machine = CPU, speed: Speed | None = None, done: int = 0, **keys) -> dict:
    config = ConfigPresets.debug()
    for name, value in ({"max_steps": None} | keys).items():
        setattr(config, name, value)
    return budget(config, machine, train_tokens=tokens, tokens_basis="given", speed=speed, done=done)["time"]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 10**9), min_size=2, max_size=2),
    st.integers(0, 500),
    st.integers(0, 500),
    st.integers(0, 100),
    st.floats(0, 0.5),
    st.integers(1, 5),
    st.booleans(),
)
def test_c113_more_data_is_never_less_time(tokens, save, evaluate, batches, split, epochs, measured) -> None:
    keys = {
        "save_interval": save,
        "eval_interval": evaluate,
        "eval_batches": batches,
        "eval_split": split,
        "num_epochs": epochs,
    }
    speed = Speed((900.0, 700.0), "measured: median of 20 steps of run x", (3, 4), (2, 3), (0.1, 0.2)) if measured else None
    less, more = (hours(n, speed=speed, **keys) for n in sorted(tokens))
    assert 0 < less["p50_h"] <= more["p50_h"] and less["p90_h"] <= more["p90_h"]
    assert more["p50_h"] <= more["p90_h"] and more["device_hours"] == more["p50_h"]


def test_c113_more_and_faster_devices_take_less() -> None:
    def gpus(count: int, name: str) -> Machine:
        return Machine([Accelerator(name, 80 * GB)] * count, 64 * GB, 8, None)

    slow, fast = hours(10**9, gpus(1, "A100")), hours(10**9, gpus(1, "H100"))
    many = hours(10**9, gpus(8, "H100"))
    assert slow["p50_h"] > fast["p50_h"] > many["p50_h"] and many["device_hours"] == pytest.approx(8 * many["p50_h"])
    assert fast["basis"].startswith("guessed") and "989 TFLOP" in fast["basis"]


def run(rate: float, steps: int, draw: random.Random, every: int = 20) -> list[rec.Record]:
    """Records of a run with a slow first step, noise, an evaluation and a save every so often."""
    records: list[rec.Record] = [rec.Run(state="preparing", inc=1, t=100.0)]
    t = 107.0
    for step in range(1, steps + 1):
        seconds = 2048 / rate * draw.lognormvariate(0, 0.2) * (30 if step == 1 else 1)
        t += seconds
        records.append(rec.Step(step=step, inc=1, t=t, step_time=seconds, tokens_per_s=2048 / seconds))
        if step % every == 0:
            records.append(rec.Eval(step=step, inc=1, t=t, seconds=3.0))
            t += 3.0
            records.append(rec.Checkpoint(step=step, inc=1, t=t, seconds=1.0, blocking=0.5))
            t += 0.5
    return records


def test_c113_measured_speed_covers_nine_in_ten_runs() -> None:
    """What the first fifth of a run measured holds for the whole of it: P90 is exceeded by at most one run in ten."""
    draw, late = random.Random(5), 0
    for _ in range(40):
        records = run(1000, 500, draw)
        speed = measured_speed(records[:115], "x")
        time = hours(2048 * 500, speed=speed, eval_interval=20, save_interval=20, num_epochs=1)
        actual = records[-1].t + 0.5 - records[0].t
        late += actual > time["p90_h"] * 3600
        assert time["p50_h"] * 3600 == pytest.approx(actual, rel=0.12)
    assert late <= 4


def test_c113_warm_up_skipped_steps_and_abandoned_branches_are_left_out() -> None:
    records = run(1000, 30, random.Random(1), every=100)
    assert measured_speed(records[:15], "x") is None
    plain = measured_speed(records, "x")
    assert plain is not None and plain.basis == "measured: median of 20 steps of run x" and plain.is_measured
    assert plain.start_s[0] == pytest.approx(7.0) and plain.eval_s is None
    odd = [rec.Step(step=31, inc=1, t=1.0, step_time=1.0, tokens_per_s=1e9, skipped=True)]
    odd += [rec.Step(step=s, inc=1, t=1.0, step_time=1.0, tokens_per_s=1e9) for s in range(31, 90)]
    again = measured_speed([*records, *odd, rec.Rewind(to_step=30)], "x")
    assert again is not None and again.tokens_per_s == plain.tokens_per_s


def test_c113_a_resumed_run_counts_what_is_left() -> None:
    speed = Speed((1000.0, 800.0), "measured: median of 20 steps of run x", (0, 0), (0, 0))
    whole = hours(2048 * 100, speed=speed, num_epochs=1, eval_interval=0, save_interval=0)
    rest = hours(2048 * 100, speed=speed, done=75, num_epochs=1, eval_interval=0, save_interval=0)
    assert whole["p50_h"] == pytest.approx(4 * rest["p50_h"]) and rest["steps_done"] == 75
    assert rest["basis"].startswith("measured")
