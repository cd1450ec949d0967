"""Config → the JSON that DeepSpeed gets, and the check of every name and value in it.

DeepSpeed 0.19 silently ignores unknown keys at the top level and in several blocks, so nothing reaches it unchecked. The key
lists below are those of DeepSpeed 0.19.8; a test compares them with the installed version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumina_engine.config.buckets import bucket_size, reduces_early
from lumina_engine.config.counts import largest_parameter
from lumina_engine.config.declare import show
from lumina_engine.config.deepspeed_classes import wrong_names
from lumina_engine.config.deepspeed_rules import useless, value_at
from lumina_engine.config.deepspeed_values import wrong_values
from lumina_engine.config.finding import ConfigError, Finding, has_errors, nearest
from lumina_engine.config.offload import offload_of
from lumina_engine.config.resolve import model_config
from lumina_engine.config.schema import Config

Keys = dict[str, Any]  # key → None (a value), a Keys (a block) or ANY (a block whose keys DeepSpeed does not fix)
ANY = "any"


def _keys(names: str, **blocks: Any) -> Keys:
    return dict.fromkeys(names.split()) | blocks


_OFFLOAD_OPTIMIZER = _keys(
    "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload cpuadam_cores_perc"
)
_OFFLOAD_PARAM = _keys("device nvme_path buffer_count buffer_size max_in_cpu pin_memory")
_ZERO = _keys(
    "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
    "allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint sub_group_size "
    "cpu_offload_param cpu_offload_use_pin_memory cpu_offload stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold "
    "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save "
    "ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size "
    "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
    "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
    "save_muon_momentum_buffer_in_memory",
    offload_optimizer=_OFFLOAD_OPTIMIZER,
    offload_param=_OFFLOAD_PARAM,
    zenflow=ANY,
    leaf_module=_keys("classes names name_suffixes"),
)
KNOWN: Keys = _keys(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation steps_per_print "
    "dump_state disable_python_gc disable_allgather communication_data_type seq_parallel_communication_data_type "
    "prescale_gradients gradient_predivide_factor gradient_allreduce_op gradient_clipping zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer wall_clock_breakdown memory_breakdown use_data_before_expert_parallelism dataloader_drop_last "
    "log_level sequence_parallel_size vocabulary_size",
    zero_optimization=_ZERO,
    bf16=_keys("enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"),
    fp16=_keys(
        "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale "
        "fp16_master_weights_and_grads"
    ),
    torch_autocast=_keys("enabled dtype lower_precision_safe_modules"),
    data_types=_keys("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    activation_checkpointing=_keys(
        "partition_activations contiguous_memory_optimization cpu_checkpointing number_checkpoints "
        "synchronize_checkpoint_boundary profile"
    ),
    comms_logger=_keys("enabled prof_all prof_ops verbose debug"),
    flops_profiler=_keys("enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"),
    aio=_keys("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"),
    timers=_keys("", throughput=_keys("enabled synchronized")),
    tensorboard=_keys("enabled output_path job_name"),
    csv_monitor=_keys("enabled output_path job_name"),
    wandb=_keys("enabled group team project"),
    comet=_keys("enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode"),
    compile=ANY,
    hybrid_engine=ANY,
    autotuning=ANY,
    tensor_parallel=ANY,
    weight_quantization=ANY,
    checkpoint=ANY,
)
# Keys that DeepSpeed knows or knew, and that Lumina refuses.
REFUSED = {
    "optimizer": "Lumina passes its own AdamW: set learning_rate, weight_decay, adam_beta1, adam_beta2, adam_eps",
    "scheduler": "Lumina has its own schedule: set lr_schedule, warmup_steps, min_lr_ratio",
    "moe": "DeepSpeed reads no such block: set num_experts, moe_top_k and the other keys of section moe",
    "expert_parallel": "Lumina has its own experts: set expert_parallel_size",
    "use_data_before_expert_parallelism": "Lumina cuts the ranks into groups itself: set expert_parallel_size",
    "curriculum_learning": "DeepSpeed removed it: set curriculum_learning of section training",
    "data_efficiency": "Lumina loads its own data: set curriculum_learning of section training",
    "elasticity": "DeepSpeed removed it: set batch_size, gradient_accumulation_steps and num_gpus",
    "amp": "DeepSpeed removed it: set precision",
    "pipeline": "Lumina's model has no pipeline stages: remove it",
    "checkpoint": "Lumina writes its own checkpoints: set the keys of section checkpoint",
    "progressive_layer_drop": "DeepSpeed removed it: remove it",
    "sparse_attention": "DeepSpeed removed it: remove it",
    "sparse_gradients": "DeepSpeed removed it: remove it",
    "compression_training": "DeepSpeed removed it: remove it",
    "eigenvalue": "DeepSpeed removed it: remove it",
    "quantize_training": "DeepSpeed removed it: remove it",
    "nebula": "DeepSpeed removed it: remove it",
    "graph_harvesting": "DeepSpeed removed it: remove it",
    "comet": "Lumina opens no connection and stores no secret: remove it",
    "wandb": "Lumina opens no connection and stores no secret: remove it",
    "autotuning": "nothing here runs DeepSpeed's tuner: remove it",
    "compile": "Lumina compiles its blocks itself: set the key compile",
    "hybrid_engine": "nothing here calls it: remove it",
    "tensor_parallel": "Lumina has no tensor parallelism: remove it",
}
# DeepSpeed path → why it must stay true: a step with a broken gradient would be applied, and nobody would see it.
GUARDS = {
    "zero_optimization.compute_grad_norm": "without the norm a gradient that is not finite is not seen and the step is applied",
    "bf16.check_grad_overflow": "without the check a gradient that is not finite is applied to the weights",
}
AUTOCAST = {"mixed_bf16": "bfloat16", "mixed_fp16": "float16"}
# Keys that DeepSpeed reads at stage 3 only.
STAGE_3_KEYS = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
# DeepSpeed path → the key of Config that decides it.
COVERED = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "torch_autocast.enabled": "precision",
    "torch_autocast.dtype": "precision",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.overlap_comm": "overlap_comm",
    "zero_optimization.contiguous_gradients": "contiguous_gradients",
    "zero_optimization.allgather_bucket_size": "allgather_bucket_size",
    "zero_optimization.reduce_bucket_size": "reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold": "stage3_param_persistence_threshold",
    "zero_optimization.offload_optimizer.device": "cpu_offload_optimizer",
    "zero_optimization.offload_param.device": "cpu_offload_parameters",
    "zero_optimization.offload_optimizer.nvme_path": "nvme_path",
    "zero_optimization.offload_param.nvme_path": "nvme_path",
    "zero_optimization.cpu_offload": "cpu_offload_optimizer",
    "zero_optimization.cpu_offload_param": "cpu_offload_parameters",
    "activation_checkpointing.partition_activations": "partition_activations",
    "log_level": "deepspeed_log_level",
}


def to_deepspeed(config: Config, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a resolved `Config` for `world` ranks, with `deepspeed_overrides` merged in.

    `gradient_clipping` is always written, because DeepSpeed's own default clips. There is no optimizer block: the trainer
    passes its AdamW in.

    Raises:
        ConfigError: `zero_stage` or `precision` is still auto, or an override is unknown or contradicts a key.
    """
    unresolved = [name for name in ("zero_stage", "precision") if getattr(config, name) == "auto"]
    if unresolved:
        message = f"{unresolved[0]} = auto: DeepSpeed needs a value"
        raise ConfigError([Finding("unresolved", "error", tuple(unresolved), message, "resolve the configuration first")])
    findings = check_overrides(config, world)
    if has_errors(findings):
        raise ConfigError(findings)
    return _merged(_generated(config, world), config.deepspeed_overrides)


