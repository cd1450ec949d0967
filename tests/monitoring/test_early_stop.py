"""Early stop on the fitted curve (C100): it ends a run only when too little is left to gain, and its log gives that again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from lumina_engine.commands.decisions import lines
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.decisions import KEYS, Replay, backs_after, decisions_of, of_controller, replay
from lumina_engine.monitoring.early_stop import EARLY_STOP, EarlyStop, EarlyStopRules, remaining_gain
from lumina_engine.monitoring.scaling import fit

TOTAL, EVERY = 600, 10
ACT = EarlyStopRules("act", gain=0.02, total_steps=TOTAL)
SEEDS = 60
Loss = Callable[[int], float]


def steep(step: int) -> float:
    """At step 230 there are 0.0206 left to step 600, at step 240 0.0193; at step 430 0.0051, at step 440 0.0047."""
    return 2.0 + 7.7 / step


def records(loss: Loss, total: int = TOTAL, every: int = EVERY) -> list[Any]:
    """The log of a run of 1,000 tokens a step."""
    found: list[Any] = [rec.Run(state="running", total_steps=total, world=1, adaptive="act")]
    for step in range(1, total + 1):
        found.append(rec.Step(step=step, loss=2.0, tokens=1000 * step))
        if step % every == 0:
            found.append(rec.Eval(step=step, loss=loss(step)))
    return found


def until(log: list[Any], at: int, evaluated: bool = False) -> list[Any]:
    """What the checkpoint of step `at` comes from: its own evaluation only if it was `evaluated` before the save."""
    return [
        r for r in log if (isinstance(r, rec.Step) and r.step <= at) or (isinstance(r, rec.Eval) and r.step < at + evaluated)
    ]


def again_from(log: list[Any], at: int, evaluated: bool = False) -> list[Any]:
    """What a start from that checkpoint records once more."""
    return [
        r for r in log if (isinstance(r, rec.Step) and r.step > at) or (isinstance(r, rec.Eval) and r.step >= at + evaluated)
    ]


def told(machine: EarlyStop, log: Iterable[Any], spent: int = 0) -> list[Any]:
    """What it decides; a run that ends has no more records."""
    found: list[Any] = []
    for record in log:
        if isinstance(record, rec.Step | rec.Eval):
            found += machine.observe(record, spent)
        if found and isinstance(found[-1], rec.Change):
            break
    return found


# ---- what is left ---------------------------------------------------------------------------------------------------------


def test_c100_what_is_left_is_the_fall_along_the_curve() -> None:
    """2 + D^-0.5 from 16 to 64 falls from 2.25 to 2.125; without noise the interval is the value."""
    tokens = np.arange(1.0, 17.0)
    found = remaining_gain(tokens, 2 + tokens**-0.5, 64.0, falling=False)
    assert found["gain"] == pytest.approx(0.125, rel=0.01)
    assert 0.12 < found["low"] <= found["gain"] <= found["high"] < 0.13
    curve = fit(tokens, 2 + tokens**-0.5)
    assert found["gain"] == pytest.approx(curve.at(16.0)["loss"] - curve.at(64.0)["loss"]) and curve.gain(16.0)["high"] == 0


def test_c100_a_falling_rate_gives_at_least_the_line_through_the_newest() -> None:
    """5 - D / 10 goes on to fall by 1 in 10; a curve that bends gives less."""
    tokens = np.arange(1.0, 17.0)
    line = 5 - tokens / 10
    assert remaining_gain(tokens, line, 26.0, falling=True)["high"] == pytest.approx(1.0)
    assert remaining_gain(tokens, line, 26.0, falling=False)["high"] < 1.0
    bent = np.where(tokens > 4, line, line + 2)  # only the newest 12 say where it goes
    assert remaining_gain(tokens, bent, 26.0, falling=True)["high"] == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_c100_a_run_ends_only_when_too_little_is_left(noise: float) -> None:
    """Over seeds: each evaluation is a chance to be wrong, and 95 % of the runs are not."""
    wrong, ended, early = 0, 0, 0
    for seed in range(SEEDS):
        draw = np.random.default_rng(seed)
        floor, alpha, size = draw.uniform(1, 2.5), draw.uniform(0.2, 1.2), draw.uniform(0.1, 0.6)
        error = draw.normal(0, noise, TOTAL + 1)

        def curve(step: float, floor: float = floor, alpha: float = alpha, size: float = size) -> float:
            return floor + size * (step / TOTAL) ** -alpha

        found = told(EarlyStop(ACT), records(lambda step: curve(step) + error[step]))  # noqa: B023
        for change in found:
            ended += 1
            early += change.step < 0.9 * TOTAL
            wrong += curve(change.step) - curve(TOTAL) >= ACT.gain
    assert wrong == 0 and ended > 0.9 * SEEDS and early > 0.2 * SEEDS, (wrong, ended, early)


def quadratic(kind: str, peak: float, total: int, warm: int) -> np.ndarray:
    """The expected loss after each step of gradient descent with noise on a quadratic whose curvatures follow a power law."""
    curvature_D = np.arange(1.0, 201.0) ** -1.3
    square_D, losses = np.full(200, 0.5), []
    for step in range(1, total + 1):
        share = (step - warm) / (total - warm)
        shape = {"linear": 1 - 0.9 * share, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * share))}[kind]
        rate = peak * (step / warm if step <= warm else shape)
        square_D = (1 - rate * curvature_D) ** 2 * square_D + rate**2 * curvature_D
        losses.append(1.5 + float((curvature_D * square_D).sum()) / 2)
    return np.array(losses)


def sayings(rules: EarlyStopRules, log: list[Any]) -> dict[int, float]:
    """The most that is still to gain, as told at each step at which a run could end; none ends it."""
    machine, found = EarlyStop(replace(rules, gain=math.inf)), {}
    for record in log:
        if isinstance(record, rec.Step | rec.Eval) and machine.note(record):
            change = machine.judge(0)
            found |= {} if change is None else {record.step: change.evidence["statistic"]}
    return found


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("peak", [0.1, 0.5])
@pytest.mark.parametrize(("total", "every"), [(TOTAL, EVERY), (6_000, 20), pytest.param(50_000, 200, marks=pytest.mark.slow)])
def test_c100_a_falling_rate_brings_more_than_the_curve_tells(kind: str, peak: float, total: int, every: int) -> None:
    """The curve alone says too little while noise holds the loss up; with the line no run ends with too much left."""
    loss_T = quadratic(kind, peak, total, warm=total // 50)
    rules = EarlyStopRules("act", schedule=kind, warmup_steps="auto", total_steps=total)
    for seed in range(3):
        error_T = np.random.default_rng(seed).normal(0, 0.0005, total)
        log = records(lambda step: float(loss_T[step - 1] + error_T[step - 1]), total, every)  # noqa: B023
        said, alone = sayings(rules, log), sayings(replace(rules, schedule="constant"), log)
        share = [most / (loss_T[step - 1] - loss_T[-1]) for step, most in said.items()]
        assert len(said) > 20 and np.mean(np.array(share) < 1) < 0.05 and (kind == "linear" or min(share) > 1)
        assert min(most / (loss_T[step - 1] - loss_T[-1]) for step, most in alone.items()) < 0.9
        for gain in (0.005, 0.01, 0.02):
            end = next((step for step, most in said.items() if most < gain), total)
            assert loss_T[end - 1] - loss_T[-1] < gain


# ---- when it is silent ----------------------------------------------------------------------------------------------------


def first(rules: EarlyStopRules, loss: Loss = steep, total: int = TOTAL, every: int = EVERY) -> int | None:
    found = told(EarlyStop(rules), records(loss, total, every))
    return found[0].step if found else None


def test_c100_not_before_there_are_points_enough_nor_in_warm_up() -> None:
    many = replace(ACT, gain=100.0)
    assert first(many) == 120
    assert first(replace(many, warmup_steps=25)) == 140, "12 evaluations from step 30 on, over a factor of 4"
    assert first(replace(many, warmup_steps=60)) == 280, "from step 70 on"
    assert first(replace(many, warmup_steps="auto")) == 130, "2 % of 600 steps"
    assert first(many, lambda step: 2.0 + step) is None, "the loss does not fall"
    assert first(many, lambda step: math.nan) is None
    assert first(many, every=100) is None
    assert first(replace(many, total_steps=0)) is None
    assert first(many, every=50) is None, "the last evaluation decides nothing: there the run ends anyhow"


def test_c100_not_until_less_is_left_than_asked_for() -> None:
    assert first(ACT) == 240 and first(replace(ACT, gain=0.005)) == 440 and first(replace(ACT, gain=0.0)) is None


def test_c100_nothing_in_the_flat_part_of_wsd() -> None:
    flat = replace(ACT, schedule="wsd", gain=100.0)
    assert first(flat) is None and first(replace(flat, decay_ratio=0.5)) is None
    assert first(replace(flat, decay_ratio=0.9)) == 280, "its decay begins after step 60"


def test_c100_nothing_before_the_middle_of_a_cosine() -> None:
    flat = replace(ACT, schedule="cosine", gain=100.0)
    assert first(flat) == 300 and first(replace(flat, warmup_steps=60)) == 330


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_c100_later_while_the_rate_falls(schedule: str) -> None:
    constant, falling = first(ACT), first(replace(ACT, schedule=schedule))
    assert constant is not None and falling is not None and falling > constant


def test_c100_off_or_with_no_action_left_nothing() -> None:
    assert first(replace(ACT, mode="off")) is None
    assert told(EarlyStop(ACT), records(steep), spent=20) == [] and told(EarlyStop(ACT), records(steep), spent=19) != []


# ---- what is told ---------------------------------------------------------------------------------------------------------


def test_c100_the_end_has_its_evidence() -> None:
    (change,) = told(EarlyStop(ACT), records(steep))
    assert (change.what, change.before, change.after, change.by) == (EARLY_STOP, TOTAL, change.step, "adaptive")
    evidence = change.evidence
    true = steep(change.step) - steep(TOTAL)
    assert evidence["low"] <= evidence["gain"] <= evidence["statistic"] < evidence["threshold"] == 0.02
    assert evidence["gain"] == pytest.approx(true, rel=0.05) and evidence["window"] == change.step // EVERY
    assert "can fall by at most 0.0" in change.reason and f"through {change.step // EVERY} evaluations" in change.reason
    assert change.reason.endswith("less than early_stopping_gain=0.02")


def test_c100_advice_comes_once_and_again_for_another_gain() -> None:
    machine = EarlyStop(replace(ACT, mode="advise", run="first"))
    log = records(steep)
    (alert,) = told(machine, log)
    assert (alert.code, alert.severity, alert.step) == (EARLY_STOP, "info", first(ACT))
    assert alert.recommendation == "end it: lumina-engine runs stop first" and "at least" in alert.message
    machine.use(replace(machine.rules, gain=0.03))
    (again,) = machine.observe(rec.Eval(step=599, loss=steep(599)), 0)
    assert "early_stopping_gain=0.03" in again.message


@pytest.mark.parametrize("cut", [10, 120, 235, 240])
@pytest.mark.parametrize("mode", ["act", "advise"])
def test_c100_a_state_put_back_decides_as_the_unbroken_one(mode: str, cut: int) -> None:
    """A checkpoint taken before the evaluation of its step has it to come again; one taken after it has what came of it."""
    rules, log = replace(ACT, mode=mode), records(steep)
    whole = EarlyStop(rules)
    told(whole, until(log, cut))
    resumed = EarlyStop(rules)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert told(resumed, again_from(log, cut)) == told(EarlyStop(rules), log) != []
    before = told(whole, [r for r in log if isinstance(r, rec.Eval) and r.step == cut])
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    later = told(resumed, again_from(log, cut, evaluated=True)) if mode == "advise" or not before else []
    assert [*before, *later] == told(EarlyStop(rules), log)


# ---- the log alone --------------------------------------------------------------------------------------------------------


def configured(mode: str = "act", **keys: Any) -> Config:
    own = {"adaptive": mode, "early_stopping_gain": 0.02, "lr_schedule": "constant", "warmup_steps": 0, "use_moe": False}
    return Config(**own | keys)


def written(log: list[Any], mode: str = "act", **keys: Any) -> list[Any]:
    """The log with the decisions that follow from it, as a reader gets it; cut behind the end of the run."""
    again, found = replaying(mode, **keys), []
    for record in log:
        if of_controller(record):
            continue
        found.append(record)
        again.take(record)
        due = list(again._due)
        for decision in due:
            found.append(decision)
            again.take(decision)
        if due and isinstance(due[0], rec.Change):
            break
    for place, record in enumerate(found, 1):
        record.seq = place
    return [rec.decode(rec.encode(record)) for record in found]


def replaying(mode: str = "act", **keys: Any) -> Replay:
    config = configured(mode, **keys)
    return Replay({name: getattr(config, name) for name in KEYS})


@pytest.mark.parametrize("mode", ["act", "advise"])
def test_c100_the_log_gives_it_again_and_what_it_does_not_bear_out_is_told(mode: str) -> None:
    log = written(records(steep), mode)
    at = next(place for place, r in enumerate(log) if of_controller(r))
    assert log[at].step == first(ACT) and replay(log, configured(mode)).agrees
    assert replay(log, configured(mode)).spent == 1
    lost = [*log[:at], *log[at + 1 :], rec.Step(step=TOTAL + 1, loss=2.0, tokens=1)]
    assert replay(lost, configured(mode)).differences
    assert replay(log, configured(mode, early_stopping_gain=0.03)).differences
    (told_of, *_) = lines(replay(log, configured(mode)))
    assert "eval_loss can fall by at most" in told_of and told_of.startswith(f"step {log[at].step:,}  ")
    assert mode == "advise" or "stop of 600 steps" in told_of
    assert len(decisions_of(log)) == 1


@pytest.mark.parametrize("at", [230, 235, 240, 245, 250])
@pytest.mark.parametrize("mode", ["act", "advise"])
def test_c100_killed_and_resumed_it_comes_again_at_the_same_step(mode: str, at: int) -> None:
    """The evaluation of a checkpoint's own step comes again, and with it what it decides."""
    log = written(records(steep), mode)
    step = next(r.step for r in log if of_controller(r))
    if at > step and mode == "act":
        return
    start = [rec.Rewind(to_step=at), rec.Resume(step=at), rec.Run(state="running", total_steps=TOTAL)]
    again = again_from(records(steep), at)
    whole = written([*log, *start, *again], mode) if mode == "advise" else log + written_again(log, start, again)
    found = [r.step for r in whole if of_controller(r)]
    assert found == [step, step] if at <= step else [step]
    for every in (1, 40, 10_000):
        result = replay(whole, configured(mode), every)
        assert result.differences == [] and result.spent == 1


