"""Rig A: record what the writer asks of the file system, and enumerate what may be on the disk after a crash.

KILL   everything asked for so far is there; the last write may be torn.
POWER  folder entries in order, at least up to the last fsync of anything; data that was not fsynced: full, empty, torn or zero.
DIR    entries of a folder that was not fsynced since persist in any subset; data that was not fsynced: full or empty.

A state is a mapping from relative path to content (None for a folder).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

State = dict[str, bytes | None]
ROOT = 0


@dataclass(frozen=True)
class Op:
    """One request. `folder`, `node`: numbers of inodes, in the order in which they were first seen."""

    kind: str  # entry (name -> node, or gone), rename, write, sync
    node: int
    folder: int = ROOT
    name: str = ""
    to: str = ""
    data: bytes = b""


@dataclass
class Recorder:
    """Records below one folder. What is there at the start counts as durable."""

    root: Path
    ops: list[Op] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)  # inode -> node
    start: dict[int, dict[str, int]] = field(default_factory=dict)  # folder -> entries
    content: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scan(self.root)

    def _scan(self, folder: Path) -> int:
        number = self._new(folder.stat().st_ino)
        self.start[number] = {}
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                self.start[number][path.name] = self._scan(path)
            else:
                node = self._new(path.stat().st_ino)
                self.start[number][path.name] = node
                self.content[node] = path.read_bytes()
        return number

    def _new(self, inode: int) -> int:
        self.numbers[inode] = len(
            set(self.numbers.values()) | set(self.start) | set(self.content) | {op.node for op in self.ops}
        )
        return self.numbers[inode]

    def _node(self, fd: int) -> int | None:
        return self.numbers.get(os.fstat(fd).st_ino)

    def _place(self, path: Any, dir_fd: int | None) -> tuple[int | None, str]:
        parent, name = os.path.split(os.fspath(path))
        info = os.stat(parent or ".", dir_fd=dir_fd) if parent or dir_fd is None else os.fstat(dir_fd)
        return self.numbers.get(info.st_ino), name

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        real: dict[str, Callable[..., Any]] = {
            name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir")
        }

        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            fd = real["open"](path, flags, mode, dir_fd=dir_fd)
            folder, name = self._place(path, dir_fd)
            is_new = flags & os.O_EXCL or os.fstat(fd).st_ino not in self.numbers
            if flags & os.O_CREAT and folder is not None and is_new:
                self.ops.append(Op("entry", self._new(os.fstat(fd).st_ino), folder, name))
            return fd

        def write(fd: int, data: Any) -> int:
            count = real["write"](fd, data)
            node = self._node(fd)
            if node is not None:
                self.ops.append(Op("write", node, data=bytes(memoryview(data)[:count])))
            return count

        def fsync(fd: int) -> None:
            real["fsync"](fd)
            node = self._node(fd)
            if node is not None:
                self.ops.append(Op("sync", node))

        def rename(one: Any, two: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
            (folder, name), (other, to) = self._place(one, src_dir_fd), self._place(two, dst_dir_fd)
            node = self.numbers.get(os.stat(one, dir_fd=src_dir_fd, follow_symlinks=False).st_ino)
            real["rename"](one, two, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            if folder is not None:
                assert folder == other and node is not None
                self.ops.append(Op("rename", node, folder, name, to))

        def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            real["mkdir"](path, mode, dir_fd=dir_fd)
            folder, name = self._place(path, dir_fd)
            if folder is not None:
                self.ops.append(Op("entry", self._new(os.stat(path, dir_fd=dir_fd).st_ino), folder, name, to="folder"))

        def gone(call: str) -> Callable[..., None]:
            def remove(path: Any, *, dir_fd: int | None = None) -> None:
                folder, name = self._place(path, dir_fd)
                real[call](path, dir_fd=dir_fd)
                if folder is not None:
                    self.ops.append(Op("entry", -1, folder, name))

            return remove

        made = {"open": opened, "write": write, "fsync": fsync, "rename": rename, "mkdir": mkdir}
        for name, call in {**made, "unlink": gone("unlink"), "rmdir": gone("rmdir")}.items():
            patch.setattr(os, name, call)
        try:
            yield
        finally:
            patch.undo()

    # ---- states ----------------------------------------------------------------------------------------------------------

    def _tree(self, entries: dict[int, dict[str, int]], content: dict[int, bytes], node: int = ROOT, prefix: str = "") -> State:
        state: State = {}
        for name, child in entries.get(node, {}).items():
            if child in content:
                state[prefix + name] = content[child]
            else:
                state[prefix + name] = None
                state.update(self._tree(entries, content, child, f"{prefix}{name}/"))
        return state

    def _entries(self, ops: Iterable[Op]) -> dict[int, dict[str, int]]:
        entries = {folder: dict(names) for folder, names in self.start.items()}
        for op in ops:
            names = entries.setdefault(op.folder, {})
            if op.kind == "rename":
                names.pop(op.name, None)
                names[op.to] = op.node
            elif op.node < 0:
                names.pop(op.name, None)
            else:
                names[op.name] = op.node
        return entries

    def _content(self, ops: Sequence[Op], variant: str, torn_last: bool = False) -> dict[int, bytes]:
        """Data after these requests; `variant` says what became of what was not fsynced."""
        durable = dict(self.content)
        pending: dict[int, bytes] = {}
        for op in ops:
            if op.kind == "entry" and op.node >= 0 and op.to != "folder":
                durable[op.node] = b""
            elif op.kind == "write":
                pending[op.node] = pending.get(op.node, b"") + op.data
            elif op.kind == "sync" and op.node in pending:
                durable[op.node] = durable.get(op.node, b"") + pending.pop(op.node)
        for node, data in pending.items():
            kept = {"full": data, "empty": b"", "torn": data[: len(data) // 2], "zero": bytes(len(data))}[variant]
            durable[node] = durable.get(node, b"") + kept
        if torn_last and ops and ops[-1].kind == "write":
            last = ops[-1]
            durable[last.node] = durable[last.node][: len(durable[last.node]) - len(last.data) // 2]
        return durable

    def kill(self) -> Iterator[State]:
        for end in range(len(self.ops) + 1):
            done = self.ops[:end]
            entries = self._entries(op for op in done if op.kind in ("entry", "rename"))
            for torn in (False, True):
                yield self._tree(entries, self._content(done, "full", torn))

    def power(self, without: Collection[int] = ()) -> Iterator[State]:
        ops = [op for op in self.ops if not (op.kind == "sync" and op.node in without)]
        for end in range(len(ops) + 1):
            synced = max((index for index in range(end) if ops[index].kind == "sync"), default=0)
            for last in range(synced, end + 1):
                entries = self._entries(op for op in ops[:last] if op.kind in ("entry", "rename"))
                for variant in ("full", "empty", "torn", "zero"):
                    yield self._tree(entries, self._content(ops[:end], variant))

    def directories(self, without: Collection[int] = (), most: int = 8) -> Iterator[State]:
        ops = [op for op in self.ops if not (op.kind == "sync" and op.node in without)]
        for end in range(len(ops) + 1):
            done = ops[:end]
            last_sync = {op.node: index for index, op in enumerate(done) if op.kind == "sync"}
            moves = [(index, op) for index, op in enumerate(done) if op.kind in ("entry", "rename")]
            free = [index for index, op in moves if index > last_sync.get(op.folder, -1)]
            for lost in _subsets(free, most):
                entries = self._entries(op for index, op in moves if index not in lost)
                for variant in ("full", "empty"):
                    yield self._tree(entries, self._content(done, variant))

    def folders(self) -> set[int]:
        return set(self.start) | {op.node for op in self.ops if op.to == "folder"}


def _subsets(items: list[int], most: int) -> Iterator[set[int]]:
    """All subsets of a short list; of a long one every beginning, every end, and all but or only one or two."""
    if len(items) <= most:
        for size in range(len(items) + 1):
            yield from map(set, itertools.combinations(items, size))
        return
    everything = set(items)
    for cut in range(len(items) + 1):
        yield from (set(items[:cut]), set(items[cut:]))
    for pair in itertools.chain(itertools.combinations(items, 1), itertools.combinations(items, 2)):
        yield set(pair)
        yield everything - set(pair)


def materialise(state: State, root: Path) -> None:
    for name, content in state.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
