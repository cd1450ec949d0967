"""Rules, stage, layout and memory of experts that are spread over ranks (C20, C21, C139, R20)."""

from __future__ import annotations

import pytest

from lumina_engine.config.advice import devices_needed
from lumina_engine.config.budget import budget
from lumina_engine.config.checks import check, resume_findings
from lumina_engine.config.counts import parameter_counts
from lumina_engine.config.deepspeed import to_deepspeed
from lumina_engine.config.expert_checks import PROVED
from lumina_engine.config.machine import GB, Accelerator, Machine
from lumina_engine.config.memory import Layout, training_memory
from lumina_engine.config.presets import ConfigPresets
from lumina_engine.config.resolve import choose_stage, model_config, resolve
from lumina_engine.config.schema import Config, ConfigError, infos_of

LAPTOP = Machine([], 16 * GB, 4, 100 * GB)
CASES = [
    ({"num_experts": 8, "expert_parallel_size": 3}, "expert_parallel", "set expert_parallel_size=2"),
    ({"num_gpus": 6, "expert_parallel_size": 4}, "expert_ranks", "set num_gpus=4 or expert_parallel_size=2"),
    ({"num_gpus": 1, "expert_parallel_size": 2}, "expert_ranks", "set num_gpus=2 or expert_parallel_size=1"),
    ({"use_moe": False, "expert_parallel_size": 2}, "expert_parallel", "set expert_parallel_size=1"),
    ({"zero_stage": 3, "expert_parallel_size": 2}, "expert_stage", "set zero_stage=2"),
    ({"contiguous_gradients": False, "expert_parallel_size": 2}, "expert_gradients", "set contiguous_gradients=true"),
    ({"overlap_alltoall": True}, "overlap", "set overlap_alltoall=false"),
    (
        {"deepspeed_overrides": {"zero_optimization": {"reduce_scatter": False}}, "expert_parallel_size": 2},
        "deepspeed_experts",
        "remove it, or set expert_parallel_size=1",
    ),
]


@pytest.mark.parametrize(("changes", "code", "fix"), CASES, ids=[case[1] for case in CASES])
def test_c020_what_cannot_work_is_an_error_with_its_fix(changes: dict, code: str, fix: str) -> None:
    found = [f for f in check(Config(**changes)) if f.code == code]
    assert [(f.severity, f.fix) for f in found] == [("error", fix)]


def test_c020_what_works_has_no_finding() -> None:
    for more in ({}, {"zero_stage": 2, "gradient_checkpointing": True}, {"use_deepspeed": False}, {"overlap_alltoall": True}):
        found = check(Config(num_gpus=2, expert_parallel_size=2, **more))
        assert not [f for f in found if f.severity == "error"], found


@pytest.mark.parametrize("key", PROVED)
def test_c020_features_not_proved_with_it_are_refused(key: str) -> None:
    info = infos_of(Config)[key]
    other = next(v for v in (info.choices or (True, False)) if v not in PROVED[key])
    found = [f for f in check(Config(expert_parallel_size=2, **{key: other})) if f.code == "expert_unproved"]
    assert [f.keys for f in found] == [("expert_parallel_size", key)]
    assert not [f for f in check(Config(**{key: other})) if f.code == "expert_unproved"]


def test_c020_ranks_of_the_machine_are_checked_at_launch() -> None:
    config = ConfigPresets.debug()
    config.expert_parallel_size = 2
    assert [f.code for f in check(config, LAPTOP)] == ["expert_ranks"]
    with pytest.raises(ConfigError, match="does not divide the number of ranks, 3"):
        resolve(config, LAPTOP, tokenizer_vocab=1024, world=3)
    assert resolve(config, LAPTOP, tokenizer_vocab=1024, world=4).expert_parallel_size == 2


def test_r20_auto_stage_stays_at_2() -> None:
    config = ConfigPresets.b1()
    config.expert_parallel_size = 2
    machine = Machine([Accelerator("GPU", 48 * GB, True)] * 2, 4000 * GB, 64, None)
    choice = choose_stage(config, machine, model_config(config))
    assert (choice.stage, choice.fits) == (2, False)
    needed = devices_needed(config, machine, model_config(config), 2)
    assert needed % 2 == 0 and needed > 2


def test_c081_a_resumed_run_may_spread_its_experts_anew() -> None:
    old, new = ConfigPresets.debug(), ConfigPresets.debug()
    old.expert_parallel_size = 2
    assert resume_findings(old, new, 2, 2) == []


def test_c139_a_device_holds_its_share_of_the_experts() -> None:
    config = ConfigPresets.debug()
    config.expert_parallel_size = 2
    shape = model_config(config)
    counts = parameter_counts(shape)
    here = counts.stored - counts.experts // 2

    def memory(world: int, stage: int, precision: str = "fp32"):
        return training_memory(shape, Layout(4, 256, precision, world=world, zero_stage=stage))

    for world in (2, 4):
        zero0 = memory(world, 0)
        assert (zero0.weights, zero0.gradients, zero0.optimizer) == (4 * here, 4 * here, 8 * here)
        assert zero0.experts == 2 * counts.experts
        zero2 = memory(world, 2, "bf16")
        # optimizer and gradients are split over all ranks in the end: experts over peers and over replicas
        assert zero2.weights == 2 * here
        assert (zero2.gradients, zero2.optimizer) == (2 * (counts.stored // world), 12 * (counts.stored // world))
    whole = training_memory(shape.model_copy(update={"expert_parallel_size": 1}), Layout(4, 256, "fp32", world=2))
    sent = 2 * 4 * 256 * shape.moe_top_k * shape.hidden_size * 4
    assert memory(2, 0).working - whole.working == sent
    # one rank has nothing to spread
    assert memory(1, 0).weights == 4 * counts.stored
    two_ranks = budget(Config(**(config.to_dict(sectioned=False) | {"num_gpus": 2})), LAPTOP)
    assert two_ranks["device"]["weights"] == 4 * here and two_ranks["fits"]


def test_c020_lumina_clips_where_deepspeed_would_take_a_wrong_norm() -> None:
    for stage, clipping in ((0, 0.0), (1, 1.0), (2, 1.0)):
        config = Config(expert_parallel_size=2, zero_stage=stage, precision="fp32", max_grad_norm=1.0)
        assert to_deepspeed(config, 2)["gradient_clipping"] == clipping
    assert to_deepspeed(Config(zero_stage=0, precision="fp32", max_grad_norm=1.0), 2)["gradient_clipping"] == 1.0
