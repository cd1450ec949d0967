"""C59, R19, R22: a DeepSpeed dictionary becomes a Config and back; what does nothing is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from lumina_engine.config.checks import check
from lumina_engine.config.deepspeed_rules import NO_EFFECT, ONLY, STAGE_3_ONLY
from lumina_engine.config.schema import Config, ConfigError

FULL: dict[str, Any] = {
    "train_batch_size": 128,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 0.5,
    "fp16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "overlap_comm": False,
        "reduce_bucket_size": 5e7,
        "stage3_max_live_parameters": 1e9,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.1}},
    "wall_clock_breakdown": True,
}


def test_c059_a_dictionary_becomes_fields_and_checked_overrides() -> None:
    config = Config.from_deepspeed(FULL, world=4)
    assert (config.batch_size, config.gradient_accumulation_steps, config.max_grad_norm) == (4, 8, 0.5)
    assert (config.precision, config.zero_stage, config.overlap_comm, config.reduce_bucket_size) == (
        "fp16",
        3,
        False,
        50_000_000,
    )
    assert config.cpu_offload_optimizer and config.cpu_offload_parameters
    assert (config.learning_rate, config.adam_beta1, config.adam_beta2) == (2e-4, 0.8, 0.9)
    assert (config.adam_eps, config.weight_decay) == (1e-7, 0.1)
    rest = {"zero_optimization": {"stage3_max_live_parameters": 1e9}, "wall_clock_breakdown": True}
    assert config.deepspeed_overrides == rest
    again = config.to_deepspeed(4)
    assert again["train_batch_size"] == 128 and again["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert again["wall_clock_breakdown"] is True


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "mixed_bf16", "mixed_fp16"])
def test_c059_what_lumina_writes_is_read_back(stage: int, precision: str) -> None:
    keys: dict[str, Any] = {"zero_stage": stage, "precision": precision, "batch_size": 3, "gradient_accumulation_steps": 2}
    if stage:
        keys |= {"cpu_offload_optimizer": True}
    config = Config(**keys)
    written = config.to_deepspeed(2)
    read = Config.from_deepspeed(written, world=2)
    assert read.to_deepspeed(2) == written
    assert read.precision == precision and read.deepspeed_overrides == {}


def test_r22_the_batch_triangle_must_agree() -> None:
    parts = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    assert Config.from_deepspeed(parts, world=2).batch_size == 4
    assert (
        Config.from_deepspeed({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, 2).gradient_accumulation_steps == 3
    )
    for world in (1, 5):
        with pytest.raises(ConfigError, match="train_batch_size = 24"):
            Config.from_deepspeed(parts, world=world)


def adamw(betas: Any) -> dict[str, Any]:
    return {"type": "AdamW", "params": {"betas": betas}}


@pytest.mark.parametrize(
    ("given", "precision"),
    [
        ({"bf16": {"enabled": 1}}, "bf16"),
        ({"bf16": {"enabled": 0}}, "fp32"),
        ({"bf16": {"enabled": "auto"}}, "auto"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "auto"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_c059_a_precision_that_is_left_open_stays_open(given: dict[str, Any], precision: str) -> None:
    config = Config.from_deepspeed(given | {"optimizer": adamw("auto")})
    assert config.precision == precision and config.deepspeed_overrides == {}
    assert (config.adam_beta1, config.adam_beta2) == (Config().adam_beta1, Config().adam_beta2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimisation": {"stage": 3}}, "did you mean zero_optimization"),
        ({"gradient_cliping": 1.0}, "did you mean gradient_clipping"),
        ({"zero_optimization": {"stge": 3}}, "did you mean zero_optimization.stage"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "did you mean zero_optimization.offload_param.device"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        ({"optimizer": {"type": "Lamb", "params": {}}}, "optimizer is refused"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "optimizer is refused"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is refused"),
        ({"zero_optimization": {"stage": 7}}, "zero_stage = 7"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled = 'true': must be true, false or auto"),
        ({"fp16": {"enabled": 2}}, "fp16.enabled = 2: must be true, false or auto"),
        ({"optimizer": adamw([0.9])}, "optimizer.params.betas = [0.9]: must be a list of two numbers"),
        ({"optimizer": adamw(0.9)}, "optimizer.params.betas = 0.9: must be a list of two numbers"),
        ({"optimizer": adamw(["a", 0.9])}, "adam_beta1 = a: must be"),
        ({"train_batch_size": 8.0}, "train_batch_size = 8.0: must be a whole number"),
        ({"gradient_accumulation_steps": 2.0}, "gradient_accumulation_steps = 2.0: must be a whole number"),
        (
            {"torch_autocast": {"enabled": "auto", "dtype": "bfloat16"}},
            "torch_autocast.dtype = 'bfloat16': whether autocast is enabled is left open",
        ),
        ({"train_batch_size": True}, "train_batch_size = true: must be a whole number"),
        (
            {"train_batch_size": 8, "train_micro_batch_size_per_gpu": "4"},
            "train_micro_batch_size_per_gpu = '4': must be a whole",
        ),
        ({"train_batch_size": 8, "gradient_accumulation_steps": [2]}, "gradient_accumulation_steps = [2]: must be a whole"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps = true: must be a whole number"),
    ],
)
def test_c059_what_is_wrong_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_deepspeed(given)
    assert said in str(caught.value)


def nested(path: str, value: object) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("path", NO_EFFECT)
def test_r19_what_does_nothing_here_is_refused_with_the_reason(path: str) -> None:
    found = [f for f in check(Config(deepspeed_overrides=nested(path, 1))) if f.code == "deepspeed_useless"]
    assert len(found) == 1 and found[0].severity == "error" and path in found[0].message and found[0].fix


@pytest.mark.parametrize("name", STAGE_3_ONLY)
def test_r19_settings_of_stage_3_below_it_are_refused(name: str) -> None:
    overrides = nested(f"zero_optimization.{name}", 1)
    for stage, count in ((2, 1), (3, 0), ("auto", 0)):
        found = [f for f in check(Config(zero_stage=stage, deepspeed_overrides=overrides)) if f.code == "deepspeed_useless"]
        assert len(found) == count
    disk = Config(zero_stage=3, nvme_offload_optimizer=True, deepspeed_overrides=overrides)
    assert any("corrupts" in f.message for f in check(disk)) == (name == "sub_group_size")


@pytest.mark.parametrize("path", ONLY)
def test_r19_settings_with_one_sound_value_are_refused_with_another(path: str) -> None:
    """A sum instead of a mean would multiply every gradient by the ranks; DeepSpeed's own CPU optimizer is asserted on."""
    other = {"gradient_allreduce_op": "sum", "zero_force_ds_cpu_optimizer": True}[path]
    found = [f for f in check(Config(deepspeed_overrides=nested(path, other))) if f.severity == "error"]
    assert [f.code for f in found] == ["deepspeed_useless"] and path in found[0].message and found[0].fix
    assert not [f for f in check(Config(deepspeed_overrides=nested(path, ONLY[path][0]))) if f.severity == "error"]


