"""The values that DeepSpeed's settings take: a wrong one is said before the launch, where DeepSpeed would end the run.

Each was read in the source of DeepSpeed 0.19.8. Paths are those of its JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding, error, finding
from lumina_engine.config.machine import Machine
from lumina_engine.config.trackers import OF_DEEPSPEED, to_install


@dataclass(frozen=True, slots=True)
class Rule:
    """`must` ends the sentence "must be …"; `example` is a value that holds."""

    must: str
    holds: Callable[[Any], bool]
    example: Any


def _whole(least: int) -> Rule:
    """A whole number; written as 1e9 too, which YAML and JSON read as a float."""

    def holds(value: Any) -> bool:
        is_whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
        return is_whole and value >= least

    return Rule(f"a whole number, {least} or more", holds, max(1, least))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_FLAG = Rule("true or false", lambda value: isinstance(value, bool), True)
_TEXT = Rule("text", lambda value: isinstance(value, str), "name")
_OUTPUT = Rule("text or null", lambda value: value is None or isinstance(value, str), None)
_TEXTS = Rule("a list of texts", _texts, [])
_ANY_NUMBER = Rule("a number, 0 or more", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v >= 0, 0)
_DEPTH = Rule("a whole number, -1 or more", _whole(-1).holds, -1)
_DTYPES = ("fp32", "bf16", "fp16")
_DTYPE = Rule("one of " + ", ".join(_DTYPES), lambda value: value is None or value in _DTYPES, "fp32")


def _rules(rule: Rule, names: str, block: str = "") -> dict[str, Rule]:
    return {f"{block}.{name}" if block else name: rule for name in names.split()}


_ZERO, _HOST = "zero_optimization", "zero_optimization.offload_optimizer"
# DeepSpeed path → what its value must be. Settings that a key decides, or that are refused, have no rule here.
VALUES: dict[str, Rule] = {
    "steps_per_print": _whole(1),
    "communication_data_type": _DTYPE,
    **_rules(_FLAG, "dump_state disable_python_gc zero_allow_untested_optimizer wall_clock_breakdown memory_breakdown"),
    **_rules(
        _FLAG,
        "reduce_scatter use_multi_rank_bucket_allreduce stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
        "ignore_unused_parameters round_robin_gradients parameter_alignment zero_quantized_weights "
        "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear override_module_apply "
        "log_trace_cache_warnings enable_sanity_checks",
        _ZERO,
    ),
    **_rules(
        _whole(0),
        "sub_group_size stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
        "zero_hpz_partition_size",
        _ZERO,
    ),
    **_rules(_TEXTS, "classes names name_suffixes", f"{_ZERO}.leaf_module"),
    **_rules(_FLAG, "pin_memory pipeline_read pipeline_write fast_init", _HOST),
    **_rules(_whole(0), "buffer_count", _HOST),
    **_rules(_FLAG, "pin_memory", f"{_ZERO}.offload_param"),
    **_rules(_whole(0), "buffer_count buffer_size max_in_cpu", f"{_ZERO}.offload_param"),
    "torch_autocast.lower_precision_safe_modules": _TEXTS,
    **_rules(_FLAG, "enabled prof_all verbose debug", "comms_logger"),
    "comms_logger.prof_ops": _TEXTS,
    **_rules(_FLAG, "enabled detailed", "flops_profiler"),
    **_rules(_whole(1), "profile_step top_modules", "flops_profiler"),
    "flops_profiler.module_depth": _DEPTH,
    "flops_profiler.recompute_fwd_factor": _ANY_NUMBER,
    "flops_profiler.output_file": _OUTPUT,
    **_rules(_whole(1), "block_size queue_depth intra_op_parallelism", "aio"),
    **_rules(_FLAG, "single_submit overlap_events use_gds", "aio"),
    **_rules(_FLAG, "enabled synchronized", "timers.throughput"),
    **{f"{block}.enabled": _FLAG for block in ("tensorboard", "csv_monitor")},
    **{f"{block}.{name}": _TEXT for block in ("tensorboard", "csv_monitor") for name in ("output_path", "job_name")},
}
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def wrong_values(block: Mapping[str, Any], path: str = "") -> Iterator[Finding]:
    """An error for each override whose value DeepSpeed cannot take."""
    for name, value in block.items():
        full = f"{path}{name}"
        rule = VALUES.get(full)
        if rule is not None and not rule.holds(value):
            message = f"deepspeed_overrides: {full} = {show(value)}: must be {rule.must}"
            fix = f"set {full} to {show(rule.example)}, or remove it"
            yield finding("error", "deepspeed_value", "deepspeed_overrides", message, fix)
        elif isinstance(value, Mapping):
            yield from wrong_values(value, f"{full}.")


def quantized(overrides: Mapping[str, Any], machine: Machine, precision: str) -> Iterator[Finding]:
    """Errors that weights or gradients would be quantized where DeepSpeed cannot: on a CPU, and weights under autocast.

    `precision` is resolved.
    """
    zero = overrides.get(_ZERO)
    if not isinstance(zero, Mapping):
        return
    for name in _QUANTIZED:
        message = f"deepspeed_overrides: {_ZERO}.{name} = true"
        if zero.get(name) is True and not machine.devices:
            message += ": DeepSpeed quantizes on GPUs only, and there is none here"
            yield finding("error", "deepspeed_quantized", "deepspeed_overrides", message, "remove it")
        elif zero.get(name) is True and name == _QUANTIZED[0] and precision.startswith("mixed_"):
            message += f" with precision = {precision}: DeepSpeed asserts on it with autocast"
            fix = "remove it, or set precision=bf16"
            yield finding("error", "deepspeed_quantized", "deepspeed_overrides precision", message, fix)


def monitors(overrides: Mapping[str, Any]) -> Iterator[Finding]:
    """Errors that DeepSpeed cannot write records of its own here: a package is missing, or the folder cannot be made."""
    for name in ("tensorboard", "csv_monitor"):
        block = overrides.get(name)
        if not isinstance(block, Mapping) or block.get("enabled") is not True:
            continue
        install = to_install(name, OF_DEEPSPEED)
        if install:
            message = f"deepspeed_overrides: {name}.enabled = true: {install} is not installed here"
            yield error("deepspeed_monitor", "deepspeed_overrides", message, f"pip install {install}, or remove it")
        path = Path(block.get("output_path", "")) / block.get("job_name", "DeepSpeedJobName")
        reason = _no_folder(path)
        if reason:
            message = f"deepspeed_overrides: {name}.output_path: the folder {path} cannot be made: {reason}"
            yield error("deepspeed_monitor", "deepspeed_overrides", message, "name a folder that can be written to")


def _no_folder(path: Path) -> str:
    """Why no folder can be made there, or written to; "" if one can. Nothing is left behind."""
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryDirectory(dir=there):
            return ""
    except OSError as refused:
        return refused.strerror or str(refused)
