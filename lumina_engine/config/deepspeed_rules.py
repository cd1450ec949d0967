"""Settings of DeepSpeed that do nothing here, or that it asserts on once training has begun: refused before (R19).

Each was read in the source of DeepSpeed 0.19.8. Paths are those of its JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lumina_engine.config.declare import show
from lumina_engine.config.deepspeed_values import VALUES
from lumina_engine.config.finding import Finding
from lumina_engine.config.offload import Offload

_SCALE = "the loss scale of fp16 is Lumina's: remove it"
_CHECKPOINTS = "Lumina writes and reads its own checkpoints: remove it"
_RECOMPUTE = "only deepspeed.checkpointing reads it, which Lumina does not use: set gradient_checkpointing"
_OPTIMIZER = "it needs DeepSpeed's own CPU Adam, and Lumina passes torch's: remove it"
_DATA = "Lumina loads its own data: remove it"
_MASTERS = "it needs DeepSpeed's own CPU Adam; Lumina keeps fp32 masters: remove it"
_GRANULARITY = (
    "where it takes the whole model for one module, weights are split again before the backward pass has used them: "
    "set leaf_module.classes instead"
)

# DeepSpeed path → why no value of it is accepted.
NO_EFFECT = {
    "managed_gradient_accumulation": "Lumina tells DeepSpeed of every micro batch: set gradient_accumulation_steps",
    "prescale_gradients": "ZeRO-3 asserts on it, and the gradients of Lumina are means already: remove it",
    "gradient_predivide_factor": "ZeRO-3 asserts on it, and the gradients of Lumina are means already: remove it",
    "dataloader_drop_last": _DATA,
    "sequence_parallel_size": "Lumina has no sequence parallelism: remove it",
    "seq_parallel_communication_data_type": "Lumina has no sequence parallelism: remove it",
    "vocabulary_size": "only DeepSpeed's tuner reads it: remove it",
    "weight_quantization": "it serves inference only: remove it",
    "disable_allgather": "nothing in DeepSpeed reads it: remove it",
    "zero_optimization.allgather_partitions": "nothing in DeepSpeed acts on it: remove it",
    "data_types.grad_accum_dtype": "DeepSpeed takes another optimizer with it, or none; precision decides the dtype of the "
    "gradients: set precision",
    "data_types.buffer_dtype": "the routers' bias must stay in fp32, or its small updates round to nothing: remove it",
    "data_types.keep_in_fp32_modules": "it keeps buffers in fp32, and Lumina's stay in fp32 anyway: remove it",
    "data_types.param_dtype": "precision decides the dtype of the weights: set precision",
    "fp16.auto_cast": "only DeepSpeed's pipeline reads it: set precision=mixed_fp16",
    "fp16.loss_scale": _SCALE,
    "fp16.initial_scale_power": _SCALE,
    "fp16.loss_scale_window": _SCALE,
    "fp16.hysteresis": _SCALE,
    "fp16.consecutive_hysteresis": _SCALE,
    "fp16.min_loss_scale": _SCALE,
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_optimizer_states": _MASTERS,
    "bf16.immediate_grad_update": "only DeepSpeed's bf16 optimizer without ZeRO reads it: remove it",
    "activation_checkpointing.contiguous_memory_optimization": _RECOMPUTE,
    "activation_checkpointing.cpu_checkpointing": _RECOMPUTE,
    "activation_checkpointing.number_checkpoints": _RECOMPUTE,
    "activation_checkpointing.synchronize_checkpoint_boundary": _RECOMPUTE,
    "activation_checkpointing.profile": _RECOMPUTE,
    "zero_optimization.zenflow": "it needs CUDA and DeepSpeed's own optimizer: remove it",
    "zero_optimization.offload_optimizer.ratio": _OPTIMIZER,
    "zero_optimization.offload_optimizer.super_offload": _OPTIMIZER,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _OPTIMIZER,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "Lumina's optimizer is AdamW: remove it",
    "zero_optimization.stage3_module_granularity_threshold": _GRANULARITY,
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.legacy_stage1": "DeepSpeed removed it: remove it",
    "zero_optimization.cpu_offload_use_pin_memory": "DeepSpeed renamed it: set offload_optimizer.pin_memory",
}
# DeepSpeed path → the only value that is accepted, and why.
ONLY: dict[str, tuple[Any, str]] = {
    "gradient_allreduce_op": (
        "mean",
        "Lumina's losses are shares that DeepSpeed's mean puts together; with another reduction every gradient is too large: "
        "remove it",
    ),
    "zero_force_ds_cpu_optimizer": (False, _OPTIMIZER),
}
# Read at stage 3 only; below it DeepSpeed says nothing and does nothing.
STAGE_3_ONLY = (
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "sub_group_size",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "memory_efficient_linear",
    "leaf_module",
)


def useless(overrides: Mapping[str, Any], stage: int | str, places: Offload) -> Iterator[Finding]:
    """An error for each override that would do nothing, be wrong, or end the run later. `places` are those at stage 3 where the
    stage is auto."""
    for path, reason in NO_EFFECT.items():
        if (given := value_at(overrides, path)) is not None:
            yield _refused(path, given, reason)
    for path, (only, reason) in ONLY.items():
        given = value_at(overrides, path)
        if given is not None and (given != only or type(given) is not type(only)):
            yield _refused(path, given, reason)
    if (given := value_at(overrides, "aio")) is not None and not places.nvme:
        reason = "only offload to disk reads it: set nvme_offload_optimizer=true, or remove it"
        yield _refused("aio", given, reason)
    yield from _not_offloaded(overrides, places)
    for name in STAGE_3_ONLY:
        path = f"zero_optimization.{name}"
        given = value_at(overrides, path)
        if given is not None and stage in (0, 1, 2):
            yield _refused(path, given, f"zero_stage = {stage} does not read it: set zero_stage=3, or remove it")
        elif given is not None and name == "sub_group_size" and places.optimizer == "nvme":
            yield _refused(path, given, "with nvme_offload_optimizer DeepSpeed corrupts gradients in larger groups: remove it")


def _not_offloaded(overrides: Mapping[str, Any], places: Offload) -> Iterator[Finding]:
    """An error for each block that says how to offload what stays on the device."""
    blocks = (
        ("offload_optimizer", places.optimizer, "cpu_offload_optimizer"),
        ("offload_param", places.parameters, "cpu_offload_parameters"),
    )
    for block, place, key in blocks:
        path = f"zero_optimization.{block}"
        given = value_at(overrides, path)
        if place == "device" and isinstance(given, Mapping) and any(f"{path}.{name}" in VALUES for name in given):
            yield _refused(path, given, f"nothing of that is offloaded: set {key}=true, or remove it")


def _refused(path: str, given: Any, reason: str) -> Finding:
    cause, _, fix = reason.rpartition(": ")
    message = f"deepspeed_overrides: {path} = {show(given)} is refused: {cause}"
    return Finding("deepspeed_useless", "error", ("deepspeed_overrides",), message, fix)


def value_at(block: Any, path: str) -> Any:
    """The value at a dotted path of nested blocks, None where there is none."""
    for name in path.split("."):
        if not isinstance(block, Mapping) or name not in block:
            return None
        block = block[name]
    return block
