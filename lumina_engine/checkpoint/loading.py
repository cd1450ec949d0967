"""A committed checkpoint as a model that can talk: verified, complete, with its own tokenizer, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .files import CheckpointError
from .keep import leased
from .payload import MODEL, MODEL_CONFIG, TOKENIZER, read_json, read_model
from .plain import architecture_diff
from .resolve import resolve_checkpoint
from .resume import check_ledger
from .tensors import unpack
from .verify import Report, require, verify

if TYPE_CHECKING:
    from ..data.tokenizer import ConversationTokenizer
    from ..model.transformer import DeepSeekTransformer


def load_model(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DeepSeekTransformer, ConversationTokenizer, dict[str, Any]]:
    """The model of a committed checkpoint in evaluation mode, its tokenizer, and facts about them.

    Every digest under model/ is compared before a tensor is read; optimizer and rank state are not touched. Weights keep the
    dtype they were saved in unless `dtype` is given.

    Args:
        path: what `resolve_checkpoint` understands.
        progress: told how many bytes under model/ of how many were read and found sound.

    Returns:
        model, tokenizer, and a mapping with path, name, run (its folder's name), step, epoch, tokens, metrics, digest (SHA-256
        of the manifest), created (unix seconds), world, parameters, weights_bytes, dtype, device, tokenizer, suspect.

    Raises:
        CheckpointError: damaged, replaced, incomplete, of another architecture, or with another tokenizer than the one here.
            No weight is ever left random or guessed.
    """
    path = resolve_checkpoint(path)
    with leased(path) as folder:
        report = require(verify(path, select=lambda name: name.startswith("model/"), progress=progress))
        check_ledger(report)
        missing = sorted({MODEL, MODEL_CONFIG, TOKENIZER} - {entry.path for entry in report.files})
        if missing:
            raise CheckpointError(f"{path} does not hold {', '.join(missing)}")
        shape, named = read_json(folder, MODEL_CONFIG), read_json(folder, TOKENIZER)
        tensors = read_model(folder, shape)
    tokenizer = _tokenizer(named, path)
    try:
        model = build_model(shape, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    ids, rows = tokenizer.get_vocab_size(), model.config.vocab_rows
    if ids > rows:
        raise CheckpointError(f"{path}: tokenizer {tokenizer.name} has {ids} ids, the embedding {rows} rows")
    model = model.to(device=device, dtype=dtype).eval()
    return model, tokenizer, _facts(report, model, tokenizer)


def build_model(shape: dict[str, Any], tensors: dict[str, torch.Tensor]) -> DeepSeekTransformer:
    """A model of that shape which holds exactly these tensors.

    Raises:
        CheckpointError: no shape of this version, tensors that are missing, left over or of another shape.
    """
    from ..config.schema import ConfigError, DeepSeekConfig
    from ..model.transformer import DeepSeekTransformer

    try:
        with torch.device("meta"):
            model = DeepSeekTransformer(DeepSeekConfig.from_dict(shape))
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{MODEL_CONFIG} describes no model of this version: {error}") from error
    diff = architecture_diff(tensors, model.state_dict())
    if diff:
        raise CheckpointError(f"the weights do not fit {MODEL_CONFIG}: {diff}")
    model.load_state_dict(tensors, assign=True)
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise CheckpointError(f"nothing fills {', '.join(empty[:5])} of the model")
    return model


def _tokenizer(named: dict[str, Any], path: Path) -> ConversationTokenizer:
    from ..data.tokenizer import ConversationTokenizer, TokenizerError

    name, digest = named.get("name"), named.get("digest")
    if not isinstance(name, str) or not isinstance(digest, str):
        raise CheckpointError(f"{path} names no tokenizer, so it cannot be talked to")
    try:
        tokenizer = ConversationTokenizer(name)
    except TokenizerError as error:
        raise CheckpointError(f"{path} needs tokenizer {name}: {error}") from error
    if tokenizer.digest != digest:
        fix = "put that file back as it was" if Path(name).is_absolute() else "use the Lumina that it was trained with"
        raise CheckpointError(
            f"{path} was trained with tokenizer {name} of digest {digest[:16]}, the one here has "
            f"{tokenizer.digest[:16]}: other ids, so its words would be wrong; {fix}"
        )
    return tokenizer


def _facts(report: Report, model: DeepSeekTransformer, tokenizer: ConversationTokenizer) -> dict[str, Any]:
    manifest, path = report.manifest, report.path
    first = next(model.parameters())
    return {
        "path": str(path),
        "name": path.name,
        "run": path.parent.parent.name,
        "step": manifest["step"],
        "epoch": manifest.get("epoch"),
        "tokens": manifest.get("tokens"),
        "metrics": unpack(manifest.get("metrics") or {}),
        "digest": report.digest,
        "created": manifest.get("created"),
        "world": manifest.get("world"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "tokenizer": tokenizer.name,
        "suspect": bool((manifest.get("flags") or {}).get("suspect")),
    }