@pytest.mark.parametrize("at", [220, 230, 240, 250])
@pytest.mark.parametrize("mode", ["act", "advise"])
def test_c100_the_evaluation_that_a_save_carries_is_not_decided_by_again(mode: str, at: int) -> None:
    """The advice of step 240 is told once where the save has it; a run that it ended is ended again by the next evaluation."""
    log = written(records(steep), mode)
    step = next(r.step for r in log if of_controller(r))
    if at > step and mode == "act":
        return
    head = [r for r in log if getattr(r, "step", None) is None or r.step <= at]
    start = [rec.Rewind(to_step=at, evaluated=True), rec.Resume(step=at), rec.Run(state="running", total_steps=TOTAL)]
    again = again_from(records(steep), at, evaluated=True)
    whole = written([*head, *start, *again], mode) if mode == "advise" else head + written_again(head, start, again)
    found = [r for r in whole if of_controller(r)]
    expected = [step, step + EVERY] if mode == "act" and at == step else [step]
    first_told = next(r for r in log if of_controller(r))
    assert [r.step for r in found] == expected and structs.replace(found[0], seq=first_told.seq) == first_told
    for every in (1, 40, 10_000):
        result = replay(whole, configured(mode), every)
        assert result.differences == [] and result.spent == len(found)


@pytest.mark.parametrize("evaluated", [False, True])
def test_c100_a_return_keeps_the_advice_of_an_evaluation_that_the_save_carries(evaluated: bool) -> None:
    """So the next rollback, to before it, leaves it in the branch that is abandoned."""
    log = [
        rec.Alert(severity="info", code=EARLY_STOP, message="", step=240, seq=1),
        rec.Rewind(to_step=240, evaluated=evaluated, seq=2),
        rec.Rewind(to_step=230, failed_step=245, seq=3),
    ]
    assert [back.dropped for back in backs_after(log, 0)] == [int(evaluated)]


