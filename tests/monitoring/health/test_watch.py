"""The health monitor on made-up records: what opens, what closes, what is said, what is not."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from lumina_engine import TrainingHealthMonitor
from lumina_engine.bench.corpus import Recorded, read, write
from lumina_engine.bench.generated import DISK, MACHINE, ROOM, disk_records, machine_records, room_records
from lumina_engine.bench.health import measure
from lumina_engine.cli import _parser
from lumina_engine.config.schema import Config, fields_info
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.hardware import memory_limit
from lumina_engine.monitoring.health.scores import scores
from lumina_engine.monitoring.health.watch import QUIET_STEPS, HealthWatch, detectors
from lumina_engine.monitoring.health.windows import DISK_EVERY, RATE_KEYS, SLOPE_BLOCK, Windows, theil_sen
from lumina_engine.monitoring.log import read_records
from lumina_engine.training.memory import memory_stats
from lumina_engine.training.schedule import Schedule


def steps(count: int, first: int = 1, seed: int = 0, **change: Any) -> Iterator[rec.Step]:
    """Ordinary steps: a loss that falls slowly with noise. A value in `change` may be a function of the step."""
    draw = random.Random(seed * 1000 + first)
    for step in range(first, first + count):
        values: dict[str, Any] = {
            "loss": 3.0 * step**-0.2 * draw.lognormvariate(0, 0.03),
            "grad_norm": draw.lognormvariate(0, 0.3),
        }
        values |= {"lr": 1e-3, "step_time": draw.lognormvariate(0, 0.05), "data_time": 0.001, "batch": 8, "seq_length": 64}
        values |= {name: value(step) if callable(value) else value for name, value in change.items()}
        yield rec.Step(step=step, t=float(step), inc=1, **values)


def experts(step: int, *load: float, dropped: float = 0.0) -> rec.Experts:
    shares = [n / sum(load) for n in load]
    entropy = -sum(s * math.log(s) for s in shares if s) / math.log(len(load))
    dead = sum(n == 0 for n in load)
    figures: dict[str, Any] = {
        "imbalance": [max(shares) * len(load)],
        "entropy": [entropy],
        "dead": [dead],
        "dropped": [dropped],
    }
    return rec.Experts(step=step, layers=[0], load=[list(load)], t=float(step), inc=1, **figures)


def codes(watch: HealthWatch) -> list[str]:
    return [alert.code for alert in watch.alerts]


def fed(count: int = 200, **change: Any) -> HealthWatch:
    watch = HealthWatch()
    watch.replay(steps(count, **change))
    return watch


@pytest.mark.parametrize("seed", range(10))
def test_c093_an_ordinary_run_raises_nothing(seed: int) -> None:
    assert codes(fed(1500, seed=seed)) == []


@pytest.mark.parametrize(
    ("change", "code", "severity", "within"),
    [
        ({"loss": math.nan}, "nonfinite_run", "critical", 3),
        ({"grad_norm": math.inf}, "nonfinite_run", "critical", 3),
        ({"loss": 4.0}, "divergence", "critical", 8),
        ({"lr": 1e-2}, "rate_jump", "critical", 1),
        ({"lr": 2.5e-3}, "rate_jump", "warning", 1),
        ({"step_time": 4.0}, "throughput_drop", "warning", 36),
        ({"data_time": 0.6}, "loader_wait", "warning", 48),
        ({"grad_norm": 30.0}, "gradient_tail", "warning", 32),
        ({"repeats": 190}, "repeated_data", "warning", 4),
        ({"frozen": lambda step: [] if step % 32 else ["block 0"]}, "frozen_layer", "warning", 64),
    ],
)
def test_c093_a_fault_is_one_alert_of_its_code(change: dict[str, Any], code: str, severity: str, within: int) -> None:
    watch = fed()
    alerts = watch.replay(steps(within, 201, **change))
    mine = [alert for alert in alerts if alert.code == code]
    assert [alert.severity for alert in mine] == [severity] and f"step {mine[0].step}" in mine[0].message
    watch.replay(steps(100, 201 + within, **change))
    assert codes(watch).count(code) == 1, "told once while it lasts"


def test_c093_what_is_learned_by_heart_does_not_diverge_from_one_small_loss_to_another() -> None:
    watch = fed(200, loss=lambda step: 0.0035 + 0.0001 * (step % 5))
    assert watch.replay(steps(30, 201, loss=0.006))[1:] == []  # but for the spike of its first step
    assert codes(watch) == ["loss_spike"]
    assert "divergence" in [alert.code for alert in watch.replay(steps(30, 231, loss=0.2))]


def test_c093_a_loss_that_steps_up_with_the_length_of_rows_is_no_divergence() -> None:
    watch = fed(800, loss=lambda step: 2.0 + 0.02 * (step % 5), seq_length=128, batch=16)
    assert watch.replay(steps(200, 801, loss=lambda step: 2.5 + 0.02 * (step % 5), seq_length=256, batch=8)) == []
    assert watch.summary()["health_status"] == "healthy"
    found = watch.replay(steps(20, 1001, loss=3.5, seq_length=256, batch=8))
    assert [alert.code for alert in found] == ["loss_spike", "divergence"]


def test_c093_a_divergence_ends_where_rows_get_another_length_and_the_next_one_is_told() -> None:
    watch = fed(200, seq_length=128)
    watch.replay(steps(20, 201, loss=4.0, seq_length=128))
    assert "divergence" in watch.open
    watch.replay(steps(150, 221, loss=4.0, seq_length=256))
    assert "divergence" not in watch.open, "its level is one of another length"
    watch.replay(steps(20, 371, loss=6.0, seq_length=256))
    assert opened(watch, "divergence")[1:] == [376]


@pytest.mark.parametrize(
    "shape",
    [
        {"seq_length": lambda step: 64 + step % 7},  # padded to the longest row
        {"batch": lambda step: 8 if step % 30 else 3},  # the rest of an epoch
    ],
)
def test_c093_batches_of_mixed_shapes_hide_no_divergence(shape: dict[str, Any]) -> None:
    watch = fed(300, **shape)
    assert "divergence" in [alert.code for alert in watch.replay(steps(12, 301, loss=4.0, **shape))]


@pytest.mark.parametrize("to_step", range(300, 352, 4))
def test_c093_a_rewind_over_a_change_of_length_is_no_divergence(to_step: int) -> None:
    def level(first: int, last: int) -> Iterator[rec.Step]:
        return (
            record
            for step in range(first, last)
            for record in steps(
                1, step, loss=(2.0 if step < 340 else 2.5) + 0.02 * (step % 5), seq_length=128 + 128 * (step >= 340)
            )
        )

    watch = HealthWatch()
    watch.replay([*level(1, 360), rec.Rewind(to_step=to_step), *level(to_step + 1, 480)])
    assert codes(watch) == []


def test_c093_a_loss_out_of_line_is_one_spike_and_no_divergence() -> None:
    watch = fed()
    assert [a.code for a in watch.replay([*steps(1, 201, loss=6.0), *steps(60, 202)])] == ["loss_spike"]


def test_c093_a_fault_that_comes_back_is_told_again_only_after_a_quiet_time() -> None:
    watch = fed()
    watch.replay([*steps(4, 201, loss=math.nan), *steps(150, 205), *steps(4, 355, loss=math.nan)])
    assert codes(watch).count("nonfinite_run") == 1 and "nonfinite_run" not in watch.open
    watch.replay([*steps(100 + QUIET_STEPS, 359), *steps(4, 459 + QUIET_STEPS, loss=math.nan)])
    assert codes(watch).count("nonfinite_run") == 2


def opened(watch: HealthWatch, code: str) -> list[int]:
    """The steps at which alerts of this code were told."""
    return [alert.step or 0 for alert in watch.alerts if alert.code == code]


def test_c093_a_divergence_that_comes_back_within_the_quiet_time_is_told_when_that_is_over() -> None:
    watch = fed()
    watch.replay([*steps(20, 201, loss=4.0), *steps(60, 221)])
    assert len(opened(watch, "divergence")) == 1 and not watch.open
    watch.replay(steps(12, 281, loss=6.0))
    assert "divergence" not in watch.open, "the first one ended less than a quiet time ago"
    watch.replay(steps(2 * QUIET_STEPS, 293, loss=6.0))
    _, second = opened(watch, "divergence")
    assert "divergence" in watch.open and 293 <= second <= 221 + 8 + QUIET_STEPS, "told once, and it lasts"
    assert "step 28" in watch.alerts[-1].message, "it tells where the loss went up, not when the quiet time was over"


def test_c093_a_divergence_within_the_quiet_time_that_ends_there_is_not_told() -> None:
    watch = fed()
    watch.replay([*steps(20, 201, loss=4.0), *steps(40, 221), *steps(20, 261, loss=6.0), *steps(300, 281)])
    assert len(opened(watch, "divergence")) == 1 and not watch.open


def test_c093_a_rate_that_jumps_again_within_the_quiet_time_is_told_when_that_is_over() -> None:
    watch = fed()
    watch.replay([*steps(1, 201, lr=1e-2), *steps(49, 202)])
    assert opened(watch, "rate_jump") == [201] and not watch.open
    watch.replay(steps(3 * QUIET_STEPS, 251, lr=1e-2))
    assert opened(watch, "rate_jump") == [201, 202 + QUIET_STEPS] and "rate_jump" in watch.open
    assert watch.alerts[-1].message.startswith("step 251: ") and watch.alerts[-1].severity == "critical"


@pytest.mark.parametrize("ended", [False, True], ids=["while it lasts", "after its end"])
def test_c093_a_divergence_that_comes_back_after_a_rollback_is_told_at_once(ended: bool) -> None:
    watch = fed()
    watch.replay([*steps(20, 201, loss=4.0), *(steps(20, 221) if ended else ())])
    assert ("divergence" in watch.open) != ended
    watch.replay([rec.Rewind(to_step=190, failed_step=220), *steps(19, 191), *steps(150, 210, loss=4.0)])
    _, second = opened(watch, "divergence")
    assert 210 <= second <= 217 and "divergence" in watch.open, "the rollback did not help: that is news, once"


def test_c093_a_batch_that_comes_once_more_and_a_part_that_rests_once_are_no_fault() -> None:
    watch = fed()
    watch.replay(steps(120, 201, repeats=lambda step: 7 if step % 4 == 0 else None))
    watch.replay(steps(300, 321, frozen=lambda step: ["block 1"] if step % 96 == 0 else []))
    watch.replay(steps(64, 621, frozen=lambda step: [] if step % 32 else [f"block {step // 32 % 2}"]))  # another one each time
    assert codes(watch) == []


def test_c093_repeats_and_a_frozen_part_end() -> None:
    watch = fed()
    watch.replay(steps(64, 201, repeats=7, frozen=lambda step: [] if step % 32 else ["head"]))
    assert sorted(watch.open) == ["frozen_layer", "repeated_data"]
    watch.replay(steps(8, 265))
    assert sorted(watch.open) == ["frozen_layer"]
    watch.replay(steps(64, 273))
    assert not watch.open


def test_c093_a_rate_that_somebody_set_is_no_jump_and_a_warm_up_is_none() -> None:
    warm = fed(300, lr=lambda step: min(step, 100) * 1e-5)
    warm.observe(rec.Change(what="learning_rate", step=300, before=1e-3, after=1e-2, by="user"))
    assert "rate_jump" not in [a.code for a in warm.replay(steps(50, 301, lr=1e-2))]


@pytest.mark.parametrize("key", sorted(RATE_KEYS))
def test_c093_a_resume_that_changes_the_schedule_is_no_jump_and_a_jump_after_it_is_one(key: str) -> None:
    run = fed(72, lr=5e-5)
    run.replay([rec.Run(state="preparing", inc=2), rec.Rewind(to_step=72), rec.Resume(step=72, changed={key: (72, 144)})])
    assert "rate_jump" not in [a.code for a in run.replay(steps(28, 73, lr=1e-3))]
    assert [a.code for a in run.replay(steps(1, 101, lr=1e-2))] == ["rate_jump"]


@pytest.mark.parametrize("changed", [{}, {"save_interval": (100, 50), "version of torch": ("2.7", "2.8")}])
def test_c093_a_rate_that_jumps_over_a_resume_of_the_same_schedule_is_told(changed: dict[str, tuple[Any, Any]]) -> None:
    run = fed(72, lr=5e-5)
    run.replay([rec.Run(state="preparing", inc=2), rec.Rewind(to_step=72), rec.Resume(step=72, changed=changed)])
    assert [a.code for a in run.replay(steps(1, 73, lr=1e-3))] == ["rate_jump"]


def test_c093_every_key_that_the_schedule_reads_is_one_of_the_rate() -> None:
    read_by_schedule = {info.name for info in fields_info() if info.read_by == "training/schedule.py"}
    may_change = {info.name for info in fields_info() if info.resume_may_change}
    assert len(read_by_schedule) == 5 and read_by_schedule <= RATE_KEYS <= may_change | {"data", "ranks"}


def overflow(step: int, scale: float = 65536.0, **change: Any) -> list[rec.Record]:
    """A step of fp16 whose gradient overflowed, as a trainer tells it: what became of the loss scale, and the step."""
    lower = rec.Change(what="loss_scale", step=step, before=scale, after=scale / 2, by="recovery")
    return [lower, *steps(1, step, grad_norm=math.inf, skipped=True, **change)]


def test_c093_a_loss_scale_that_finds_its_value_is_no_fault() -> None:
    begin = HealthWatch()
    begin.replay(record for step in range(1, 9) for record in overflow(step, 2.0 ** (24 - step)))
    begin.replay(steps(100, 9))
    assert codes(begin) == [] and begin.summary()["scores"]["numerics"]["value"] == 1.0
    assert begin.seen.nonfinite_in_row == 0 and begin.summary()["health_status"] == "healthy"
    late = fed()
    for step in range(201, 801, 100):
        late.replay([*overflow(step), *steps(99, step + 1)])
    assert codes(late) == [] and late.summary()["scores"]["numerics"]["value"] == 1.0
    spike = late.replay(overflow(801, loss=9.0))
    assert [alert.code for alert in spike] == ["loss_spike"], "its loss is looked at as any other"


def test_c093_a_gradient_that_no_scale_explains_counts() -> None:
    up = rec.Change(what="loss_scale", step=201, before=1024.0, after=2048.0, by="recovery")
    other = rec.Change(what="loss_scale", step=200, before=2048.0, after=1024.0, by="recovery")
    for told in ([], [up], [other]):
        watch = fed()
        watch.replay([*told, *steps(3, 201, grad_norm=math.inf)])
        assert "nonfinite_run" in watch.open and watch.seen.nonfinite_in_row == 3
    broken = fed()
    broken.replay(record for step in range(201, 204) for record in overflow(step, loss=math.nan))
    assert "nonfinite_run" in broken.open, "the loss is not scaled: a loss scale says nothing of it"


@pytest.mark.parametrize("between", [rec.Rewind(to_step=199), rec.Run(state="preparing", inc=2)], ids=["rewind", "start"])
def test_c093_an_overflow_whose_step_was_never_written_explains_no_later_one(between: rec.Record) -> None:
    watch = fed()
    watch.replay([overflow(201)[0], between, *steps(1, 201, grad_norm=math.inf)])
    assert watch.seen.nonfinite_in_row == 1


def test_c093_routing_collapse_dead_hot_and_dropped() -> None:
    watch = fed(300)
    assert watch.observe(experts(300, 100, 100, 100, 100)) == []
    assert [a.code for a in watch.observe(experts(310, 400, 0, 0, 0))] == ["routing_collapse"]
    lasting = [[a.code for a in watch.observe(experts(step, 400, 0, 0, 0))] for step in range(320, 360, 10)]
    assert lasting == [[], [], [], ["dead_experts"]]
    watch.observe(experts(360, 100, 100, 100, 100))
    assert not {"routing_collapse", "dead_experts"} & set(watch.open)
    halves = fed(300)
    for step in range(300, 360, 10):  # a record of many layers is written as several lines
        other = experts(step, 10, 10, 10, 10)
        other.layers = [7]
        halves.replay([experts(step, 10, 10, 10, 0), other])
    assert codes(halves) == ["dead_experts"] and list(halves.open) == ["dead_experts"]
    grown = fed(300)
    for step in range(300, 400, 10):  # in the middle of a log there is an expert more
        grown.observe(experts(step, 100, 100, 100, 100) if step < 350 else experts(step, 80, 80, 80, 80, 80))
    assert codes(grown) == [] and grown.seen.routing is not None and len(grown.seen.routing.load[0]) == 5
    early = fed(20)
    assert [early.observe(experts(step, 400, 0, 0, 0)) for step in (10, 20, 30)] == [[], [], []], "a start is no collapse"
    young = fed(100)
    assert [young.observe(experts(step, 10, 10, 10, 0)) for step in range(100, 160, 10)] == [[]] * 6, "nor is its way a death"
    dropping = fed(300)
    told = [[a.code for a in dropping.observe(experts(step, 10, 9, 10, 9, dropped=0.5))] for step in range(300, 360, 10)]
    assert told == [[], [], [], [], ["dropped_tokens"], []]


@pytest.mark.parametrize("kind", [*MACHINE, *ROOM])
def test_c093_faults_of_the_machine(kind: str) -> None:
    watch = HealthWatch()
    watch.replay((machine_records if kind in MACHINE else room_records)(kind, random.Random(1)))
    critical, warning = (MACHINE | ROOM)[kind]
    assert set(codes(watch)) <= {*critical, *warning} and bool(watch.alerts) == bool(critical or warning)


@pytest.mark.parametrize("seed", range(12))
def test_c093_a_disk_that_fills_is_told_with_the_hours_that_are_left_and_a_saw_tooth_is_not(seed: int) -> None:
    saw, fills = (list(disk_records(kind, random.Random(seed))) for kind in ("disk saw-tooth", "disk fills"))
    assert HealthWatch().replay(saw) == []
    (alert,) = HealthWatch().replay(fills)
    assert alert.code == "disk_low" and alert.severity == "warning" and 128 < (alert.step or 0) < 190
    told = re.search(r"less by ([\d.]+) GB/h beside its saves: full in ([\d.]+) h", alert.message)
    assert told is not None
    free, without = (
        next(record.disk_free or 0 for record in records if isinstance(record, rec.Hardware) and record.t == alert.t)
        for records in (fills, saw)
    )
    pace = (without - free) / (alert.t - 20 * 100) * 3600 / 1e9  # GB/h that somebody else writes from step 100 on
    assert [float(part) for part in told.groups()] == [pytest.approx(pace, rel=0.1), pytest.approx(free / 1e9 / pace, rel=0.15)]


def disk(*free: float, every: float = DISK_EVERY, begin: float = 0.0) -> list[rec.Record]:
    """Free GB in records so many seconds apart."""
    return [rec.Hardware(t=begin + every * place, disk_free=int(1e9 * gb)) for place, gb in enumerate(free, 1)]


@pytest.mark.parametrize(
    "free",
    [
        [100 - 0.5 * n for n in range(63)],  # too few points
        [100.0] * 64 + [100 - n for n in range(45)],  # one save of 15 minutes that is not told yet
        [100 - n % 45 for n in range(200)],  # what somebody else writes for 15 minutes, and deletes
        [100 - 0.05 * n for n in range(200)],  # full in 11 hours
        [100 - 40 * (n > 100) for n in range(200)],  # one file
        [100 + 3 * random.Random(n).gauss(0, 1) for n in range(200)],
    ],
)  # fmt: skip
def test_c093_what_does_not_fill_a_disk_within_hours(free: list[float]) -> None:
    assert HealthWatch().replay(disk(*free)) == []


def test_c093_a_disk_that_fills_is_told_once_and_ends_where_it_fills_no_more() -> None:
    watch = HealthWatch()
    falls = [100 - 0.3 * n for n in range(100)]
    assert [alert.code for alert in watch.replay(disk(*falls))] == ["disk_low"]
    assert "full in 1.5 h" in watch.alerts[0].message and "54 GB/h" in watch.alerts[0].message
    watch.replay(disk(*[falls[-1]] * 40, begin=2_000.0))
    assert list(watch.open) == ["disk_low"], "half an hour has not shown it yet"
    watch.replay(disk(*[falls[-1]] * 40, begin=2_800.0))
    assert not watch.open
    again = HealthWatch()
    again.replay([*disk(*falls[:50]), rec.Run(state="preparing", inc=2), *disk(*falls[50:], begin=1_020.0)])
    assert codes(again) == [], "nobody knows what fell between two starts"
    often = HealthWatch()
    assert [a.code for a in often.replay(disk(*[100 - 0.03 * n for n in range(1000)], every=2.0))] == ["disk_low"]
    assert len(often.seen.disk) == 100


def test_c093_a_device_that_the_allocator_fills_is_a_warning_that_says_so_and_costs_no_score() -> None:
    watch = fed(500)

    def told(used: int, host: int = 50) -> list[tuple[str, str]]:
        devices = [
            rec.Device(index=index, name="GPU", memory_used=part, memory_total=1000) for index, part in ((0, 500), (1, used))
        ]
        alerts = watch.observe(rec.Hardware(cpu_count=2, devices=devices, memory_used=host, memory_total=100))
        return [(alert.code, alert.severity) for alert in alerts]

    assert told(970) == [] and told(998) == [("device_memory_low", "warning")]
    assert "device 1" in watch.alerts[-1].message and "allocator" in watch.alerts[-1].message
    assert watch.summary()["health_status"] == "healthy" and watch.summary()["scores"]["resources"]["value"] == 1.0
    assert told(998, host=99) == [("memory_low", "critical")] and watch.summary()["scores"]["resources"]["value"] < 0.3
    assert told(940) == [] and not watch.open


def test_c093_overfitting_and_a_plateau() -> None:
    watch = HealthWatch()
    for place, loss in enumerate([2.0, 1.8, 1.9, 2.0, 2.1]):
        watch.replay(steps(100, 1 + 100 * place))
        watch.observe(rec.Eval(step=100 * place + 100, loss=loss))
    assert codes(watch) == ["overfitting"]
    flat = fed(600)
    for place, loss in enumerate([2.0, 1.5, 1.501, 1.499, 1.502, 1.498, 1.5]):
        flat.observe(rec.Eval(step=100 * place + 100, loss=loss))
    assert codes(flat) == ["eval_plateau"] and flat.alerts[0].severity == "info"
    still = fed(600)
    for place, loss in enumerate([2.0, 1.5, 1.5, 1.5, 1.5, 1.5]):  # to the last bit, where nothing is learned
        still.observe(rec.Eval(step=100 * place + 100, loss=loss))
    assert codes(still) == ["eval_plateau"]
    still.observe(rec.Eval(step=700, loss=1.49))
    assert not still.open


FLAT = [2.0, 1.5, 1.501, 1.499, 1.502]  # of which the last does not move
TOTAL = 10_000


def scheduled(schedule: Schedule, upto: int, run: str | None = "first") -> HealthWatch:
    """A run up to a step, the last 70 of them, whose evaluation loss is flat there."""
    watch = HealthWatch(run=run)
    watch.observe(rec.Run(state="running", total_steps=TOTAL if run else None))
    watch.replay(steps(70, upto - 69, lr=schedule.lr))
    for place, loss in enumerate(FLAT):
        watch.observe(rec.Eval(step=upto - 4 + place, loss=loss))
    return watch


def overrides(advice: str) -> dict[str, str]:
    """The keys behind --resume."""
    return dict(word.split("=") for word in shlex.split(advice.partition("--resume")[2]))


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
@pytest.mark.parametrize("at", [100, 2_500, 8_000, 8_500, 9_999, TOTAL])
@pytest.mark.parametrize("multiplier", [1.0, 0.3])
def test_c093_the_advice_on_a_plateau_never_raises_the_rate(kind: str, at: int, multiplier: float) -> None:
    config = Config(lr_schedule=kind, warmup_steps=200)
    schedule = Schedule.from_config(config, TOTAL)
    schedule.multiplier = multiplier
    (alert,) = scheduled(schedule, at).alerts
    assert alert.code == "eval_plateau" and "lumina-engine runs stop first" in (alert.recommendation or "")
    keys = overrides(alert.recommendation or "")
    flat = 200 < at < TOTAL and (kind == "constant" or (kind == "wsd" and at <= 8_000))
    assert bool(keys) == flat, "a rate that falls goes on falling"
    if keys:
        resumed = Schedule.from_config(Config(**config.to_dict(sectioned=False) | keys), TOTAL)
        resumed.load_state_dict(schedule.state_dict())
        assert resumed.lr(at + 1) < schedule.lr(at), "the fall begins here"
        assert resumed.lr(TOTAL) == pytest.approx(0.1 * multiplier * config.learning_rate)


LOWER = {  # what tells to halve the rate
    "nonfinite_run": [{"loss": math.nan}] * 3,
    "loss_spike": [{"loss": 9.0}],
    "divergence": [{"loss": 4.0}] * 8,
    "gradient_tail": [{"grad_norm": 30.0}] * 32,
}


def troubled(code: str, schedule: Schedule, first: int, run: str | None) -> rec.Alert:
    """The alert that such steps bring from a step of a schedule on."""
    watch = HealthWatch(run=run)
    watch.replay(steps(200, first - 200, lr=schedule.lr))
    for step, change in enumerate(LOWER[code], first):
        watch.replay(steps(1, step, lr=schedule.lr, **change))
    return next(alert for alert in watch.alerts if alert.code == code)


@pytest.mark.parametrize("code", LOWER)
@pytest.mark.parametrize("at", [5_000, 9_000])
def test_c093_who_obeys_the_advice_to_halve_the_rate_has_half_of_it(code: str, at: int) -> None:
    """In mid-schedule: the key is the peak, and the schedule multiplies it."""
    schedule = Schedule.from_config(Config(lr_schedule="cosine"), TOTAL)
    alert = troubled(code, schedule, at, "first")
    rate = re.findall(r"halve learning_rate: lumina-engine runs set-lr first (\S+)", alert.recommendation or "")
    assert len(rate) == 1 and alert.step is not None
    step = alert.step + 1
    before = schedule.lr(step)
    schedule.set_lr(step, float(rate[0]))
    assert schedule.lr(step) == pytest.approx(before / 2, rel=0.01)
    assert "learning_rate=" not in (alert.recommendation or "")
    own = troubled(code, schedule, at, None).recommendation or ""
    assert "set learning_rate to half of what it is" in own and "lumina-engine" not in own


def test_c093_advice_to_go_back_names_its_commands() -> None:
    """In their order, each as the command line takes it."""
    schedule = Schedule.from_config(Config(lr_schedule="cosine"), TOTAL)
    for code, keys in (("nonfinite_run", ["max_grad_norm=1.0"]), ("divergence", [])):
        words = troubled(code, schedule, 5_000, "first").recommendation or ""
        commands = [shlex.split(found) for found in re.findall(r"lumina-engine ([^;(]+)", words)]
        stop, resume, lower = (_parser(line[0]).parse_known_args(line) for line in commands)
        assert (stop[0].action, stop[0].run, stop[0].no_save) == ("stop", "first", True)
        assert (resume[0].verb, resume[0].run, resume[0].resume) == ("train", "first", True)
        assert [*resume[0].overrides, *resume[1]] == keys
        assert (lower[0].action, lower[0].run) == ("set-lr", "first") and not lower[1]
        own = troubled(code, schedule, 5_000, None).recommendation or ""
        assert own.startswith("go back to a checkpoint ") and "lumina-engine" not in own


def test_c093_a_rate_that_jumps_is_set_back_to_what_it_was() -> None:
    schedule = Schedule.from_config(Config(lr_schedule="cosine"), TOTAL)
    for run in ("first", None):
        watch = HealthWatch(run=run)
        watch.replay(steps(200, 8_800, lr=schedule.lr))
        (alert,) = watch.replay(steps(1, 9_000, lr=1e-2))
        words = alert.recommendation or ""
        command = f"lumina-engine runs set-lr first {schedule.lr(8_999):.3g}" if run else "set it back"
        assert words == f"no schedule does that: {command}"


def test_c093_without_a_name_the_advice_on_a_plateau_has_no_command() -> None:
    for kind, words in (("constant", "end it, or let the learning rate fall to the end from here on"), ("cosine", "end it")):
        (alert,) = scheduled(Schedule.from_config(Config(lr_schedule=kind), TOTAL), 5_000, run=None).alerts
        assert alert.recommendation == words
    unknown = HealthWatch(run="first")
    unknown.replay(steps(70))
    for place, loss in enumerate(FLAT):
        unknown.observe(rec.Eval(step=66 + place, loss=loss))
    assert unknown.alerts[0].recommendation == "end it: lumina-engine runs stop first", "its end is not known"


def test_c093_a_rewind_forgets_the_branch_that_is_left() -> None:
    watch = fed()
    watch.replay([*steps(5, 201, loss=4.0), rec.Rewind(to_step=200), *steps(60, 201)])
    assert "divergence" not in codes(watch)


def trailed(seen: Windows) -> dict[str, Any]:
    """What is taken from the values of steps."""
    levels = {name: (list(level.recent), list(level.before)) for name, level in (("loss", seen.loss), ("norm", seen.norm))}
    windows = {name: list(getattr(seen, name)) for name in ("norms", "spikes", "curve", "_block")}
    return levels | windows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("to_step", "last"), [(100, 200), (150, 200), (180, 200), (193, 200), (193, 197)])
def test_c093_a_rewind_leaves_what_there_was_before_the_abandoned_steps(seed: int, to_step: int, last: int) -> None:
    way = list(steps(to_step, seed=seed))
    bad = list(steps(last - to_step, to_step + 1, seed=seed, loss=9.0, grad_norm=80.0))
    never, back = HealthWatch(), HealthWatch()
    never.replay(way)
    back.replay([*way, *bad, rec.Rewind(to_step=to_step)])
    expected, found = trailed(never.seen), trailed(back.seen)
    if last % SLOPE_BLOCK == 0:  # a block that the abandoned steps made full is gone with its first ones
        expected["_block"] = []
    assert expected == found
    assert back.summary()["scores"]["stability"] == never.summary()["scores"]["stability"]


def test_c093_after_a_rollback_health_is_that_of_the_branch_that_is_taken() -> None:
    watch = fed(600)
    watch.replay(steps(40, 601, loss=lambda step: 8.0 * 1.2 ** (step - 600), grad_norm=90.0))
    assert watch.summary()["health_status"] == "critical"
    watch.observe(rec.Rewind(to_step=600, failed_step=640))
    assert watch.summary()["health_status"] == "healthy"
    loss, norm = watch.seen.loss, watch.seen.norm
    assert math.exp(loss.middle) == pytest.approx(3.0 * 590**-0.2, rel=0.1) and loss.standing(math.log(2.0)) > 6
    assert norm.known and math.exp(norm.middle) == pytest.approx(1.0, rel=0.3)
    watch.replay(steps(128, 601))
    assert not watch.open and watch.summary()["health_status"] == "healthy"


def test_c093_steps_that_are_not_finite_count_in_their_branch_only() -> None:
    watch = fed(600)
    watch.replay(steps(3, 601, loss=math.nan))
    assert watch.summary()["health_status"] == "critical" and "nonfinite_run" in codes(watch)
    watch.observe(rec.Rewind(to_step=590, failed_step=603))
    assert watch.summary()["health_status"] == "healthy"
    watch.replay(steps(99, 591))
    assert "nonfinite_run" in watch.open, "100 finite steps close it"
    watch.replay(steps(1, 690))
    assert not watch.open and watch.summary()["health_status"] == "healthy"


def test_c093_a_rewind_beyond_all_windows_leaves_them_empty() -> None:
    watch = fed(2000)
    watch.observe(rec.Rewind(to_step=100))
    assert not any(part for name, part in trailed(watch.seen).items() if name not in ("loss", "norm"))
    assert not watch.seen.loss.known and watch.seen.loss.standing(99.0) == 0.0
    assert codes(watch) == [] == [alert.code for alert in watch.replay(steps(200, 101))]


def test_c093_a_log_replayed_gives_the_same_alerts_with_or_without_a_break() -> None:
    whole = [*steps(200), *steps(60, 201, loss=4.0, lr=1e-2), *steps(100, 261, loss=math.nan)]
    one, two = HealthWatch(), HealthWatch()
    one.replay(whole)
    for record in whole:
        two.observe(rec.decode(rec.encode(record)))
    assert list(one.alerts) == list(two.alerts) and one.summary() == two.summary() and len(one.alerts) > 3


@pytest.mark.parametrize("run", [None, "first"])
def test_c091_every_override_in_a_recommendation_is_a_valid_key_and_value(run: str | None) -> None:
    watch, tight = HealthWatch(run=run), HealthWatch(run=run)
    for each in (watch, tight):
        each.observe(rec.Run(state="running", total_steps=1_000))
    watch.replay(
        [
            *steps(200, seed=3),
            *steps(60, 201, loss=4.0, lr=1e-2, grad_norm=40.0, data_time=2.5, step_time=5.0),
            *steps(4, 261, loss=math.nan),
        ]
    )
    for step in range(270, 320, 10):
        watch.observe(experts(step, 8000, 0, 0, 0, 0, 0, 0, 0, dropped=0.5))
    advice = {alert.code: alert.recommendation for alert in watch.alerts}
    made = [machine_records(kind, random.Random(2)) for kind in MACHINE] + [
        disk_records(kind, random.Random(2)) for kind in DISK
    ]
    for records in made:
        advice |= {alert.code: alert.recommendation for alert in HealthWatch().replay(records)}
    tight.replay(steps(70))
    for place, loss in enumerate([2.0, 1.5, 1.501, 1.499, 1.502, 1.498, 1.5]):
        tight.observe(rec.Eval(step=place, loss=loss))
    for loss in (1.6, 1.7, 1.8):
        tight.replay(steps(100, tight.seen.step + 1))
        tight.observe(rec.Eval(step=tight.seen.step, loss=loss))
    tight.observe(rec.Checkpoint(step=400, bytes=100))
    tight.replay(steps(64, tight.seen.step + 1, repeats=7, frozen=lambda step: [] if step % 32 else ["head"]))
    hot = rec.Device(index=0, name="GPU", temperature=95.0, memory_used=99, memory_total=100)
    tight.observe(rec.Hardware(memory_used=995, memory_total=1000, disk_free=200, devices=[hot]))
    advice |= {alert.code: alert.recommendation for alert in tight.alerts}
    every = {code for detector in detectors() for code in detector.codes}
    assert set(advice) == every, "a detector whose advice is not looked at here"
    for code, words in advice.items():
        assert words and (run is None or "RUN" not in words), code
        for name, value in re.findall(r"\b([a-z][a-z_0-9]*)=([^\s,;:)]+)", words):
            assert name in Config.model_fields, (code, name)
            Config(**{name: value})


def test_c089_no_data_warming_up_and_the_scores_of_a_run() -> None:
    watch = HealthWatch()
    assert watch.summary()["health_status"] == "no_data" and math.isnan(watch.summary()["overall_health_score"])
    assert all(score["value"] is None for score in watch.summary()["scores"].values())
    watch.replay(steps(10))
    assert watch.summary()["health_status"] == "warming_up"
    watch.replay(steps(490, 11))
    good = watch.summary()
    assert (
        good["health_status"] == "healthy"
        and good["scores"]["routing"]["value"] is None
        and good["overall_health_score"] > 0.95
    )
    watch.replay(steps(3, 501, loss=math.nan))
    assert watch.summary()["scores"]["numerics"]["value"] == 0 == watch.summary()["overall_health_score"]
    assert watch.summary()["health_status"] == "critical"


def test_c089_a_run_with_a_critical_alert_open_is_degraded_at_best_and_its_score_is_as_it_was() -> None:
    devices = [rec.Device(index=index, name="GPU") for index in range(2)]
    watch = fed(500)
    watch.observe(rec.Hardware(devices=devices))
    score = watch.summary()["overall_health_score"]
    assert watch.summary()["health_status"] == "healthy"
    watch.observe(rec.Hardware(devices=devices[:1]))
    told = watch.summary()
    assert told["open_alerts"] == ["device_lost"] and told["health_status"] == "degraded"
    assert told["overall_health_score"] == score > 0.95
    watch.observe(rec.Hardware(devices=devices))
    assert watch.summary()["health_status"] == "healthy"
    back = fed(600)
    back.replay([*steps(3, 601, loss=math.nan), rec.Rewind(to_step=590), *steps(10, 591)])
    assert "nonfinite_run" in back.open and back.summary()["health_status"] == "healthy", "it was of the branch that is left"
    back.replay(steps(3, 601, loss=math.nan))
    back.replay(steps(1, 604))
    assert back.summary()["health_status"] in ("degraded", "critical"), "and is of this one as well"
    early = fed(10, loss=math.nan)
    assert early.summary()["health_status"] == "critical", "nor is a run that begins with broken steps warming up"
    unknown = HealthWatch()
    unknown.replay([rec.Hardware(devices=devices), rec.Hardware(devices=devices[:1])])
    assert math.isnan(unknown.summary()["overall_health_score"]) and unknown.summary()["health_status"] == "degraded"
    warned = fed(600)
    warned.replay(steps(40, 601, lr=2.5e-3))
    assert "rate_jump" in warned.open and warned.summary()["health_status"] == "healthy", "a warning is none"


def test_c089_sub_scores_follow_their_formulas() -> None:
    seen = Windows()
    for record in steps(400, loss=lambda step: math.exp(0.001 * step), grad_norm=1.0):
        seen.take(record)
    assert scores(seen)["convergence"].value == pytest.approx(0.5 - 5 * 0.1, abs=1e-9)
    assert scores(seen)["stability"].value == 1.0
    seen.take(experts(400, 30, 10, 0, 0, dropped=0.1))
    assert scores(seen)["routing"].value == pytest.approx(1.4 / 3 * 0.5 * 0.5)
    flat = Windows()
    for record in steps(400, loss=lambda step: 2.0 + 0.01 * (-1) ** (step // 20 % 2)):
        flat.take(record)
    assert scores(flat)["convergence"].value == 0.8
    slow = Windows()
    for record in [*steps(200, step_time=1.0), *steps(32, 201, step_time=1 / 0.6)]:
        slow.take(record)
    assert scores(slow)["throughput"].value == pytest.approx(0.5)


def split(record: rec.Experts) -> list[rec.Experts]:
    """A record of several layers as a log has it when its line grows too long: one line a layer here."""
    lists = {name: value for name, value in msgspec.structs.asdict(record).items() if isinstance(value, list) and value}
    parts = range(len(record.layers))
    return [msgspec.structs.replace(record, **{name: [value[i]] for name, value in lists.items()}) for i in parts]


@pytest.mark.parametrize("worst", [0, 1, 2])
def test_c089_the_routing_score_is_that_of_all_layers_however_many_lines_they_take(worst: int) -> None:
    rows = [[10.0, 10.0, 10.0, 10.0] for _ in range(3)]
    rows[worst] = [30.0, 10.0, 0.0, 0.0]
    figures: dict[str, Any] = {name: [] for name in ("load", "imbalance", "entropy", "dead", "dropped")}
    for row in rows:
        for name, values in figures.items():
            values += getattr(experts(300, *row), name)
    record = rec.Experts(step=300, layers=[4, 5, 9], t=300.0, inc=1, **figures)
    whole, lines = fed(64), fed(64)
    for step in (100, 300):  # the later record takes the place of the earlier
        record.step = step
        whole.observe(record)
        lines.replay(split(record))
    found = scores(whole.seen)["routing"]
    assert scores(lines.seen)["routing"] == found and found.value == pytest.approx(1.4 / 3 * 0.5)
    assert found.words == f"worst layer {record.layers[worst]} of the record of step 300"
    assert len(lines.seen.routing.layers) == 3  # type: ignore[union-attr]


def test_c089_no_layer_is_named_where_none_is_uneven() -> None:
    seen = Windows()
    seen.take(experts(100, 10, 10, 11, 10))
    found = scores(seen)["routing"]
    assert found.value == 1.0 and found.words == "no layer is uneven in the record of step 100"


@pytest.mark.parametrize("left", [rec.Rewind(to_step=290), rec.Run(state="preparing", inc=2)], ids=["rewind", "start"])
def test_c089_routing_of_a_branch_or_a_start_that_is_left_is_not_scored(left: rec.Record) -> None:
    watch = fed(300)
    watch.replay([experts(300, 40, 0, 0, 0), left])
    assert watch.summary()["scores"]["routing"]["value"] is None
    watch.observe(experts(300, 10, 10, 10, 10))
    assert watch.summary()["scores"]["routing"]["value"] == 1.0
    watch.observe(rec.Rewind(to_step=300))
    assert watch.summary()["scores"]["routing"]["value"] == 1.0


def test_theil_sen_takes_no_notice_of_one_wild_point() -> None:
    values = [2.0 * i for i in range(10)]
    values[4] = 1000.0
    slope, low, high = theil_sen(values)
    assert slope == 2.0 and low <= 2.0 <= high and low > 0
    assert theil_sen([1.0, 1.2, 0.9, 1.1, 1.0])[1] < 0 < theil_sen([1.0, 1.2, 0.9, 1.1, 1.0])[2]


def test_c093_windows_are_bounded() -> None:
    watch = fed(3000)
    sizes = [len(value) for value in vars(watch.seen).values() if hasattr(value, "maxlen")]
    assert sizes and max(sizes) <= 1000 and len(watch.seen.loss.before) <= 64 and len(watch.seen._block) < 20


def test_c087_c088_c092_a_loop_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = TrainingHealthMonitor(log_dir=tmp_path / "logs" / "deep")
    for record in steps(100):
        names = {"global_step": record.step, "loss": record.loss, "learning_rate": 1e-3, "grad_norm": record.grad_norm}
        monitor.log_step({**names, "tokens_per_sec": 100.0, "memory_usage": {"rss": 5e9, "by": {"model": 1e9}, "note": "text"}})
    alerts = [alert for step in range(101, 110) for alert in monitor.log_step({"step": step, "loss": math.nan})]
    assert [alert.code for alert in alerts] == ["nonfinite_step", "nonfinite_run"]
    recent = monitor.metrics_collector.get_recent_alerts(minutes=10)
    assert recent == alerts and all(a.severity and a.message and a.recommendation and a.code and a.step and a.t for a in recent)
    assert monitor.metrics_collector.latest["memory_usage.by.model"] == 1e9
    assert capsys.readouterr().err.count("memory_usage.note") == 1, "one warning"
    summary, diagnostics = monitor.get_health_summary(), monitor.get_training_diagnostics()
    assert summary["health_status"] == "critical" and diagnostics["training_stability"]["status"] == "unstable"
    assert diagnostics["performance_efficiency"]["efficiency_status"] in ("good", "unknown", "reduced", "poor")
    assert "precision=fp32" in " ".join(diagnostics["recommendations"]) and "{" not in str(diagnostics["resource_utilization"])
    monitor.save_health_report(tmp_path / "new" / "folder" / "health.json")
    told = json.loads((tmp_path / "new" / "folder" / "health.json").read_text())
    assert told["health_status"] == "critical" and [a["code"] for a in told["alerts"]] == ["nonfinite_step", "nonfinite_run"]
    monitor.close()
    logged = (tmp_path / "logs" / "deep" / "metrics.jsonl").read_text().splitlines()
    assert sum('"type":"step"' in line for line in logged) == 109 and sum('"type":"alert"' in line for line in logged) == 2


def test_c093_a_leak_in_a_loop_of_ones_own_is_told() -> None:
    monitor = TrainingHealthMonitor()
    total = memory_limit()
    grown = [monitor.log_step({"loss": 2.0, "rss": total * (0.1 + 0.005 * step)}) for step in range(160)]
    assert [alert.code for alerts in grown for alert in alerts] == ["memory_growth"]
    steady = TrainingHealthMonitor()
    assert [steady.log_step({"loss": 2.0, "memory_usage": {"rss": 0.3 * total}}) for _ in range(160)] == [[]] * 160


def memory(share: float, used: float = 0.5) -> dict[str, Any]:
    """What `get_memory_stats` gives (C67), with a process and a host that fill these shares of the memory."""
    told, total = memory_stats(torch.nn.Linear(2, 2), 0, torch.device("cpu")), memory_limit()
    assert set(told["host"]) == {"rss", "available", "total"} and told["host"]["rss"] > 0
    return {**told, "host": {"rss": int(share * total), "available": int((1 - used) * total), "total": total}}


@pytest.mark.parametrize("wrap", [lambda told: {"memory_usage": told}, lambda told: told], ids=["named", "flat"])
def test_c088_c067_the_memory_of_a_trainer_reaches_the_watch(wrap: Any, capsys: pytest.CaptureFixture[str]) -> None:
    leak = TrainingHealthMonitor()
    grown = [leak.log_step({"loss": 2.0, **wrap(memory(0.1 + 0.005 * step))}) for step in range(160)]
    assert [alert.code for alerts in grown for alert in alerts] == ["memory_growth"]
    full = TrainingHealthMonitor()
    assert full.log_step({"loss": 2.0, **wrap(memory(0.3, used=0.9))}) == []
    assert [alert.code for alert in full.log_step({"loss": 2.0, **wrap(memory(0.3, used=0.99))})] == ["memory_low"]
    known = full.watch.seen.hardware
    assert known is not None and known.memory_total == memory_limit() and known.rss == int(0.3 * memory_limit())
    assert capsys.readouterr().err == "", "its one word, the kind of device, is no surprise"


def test_c088_memory_of_a_host_that_a_cgroup_limits_is_measured_against_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    told = memory(0.1, used=0.999)
    monkeypatch.setattr("lumina_engine.monitoring.hardware.memory_limit", lambda: told["host"]["total"] // 2)
    monitor = TrainingHealthMonitor()
    assert monitor.log_step({"loss": 2.0, "memory_usage": told}) == []
    known = monitor.watch.seen.hardware
    assert known is not None and (known.memory_used, known.memory_total) == (None, told["host"]["total"] // 2)


def test_c093_a_record_that_lists_no_device_loses_none_unless_it_is_complete() -> None:
    devices = [rec.Device(index=index, name="GPU", temperature=60.0) for index in range(2)]
    monitor = TrainingHealthMonitor()
    monitor.emit(rec.Hardware(cpu_count=8, devices=devices, memory_used=5, memory_total=10, disk_free=50))
    assert monitor.log_step({"loss": 2.0, "rss": 1e9}) == [] and monitor.emit(rec.Hardware(cpu=50.0)) == []
    known = monitor.watch.seen.hardware
    assert known is not None and (known.devices, known.disk_free, known.rss, known.cpu) == (devices, 50, 10**9, 50.0)
    assert [alert.code for alert in monitor.emit(rec.Hardware(devices=devices[:1]))] == ["device_lost"]
    monitor.emit(rec.Hardware(devices=devices))
    assert not monitor.watch.open
    monitor.watch.replay(steps(QUIET_STEPS))
    assert [alert.code for alert in monitor.emit(rec.Hardware(cpu_count=8, memory_used=5, memory_total=10))] == ["device_lost"]


@pytest.mark.parametrize("log", [False, True])
def test_c088_numbers_that_no_step_can_have_end_no_loop(log: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = TrainingHealthMonitor(tmp_path if log else None)
    strange = {"frozen": 3, "repeats": 7, "grad_norm": 10**400, "tokens": 1e300, "batch": math.nan}
    assert monitor.log_step({"step": 4, "loss": 2.0, "rss": 1e300, **strange}) == []
    last = monitor.watch.seen.last
    assert last is not None and (last.frozen, last.repeats, last.grad_norm, last.tokens) == ([], None, None, 0)
    assert monitor.watch.seen.hardware is None and monitor.metrics_collector.latest["frozen"] == 3
    assert "grad_norm is no number that a float can hold (int)" in capsys.readouterr().err
    monitor.log_step({"loss": 2.0})
    assert monitor.watch.seen.step == 5
    monitor.close()
    if log:
        assert [record.step for record in read_records(tmp_path / "metrics.jsonl") if isinstance(record, rec.Step)] == [4, 5]


def test_c089_a_monitor_without_anything(tmp_path: Path) -> None:
    monitor = TrainingHealthMonitor()
    assert monitor.get_health_summary()["health_status"] == "no_data" and monitor.metrics_collector.get_recent_alerts() == []
    diagnostics = monitor.get_training_diagnostics()
    assert diagnostics["training_stability"]["status"] == "unknown" and diagnostics["recommendations"] == []
    assert json.loads(monitor.save_health_report(tmp_path / "h.json").read_text())["overall_health_score"] is None


def test_a_recorded_run_comes_back(tmp_path: Path) -> None:
    records = [
        *steps(30, repeats=lambda n: n - 3 if n == 9 else None),
        experts(30, 3, 1),
        rec.Eval(step=30, loss=1.5, t=30.5),
        *steps(2, 31, loss=math.nan),
    ]
    run = Recorded("not finite", 1, "x", held=False, at=31, critical=["nonfinite_run"]).take(records)
    write(tmp_path / "a.json.xz", [run])
    back = list(read(tmp_path)[0].records())
    assert [type(r) for r in back] == [type(r) for r in records]
    assert [r.loss for r in back if isinstance(r, rec.Step)][:30] == pytest.approx([r.loss for r in steps(30)], rel=1e-3)  # type: ignore[arg-type]
    assert [r.repeats for r in back if isinstance(r, rec.Step)] == [*[None] * 8, 6, *[None] * 23]
    assert math.isnan(back[-1].loss or 0) and back[30].load == [[3.0, 1.0]]  # type: ignore[union-attr]
    (tmp_path / "b.json.xz").write_bytes(b"no corpus")
    with pytest.raises(ValueError, match=r"b\.json\.xz: no corpus"):
        read(tmp_path)


def test_c093_what_the_bench_counts() -> None:
    def run(fault: str, at: int, records: list[rec.Step], **keys: Any) -> Recorded:
        return Recorded(fault, 1, "x", held=False, at=at, **keys).take(records)

    caught = run("bad", 201, [*steps(200), *steps(40, 201, loss=4.0)], critical=["divergence"], warning=["loss_spike"])
    missed = run("bad", 201, list(steps(240)), critical=["divergence"])
    alarmed = run("healthy", 0, [*steps(200), *steps(40, 201, loss=4.0)])
    found = measure([caught, missed, alarmed])
    assert (found["critical_recall"], found["critical_false_alarms"], found["warning_precision"]) == (0.5, 1, 0.5)
    assert found["runs"] == 3 and found["healthy_runs"] == 1 and found["held"]["runs"] == 0
    bad, healthy = found["table"]
    assert {code: told["runs"] for code, told in bad["told"].items()} == {"divergence": 1, "loss_spike": 1}
    assert bad["told"]["loss_spike"] == {"runs": 1, "held": 0, "median_delay_steps": 0} and healthy["told"] == {}
