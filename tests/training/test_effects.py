"""C53, R36: each key that exists changes something that can be seen in what really runs; a key without a row here fails.

`SEEN` rows change a key in a tiny run and name the aspects of `observed.observe` that must differ. `LAUNCHED` rows do the same
with what is started. `ELSEWHERE` names the test that changes a key where ranks, processes or clocks are needed. What DeepSpeed
is given for communication is read back from its live optimizer too.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config.resolve import resolve
from lumina_engine.config.schema import Config, fields_info
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.policy import Settings
from lumina_engine.run.rank import NullChannel
from lumina_engine.training.worker import Worker

from .observed import BASE, MACHINE, conversations, launched, observe

LATENT = {"attention": "mla", "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
DEEP = {"use_deepspeed": True, "zero_stage": 2, "precision": "bf16"}
CURRICULUM = {"curriculum_learning": True, "min_seq_length": 16, "curriculum_steps": 4}
BACKUPS = {"backup_every_n_hours": 1e-9, "async_save": True, "save_interval": 1}

# key → (other keys of both runs, the changed value, aspects that must differ)
SEEN: dict[str, tuple[dict[str, Any], Any, str]] = {
    "vocab_size": ({}, 2048, "shapes"),
    "hidden_size": ({}, 128, "shapes"),
    "num_layers": ({}, 3, "shapes dropped"),
    "num_heads": ({}, 2, "shapes"),
    "num_kv_heads": ({}, 1, "shapes"),
    "head_dim": ({}, 32, "shapes"),
    "intermediate_size": ({}, 64, "shapes"),
    "seq_length": ({}, 128, "row_shape steps"),
    "attention": ({}, LATENT, "shapes logits"),
    "kv_lora_rank": (LATENT, 48, "shapes"),
    "q_lora_rank": (LATENT, 24, "shapes"),
    "qk_nope_head_dim": (LATENT, 24, "shapes"),
    "qk_rope_head_dim": (LATENT, 16, "shapes"),
    "v_head_dim": (LATENT, 24, "shapes"),
    "sliding_window": ({}, 16, "logits"),
    "qk_norm": ({}, True, "shapes"),
    "rope_theta": ({}, 1e5, "logits"),
    "rope_scaling": ({"rope_scaling": "linear", "rope_scaling_factor": 4.0}, "yarn", "logits"),
    "rope_scaling_factor": ({"rope_scaling": "linear", "rope_scaling_factor": 2.0}, 4.0, "logits"),
    "rope_original_length": ({"rope_scaling": "yarn", "rope_scaling_factor": 4.0}, 64, "logits"),
    "norm_eps": ({}, 0.1, "logits losses"),
    "init_std": ({}, 0.05, "weights"),
    "tie_word_embeddings": ({}, False, "shapes"),
    "dropout": ({}, 0.3, "losses"),
    "use_flash_attention": ({}, False, "kept"),
    "gradient_checkpointing": ({}, True, "kept"),
    "loss_chunk_size": ({}, 128, "largest"),
    "use_moe": ({}, False, "shapes experts"),
    "num_experts": ({}, 8, "shapes"),
    "moe_top_k": ({}, 1, "logits"),
    "num_shared_experts": ({}, 1, "shapes"),
    "num_dense_layers": ({}, 1, "shapes"),
    "dense_intermediate_size": ({"num_dense_layers": 1}, 64, "shapes"),
    "router_score": ({}, "sigmoid", "logits balance"),
    "router_normalize": ({}, False, "logits"),
    "router_scale": ({}, 2.0, "logits"),
    "load_balancing_weight": ({}, 1.0, "losses"),
    "router_bias_rate": ({}, 0.01, "bias"),
    "router_z_loss_weight": ({}, 0.5, "losses"),
    "router_jitter_noise": ({}, 0.3, "losses"),
    "capacity_factor": ({}, 4.0, "dropped"),
    "moe_dropless": ({}, True, "dropped"),
    "batch_size": ({}, 2, "row_shape steps"),
    "gradient_accumulation_steps": ({}, 2, "row_shape steps"),
    "learning_rate": ({}, 1e-3, "rates losses"),
    "weight_decay": ({}, 0.3, "optimizer losses"),
    "adam_beta1": ({}, 0.5, "optimizer losses"),
    "adam_beta2": ({}, 0.5, "optimizer losses"),
    "adam_eps": ({}, 1e-2, "optimizer losses"),
    "max_grad_norm": ({}, 0.05, "losses"),
    "num_epochs": ({"max_steps": None, "num_epochs": 1}, 2, "end"),
    "max_steps": ({}, 4, "end"),
    "lr_schedule": ({}, "linear", "rates"),
    "warmup_steps": ({}, 4, "rates"),
    "min_lr_ratio": ({}, 0.5, "rates"),
    "decay_ratio": ({"lr_schedule": "wsd"}, 0.6, "rates"),
    "precision": ({}, "bf16", "dtypes losses"),
    "seed": ({}, 1, "weights rows"),
    "deterministic": ({}, False, "deterministic"),
    "curriculum_learning": ({}, {"curriculum_learning": True, "min_seq_length": 16, "curriculum_steps": 4}, "steps"),
    "min_seq_length": (CURRICULUM, 32, "steps"),
    "max_seq_length": (CURRICULUM, 32, "steps"),
    "curriculum_steps": (CURRICULUM, 2, "steps"),
    "eval_interval": ({}, 2, "evals"),
    "eval_batches": ({}, 0, "evals"),
    "early_stopping_patience": ({"eval_interval": 1, "learning_rate": 0.3, "max_steps": 12}, 1, "end"),
    "early_stopping_gain": (
        {"adaptive": "act", "eval_interval": 1, "lr_schedule": "constant", "max_steps": 20, "num_epochs": 100},
        100.0,
        "end",
    ),
    "train_data_path": ({}, lambda folder: str(conversations(folder / "other.jsonl", 50, 100)), "rows tokens"),
    "eval_data_path": ({}, lambda folder: str(conversations(folder / "held.jsonl", 30, 200)), "tokens"),
    "eval_split": ({}, 0.5, "tokens"),
    "data_format": ({"train_on": "all"}, "text", "rows"),
    "tokenizer": ({}, "gpt-4", "shapes rows"),
    "train_on": ({}, "all", "rows"),
    "assistant_loss_weight": ({"train_on": "all"}, 3.0, "row_weights losses"),
    "packing": ({}, "none", "rows"),
    "data_cache_dir": ({}, lambda folder: str(folder / "cache2"), "folders"),
    "save_interval": ({}, 3, "saves"),
    "keep_checkpoints": ({}, 3, "kept_checkpoints"),
    "best_metric": ({}, "loss", "saves"),
    "checkpoint_compression": ({}, "zstd", "state_files"),
    "backup_every_n_hours": ({"async_save": True}, 1e-9, "backups"),
    "max_backup_count": (BACKUPS, 1, "backups"),
    "backup_path": (BACKUPS, lambda folder: str(folder / "disk"), "folders backups"),
    "log_interval": ({}, 2, "steps"),
    "expert_log_interval": ({}, 3, "experts"),
}
LAUNCHED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "use_deepspeed": ({}, True, "deepspeed"),
    "zero_stage": (DEEP, 1, "deepspeed"),
    "overlap_comm": (DEEP, False, "deepspeed"),
    "contiguous_gradients": (DEEP, False, "deepspeed"),
    "allgather_bucket_size": (DEEP, 1_000_000, "deepspeed"),
    "reduce_bucket_size": (DEEP, 1_000_000, "deepspeed"),
    "stage3_prefetch_bucket_size": (DEEP | {"zero_stage": 3}, 1_000_000, "deepspeed"),
    "stage3_param_persistence_threshold": (DEEP | {"zero_stage": 3}, 1_000, "deepspeed"),
    "cpu_offload": (DEEP, True, "deepspeed"),
    "cpu_offload_optimizer": (DEEP, True, "deepspeed"),
    "cpu_offload_parameters": (DEEP | {"zero_stage": 3}, True, "deepspeed"),
    "nvme_offload_optimizer": (DEEP | {"zero_stage": 3}, True, "deepspeed"),
    "nvme_offload_parameters": (DEEP | {"zero_stage": 3}, True, "deepspeed"),
    "nvme_path": (DEEP | {"zero_stage": 3, "nvme_offload_optimizer": True}, "/elsewhere", "deepspeed"),
    "partition_activations": (DEEP, True, "deepspeed"),
    "deepspeed_overrides": (DEEP, {"wall_clock_breakdown": True}, "deepspeed"),
    "launcher": ({}, "torchrun", "argv"),
    "num_gpus": ({}, 2, "argv"),
    "master_addr": ({"num_gpus": 2}, "localhost", "argv"),
    "master_port": ({"num_gpus": 2}, 31_234, "argv"),
}
ELSEWHERE = {
    "multi_task": "data/test_tasks.py::test_c039_every_key_of_a_mixture_changes_the_run",
    "task_weights": "data/test_tasks.py::test_c039_every_key_of_a_mixture_changes_the_run",
    "task_data_paths": "data/test_tasks.py::test_c039_every_key_of_a_mixture_changes_the_run",
    "task_temperature": "data/test_tasks.py::test_c039_every_key_of_a_mixture_changes_the_run",
    "task_max_epochs": "data/test_tasks.py::test_c039_every_key_of_a_mixture_changes_the_run",
    "compile": "training/test_compiling.py::test_c013_compiled_losses_equal_eager_in_every_mode",
    "expert_parallel_size": "parity/test_expert_parallel.py::test_c020_four_ranks_in_two_groups_equal_all_experts_on_each",
    "overlap_alltoall": "parity/test_expert_parallel.py::test_c021_overlap_gives_the_same_losses_by_twice_the_transfers",
    "auto_tune_precision": "training/test_precision.py::test_c071_the_start_measures_says_why_and_leaves_training_as_it_was",
    "dynamic_precision": "training/test_precision.py::test_forced_overflows_walk_the_ladder_in_place",
    "dynamic_batching": "training/test_batch_size.py::test_r42_out_of_memory_in_a_step_goes_on_with_half_the_micro_batch",
    "target_memory_usage": "training/test_batch_size.py::test_c075_the_largest_batch_under_a_memory_cap_is_found",
    "min_batch_size": "training/test_batch_size.py::test_c075_the_largest_divisor_that_fits",
    "max_batch_size": "training/test_batch_size.py::test_c075_the_largest_divisor_that_fits",
    "num_workers": "data/test_rows.py::test_c037_workers_give_the_same_batches",
    "prefetch_batches": "data/test_rows.py::test_position_counts_rows_not_prefetched_steps",
    "streaming_threshold_gb": "data/test_stream.py::test_c034_room_on_the_disk_is_bounded_and_changes_nothing",
    "communication_backend": "config/test_resolve.py::test_c058_backend_and_launcher",
    "experiment_name": "training/test_budget_run.py::test_c139_c113_a_run_weighs_and_takes_what_its_budget_says",
    "num_nodes": "run/test_launch.py::test_c061_torchrun_on_each_machine",
    "node_rank": "run/test_launch.py::test_c061_torchrun_on_each_machine",
    "hostfile": "run/test_launch.py::test_c061_machines_of_a_hostfile",
    "hang_timeout_s": "faults/test_ft_hang.py::test_ft07_a_hang_is_found_named_and_restarted_exactly",
    "hang_factor": "faults/test_ft_hang.py::test_ft07_a_hang_is_found_named_and_restarted_exactly",
    "max_restarts": "run/test_supervisor.py::test_r42_out_of_memory_with_restarts_switched_off_ends_the_run",
    "preempt_grace_s": "run/test_commands.py::test_ps15_a_deaf_worker_and_its_setsid_grandchild_end_by_stop",
    "engine_log_mb": "run/test_commands.py::test_ps16_a_flood_on_stdout_is_capped",
    "alert_command": "run/test_run_health.py::test_c093_the_user_s_command_is_told_of_alerts",
    "trackers": "run/test_tracking.py::test_c149_a_run_feeds_the_trackers_of_its_configuration",
    "async_save": "checkpoint/test_faults.py::test_ck16_async_save_false_blocks",
    "enable_emergency_save": "faults/test_emergency.py::test_c084_ft09_an_error_in_a_step_saves_the_one_before_it",
    "max_nonfinite_in_row": "training/test_precision.py::test_forced_overflows_walk_the_ladder_in_place",
    "max_rollbacks": "faults/test_ft_guard.py::test_ft05_endless_nan_ends_with_93_after_the_limit",
    "spike_sigma": "training/test_guard.py::test_ft06_a_value_beyond_the_bound_is_refused_and_one_inside_is_not",
    "spike_window": "training/test_guard.py::test_ft06_a_value_beyond_the_bound_is_refused_and_one_inside_is_not",
    "spike_recover_steps": "training/test_guard.py::test_ft06_a_new_level_is_not_left_out_for_ever",
    "adaptive": "training/test_adaptive.py::test_c100_off_advise_and_act",
    "lr_multiplier_min": "training/test_adaptive.py::test_c098_bounds_and_pace_are_those_of_the_keys",
    "adaptive_cooldown_steps": "training/test_adaptive.py::test_c098_bounds_and_pace_are_those_of_the_keys",
    "max_adaptive_actions": "training/test_adaptive.py::test_c098_bounds_and_pace_are_those_of_the_keys",
    "expert_growth": "faults/test_growth_run.py::test_c099_a_run_grows_by_itself_and_finishes",
    "max_num_experts": "checkpoint/test_growth.py::test_c099_growing_refuses_what_it_cannot_do_exactly",
    "spike_policy": "faults/test_ft_guard.py::test_ft06_a_spike_goes_back_where_the_policy_says_so",
}
# tested below
HERE = {"deepspeed_log_level", "hardware_interval_s", "startup_timeout_s"}


def test_r36_every_key_has_a_row() -> None:
    rows = [*SEEN, *LAUNCHED, *ELSEWHERE, *HERE]
    assert sorted(rows) == sorted(info.name for info in fields_info())


def values(name: str, value: Any, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    value = value(folder) if callable(value) else value
    return value if isinstance(value, dict) and name in value else {name: value}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Observations of the runs that are compared with, each made once."""
    seen: dict[str, dict] = {}

    def of(keys: dict[str, Any]) -> dict[str, Any]:
        known = repr(sorted(keys.items()))
        if known not in seen:
            seen[known] = observe(tmp_path_factory.mktemp("base"), keys)
        return seen[known]

    return of