def written_again(log: list[Any], start: list[Any], again: list[Any]) -> list[Any]:
    """What follows a log that has ended, up to the next end."""
    known = replaying()
    for record in log:
        known.take(record)
    found: list[Any] = []
    for record in [*start, *again]:
        found.append(record)
        known.take(record)
        if known._due:
            return [*found, known._due[0]]
    return found


def test_c100_a_rollback_takes_out_the_evaluations_of_the_branch_that_it_leaves() -> None:
    """In the branch that is left the loss stands still, which would end the run."""
    log = records(steep)
    flat = [r if not isinstance(r, rec.Eval) or r.step <= 200 else rec.Eval(step=r.step, loss=steep(200)) for r in log]
    left = [r for r in flat if not isinstance(r, rec.Step | rec.Eval) or r.step <= 230]
    back = rec.Rewind(to_step=200, failed_step=231, skip=[(0, 1)])
    later = again_from(log, 200)
    whole = written([*left, back, *later])
    (change,) = (r for r in whole if of_controller(r))
    assert change.step == first(ACT) and change.evidence == told(EarlyStop(ACT), log)[0].evidence
    for every in (1, 40, 10_000):
        assert replay(whole, configured(), every).agrees


def test_c100_advice_that_a_rollback_left_counts_and_comes_again() -> None:
    log = written(records(steep), "advise")
    step = next(r.step for r in log if of_controller(r))
    left = [r for r in log if getattr(r, "step", None) is None or r.step <= step + 5]
    back = rec.Rewind(to_step=step - 10, failed_step=step + 5, skip=[(0, 1)], seq=len(left) + 1)
    (noted,) = backs_after([*left, back], 0)
    assert noted.dropped == 1
    later = again_from(records(steep), step - 10)
    whole = written([*left, back, *later], "advise")
    assert [r.step for r in whole if of_controller(r)] == [step, step]
    found = replay(whole, configured("advise"))
    assert found.agrees and found.spent == 2


