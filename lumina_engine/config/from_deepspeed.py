"""A DeepSpeed dictionary → Config: keys that a field covers become that field, the others stay as checked overrides."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from lumina_engine.config.declare import show
from lumina_engine.config.finding import ConfigError, Finding, has_errors
from lumina_engine.config.schema import Config

_ABSENT = object()
# DeepSpeed path → key with the same values.
_SAME = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.overlap_comm": "overlap_comm",
    "zero_optimization.contiguous_gradients": "contiguous_gradients",
    "zero_optimization.allgather_bucket_size": "allgather_bucket_size",
    "zero_optimization.reduce_bucket_size": "reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold": "stage3_param_persistence_threshold",
    "activation_checkpointing.partition_activations": "partition_activations",
}
_WHOLE = ("allgather_bucket_size", "reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
_OFFLOAD = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
# What Lumina would write itself beside the fields, so that its own deepspeed.json can be read back.
_IMPLIED = {"steps_per_print": 1_000_000_000, "wall_clock_breakdown": False, "zero_force_ds_cpu_optimizer": False}
_OPTIMIZER = {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_eps"}


def config_from_deepspeed(given: Mapping[str, Any], world: int = 1) -> Config:
    """The `Config` that gives this DeepSpeed configuration on `world` ranks; other keys have their defaults.

    `train_batch_size` = micro batch x accumulation x `world`: with all given they must agree, with one missing it follows.

    Raises:
        ConfigError: an unknown or refused key (with the nearest name), contradicting blocks, a bad value; all of them at once.
    """
    rest = deepcopy(dict(given))
    findings: list[Finding] = []
    values: dict[str, Any] = {}
    for path, name in _SAME.items():
        value = _take(rest, path)
        if value is not _ABSENT and value != "auto":
            values[name] = int(value) if name in _WHOLE and isinstance(value, float) and value.is_integer() else value
    _batch(rest, world, values, findings)
    _precision(rest, values, findings)
    _offload(rest, values)
    _adamw(rest, values, findings)
    for name, value in _IMPLIED.items():
        if rest.get(name, _ABSENT) == value:
            del rest[name]
    values["deepspeed_overrides"] = {name: block for name, block in rest.items() if block != {}}
    try:
        config = Config(**values)
    except ConfigError as error:
        raise ConfigError([*findings, *error.findings]) from None
    from lumina_engine.config.deepspeed import check_overrides

    findings += check_overrides(config, world)
    if has_errors(findings):
        raise ConfigError(findings)
    return config


def _take(block: dict[str, Any], path: str) -> Any:
    """Remove and return what stands at a path; `_ABSENT` if nothing does."""
    *outer, last = path.split(".")
    for name in outer:
        inner = block.get(name)
        if not isinstance(inner, dict):
            return _ABSENT
        block = inner
    return block.pop(last, _ABSENT)


def _error(code: str, keys: str, message: str, fix: str) -> Finding:
    return Finding(code, "error", tuple(keys.split()), message, fix)


def _given(value: Any) -> str:
    """A wrong value; text in quotes and floats with their point, since '4' and 4.0 are wrong where 4 is not."""
    return repr(value) if isinstance(value, str | float) else show(value)


def _batch(rest: dict[str, Any], world: int, values: dict[str, Any], findings: list[Finding]) -> None:
    total = _take(rest, "train_batch_size")
    micro, steps = values.get("batch_size"), values.get("gradient_accumulation_steps")
    given = {
        "train_batch_size": None if total is _ABSENT or total == "auto" else total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    wrong = {name: value for name, value in given.items() if value is not None and not _is_whole(value)}
    for name, value in wrong.items():
        values.pop(_SAME.get(name, name), None)
        message = f"{name} = {_given(value)}: must be a whole number"
        findings.append(_error("batch_triangle", _SAME.get(name, "batch_size"), message, f"set {name} to a number or auto"))
    if wrong or given["train_batch_size"] is None:
        return
    known = (micro or 1) * (steps or 1) * world
    if total % known or (micro and steps and total != known):
        parts = f"micro {micro or '?'} x accumulation {steps or '?'} x {world} ranks"
        message = f"train_batch_size = {total:,}: is not {parts}"
        findings.append(_error("batch_triangle", "batch_size gradient_accumulation_steps", message, "make them agree"))
    elif micro is None:
        values["batch_size"] = total // known
        values.setdefault("gradient_accumulation_steps", 1)
    elif steps is None:
        values["gradient_accumulation_steps"] = total // known


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _precision(rest: dict[str, Any], values: dict[str, Any], findings: list[Finding]) -> None:
    enabled = {name: _enabled(rest, name, findings) for name in ("bf16", "fp16", "torch_autocast")}
    on = [name for name, value in enabled.items() if value is True]
    dtype = _take(rest, "torch_autocast.dtype")
    if dtype not in (_ABSENT, None, "auto") and enabled["torch_autocast"] is None:
        message = (
            f"torch_autocast.dtype = {_given(dtype)}: whether autocast is enabled is left open, so no precision has that type"
        )
        fix = "set torch_autocast.enabled to true, or remove the dtype"
        findings.append(_error("precision_blocks", "precision", message, fix))
    if _take(rest, "torch_autocast.lower_precision_safe_modules") not in (_ABSENT, None, []):
        message = "torch_autocast.lower_precision_safe_modules: Lumina decides what is computed in which type"
        findings.append(_error("deepspeed_useless", "precision", message, "remove it"))
    for name in ("loss_scale", "hysteresis"):  # what Lumina writes itself
        if isinstance(rest.get("fp16"), dict) and rest["fp16"].get(name) == {"loss_scale": 0, "hysteresis": 1}[name]:
            del rest["fp16"][name]
    if len(on) > 1:
        message = f"{' and '.join(on)} are both enabled: one precision is possible"
        findings.append(_error("precision_blocks", "precision", message, "enable one of them"))
    elif on == ["torch_autocast"]:
        short = {"bfloat16": "mixed_bf16", "float16": "mixed_fp16", "bf16": "mixed_bf16", "fp16": "mixed_fp16"}
        name = str(dtype if dtype is not _ABSENT else "bfloat16").removeprefix("torch.")
        values["precision"] = short.get(name, name)
    elif on:
        values["precision"] = on[0]
    elif None not in enabled.values():
        values["precision"] = "fp32"  # what DeepSpeed does without such a block


def _enabled(rest: dict[str, Any], name: str, findings: list[Finding]) -> bool | None:
    """Whether a block of precision is enabled; None for `auto`, and for what is neither, which is an error."""
    value = _take(rest, f"{name}.enabled")
    if value is _ABSENT:
        return False
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if value != "auto":
        message = f"{name}.enabled = {_given(value)}: must be true, false or auto"
        findings.append(_error("precision_blocks", "precision", message, f"set {name}.enabled to true or false"))
    return None


def _offload(rest: dict[str, Any], values: dict[str, Any]) -> None:
    zero = rest.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    for block, what in _OFFLOAD.items():
        inner = zero.get(block)
        if not isinstance(inner, dict):
            continue
        device = _take(rest, f"zero_optimization.{block}.device")
        path = _take(rest, f"zero_optimization.{block}.nvme_path")
        if device == "cpu":
            values[f"cpu_offload_{what}"] = True
        elif device == "nvme":
            values[f"nvme_offload_{what}"] = True
            if path is not _ABSENT and path is not None:
                values["nvme_path"] = str(path)
        elif device not in (_ABSENT, "none", None):
            inner["device"] = device  # left for the check of overrides
        if not inner:
            del zero[block]


def _adamw(rest: dict[str, Any], values: dict[str, Any], findings: list[Finding]) -> None:
    """An optimizer block that says AdamW says what fields say; any other is left, and refused by name."""
    block = rest.get("optimizer")
    if not isinstance(block, dict) or block.get("type") != "AdamW" or not isinstance(block.get("params"), dict):
        return
    params = dict(block["params"])
    params.pop("torch_adam", None)
    betas = params.pop("betas", "auto")
    known = {_OPTIMIZER[name]: params.pop(name) for name in list(params) if name in _OPTIMIZER}
    if params:
        return
    values |= {name: value for name, value in known.items() if value != "auto"}
    if isinstance(betas, list | tuple) and len(betas) == 2:
        values["adam_beta1"], values["adam_beta2"] = betas
    elif betas != "auto":
        message = f"optimizer.params.betas = {_given(betas)}: must be a list of two numbers"
        findings.append(_error("adam_betas", "adam_beta1 adam_beta2", message, "give two numbers, such as [0.9, 0.95]"))
    del rest["optimizer"]
