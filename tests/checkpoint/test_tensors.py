"""The file of tensors in memory, as an asynchronous save keeps it (C78)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from lumina_engine.checkpoint.direct import ALIGNMENT
from lumina_engine.checkpoint.files import CHUNK_BYTES, CheckpointError
from lumina_engine.checkpoint.tensors import DTYPES, tensor_file, tensor_image


def tensors() -> dict[str, Tensor]:
    """Every dtype, and every shape that is no plain block of memory."""
    draw = torch.Generator().manual_seed(1)
    found = {str(dtype): torch.randint(0, 2, (3, 5), generator=draw).to(dtype) for dtype in DTYPES}
    grid = torch.randn(6, 4, generator=draw)
    return found | {
        "transposed": grid.t(), "every second": grid[::2, 1::2], "spread": grid[:1].expand(3, 4), "one number": grid[0, 0],
        "one of a column": grid[:1, 1], "negated": torch.complex(grid, grid).conj().imag,
        "empty": grid[:0], "parameter": torch.nn.Parameter(grid.clone()),
    }  # fmt: skip


def content(made: tuple[int, Callable[[], Iterator[Any]]]) -> bytes:
    size, pieces = made
    whole = b"".join(memoryview(piece).cast("B") for piece in pieces())
    assert len(whole) == size
    return whole


def test_c078_the_image_is_the_file() -> None:
    given = tensors()
    image = content(tensor_image(given, {"format": "pt"}))
    assert image == content(tensor_file(given, {"format": "pt"}))
    loaded = load(image)
    assert loaded.keys() == given.keys()
    assert all(torch.equal(loaded[name], given[name]) and loaded[name].dtype is given[name].dtype for name in given)


def test_c078_the_image_comes_in_chunks_that_begin_at_pages() -> None:
    """So that what compresses them holds no second copy of it all."""
    _, pieces = tensor_image({"w": torch.zeros(2 * CHUNK_BYTES + 5, dtype=torch.uint8)})
    chunks = list(pieces())
    assert [len(chunk) for chunk in chunks[:2]] == [CHUNK_BYTES] * 2 and len(chunks) == 3
    assert all(chunk.ctypes.data % ALIGNMENT == 0 for chunk in chunks)


def test_c078_the_image_lies_in_host_memory_whatever_the_default_device() -> None:
    given = tensors()
    with torch.device("meta"):
        made = tensor_image(given)
    assert content(made) == content(tensor_file(given))


class Made(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for; `asked` counts."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.asked = names, 0

    def __getitem__(self, name: str) -> Tensor:
        self.asked += 1
        return torch.full((3,), float(self.names.index(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_c078_a_tensor_is_made_once_for_the_header_and_once_to_be_written() -> None:
    made = Made(["b", "a"])
    file = tensor_file(made)
    assert made.asked == 2
    assert load(content(file))["b"].tolist() == [0, 0, 0] and made.asked == 4


def test_c078_training_on_changes_no_image() -> None:
    given = tensors()
    image = tensor_image(given)
    before = content(image)
    for tensor in given.values():
        tensor.detach().untyped_storage().fill_(1)
    assert content(image) == before != content(tensor_image(given))


def test_c078_an_image_of_nothing_is_a_header() -> None:
    assert load(content(tensor_image({}))) == {}


def test_c078_what_the_format_has_no_name_for_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"tensor odd: torch\.complex64 .* cannot be stored"):
        tensor_image({"odd": torch.zeros(2, dtype=torch.complex64)})
