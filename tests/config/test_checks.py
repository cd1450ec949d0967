"""The rules between keys: each gives its finding with a fix, and the fix works."""

from __future__ import annotations

import pytest

from lumina_engine.config.checks import check, resume_findings
from lumina_engine.config.machine import GB, Accelerator, Machine
from lumina_engine.config.presets import ConfigPresets
from lumina_engine.config.schema import Config, ConfigError, fields_info
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.early_stop import EarlyStop, EarlyStopRules

LAPTOP = Machine([], 16 * GB, 4, 100 * GB)
# changes, code, severity, words of the line, changes that mend it
CASES = [
    (
        {"adaptive": "act", "lr_multiplier_min": 1.0},
        "adaptive_bound",
        "warning",
        "no rate can be lowered, so the first lasting trouble ends the run; set lr_multiplier_min=0.1",
        {"lr_multiplier_min": 0.1},
    ),
    (
        {"hidden_size": 500, "num_heads": 8},
        "heads",
        "error",
        "hidden_size = 500: not a multiple of num_heads",
        {"hidden_size": 496},
    ),
    (
        {"hidden_size": 72, "num_heads": 8},
        "head_dim",
        "error",
        "rotary positions need an even",
        {"num_heads": 1, "num_kv_heads": 1},
    ),
    (
        {"num_kv_heads": 3},
        "kv_heads",
        "error",
        "num_kv_heads = 3: does not divide num_heads = 8; set num_kv_heads=2",
        {"num_kv_heads": 2},
    ),
    (
        {"kv_lora_rank": 64},
        "latent_keys",
        "error",
        "no effect with attention = gqa; set attention=mla, or kv_lora_rank=512",
        {"attention": "mla"},
    ),
    ({"q_lora_rank": 64}, "latent_keys", "error", "or q_lora_rank=null", {"q_lora_rank": None}),
    ({"attention": "mla", "qk_nope_head_dim": 63}, "latent_head", "error", "even number", {"qk_nope_head_dim": 64}),
    ({"attention": "mla", "head_dim": 64}, "latent_head_dim", "error", "set head_dim=auto", {"head_dim": 192}),
    ({"attention": "mla", "qk_norm": True}, "latent_qk_norm", "error", "set qk_norm=false", {"qk_norm": False}),
    ({"attention": "mla", "num_kv_heads": 3}, "latent_kv_heads", "info", "set num_kv_heads=8", {"num_kv_heads": 8}),
    ({"sliding_window": 2048}, "window", "info", "hides nothing", {"sliding_window": 1024}),
    ({"moe_top_k": 9}, "top_k", "error", "moe_top_k = 9: more than num_experts = 8", {"moe_top_k": 8}),
    ({"num_dense_layers": 9}, "dense_layers", "error", "more than num_layers", {"num_dense_layers": 8}),
    ({"router_normalize": True}, "normalize_top1", "error", "would never learn", {"router_normalize": "auto"}),
    (
        {"moe_dropless": True, "capacity_factor": 2.0},
        "dropless",
        "info",
        "has no effect with moe_dropless",
        {"moe_dropless": False},
    ),
    (
        {"expert_growth": "act", "moe_top_k": 1},
        "growth_adaptive",
        "info",
        "no further than adaptive = advise",
        {"adaptive": "act"},
    ),
    (
        {"expert_growth": "act", "adaptive": "act", "moe_top_k": 1, "save_interval": 0},
        "growth_saves",
        "info",
        "save_interval = 0 makes none",
        {"save_interval": 1000},
    ),
    (
        {"expert_growth": "act", "adaptive": "act", "moe_top_k": 2},
        "growth_top_k",
        "info",
        "adds none with moe_top_k = 2",
        {"expert_growth": "advise"},
    ),
    (
        {"expert_growth": "act", "adaptive": "act", "moe_top_k": 1, "max_num_experts": 8},
        "growth_most",
        "info",
        "set max_num_experts=16",
        {"max_num_experts": 16},
    ),
    (
        {"expert_growth": "act", "expert_parallel_size": 2},
        "expert_unproved",
        "error",
        "expert_growth = act with expert_parallel_size = 2: not proved",
        {"expert_growth": "advise"},
    ),
    ({"rope_scaling_factor": 4}, "rope_factor", "error", "no effect with rope_scaling = none", {"rope_scaling": "yarn"}),
    ({"rope_original_length": 512}, "rope_length", "error", "rope_original_length", {"rope_original_length": None}),
    ({"rope_scaling": "linear"}, "rope_factor", "warning", "stretches nothing", {"rope_scaling": "none"}),
    ({"seq_length": 100_000, "rope_theta": 1e4}, "rope_theta", "warning", "set rope_theta=6e6", {"rope_theta": 6e6}),
    ({"vocab_size": 50_304}, "vocab_too_small", "error", "set vocab_size=auto (100,352)", {"vocab_size": "auto"}),
    ({"tokenizer": "gpt-5"}, "tokenizer", "error", "no such tokenizer", {"tokenizer": "gpt-4"}),
    ({"max_steps": 50, "warmup_steps": 50}, "warmup", "warning", "before the peak", {"warmup_steps": "auto"}),
    (
        {"early_stopping_patience": 3, "eval_interval": 0},
        "early_stopping",
        "error",
        "needs evaluations",
        {"eval_interval": 200},
    ),
    (
        {"early_stopping_gain": 0.01, "eval_interval": 0},
        "early_stopping",
        "error",
        "early_stopping_gain = 0.01 needs evaluations",
        {"eval_interval": 200},
    ),
    (
        {"early_stopping_gain": 0.01, "lr_schedule": "wsd"},
        "early_stopping",
        "warning",
        "ends no run with lr_schedule = wsd",
        {"lr_schedule": "cosine"},
    ),
    (
        {"early_stopping_gain": 0.01, "eval_interval": 200, "max_steps": 2_000},
        "early_stopping",
        "warning",
        "does not give before max_steps = 2,000; set eval_interval=83",
        {"eval_interval": 83},
    ),
    (
        {"early_stopping_gain": 0.01, "eval_interval": 20, "max_steps": 2_000, "warmup_steps": 500},
        "early_stopping",
        "warning",
        "over a factor of 4 in steps",
        {"warmup_steps": 400},
    ),
    (
        {"early_stopping_gain": 0.01, "max_adaptive_actions": 0},
        "early_stopping",
        "warning",
        "ends no run: max_adaptive_actions = 0",
        {"max_adaptive_actions": 20},
    ),
    (
        {"early_stopping_gain": 0.01, "train_data_path": "a", "eval_split": 0.0},
        "early_stopping",
        "warning",
        "ends no run: nothing is held back",
        {"eval_split": 0.02},
    ),
    (
        {"early_stopping_gain": 0.01, "adaptive": "off"},
        "switched_off",
        "info",
        "early_stopping_gain = 0.01 has no effect with adaptive = off",
        {"adaptive": "advise"},
    ),
    ({"min_batch_size": 64}, "batch_bounds", "error", "more than max_batch_size", {"min_batch_size": 32}),
    ({"min_seq_length": 4096}, "curriculum", "error", "longer than seq_length", {"min_seq_length": "auto"}),
    (
        {"train_data_path": "a", "eval_data_path": ["b", "a"]},
        "eval_is_train",
        "warning",
        "will flatter",
        {"eval_data_path": "b"},
    ),
    ({"eval_data_path": "a"}, "eval_only", "warning", "built-in corpus", {"train_data_path": "b"}),
    ({"train_data_path": "a", "eval_split": 0}, "no_eval", "warning", "nothing is held back", {"best_metric": "loss"}),
    ({"assistant_loss_weight": 2.0}, "loss_weight", "warning", "no effect with train_on = assistant", {"train_on": "all"}),
    ({"use_deepspeed": False, "zero_stage": 1}, "zero_off", "error", "needs DeepSpeed", {"use_deepspeed": True}),
    ({"zero_stage": 0, "precision": "bf16"}, "bf16_stage0", "error", "phantom optimizer step", {"zero_stage": 1}),
    (
        {"zero_stage": 2, "stage3_prefetch_bucket_size": 10},
        "switched_off",
        "info",
        "has no effect with zero_stage = 2; set zero_stage=3, or",
        {"zero_stage": 3},
    ),
    ({"zero_stage": 0}, "zero_stage_0", "info", "earlier versions read 0 as automatic", {"zero_stage": "auto"}),
    (
        {"compile": True, "nvme_offload_optimizer": True},
        "compile_stage",
        "error",
        "offload that needs ZeRO stage 3",
        {"nvme_offload_optimizer": False},
    ),
    ({"compile": True, "cpu_offload_parameters": True}, "compile_stage", "error", "needs ZeRO stage 3", {"compile": False}),
    ({"decay_ratio": 0.5}, "switched_off", "info", "no effect with lr_schedule = cosine", {"lr_schedule": "wsd"}),
    (
        {"lr_schedule": "constant", "min_lr_ratio": 0.5},
        "switched_off",
        "info",
        "with lr_schedule = constant",
        {"lr_schedule": "linear"},
    ),
    (
        {"dense_intermediate_size": 512},
        "switched_off",
        "info",
        "no effect with num_dense_layers = 0",
        {"num_dense_layers": 1},
    ),
    ({"use_moe": False, "router_score": "sigmoid"}, "switched_off", "info", "with use_moe = false", {"use_moe": True}),
    (
        {"use_deepspeed": False, "overlap_comm": False},
        "switched_off",
        "info",
        "with use_deepspeed = false",
        {"use_deepspeed": True},
    ),
    ({"zero_stage": 0, "reduce_bucket_size": 1_000_000}, "switched_off", "info", "with zero_stage = 0", {"zero_stage": 1}),
    ({"zero_stage": 3, "allgather_bucket_size": 10**6}, "switched_off", "info", "with zero_stage = 3", {"zero_stage": 2}),
]


