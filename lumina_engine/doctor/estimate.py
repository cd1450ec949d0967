"""How long training would take on this machine, by the arithmetic of `lumina-engine budget`."""

from __future__ import annotations

from ..config.budget import Hours, budget
from ..config.schema import Config
from ..data.size import average_tokens
from ..monitoring.hardware import detect


def estimate_training_time(config: Config, dataset_size: int, *, tokens: int | None = None) -> Hours:
    """Hours of a run on this machine.

    Args:
        config: how to train; `num_epochs` and `max_steps` end the run, whichever comes first.
        dataset_size: conversations in the training data.
        tokens: tokens in them; without it conversations x the average of the prepared data, or of a usual conversation.

    Returns:
        The typical hours as a float, with `.p50`, `.p90` (nine runs in ten take less), `.device_hours` and `.basis`.

    Raises:
        ConfigError: the shape is impossible.
        ValueError: there is no data.
    """
    if tokens is None:
        each, basis = average_tokens(config)
        tokens, basis = int(dataset_size * each), f"{dataset_size:,} conversations of {each:,.0f} tokens ({basis})"
    else:
        basis = "given"
    if tokens < 1:
        raise ValueError(f"{dataset_size} conversations, {tokens} tokens: there is nothing to train on")
    time = budget(config, detect(), train_tokens=tokens, tokens_basis=basis)["time"]
    return Hours(time["p50_h"], time["p90_h"], time["device_hours"], time["basis"])