def test_c100_a_plan_of_more_steps_leaves_more_to_gain() -> None:
    """A resume with another max_steps: what is left is that of the steps planned then."""
    log = records(steep)
    at = 200
    head = [r for r in log if not isinstance(r, rec.Step | rec.Eval) or r.step <= at]
    tail = again_from(log, at)
    start = [rec.Rewind(to_step=at), rec.Resume(step=at, changed={"max_steps": (600, 2400)})]
    whole = written([*head, *start, rec.Run(state="running", total_steps=2400), *tail])
    found = [r for r in whole if of_controller(r)]
    expected = first(replace(ACT, total_steps=2400))
    assert [r.step for r in found] == ([expected] if expected else []) and (expected or TOTAL) > (first(ACT) or 0)
    assert replay(whole, configured()).agrees


def resumed(at: int, changed: dict[str, tuple[Any, Any]], total: int, **keys: Any) -> list[Any]:
    """The log of a run of `TOTAL` steps that goes on from step `at` with other keys, to `total` steps."""
    head = [r for r in records(steep) if not isinstance(r, rec.Step | rec.Eval) or r.step <= at]
    start = [rec.Rewind(to_step=at), rec.Resume(step=at, changed=changed), rec.Run(state="running", total_steps=total)]
    return written([*head, *start, *again_from(records(steep, total), at)], **keys)


