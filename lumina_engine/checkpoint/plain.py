"""Checkpoints of plain torch objects: a module, an optimizer, a scheduler and the random state of the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .files import CheckpointError
from .payload import Loaded, Payload
from .tensors import capture_rng, pack, restore_rng, unpack

_SHOWN = 6  # names per kind in a diff


class LoadedEpoch(int):
    """The epoch of a loaded checkpoint, with what else it tells. `report` has one line per part restored or left out."""

    step: int
    tokens: int
    metrics: dict[str, Any]
    report: list[str]

    @classmethod
    def of(cls, loaded: Loaded, report: list[str]) -> LoadedEpoch:
        epoch = cls(loaded.epoch)
        epoch.step, epoch.tokens, epoch.metrics, epoch.report = loaded.step, loaded.tokens, loaded.metrics, report
        return epoch


def tokenizer_of(config: Any, model: nn.Module) -> dict[str, str]:
    """Name and digest of the configured tokenizer, for a model that has one (a language model of ours); else empty."""
    if not hasattr(getattr(model, "config", None), "to_dict") or not hasattr(config, "tokenizer"):
        return {}
    from ..data.tokenizer import ConversationTokenizer

    tokenizer = ConversationTokenizer(config.tokenizer)
    return {"name": tokenizer.name, "digest": tokenizer.digest}


def payload_of(
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    step: int,
    epoch: int,
    metrics: dict[str, Any],
    tokenizer: dict[str, str],
) -> Payload:
    """The state of plain objects at a step boundary; `metrics["tokens"]` counts as the tokens seen so far."""
    config: Any = getattr(model, "config", None)
    state, tensors = capture_rng()
    parts = {
        name: pack(part.state_dict(), name, tensors)
        for name, part in (("optimizer", optimizer), ("scheduler", scheduler))
        if part is not None
    }
    return Payload(
        step=step,
        epoch=epoch,
        tokens=int(metrics.get("tokens", 0)),
        model=dict(model.state_dict()),
        model_config=config.to_dict() if hasattr(config, "to_dict") else {"class": type(model).__qualname__},
        tokenizer=dict(tokenizer),
        rank_state={"rng": state, **parts},
        rank_tensors=tensors,
        metrics=metrics,
    )


def apply(loaded: Loaded, model: nn.Module, optimizer: Any, scheduler: Any, strict: bool) -> LoadedEpoch:
    """Put a loaded checkpoint into plain objects. Everything is compared before anything is changed.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape; the optimizer has other parameters; with `strict`, a
            part that was asked for is not in the checkpoint.
    """
    diff = architecture_diff(loaded.model, model.state_dict())
    if diff:
        raise CheckpointError(f"{loaded.path} does not fit this model: {diff}")
    parts, left_out = {}, []
    for name, target in (("optimizer", optimizer), ("scheduler", scheduler)):
        if target is None:
            continue
        if loaded.rank_state.get(name) is None:
            left_out.append(f"{name}: not in the checkpoint, left as it is")
        else:
            parts[name] = (
                target,
                unpack(loaded.rank_state[name], {key: value.clone() for key, value in loaded.rank_tensors.items()}),
            )
    if strict and left_out:
        raise CheckpointError(f"{loaded.path}: {'; '.join(left_out)} (strict=False accepts that)")
    if "optimizer" in parts:
        _require_groups(parts["optimizer"][1], optimizer, loaded)
    model.load_state_dict(loaded.model)
    report = [f"model: {len(loaded.model)} tensors", *_converted(loaded.model, model.state_dict())]
    for name, (target, state) in parts.items():
        target.load_state_dict(state)
        report.append(f"{name}: restored")
    if "rng" in loaded.rank_state:
        restore_rng(loaded.rank_state["rng"], loaded.rank_tensors)
        report.append("random state: restored")
    return LoadedEpoch.of(loaded, [*report, *left_out, *loaded.notes])


def architecture_diff(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What differs between saved weights and those of a model, on one line; empty when they fit."""
    parts = [
        _names("missing in the checkpoint", [name for name in wanted if name not in saved]),
        _names("unknown to the model", [name for name in saved if name not in wanted]),
        _names(
            "other shape",
            [
                f"{name} {tuple(saved[name].shape)} in the checkpoint, {tuple(wanted[name].shape)} in the model"
                for name in wanted
                if name in saved and saved[name].shape != wanted[name].shape
            ],
        ),
    ]
    return "; ".join(part for part in parts if part)


def _names(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"


def _converted(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    kinds = sorted(
        {f"{saved[name].dtype} to {wanted[name].dtype}" for name in wanted if saved[name].dtype != wanted[name].dtype}
    )
    return [f"weights converted from {kind}" for kind in kinds]


def _require_groups(state: Mapping[str, Any], optimizer: Any, loaded: Loaded) -> None:
    saved = [len(group["params"]) for group in state.get("param_groups", [])]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if saved != wanted:
        raise CheckpointError(
            f"{loaded.path}: the optimizer was saved with groups of {saved} parameters, this one has {wanted}; "
            "build it as before, or pass optimizer=None"
        )
