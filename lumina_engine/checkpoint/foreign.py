"""Committed checkpoints to and from folders of other programs: `config.json` and safetensors; pickles through pickles.py.

A folder that is exported appears as a whole or not at all. What is imported is compared with the model that its `config.json`
describes before a run is made.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .files import (
    CheckpointError,
    dump_json,
    load_json,
    make_folder,
    nonce,
    open_folder,
    read_file,
    require_space,
    sync_folder,
    write_file,
)
from .keep import leased
from .payload import MODEL_CONFIG, TOKENIZER, Payload, read_json, read_model, with_multiplicity
from .pickles import SUFFIXES, is_deepspeed, unpack_weights
from .plain import architecture_diff
from .resolve import resolve_checkpoint
from .resume import check_ledger
from .tensors import read_tensors, tensor_file
from .verify import require, verify

if TYPE_CHECKING:
    from ..config.schema import DeepSeekConfig

FORMATS = ("hf", "safetensors")
WEIGHTS, INDEX, SHAPE = "model.safetensors", "model.safetensors.index.json", "config.json"
# In an exported config.json: what the ids mean, by name and digest, and the template of turns.
_TOKENIZER_ENTRY = "lumina_tokenizer"
MAX_DESCRIPTION_BYTES = 16 << 20


def export_checkpoint(reference: str | os.PathLike[str], out: str | os.PathLike[str], kind: str = "hf") -> dict[str, Any]:
    """Write the model of a committed checkpoint into a new folder.

    `hf` is the Hugging Face layout that computes the same function, `safetensors` has our own names. Weights keep their dtype;
    there are no tokenizer files, the entry `lumina_tokenizer` of config.json names the tokenizer and has the chat template.

    Returns:
        path, layout (model_type, or lumina), tensors, bytes.

    Raises:
        CheckpointError: damaged or foreign, `out` exists, or no layout can hold the model (the key is named).
    """
    from ..config.schema import DeepSeekConfig
    from ..data.tokenizer import CHAT_TEMPLATE
    from ..model.hf import LayoutError, hf_config, to_hf

    source, target = resolve_checkpoint(reference), Path(out).expanduser().resolve()
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists: name a folder that does not")
    with leased(source) as folder:
        report = require(verify(source, select=lambda name: name.startswith("model/")))
        check_ledger(report)
        shape, tokenizer = read_json(folder, MODEL_CONFIG), read_json(folder, TOKENIZER)
        tensors = read_model(folder, shape)
        config = DeepSeekConfig.from_dict(shape)
        if kind == "hf":
            try:
                described, tensors = hf_config(config), to_hf(tensors, config)
            except LayoutError as error:
                raise CheckpointError(f"{source} cannot be exported to Hugging Face: {error}") from error
            described |= {"dtype": str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")}
        else:
            described = config.to_dict()
        described[_TOKENIZER_ENTRY] = {**tokenizer, "chat_template": CHAT_TEMPLATE}
        size = _write_folder(target, described, tensors)
    layout = described["model_type"] if kind == "hf" else "lumina"
    return {"path": str(target), "layout": layout, "tensors": len(tensors), "bytes": size}


def _write_folder(target: Path, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """The bytes of the weights. Nothing is left behind on failure."""
    size, pieces = tensor_file(tensors, {"format": "pt"})
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, size)
    staging = target.with_name(f".{target.name}.{nonce()}")
    make_folder(staging)
    try:
        folder = open_folder(staging)
        try:
            write_file(folder, WEIGHTS, pieces(), size)
            write_file(folder, SHAPE, [dump_json(dict(described))])
        finally:
            os.close(folder)
        sync_folder(staging)
        staging.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return size


def read_foreign(folder: str | os.PathLike[str], tokenizer: str | None = None) -> Payload:
    """A folder with config.json and safetensors (Hugging Face, or exported by us) as step 0 of a run.

    `tokenizer` names what the ids mean, unless we exported the folder.

    Raises:
        CheckpointError: no such folder, pickles only, an entry of config.json that this model cannot compute, tensors that
            are missing, left over or of another shape, or a tokenizer that is not known or has too many ids.
    """
    from ..config.finding import ConfigError
    from ..config.schema import DeepSeekConfig
    from ..model.hf import LayoutError, config_from_hf, from_hf

    path = Path(folder).expanduser()
    described, tensors = _described(path), _tensors(path)
    named = described.pop(_TOKENIZER_ENTRY, None)
    try:
        if "model_type" in described:
            config = config_from_hf(described).resolved()
            tensors = from_hf(tensors, config, interleaved=described.get("rope_interleave", True) is not False)
        else:
            config = DeepSeekConfig.from_dict(described).resolved()
    except (LayoutError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    tensors = with_multiplicity(tensors, config.to_dict())
    _compare(path, config, tensors)
    return Payload(
        step=0,
        epoch=0,
        tokens=0,
        model=tensors,
        model_config=config.to_dict(),
        tokenizer=_tokenizer(path, tokenizer, named, config.vocab_rows),
        metrics={},
    )


def _described(path: Path) -> dict[str, Any]:
    try:
        content = load_json(_read_small(path / SHAPE), SHAPE)
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {SHAPE}: name the folder of a Hugging Face model") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path} is a file: name the folder with {SHAPE} and safetensors") from None
    except OSError as error:
        raise CheckpointError(f"{path / SHAPE}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path / SHAPE} holds no JSON object")
    return content


def _read_small(path: Path) -> bytes:
    """A description of a foreign folder: a regular file of at most 16 MiB, however the links of a model cache lead there.

    Raises:
        CheckpointError: no regular file, too long. OSError: missing, unreadable.
    """
    real = path.resolve(strict=True)
    folder = open_folder(real.parent)
    try:
        return read_file(folder, real.name, MAX_DESCRIPTION_BYTES)
    finally:
        os.close(folder)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, or of those that an index names."""
    tensors: dict[str, Tensor] = {}
    for name in _files(path):
        real = (path / name).resolve()  # a model cache has links to its blobs
        try:
            folder = open_folder(real.parent)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from error
        try:
            found = read_tensors(folder, real.name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from error
        finally:
            os.close(folder)
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(f"{path}: the tensor {min(twice)} is in two files")
        tensors |= found
    return tensors


def _files(path: Path) -> Iterable[str]:
    if (path / INDEX).exists():
        content = load_json(_read_small(path / INDEX), INDEX)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise CheckpointError(f"{path / INDEX} names no files beside it")
        return sorted(set(names.values()))
    if (path / WEIGHTS).exists():
        return [WEIGHTS]
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
    why = f"{pickles[0]} is a pickle: import that file itself, with --shape {path / SHAPE}" if pickles else "nothing to read"
    raise CheckpointError(f"{path} has no {WEIGHTS} and no {INDEX}: {why}")


def _compare(path: Path, config: DeepSeekConfig, tensors: Mapping[str, Tensor]) -> None:
    from ..model.transformer import DeepSeekTransformer

    with torch.device("meta"):
        expected = DeepSeekTransformer(config).state_dict()
    if diff := architecture_diff(dict(tensors), expected):
        raise CheckpointError(f"{path}: the weights do not fit {SHAPE}: {diff}")


def _tokenizer(path: Path, wanted: str | None, named: object, rows: int) -> dict[str, str]:
    """Name and digest of the tokenizer, compared with what the exporter noted."""
    from ..data.tokenizer import ConversationTokenizer, TokenizerError

    noted = named if isinstance(named, dict) else {}
    name = wanted or noted.get("name")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{path} does not say what its ids mean: give --tokenizer (gpt-4, gpt-4o, lumina-1k, a .tiktoken file "
            "or a tokenizer.json)"
        )
    try:
        tokenizer = ConversationTokenizer(name)
    except TokenizerError as error:
        raise CheckpointError(f"{path}: tokenizer {name}: {error}") from error
    if noted.get("digest") not in (None, tokenizer.digest):
        raise CheckpointError(f"{path} was trained with another tokenizer than {name}: its digest is {noted['digest'][:16]}")
    if tokenizer.get_vocab_size() > rows:
        raise CheckpointError(f"{path}: tokenizer {name} has {tokenizer.get_vocab_size():,} ids, the embedding {rows:,} rows")
    return {"name": tokenizer.name, "digest": tokenizer.digest}


@contextmanager
def _without_pickles(source: Path, shape: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A folder with config.json and safetensors of what is imported; pickles are unpacked into it by a process of their own."""
    pickled = source.suffix in SUFFIXES and source.is_file()
    if not pickled and not is_deepspeed(source):
        if shape is not None:
            raise CheckpointError(f"{source} has a {SHAPE} of its own: --shape is for .pt files and folders of DeepSpeed")
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="lumina-import-") as made:
        folder = Path(made)
        unpack_weights(source, folder)
        if shape is not None:
            (folder / SHAPE).write_bytes(_read_small(Path(shape).expanduser()))
        if not (folder / SHAPE).exists():
            raise CheckpointError(
                f"{source} holds weights only, and shapes do not tell the number of heads: give --shape FILE ({SHAPE})"
            )
        yield folder


def import_folder(
    folder: str | os.PathLike[str],
    root: str | os.PathLike[str],
    run: str,
    tokenizer: str | None = None,
    shape: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Commit a folder, a `.pt` file or a folder of DeepSpeed as step 0, and the best checkpoint, of a new run.

    `shape` names the config.json of weights that come without one.

    Returns:
        path, run, layout, parameters, tokenizer.

    Raises:
        CheckpointError: as `read_foreign`. RunError: the name is no name, or there is such a run.
    """
    from ..config.schema import Config
    from ..run.directory import RunDirectory, check_name
    from .manager import CheckpointManager

    check_name(run)
    with _without_pickles(Path(folder).expanduser(), shape) as plain:
        payload, described = read_foreign(plain, tokenizer), _described(plain)
    config = Config(**{**payload.model_config, "tokenizer": payload.tokenizer["name"], "experiment_name": run})
    made = RunDirectory.create(root, run)
    [result] = CheckpointManager(config, made).save(payload, best=True)
    state, reason = ("failed", result.failed) if result.path is None else ("finished", f"imported from {Path(folder).name}")
    made.update_identity(state=state, reason=reason, exit_code=0 if result.path is not None else 1)
    if result.path is None:
        raise CheckpointError(f"{folder}: {result.failed}")
    config.save(made.config_path).chmod(0o600)
    parameters = sum(
        tensor.numel() for name, tensor in payload.model.items() if ".router." not in name or name.endswith(".weight")
    )
    return {
        "path": str(result.path),
        "run": run,
        "layout": described.get("model_type", "lumina"),
        "parameters": parameters,
        "tokenizer": payload.tokenizer["name"],
    }
