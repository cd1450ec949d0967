"""Files that are written and read past the page cache: the same bytes, whatever the file system says to it (C78, CK06)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint import direct, files
from lumina_engine.checkpoint import payload as payload_module
from lumina_engine.checkpoint import verify as verify_module
from lumina_engine.checkpoint.digest import ALGORITHMS
from lumina_engine.checkpoint.direct import BlockWriter, read_blocks, takes_direct
from lumina_engine.checkpoint.files import write_file
from lumina_engine.checkpoint.tensors import tensor_image
from lumina_engine.mounts import file_system
from tests.checkpoint.helpers import in_child, manager, payload

BLOCK = 3 * 4096
SIZES = [1, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 4096, 5 * BLOCK + 4097]


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a disk, where there is one: in memory any length may be read and written past the cache."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A descriptor of an empty folder; every file is large enough, and the file system is taken for a local one."""
    monkeypatch.setattr(direct, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(files, "takes_direct", lambda fd, size: size is not None)
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def pieces_of(content: bytes) -> list[bytes]:
    """Cut anywhere."""
    draw, found = random.Random(len(content)), []
    while content:
        count = draw.choice([1, 7, 4096, BLOCK, 2 * BLOCK + 5])
        found, content = [*found, content[:count]], content[count:]
    return found


def address(view: memoryview) -> int:
    """Where it begins in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def aligned(content: bytes) -> memoryview:
    """The content in memory of its own that is aligned."""
    view = memoryview(mmap.mmap(-1, max(1, len(content))))
    view[: len(content)] = content
    return view[: len(content)]


KINDS = [pytest.param(bytes, id="gathered"), pytest.param(aligned, id="aligned")]
Kind = Callable[[bytes], bytes | memoryview]


class Writes:
    """`os.write`, noting of each call its bytes, whether it went past the cache and where in memory they lie; `answers` come
    first, None: a real one."""

    def __init__(self, *answers: Callable[[int, memoryview], int] | None) -> None:
        self.real, self.answers, self.calls, self.places = os.write, list(answers), [], []

    def __call__(self, fd: int, view: memoryview) -> int:
        self.calls.append((len(view), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)))
        self.places.append(0 if view.readonly else address(view))
        answer = self.answers.pop(0) if self.answers else None
        return (answer or self.real)(fd, view)


@pytest.mark.parametrize("size", SIZES)
def test_c078_bytes_and_digests_are_those_of_a_plain_write(folder: int, tmp_path: Path, size: int) -> None:
    content = random.Random(1).randbytes(size)
    entry = write_file(folder, "weights", pieces_of(content), size)
    assert (tmp_path / "weights").read_bytes() == content
    assert (entry.size, entry.chunks) == (size, (ALGORITHMS["blake3"](content).hexdigest(),))


def test_c078_only_the_end_goes_through_the_cache(folder: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probe = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(probe, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no direct writes")
    finally:
        os.close(probe)
    monkeypatch.setattr(os, "write", writes := Writes())
    write_file(folder, "weights", [bytes(2 * BLOCK + 4096 + 5)], 2 * BLOCK + 4096 + 5)
    assert writes.calls == [(BLOCK, True), (BLOCK, True), (4096, True), (5, False)]


def refused(fd: int, view: memoryview) -> int:
    raise OSError(errno.EINVAL, "Invalid argument")


def part(count: int) -> Callable[[int, memoryview], int]:
    """A write that takes so many bytes only, by a descriptor for which that is allowed."""

    def write(fd: int, view: memoryview) -> int:
        return os.pwrite(fd, bytes(view[:count]), os.lseek(fd, 0, os.SEEK_CUR)) and os.lseek(fd, count, os.SEEK_CUR) and count

    return write


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("answer", [refused, part(4096), part(100)], ids=["refused", "short", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_c078_a_write_that_is_refused_or_short_is_gone_on_with(
    folder: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[int, memoryview], int],
    first: int,
    kind: Kind,
) -> None:
    content = kind(random.Random(2).randbytes(3 * BLOCK + 77))
    monkeypatch.setattr(files, "_HOT_BYTES", BLOCK)
    if answer is not refused:  # the odd part is written by the test itself, which O_DIRECT would refuse
        monkeypatch.setattr(direct.BlockWriter, "_set_direct", lambda self, wanted: setattr(self, "_direct", wanted))
    monkeypatch.setattr(os, "write", Writes(*[None] * first, answer))
    write_file(folder, "weights", [content], len(content))
    assert (tmp_path / "weights").read_bytes() == content


@pytest.mark.parametrize("kind", KINDS)
def test_c078_any_other_error_is_told(folder: int, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    def full(fd: int, view: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", Writes(None, full))
    with pytest.raises(OSError, match="No space left"):
        write_file(folder, "weights", [kind(bytes(3 * BLOCK))] * 2, 6 * BLOCK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0, 100, 4096, BLOCK, BLOCK + 100, 2 * BLOCK])
def test_ck06_a_limit_of_the_size_is_the_error_of_any_write(folder: int, limit: int, kind: Kind) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError) as caught:
            write_file(folder, "weights", [kind(bytes(2 * BLOCK + 1))], 2 * BLOCK + 1)
        assert caught.value.errno == errno.EFBIG

    assert in_child(limited) == 0


def test_c078_only_large_files_on_local_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "file").open("wb") as file:
        for kind, taken in (("ext4", True), ("xfs", True), ("nfs4", False), ("overlay", False), ("", False)):
            monkeypatch.setattr(direct, "file_system", lambda place, kind=kind: kind)
            assert takes_direct(file.fileno(), direct.DIRECT_FROM) is taken
        monkeypatch.setattr(direct, "file_system", lambda place: "ext4")
        assert not takes_direct(file.fileno(), direct.DIRECT_FROM - 1) and not takes_direct(file.fileno(), None)


class Reads:
    """`os.readv`, noting whether each call went past the cache; `answers` come first, None: a real one."""

    def __init__(self, *answers: Callable[[int, list[memoryview]], int] | None) -> None:
        self.real, self.answers, self.direct = os.readv, list(answers), []

    def __call__(self, fd: int, views: list[memoryview]) -> int:
        self.direct.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        answer = self.answers.pop(0) if self.answers else None
        return (answer or self.real)(fd, views)


def read_all(path: Path, past_cache: bool) -> list[bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [bytes(block) for block in read_blocks(descriptor, past_cache)]
    finally:
        os.close(descriptor)


def has_direct(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return direct.set_direct(descriptor, True)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("past_cache", [True, False])
@pytest.mark.parametrize("size", [0, *SIZES])
def test_c078_what_is_read_is_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, past_cache: bool
) -> None:
    monkeypatch.setattr(direct, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(direct, "_LOCAL", {file_system(tmp_path)})
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(os, "readv", reads := Reads())
    assert b"".join(read_all(tmp_path / "file", past_cache)) == content
    assert reads.direct[0] is (past_cache and has_direct(tmp_path / "file"))


def invalid(fd: int, views: list[memoryview]) -> int:
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("first", [0, 1])
def test_c078_reading_goes_on_through_the_cache_where_it_cannot_past_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr(direct, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(direct, "_LOCAL", {file_system(tmp_path)})
    (tmp_path / "file").write_bytes(content := random.Random(3).randbytes(2 * BLOCK + 7))
    if not has_direct(tmp_path / "file"):
        pytest.skip("this file system has no direct reads")
    monkeypatch.setattr(os, "readv", reads := Reads(*[None] * first, invalid))
    assert b"".join(read_all(tmp_path / "file", True)) == content
    assert reads.direct[: first + 2] == [True] * (first + 1) + [False]


@pytest.mark.parametrize("size", [2 * BLOCK, 2 * BLOCK + 4096, 2 * BLOCK + 1])
@pytest.mark.parametrize("taken", [1, 9])
def test_c078_a_file_is_as_it_was_when_its_reader_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, taken: int
) -> None:
    monkeypatch.setattr(direct, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(direct, "_LOCAL", {file_system(tmp_path)})
    (tmp_path / "file").write_bytes(content := random.Random(4).randbytes(size))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    reader = read_blocks(descriptor, True)
    list(itertools.islice(reader, taken))
    reader.close()
    assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and os.pread(descriptor, 8, 3) == content[3:11]
    os.close(descriptor)


@pytest.mark.parametrize("extra", [0, 5])
def test_c078_a_large_file_read_past_the_cache_is_judged_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    """Its header is read behind its digests, whether its end is even or odd, and damaged tensors are named."""
    monkeypatch.setattr(direct, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(direct, "DIRECT_FROM", 4096)
    monkeypatch.setattr(verify_module, "DIRECT_FROM", 4096)
    monkeypatch.setattr(direct, "_LOCAL", {file_system(tmp_path)})
    probe, count = manager(tmp_path / "probe"), 4 * BLOCK
    probe.save(payload(1, model={"w": torch.zeros(count, dtype=torch.uint8)}))
    size = (tmp_path / "probe" / "checkpoints" / "step-000001" / "model" / "model.safetensors").stat().st_size
    model = {"w": torch.ones(count - size % 4096 + extra, dtype=torch.uint8)}
    (result,) = manager(tmp_path / "run").save(payload(1, model=model))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    weights = checkpoint / "model" / "model.safetensors"
    assert result.failed is None and weights.stat().st_size % 4096 == extra
    with weights.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\0")
    for past_cache in (True, False):
        report = verify_module.verify(checkpoint, past_cache=past_cache)
        assert "are not what was written (tensor w)" in report.line()


def broken(fd: int, views: list[memoryview]) -> int:
    raise OSError(errno.EIO, "Input/output error")


def test_c078_any_other_error_of_reading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(9))
    monkeypatch.setattr(os, "readv", Reads(broken))
    with pytest.raises(OSError, match="Input/output error"):
        read_all(tmp_path / "file", True)
    monkeypatch.setattr(os, "readv", Reads(invalid))
    with pytest.raises(OSError, match="Invalid argument"):
        read_all(tmp_path / "file", False)


def test_c078_a_save_is_read_back_from_the_disk_and_a_start_reads_what_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_LOCAL", {file_system(tmp_path)})
    monkeypatch.setattr(direct, "DIRECT_FROM", 4096)
    monkeypatch.setattr(verify_module, "DIRECT_FROM", 4096)
    monkeypatch.setattr(os, "write", writes := Writes())
    monkeypatch.setattr(os, "readv", reads := Reads())
    large = {"w": torch.arange(3000.0)}
    (result,) = manager(tmp_path).save(payload(1, model=large))
    (tmp_path / "probe").touch()
    if not has_direct(tmp_path / "probe"):
        pytest.skip("this file system has no direct writes")
    assert result.verified and (8192, True) in writes.calls and reads.direct.count(True) >= 1
    assert reads.direct.count(False) > reads.direct.count(True)  # the small files
    reads.direct.clear()
    assert verify_module.verify(tmp_path / "checkpoints" / "step-000001").ok and not any(reads.direct)


def test_c078_a_block_is_not_asked_for_twice(tmp_path: Path) -> None:
    """Memory: one block, whatever the file's size."""
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    writer = BlockWriter(descriptor)
    block = writer._block
    for _ in range(3):
        writer.write(memoryview(bytes(direct.BLOCK_BYTES + 1)))
    writer.finish()
    assert writer._block is block and os.fstat(descriptor).st_size == 3 * (direct.BLOCK_BYTES + 1)
    os.close(descriptor)


@pytest.mark.parametrize("size", [0, 5, 4096, BLOCK, 5 * BLOCK + 4097])
@pytest.mark.parametrize("before", [0, 7, 4096, BLOCK])
def test_c078_what_begins_at_a_page_is_written_from_where_it_lies(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, before: int
) -> None:
    draw = random.Random(size)
    parts = [draw.randbytes(before), aligned(draw.randbytes(size)), aligned(draw.randbytes(4100)), b"end"]
    monkeypatch.setattr(os, "write", writes := Writes())
    content = b"".join(bytes(part) for part in parts)
    entry = write_file(folder, "weights", parts, len(content))
    assert (tmp_path / "weights").read_bytes() == content
    assert entry.chunks == (ALGORITHMS["blake3"](content).hexdigest(),)
    if size >= 4096:  # behind what fills no block all is gathered
        assert (address(parts[1]) in writes.places) is (before in (0, BLOCK))


@pytest.mark.parametrize("blocking", [True, False])
def test_c078_a_save_beside_training_writes_its_copy_from_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocking: bool
) -> None:
    """All but the odd end of each file, and what was saved is read back."""
    monkeypatch.setattr(direct, "_LOCAL", {file_system(tmp_path)})
    monkeypatch.setattr(direct, "DIRECT_FROM", 4096)
    (tmp_path / "probe").touch()
    if not has_direct(tmp_path / "probe"):
        pytest.skip("this file system has no direct writes")
    begins: list[int] = []

    def copied(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Any:
        size, pieces = tensor_image(tensors, metadata)
        begins.extend(piece.ctypes.data for piece in pieces())
        return size, pieces

    monkeypatch.setattr(payload_module, "tensor_image", copied)
    monkeypatch.setattr(os, "write", writes := Writes())
    made, weights = manager(tmp_path), torch.randn(600_000, generator=torch.Generator().manual_seed(1))
    results = made.save(payload(1, model={"w": weights}), blocking=blocking) or made.wait()
    assert results[0].verified and made.load_latest().model["w"].equal(weights)
    places = [place for place, (_, past_cache) in zip(writes.places, writes.calls, strict=True) if past_cache]
    if blocking:
        assert begins == []
    else:
        assert {begins[0], begins[0] + (1 << 20), begins[0] + (2 << 20)} <= set(places)


def test_c078_what_is_not_aligned_is_gathered_and_goes_past_the_cache_all_the_same(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe").touch()
    if not has_direct(tmp_path / "probe"):
        pytest.skip("this file system has no direct writes")
    content = random.Random(6).randbytes(2 * BLOCK + 8)
    monkeypatch.setattr(os, "write", writes := Writes())
    write_file(folder, "weights", [aligned(content)[8:]], 2 * BLOCK)
    assert writes.calls == [(BLOCK, True), (BLOCK, True)] and (tmp_path / "weights").read_bytes() == content[8:]