@pytest.mark.parametrize(
    ("changed", "total"),
    [
        ({}, 1_200),
        ({"lr_schedule": ("linear", "constant")}, TOTAL),
        ({"learning_rate": (1e-3, 1e-4)}, TOTAL),
        ({"warmup_steps": (0, 20)}, TOTAL),
        ({"min_lr_ratio": (0.1, 0.2)}, TOTAL),
        ({"eval_batches": (100, 10)}, TOTAL),
    ],
)
def test_c100_a_resume_on_another_course_of_the_rate_counts_only_what_is_evaluated_on_it(
    changed: dict[str, tuple[Any, Any]], total: int
) -> None:
    """12 evaluations over a factor of 4 in tokens are there at step 120, from step 120 on at step 480."""
    then = {"lr_schedule": "linear", "early_stopping_gain": 100.0} | {name: before for name, (before, _) in changed.items()}
    whole = resumed(110, changed, total, **then)
    assert [(r.step, r.evidence["window"]) for r in whole if of_controller(r)] == [(480, 37)]
    now = {name: after for name, (_, after) in changed.items()}
    for every in (1, 40, 10_000):
        assert replay(whole, configured(**then | now), every).agrees


def test_c100_a_resume_that_changes_nothing_of_the_rate_keeps_its_evaluations() -> None:
    for schedule, total in (("constant", 1_200), ("linear", TOTAL)):
        keys = {"lr_schedule": schedule, "early_stopping_gain": 100.0}
        assert [r.step for r in resumed(110, {}, total, **keys) if of_controller(r)] == [120]


