"""Rules between keys. Each gives findings; none stops at the first, so all problems come at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lumina_engine.config.curriculum import bounds, row_lengths
from lumina_engine.config.declare import show
from lumina_engine.config.deepspeed import STAGE_3_KEYS, check_overrides
from lumina_engine.config.expert_checks import expert_parallel
from lumina_engine.config.finding import ConfigError, Finding, Severity, nearest
from lumina_engine.config.machine import Machine, gb_text
from lumina_engine.config.micro_batch import candidates, rows_of_a_rank
from lumina_engine.config.offload_checks import offload, offload_machine
from lumina_engine.config.resolve import (
    TOKENIZER_IDS,
    expert_ranks_findings,
    fp16_findings,
    resolved_precision,
    vocabulary_findings,
    world_size,
)
from lumina_engine.config.schema import Config, infos_of

# Keys whose feature does not exist yet, with the values that are allowed meanwhile (None: only the default).
NOT_YET: dict[str, tuple[object, ...] | None] = {
    "data_format": ("auto", "messages", "alpaca", "sharegpt", "text"),
    "streaming_threshold_gb": None,
    "multi_task": None,
    "task_weights": None,
    "task_data_paths": None,
    "task_temperature": None,
    "task_max_epochs": None,
    "launcher": ("auto", "torchrun", "none"),
    "num_nodes": None,
    "node_rank": None,
    "hostfile": None,
    "hang_timeout_s": None,
    "hang_factor": None,
    "startup_timeout_s": None,
    "checkpoint_compression": None,
    "trackers": None,
    "alert_command": None,
    "adaptive": ("off", "advise"),
    "expert_growth": ("off", "advise"),
    "lr_multiplier_min": None,
    "adaptive_cooldown_steps": None,
    "max_adaptive_actions": None,
    "max_num_experts": None,
}

Rule = Callable[[Config], Iterator[Finding]]


def check(config: Config, machine: Machine | None = None) -> list[Finding]:
    """All findings of a configuration: errors first, then warnings and infos.

    With a `machine` also what depends on it: whether the run fits its memory and disk, the number of its devices, whether data
    files exist. Without one the result depends on the configuration alone.
    """
    findings = [finding for rule in _RULES for finding in rule(config)]
    findings += check_overrides(config)
    if machine is not None and not any(f.severity == "error" for f in findings):
        findings += list(_machine(config, machine))
    rank = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda f: rank[f.severity])


def _finding(severity: Severity, code: str, keys: str, message: str, fix: str) -> Finding:
    return Finding(code, severity, tuple(keys.split()), message, fix)


def _error(code: str, keys: str, message: str, fix: str) -> Finding:
    return _finding("error", code, keys, message, fix)


def _not_yet(config: Config) -> Iterator[Finding]:
    for name, allowed in NOT_YET.items():
        value, info = getattr(config, name), infos_of(Config)[name]
        ok = value == info.default if allowed is None else any(value == a and type(value) is type(a) for a in allowed)
        if not ok:
            fix = f"set {show(info.default)}" if allowed is None else "set " + " or ".join(show(a) for a in allowed)
            yield _error("not_yet", name, f"{name} = {show(value)}: not available yet", fix)


_LATENT_KEYS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _attention(config: Config) -> Iterator[Finding]:
    yield from _latent(config) if config.attention == "mla" else _grouped(config)
    window = config.sliding_window
    if window is not None and window >= config.seq_length:
        message = f"sliding_window = {window:,} hides nothing in rows of seq_length = {config.seq_length:,}"
        yield _finding("info", "window", "sliding_window seq_length", message, "set sliding_window=null, or a smaller one")


def _grouped(config: Config) -> Iterator[Finding]:
    hidden, heads, kv = config.hidden_size, config.num_heads, config.num_kv_heads
    if config.head_dim == "auto":
        if hidden % heads:
            near = max(64, round(hidden / heads) * heads)
            message = f"hidden_size = {hidden:,}: not a multiple of num_heads = {heads}"
            yield _error("heads", "hidden_size num_heads", message, f"set hidden_size={near} or head_dim")
        elif (hidden // heads) % 2 or hidden // heads < 8:
            message = f"num_heads = {heads}: heads of {hidden // heads} values; rotary positions need an even number from 8 on"
            yield _error("head_dim", "num_heads hidden_size", message, f"set num_heads={max(1, hidden // 64)}")
    if heads % kv:
        divisor = max(d for d in range(1, min(kv, heads) + 1) if heads % d == 0)
        message = f"num_kv_heads = {kv}: does not divide num_heads = {heads}"
        yield _error("kv_heads", "num_kv_heads num_heads", message, f"set num_kv_heads={divisor}")
    for name in _LATENT_KEYS:
        default = infos_of(Config)[name].default
        if getattr(config, name) != default:
            message = f"{name} = {show(getattr(config, name))} has no effect with attention = gqa"
            yield _error("latent_keys", f"{name} attention", message, f"set attention=mla, or {name}={show(default)}")


def _latent(config: Config) -> Iterator[Finding]:
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    if head % 2 or not 8 <= head <= 512:
        message = f"qk_nope_head_dim + qk_rope_head_dim = {head}: a head needs an even number of values from 8 to 512"
        yield _error(
            "latent_head", "qk_nope_head_dim qk_rope_head_dim", message, "set qk_nope_head_dim=128 qk_rope_head_dim=64"
        )
    if config.head_dim not in ("auto", head):
        message = f"head_dim = {config.head_dim}: with attention = mla a head has qk_nope_head_dim + qk_rope_head_dim = {head}"
        yield _error("latent_head_dim", "head_dim attention", message, "set head_dim=auto")
    if config.qk_norm:
        message = "qk_norm = true with attention = mla: keys are never built for a cached token, so they cannot be normed"
        yield _error("latent_qk_norm", "qk_norm attention", message, "set qk_norm=false (the latents have norms of their own)")
    if config.num_kv_heads not in (infos_of(Config)["num_kv_heads"].default, config.num_heads):
        message = f"num_kv_heads = {config.num_kv_heads} has no effect with attention = mla: all heads share one latent"
        yield _finding("info", "latent_kv_heads", "num_kv_heads attention", message, f"set num_kv_heads={config.num_heads}")


def _shape(config: Config) -> Iterator[Finding]:
    if config.use_moe and config.moe_top_k > config.num_experts:
        message = f"moe_top_k = {config.moe_top_k}: more than num_experts = {config.num_experts}"
        yield _error("top_k", "moe_top_k num_experts", message, f"set moe_top_k={config.num_experts}")
    if config.num_dense_layers > config.num_layers:
        message = f"num_dense_layers = {config.num_dense_layers}: more than num_layers = {config.num_layers}"
        yield _error("dense_layers", "num_dense_layers num_layers", message, f"set num_dense_layers={config.num_layers}")


def _router(config: Config) -> Iterator[Finding]:
    if config.use_moe and config.router_normalize is True and config.moe_top_k == 1:
        message = "router_normalize = true with moe_top_k = 1: the gate would always be 1 and the router would never learn"
        yield _error("normalize_top1", "router_normalize moe_top_k", message, "set router_normalize=auto")
    default = infos_of(Config)["capacity_factor"].default
    if config.moe_dropless and config.capacity_factor != default:
        message = f"capacity_factor = {show(config.capacity_factor)} has no effect with moe_dropless = true"
        fix = f"set capacity_factor={show(default)}, or moe_dropless=false"
        yield _finding("info", "dropless", "capacity_factor moe_dropless", message, fix)


def _rope(config: Config) -> Iterator[Finding]:
    if config.rope_scaling == "none":
        if config.rope_scaling_factor != 1:
            message = f"rope_scaling_factor = {show(config.rope_scaling_factor)} has no effect with rope_scaling = none"
            yield _error(
                "rope_factor", "rope_scaling_factor rope_scaling", message, "set rope_scaling=yarn, or the factor to 1"
            )
        if config.rope_original_length is not None:
            message = f"rope_original_length = {config.rope_original_length:,} has no effect with rope_scaling = none"
            yield _error("rope_length", "rope_original_length rope_scaling", message, "set rope_original_length=null")
    elif config.rope_scaling_factor == 1:
        message = f"rope_scaling = {config.rope_scaling} with rope_scaling_factor = 1 stretches nothing"
        fix = "set rope_scaling_factor to seq_length / the length the weights were trained at"
        yield _finding("warning", "rope_factor", "rope_scaling rope_scaling_factor", message, fix)
    length = config.seq_length / config.rope_scaling_factor
    bound = 0.0424 * length**1.628
    if config.rope_theta < bound:
        message = f"rope_theta = {show(config.rope_theta)}: too low for {length:,.0f} tokens, far positions look alike"
        fix = f"set rope_theta={_round_up(bound)}"
        yield _finding("warning", "rope_theta", "rope_theta seq_length", message, fix)


def _round_up(value: float) -> str:
    """The next number with one digit, as a person writes it: 8.75e6 → 9e6."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    digit = int(float(mantissa)) + 1
    return f"{digit}e{int(exponent)}" if digit < 10 else f"1e{int(exponent) + 1}"


