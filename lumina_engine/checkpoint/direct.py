"""Writing and reading past the page cache (standard library only).

A checkpoint is written once, and read by another process or never. Through the page cache each of its bytes costs the processor
a copy and a new page, which holds up training on a CPU, and pushes out what is read again and again: the data. Past it the disk
takes the bytes from where they lie, and what is read back is what the disk has (figures in tests/bench/README.md).

Local file systems only: those of a network send pages of the cache side by side and wait for each block without it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Generator

from ..mounts import file_system

BLOCK_BYTES = 1 << 20  # of one read, or gathered for one write: still in the cache when its digest is taken
DIRECT_FROM = 4 << 20  # a smaller file is not worth it
ALIGNMENT = 4096  # offsets, lengths and memory are multiples of it: the largest sector of a disk
_LOCAL = frozenset({"ext4", "xfs"})


def is_local(fd: int) -> bool:
    """Whether an open file lies on a file system that takes whole blocks past the cache well."""
    return file_system(f"/proc/self/fd/{fd}") in _LOCAL


def takes_direct(fd: int, size: int | None) -> bool:
    """Whether a new file of so many bytes is written past the page cache."""
    return size is not None and size >= DIRECT_FROM and is_local(fd)


class BlockWriter:
    """Writes what comes for an open, empty file past the page cache, the end through it.

    Memory that is aligned goes from where it lies if nothing before it waits; all else, and its odd end, is gathered into whole
    blocks. Where the file system refuses to (EINVAL: also at a limit of the file's size), all goes through the cache from there
    on.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._have, self._direct = fd, 0, False
        self._block = memoryview(mmap.mmap(-1, BLOCK_BYTES))  # of anonymous pages, so it begins at one
        self._set_direct(True)

    def write(self, view: memoryview) -> None:
        """Take bytes.

        Raises:
            OSError: as of `os.write`.
        """
        if not self._have and _is_aligned(view):
            whole = len(view) // ALIGNMENT * ALIGNMENT
            self._put(view[:whole])
            view = view[whole:]
        while len(view):
            part = view[: BLOCK_BYTES - self._have]
            self._block[self._have : self._have + len(part)] = part
            self._have, view = self._have + len(part), view[len(part) :]
            if self._have == BLOCK_BYTES:
                self._put(self._block)
                self._have = 0

    def finish(self) -> None:
        """Write what is left. Nothing is synced here.

        Raises:
            OSError: as of `os.write`.
        """
        whole = self._have // ALIGNMENT * ALIGNMENT
        self._put(self._block[:whole])
        self._set_direct(False)
        self._put(self._block[whole : self._have])

    def _put(self, view: memoryview) -> None:
        while len(view):
            try:
                written = os.write(self._fd, view)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(False)
                continue
            view = view[written:]
            if written % ALIGNMENT:
                self._set_direct(False)

    def _set_direct(self, wanted: bool) -> None:
        self._direct = set_direct(self._fd, wanted)


def _is_aligned(view: memoryview) -> bool:
    """Whether it begins at a multiple of `ALIGNMENT`; read-only memory counts as not: ctypes does not give its address."""
    return not view.readonly and len(view) > 0 and ctypes.addressof(ctypes.c_char.from_buffer(view)) % ALIGNMENT == 0


def set_direct(fd: int, wanted: bool) -> bool:
    """Let an open file be read and written past the page cache or not; whether it now is: some file systems cannot.

    Raises:
        OSError: anything but that.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL or not wanted:
            raise
        return False
    return wanted


def read_blocks(fd: int, past_cache: bool) -> Generator[memoryview]:
    """The bytes of an open file from its present offset on; each view is good until the next one is asked for.

    Past the cache, what the file system refuses to read so (EINVAL: also behind an odd end) comes through it. When the
    iterator is closed, the file is read through the cache again: a header of odd length cannot be had past it.

    Raises:
        OSError: as of `os.readv`.
    """
    block = memoryview(mmap.mmap(-1, BLOCK_BYTES))
    direct = past_cache and is_local(fd) and set_direct(fd, True)
    try:
        while True:
            try:
                count = os.readv(fd, [block])
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                direct = set_direct(fd, False)
                continue
            if not count:
                return
            yield block[:count]
    finally:
        if direct:
            set_direct(fd, False)
