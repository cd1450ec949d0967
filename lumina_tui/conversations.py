"""The saved conversations in a folder: listing, renaming, deleting. No widget, no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lumina_engine.chat import saved
from lumina_engine.chat.modes import ChatError

SHOWN = 200  # newest ones that are listed


@dataclass(frozen=True)
class Summary:
    """One saved conversation. `problem` says why it cannot be used."""

    path: Path
    modified: float = 0.0  # unix seconds
    messages: int = 0
    first: str = ""  # what the user said first
    checkpoint: str = ""  # path of the checkpoint that answered
    step: int | None = None
    split: bool = False
    problem: str = ""

    @property
    def name(self) -> str:
        return self.path.stem


class Conversations:
    """Lists a folder; a file that has not changed since is not read again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[tuple[int, int], Summary]] = {}

    def list(self) -> tuple[Summary, ...]:
        """The newest conversations, last changed first. Blocking."""
        found: dict[Path, tuple[tuple[int, int], Summary]] = {}
        for modified, size, path in sorted(self._files(), reverse=True)[:SHOWN]:
            stamp = (modified, size)
            before = self._known.get(path)
            found[path] = before if before is not None and before[0] == stamp else (stamp, _summary(path, modified / 1e9))
        self._known = found
        return tuple(summary for _, summary in found.values())

    def _files(self) -> Iterable[tuple[int, int, Path]]:
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".json") and not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                        info = entry.stat(follow_symlinks=False)
                        yield info.st_mtime_ns, info.st_size, Path(entry.path)
        except FileNotFoundError:
            return  # nothing was saved yet

    def rename(self, path: Path, name: str) -> Path:
        """Give a conversation another name; returns its new path.

        Raises:
            ChatError: no file name, taken, or the file cannot be moved.
        """
        target = path.with_name(f"{saved.check_name(name)}.json")
        try:
            os.link(path, target, follow_symlinks=False)  # unlike a rename, never onto another conversation
            path.unlink()
        except FileExistsError as error:
            raise ChatError(f"{target.name} exists already: choose another name", 2) from error
        except OSError as error:
            raise ChatError(f"{path} cannot be renamed: {error.strerror}") from error
        return target

    def delete(self, path: Path) -> None:
        """Remove a conversation for good.

        Raises:
            ChatError: it cannot be removed.
        """
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ChatError(f"{path} cannot be deleted: {error.strerror}") from error


def _summary(path: Path, modified: float) -> Summary:
    try:
        chat = saved.read(path)
    except ChatError as error:
        return Summary(path, modified, problem=str(error))
    step = chat.checkpoint.get("step")
    return Summary(
        path,
        modified,
        messages=len(chat.conversation),
        first=next((turn["content"] for turn in chat.conversation if turn["role"] == "user"), ""),
        checkpoint=str(chat.checkpoint.get("path") or ""),
        step=step if isinstance(step, int) else None,
        split=chat.second is not None,
    )