def _tokenizer(config: Config) -> Iterator[Finding]:
    name = config.tokenizer
    if name in TOKENIZER_IDS:
        yield from vocabulary_findings(config, TOKENIZER_IDS[name])
    elif "/" not in name and "." not in name and not Path(name).is_file():
        near = nearest(name, TOKENIZER_IDS)
        fix = f"set {near}" if near else f"set one of {', '.join(TOKENIZER_IDS)} or the path of a .tiktoken file"
        yield _error("tokenizer", "tokenizer", f"tokenizer = {name}: no such tokenizer", fix)


def _schedule(config: Config) -> Iterator[Finding]:
    if config.max_steps is not None and config.warmup_steps != "auto" and config.warmup_steps >= config.max_steps:
        message = f"warmup_steps = {config.warmup_steps:,}: the run ends at max_steps = {config.max_steps:,} before the peak"
        fix = f"set warmup_steps=auto or {max(1, config.max_steps // 50)}"
        yield _finding("warning", "warmup", "warmup_steps max_steps", message, fix)
    if config.early_stopping_patience and not config.eval_interval:
        message = f"early_stopping_patience = {config.early_stopping_patience} needs evaluations, but eval_interval is 0"
        yield _error("early_stopping", "early_stopping_patience eval_interval", message, "set eval_interval=200")
    if config.min_batch_size > config.max_batch_size:
        message = f"min_batch_size = {config.min_batch_size}: more than max_batch_size = {config.max_batch_size}"
        yield _error("batch_bounds", "min_batch_size max_batch_size", message, f"set min_batch_size={config.max_batch_size}")
    elif config.dynamic_batching and not candidates(config):
        rows, low, high = rows_of_a_rank(config), config.min_batch_size, config.max_batch_size
        message = f"dynamic_batching: no micro batch of {low:,} to {high:,} rows divides the {rows:,} rows of a rank's step"
        fix = "set min_batch_size=1, or another batch_size x gradient_accumulation_steps"
        keys = "min_batch_size max_batch_size batch_size gradient_accumulation_steps"
        yield _error("batch_bounds", keys, message, fix)
    if not config.dynamic_batching:
        yield from _unused(config, "min_batch_size max_batch_size", "dynamic_batching")
    if config.curriculum_learning and config.max_steps is not None and config.max_steps <= config.curriculum_steps:
        message = (
            f"curriculum_steps = {config.curriculum_steps:,}: the run ends at step {config.max_steps:,} before full length"
        )
        fix = f"set curriculum_steps={max(1, config.max_steps // 2)}"
        yield _finding("warning", "curriculum_end", "curriculum_steps max_steps", message, fix)


