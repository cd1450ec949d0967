"""Is this checkpoint whole? Manifest, sizes and every digest, before anyone reads a tensor.

    MANIFEST.json     what was meant to be written: one entry per file with its size and chunk digests
    MANIFEST.sha256   digest of MANIFEST.json, in the format of `sha256sum -c`, compared byte for byte

A checkpoint is valid when both agree and every listed file is there with that size and those digests. A file that is not listed
is reported and never read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .digest import ALGORITHMS, ChunkDigests
from .direct import DIRECT_FROM, read_blocks
from .files import CheckpointError, FileEntry, is_chunk_size, load_json, open_beneath, open_folder, read_file
from .header import Header, header_length, parse_header

FORMAT = 2  # the newest that this version reads, and of what it writes; 1 had digests of SHA-256 only
FORMATS = {"blake3": FORMAT, "sha256": 1}  # by the digests, so that a copy of an older checkpoint has its very manifest
MANIFEST, MANIFEST_DIGEST, LEASE = "MANIFEST.json", "MANIFEST.sha256", "LEASE"
_STEP = re.compile(r"step-(\d{6,12})", re.ASCII)
# what a broken disk or a half-done folder answers; any other error is about this process and says nothing about the files
DAMAGE = {
    errno.EIO,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENXIO,
    errno.EUCLEAN,
    errno.EBADMSG,
    errno.EOVERFLOW,
}


def step_name(step: int) -> str:
    """Folder name of a step: `step-000123`."""
    if not 0 <= step < 10**12:
        raise CheckpointError(f"step {step} has no folder name")
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step that a committed folder's name stands for; None for any other name (also for a second spelling of a step)."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a checkpoint is refused: the file, why, and the tensors concerned where they can be told."""

    file: str
    reason: str
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.tensors:
            return f"{self.file}: {self.reason}"
        more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
        return f"{self.file}: {self.reason} (tensor {', '.join(self.tensors[:3])}{more})"


@dataclass(slots=True)
class Report:
    """What `verify` found. `digest` is the SHA-256 of MANIFEST.json; `bytes` counts the listed files."""

    path: Path
    problems: list[Problem] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()
    digest: str = ""
    newer_format: bool = False  # whole as far as can be told, but written by a later version: refused, not damaged
    full: bool = False  # digests of all files were compared

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.files)

    @property
    def step(self) -> int | None:
        return self.manifest.get("step")

    def line(self) -> str:
        """All problems on one line."""
        return "; ".join(str(problem) for problem in self.problems)


def verify(
    path: Path,
    full: bool = True,
    select: Callable[[str], bool] | None = None,
    every: bool = False,
    progress: Callable[[int, int], None] | None = None,
    past_cache: bool = False,
) -> Report:
    """Check one checkpoint folder.

    Args:
        path: the folder; a link is refused.
        full: compare digests; False checks the manifest, presence and sizes only.
        select: which listed paths to compare digests of (a rank reads only its own); None = all.
        every: go on after the first damaged file.
        progress: told (bytes whose digest was compared, bytes to compare) after each chunk.
        past_cache: read from the disk itself, where its file system can; else whatever the system remembers of the files.

    Raises:
        OSError: this process cannot read (permission, descriptors, memory); that says nothing about the checkpoint.
    """
    report = Report(path, full=full and select is None)
    try:
        folder = open_folder(path)
    except OSError as error:
        report.problems.append(_damage(path.name, error))
        return report
    try:
        _read_manifest(folder, report)
        if report.ok:
            _check_files(folder, report, (select or (lambda _: True)) if full else None, every, progress, past_cache)
            report.strays = sorted(set(_walk(folder)) - {entry.path for entry in report.files} - {MANIFEST, MANIFEST_DIGEST})
    finally:
        os.close(folder)
    return report


def read_manifest(path: Path) -> Report:
    """Manifest and its digest only: cheap, for lists and pointers. `ok` says no more than that these two agree."""
    report = Report(path)
    try:
        folder = open_folder(path)
    except OSError as error:
        report.problems.append(_damage(path.name, error))
        return report
    try:
        _read_manifest(folder, report)
    finally:
        os.close(folder)
    return report


def require(report: Report) -> Report:
    """The report, if it is good.

    Raises:
        CheckpointError: it is not; every problem is named.
    """
    if not report.ok:
        raise CheckpointError(f"{report.path}: {report.line()}")
    return report


def _damage(file: str, error: OSError) -> Problem:
    if error.errno not in DAMAGE:
        raise error
    return Problem(file, "missing" if error.errno == errno.ENOENT else error.strerror or str(error))


def _read_manifest(folder: int, report: Report) -> None:
    texts = {}
    for name in (MANIFEST, MANIFEST_DIGEST):
        try:
            texts[name] = read_file(folder, name)
        except OSError as error:
            report.problems.append(_damage(name, error))
            return
        except CheckpointError as error:
            report.problems.append(Problem(name, str(error)))
            return
    report.digest = hashlib.sha256(texts[MANIFEST]).hexdigest()
    if texts[MANIFEST_DIGEST] != digest_line(report.digest):
        report.problems.append(Problem(MANIFEST, f"does not match {MANIFEST_DIGEST}: one of the two is damaged"))
        return
    try:
        _read_entries(report, load_json(texts[MANIFEST], MANIFEST))
    except CheckpointError as error:
        report.problems.append(Problem(MANIFEST, str(error)))


def digest_line(digest: str) -> bytes:
    """The content of MANIFEST.sha256."""
    return f"{digest}  {MANIFEST}\n".encode()


