"""Durable files below one folder, written and read only through os.* calls.

Every byte of a checkpoint passes `write_file`: it hashes what it writes, so the digest describes what was meant and not what
came back from the disk. Nothing here follows a link inside the folder, and modes do not depend on the umask. The fault rig
counts the os.* calls of this file; a writer of another library would be invisible to it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .digest import ALGORITHM, ChunkDigests
from .direct import BlockWriter, takes_direct

CHUNK_BYTES = 8 << 20  # one digest per 8 MiB, so damage is found and named without reading the rest
LARGE_CHUNK_BYTES = 128 << 20  # and per 128 MiB of a large file, so that the manifest of tens of terabytes can be read back
LARGE_FILE = 1 << 30
_HOT_BYTES = 1 << 20  # hashed and written before the next ones, while they are in the cache
RESERVE_FROM = 1 << 20  # files from this size on get their blocks before the first write
SPACE_FACTOR = 1.1  # free space asked for, times the expected size
MAX_JSON_BYTES = 32_000_000  # a manifest has 70 bytes a chunk: 3.8 TB in small files, 16 times that in large ones
MAX_JSON_PARTS = 500_000  # brackets, commas and colons: what bounds the memory and the time of parsing
MAX_WIDE_BYTES = 16 << 20  # of JSON beyond ASCII: one wide character makes Python keep four bytes for each
FOLDER_MODE, FILE_MODE = 0o700, 0o600
_RELPATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,3}")
_NO_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # file systems that cannot reserve


class CheckpointError(Exception):
    """A checkpoint is refused or could not be written; the message names the file, the cause and what to do."""

    exit_code = 65


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: path relative to its folder, size in bytes, digest (hex) of each chunk.

    All files of a checkpoint have the same `algorithm`, which stands in the manifest beside them.
    """

    path: str
    size: int
    chunks: tuple[str, ...]
    chunk_bytes: int = CHUNK_BYTES
    algorithm: str = ALGORITHM

    def to_json(self) -> dict[str, Any]:
        own = {} if self.chunk_bytes == CHUNK_BYTES else {"chunk_bytes": self.chunk_bytes}
        return {"path": self.path, "size": self.size, "chunks": list(self.chunks), **own}

    @classmethod
    def from_json(cls, value: Any, chunk_bytes: int = CHUNK_BYTES, algorithm: str = ALGORITHM) -> FileEntry:
        """The entry in a manifest, whose `chunk_bytes` counts where the entry has none of its own.

        Raises:
            CheckpointError: not of the form that `to_json` writes, or a path that leaves the folder.
        """
        if not isinstance(value, dict) or set(value) - {"chunk_bytes"} != {"path", "size", "chunks"}:
            raise CheckpointError("an entry of `files` does not have exactly path, size, chunks")
        path, size, chunks = check_relpath(value["path"]), value["size"], value["chunks"]
        chunk_bytes = value.get("chunk_bytes", chunk_bytes)
        if not is_chunk_size(chunk_bytes):
            raise CheckpointError(f"{path}: chunk_bytes is no known size of chunks")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise CheckpointError(f"{path}: size is no count of bytes")
        if not isinstance(chunks, list) or len(chunks) != -(-size // chunk_bytes):
            raise CheckpointError(f"{path}: number of digests does not match the size")
        if not all(isinstance(chunk, str) and re.fullmatch(r"[0-9a-f]{64}", chunk) for chunk in chunks):
            raise CheckpointError(f"{path}: a digest is not 64 hex digits")
        return cls(path, size, tuple(chunks), chunk_bytes, algorithm)


def is_chunk_size(value: object) -> bool:
    """Whether a manifest may say that its digests are over chunks of this size."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= CHUNK_BYTES * 64


def nonce() -> str:
    """Eight random hex digits for names that nobody else may guess or reuse."""
    return secrets.token_hex(4)


def check_relpath(path: object) -> str:
    """The path if it may stand in a manifest: relative, normalised, plain characters, no hidden part, no `..`.

    Raises:
        CheckpointError: otherwise.
    """
    if not isinstance(path, str) or not _RELPATH.fullmatch(path):
        raise CheckpointError(f"path {path!r} is not allowed inside a checkpoint")
    return path


def open_folder(path: str | Path, dir_fd: int | None = None) -> int:
    """A descriptor of a folder; a link in its place is refused (ELOOP or ENOTDIR)."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def require_unlinked(*folders: Path) -> None:
    """Refuse a link in the place of a run's folder of checkpoints: no writer here follows one, so each save would fail, and
    what lies beside the folder that it leads to would be taken for the rest of the run.

    Raises:
        CheckpointError: one of them is a symbolic link; it and the folder that it names stand in the message.
    """
    for folder in folders:
        if folder.is_symlink():
            target = folder.parent / folder.readlink()
            raise CheckpointError(
                f"{folder} is a symbolic link to {target}, and no link below a run is followed. Put the folder itself there: "
                f"rm {folder} && mv {target} {folder}. To use another disk, keep whole runs there (--runs DIR or LUMINA_RUNS); "
                "backups alone go to backup_path"
            )


def open_beneath(folder: int, relpath: str, flags: int) -> int:
    """Open a file below the folder descriptor without following a link anywhere on the way."""
    *parents, name = check_relpath(relpath).split("/")
    here = folder
    try:
        for parent in parents:
            below = open_folder(parent, dir_fd=here)
            if here != folder:
                os.close(here)
            here = below
        # O_NONBLOCK: a FIFO in the place of a file must not make the opener wait for its writer
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, FILE_MODE, dir_fd=here)
    finally:
        if here != folder:
            os.close(here)


