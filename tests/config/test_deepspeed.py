"""C58, C59, R02, R19, R22: the generated JSON, what DeepSpeed makes of it, and the check of every key."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina_engine.config import trackers
from lumina_engine.config.checks import check
from lumina_engine.config.declare import show
from lumina_engine.config.deepspeed import ANY, COVERED, GUARDS, KNOWN, REFUSED, to_deepspeed
from lumina_engine.config.deepspeed_classes import module_classes, module_names
from lumina_engine.config.deepspeed_rules import NO_EFFECT, ONLY, value_at
from lumina_engine.config.deepspeed_values import VALUES
from lumina_engine.config.machine import GB, Accelerator, Machine
from lumina_engine.config.schema import Config, ConfigError

MLA = {"attention": "mla", "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}


def generate(world: int = 1, **changes) -> dict:
    return to_deepspeed(Config(**({"zero_stage": 0, "precision": "fp32"} | changes)), world)


def errors(overrides: dict, **changes) -> list[str]:
    config = Config(deepspeed_overrides=overrides, **changes)
    return [f.line() for f in check(config) if f.severity == "error"]


def test_c059_json_of_stage_0() -> None:
    assert generate(world=2, batch_size=4, gradient_accumulation_steps=3, max_grad_norm=0) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 0},
    }


def test_c058_bucket_keys_from_stage_1_on() -> None:
    zero = generate(zero_stage=2, overlap_comm=False, reduce_bucket_size=10**6)["zero_optimization"]
    assert zero == {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "allgather_bucket_size": 200_000_000,
        "reduce_bucket_size": 1_000_000,
    }


def test_c055_stage_3_keys_at_stage_3_only() -> None:
    keys = {"stage3_prefetch_bucket_size": 10, "stage3_param_persistence_threshold": 0}
    zero = generate(zero_stage=3, **keys)["zero_optimization"]
    assert zero["stage"] == 3 and keys.items() <= zero.items()
    assert not keys.keys() & generate(zero_stage=2, **keys)["zero_optimization"].keys()


def test_r25_precision_blocks() -> None:
    assert generate(zero_stage=1, precision="bf16")["bf16"] == {"enabled": True}
    mixed = generate(precision="mixed_bf16")
    assert mixed["torch_autocast"]["dtype"] == "bfloat16" and "bf16" not in mixed
    assert not {"bf16", "fp16", "torch_autocast", "optimizer"} & set(generate())


def test_c059_overrides_are_merged() -> None:
    out = generate(zero_stage=1, deepspeed_overrides={"zero_optimization": {"round_robin_gradients": True}, "dump_state": True})
    assert out["zero_optimization"]["round_robin_gradients"] and out["zero_optimization"]["stage"] == 1 and out["dump_state"]


def test_c059_unresolved_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero_stage = auto"):
        to_deepspeed(Config(), 1)


def paths(known: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, inner in known.items():
        found.append((*prefix, name))
        if isinstance(inner, dict):
            found += paths(inner, (*prefix, name))
    return found


def nested(path: tuple[str, ...], value: object) -> dict:
    for name in reversed(path):
        value = {name: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("path", [p for p in paths(KNOWN) if p[0] not in REFUSED], ids=".".join)
def test_r19_each_key_misspelt_is_refused_with_the_nearest_name(path: tuple[str, ...]) -> None:
    typo = (*path[:-1], path[-1][0] + path[-1][2:])
    found = errors(nested(typo, 1))
    assert any(f"{'.'.join(typo)}: DeepSpeed has no such key" in line and "did you mean" in line for line in found), found


def test_r19_every_setting_that_is_left_to_overrides_has_a_rule_for_its_values() -> None:
    decided = {*COVERED, *GUARDS, *NO_EFFECT, *ONLY}
    leaves = {".".join(path) for path in paths(KNOWN) if not isinstance(value_at(KNOWN, ".".join(path)), dict)}
    free = {path for path in leaves - decided if path.split(".")[0] not in REFUSED}
    assert set(VALUES) == free
    assert all(rule.holds(rule.example) for rule in VALUES.values())


@pytest.mark.parametrize("path", VALUES)
def test_r19_a_value_that_deepspeed_cannot_take_is_named_with_what_it_must_be(path: str) -> None:
    for wrong in (0, -2, "maybe", 1.5, [3], {"a": 1}, None):
        found = errors(nested(tuple(path.split(".")), wrong), zero_stage=3, nvme_offload_optimizer=True, precision="bf16")
        said = [line for line in found if f"{path} = {show(wrong)}: must be {VALUES[path].must}" in line]
        assert len(said) == (not VALUES[path].holds(wrong)), (wrong, found)
        assert all(f"set {path} to " in line for line in said)
    right = errors(nested(tuple(path.split(".")), VALUES[path].example), zero_stage=3)
    assert not any("must be" in line for line in right)


def leaf(**keys: object) -> dict:
    return {"zero_optimization": {"leaf_module": keys}}


def short(*names: str) -> dict:
    return {"torch_autocast": {"lower_precision_safe_modules": list(names)}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"steps_per_print": 0}, "steps_per_print = 0: must be a whole number, 1 or more"),
        ({"communication_data_type": "foo"}, "communication_data_type = foo: must be one of fp32, bf16, fp16"),
        ({"zero_optimization": {"round_robin_gradients": "maybe"}}, "must be true or false"),
        ({"zero_optimization": {"sub_group_size": "big"}}, "must be a whole number"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "is refused: DeepSpeed takes another optimizer"),
        ({"data_types": {"buffer_dtype": "bf16"}}, "the routers' bias must stay in fp32"),
        ({"disable_allgather": True}, "nothing in DeepSpeed reads it"),
        ({"zero_optimization": {"leaf_module": "MoE"}}, "leaf_module = MoE: must be a block of keys"),
        ({"zero_optimization": {"leaf_module": ["MoE"]}}, "leaf_module = [MoE]: must be a block of keys"),
        (leaf(**{"class": ["MoE"]}), "did you mean zero_optimization.leaf_module.classes"),
        (leaf(classes=["MoE"], typo=3), "leaf_module.typo: DeepSpeed has no such key"),
        (leaf(classes=["Moe"]), "did you mean MoE?"),
        (leaf(classes=["MoE", "LatentAttention"]), "is of a class LatentAttention"),
        (leaf(classes=["DeepSeekTransformer"]), "is of a class DeepSeekTransformer"),
        (leaf(classes=["ModuleList"]), "is of a class ModuleList"),
        (leaf(names=[""]), "leaf_module.names = '': that is the whole model"),
        (leaf(names=["blocks.99.ffn"]), "leaf_module.names = 'blocks.99.ffn': no module of the model has that name"),
        (leaf(names=["blocks.0.fnn"]), "did you mean blocks.0.ffn?"),
        (
            leaf(name_suffixes=[".mlp"]),
            "leaf_module.name_suffixes = '.mlp': no module of the model has that name or ends in it",
        ),
        (leaf(name_suffixes=[".atention"]), "did you mean .attention?"),
        (leaf(name_suffixes=["s"]), "leaf_module.name_suffixes = 's': that is the whole model"),
        ({"zero_optimization": {"stage3_module_granularity_threshold": 10_000}}, "set leaf_module.classes instead"),
        (short("Linear"), "did you mean lumina_engine.model.product.Linear?"),
        (short("torch.nn.Linear"), "did you mean lumina_engine.model.product.Linear?"),
    ],
)
def test_r19_values_that_ended_in_a_traceback(overrides: dict, words: str) -> None:
    found = errors(overrides, zero_stage=3)
    assert len(found) == 1 and words in found[0] and found[0].count("; "), found


def test_r19_names_that_are_none_of_this_shape_or_precision_are_refused() -> None:
    (found,) = errors(leaf(classes=["MoE"]), zero_stage=3, num_layers=2, num_dense_layers=2)
    assert "no module inside the model is of a class MoE" in found
    for precision in ("fp32", "bf16", "fp16"):
        (found,) = errors(short("lumina_engine.model.product.Linear"), precision=precision)
        assert f"precision = {precision} has no autocast" in found and "set precision=mixed_bf16" in found


def test_r19_values_that_deepspeed_takes_are_accepted() -> None:
    assert errors({"zero_optimization": {"sub_group_size": 1e9}}, zero_stage=3) == []
    both = leaf(classes=["MoE", "lumina_engine.model.attention.Attention"], names=["blocks.0"], name_suffixes=[".ffn"])
    assert errors(both, zero_stage=3) == []
    assert errors(short("lumina_engine.model.product.Linear"), precision="mixed_bf16") == []


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"use_moe": False},
        {"num_shared_experts": 1},
        {"num_dense_layers": 1, "qk_norm": True},
        {"num_dense_layers": 2, "tie_word_embeddings": False},
        MLA,
        MLA | {"q_lora_rank": 8},
    ],
    ids=str,
)
def test_r19_classes_that_an_override_may_name_are_those_of_the_model(shape: dict) -> None:
    torch = pytest.importorskip("torch")
    from lumina_engine.model.transformer import DeepSeekTransformer

    config = Config(vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, **shape)
    with torch.device("meta"):
        model = DeepSeekTransformer(config)
    inside = [module for module in model.modules() if not isinstance(module, DeepSeekTransformer | torch.nn.ModuleList)]
    lists = {"", "blocks"}
    assert set(module_names(config)) == {name for name, _ in model.named_modules()} - lists
    assert module_classes(config) == {f"{type(m).__module__}.{type(m).__qualname__}" for m in inside}


def test_r19_records_of_deepspeed_need_their_package_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str, **keys: object) -> list[str]:
        overrides = {name: {"enabled": True, "output_path": str(tmp_path / "new"), **keys}}
        config = Config(train_data_path="", deepspeed_overrides=overrides)
        return [f.line() for f in check(config, Machine([], 16 * GB, 4, None)) if f.code == "deepspeed_monitor"]

    monkeypatch.setitem(trackers.OF_DEEPSPEED, "tensorboard", (("no_such_package",), "tensorboard"))
    (missing,) = found("tensorboard")
    assert "tensorboard is not installed here; pip install tensorboard" in missing
    assert found("tensorboard", enabled=False) == found("csv_monitor") == []
    (tmp_path / "file").touch()
    (told,) = found("csv_monitor", output_path=str(tmp_path / "file" / "folder"))
    assert "csv_monitor.output_path" in told and "cannot be made: Not a directory" in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # trying leaves nothing behind


def test_r19_quantized_weights_need_a_gpu_and_no_autocast() -> None:
    overrides = {"zero_optimization": {"zero_quantized_weights": True}}
    gpus = Machine([Accelerator("GPU", 80 * GB)] * 2, 500 * GB, 8, None)
    for machine, precision, words in (
        (Machine([], 16 * GB, 4, None), "bf16", "on GPUs only"),
        (gpus, "mixed_bf16", "with autocast"),
        (gpus, "bf16", None),
    ):
        config = Config(zero_stage=3, precision=precision, deepspeed_overrides=overrides)
        found = [f.line() for f in check(config, machine) if f.code == "deepspeed_quantized"]
        assert len(found) == (words is not None) and all(str(words) in line for line in found)


@pytest.mark.parametrize("name", REFUSED)
def test_r19_refused_blocks_say_what_to_set(name: str) -> None:
    found = errors({name: {}})
    assert len(found) == 1 and f"{name} is refused; " in found[0]


@pytest.mark.parametrize("path", COVERED)
def test_r22_contradiction_with_a_key_is_an_error(path: str) -> None:
    wrong = {"bf16.enabled": True, "fp16.enabled": True, "torch_autocast.enabled": True, "torch_autocast.dtype": "float16"}
    value = wrong.get(path, 7)
    world = 1 if path == "train_batch_size" else None
    from lumina_engine.config.deepspeed import check_overrides

    config = Config(zero_stage=1, precision="fp32", deepspeed_overrides=nested(tuple(path.split(".")), value))
    found = [f for f in check_overrides(config, world) if f.code == "deepspeed_contradiction"]
    assert len(found) == 1 and found[0].keys == ("deepspeed_overrides", COVERED[path]) and COVERED[path] in found[0].fix


def test_r22_agreement_is_accepted() -> None:
    same = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "overlap_comm": True},
    }
    agreed = {"zero_stage": 1, "precision": "fp32", "overlap_comm": True}
    assert errors(same | {"bf16": {"enabled": False}}, **agreed) == []
    assert "contradicts overlap_comm = auto" in errors(same, **(agreed | {"overlap_comm": "auto"}))[0]
    assert "contradicts zero_stage = auto" in errors(same)[0]


def test_c054_overrides_without_deepspeed_are_refused() -> None:
    assert "use_deepspeed is false" in errors({"dump_state": True}, use_deepspeed=False)[0]
    assert "must be a block of keys" in errors({"zero_optimization": 3})[0]


@pytest.fixture(scope="module")
def ds():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config

    return {"config": config, "precision": precision_config, "zero": zero, "offload": offload_config}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "mixed_bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_c059_deepspeed_accepts_the_json(ds, precision: str, stage: int) -> None:
    if precision == "bf16" and stage == 0:
        with pytest.raises(ConfigError, match="phantom"):
            Config(zero_stage=0, precision="bf16").validate()
        return
    parsed = ds["config"].DeepSpeedConfig(generate(zero_stage=stage, precision=precision, max_grad_norm=0.5))
    assert (parsed.zero_optimization_stage, parsed.gradient_clipping, parsed.train_batch_size) == (stage, 0.5, 2)
    assert parsed.bfloat16_config.enabled == (precision == "bf16") and parsed.optimizer_name is None
    assert parsed.torch_autocast_enabled == (precision == "mixed_bf16")
    if stage:
        assert parsed.zero_config.reduce_bucket_size == 200_000_000 and parsed.zero_config.overlap_comm is True


def names_of(model) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_r19_key_lists_are_those_of_the_installed_deepspeed(ds) -> None:
    zero = KNOWN["zero_optimization"]
    assert set(zero) == names_of(ds["zero"].DeepSpeedZeroConfig)
    assert set(zero["offload_optimizer"]) == names_of(ds["offload"].DeepSpeedZeroOffloadOptimizerConfig)
    assert set(zero["leaf_module"]) == names_of(ds["zero"].DeepSpeedZeroLeafModuleConfig)
    assert set(zero["offload_param"]) == names_of(ds["offload"].DeepSpeedZeroOffloadParamConfig)
    assert set(KNOWN["bf16"]) == names_of(ds["precision"].DeepSpeedBF16Config)
    assert set(KNOWN["fp16"]) == names_of(ds["precision"].DeepSpeedFP16Config)
    import inspect
    import re

    from deepspeed.runtime import constants

    source = inspect.getsource(ds["config"])
    read = {getattr(constants, c) for c in re.findall(r"\bparam_dict, ([A-Z][A-Z_]+)\b", source)}
    read = {name for name in read if isinstance(name, str)} - set(REFUSED)
    assert read and read <= set(KNOWN) | {"seq_parallel_communication_data_type"}
    assert set(ds["config"]._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED)
    assert all(value is None or value == ANY or isinstance(value, dict) for value in KNOWN.values())


@pytest.mark.parametrize("path", GUARDS)
def test_r22_an_override_cannot_switch_a_guard_off(path: str) -> None:
    block, name = path.split(".")
    assert errors({block: {name: True}}) == []
    for value in (False, 0, "off"):
        assert any(
            f"{path} = " in line and "is refused" in line and "finite" in line for line in errors({block: {name: value}})
        )