def _read_entries(report: Report, manifest: Any) -> None:
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError("has no format number")
    report.manifest = manifest
    if version > FORMAT:
        report.newer_format = True
        raise CheckpointError(f"format {version} is newer than this version of Lumina reads ({FORMAT}); update Lumina")
    step, chunk_bytes = manifest.get("step"), manifest.get("chunk_bytes")
    algorithm = manifest.get("algorithm")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS or not is_chunk_size(chunk_bytes):
        raise CheckpointError(f"digests are not {' or '.join(ALGORITHMS)} over chunks of a known size")
    if not isinstance(step, int) or isinstance(step, bool):
        raise CheckpointError("has no step")
    named = step_of(report.path.name)
    if named is not None and named != step:
        raise CheckpointError(f"belongs to step {step}, the folder is named {report.path.name}")
    if not isinstance(manifest.get("files"), list):
        raise CheckpointError("has no list of files")
    files = tuple(FileEntry.from_json(item, chunk_bytes, algorithm) for item in manifest["files"])
    if len({entry.path for entry in files}) != len(files):
        raise CheckpointError("lists a file twice")
    report.files = files


def _check_files(
    folder: int,
    report: Report,
    select: Callable[[str], bool] | None,
    every: bool,
    progress: Callable[[int, int], None] | None,
    past_cache: bool,
) -> None:
    """Sizes of all files first (cheap, finds truncation at once), then digests."""
    for entry in report.files:
        try:
            size = _size_of(folder, entry.path)
            if size != entry.size:
                report.problems.append(Problem(entry.path, f"has {size} bytes, {entry.size} were written"))
        except OSError as error:
            report.problems.append(_damage(entry.path, error))
        except CheckpointError as error:
            report.problems.append(Problem(entry.path, str(error)))
    if select is None or (report.problems and not every):
        return
    bad = {problem.file for problem in report.problems}
    done, total = 0, sum(entry.size for entry in report.files if select(entry.path))

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for entry in report.files:
        if entry.path in bad or entry.path == LEASE or not select(entry.path):
            continue
        problem = _check_digests(folder, entry, read, past_cache)
        if problem:
            report.problems.append(problem)
            if not every:
                return


def _size_of(folder: int, relpath: str) -> int:
    """Size in bytes of a regular file below the folder.

    Raises:
        CheckpointError: something else lies in its place.
    """
    if relpath != LEASE:
        with opened(folder, relpath) as (_, size):
            return size
    # never opened here: closing any descriptor of it would drop the lease that this process holds
    info = os.stat(LEASE, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{LEASE} is no regular file")
    return info.st_size


@contextmanager
def opened(folder: int, relpath: str) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a regular file below the folder.

    Raises:
        CheckpointError: something else lies in its place.
    """
    fd = open_beneath(folder, relpath, os.O_RDONLY)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{relpath} is no regular file")
        yield fd, info.st_size
    finally:
        os.close(fd)


def _check_digests(folder: int, entry: FileEntry, read: Callable[[int], None], past_cache: bool) -> Problem | None:
    tensors = entry.path.endswith(".safetensors")
    try:
        with opened(folder, entry.path) as (fd, size):
            digests, agreed = ChunkDigests(entry.algorithm, entry.chunk_bytes, read), 0
            with closing(read_blocks(fd, past_cache and size >= DIRECT_FROM)) as blocks:
                for block in blocks:
                    digests.update(block)
                    agreed = _agreed(digests.found, entry.chunks, agreed)
                    if agreed < len(digests.found):
                        break
                else:
                    digests.finish()
            agreed = _agreed(digests.found, entry.chunks, agreed)
            if agreed < len(digests.found):
                begin = agreed * entry.chunk_bytes
                end = min(begin + entry.chunk_bytes, digests.bytes)
                names = _tensors_between(fd, size, entry.path, begin, end) if tensors else ()
                return Problem(entry.path, f"bytes {begin} to {end - 1} are not what was written", names)
            if len(digests.found) < len(entry.chunks):
                return Problem(entry.path, f"ends at byte {digests.bytes} of {entry.size}")
            if tensors:
                read_header(fd, size, entry.path)
    except OSError as error:
        return _damage(entry.path, error)
    except CheckpointError as error:
        return Problem(entry.path, str(error))
    return None


def _agreed(found: Sequence[str], wanted: Sequence[str], agreed: int) -> int:
    """How many chunks from the first on have the digest of the manifest, `agreed` of them known before."""
    while agreed < min(len(found), len(wanted)) and found[agreed] == wanted[agreed]:
        agreed += 1
    return agreed


def read_header(fd: int, size: int, name: str) -> Header:
    """The checked header of an open safetensors file of `size` bytes.

    Raises:
        CheckpointError: it breaks rule S1.
    """
    length = header_length(os.pread(fd, 8, 0), size, name)
    return parse_header(os.pread(fd, length, 8), size, name)


def _tensors_between(fd: int, size: int, name: str, begin: int, end: int) -> tuple[str, ...]:
    try:
        return tuple(read_header(fd, size, name).between(begin, end))
    except CheckpointError:
        return ("the header",)  # damaged itself, so no tensor can be told


def _walk(folder: int, prefix: str = "") -> Iterator[str]:
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            yield prefix + name
            continue
        below = open_folder(name, dir_fd=folder)
        try:
            yield from _walk(below, f"{prefix}{name}/")
        finally:
            os.close(below)