def _curriculum(config: Config) -> Iterator[Finding]:
    low, high = config.min_seq_length, config.max_seq_length
    wrong = False
    for name, value in (("min_seq_length", low), ("max_seq_length", high)):
        if value != "auto" and value > config.seq_length:
            message = f"{name} = {value:,}: longer than seq_length = {config.seq_length:,}"
            yield _error("curriculum", f"{name} seq_length", message, f"set {name}=auto")
            wrong = True
    if low != "auto" and high != "auto" and low > high:
        message = f"min_seq_length = {low:,}: longer than max_seq_length = {high:,}"
        yield _error("curriculum", "min_seq_length max_seq_length", message, f"set min_seq_length={high}")
    elif not config.curriculum_learning:
        yield from _unused(config, "min_seq_length max_seq_length curriculum_steps", "curriculum_learning")
    elif not wrong:
        yield from _rounded_lengths(config)


def _unused(config: Config, names: str, switch: str) -> Iterator[Finding]:
    """Keys that were set although what they belong to is switched off."""
    for name in names.split():
        if getattr(config, name) != infos_of(Config)[name].default:
            message = f"{name} = {show(getattr(config, name))} has no effect with {switch} = false"
            yield _finding("info", "switched_off", f"{name} {switch}", message, f"set {switch}=true")