@pytest.mark.parametrize(
    ("changes", "code", "severity", "words", "mend"), CASES, ids=[f"{c[1]}-{i}" for i, c in enumerate(CASES)]
)
def test_c129_each_rule_and_its_fix(changes: dict, code: str, severity: str, words: str, mend: dict) -> None:
    config = Config(**changes)
    found = [f for f in check(config) if f.code == code]
    assert len(found) == 1 and found[0].severity == severity and words in found[0].line(), check(config)
    assert found[0].fix and set(found[0].keys) <= {i.name for i in fields_info()}
    for name, value in mend.items():
        setattr(config, name, value)
    assert code not in {f.code for f in check(config)}


@pytest.mark.parametrize("steps", [2_400, 2_401])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_c100_a_run_that_early_stopping_gain_cannot_end_is_told_exactly(schedule: str, steps: int) -> None:
    """Evaluations every 200 steps behind the warm-up: 11 or 12 of them before the last step."""
    keys = {"early_stopping_gain": 100.0, "eval_interval": 200, "max_steps": steps, "lr_schedule": schedule, "adaptive": "act"}
    config = Config(**keys)
    told = [f for f in check(config, LAPTOP) if f.code == "early_stopping"]
    machine, ends = EarlyStop(EarlyStopRules.from_config(config, steps)), False
    for step in range(200, steps + 1, 200):
        machine.observe(rec.Step(step=step, tokens=1_000 * step), 0)
        ends = ends or bool(machine.observe(rec.Eval(step=step, loss=2 + 1 / step), 0))
    assert ends == (steps > 2_400) and len(told) == (not ends)


