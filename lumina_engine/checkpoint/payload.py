"""What a checkpoint holds, as the trainer gives it and gets it back, and how it becomes files.

model/model.safetensors, config.json, tokenizer.json      rank 0; all that chat and export read
state/trainer.json, config.json                           rank 0; global state and the configuration in force
state/rank-00000.json, rank-00000.safetensors             every rank its own
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backup import Tick
from .compress import SUFFIX, compressed, plain_names, read_compressed
from .files import MAX_JSON_BYTES, CheckpointError, FileEntry, dump_json, dump_state, load_json, open_folder, read_file
from .keep import leased
from .tensors import first_non_finite, pack, read_tensors, tensor_file, tensor_image, unpack
from .universal import SavedState, Shard
from .verify import Report, require, verify

MODEL, MODEL_CONFIG, TOKENIZER = "model/model.safetensors", "model/config.json", "model/tokenizer.json"
TRAINER, CONFIG = "state/trainer.json", "state/config.json"
MAX_MODEL_JSON_BYTES = 1 << 20  # of what a model is described by, which has some kilobytes


@dataclass(slots=True)
class Payload:
    """One step boundary of one rank. `model` is the whole model on rank 0 (other ranks may leave it empty).

    global_state, rank_state, metrics and flags hold numbers, texts, lists, tuples and mappings; tensors belong into
    rank_tensors. The manifest repeats `inc`, `log_seq` and `data_fingerprint` of global_state, `metrics` and `flags`
    (`suspect`: taken while a spike was open).
    """

    step: int
    epoch: int
    tokens: int
    model: dict[str, Tensor]
    model_config: dict[str, Any]
    tokenizer: dict[str, Any]
    global_state: dict[str, Any] = field(default_factory=dict)
    rank_state: dict[str, Any] = field(default_factory=dict)
    rank_tensors: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Loaded(Payload):
    """A verified checkpoint, read for one rank. `notes` are for the user; tensors are privately mapped from the files.

    rank_state and rank_tensors are empty on a rank that the saving run did not have. `others` verifies and maps what the other
    ranks saved.
    """

    path: Path = Path()
    manifest: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    others: Callable[[], list[Shard]] = list

    def saved_state(self) -> SavedState:
        """The optimizer state for whatever ranks and stage go on with it."""
        return SavedState(Shard(self.rank_tensors, self.rank_state.get("begins", {})), self.others, self.model)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to write: path in the checkpoint, size in bytes (at most, if not `exact`), a function that yields its content."""

    path: str
    size: int
    pieces: Callable[[], Iterable[Any]]
    exact: bool = True


def rank_files(rank: int) -> tuple[str, str]:
    """JSON and tensor file of a rank."""
    return f"state/rank-{rank:05d}.json", f"state/rank-{rank:05d}.safetensors"


def required_files(world: int) -> set[str]:
    """What every committed checkpoint of that many ranks holds."""
    own = {path for rank in range(world) for path in rank_files(rank)}
    return {MODEL, MODEL_CONFIG, TOKENIZER, TRAINER, *own}


def plan_files(
    payload: Payload, rank: int, world: int, config: dict[str, Any] | None, copy: bool, compression: str = "none"
) -> list[PlannedFile]:
    """The files of this rank. With `copy` the tensors are copied to host memory now, so that training may go on.

    `compression` (none, zstd) is of the rank's state; weights are never compressed.

    Raises:
        CheckpointError: a parameter is not finite, or a value has no form in a checkpoint.
    """
    files = []
    if rank == 0:
        if not payload.model:
            raise CheckpointError("the model has no tensors to save")
        culprit = first_non_finite(payload.model)
        if culprit is not None:
            raise CheckpointError(f"parameter {culprit} is not finite, so this step is not worth keeping")
        files.append(_tensors(MODEL, payload.model, copy, {"format": "pt"}))
        files.append(_json(MODEL_CONFIG, pack(payload.model_config, "model_config")))
        files.append(_json(TOKENIZER, pack(payload.tokenizer, "tokenizer")))
        head = {name: getattr(payload, name) for name in ("step", "epoch", "tokens", "metrics", "flags", "global_state")}
        files.append(_json(TRAINER, pack(head, "trainer"), dump_state))
        if config is not None:
            files.append(_json(CONFIG, pack(config, "config")))
    state, tensors = rank_files(rank)
    mine = {"rank": rank, "world": world, "state": payload.rank_state}
    files.append(_json(state, pack(mine, "rank_state"), dump_state))
    own = _tensors(tensors, payload.rank_tensors, copy)
    files.append(packed(own) if compression == "zstd" else own)
    return files


def packed(file: PlannedFile) -> PlannedFile:
    """The same file as it is written with `checkpoint_compression: zstd`."""
    return PlannedFile(file.path + SUFFIX, file.size, compressed(file.pieces, file.size), exact=False)


def _json(path: str, value: Any, dump: Callable[[Any], bytes] = dump_json) -> PlannedFile:
    body = dump(value)
    return PlannedFile(path, len(body), lambda: [body])


def _tensors(path: str, tensors: dict[str, Tensor], copy: bool, metadata: dict[str, str] | None = None) -> PlannedFile:
    size, pieces = tensor_image(tensors, metadata) if copy else tensor_file(dict(tensors), metadata)
    return PlannedFile(path, size, pieces)


