"""What this user's own runs have committed: run id, step, manifest digest, kept outside the run (standard library only).

Someone who can replace a checkpoint and its manifest cannot also make the digest agree with this list
(`${XDG_STATE_HOME:-~/.local/state}/lumina/checkpoints.jsonl`, 0600). A run that was copied from another machine has no entry.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import FILE_MODE, make_folders, sync_folder, write_all


def ledger_path() -> Path:
    """Where the list lies for this user."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "lumina" / "checkpoints.jsonl"


def record(run: str, step: int, digest: str, committed: bool = False) -> None:
    """Append one entry and fsync it; a torn last line is closed first.

    Args:
        committed: the checkpoint is there and was read back. An entry without it says what is about to be committed.

    Raises:
        OSError: the list cannot be written, or not durably.
    """
    path = ledger_path()
    make_folders(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        os.fchmod(fd, FILE_MODE)
        size = os.fstat(fd).st_size
        if size == 0:  # new, or its maker died before this
            sync_folder(path.parent)
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        entry = {"run": run, "step": step, "digest": digest} | ({"committed": True} if committed else {})
        line = json.dumps(entry).encode() + b"\n"
        write_all(fd, memoryview(b"\n" * torn + line))
        os.fsync(fd)
    finally:
        os.close(fd)


def recorded(run: str, step: int) -> set[str]:
    """Digests of every commit of this step of this run (several after a rollback); empty if the run is unknown here.

    Raises:
        OSError: the list is there and cannot be read.
    """
    return {str(entry.get("digest")) for entry in _entries(run) if entry.get("step") == step}


def committed_steps(run: str) -> set[int]:
    """Steps of this run whose commit was seen through, whatever became of the checkpoints since.

    Raises:
        OSError: the list is there and cannot be read.
    """
    return {entry["step"] for entry in _entries(run) if entry.get("committed") is True and isinstance(entry.get("step"), int)}


def _entries(run: str) -> Iterator[dict[str, Any]]:
    try:
        lines = ledger_path().read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # torn by a power cut: that one commit counts as unknown
        if isinstance(entry, dict) and entry.get("run") == run:
            yield entry