def test_c099_growth_by_itself_is_a_value_like_any_other() -> None:
    assert check(Config(adaptive="act", expert_growth="act", moe_top_k=1)) == []
    assert check(Config(expert_growth="act", use_moe=False, num_experts=8)) == []


def test_c046_validate_gives_all_findings_or_raises_with_all() -> None:
    config = Config(rope_theta=100, zero_stage=0)
    assert [f.code for f in config.validate()] == ["rope_theta", "zero_stage_0"]
    config.num_kv_heads, config.moe_top_k = 3, 9
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert [f.code for f in caught.value.findings] == ["kv_heads", "top_k", "rope_theta", "zero_stage_0"]
    assert str(caught.value).startswith("2 problems")


def test_c139_what_depends_on_the_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check(ConfigPresets.debug(), LAPTOP) == []
    lines = [f.line() for f in check(ConfigPresets.b7(), LAPTOP) if f.severity == "error"]
    assert lines[0].startswith("does not fit: ") and "choose a smaller preset" in lines[0]
    gpus = Machine([Accelerator("H100", 80 * GB)] * 2, 1000 * GB, 32, None)
    found = check(Config(num_gpus=4, train_data_path="missing.jsonl"), gpus)
    assert {f.code for f in found} == {"num_gpus", "no_data"}
    (tmp_path / "d.jsonl").write_text("{}")
    assert check(Config(num_gpus=2, train_data_path=["d.jsonl", "*.jsonl"]), gpus) == []
    assert [f.code for f in check(Config(communication_backend="nccl"), LAPTOP)] == ["nccl"]
    assert [f.code for f in check(Config(), Machine([], 16 * GB, 4, GB))] == ["disk"]
    for kept, free_mb, words in ((9, 1, "disk or name"), (9, 300, "set keep_checkpoints=2, or"), (2, 1, "disk or name")):
        debug = ConfigPresets.debug().model_copy(update={"keep_checkpoints": kept})
        (finding,) = check(debug, Machine([], 16 * GB, 4, free_mb * 10**6))
        assert words in finding.line()
    assert [f.code for f in check(Config(zero_stage=0), gpus)] == ["bf16_stage0", "zero_stage_0"]