def test_c100_a_rollback_behind_a_resume_on_another_course_begins_the_course_there() -> None:
    """The checkpoint of step 60 is from before it, and what comes after it is on the new one: from step 70 on at step 280."""
    keys = {"lr_schedule": "linear", "early_stopping_gain": 100.0}
    log = [r for r in resumed(110, {}, 1_200, **keys) if not isinstance(r, rec.Step | rec.Eval) or r.step <= 200]
    log = [r for r in log if not of_controller(r)]
    back = rec.Rewind(to_step=60, failed_step=200, skip=[(0, 1)])
    whole = written([*log, back, *again_from(records(steep, 1_200), 60)], **keys)
    assert [(r.step, r.evidence["window"]) for r in whole if of_controller(r)] == [(280, 22)]
    for every in (1, 40, 10_000):
        assert replay(whole, configured(**keys), every).agrees


def test_c100_a_checkpoint_of_a_version_without_early_stop_begins_it_anew() -> None:
    """From step 120 on, 12 evaluations over a factor of 4 in tokens are there at step 480, also behind a later return."""
    log = records(steep)
    key = {"early_stopping_gain": (0.0, 100.0)}
    start = [rec.Rewind(to_step=110, early_stop=False), rec.Resume(step=110, changed=key), log[0]]
    back = [rec.Rewind(to_step=150), rec.Resume(step=150), log[0]]
    parts = [log[0], *until(log, 200), *start, *until(again_from(log, 110), 300), *back, *again_from(log, 150)]
    whole = written(parts, early_stopping_gain=0.0)
    assert [(r.step, r.evidence["window"]) for r in whole if of_controller(r)] == [(480, 37)]
    for every in (1, 40, 10_000):
        assert replay(whole, configured(early_stopping_gain=100.0), every).agrees