def _generated(config: Config, world: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        "train_batch_size": config.batch_size * config.gradient_accumulation_steps * world,
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": 0.0 if _clipped_by_lumina(config) else config.max_grad_norm,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(config, world),
    }
    if config.partition_activations:
        out["activation_checkpointing"] = {"partition_activations": True}
    if offload_of(config, out["zero_optimization"]["stage"]).optimizer != "device":
        out["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW does it; DeepSpeed's needs a compiler
    if config.precision == "bf16":
        out["bf16"] = {"enabled": True}
    elif config.precision == "fp16":
        # the scale in force is Lumina's; DeepSpeed's own follows the same rule
        out["fp16"] = {"enabled": True, "loss_scale": 0, "hysteresis": 1}
    elif config.precision in AUTOCAST:
        # no module is marked for short communication: gradients are reduced in fp32
        dtype = AUTOCAST[config.precision]
        out["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return out


def _clipped_by_lumina(config: Config) -> bool:
    """At stage 0 DeepSpeed takes the mean of the ranks' norms for the norm, which is wrong where ranks have other experts."""
    return config.zero_stage == 0 and config.use_moe and config.expert_parallel_size > 1


def _zero(config: Config, world: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 0 if config.zero_stage == "auto" else config.zero_stage}
    if zero["stage"] >= 1:
        zero |= {
            "overlap_comm": reduces_early(config.overlap_comm, zero["stage"]),
            "contiguous_gradients": reduces_early(config.contiguous_gradients, zero["stage"]),
            "allgather_bucket_size": bucket_size(config.allgather_bucket_size),
            "reduce_bucket_size": bucket_size(config.reduce_bucket_size),
        }
    if zero["stage"] == 3:
        zero |= {name: getattr(config, name) for name in STAGE_3_KEYS}
    return zero | _offload(config, zero["stage"], world)


def _offload(config: Config, stage: int, world: int) -> dict[str, Any]:
    """The blocks of what is kept in host memory or on disk.

    With the optimizer on disk each parameter is a sub-group of its own: DeepSpeed 0.19 puts a swapped gradient in a wrong place
    when it does not begin on a multiple of 512 bytes within its sub-group, and 0 always is one.
    """
    places = offload_of(config, stage)
    out: dict[str, Any] = {}
    if places.optimizer != "device":
        out["offload_optimizer"] = _place(places.optimizer, config.nvme_path)
    if places.parameters != "device":
        out["offload_param"] = _place(places.parameters, config.nvme_path)
    if places.parameters == "nvme":  # DeepSpeed keeps that many buffers of that many values in host memory
        out["offload_param"] |= {"buffer_count": 5, "buffer_size": -(-largest_parameter(model_config(config)) // world)}
    if places.optimizer == "nvme":
        out["sub_group_size"] = 1
    return out


def _place(place: str, nvme_path: str) -> dict[str, Any]:
    return {"device": place} | ({"nvme_path": nvme_path} if place == "nvme" else {})


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for name, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = _merged(out[name], value) if both else value
    return out


def check_overrides(config: Config, world: int | None = None) -> list[Finding]:
    """Findings of `deepspeed_overrides`: unknown names (with the nearest), wrong values, what is refused or contradicts a key.

    Without `world` the global batch is not compared.
    """
    overrides = config.deepspeed_overrides
    if not overrides:
        return []
    if not config.use_deepspeed:
        message = "deepspeed_overrides is set, but use_deepspeed is false"
        fix = "set use_deepspeed=true or remove the overrides"
        return [Finding("deepspeed_off", "error", ("deepspeed_overrides", "use_deepspeed"), message, fix)]
    findings = [*_unknown(overrides, KNOWN, ""), *wrong_values(overrides), *_unguarded(overrides), *_unscattered(config)]
    findings += wrong_names(config)
    stage = 3 if config.zero_stage == "auto" else config.zero_stage
    findings += useless(overrides, config.zero_stage, offload_of(config, stage))
    generated = _generated(config, world or 1)
    for path, name in COVERED.items():
        given = value_at(overrides, path)
        if given is None or (path == "train_batch_size" and world is None):
            continue
        finding = _contradiction(config, path, name, given, value_at(generated, path))
        findings += [finding] if finding else []
    return findings


def _unknown(block: Mapping[str, Any], known: Keys, path: str) -> list[Finding]:
    findings: list[Finding] = []
    for name, value in block.items():
        full = f"{path}{name}"
        if not path and name in REFUSED:
            message = f"deepspeed_overrides: {name} is refused"
            findings.append(Finding("deepspeed_refused", "error", ("deepspeed_overrides",), message, REFUSED[name]))
        elif name not in known:
            near = nearest(str(name), known)
            fix = f"did you mean {path}{near}?" if near else "known here: " + ", ".join(sorted(known)[:8]) + " …"
            message = f"deepspeed_overrides: {full}: DeepSpeed has no such key and would ignore it"
            findings.append(Finding("deepspeed_unknown", "error", ("deepspeed_overrides",), message, fix))
        elif isinstance(known[name], dict):
            if isinstance(value, Mapping):
                findings += _unknown(value, known[name], f"{full}.")
            else:
                message = f"deepspeed_overrides: {full} = {show(value)}: must be a block of keys"
                fix = f"write {full}: {{{next(iter(known[name]))}: …}}"
                findings.append(Finding("deepspeed_block", "error", ("deepspeed_overrides",), message, fix))
    return findings


def _unguarded(overrides: Mapping[str, Any]) -> list[Finding]:
    """Overrides that switch a guard off."""
    findings = []
    for path, reason in GUARDS.items():
        given = value_at(overrides, path)
        if given not in (None, True):
            message = f"deepspeed_overrides: {path} = {show(given)} is refused: {reason}"
            findings.append(Finding("deepspeed_guard", "error", ("deepspeed_overrides",), message, f"remove {path}"))
    return findings


def _unscattered(config: Config) -> list[Finding]:
    """DeepSpeed asserts on `reduce_scatter: false` where experts are spread over ranks."""
    given = value_at(config.deepspeed_overrides, "zero_optimization.reduce_scatter")
    if given in (None, True) or not config.use_moe or config.expert_parallel_size == 1:
        return []
    message = f"deepspeed_overrides: zero_optimization.reduce_scatter = {show(given)}: DeepSpeed asserts on it with experts"
    keys = ("deepspeed_overrides", "expert_parallel_size")
    return [Finding("deepspeed_experts", "error", keys, message, "remove it, or set expert_parallel_size=1")]


def _contradiction(config: Config, path: str, name: str, given: Any, generated: Any) -> Finding | None:
    value = getattr(config, name)
    if path.endswith(".enabled"):
        generated = bool(generated)
    if generated is None and path in ("log_level", "activation_checkpointing.partition_activations"):
        generated = value
    if given == generated and value != "auto":
        return None
    message = f"deepspeed_overrides: {path} = {show(given)} contradicts {name} = {show(value)}"
    fix = f"remove it from the overrides and set {name}"
    return Finding("deepspeed_contradiction", "error", ("deepspeed_overrides", name), message, fix)
