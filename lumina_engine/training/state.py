"""What a checkpoint holds of a trainer, how it is put back, and how a rank describes itself."""

from __future__ import annotations

import functools
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..checkpoint.manager import Loaded, Payload, capture_rng, restore_rng
from ..checkpoint.universal import SavedState
from .engine import parameter_groups
from .ladder import PrecisionLadder, by_autocast
from .memory import whole_numel
from .progress import Progress
from .rollback import Recovery
from .trainer import EnhancedConversationTrainer

PACKAGES = ("lumina", "torch", "deepspeed", "numpy", "tiktoken", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of what training stands on; a package that is not installed is left out."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: known for name, known in found.items() if known is not None}}


@functools.cache  # looking through the installed packages takes 10 ms, which every save would hold training up for
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def payload(trainer: EnhancedConversationTrainer) -> Payload:
    """The whole state at a step boundary. Tensors are the live ones: the manager copies or writes them before the next step."""
    assert trainer.schedule is not None
    rng_state, rng_tensors = capture_rng()
    tensors = {**trainer.engine.state_tensors(), **rng_tensors}
    if trainer.window is not None:
        tensors.update(trainer.window.state_tensors())
    progress = trainer.progress
    metrics = {"loss": trainer.last_loss}
    if progress.last_eval.get("step") == progress.step:  # figures of an earlier step would be told as this one's
        metrics |= {f"eval_{name}": value for name, value in progress.last_eval.items() if name != "step"}
    return Payload(
        step=progress.step,
        epoch=progress.epoch,
        tokens=progress.tokens,
        model=trainer.engine.model_tensors(),
        model_config=trainer.model.config.to_dict(),
        tokenizer={"name": trainer.tokenizer.name, "digest": trainer.tokenizer.digest},
        global_state={
            "progress": progress.state_dict(),
            "schedule": trainer.schedule.state_dict(),
            "total_steps": trainer.total_steps,
            "seed": trainer.config.seed,
            "data_fingerprint": trainer.train_data.fingerprint,
            "versions": versions(),
            "loss_scale": None if trainer.engine.scale is None else trainer.engine.scale.state_dict(),
            "precision_ladder": None if trainer.ladder is None else trainer.ladder.state_dict(),
            "guard": trainer.guard.state_dict(),
            "recovery": trainer.recovery.state_dict(),
            "adaptive": trainer.adaptive.state_dict(),
            **trainer.extra_state(),
        },
        rank_state={
            "rng": rng_state,
            "world": trainer.comm.world_size,
            "zero_stage": getattr(trainer.engine, "stage", None),
            "expert_parallel_size": _expert_parallel_size(trainer),
            "begins": trainer.engine.state_begins(),
        },
        rank_tensors=tensors,
        metrics=metrics,
        flags=_flags(trainer),
    )


def _flags(trainer: EnhancedConversationTrainer) -> dict[str, Any]:
    """What a manifest warns of: taken while a spike was open, or in a run that overrode a refusal."""
    flags: dict[str, Any] = {} if trainer.guard.open_since is None else {"suspect": True}
    return flags | ({"overrides": trainer.overrides} if trainer.overrides else {})


def restore(trainer: EnhancedConversationTrainer, loaded: Loaded) -> None:
    """Put a checkpoint back into a prepared trainer: weights, optimizer, schedule, position, routing window, random state.

    Raises:
        StateMismatch: there is no optimizer state. CheckpointError: not all of it, or another rank's part is damaged.
    """
    assert trainer.schedule is not None
    saved = loaded.saved_state()
    trainer.engine.load_model_tensors(saved.whole_weights(trainer.precision.weights))
    trainer.engine.load_state(saved)
    other_world = loaded.manifest.get("world") != trainer.comm.world_size
    if trainer.window is not None:
        trainer.window.load_state_tensors(_window_sums(trainer, saved) if other_world else loaded.rank_tensors)
    state = loaded.global_state
    trainer.progress = Progress.from_state_dict(state["progress"])
    trainer.schedule.load_state_dict(state["schedule"])
    if trainer.ladder is not None and state.get("precision_ladder"):
        _restore_ladder(trainer, trainer.ladder, state["precision_ladder"])
    if trainer.engine.scale is not None and state.get("loss_scale") is not None:
        trainer.engine.scale.load_state_dict(state["loss_scale"])
    if "guard" in state:  # not in a checkpoint of an earlier version
        trainer.guard.load_state_dict(state["guard"])
        trainer.recovery = Recovery.from_state_dict(state["recovery"])
    trainer.adaptive.load_state_dict(state.get("adaptive", {}))
    trainer.overrides = list(loaded.flags.get("overrides", []))
    trainer.saves.restored(loaded.step)
    trainer.last_loss = float(loaded.metrics.get("loss", math.nan))
    if loaded.rank_state:
        restore_rng(loaded.rank_state["rng"], loaded.rank_tensors)
    else:  # a rank that the saving run did not have: as at a start, but never the numbers of another step again
        torch.manual_seed(abs(hash((trainer.config.seed, trainer.comm.rank, loaded.step))))


def _restore_ladder(trainer: EnhancedConversationTrainer, ladder: PrecisionLadder, saved: dict[str, Any]) -> None:
    """Where the run stood on the rungs. A precision that the ladder cannot have configured is the user's: it stays the home."""
    in_place = trainer.switches_in_place and by_autocast(saved["home"])
    own = {saved["home"]} if in_place else {saved["home"], saved["current"]}
    if trainer.config.precision not in own:
        return
    ladder.load_state_dict(saved)
    if in_place:
        trainer.use_precision(ladder.current)
    ladder.current = trainer.precision.name  # after a restart that is what was configured for it


def _window_sums(trainer: EnhancedConversationTrainer, saved: SavedState) -> dict[str, torch.Tensor]:
    """Routing statistics of all ranks that saved, on rank 0; on the others there are none yet."""
    assert trainer.window is not None
    own = trainer.window.state_tensors()
    if trainer.comm.rank != 0:
        return {name: torch.zeros_like(part) for name, part in own.items()}
    found = {name: [shard.tensors[name] for shard in saved.shards() if name in shard.tensors] for name in own}
    return {name: torch.stack(parts).sum(0) for name, parts in found.items() if parts}


def _expert_parallel_size(trainer: EnhancedConversationTrainer) -> int:
    group = trainer.model.expert_group
    return 1 if group is None else group.size


def setup_report(trainer: EnhancedConversationTrainer) -> dict[str, Any]:
    """How this rank is set up; every value is read from the live objects."""
    config, comm = trainer.config, trainer.comm
    groups = parameter_groups(trainer.model, config.weight_decay)  # as given to the optimizer, which under ZeRO has parts only
    report: dict[str, Any] = {
        "device": str(comm.device),
        "rank": f"{comm.rank} of {comm.world_size}",
        "engine": type(trainer.engine).__name__,
        "zero_stage": getattr(trainer.engine, "stage", None),
        "precision": f"{trainer.precision.name} (weights {trainer.precision.weights}, autocast {trainer.precision.autocast})",
        "batch": f"{config.batch_size} micro x {config.gradient_accumulation_steps} accumulation x {comm.world_size} ranks = "
        f"{config.batch_size * config.gradient_accumulation_steps * comm.world_size} rows of {config.seq_length} tokens",
        "parameters": sum(whole_numel(p) for p in trainer.model.parameters()),
        "expert_parallel_size": _expert_parallel_size(trainer),
        "parameter_groups": [
            {"parameters": sum(whole_numel(p) for p in g["params"]), "weight_decay": g["weight_decay"]} for g in groups
        ],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if trainer.train_data is not None:
        first = next(iter(trainer._loader()))[0]
        row_S, labels_S = first.input_ids_BS[0], first.labels_BS[0]
        report["first_row"] = trainer.tokenizer.decode([int(i) for i in row_S[:64]])
        report["first_row_trained"] = trainer.tokenizer.decode([int(i) for i in labels_S[labels_S >= 0][:64]])
    return report
