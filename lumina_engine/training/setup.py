"""What the trainer is made from: the configuration in force, DeepSpeed's part of it, where records go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..monitoring import record as rec
from .comm import Comm
from .memory import keep_freed_memory
from .precision import Precision

Emit = Callable[[rec.Record], object]


def emitter(logger: Any, comm: Comm) -> Emit:
    """A function that takes records: rank 0's go to the logger, the others' nowhere."""
    if comm.rank != 0 or logger is None:
        return lambda record: None
    if isinstance(logger, logging.Logger):
        return lambda record: logger.info("%s", rec.encode(record).decode().rstrip())
    return logger.emit


def resolved_for_training(config: Any, model: Any, tokenizer: Any, comm: Comm) -> Any:
    """`config` with every `auto` replaced, and the shape taken from the model; what differs there is a warning.

    Raises:
        ConfigError: the rules between keys refuse it, or it does not fit the machine.
    """
    from ..config.checks import check
    from ..config.finding import ConfigError, has_errors
    from ..config.resolve import resolve
    from ..monitoring.hardware import detect

    shape = {name: getattr(model.config, name) for name in type(model.config).model_fields}
    given = {name: getattr(config, name) for name in shape}
    other = [name for name, value in shape.items() if given[name] not in ("auto", value)]
    if other:
        logging.getLogger("lumina").warning("the model decides its shape; ignored in the config: %s", ", ".join(other))
    merged = config.model_copy(update=shape)
    findings = check(merged)
    if has_errors(findings):
        raise ConfigError(findings)
    for finding in findings if comm.rank == 0 else []:
        if finding.severity == "warning":
            logging.getLogger("lumina").warning("%s", finding.line())
    return resolve(merged, detect(), tokenizer_vocab=tokenizer.get_vocab_size(), world=comm.world_size)


def seed_all(config: Any, comm: Comm) -> None:
    """torch's random state from seed and rank, so that dropout and jitter differ between ranks; deterministic kernels.

    On a CPU freed memory stays with the process.
    """
    deterministic_kernels(config)
    if comm.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed * 1_000_003 + comm.rank)


def deterministic_kernels(config: Any) -> None:
    """Only kernels that give the same bits every time, if `deterministic`."""
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
        # It would also fill every new tensor with NaN, DeepSpeed's buckets of 800 MB in each step among them. Nothing here
        # reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def warn_unsupervised(config: Any) -> None:
    """What only a supervised run can do: it tries things in processes of their own before the model is made, and is started
    again."""
    for name in ("dynamic_batching", "auto_tune_precision"):
        if getattr(config, name):
            message = "%s acts at the start of `lumina-engine train`, not in a plain script: %s as configured"
            logging.getLogger("lumina").warning(message, name, "batch_size" if name == "dynamic_batching" else "precision")
    if config.use_moe and config.adaptive == config.expert_growth == "act":
        message = (
            "expert_growth: another number of experts needs a restart, which only `lumina-engine train` can make; it stays"
        )
        logging.getLogger("lumina").warning(message)


def placed(model: Any, config: Any, comm: Comm, ds_config: dict[str, Any] | None) -> Any:
    """The model on this rank's device in its precision, with its first weights if it was built on `meta`.

    At ZeRO stage 3 it stays as it is: the engine splits it parameter by parameter, since no rank may hold all of it.
    """
    if splits_weights(ds_config):
        return model
    if next(model.parameters()).is_meta:
        model.to_empty(device="cpu")
        model.init_weights(config.seed)
    return model.to(device=comm.device, dtype=Precision.from_name(config.precision).weights)


def splits_weights(ds_config: dict[str, Any] | None) -> bool:
    """Whether DeepSpeed splits the weights themselves over the ranks (ZeRO stage 3)."""
    return ds_config is not None and ds_config["zero_optimization"]["stage"] == 3


def deepspeed_config(config: Any, comm: Comm) -> dict[str, Any] | None:
    """What DeepSpeed is given; None without DeepSpeed."""
    if not config.use_deepspeed:
        return None
    from ..config.deepspeed import to_deepspeed

    return to_deepspeed(config, comm.world_size)