@pytest.mark.parametrize("name", SEEN)
def test_c053_changing_a_key_changes_what_runs(name: str, bases: Any, tmp_path: Path) -> None:
    others, value, aspects = SEEN[name]
    before = bases(others)
    after = observe(tmp_path, others | values(name, value, tmp_path))
    assert not {aspect for aspect in aspects.split() if before[aspect] == after[aspect]}


def test_c053_the_same_keys_change_nothing(bases: Any, tmp_path: Path) -> None:
    before, after = bases({}), observe(tmp_path, {})
    assert {aspect for aspect in before if before[aspect] != after[aspect]} == set()


def test_c034_a_streamed_run_is_the_run_that_it_would_be_otherwise(bases: Any, tmp_path: Path) -> None:
    before, after = bases({}), observe(tmp_path, {"streaming_threshold_gb": 0.0})
    assert {aspect for aspect in before if before[aspect] != after[aspect]} == set()
    assert list((tmp_path / "cache").glob("*.stream/window-000000"))


@pytest.mark.parametrize("name", LAUNCHED)
def test_c053_changing_a_key_changes_what_is_started(name: str, tmp_path: Path) -> None:
    others, value, aspect = LAUNCHED[name]
    found = []
    for keys in (others, others | values(name, value, tmp_path)):
        config = resolve(Config(**(BASE | keys)), MACHINE, tokenizer_vocab=1024)
        found.append(launched(config, tmp_path)[aspect])
    assert found[0] != found[1]


