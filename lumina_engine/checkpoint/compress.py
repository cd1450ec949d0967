"""`checkpoint_compression: zstd` for the optimizer state: safetensors files in one zstd frame, ending in `.zst` (C82).

The weights stay as they are: they must be mappable, and bf16 hardly shrinks. What is compressed is hashed as it lies on the
disk, so it is verified before it is unpacked; and no more is unpacked than the frame says, up to `MOST_RATIO` times its size.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import zstandard
from torch import Tensor

from .backup import Tick
from .files import CHUNK_BYTES, CheckpointError
from .header import header_length, parse_header
from .tensors import tensors_of
from .verify import opened

SUFFIX = ".zst"
LEVEL = 3
MOST_RATIO = 2000  # of moments that are all zero zstd makes about 1/1,300
_FLUSH = 1 << 20


def compressed(pieces: Callable[[], Iterable[Any]], size: int) -> Callable[[], Iterator[Any]]:
    """The pieces of a file of `size` bytes as one zstd frame, with a checksum, made while they are written."""

    def made() -> Iterator[Any]:
        packer = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj(size)
        waiting: list[bytes] = []
        for piece in pieces():
            waiting.append(packer.compress(memoryview(piece).cast("B")))
            if sum(map(len, waiting)) >= _FLUSH:
                yield b"".join(waiting)
                waiting.clear()
        yield b"".join([*waiting, packer.flush()])

    return made


def read_compressed(folder: int, relpath: str, tick: Tick = lambda *_: None) -> dict[str, Tensor]:
    """All tensors of a compressed safetensors file, in memory of their own; `tick` is called for each chunk of them.

    Raises:
        CheckpointError: no zstd frame, more or less in it than its header says, or a header that breaks a rule.
        OSError: cannot read.
    """
    with opened(folder, relpath) as (fd, packed):
        try:
            size = zstandard.frame_content_size(os.pread(fd, 64, 0))
            if not 8 <= size <= packed * MOST_RATIO:
                raise CheckpointError(f"{relpath}: {packed} bytes say that they unpack to {size}")
            body, at = bytearray(size), 0
            reader = zstandard.ZstdDecompressor().stream_reader(io.FileIO(fd, closefd=False))
            while at < size and (count := reader.readinto(memoryview(body)[at : at + CHUNK_BYTES])):
                at += count
                tick()
            more = reader.read(1)
        except zstandard.ZstdError as error:
            raise CheckpointError(f"{relpath}: cannot be unpacked: {error}") from error
    if at != size or more:
        raise CheckpointError(f"{relpath}: does not unpack to the {size} bytes that it says")
    length = header_length(bytes(body[:8]), size, relpath)
    return tensors_of(body, parse_header(bytes(body[8 : 8 + length]), size, relpath), relpath)


def plain_names(paths: Iterable[str]) -> set[str]:
    """The names that files have without compression."""
    return {path.removesuffix(SUFFIX) for path in paths}
