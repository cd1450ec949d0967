"""The controller of expert balance in the real trainer (C100): in force, in the checkpoint, and in the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.balance import CAPACITY, OUTCOME, WEIGHT
from lumina_engine.monitoring.decisions import backs_after, of_controller, replay
from lumina_engine.run.rank import Command
from tests.faults.test_ft_guard import rewinds
from tests.faults.tiny import Tiny
from tests.training.test_adaptive import lifted

KEYS: dict[str, Any] = {
    "adaptive": "act",
    "adaptive_cooldown_steps": 10,
    "expert_log_interval": 2,
    "moe_top_k": 1,
    "router_bias_rate": 0.0,
    "load_balancing_weight": 0.005,
    "moe_dropless": False,
    "capacity_factor": 1.5,
    "max_steps": 40,
    "spike_policy": "alert",
}
FIRST = 13  # step from which the first decision is in force


def skewed(folder: Path, name: str = "run", **keys: Any) -> Tiny:
    """All tokens go to the first expert of each layer."""
    tiny = Tiny(folder, name, **KEYS | keys)
    for layer in tiny.trainer.model.expert_layers:
        layer.router.bias[1:] = -1e9
    return tiny


def decisions(tiny: Tiny) -> list[Any]:
    return [r for r in tiny.records if of_controller(r)]


def agrees(tiny: Tiny) -> bool:
    return replay([rec.decode(rec.encode(r)) for r in tiny.records], tiny.config).agrees


def test_c100_the_weight_is_doubled_and_in_force(tmp_path: Path) -> None:
    act = skewed(tmp_path, "act")
    act.train()
    advise = skewed(tmp_path, "advise", adaptive="advise")
    advise.train()
    (alert,) = decisions(advise)
    setting = f"--run {advise.config.experiment_name} --resume {WEIGHT}=0.01"
    assert (alert.code, alert.step) == ("rebalance", FIRST - 1) and alert.recommendation.endswith(setting) and agrees(advise)
    assert advise.trainer.adaptive.load_balancing_weight == 0.005
    change, outcome = decisions(act)
    assert (change.what, change.step, change.before, change.after) == (WEIGHT, FIRST, 0.005, 0.01)
    assert outcome.what == OUTCOME and not outcome.evidence["recovered"]
    assert act.trainer.adaptive.load_balancing_weight == 0.01 and act.trainer.config.load_balancing_weight == 0.005
    same = [step for step in range(1, 41) if act.losses[step] == advise.losses[step]]
    assert same == list(range(1, FIRST)) and agrees(act)


def test_c100_the_room_of_experts_is_doubled_and_fewer_tokens_drop(tmp_path: Path) -> None:
    """Three of four experts serve all, two for each token, so none is hot; their room is not enough until it is doubled."""
    tiny = Tiny(tmp_path, **KEYS | {"capacity_factor": 1.0, "moe_top_k": 2, "max_steps": 24})
    for layer in tiny.trainer.model.expert_layers:
        layer.router.bias[3] = -1e9
    tiny.train()
    change, outcome = decisions(tiny)
    assert (change.what, change.before, change.after) == (CAPACITY, 1.0, 2.0)
    assert {layer.capacity_factor for layer in tiny.trainer.model.expert_layers} == {2.0}
    dropped = {r.step: max(r.dropped) for r in tiny.records if isinstance(r, rec.Experts)}
    assert min(n for step, n in dropped.items() if step < change.step) > 0.05
    assert max(n for step, n in dropped.items() if step > change.step) == 0 and outcome.evidence["recovered"] and agrees(tiny)


@pytest.mark.parametrize("at", [pytest.param(8, marks=pytest.mark.slow), 12, pytest.param(16, marks=pytest.mark.slow), 24])
def test_c100_resumed_anywhere_it_equals_the_unbroken_run(tmp_path: Path, at: int) -> None:
    whole = skewed(tmp_path, save_interval=4)
    whole.train()
    resumed = Tiny(tmp_path, **KEYS | {"save_interval": 4})
    resumed.resume(at)
    resumed.train()
    assert resumed.state() == whole.state() and resumed.trainer.adaptive.state_dict() == whole.trainer.adaptive.state_dict()
    assert resumed.losses == {step: values for step, values in whole.losses.items() if step > at}
    log = [r for r in whole.records if not (isinstance(r, rec.Run) and r.state == "finished")]
    log += [rec.Rewind(to_step=at), *resumed.records]
    assert replay([rec.decode(rec.encode(r)) for r in log], resumed.config).differences == []


def test_c100_a_checkpoint_that_is_asked_for_at_the_last_step_has_its_decision(tmp_path: Path) -> None:
    tiny = skewed(tmp_path, max_steps=FIRST - 1)
    tiny.channel.commands[FIRST - 1] = [Command(id="c", cmd="checkpoint", args={})]
    tiny.train()
    resumed = Tiny(tmp_path, **KEYS)
    resumed.resume(FIRST - 1)
    assert resumed.trainer.adaptive.load_balancing_weight == 0.01 and float(resumed.trainer.window.tokens) == 0


def test_c100_a_checkpoint_that_was_asked_for_has_the_decision_of_its_step(tmp_path: Path) -> None:
    tiny = skewed(tmp_path)
    tiny.channel.commands[FIRST - 1] = [Command(id="c", cmd="checkpoint", args={})]
    tiny.train()
    resumed = Tiny(tmp_path, **KEYS)
    resumed.resume(FIRST - 1)
    assert resumed.trainer.adaptive.load_balancing_weight == 0.01
    resumed.train()
    assert resumed.state() == tiny.state()


BACK: dict[str, Any] = {
    "adaptive_cooldown_steps": 20,
    "save_interval": 20,
    "max_steps": 60,
    "spike_policy": "rollback",
    "spike_sigma": 20.0,
}
DOUBLED, BAD = 23, 45  # steps: from which the weight is doubled; of the batch for which the guard goes back


def gone_back(folder: Path, **keys: Any) -> Tiny:
    """A run that goes back, once, to before the step in which something was done about balance."""
    tiny = skewed(folder, **BACK | keys)
    lifted(tiny, lambda step: 50.0 if step == BAD and not rewinds(tiny) else 1.0).train()
    assert rewinds(tiny) == [(20, BAD)]
    return tiny


@pytest.mark.parametrize("mode", ["act", pytest.param("advise", marks=pytest.mark.slow)])
def test_c100_what_a_rollback_leaves_behind_counts_in_the_budget(tmp_path: Path, mode: str) -> None:
    for most in (1, 2):
        tiny = gone_back(tmp_path / str(most), adaptive=mode, max_adaptive_actions=most)
        done = [r.step for r in decisions(tiny) if getattr(r, "what", WEIGHT) == WEIGHT]
        assert done == [DOUBLED if mode == "act" else DOUBLED - 1] * most
        assert tiny.trainer.adaptive.load_balancing_weight == (0.01 if (mode, most) == ("act", 2) else 0.005)
        again = replay([rec.decode(rec.encode(r)) for r in tiny.records], tiny.config)
        assert again.agrees and again.spent == most


def test_c100_what_a_rollback_left_behind_counts_after_a_kill_too(tmp_path: Path) -> None:
    """Before the next checkpoint: only the log knows of the rollback."""
    keys = BACK | {"max_adaptive_actions": 1}
    tiny = gone_back(tmp_path, **keys)
    back = next(place for place, r in enumerate(tiny.records) if isinstance(r, rec.Rewind))
    log = [rec.decode(rec.encode(r)) for r in tiny.records[: back + 8]]
    for place, record in enumerate(log, 1):
        record.seq = place
    saved = next(r.seq for r in log if isinstance(r, rec.Experts) and r.step == 20)
    resumed = Tiny(tmp_path, **KEYS | keys)
    resumed.resume(20)
    resumed.trainer.adaptive.catch_up(backs_after(log, saved), 20)
    resumed.train()
    assert decisions(resumed) == [] and resumed.trainer.adaptive.load_balancing_weight == 0.005
    whole = [*log, rec.Rewind(to_step=20), *(rec.decode(rec.encode(r)) for r in resumed.records)]
    assert replay(whole, resumed.config).differences == []