def test_r19_aio_is_read_by_offload_to_disk_only() -> None:
    overrides = {"aio": {"queue_depth": 16}}
    assert [f.code for f in check(Config(deepspeed_overrides=overrides)) if f.severity == "error"] == ["deepspeed_useless"]
    disk = Config(deepspeed_overrides=overrides, zero_stage=3, nvme_offload_optimizer=True)
    assert not [f for f in check(disk) if f.severity == "error"]


@pytest.mark.parametrize(
    ("block", "key"), [("offload_optimizer", "cpu_offload_optimizer"), ("offload_param", "cpu_offload_parameters")]
)
def test_r19_how_to_offload_is_read_where_something_is_offloaded(block: str, key: str) -> None:
    overrides = {"zero_optimization": {block: {"pin_memory": True, "buffer_count": 4}}}
    found = [f.line() for f in check(Config(zero_stage=3, deepspeed_overrides=overrides)) if f.severity == "error"]
    assert len(found) == 1 and f"set {key}=true, or remove it" in found[0]
    for sound in ({key: True}, {"cpu_offload": True}, {"nvme_offload_optimizer": True, "nvme_offload_parameters": True}):
        config = Config(zero_stage=3, precision="bf16", deepspeed_overrides=overrides, **sound)
        assert not [f for f in check(config) if f.code == "deepspeed_useless"]
    given = {"zero_optimization": {"stage": 3, block: {"device": "cpu", "pin_memory": True}}}
    assert getattr(Config.from_deepspeed(given), key)