def _rounded_lengths(config: Config) -> Iterator[Finding]:
    """What the curriculum makes of the lengths: rows are cut into equal parts, so not every length can be had."""
    size, (low, high) = config.seq_length, bounds(config)
    lengths = row_lengths(size, low, high)
    if not lengths:
        message = f"max_seq_length = {high:,}: rows of {size:,} tokens cannot be cut into equal rows that short"
        fix = "set max_seq_length=auto, or seq_length to a power of two"
        yield _error("curriculum", "max_seq_length seq_length", message, fix)
        return
    if len(lengths) == 1:
        message = (
            f"curriculum_learning = true, but all rows have {lengths[0]:,} tokens: none shorter can be had from {low:,} on"
        )
        fix = "set a lower min_seq_length, or seq_length to a power of two"
        yield _finding("warning", "curriculum_one", "curriculum_learning min_seq_length seq_length", message, fix)
    steps = " - ".join(f"{length:,}" for length in lengths)
    for name, found in (("min_seq_length", lengths[0]), ("max_seq_length", lengths[-1])):
        if getattr(config, name) not in ("auto", found):
            message = f"{name} = {getattr(config, name):,} becomes {found:,}: rows are halved (at most 8 lengths): {steps}"
            yield _finding("info", "curriculum_lengths", f"{name} seq_length", message, f"set {name}={found}")


def _data(config: Config) -> Iterator[Finding]:
    train, evaluate = _paths(config.train_data_path), _paths(config.eval_data_path)
    if shared := sorted(set(train) & set(evaluate)):
        message = f"eval_data_path has {shared[0]}, which is trained on too: the evaluation loss will flatter"
        fix = "set other data, or eval_data_path=null to hold some back"
        yield _finding("warning", "eval_is_train", "eval_data_path train_data_path", message, fix)
    if evaluate and not train:
        message = "eval_data_path is set, but training takes the built-in corpus"
        yield _finding("warning", "eval_only", "eval_data_path train_data_path", message, "set train_data_path too")
    if train and not evaluate and config.eval_split == 0 and config.best_metric == "eval_loss":
        message = "best_metric = eval_loss, but nothing is held back to evaluate on"
        fix = "set eval_split=0.02, eval_data_path, or best_metric=loss"
        yield _finding("warning", "no_eval", "best_metric eval_split eval_data_path", message, fix)
    if config.assistant_loss_weight != 1 and config.train_on == "assistant":
        message = f"assistant_loss_weight = {show(config.assistant_loss_weight)} has no effect with train_on = assistant"
        yield _finding(
            "warning", "loss_weight", "assistant_loss_weight train_on", message, "set train_on=all, or the weight to 1"
        )


