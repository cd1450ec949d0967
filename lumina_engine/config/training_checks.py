"""Rules between the keys of training, data and DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lumina_engine.config.curriculum import bounds, row_lengths
from lumina_engine.config.declare import show
from lumina_engine.config.finding import Finding, error, finding, nearest
from lumina_engine.config.micro_batch import candidates, rows_of_a_rank
from lumina_engine.config.offload import least_stage
from lumina_engine.config.resolve import vocabulary_findings
from lumina_engine.config.schema import Config
from lumina_engine.config.steps import LEAST_POINTS, LEAST_SPAN, decay_start, warmup_of
from lumina_engine.config.task_checks import train_paths
from lumina_engine.config.tokenizers import TOKENIZER_FILES, TOKENIZER_IDS

_LEAST_DECAY = 1 - 1 / LEAST_SPAN  # share of the steps in which evaluations of the decay alone can span what a curve needs


def tokenizer(config: Config) -> Iterator[Finding]:
    """A tokenizer that exists, and a vocabulary that holds it."""
    name = config.tokenizer
    if name in TOKENIZER_IDS:
        yield from vocabulary_findings(config, TOKENIZER_IDS[name])
    elif name in TOKENIZER_FILES and not Path(name).exists():
        message = f"tokenizer = {name}: its vocabulary is not part of Lumina"
        yield error("tokenizer", "tokenizer", message, TOKENIZER_FILES[name])
    elif "/" not in name and "." not in name and not Path(name).is_file():
        near = nearest(name, TOKENIZER_IDS)
        files = "the path of a .tiktoken file or tokenizer.json"
        fix = f"set {near}" if near else f"set one of {', '.join(TOKENIZER_IDS)} or {files}"
        yield error("tokenizer", "tokenizer", f"tokenizer = {name}: no such tokenizer", fix)


def schedule(config: Config) -> Iterator[Finding]:
    """Steps, warm-up, early stopping and the bounds of the micro batch."""
    if config.max_steps is not None and config.warmup_steps != "auto" and config.warmup_steps >= config.max_steps:
        message = f"warmup_steps = {config.warmup_steps:,}: the run ends at max_steps = {config.max_steps:,} before the peak"
        fix = f"set warmup_steps=auto or {max(1, config.max_steps // 50)}"
        yield finding("warning", "warmup", "warmup_steps max_steps", message, fix)
    if config.early_stopping_patience and not config.eval_interval:
        message = f"early_stopping_patience = {config.early_stopping_patience} needs evaluations, but eval_interval is 0"
        yield error("early_stopping", "early_stopping_patience eval_interval", message, "set eval_interval=200")
    if config.early_stopping_gain and not config.eval_interval:
        message = f"early_stopping_gain = {config.early_stopping_gain:g} needs evaluations, but eval_interval is 0"
        yield error("early_stopping", "early_stopping_gain eval_interval", message, "set eval_interval=200")
    if config.early_stopping_gain and config.adaptive != "off":
        yield from _early_stop(config)
    if config.min_batch_size > config.max_batch_size:
        message = f"min_batch_size = {config.min_batch_size}: more than max_batch_size = {config.max_batch_size}"
        yield error("batch_bounds", "min_batch_size max_batch_size", message, f"set min_batch_size={config.max_batch_size}")
    elif config.dynamic_batching and not candidates(config):
        rows, low, high = rows_of_a_rank(config), config.min_batch_size, config.max_batch_size
        message = f"dynamic_batching: no micro batch of {low:,} to {high:,} rows divides the {rows:,} rows of a rank's step"
        fix = "set min_batch_size=1, or another batch_size x gradient_accumulation_steps"
        keys = "min_batch_size max_batch_size batch_size gradient_accumulation_steps"
        yield error("batch_bounds", keys, message, fix)
    if config.curriculum_learning and config.max_steps is not None and config.max_steps <= config.curriculum_steps:
        message = (
            f"curriculum_steps = {config.curriculum_steps:,}: the run ends at step {config.max_steps:,} before full length"
        )
        fix = f"set curriculum_steps={max(1, config.max_steps // 2)}"
        yield finding("warning", "curriculum_end", "curriculum_steps max_steps", message, fix)


def _early_stop(config: Config) -> Iterator[Finding]:
    """Why `early_stopping_gain` can never act although evaluations are made."""
    message = f"early_stopping_gain = {config.early_stopping_gain:g} ends no run"
    if config.lr_schedule == "wsd" and config.decay_ratio < _LEAST_DECAY:
        why = f"only its decay tells what it brings, and a curve needs decay_ratio={_LEAST_DECAY:g} at least"
        fix, keys = "set early_stopping_gain=0, or another lr_schedule", "early_stopping_gain lr_schedule"
        yield finding("warning", "early_stopping", keys, f"{message} with lr_schedule = wsd: {why}", fix)
    elif config.max_steps is not None and config.eval_interval and not _fits(config, config.max_steps, config.eval_interval):
        least = f"a curve needs {LEAST_POINTS} evaluations over a factor of {LEAST_SPAN:g} in steps"
        why = f"{least}, which eval_interval = {config.eval_interval:,} does not give before max_steps = {config.max_steps:,}"
        fine = max(1, config.max_steps // (2 * LEAST_POINTS))
        fits = _fits(config, config.max_steps, fine)
        fix = f"set eval_interval={fine}" if fits else "set early_stopping_gain=0, or a shorter warm-up and more steps"
        yield finding("warning", "early_stopping", "early_stopping_gain eval_interval max_steps", f"{message}: {why}", fix)
    if config.max_adaptive_actions == 0:
        why = "max_adaptive_actions = 0 allows no action"
        fix = "set max_adaptive_actions=20, or early_stopping_gain=0"
        yield finding("warning", "early_stopping", "early_stopping_gain max_adaptive_actions", f"{message}: {why}", fix)
    if train_paths(config) and not paths(config.eval_data_path) and config.eval_split == 0:
        fix = "set eval_split=0.02, eval_data_path, or early_stopping_gain=0"
        keys = "early_stopping_gain eval_split eval_data_path"
        yield finding("warning", "early_stopping", keys, f"{message}: nothing is held back to evaluate on", fix)


def _fits(config: Config, steps: int, every: int) -> bool:
    """Whether the evaluations that count, before the last one of `steps`, allow a curve."""
    warmup = warmup_of(config.warmup_steps, steps)
    after = decay_start(steps, warmup, config.decay_ratio) if config.lr_schedule == "wsd" else warmup
    first, last = (after // every + 1) * every, (steps - 1) // every * every
    return last >= first + (LEAST_POINTS - 1) * every and last >= LEAST_SPAN * first


def curriculum(config: Config) -> Iterator[Finding]:
    """Lengths of rows that the data can be cut into."""
    low, high = config.min_seq_length, config.max_seq_length
    wrong = False
    for name, value in (("min_seq_length", low), ("max_seq_length", high)):
        if value != "auto" and value > config.seq_length:
            message = f"{name} = {value:,}: longer than seq_length = {config.seq_length:,}"
            yield error("curriculum", f"{name} seq_length", message, f"set {name}=auto")
            wrong = True
    if low != "auto" and high != "auto" and low > high:
        message = f"min_seq_length = {low:,}: longer than max_seq_length = {high:,}"
        yield error("curriculum", "min_seq_length max_seq_length", message, f"set min_seq_length={high}")
    elif config.curriculum_learning and not wrong:
        yield from _rounded_lengths(config)


def _rounded_lengths(config: Config) -> Iterator[Finding]:
    """What the curriculum makes of the lengths: rows are cut into equal parts, so not every length can be had."""
    size, (low, high) = config.seq_length, bounds(config)
    lengths = row_lengths(size, low, high)
    if not lengths:
        message = f"max_seq_length = {high:,}: rows of {size:,} tokens cannot be cut into equal rows that short"
        fix = "set max_seq_length=auto, or seq_length to a power of two"
        yield error("curriculum", "max_seq_length seq_length", message, fix)
        return
    if len(lengths) == 1:
        message = (
            f"curriculum_learning = true, but all rows have {lengths[0]:,} tokens: none shorter can be had from {low:,} on"
        )
        fix = "set a lower min_seq_length, or seq_length to a power of two"
        yield finding("warning", "curriculum_one", "curriculum_learning min_seq_length seq_length", message, fix)
    steps = " - ".join(f"{length:,}" for length in lengths)
    for name, found in (("min_seq_length", lengths[0]), ("max_seq_length", lengths[-1])):
        if getattr(config, name) not in ("auto", found):
            message = f"{name} = {getattr(config, name):,} becomes {found:,}: rows are halved (at most 8 lengths): {steps}"
            yield finding("info", "curriculum_lengths", f"{name} seq_length", message, f"set {name}={found}")


def data(config: Config) -> Iterator[Finding]:
    """What is trained on and what is evaluated."""
    train = [path for value in train_paths(config).values() for path in paths(value)]
    evaluate = paths(config.eval_data_path)
    if shared := sorted(set(train) & set(evaluate)):
        message = f"eval_data_path has {shared[0]}, which is trained on too: the evaluation loss will flatter"
        fix = "set other data, or eval_data_path=null to hold some back"
        yield finding("warning", "eval_is_train", "eval_data_path train_data_path", message, fix)
    if evaluate and not train:
        message = "eval_data_path is set, but training takes the built-in corpus"
        yield finding("warning", "eval_only", "eval_data_path train_data_path", message, "set train_data_path too")
    if train and not evaluate and config.eval_split == 0 and config.best_metric == "eval_loss":
        message = "best_metric = eval_loss, but nothing is held back to evaluate on"
        fix = "set eval_split=0.02, eval_data_path, or best_metric=loss"
        yield finding("warning", "no_eval", "best_metric eval_split eval_data_path", message, fix)
    if config.assistant_loss_weight != 1 and config.train_on == "assistant":
        message = f"assistant_loss_weight = {show(config.assistant_loss_weight)} has no effect with train_on = assistant"
        yield finding(
            "warning", "loss_weight", "assistant_loss_weight train_on", message, "set train_on=all, or the weight to 1"
        )


def adaptive(config: Config) -> Iterator[Finding]:
    """Whether the controllers have anything that they may do."""
    if config.use_moe and config.expert_growth == "act":
        yield from _growth(config)
    if config.adaptive == "act" and config.lr_multiplier_min >= 1:
        message = "adaptive = act with lr_multiplier_min = 1: no rate can be lowered, so the first lasting trouble ends the run"
        fix = "set lr_multiplier_min=0.1, or adaptive=advise"
        yield finding("warning", "adaptive_bound", "lr_multiplier_min adaptive", message, fix)


def _growth(config: Config) -> Iterator[Finding]:
    """Why experts are not added or removed by themselves although that is asked for."""
    if config.adaptive != "act":
        message = f"expert_growth = act goes no further than adaptive = {config.adaptive}"
        yield finding("info", "growth_adaptive", "expert_growth adaptive", message, "set adaptive=act, or expert_growth=advise")
    elif not config.save_interval:
        message = "expert_growth = act acts at a save that save_interval makes, and save_interval = 0 makes none"
        yield finding("info", "growth_saves", "expert_growth save_interval", message, "set save_interval=1000")
    elif config.moe_top_k > 1:
        message = f"expert_growth = act adds none with moe_top_k = {config.moe_top_k}, where a twin would change the model"
        yield finding("info", "growth_top_k", "expert_growth moe_top_k", message, "set moe_top_k=1, or expert_growth=advise")
    elif config.num_experts >= config.max_num_experts:
        message = (
            f"expert_growth = act adds none: num_experts = {config.num_experts}, max_num_experts = {config.max_num_experts}"
        )
        fix = f"set max_num_experts={min(1_024, 2 * config.num_experts)}, or expert_growth=advise"
        yield finding("info", "growth_most", "expert_growth max_num_experts", message, fix)


def paths(value: str | list[str] | None) -> list[str]:
    """The paths of a key that takes none, one or several."""
    return [] if value is None else [value] if isinstance(value, str) else value


def precision(config: Config) -> Iterator[Finding]:
    """Precision against what changes it."""
    if config.dynamic_precision and config.precision == "fp32":
        message = "dynamic_precision = true has no effect with precision = fp32: there is nothing wider"
        yield finding("info", "dynamic_fp32", "dynamic_precision precision", message, "set dynamic_precision=false")
    if config.auto_tune_precision and config.nvme_offload_parameters:
        message = "auto_tune_precision compares with fp32, and with nvme_offload_parameters DeepSpeed swaps 16-bit weights only"
        yield error("auto_tune_nvme", "auto_tune_precision nvme_offload_parameters", message, "set auto_tune_precision=false")
    if config.auto_tune_precision and config.precision != "auto":
        message = f"precision = {config.precision} is only where auto_tune_precision starts: what is measured decides"
        yield finding("info", "auto_tune", "auto_tune_precision precision", message, "set precision=auto")


def deepspeed(config: Config) -> Iterator[Finding]:
    """ZeRO stages that do what was asked for."""
    stage = config.zero_stage
    if not config.use_deepspeed and stage not in ("auto", 0):
        message = f"zero_stage = {stage} needs DeepSpeed, but use_deepspeed is false"
        yield error("zero_off", "zero_stage use_deepspeed", message, "set use_deepspeed=true or zero_stage=auto")
    if config.use_deepspeed and stage == 0 and config.precision in ("bf16", "fp16"):
        message = f"zero_stage = 0 with precision = {config.precision}: DeepSpeed runs a phantom optimizer step at the start"
        yield error("bf16_stage0", "zero_stage precision", message, "set zero_stage=1 (same memory on one rank) or auto")
    if stage == 0 and config.use_deepspeed:
        message = "zero_stage = 0 splits nothing; earlier versions read 0 as automatic"
        yield finding("info", "zero_stage_0", "zero_stage", message, "set zero_stage=auto if that was meant")
    if config.partition_activations:
        message = "partition_activations = true changes nothing: it splits activations over tensor-parallel ranks, and none are"
        yield finding("info", "partition", "partition_activations", message, "set partition_activations=false")


def compile_rules(config: Config) -> Iterator[Finding]:
    """What cannot be compiled."""
    if not config.compile:
        return
    least, _ = least_stage(config)
    stage = config.zero_stage if config.zero_stage != "auto" else least
    if stage == 3 and config.use_deepspeed:
        cause = "zero_stage = 3" if config.zero_stage == 3 else "offload that needs ZeRO stage 3"
        message = f"compile = true with {cause}: weights that come and go cannot be compiled"
        yield error("compile_stage", "compile zero_stage", message, "set compile=false, or zero_stage=2 without such offload")
    if config.gradient_checkpointing == "selective":
        message = "compile = true with gradient_checkpointing = selective: the compiler decides itself what is computed again"
        yield error("compile_selective", "compile gradient_checkpointing", message, "set gradient_checkpointing=false or true")