def write_files(plan: Iterable[PlannedFile], write: Callable[[str, Iterable[Any], int | None], FileEntry]) -> list[FileEntry]:
    """Write every planned file.

    Raises:
        CheckpointError: one failed; it is named.
    """
    entries = []
    for file in plan:
        try:
            entries.append(write(file.path, file.pieces(), file.size if file.exact else None))
        except OSError as error:
            raise CheckpointError(f"{file.path}: {error.strerror or error}") from error
    return entries


def belongs_to(rank: int) -> Callable[[str], bool]:
    """Which files a rank reads, and therefore verifies."""
    own = {MODEL, MODEL_CONFIG, TOKENIZER, TRAINER, CONFIG, *rank_files(rank)}
    return lambda path: path.removesuffix(SUFFIX) in own or path.startswith("model/")


def read_loaded(folder: int, report: Report, rank: int, tick: Tick = lambda *_: None) -> Loaded:
    """Read a verified checkpoint for one rank of a run of any number of ranks.

    Args:
        tick: called for each chunk that is read and not only mapped, also of what the other ranks saved.

    Raises:
        CheckpointError: a file that every checkpoint of so many ranks has is not listed.
    """
    world = report.manifest.get("world")
    if not isinstance(world, int) or isinstance(world, bool) or not 1 <= world <= len(report.files):
        raise CheckpointError(f"{report.path} was saved by {world!r} ranks, which its files are too few for")
    listed = {entry.path for entry in report.files}
    missing = sorted(required_files(world) - plain_names(listed))
    if missing:
        raise CheckpointError(f"{report.path} does not hold {', '.join(missing)}: it was not written by a run")
    state, tensors = rank_files(rank)
    trainer, shape, saved_here = read_json(folder, TRAINER), read_json(folder, MODEL_CONFIG), rank < world
    head: dict[str, Any] = {name: trainer[name] for name in ("step", "epoch", "tokens", "metrics", "flags", "global_state")}
    return Loaded(
        **head,
        model=read_model(folder, shape),
        model_config=shape,
        tokenizer=read_json(folder, TOKENIZER),
        rank_state=read_json(folder, state)["state"] if saved_here else {},
        rank_tensors=read_state(folder, tensors, listed, tick) if saved_here else {},
        others=lambda: read_others(report.path, rank, world, tick),
        path=report.path,
        manifest=report.manifest,
        config=read_json(folder, CONFIG) if CONFIG in listed else None,
        notes=[f"{name} is not part of the checkpoint and was not read" for name in report.strays],
    )


def shape_of(path: Path) -> dict[str, Any]:
    """The keys of the model in a committed checkpoint (those of a `DeepSeekConfig`). Takes no lease: for the holder of the run.

    Raises:
        CheckpointError: there are none that can be read.
    """
    try:
        folder = open_folder(path)
        try:
            return read_json(folder, MODEL_CONFIG)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError(f"{path}: {MODEL_CONFIG}: {error.strerror or error}") from error


def read_model(folder: int, shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a model of that shape, mapped."""
    return with_multiplicity(read_tensors(folder, MODEL), shape)


def with_multiplicity(tensors: dict[str, Tensor], shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """`tensors`, with the multiplicity of experts where an earlier version saved none: no expert was split then."""
    if shape.get("use_moe") and shape.get("moe_top_k") == 1 and shape.get("router_score") == "softmax":
        for name in [name for name in tensors if name.endswith(".router.bias")]:
            tensors.setdefault(name.removesuffix("bias") + "log2_multiplicity", torch.zeros_like(tensors[name]))
    return tensors


def read_others(path: Path, rank: int, world: int, tick: Tick) -> list[Shard]:
    """What every rank but `rank` saved, after comparing its digests; `tick` is called for each chunk.

    Raises:
        CheckpointError: damaged, or gone.
    """
    ranks = [other for other in range(world) if other != rank]
    wanted = {file for other in ranks for file in rank_files(other)}
    with leased(path) as folder:
        report = require(verify(path, select=lambda file: file.removesuffix(SUFFIX) in wanted, progress=tick))
        listed = {entry.path for entry in report.files}
        return [_read_shard(folder, *rank_files(other), listed, tick) for other in ranks]


def _read_shard(folder: int, state: str, tensors: str, listed: set[str], tick: Tick) -> Shard:
    return Shard(read_state(folder, tensors, listed, tick), read_json(folder, state)["state"].get("begins", {}))


def read_state(folder: int, relpath: str, listed: set[str], tick: Tick) -> dict[str, Tensor]:
    """The tensors of a rank, compressed or not. A file that is not compressed is mapped: nothing of it is read yet."""
    return read_tensors(folder, relpath) if relpath in listed else read_compressed(folder, relpath + SUFFIX, tick)


def read_json(folder: int, relpath: str) -> dict[str, Any]:
    """A JSON object of a checkpoint, with tuples and numbers as they were given.

    Raises:
        CheckpointError: no JSON object, or a larger one than any that is written.
    """
    limit = MAX_MODEL_JSON_BYTES if relpath in (MODEL_CONFIG, TOKENIZER) else MAX_JSON_BYTES
    value = unpack(load_json(read_file(folder, relpath, limit), relpath))
    if not isinstance(value, dict):
        raise CheckpointError(f"{os.fspath(relpath)} holds no object")
    return value