def test_c085_resume_findings() -> None:
    old = ConfigPresets.debug()
    new = ConfigPresets.debug()
    new.max_steps, new.batch_size, new.gradient_accumulation_steps = 5, 4, 2
    assert resume_findings(old, new, 1, 1) == [] and resume_findings(old, old, 2, 2) == []
    for name, value in (("nvme_offload_optimizer", True), ("deepspeed_overrides", {"wall_clock_breakdown": True})):
        assert resume_findings(old, old.model_copy(update={name: value}), 1, 1) == []
    new.hidden_size, new.tokenizer = 256, "gpt-4"
    assert [f.keys[0] for f in resume_findings(old, new, 1, 2)] == ["hidden_size", "tokenizer", "batch_size"]


MIX = {
    "multi_task": True,
    "task_data_paths": {"chat": "a.jsonl", "code": "b.jsonl"},
    "task_weights": {"chat": 1.0, "code": 0.5},
}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (
            {"task_weights": {"chat": 1.0, "coed": 0.5}},
            "task_names",
            "task_weights has the task coed, task_data_paths has not; did you mean code?",
        ),
        (
            {"task_weights": {"chat": 1.0}},
            "task_names",
            "task_data_paths has the task code, task_weights has not; add code to task_weights",
        ),
        ({"task_weights": {"chat": 1.0, "code": 0.0}}, "task_weight", "task_weights.code = 0"),
        ({"task_weights": {"chat": -1.0, "code": 1.0}}, "task_weight", "task_weights.chat = -1"),
        ({"task_weights": {}, "task_data_paths": {}}, "no_tasks", "no task is named"),
        ({"task_data_paths": {"chat": "a.jsonl", "code": []}}, "task_path", "task_data_paths.code names no file"),
        ({"train_data_path": "c.jsonl"}, "task_train_path", "train_data_path is not read"),
        ({"task_weights": {}, "task_data_paths": {f"t{n}": "x" for n in range(257)}}, "many_tasks", "257 tasks: at most 256"),
    ],
)
def test_r30_tasks_are_checked_with_the_nearest_name(changes, code, words) -> None:
    found = [f for f in check(Config(**{**MIX, **changes})) if f.severity == "error"]
    assert code in {f.code for f in found} and any(words in f.line() for f in found)


def test_c039_sound_tasks_give_no_finding(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    assert check(Config(**MIX)) == [] == check(Config(**{**MIX, "task_weights": {}}))
    assert check(Config(multi_task=True, task_weights={"code": 1.0})) == []
    off = check(Config(task_weights={"code": 1.0}, task_temperature=2))
    assert [(f.code, f.severity) for f in off] == [("tasks_off", "warning")] * 2
    gone = [f for f in check(Config(**MIX), LAPTOP) if f.code == "no_data"]
    assert [f.line() for f in gone] == [gone[0].line()] and "task_data_paths.code: b.jsonl: no such file" in gone[0].line()
