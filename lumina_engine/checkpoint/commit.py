"""The commit protocol: a checkpoint is either whole and named `step-N`, or it does not exist.

    checkpoints/.tmp-step-000123-<nonce>/   staging: every rank writes and fsyncs its files here
    checkpoints/step-000123/                committed by one rename, immutable from then on
    checkpoints/latest, best                hints: the bare name of a step, never trusted and never needed

Order of a commit: files (fsynced), MANIFEST.json and MANIFEST.sha256 (fsynced), every folder fsynced, rename, `checkpoints/`
fsynced. Whatever instant a process dies or the power fails, the folder under the committed name is complete, or the one before
it still is. What happens to committed folders later is in keep.py; what "whole" means, in verify.py.
"""

# ruff: noqa: PTH104  os.* calls on purpose: the fault rig counts them (pathlib of 3.10 binds its own)

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .digest import ALGORITHM
from .files import (
    CHUNK_BYTES,
    MAX_JSON_BYTES,
    MAX_JSON_PARTS,
    CheckpointError,
    FileEntry,
    count_parts,
    dump_json,
    make_folder,
    make_folders,
    nonce,
    open_folder,
    remove_tree,
    require_space,
    require_unlinked,
    sync_folder,
    write_file,
)
from .keep import (
    Found,
    clean_stale,
    leased,
    list_steps,
    newest_valid,
    pointer,
    quarantine,
    retain,
    rewind,
    set_pointer,
)
from .verify import (
    FORMATS,
    LEASE,
    MANIFEST,
    MANIFEST_DIGEST,
    Problem,
    Report,
    digest_line,
    read_manifest,
    require,
    step_name,
    step_of,
    verify,
)

__all__ = [
    "CheckpointError", "FileEntry", "Found", "Problem", "Report", "Staging", "clean_stale", "commit", "leased", "list_steps",
    "newest_valid", "pointer", "quarantine", "read_manifest", "require", "retain", "rewind",
    "set_pointer", "step_name", "step_of", "verify",
]  # fmt: skip

FOLDERS = ("model", "state")


class Staging:
    """A folder that will become `step-N`. Rank 0 creates it, the other ranks join it by name; all write into it.

    Args:
        replaces: a committed `step-N` is moved out of the way by whoever commits this one, when only the rename is left.

    Raises:
        CheckpointError: the step is committed already, there is no room for `expected_bytes`, or `checkpoints` is a link.
        OSError: the folder cannot be made.
    """

    def __init__(self, checkpoints: Path, step: int, expected_bytes: int = 0, *, replaces: bool = False) -> None:
        require_unlinked(checkpoints)
        if not replaces and os.path.lexists(checkpoints / step_name(step)):
            raise CheckpointError(f"{checkpoints / step_name(step)} exists already and is never overwritten")
        make_folders(checkpoints)
        require_space(checkpoints, expected_bytes)
        self.checkpoints, self.step = checkpoints, step
        self.name = f".tmp-{step_name(step)}-{nonce()}"
        make_folder(self.path)
        for folder in FOLDERS:
            make_folder(self.path / folder)

    @classmethod
    def join(cls, checkpoints: Path, step: int, name: str) -> Staging:
        """The staging folder that rank 0 made."""
        if not name.startswith(f".tmp-{step_name(step)}-") or "/" in name:
            raise CheckpointError(f"{name!r} is no staging folder of step {step}")
        staging = cls.__new__(cls)
        staging.checkpoints, staging.step, staging.name = checkpoints, step, name
        return staging

    @property
    def path(self) -> Path:
        return self.checkpoints / self.name

    def write(self, relpath: str, pieces: Iterable[Any], size: int | None = None, like: FileEntry | None = None) -> FileEntry:
        """Write and fsync one new file; see `files.write_file`. After a failure the staging can only be dropped."""
        folder = open_folder(self.path)
        try:
            return write_file(folder, relpath, pieces, size, like)
        finally:
            os.close(folder)

    def drop(self) -> str | None:
        """Remove everything written so far. Returns why that failed, if it did: the start-up clean-up will find the rest."""
        try:
            parent = open_folder(self.checkpoints)
            try:
                remove_tree(parent, self.name)
            finally:
                os.close(parent)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{self.path} could not be removed: {error.strerror}"
        return None


def commit(
    staging: Staging, entries: Sequence[FileEntry], manifest: dict[str, Any], before_rename: Callable[[str], None] | None = None
) -> Path:
    """Turn a complete staging folder into the committed checkpoint.

    Args:
        entries: every file that the ranks wrote and fsynced, their digests all of one algorithm.
        manifest: what stands in MANIFEST.json beside format, step, algorithm and files.
        before_rename: called with the SHA-256 of MANIFEST.json when only the rename is left.

    Raises:
        CheckpointError: the step is committed already, its manifest is larger than is read back, or digests are of two kinds.
        OSError: a write or fsync failed: nothing is committed, drop the staging.
    """
    final = staging.checkpoints / step_name(staging.step)
    algorithms = sorted({entry.algorithm for entry in entries}) or [ALGORITHM]
    if len(algorithms) > 1:
        raise CheckpointError(f"{staging.path} has files with digests of {' and '.join(algorithms)}")
    files = sorted([*entries, staging.write(LEASE, ())], key=lambda entry: entry.path)
    body = dump_json(
        {
            **manifest,
            "format": FORMATS[algorithms[0]],
            "step": staging.step,
            "algorithm": algorithms[0],
            "chunk_bytes": CHUNK_BYTES,
            "files": [entry.to_json() for entry in files],
        }
    )
    if len(body) > MAX_JSON_BYTES or count_parts(body) > MAX_JSON_PARTS:
        size = sum(entry.size for entry in files) / 1e12
        raise CheckpointError(
            f"{MANIFEST} would have {len(body)} bytes for {len(files)} files of {size:.1f} TB, more than is read back "
            f"({MAX_JSON_BYTES} bytes, {MAX_JSON_PARTS} brackets, commas and colons): save a smaller model or with fewer ranks"
        )
    staging.write(MANIFEST, [body])
    digest = hashlib.sha256(body).hexdigest()
    staging.write(MANIFEST_DIGEST, [digest_line(digest)])
    for folder in FOLDERS:
        sync_folder(staging.path / folder)
    sync_folder(staging.path)
    if before_rename is not None:
        before_rename(digest)
    if os.path.lexists(final):
        raise CheckpointError(f"{final} exists already and is never overwritten")
    os.rename(staging.path, final)
    try:
        sync_folder(staging.checkpoints)
    except OSError:
        # the rename may not outlive a power cut, so this is no checkpoint: take the name back before anyone relies on it
        os.rename(final, staging.path)
        raise
    return final
