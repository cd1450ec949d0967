"""The header of a safetensors file: built and checked here, without the library (standard library only).

Layout: 8 bytes little-endian header length, the header (JSON: name to dtype, shape, data_offsets; padded with spaces), the
data. Every offset is relative to the first data byte. A file is refused unless its tensors fill the data exactly: no gap, no
overlap, nothing out of range, dtype x shape = size (reliability rule S1).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .files import CheckpointError, load_json

MAX_HEADER_BYTES = 32_000_000
MAX_HEADER_PARTS = 1_000_000  # of its JSON: about 70,000 tensors
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_ALIGN = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: dtype by its safetensors name, shape, [begin, end) in bytes from the first data byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `data_start` is the offset of the first data byte in the file; tensors are in file order."""

    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    data_start: int

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.data_start + (self.tensors[-1].end if self.tensors else 0)

    def between(self, begin: int, end: int) -> list[str]:
        """Names of the tensors that own a byte of the file's range [begin, end)."""
        low, high = begin - self.data_start, end - self.data_start
        return [tensor.name for tensor in self.tensors if tensor.begin < high and low < tensor.end]


def build_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, Header]:
    """Header bytes and layout for (name, dtype, shape) in the order given; larger items first keeps every tensor aligned."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    entries, offset = [], 0
    for name, dtype, shape in tensors:
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        entries.append(TensorEntry(name, dtype, tuple(shape), offset, end))
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % _ALIGN)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"a safetensors header of {len(text)} bytes is over the limit of {MAX_HEADER_BYTES}")
    return struct.pack("<Q", len(text)) + text, Header(tuple(entries), dict(metadata or {}), 8 + len(text))


def header_length(first: bytes, size: int, name: str) -> int:
    """The length of the header from the first 8 bytes of a file of `size` bytes, before anything else is read.

    Raises:
        CheckpointError: too short, too long, or past the end of the file.
    """
    if len(first) < 8:
        raise CheckpointError(f"{name}: too short for a safetensors file")
    length = struct.unpack("<Q", first[:8])[0]
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(f"{name}: header of {length} bytes in a file of {size} (limit {MAX_HEADER_BYTES})")
    return length


def parse_header(text: bytes, size: int, name: str) -> Header:
    """Check a header against the size of its whole file in bytes.

    Raises:
        CheckpointError: any rule of this file's description is broken; the tensor is named.
    """
    table = load_json(text, f"{name}: header", MAX_HEADER_PARTS)
    if not isinstance(table, dict):
        raise CheckpointError(f"{name}: the header is no JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{name}: __metadata__ is no table of texts")
    entries = sorted((_entry(key, value, name) for key, value in table.items()), key=lambda entry: (entry.begin, entry.end))
    expected = 0
    for entry in entries:
        if entry.begin != expected:
            raise CheckpointError(f"{name}: tensor {entry.name!r} overlaps another one or leaves a gap before it")
        expected = entry.end
    if 8 + len(text) + expected != size:
        raise CheckpointError(f"{name}: tensors end at byte {8 + len(text) + expected}, the file at {size}")
    return Header(tuple(entries), metadata, 8 + len(text))


def _entry(key: str, value: Any, name: str) -> TensorEntry:
    where = f"{name}: tensor {key!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} does not have exactly dtype, shape, data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where} has the unknown dtype {dtype!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise CheckpointError(f"{where}: shape and data_offsets must be lists of counts")
    begin, end = offsets
    if end - begin != ITEM_BYTES[dtype] * math.prod(shape):
        raise CheckpointError(f"{where}: {dtype} x {tuple(shape)} does not take {end - begin} bytes")
    return TensorEntry(key, dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in value
    )
