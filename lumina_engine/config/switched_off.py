"""Keys that were set although what they belong to is switched off: said, so that nobody waits for their effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lumina_engine.config.declare import show
from lumina_engine.config.deepspeed import STAGE_3_KEYS
from lumina_engine.config.finding import Finding, finding
from lumina_engine.config.keys_model import ExpertKeys
from lumina_engine.config.schema import Config, infos_of


@dataclass(frozen=True)
class Switch:
    """`keys` have no effect while `off` holds, which `key` = its value causes; `fix` switches them on."""

    key: str
    off: Callable[[Config], bool]
    fix: str
    keys: tuple[str, ...]


# of the experts, but those with rules of their own
_EXPERTS = tuple(
    name
    for name in ExpertKeys.model_fields
    if name not in ("use_moe", "expert_parallel_size", "overlap_alltoall", "capacity_factor", "router_normalize")
)
_SPLIT = ("overlap_comm", "contiguous_gradients", "allgather_bucket_size", "reduce_bucket_size")
SWITCHES = (
    Switch("use_moe", lambda c: not c.use_moe, "use_moe=true", (*_EXPERTS, "capacity_factor", "expert_log_interval")),
    Switch(
        "num_dense_layers", lambda c: c.use_moe and not c.num_dense_layers, "num_dense_layers=1", ("dense_intermediate_size",)
    ),
    Switch("lr_schedule", lambda c: c.lr_schedule != "wsd", "lr_schedule=wsd", ("decay_ratio",)),
    Switch("lr_schedule", lambda c: c.lr_schedule == "constant", "lr_schedule=cosine", ("min_lr_ratio",)),
    Switch("adaptive", lambda c: c.adaptive == "off", "adaptive=advise", ("early_stopping_gain",)),
    Switch("dynamic_batching", lambda c: not c.dynamic_batching, "dynamic_batching=true", ("min_batch_size", "max_batch_size")),
    Switch(
        "curriculum_learning",
        lambda c: not c.curriculum_learning,
        "curriculum_learning=true",
        ("min_seq_length", "max_seq_length", "curriculum_steps"),
    ),
    Switch("use_deepspeed", lambda c: not c.use_deepspeed, "use_deepspeed=true", (*_SPLIT, "deepspeed_log_level")),
    Switch("zero_stage", lambda c: c.use_deepspeed and c.zero_stage == 0, "zero_stage=1", _SPLIT),
    Switch("zero_stage", lambda c: c.use_deepspeed and c.zero_stage == 3, "zero_stage=2", ("allgather_bucket_size",)),
    Switch("use_deepspeed", lambda c: not c.use_deepspeed, "use_deepspeed=true", STAGE_3_KEYS),
    Switch("zero_stage", lambda c: c.use_deepspeed and c.zero_stage in (0, 1, 2), "zero_stage=3", STAGE_3_KEYS),
)


def switched_off(config: Config) -> Iterator[Finding]:
    """An info for each key with a value of its own that does nothing."""
    infos = infos_of(Config)
    for switch in SWITCHES:
        for name in switch.keys if switch.off(config) else ():
            value, default = getattr(config, name), infos[name].default
            if value not in (default, "auto"):
                message = f"{name} = {show(value)} has no effect with {switch.key} = {show(getattr(config, switch.key))}"
                fix = f"set {switch.fix}, or {name}={show(default)}"
                yield finding("info", "switched_off", f"{name} {switch.key}", message, fix)
