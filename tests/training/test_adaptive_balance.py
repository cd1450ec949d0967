"""The controller of expert balance in the real trainer (C100): in force, in the checkpoint, and in the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.balance import CAPACITY, OUTCOME, WEIGHT
from lumina_engine.monitoring.decisions import of_controller, replay
from lumina_engine.run.rank import Command
from tests.faults.tiny import Tiny

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


@pytest.mark.parametrize("at", [8, 12, 16, 24])
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
