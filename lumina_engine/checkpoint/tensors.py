"""Tensors and state into the files of a checkpoint and back: safetensors and JSON, no pickle.

Tensors go through the one hashing writer chunk by chunk: from where they lie if training waits for the save, from a copy that
is laid out as the file if it goes on. Reading maps the file privately: pages are loaded when they are used, and writing to a
tensor never reaches the file.
"""

from __future__ import annotations

import math
import mmap
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .direct import ALIGNMENT
from .files import CHUNK_BYTES, CheckpointError
from .header import Header, TensorEntry, build_header
from .verify import opened, read_header

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def tensor_file(
    tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> tuple[int, Callable[[], Iterator[Any]]]:
    """Size in bytes of the safetensors file for these tensors, and a function that yields its content piece by piece.

    Raises:
        CheckpointError: a dtype that the format has no name for.
    """
    head, header = _layout(tensors, metadata)

    def pieces() -> Iterator[Any]:
        yield head
        for entry in header.tensors:
            yield from _bytes_of(tensors[entry.name])

    return header.file_bytes, pieces


def tensor_image(
    tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> tuple[int, Callable[[], Iterator[Any]]]:
    """As `tensor_file`, of a copy in host memory: the tensors as they are now, which further training does not touch.

    The copy is laid out as the file and aligned, so that it can be written past the page cache from where it lies.

    Raises:
        CheckpointError: a dtype that the format has no name for.
    """
    head, header = _layout(tensors, metadata)
    size = header.file_bytes
    buffer = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    image = buffer[-buffer.data_ptr() % ALIGNMENT :][:size]
    image[: header.data_start] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    body = image[header.data_start :]
    for entry in header.tensors:
        tensor = tensors[entry.name].detach()
        body[entry.begin : entry.end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return size, lambda: _chunks(image)


def _layout(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> tuple[bytes, Header]:
    """The header, larger items first. Each tensor is asked for once: a mapping may make it."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            raise CheckpointError(f"tensor {name}: {tensor.dtype} with layout {tensor.layout} cannot be stored")
        found[name] = tensor.dtype, tuple(tensor.shape)
    names = sorted(found, key=lambda name: (-found[name][0].itemsize, name))
    return build_header([(name, DTYPES[found[name][0]], found[name][1]) for name in names], metadata)


def _bytes_of(tensor: Tensor) -> Iterator[Any]:
    whole = tensor.detach().contiguous()
    yield from _chunks(whole.as_strided((whole.numel(),), (1,)).view(torch.uint8))  # of one item any stride is contiguous


def _chunks(raw: Tensor) -> Iterator[Any]:
    for begin in range(0, raw.numel(), CHUNK_BYTES):
        yield raw[begin : begin + CHUNK_BYTES].cpu().numpy()


def read_tensors(folder: int, relpath: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file below the folder descriptor, privately mapped (S1 is checked before mapping).

    Raises:
        CheckpointError: the header breaks a rule. OSError: cannot read.
    """
    with opened(folder, relpath) as (fd, size):
        header = read_header(fd, size, relpath)
        if size == header.data_start:
            return {entry.name: torch.empty(entry.shape, dtype=_dtype(entry, relpath)) for entry in header.tensors}
        mapped = mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
    return tensors_of(mapped, header, relpath)


def tensors_of(body: mmap.mmap | bytearray, header: Header, relpath: str) -> dict[str, Tensor]:
    """The tensors of a whole safetensors file in memory, or mapped; they share it."""
    return {entry.name: _tensor(body, entry, header, relpath) for entry in header.tensors}


def _dtype(entry: TensorEntry, relpath: str) -> torch.dtype:
    if entry.dtype not in _BY_NAME:
        raise CheckpointError(f"{relpath}: tensor {entry.name!r} has dtype {entry.dtype}, which Lumina does not use")
    return _BY_NAME[entry.dtype]


def _tensor(mapped: mmap.mmap | bytearray, entry: TensorEntry, header: Header, relpath: str) -> Tensor:
    dtype, count = _dtype(entry, relpath), math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    offset = header.data_start + entry.begin
    if dtype is torch.bool:  # a byte other than 0 and 1 in a torch.bool is undefined
        return (torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=offset) != 0).reshape(entry.shape)
    if offset % dtype.itemsize:  # a file of another writer: copied, since torch wants aligned memory
        return torch.frombuffer(bytearray(mapped[offset : offset + entry.end - entry.begin]), dtype=dtype).reshape(entry.shape)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).reshape(entry.shape)


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first floating tensor with a NaN or an infinity.

    A sum is not finite where one of its terms is not; the other way round it may only have overflowed, which is then looked at.
    So a sound model is read once, with one answer from each device.
    """
    sums: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            total = tensor.detach().sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
            sums.setdefault(tensor.device, []).append((name, total.double()))
    suspects = set()
    for found in sums.values():
        finite = torch.stack([total for _, total in found]).isfinite().tolist()
        suspects |= {name for (name, _), sound in zip(found, finite, strict=True) if not sound}
    return next((name for name in tensors if name in suspects and not tensors[name].detach().isfinite().all()), None)


def pack(value: Any, prefix: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """A nested state as JSON values; its tensors go into `tensors` under `prefix…` and leave their name behind.

    Tuples, keys that are no text and non-finite numbers are written as `{"@…": …}`, so that `unpack` gives back equal values.

    Raises:
        CheckpointError: a value of another kind; its place is named.
    """
    if value is None or (isinstance(value, bool | str | int) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, Tensor):
        if tensors is None:
            raise CheckpointError(f"{prefix} is a tensor; tensors belong into rank_tensors")
        if prefix in tensors:
            raise CheckpointError(f"two tensors are named {prefix}")
        tensors[prefix] = value
        return {"@tensor": prefix}
    if isinstance(value, np.generic):
        return pack(value.item(), prefix, tensors)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"@float": repr(value)}
    if isinstance(value, tuple | list):
        plain = all(type(item) is int for item in value)  # the states of random generators have hundreds of them
        items = list(value) if plain else [pack(item, f"{prefix}.{index}", tensors) for index, item in enumerate(value)]
        return {"@tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("@") for key in value):
            return {key: pack(item, f"{prefix}.{key}", tensors) for key, item in value.items()}
        pairs = [[pack(key, prefix, None), pack(item, f"{prefix}.{key}", tensors)] for key, item in value.items()]
        return {"@map": pairs}
    raise CheckpointError(
        f"{prefix} is a {type(value).__name__}, which a checkpoint cannot hold (numbers, texts, lists, mappings, tensors)"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """The value that `pack` was given.

    Raises:
        CheckpointError: an unknown mark, or a tensor that is not there.
    """
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (mark, inner), *_ = value.items()
        if mark == "@tuple":
            return tuple(unpack(item, tensors) for item in inner)
        if mark == "@float":
            return float(inner)
        if mark == "@map":
            return {unpack(key, tensors): unpack(item, tensors) for key, item in inner}
        if mark == "@tensor":
            if tensors is None or inner not in tensors:
                raise CheckpointError(f"the state refers to tensor {inner!r}, which the checkpoint does not hold")
            return tensors[inner]
    return {key: unpack(item, tensors) for key, item in value.items()}


def capture_rng() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State of python's, numpy's, torch's CPU and every CUDA generator of this process: JSON values, and tensors `rng.…`."""
    generator: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = generator
    state = {
        "python": random.getstate(),
        "numpy": {"name": name, "keys": keys.tolist(), "position": position, "has_gauss": has_gauss, "cached": cached},
    }
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"rng.cuda.{index}": device for index, device in enumerate(torch.cuda.get_rng_state_all())}
    return state, tensors


def restore_rng(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put every generator back to what `capture_rng` saw; generators of CUDA devices that are not here are left out.

    Raises:
        CheckpointError: python's, numpy's or torch's state is missing.
    """
    missing = [name for name, there in (("python", state), ("numpy", state), ("rng.torch", tensors)) if name not in there]
    if missing:
        raise CheckpointError(f"the saved random state lacks {', '.join(missing)}")
    random.setstate(state["python"])
    numpy = state["numpy"]
    keys = np.array(numpy["keys"], dtype=np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(tensors["rng.torch"].clone())
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"].clone(), index)