def test_c100_a_state_keeps_since_when_evaluations_count() -> None:
    rules, log = replace(ACT, schedule="linear", gain=100.0), records(steep, 1_200)
    machine = EarlyStop(rules)
    machine.begin(rules, 0)
    assert told(machine, until(log, 110)) == []
    for at, end in ((110, 150), (150, 1_200)):
        again = EarlyStop(rules)
        again.load_state_dict(json.loads(json.dumps(machine.state_dict())))
        again.begin(replace(rules, total_steps=1_200), at)
        found = told(again, until(again_from(log, at), end))
        machine = again
    assert [r.step for r in found] == [480]


def test_c100_a_larger_global_batch_counts_from_where_it_begins() -> None:
    """A loss of the tokens alone: what is left to the last step is that of the tokens that the larger batches bring."""

    def tokens(step: int) -> int:
        return 1_000 * step + 1_000 * max(0, step - 110)

    def loss(step: int) -> float:
        return 2.0 + 7.7 * (tokens(step) / 1_000) ** -0.5

    log = []
    for r in records(loss):
        rows = (
            {"tokens": tokens(r.step), "batch": 4 if r.step <= 110 else 8, "seq_length": 32} if isinstance(r, rec.Step) else {}
        )
        log.append(rec.Step(step=r.step, loss=2.0, **rows) if rows else r)
    (change,) = told(EarlyStop(replace(ACT, gain=100.0)), log)
    left = loss(change.step) - loss(TOTAL)
    assert change.evidence["gain"] == pytest.approx(left, rel=1e-3) and change.evidence["statistic"] >= left
    assert (change.step, change.evidence["window"]) == (320, 21), "12 over a factor of 4 in tokens, behind step 111"
    cut = [r for r in log if not isinstance(r, rec.Step) or r.step % 7 == 0]
    (rarely,) = told(EarlyStop(replace(ACT, gain=100.0)), cut)
    assert rarely.evidence["gain"] == pytest.approx(loss(rarely.step) - loss(TOTAL), rel=1e-3)


def test_c100_rows_that_a_curriculum_halves_are_no_other_global_batch() -> None:
    short = [
        rec.Step(step=r.step, loss=2.0, tokens=r.tokens, batch=8 if r.step < 60 else 4, seq_length=16 if r.step < 60 else 32)
        if isinstance(r, rec.Step)
        else r
        for r in records(steep)
    ]
    assert told(EarlyStop(ACT), short) == told(EarlyStop(ACT), records(steep)) != []


def times(log: list[Any], factor: float) -> list[Any]:
    """The log with all figures of its evidence multiplied."""

    def changed(record: Any) -> Any:
        evidence = {k: v * factor if isinstance(v, float) else v for k, v in record.evidence.items()}
        return structs.replace(record, evidence=evidence)

    return [changed(r) if of_controller(r) else r for r in log]


@pytest.mark.parametrize(("factor", "agrees"), [(1 + 1e-13, True), (1 + 1e-8, True), (1.001, False)])
def test_c100_another_processor_agrees_and_another_figure_does_not(factor: float, agrees: bool) -> None:
    """One in the ninth digit is what two figures can be rounded apart that differ in the last bit."""
    log = written(records(steep))
    assert replay(times(log, factor), configured()).agrees == agrees
    lost = times(log, 1.0)
    (change,) = (r for r in lost if of_controller(r))
    del change.evidence["low"]
    assert not replay(lost, configured()).agrees


def test_c100_the_last_bits_of_a_fit_are_not_told() -> None:
    (change,) = told(EarlyStop(ACT), records(steep))
    figures = [change.evidence[name] for name in ("statistic", "gain", "low")]
    assert figures == [float(f"{value:.9g}") for value in figures]
    nudged = records(lambda step: steep(step) * (1 + 1e-15))
    assert told(EarlyStop(ACT), nudged) == [change]