def make_folder(path: str | Path, dir_fd: int | None = None) -> None:
    """mkdir with mode 0700 whatever the umask.

    Raises:
        FileExistsError: something is there already.
    """
    os.mkdir(path, FOLDER_MODE, dir_fd=dir_fd)
    fd = open_folder(path, dir_fd=dir_fd)
    try:
        os.fchmod(fd, FOLDER_MODE)
    finally:
        os.close(fd)


def make_folders(path: Path) -> None:
    """The folder and its missing parents, each 0700 and durable; existing ones keep their mode."""
    path = path.resolve()
    for part in [*reversed(path.parents), path]:
        if not part.exists():
            try:
                make_folder(part)
            except FileExistsError:
                continue  # another process made it in between
            sync_folder(part.parent)


def sync_folder(path: str | Path, dir_fd: int | None = None) -> None:
    """fsync the entries of a folder. A failure is final for what was renamed or created in it: it is never tried again."""
    fd = open_folder(path, dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(
    folder: int, relpath: str, pieces: Iterable[Any], size: int | None = None, like: FileEntry | None = None
) -> FileEntry:
    """Create a new file of mode 0600 below the folder, hash and write the pieces, fsync it.

    Args:
        folder: descriptor of the folder that `relpath` starts from; sub-folders must exist.
        pieces: contiguous buffers (bytes, memoryview, arrays); each is hashed and written before the next one is asked for.
        size: bytes to come, if known: large files get their blocks reserved first.
        like: what is copied, for digests of the same kind over as many bytes: it may have been written without its size being
            known, or by an earlier version.

    Raises:
        OSError: cannot create (also: exists), no space, failed fsync. The file must then be given up, never synced again.
        CheckpointError: the pieces do not add up to `size`.
    """
    fd = open_beneath(folder, relpath, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.fchmod(fd, FILE_MODE)
        if size is not None and size >= RESERVE_FROM:
            _reserve(fd, size)
        chunk_bytes = LARGE_CHUNK_BYTES if size is not None and size >= LARGE_FILE else CHUNK_BYTES
        chunk_bytes, algorithm = (chunk_bytes, ALGORITHM) if like is None else (like.chunk_bytes, like.algorithm)
        blocks = BlockWriter(fd) if takes_direct(fd, size) else None
        digests = ChunkDigests(algorithm, chunk_bytes)
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for begin in range(0, len(view), _HOT_BYTES):
                part = view[begin : begin + _HOT_BYTES]
                digests.update(part)
                blocks.write(part) if blocks else write_all(fd, part)
        digests.finish()
        if size is not None and digests.bytes != size:
            raise CheckpointError(f"{relpath}: {digests.bytes} bytes written, {size} expected")
        if blocks:
            blocks.finish()
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileEntry(relpath, digests.bytes, tuple(digests.found), chunk_bytes, algorithm)


def write_all(fd: int, view: memoryview) -> None:
    """Write every byte: a write may be short."""
    while len(view):
        view = view[os.write(fd, view) :]


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_RESERVE:
            raise


def require_space(folder: Path, size: int) -> None:
    """Refuse to begin a write of `size` bytes that the file system has no room for.

    Raises:
        CheckpointError: less than 1.1 x size is free.
    """
    info = os.statvfs(folder)
    free, needed = info.f_bavail * info.f_frsize, int(size * SPACE_FACTOR)
    if free < needed:
        raise CheckpointError(
            f"not enough room in {folder}: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; "
            "free some space or lower keep_checkpoints"
        )


def read_file(folder: int, relpath: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """The whole content of a regular file below the folder.

    Raises:
        CheckpointError: not a regular file, or longer than `limit` bytes.
        OSError: missing, unreadable, a link.
    """
    fd = open_beneath(folder, relpath, os.O_RDONLY)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{relpath} is no regular file")
        if info.st_size > limit:
            raise CheckpointError(f"{relpath} has {info.st_size} bytes; at most {limit} are read")
        return b"".join(read_pieces(fd, limit))
    finally:
        os.close(fd)


def read_pieces(fd: int, piece_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Pieces of exactly `piece_bytes` (the last may be shorter) from the current offset to the end."""
    parts: list[bytes] = []
    have = 0
    while True:
        data = os.read(fd, min(piece_bytes - have, CHUNK_BYTES))
        if data:
            parts.append(data)
            have += len(data)
        if parts and (not data or have == piece_bytes):
            yield parts[0] if len(parts) == 1 else b"".join(parts)
            parts, have = [], 0
        if not data:
            return


def dump_json(value: Any, sort: bool = False) -> bytes:
    """JSON in ASCII without NaN, keys in the order given (or sorted, for a digest), one newline at the end."""
    return json.dumps(value, sort_keys=sort, ensure_ascii=True, allow_nan=False, indent=1).encode() + b"\n"


def dump_state(value: Any) -> bytes:
    """The same on one line, for what no eye reads: it takes a tenth of the time, which holds training up."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def count_parts(data: bytes) -> int:
    """Brackets, commas and colons of JSON, those of its texts too."""
    return sum(map(data.count, (b",", b"[", b"{", b":")))


def load_json(data: bytes, name: str, max_parts: int = MAX_JSON_PARTS) -> Any:
    """Parse JSON strictly: UTF-8, no NaN or Infinity, no key twice, at most `max_parts` brackets, commas and colons.

    Raises:
        CheckpointError: anything else; `name` stands in the message.
    """
    parts = count_parts(data)
    if parts > max_parts:
        raise CheckpointError(f"{name} has {parts} brackets, commas and colons; at most {max_parts} are read")
    if len(data) > MAX_WIDE_BYTES and not data.isascii():
        raise CheckpointError(f"{name} has {len(data)} bytes; beyond ASCII at most {MAX_WIDE_BYTES} are read")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a key stands twice")
        return found

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is no valid JSON: {error}") from error


def remove_tree(parent: int, name: str) -> None:
    """Delete a folder, a file or a link below the descriptor; links are removed, never followed."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    fd = open_folder(name, dir_fd=parent)
    try:
        with os.scandir(fd) as entries:
            names = sorted(entry.name for entry in entries)
        for child in names:
            remove_tree(fd, child)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
