"""The rate controller in the real trainer (C98, C100): what it decides is in force, saved, undone by nobody, and in the log."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.adaptive import FACTOR, OUTCOME
from lumina_engine.monitoring.decisions import of_controller, replay
from lumina_engine.run.rank import Command
from tests.faults.test_ft_guard import rewinds, skipped, times
from tests.faults.tiny import Tiny

MANY = 400  # documents: no row comes twice
KEYS: dict[str, Any] = {
    "adaptive": "act",
    "adaptive_cooldown_steps": 20,
    "spike_policy": "alert",
    "expert_log_interval": 500,
    "gradient_accumulation_steps": 1,
    "batch_size": 4,
    "lr_schedule": "constant",
    "learning_rate": 1e-5,  # so that only the injection moves the loss
    "max_steps": 110,
}
FAULT = 60  # step in which it begins


def lifted(tiny: Tiny, factor: Callable[[int], float]) -> Tiny:
    """The loss of a step is so many times what it is, and its gradient too, of which clipping makes nothing."""
    forward = tiny.trainer.engine.forward

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        return times(factor(tiny.trainer.progress.step + 1))(forward(*args, **kwargs))

    tiny.trainer.engine.forward = disturbed  # type: ignore[method-assign]
    return tiny


def jump(step: int) -> float:
    return 3.0 if step >= FAULT else 1.0


def slope(step: int) -> float:
    """No step of it is a spike."""
    return 1.0 + 0.006 * max(0, step - FAULT)


def run(folder: Path, name: str = "run", how: Callable[[int], float] = jump, **keys: Any) -> Tiny:
    tiny = lifted(Tiny(folder, name, documents=MANY, **KEYS | keys), how)
    tiny.summary = tiny.train()  # type: ignore[attr-defined]
    return tiny


def decisions(tiny: Tiny) -> list[Any]:
    return [r for r in tiny.records if of_controller(r)]


def factors(tiny: Tiny) -> list[tuple[int, float]]:
    return [(r.step, r.after) for r in decisions(tiny) if getattr(r, "what", "") == FACTOR]


def rates(tiny: Tiny) -> dict[int, float]:
    return {r.step: r.lr for r in tiny.records if isinstance(r, rec.Step)}


def agrees(tiny: Tiny) -> bool:
    return replay([rec.decode(rec.encode(r)) for r in tiny.records], tiny.config).agrees


def test_c100_off_advise_and_act(tmp_path: Path) -> None:
    found = {mode: run(tmp_path, mode, adaptive=mode, max_steps=90) for mode in ("off", "advise", "act")}
    assert decisions(found["off"]) == [] and [r.code for r in decisions(found["advise"])] == ["lower_rate"]
    assert [r.what for r in decisions(found["act"])][:1] == [FACTOR]
    (step, factor), *_ = factors(found["act"])
    base, halved = rates(found["off"]), rates(found["act"])
    assert rates(found["advise"]) == base and FAULT < step <= FAULT + 32 and factor == 0.5
    assert all(halved[n] == base[n] * (0.5 if n >= step else 1.0) for n in range(1, 91))
    assert (
        f"runs set-lr {found['advise'].config.experiment_name} {base[step] / 2:.3g}"
        in decisions(found["advise"])[0].recommendation
    )
    assert all(agrees(tiny) for tiny in found.values())


def test_c098_bounds_and_pace_are_those_of_the_keys(tmp_path: Path) -> None:
    plain = run(tmp_path, "plain")
    lowest = run(tmp_path, "lowest", lr_multiplier_min=0.7, max_steps=90)
    slow = run(tmp_path, "slow", adaptive_cooldown_steps=40)
    none = run(tmp_path, "none", max_adaptive_actions=0)
    one = run(tmp_path, "one", max_adaptive_actions=1)
    assert [factor for _, factor in factors(plain)] == [0.5, 0.25] and factors(lowest)[0][1] == 0.7
    assert factors(slow)[0] == factors(plain)[0] and factors(slow)[1:] == []
    assert factors(none) == [] and [r.code for r in decisions(none)] == ["adaptive_spent"]
    assert factors(one) == factors(plain)[:1] and [r.code for r in decisions(one) if isinstance(r, rec.Alert)] == [
        "adaptive_spent"
    ]


def test_c098_one_bad_batch_is_left_out_and_nothing_is_cut(tmp_path: Path) -> None:
    tiny = run(tmp_path, how=lambda step: 100.0 if step == FAULT else 1.0, spike_policy="skip", spike_sigma=8.0)
    assert skipped(tiny) == [FAULT] and decisions(tiny) == []


def test_c098_the_outcome_says_whether_the_loss_is_back(tmp_path: Path) -> None:
    tiny = run(tmp_path, how=lambda step: 3.0 if FAULT <= step < FAULT + 24 else 1.0)
    (step, _), *_ = factors(tiny)
    (outcome,) = (r for r in decisions(tiny) if getattr(r, "what", "") == OUTCOME)
    assert outcome.step == step - 1 + 20 and outcome.evidence["recovered"] and outcome.after < outcome.before and agrees(tiny)


def test_c098_the_third_time_the_run_ends_with_93(tmp_path: Path) -> None:
    tiny = run(tmp_path, max_steps=200)
    assert (tiny.summary["state"], tiny.summary["exit_code"]) == ("failed", 93)  # type: ignore[attr-defined]
    assert [factor for _, factor in factors(tiny)] == [0.5, 0.25] and agrees(tiny)
    alert = decisions(tiny)[-1]
    assert (alert.code, alert.severity) == ("rate_ladder_end", "critical") and alert.step == tiny.trainer.progress.step


def test_c098_the_second_rung_goes_back_and_the_cut_stays(tmp_path: Path) -> None:
    tiny = run(tmp_path, how=slope, spike_policy="rollback", spike_sigma=20.0, save_interval=10, max_steps=140)
    (first, _), (second, factor), *_ = factors(tiny)
    (to_step, failed), *_ = rewinds(tiny)
    assert (failed, factor) == (second - 1, 0.25) and to_step < FAULT + 16 < first
    back = next(place for place, r in enumerate(tiny.records) if isinstance(r, rec.Rewind))
    rate = next(r.lr for r in tiny.records[back:] if isinstance(r, rec.Step))
    assert rate == rates(tiny)[1] / tiny.trainer.schedule.shape(1) * 0.25 and agrees(tiny)  # type: ignore[union-attr]


def test_ft05_the_rollback_and_the_last_save_are_sections_of_their_own(tmp_path: Path) -> None:
    """The watchdog would judge them by an optimizer step and by copies to memory."""
    keys = KEYS | {"spike_policy": "rollback", "spike_sigma": 20.0, "save_interval": 10, "max_steps": 120, "async_save": True}
    tiny = lifted(Tiny(tmp_path, documents=MANY, **keys), lambda step: 50.0 if step == 45 and not rewinds(tiny) else 1.0)
    sections: list[tuple[int, str]] = []
    tiny.channel.at = lambda step, section: sections.append((step, section))
    tiny.train()
    assert rewinds(tiny) and [step for step, section in sections if section == "rollback"] == [45]
    assert [step for step, section in sections if section == "waited save"][-1] == 120 and (10, "save") in sections


@pytest.mark.parametrize("cmd", ["stop", *(pytest.param(cmd, marks=pytest.mark.slow) for cmd in ("preempt", "checkpoint"))])
def test_c098_a_command_that_meets_a_rollback_waits_for_it(tmp_path: Path, cmd: str) -> None:
    """None saves the step that the run goes back from: a start from there would never go back."""
    keys = KEYS | {"spike_policy": "rollback", "spike_sigma": 20.0, "save_interval": 10, "max_steps": 140}
    plain = lifted(Tiny(tmp_path, "plain", documents=MANY, **keys), slope)
    code = plain.train()["exit_code"]
    to_step, failed = rewinds(plain)[0]
    tiny = lifted(Tiny(tmp_path, "asked", documents=MANY, **keys), slope)
    tiny.channel.commands[failed] = [Command(id="c", cmd=cmd, args={})]
    summary = tiny.train()
    assert rewinds(tiny)[0] == (to_step, failed) and summary["exit_code"] == {"preempt": 75, "stop": 0, "checkpoint": code}[cmd]
    back = next(place for place, r in enumerate(tiny.records) if isinstance(r, rec.Rewind))
    saved = [r.step for r in tiny.records[back:] if isinstance(r, rec.Checkpoint)]
    assert failed not in saved and all(step >= to_step for step in saved)
    assert cmd == "checkpoint" or summary["step"] == to_step


@pytest.mark.parametrize("cmd", ["preempt", pytest.param("stop", marks=pytest.mark.slow)])
def test_c098_the_end_of_the_ladder_comes_before_a_command(tmp_path: Path, cmd: str) -> None:
    plain = run(tmp_path, "plain", max_steps=200)
    tiny = lifted(Tiny(tmp_path, "asked", documents=MANY, **KEYS | {"max_steps": 200}), jump)
    tiny.channel.commands[plain.trainer.progress.step] = [Command(id="c", cmd=cmd, args={})]
    summary = tiny.train()
    assert summary["exit_code"] == 93 and summary["step"] == plain.trainer.progress.step
    assert summary["step"] not in dict(tiny.manager.committed())


def test_c082_a_checkpoint_that_is_asked_for_where_there_is_one_is_that_one(tmp_path: Path) -> None:
    """The step to which a run has gone back is one of these, and this start did not save it."""
    first = Tiny(tmp_path, save_interval=4, max_steps=8)
    first.train()
    tiny = Tiny(tmp_path, save_interval=4, max_steps=8)
    tiny.resume(4)
    tiny.channel.commands[0] = [Command(id="c", cmd="checkpoint", args={})]
    tiny.train()
    saved = [(r.step, r.id, r.failed) for r in tiny.records if isinstance(r, rec.Checkpoint)]
    assert saved[0] == (4, "c", None) and not [r for r in tiny.records if isinstance(r, rec.Alert)]


def test_c098_the_cut_outlives_a_guard_that_goes_back_to_the_same_checkpoint(tmp_path: Path) -> None:
    keys = KEYS | {
        "spike_policy": "rollback",
        "spike_sigma": 20.0,
        "save_interval": 10,
        "max_nonfinite_in_row": 2,
        "max_steps": 140,
    }
    tiny = Tiny(tmp_path, documents=MANY, **keys)

    def how(step: int) -> float:
        back = rewinds(tiny)
        return slope(step) if not back else math.nan if len(back) == 1 and step > back[0][0] + 12 else 1.0

    lifted(tiny, how).train()
    (to_step, _), (again, _) = rewinds(tiny)
    assert again == to_step
    begun = [place for place, r in enumerate(tiny.records) if isinstance(r, rec.Rewind)][-1]
    rate = next(r.lr for r in tiny.records[begun:] if isinstance(r, rec.Step))
    assert rate == rates(tiny)[1] / tiny.trainer.schedule.shape(1) * 0.25 and agrees(tiny)  # type: ignore[union-attr]


@pytest.mark.parametrize("at", [pytest.param(70, marks=pytest.mark.slow), 90])
def test_c098_resumed_in_mid_ladder_it_equals_the_unbroken_run(tmp_path: Path, at: int) -> None:
    whole = run(tmp_path, "whole", save_interval=10)
    assert factors(whole)[0][0] <= 90 < factors(whole)[1][0] and factors(whole)[0][0] > 70
    resumed = lifted(Tiny(tmp_path, "whole", documents=MANY, **KEYS | {"save_interval": 10}), jump)
    resumed.resume(at)
    resumed.train()
    assert resumed.state() == whole.state() and resumed.trainer.adaptive.state_dict() == whole.trainer.adaptive.state_dict()
    assert resumed.losses == {step: values for step, values in whole.losses.items() if step > at}
    later = [(r.step, getattr(r, "after", None)) for r in decisions(whole) if (r.step or 0) > at + 1]
    assert [(r.step, getattr(r, "after", None)) for r in decisions(resumed)] == later
    log = [r for r in whole.records if not (isinstance(r, rec.Run) and r.state == "finished")]
    log += [rec.Rewind(to_step=at), *resumed.records]
    assert replay([rec.decode(rec.encode(r)) for r in log], resumed.config).differences == []


def test_c098_the_rate_of_a_user_is_the_rate_and_stays_under_later_cuts(tmp_path: Path) -> None:
    tiny = lifted(Tiny(tmp_path, documents=MANY, **KEYS), jump)
    tiny.channel.commands[85] = [Command(id="c", cmd="set_lr", args={"lr": 4e-5})]
    tiny.train()
    found, set_at = factors(tiny), 86
    assert found[0][0] < set_at < found[1][0] and rates(tiny)[set_at] == pytest.approx(4e-5)
    assert found[1][1] == 0.5 and rates(tiny)[found[1][0]] == pytest.approx(2e-5) and agrees(tiny)