def named(node: ast.AST) -> set[str]:
    """Names, attributes, keywords and words of strings below a node."""
    found: set[str] = set()
    for below in ast.walk(node):
        if isinstance(below, ast.Constant) and isinstance(below.value, str):
            found |= set(re.findall(r"\w+", below.value))
        found |= {getattr(below, part) for part in ("id", "attr", "arg") if isinstance(getattr(below, part, None), str)}
    return found


@pytest.mark.parametrize("name", ELSEWHERE)
def test_c053_the_test_elsewhere_changes_the_key(name: str) -> None:
    """The key is in the code of the test that is named, or in what that test uses of its module."""
    file, _, test = ELSEWHERE[name].partition("::")
    tree = ast.parse((Path(__file__).parents[1] / file).read_text())
    parts = {node.name: named(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        for target in [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", []):
            if isinstance(target, ast.Name):
                parts[target.id] = named(node)
    assert test in parts and test.startswith("test_"), f"{file} has no {test}"
    used, reached = set(parts[test]), {test}
    while more := (used & set(parts)) - reached:
        reached |= more
        used |= set().union(*(parts[part] for part in more))
    assert name in used, f"{test} does not name {name}"


COMMUNICATION: dict[str, tuple[int, Any, str]] = {
    "overlap_comm": (2, False, "overlap_comm"),
    "contiguous_gradients": (2, False, "contiguous_gradients"),
    "allgather_bucket_size": (2, 123_456, "allgather_bucket_size"),
    "reduce_bucket_size": (2, 234_567, "reduce_bucket_size"),
    "stage3_prefetch_bucket_size": (3, 456_789, "_prefetch_bucket_sz"),
    "stage3_param_persistence_threshold": (3, 345, "param_numel_persistence_threshold"),
}


@pytest.mark.parametrize("stage", [2, 3])
def test_c063_the_live_optimizer_has_the_communication_keys(stage: int, tmp_path: Path) -> None:
    from .test_trainer import STAGE_3, setup

    wanted = {name: value for name, (at, value, _) in COMMUNICATION.items() if at == stage}
    at = STAGE_3 if stage == 3 else {"zero_stage": stage}
    trainer, _, _ = setup(tmp_path, use_deepspeed=True, **at, **wanted)
    zero = trainer.engine.optimizer  # type: ignore[attr-defined]
    for name, value in wanted.items():
        holder = getattr(zero, "parameter_offload", zero) if name.startswith("stage3") else zero
        assert getattr(holder, COMMUNICATION[name][2]) == value, name


@pytest.mark.parametrize(("stage", "early"), [(1, False), (2, True)])
def test_c063_the_live_optimizer_reduces_as_auto_says(stage: int, early: bool, tmp_path: Path) -> None:
    from lumina_engine.monitoring.hardware import detect

    from .test_trainer import setup

    trainer, _, _ = setup(tmp_path, use_deepspeed=True, zero_stage=stage)
    zero = trainer.engine.optimizer  # type: ignore[attr-defined]
    early = early or bool(detect().devices)
    assert (zero.overlap_comm, zero.contiguous_gradients) == (early, early)


def test_c062_the_log_level_is_that_of_deepspeeds_logger(tmp_path: Path) -> None:
    from .test_trainer import setup

    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    try:
        for level in ("error", "info"):
            (tmp_path / level).mkdir()
            setup(tmp_path / level, use_deepspeed=True, deepspeed_log_level=level)
            assert logger.level == getattr(logging, level.upper())
    finally:
        logger.setLevel(before)


def test_ft07_the_watchdog_waits_for_a_start_as_long_as_told() -> None:
    """What the supervisor makes its `Limits` from; `run/test_watchdog.py` has what they do."""
    for seconds in (7.0, 90.0):
        assert Settings.of(Settings.of_config(Config(startup_timeout_s=seconds))).startup_timeout_s == seconds


def test_c053_the_hardware_is_looked_at_as_often_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker in this process, with a stand-in for the thread that looks at the hardware."""
    intervals: list[float] = []

    class Thread:
        def __init__(self, emit: Any, interval: float, path: Any) -> None:
            intervals.append(interval)

        def start(self) -> None: ...
        def stop(self) -> None: ...

    monkeypatch.setattr("lumina_engine.training.worker.HardwareThread", Thread)
    for name, value in (("a", 1.5), ("b", 7.0)):
        keys = {
            "train_data_path": str(conversations(tmp_path / f"{name}.jsonl", 20)),
            "data_cache_dir": str(tmp_path / "cache"),
        }
        config = Config(
            **(BASE | keys | {"hardware_interval_s": value, "max_steps": 1, "eval_interval": 0, "deterministic": False})
        )
        directory = RunDirectory.create(tmp_path / "runs", name)
        resolve(config, MACHINE, tokenizer_vocab=1024).save(directory.config_path)
        assert Worker(directory, NullChannel()).run() == 0
    assert intervals == [1.5, 7.0]
