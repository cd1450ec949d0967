"""What `auto` means on a given machine. Derived values are computed here, at launch, and never earlier."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from lumina_engine.config.buckets import bucket_size, reduces_early
from lumina_engine.config.curriculum import Curriculum
from lumina_engine.config.finding import ConfigError, Finding
from lumina_engine.config.machine import Machine, gb_text
from lumina_engine.config.memory import Checkpoint, Layout, Memory, checkpoint_bytes, training_memory
from lumina_engine.config.micro_batch import candidates, split
from lumina_engine.config.offload import least_stage, offload_of
from lumina_engine.config.schema import Config, DeepSeekConfig
from lumina_engine.config.tokenizers import TOKENIZER_IDS

# Memory that a rank's Python, torch and DeepSpeed take: a guess, named in the budget's `basis`.
RANK_BYTES = 700_000_000
STAGES = (0, 1, 2, 3)
# With experts spread over ranks: stage 3 would gather the weights of experts that other ranks do not have.
MOST_STAGE_WITH_EXPERTS = 2
MOST_STAGE_COMPILED = 2  # weights that come and go cannot be compiled


def padded(ids: int) -> int:
    """Embedding rows for that many ids: the next multiple of 128."""
    return -(-ids // 128) * 128


def model_config(config: Config, tokenizer_vocab: int | None = None) -> DeepSeekConfig:
    """The model's part with every `auto` replaced.

    `tokenizer_vocab` is the tokenizer's highest id + 1. Without it the shipped tokenizers are known, and a vocabulary file is
    counted like gpt-4 (a guess, for budgets only).
    """
    model = DeepSeekConfig.from_config(config)
    if model.vocab_size == "auto":
        ids = tokenizer_vocab or TOKENIZER_IDS.get(config.tokenizer, TOKENIZER_IDS["gpt-4"])
        model.vocab_size = padded(ids)
    return model.resolved()


def ranks_per_node(config: Config, machine: Machine) -> int:
    """`num_gpus` as a number: all GPUs, or one process on a machine without."""
    return max(1, len(machine.devices)) if config.num_gpus == "auto" else config.num_gpus


def world_size(config: Config, machine: Machine) -> int:
    """Ranks over all nodes."""
    return ranks_per_node(config, machine) * config.num_nodes


def resolved_precision(config: Config, machine: Machine) -> str:
    """`precision` in force: auto is fp32 on CPU, bf16 where every GPU has it, else mixed_fp16."""
    if config.precision != "auto":
        return config.precision
    if not machine.devices:
        return "fp32"
    return "bf16" if all(d.bf16 for d in machine.devices) else "mixed_fp16"


def fp16_findings(config: Config, machine: Machine) -> list[Finding]:
    """The error that DeepSpeed is asked for fp16 weights on a CPU."""
    if not config.use_deepspeed or machine.devices or config.precision != "fp16":
        return []
    message = "precision = fp16 with use_deepspeed = true: DeepSpeed has no fp16 on a CPU"
    fix = "set precision=mixed_fp16, bf16 or fp32, or use_deepspeed=false"
    return [Finding("fp16_cpu", "error", ("precision", "use_deepspeed"), message, fix)]


def device_limit(config: Config, machine: Machine) -> tuple[int, int]:
    """Bytes of one device (host memory shared by the ranks on CPU), and the part of them that may be planned for."""
    if machine.devices:
        memory = min(d.memory_bytes for d in machine.devices)
    else:
        memory = machine.host_memory_bytes // ranks_per_node(config, machine)
    return memory, int(memory * config.target_memory_usage)


def most_stage(config: Config) -> int:
    """The highest ZeRO stage that this configuration allows."""
    if config.use_moe and config.expert_parallel_size > 1:
        return MOST_STAGE_WITH_EXPERTS
    return MOST_STAGE_COMPILED if config.compile else STAGES[-1]


@dataclass(frozen=True, slots=True)
class StageChoice:
    """A ZeRO stage, why it was taken, and whether its memory fits."""

    stage: int
    reason: str
    fits: bool


def layout_of(config: Config, machine: Machine, stage: int, world: int | None = None) -> Layout:
    """The layout of a run at a given stage."""
    places = offload_of(config, stage)
    on_cpu = not machine.devices
    reduction = _reduction(config, stage, on_cpu)
    return Layout(
        batch_size=config.batch_size,
        seq_length=config.seq_length,
        precision=resolved_precision(config, machine),
        world=world or world_size(config, machine),
        zero_stage=stage,
        use_deepspeed=config.use_deepspeed,
        offload_optimizer=places.optimizer == "cpu",
        offload_parameters=places.parameters == "cpu",
        nvme_optimizer=places.optimizer == "nvme",
        nvme_parameters=places.parameters == "nvme",
        accumulates=config.gradient_accumulation_steps > 1,
        reduce_bucket_size=reduction["reduce_bucket_size"],
        prefetch_bucket_size=config.stage3_prefetch_bucket_size,
        overlap_comm=bool(reduction["overlap_comm"]),
        contiguous_gradients=bool(reduction["contiguous_gradients"]),
        on_cpu=on_cpu,
    )


def choose_stage(config: Config, machine: Machine, model: DeepSeekConfig, world: int | None = None) -> StageChoice:
    """The ZeRO stage: the configured one, or for `auto` the smallest whose memory fits (R24).

    bf16 and fp16 start at stage 1, because DeepSpeed runs a phantom optimizer step with them at stage 0; offload starts where
    it is possible; experts spread over ranks end at stage 2. One rank has nothing to split, so it takes the first stage.
    """
    _, limit = device_limit(config, machine)
    ranks = world or world_size(config, machine)
    if not config.use_deepspeed:
        fits = training_memory(model, layout_of(config, machine, 0, ranks)).total <= limit
        return StageChoice(0, "plain torch splits nothing", fits)
    if config.zero_stage != "auto":
        fits = training_memory(model, layout_of(config, machine, config.zero_stage, ranks)).total <= limit
        return StageChoice(config.zero_stage, "configured", fits)
    least, reason = least_stage(config)
    if least == 0 and resolved_precision(config, machine) in ("bf16", "fp16"):
        least, reason = 1, f"{resolved_precision(config, machine)} needs stage 1"
    allowed = [s for s in STAGES if least <= s <= most_stage(config)] or [least]
    for stage in allowed if ranks > 1 else allowed[:1]:
        layout = layout_of(config, machine, stage, ranks)
        if training_memory(model, layout).total <= limit:
            return StageChoice(stage, _reason(stage, least, ranks, reason), True)
    last = allowed[-1] if ranks > 1 else allowed[0]
    return StageChoice(last, "the highest there is, and still too large", False)


def _reason(stage: int, least: int, ranks: int, least_reason: str) -> str:
    if stage > least:
        return f"the smallest stage that fits {ranks} devices"
    return least_reason or ("one rank has nothing to split" if ranks == 1 else "fits without splitting")


def plannable(config: Config, machine: Machine, model: DeepSeekConfig, ranks: int) -> Config:
    """The configuration to plan with: `dynamic_batching` may lower the micro batch, so the least it may choose has to fit.

    That one is taken only where the configured micro batch does not fit.
    """
    if not config.dynamic_batching or choose_stage(config, machine, model, ranks).fits:
        return config
    sizes = candidates(config)
    return config.model_copy(update=split(config, sizes[0])) if sizes else config


def host_memory(config: Config, machine: Machine, memory: Memory, saved: Checkpoint) -> dict[str, int]:
    """Host memory of one node in bytes, that of rank 0. On CPU the devices' share lies in it too.

    `saving` is what a save takes beside training: with `async_save` a copy of the checkpoint, kept until it is written; and
    what is put together in host memory before, at a time when a CPU holds neither activations nor gradients.
    """
    ranks = ranks_per_node(config, machine)
    free = 0 if machine.devices else (memory.total - memory.weights - memory.optimizer) * ranks
    parts = {
        "processes": RANK_BYTES * ranks,
        "offload": memory.host * ranks,
        "training": 0 if machine.devices else memory.total * ranks,
        "saving": max(0, saved.gathered + saved.fetched * ranks - free)
        + (saved.weights + saved.state * ranks if config.async_save else 0),
    }
    return parts | {"total": sum(parts.values()), "available": machine.host_memory_bytes}


def fits_memory(config: Config, machine: Machine, model: DeepSeekConfig, ranks: int) -> bool:
    """Whether a run fits the memory of its devices and of its hosts."""
    config = plannable(config, machine, model, ranks)
    choice = choose_stage(config, machine, model, ranks)
    layout = layout_of(config, machine, choice.stage, ranks)
    host = host_memory(config, machine, training_memory(model, layout), checkpoint_bytes(model, layout))
    return choice.fits and host["total"] <= host["available"]


def resolve(config: Config, machine: Machine, *, tokenizer_vocab: int, world: int | None = None) -> Config:
    """A copy of `config` in which every `auto` is the value in force.

    `warmup_steps` and `experiment_name` stay: they need the length of the data and the moment of the start. So do
    `data_format`, which is found out for each file, `master_port` of one machine, which each start finds, and what is switched
    off: lengths without a curriculum, how gradients are reduced where DeepSpeed splits nothing, `allgather_bucket_size` at
    stage 3.

    Raises:
        ConfigError: the vocabulary is too small for the tokenizer, or the run does not fit the devices.
    """
    ranks = world or world_size(config, machine)
    findings = vocabulary_findings(config, tokenizer_vocab) + fp16_findings(config, machine)
    if config.use_moe:
        findings += expert_ranks_findings(config.expert_parallel_size, ranks)
    if findings:
        raise ConfigError(findings)
    model = model_config(config, tokenizer_vocab)
    config = plannable(config, machine, model, ranks)
    choice = choose_stage(config, machine, model, ranks)
    if not choice.fits:
        raise ConfigError([does_not_fit(config, machine, model, choice, ranks)])
    changes = {name: getattr(model, name) for name in _MODEL_AUTO}
    changes |= {
        "zero_stage": choice.stage,
        "precision": resolved_precision(config, machine),
        "num_gpus": max(1, ranks // config.num_nodes) if config.num_gpus == "auto" else config.num_gpus,
        "launcher": _launcher(config),
        "communication_backend": _backend(config, machine),
        "master_addr": "127.0.0.1" if config.master_addr == "auto" and config.num_nodes == 1 else config.master_addr,
    }
    if config.use_deepspeed and choice.stage > 0:
        changes |= _reduction(config, choice.stage, not machine.devices)
    if config.curriculum_learning:
        lengths = Curriculum.of(config).lengths
        changes |= {"min_seq_length": lengths[0], "max_seq_length": lengths[-1]}
    return Config(**(config.to_dict(sectioned=False) | changes))


_REDUCTION = ("overlap_comm", "contiguous_gradients", "allgather_bucket_size", "reduce_bucket_size")
_MODEL_AUTO = ("vocab_size", "head_dim", "intermediate_size", "dense_intermediate_size", "router_normalize")


def _reduction(config: Config, stage: int, on_cpu: bool) -> dict[str, int | bool]:
    """How gradients are reduced at a stage that splits something. Stage 3 gathers weights by keys of its own."""
    sizes = ("reduce_bucket_size",) if stage == 3 else ("allgather_bucket_size", "reduce_bucket_size")
    switches = ("overlap_comm", "contiguous_gradients")
    offloads = offload_of(config, stage).optimizer != "device"
    early = {
        name: reduces_early(
            getattr(config, name), stage, on_cpu=on_cpu, expert_ranks=config.expert_parallel_size, offloads=offloads
        )
        for name in switches
    }
    return early | {name: bucket_size(getattr(config, name), on_cpu) for name in sizes}


def left_to_auto(config: Config) -> Config:
    """The resolved `config` of a run with "auto" where its reduction is what auto gave: another stage or device has another.

    The keys that have an effect count together: where one differs from what auto gives on a CPU and on a GPU, somebody chose
    them. Without DeepSpeed and at stage 0 none has an effect, at stage 3 all but `allgather_bucket_size`.
    """
    free = config.model_copy(update=dict.fromkeys(_REDUCTION, "auto"))
    stage = int(config.zero_stage) if config.use_deepspeed and config.zero_stage != "auto" else 0
    by_auto = [_reduction(free, stage, on_cpu) for on_cpu in (True, False)] if stage else [{}]
    stored = {name: getattr(config, name) for name in by_auto[0]}
    return free if stored in by_auto else config


def _launcher(config: Config) -> str:
    """Lumina starts the ranks of one machine itself; others are reached by hostfile, or started by hand."""
    if config.launcher != "auto":
        return config.launcher
    if config.num_nodes == 1:
        return "none"
    return "torchrun" if config.node_rank is not None else "deepspeed"


def _backend(config: Config, machine: Machine) -> str:
    """nccl needs GPUs: without any it becomes gloo, which `checks` says once."""
    if config.communication_backend == "gloo" or not machine.devices:
        return "gloo"
    return "nccl"


def vocabulary_findings(config: Config, tokenizer_vocab: int) -> list[Finding]:
    """The error that `vocab_size` has fewer rows than the tokenizer has ids."""
    if config.vocab_size == "auto" or config.vocab_size >= tokenizer_vocab:
        return []
    message = f"vocab_size = {config.vocab_size:,}: {config.tokenizer} has {tokenizer_vocab:,} ids"
    fix = f"set vocab_size=auto ({padded(tokenizer_vocab):,})"
    return [Finding("vocab_too_small", "error", ("vocab_size", "tokenizer"), message, fix)]


def expert_ranks_findings(size: int, ranks: int) -> list[Finding]:
    """The error that the ranks cannot be cut into groups of `expert_parallel_size`."""
    if ranks % size == 0:
        return []
    message = f"expert_parallel_size = {size}: does not divide the number of ranks, {ranks}"
    fix = f"set num_gpus={size * max(1, ranks // size)} or expert_parallel_size={gcd(size, ranks)}"
    return [Finding("expert_ranks", "error", ("expert_parallel_size", "num_gpus"), message, fix)]


def does_not_fit(config: Config, machine: Machine, model: DeepSeekConfig, choice: StageChoice, ranks: int) -> Finding:
    """The error for a run whose memory is larger than its devices, with the changes that would make it fit."""
    need = training_memory(model, layout_of(config, machine, choice.stage, ranks)).total
    memory, limit = device_limit(config, machine)
    place = "device" if machine.devices else "process"
    message = (
        f"needs {gb_text(need)} per {place} at ZeRO-{choice.stage} (computed), but only {gb_text(limit)} of {gb_text(memory)} "
        "may be planned for"
    )
    from lumina_engine.config.advice import advice

    found = advice(config, machine, model, ranks)
    return Finding("does_not_fit", "error", ("batch_size", "num_gpus"), message, "; or ".join(found))
