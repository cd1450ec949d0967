"""Rules between keys. Each gives findings; none stops at the first, so all problems come at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lumina_engine.config import model_checks, task_checks, training_checks
from lumina_engine.config.declare import show
from lumina_engine.config.deepspeed import check_overrides
from lumina_engine.config.deepspeed_values import monitors, quantized
from lumina_engine.config.expert_checks import expert_parallel
from lumina_engine.config.finding import ConfigError, Finding, error, finding
from lumina_engine.config.machine import Machine, gb_text
from lumina_engine.config.node_checks import nodes
from lumina_engine.config.offload_checks import offload, offload_machine
from lumina_engine.config.resolve import expert_ranks_findings, fp16_findings, resolved_precision, world_size
from lumina_engine.config.schema import Config, infos_of
from lumina_engine.config.switched_off import switched_off
from lumina_engine.config.trackers import to_install
from lumina_engine.config.training_checks import paths
from lumina_engine.secrets import looks_secret

Rule = Callable[[Config], Iterator[Finding]]


def check(config: Config, machine: Machine | None = None) -> list[Finding]:
    """All findings of a configuration: errors first, then warnings and infos.

    With a `machine` also what depends on it: whether the run fits its memory and disk, the number of its devices, whether data
    files exist. Without one the result depends on the configuration alone.
    """
    findings = [found for rule in _RULES for found in rule(config)]
    findings += check_overrides(config)
    if machine is not None and not any(f.severity == "error" for f in findings):
        findings += list(_machine(config, machine))
    rank = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda f: rank[f.severity])


def _secret(config: Config) -> Iterator[Finding]:
    """No key holds a secret: config.yaml is copied, compared and shown. The value itself is not repeated."""
    for name in infos_of(Config):
        value = getattr(config, name)
        texts = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
        if any(isinstance(text, str) and looks_secret(text) for text in texts):
            message = f"{name} holds a key or token, and a run's configuration is stored in plain text"
            yield error("secret", name, message, "keep it in the environment; Lumina itself needs none")


_RULES: tuple[Rule, ...] = (
    _secret,
    model_checks.attention,
    model_checks.shape,
    expert_parallel,
    model_checks.router,
    model_checks.rope,
    training_checks.tokenizer,
    training_checks.schedule,
    training_checks.curriculum,
    training_checks.data,
    training_checks.adaptive,
    task_checks.tasks,
    training_checks.precision,
    training_checks.deepspeed,
    training_checks.compile_rules,
    offload,
    switched_off,
    nodes,
)


def _machine(config: Config, machine: Machine) -> Iterator[Finding]:
    """What depends on the machine; only asked of a configuration that is sound by itself."""
    from lumina_engine.config.budget import budget

    devices = len(machine.devices)
    if devices and config.num_gpus != "auto" and config.num_gpus > devices:
        message = f"num_gpus = {config.num_gpus}: this machine has {devices}"
        yield error("num_gpus", "num_gpus", message, f"set num_gpus={devices} or auto")
    if config.use_moe and config.num_gpus == "auto":
        yield from expert_ranks_findings(config.expert_parallel_size, world_size(config, machine))
    yield from fp16_findings(config, machine)
    yield from offload_machine(config, machine)
    if config.use_deepspeed:
        yield from quantized(config.deepspeed_overrides, machine, resolved_precision(config, machine))
        yield from monitors(config.deepspeed_overrides)
    if not devices and config.communication_backend == "nccl":
        message = "communication_backend = nccl: no GPU here, gloo is used"
        yield finding("info", "nccl", "communication_backend", message, "set communication_backend=auto")
    if config.use_deepspeed and config.zero_stage == 0 and resolved_precision(config, machine) == "bf16" != config.precision:
        message = (
            "zero_stage = 0 with precision = auto, which is bf16 here: DeepSpeed runs a phantom optimizer step at the start"
        )
        yield error("bf16_stage0", "zero_stage precision", message, "set zero_stage=auto")
    yield from _trackers(config)
    for name, value in (task_checks.train_paths(config) | {"eval_data_path": config.eval_data_path}).items():
        for path in paths(value):
            if not any(c in path for c in "*?[") and "://" not in path and not Path(path).exists():
                message = f"{name}: {path}: no such file or folder"
                yield error("no_data", name.partition(".")[0], message, "give an existing file, folder or pattern")
    try:
        figures = budget(config, machine)
    except ConfigError as refused:
        yield from refused.findings
        return
    yield from _fits(figures, config.keep_checkpoints)


def _trackers(config: Config) -> Iterator[Finding]:
    """What each tracker needs must be installed before the run is made."""
    for name in config.trackers:
        install = to_install(name)
        if install:
            yield error("no_tracker", "trackers", f"trackers: {name} is not installed here", f"pip install {install}")


def _fits(figures: dict, keep: int) -> Iterator[Finding]:
    device, disk, host = figures["device"], figures["disk"], figures["host"]
    if device["total"] > device["limit"]:
        stage = figures["resolved"]["zero_stage"]
        message = (
            f"does not fit: {gb_text(device['total'])} per rank at ZeRO-{stage} (computed), "
            f"{gb_text(device['limit'])} of {gb_text(device['available'])} may be planned for"
        )
        yield error("does_not_fit", "batch_size num_gpus", message, "; or ".join(figures["advice"]))
    elif host["total"] > host["available"]:
        message = f"host memory: {gb_text(host['total'])} needed (computed), {gb_text(host['available'])} there"
        message += f", {gb_text(host['saving'])} of it while a checkpoint is saved" if host["saving"] else ""
        keys = "num_gpus batch_size async_save"
        yield finding("warning", "host_memory", keys, message, "; or ".join(figures["advice"]))
    if disk["available"] is not None and disk["total"] > disk["available"]:
        message = (
            f"disk: {disk['checkpoints']} checkpoints need {gb_text(disk['total'])}, {gb_text(disk['available'])} are free"
        )
        fewer = keep > 2 and disk["total"] - (keep - 2) * disk["checkpoint"] <= disk["available"]
        ways = "free some disk, set keep_checkpoints=2," if fewer else "free some disk"
        yield error("disk", "keep_checkpoints", message, f"{ways} or name another --runs folder")


def resume_findings(old: Config, new: Config, old_world: int, new_world: int) -> list[Finding]:
    """Why a run that was started with `old` cannot go on with `new`: keys that must not change, and the global batch.

    `old` has the values in force; an `auto` in `new` stands for them.
    """
    findings: list[Finding] = []
    for name, info in infos_of(Config).items():
        before, after = getattr(old, name), getattr(new, name)
        if before != after and after != "auto" and not info.resume_may_change:
            fix = f"leave it at {show(before)}, or start a new run"
            findings.append(error("resume", name, f"{name} = {show(after)}: cannot change in a resumed run", fix))
    was = old.batch_size * old.gradient_accumulation_steps * old_world
    now = new.batch_size * new.gradient_accumulation_steps * new_world
    if was != now:
        message = f"the global batch was {was} rows and would be {now}"
        fix = f"choose batch_size x gradient_accumulation_steps x ranks = {was}"
        findings.append(error("resume_batch", "batch_size gradient_accumulation_steps num_gpus", message, fix))
    return findings