def _paths(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _precision(config: Config) -> Iterator[Finding]:
    if config.dynamic_precision and config.precision == "fp32":
        message = "dynamic_precision = true has no effect with precision = fp32: there is nothing wider"
        yield _finding("info", "dynamic_fp32", "dynamic_precision precision", message, "set dynamic_precision=false")
    if config.auto_tune_precision and config.precision != "auto":
        message = f"precision = {config.precision} is only where auto_tune_precision starts: what is measured decides"
        yield _finding("info", "auto_tune", "auto_tune_precision precision", message, "set precision=auto")


def _deepspeed(config: Config) -> Iterator[Finding]:
    stage = config.zero_stage
    if not config.use_deepspeed and stage not in ("auto", 0):
        message = f"zero_stage = {stage} needs DeepSpeed, but use_deepspeed is false"
        yield _error("zero_off", "zero_stage use_deepspeed", message, "set use_deepspeed=true or zero_stage=auto")
    if config.use_deepspeed and stage == 0 and config.precision in ("bf16", "fp16"):
        message = f"zero_stage = 0 with precision = {config.precision}: DeepSpeed runs a phantom optimizer step at the start"
        yield _error("bf16_stage0", "zero_stage precision", message, "set zero_stage=1 (same memory on one rank) or auto")
    if stage == 0 and config.use_deepspeed:
        message = "zero_stage = 0 splits nothing; earlier versions read 0 as automatic"
        yield _finding("info", "zero_stage_0", "zero_stage", message, "set zero_stage=auto if that was meant")
    if config.partition_activations:
        message = "partition_activations = true changes nothing: it splits activations over tensor-parallel ranks, and none are"
        yield _finding("info", "partition", "partition_activations", message, "set partition_activations=false")
    for name in STAGE_3_KEYS:
        default = infos_of(Config)[name].default
        if getattr(config, name) != default and (stage in (0, 1, 2) or not config.use_deepspeed):
            message = f"{name} = {show(getattr(config, name))} has no effect below zero_stage = 3"
            yield _finding("info", "stage3_keys", f"{name} zero_stage", message, f"set zero_stage=3, or {name}={show(default)}")


def _compile(config: Config) -> Iterator[Finding]:
    if not config.compile:
        return
    if config.zero_stage == 3:
        message = "compile = true with zero_stage = 3: weights that come and go cannot be compiled"
        yield _error("compile_stage", "compile zero_stage", message, "set compile=false or zero_stage=2")
    if config.gradient_checkpointing == "selective":
        message = "compile = true with gradient_checkpointing = selective: the compiler decides itself what is computed again"
        yield _error("compile_selective", "compile gradient_checkpointing", message, "set gradient_checkpointing=false or true")


_RULES: tuple[Rule, ...] = (
    _not_yet,
    _attention,
    _shape,
    expert_parallel,
    _router,
    _rope,
    _tokenizer,
    _schedule,
    _curriculum,
    _data,
    _precision,
    _deepspeed,
    _compile,
    offload,
)


def _machine(config: Config, machine: Machine) -> Iterator[Finding]:
    """What depends on the machine; only asked of a configuration that is sound by itself."""
    from lumina_engine.config.budget import budget

    devices = len(machine.devices)
    if devices and config.num_gpus != "auto" and config.num_gpus > devices:
        message = f"num_gpus = {config.num_gpus}: this machine has {devices}"
        yield _error("num_gpus", "num_gpus", message, f"set num_gpus={devices} or auto")
    if config.use_moe and config.num_gpus == "auto":
        yield from expert_ranks_findings(config.expert_parallel_size, world_size(config, machine))
    yield from fp16_findings(config, machine)
    yield from offload_machine(config, machine)
    if not devices and config.communication_backend == "nccl":
        message = "communication_backend = nccl: no GPU here, gloo is used"
        yield _finding("info", "nccl", "communication_backend", message, "set communication_backend=auto")
    if config.use_deepspeed and config.zero_stage == 0 and resolved_precision(config, machine) == "bf16" != config.precision:
        message = (
            "zero_stage = 0 with precision = auto, which is bf16 here: DeepSpeed runs a phantom optimizer step at the start"
        )
        yield _error("bf16_stage0", "zero_stage precision", message, "set zero_stage=auto")
    for name in ("train_data_path", "eval_data_path"):
        for path in _paths(getattr(config, name)):
            if not any(c in path for c in "*?[") and not Path(path).exists():
                yield _error(
                    "no_data", name, f"{name}: {path}: no such file or folder", "give an existing file, folder or pattern"
                )
    try:
        figures = budget(config, machine)
    except ConfigError as error:
        yield from error.findings
        return
    yield from _fits(figures, config.keep_checkpoints)


def _fits(figures: dict, keep: int) -> Iterator[Finding]:
    device, disk, host = figures["device"], figures["disk"], figures["host"]
    if device["total"] > device["limit"]:
        stage = figures["resolved"]["zero_stage"]
        message = (
            f"does not fit: {gb_text(device['total'])} per rank at ZeRO-{stage} (computed), "
            f"{gb_text(device['limit'])} of {gb_text(device['available'])} may be planned for"
        )
        yield _error("does_not_fit", "batch_size num_gpus", message, "; or ".join(figures["advice"]))
    elif host["total"] > host["available"]:
        message = f"host memory: {gb_text(host['total'])} needed (computed), {gb_text(host['available'])} there"
        yield _finding("warning", "host_memory", "num_gpus batch_size", message, "set fewer ranks or a smaller batch_size")
    if disk["available"] is not None and disk["total"] > disk["available"]:
        message = (
            f"disk: {disk['checkpoints']} checkpoints need {gb_text(disk['total'])}, {gb_text(disk['available'])} are free"
        )
        fewer = keep > 2 and disk["total"] - (keep - 2) * disk["checkpoint"] <= disk["available"]
        ways = "free some disk, set keep_checkpoints=2," if fewer else "free some disk"
        yield _error("disk", "keep_checkpoints", message, f"{ways} or name another --runs folder")


# Keys that a resumed run may change one day: the optimizer state is stored in their layout, and nothing converts it yet.
STATE_LAYOUT = frozenset({"zero_stage", "precision", "use_deepspeed", "num_gpus", "expert_parallel_size"})


def resume_findings(old: Config, new: Config, old_world: int, new_world: int) -> list[Finding]:
    """Why a run that was started with `old` cannot go on with `new`: keys that must not change, and the global batch.

    `old` has the values in force; an `auto` in `new` stands for them.
    """
    findings: list[Finding] = []
    for name, info in infos_of(Config).items():
        before, after = getattr(old, name), getattr(new, name)
        if before != after and after != "auto" and (not info.resume_may_change or name in STATE_LAYOUT):
            fix = f"leave it at {show(before)}, or start a new run"
            findings.append(_error("resume", name, f"{name} = {show(after)}: cannot change in a resumed run", fix))
    was = old.batch_size * old.gradient_accumulation_steps * old_world
    now = new.batch_size * new.gradient_accumulation_steps * new_world
    if was != now:
        message = f"the global batch was {was} rows and would be {now}"
        fix = f"choose batch_size x gradient_accumulation_steps x ranks = {was}"
        findings.append(_error("resume_batch", "batch_size gradient_accumulation_steps num_gpus", message, fix))
    return findings
