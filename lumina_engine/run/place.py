"""Where a rank is, in memory that its supervisor can read at any time: also while the rank is stopped, or deep in C.

Heartbeats are merged, so the last one may be a few sections old when a rank freezes; this is exact. The rank writes, the
supervisor has a descriptor of the same memory (it came with the hello) and reads only when the rank does not move.
"""

from __future__ import annotations

import mmap
import os
import struct

_NAME = 32  # bytes of a section's name
_LAYOUT = struct.Struct(f"<Qq{_NAME}sQ")  # mark, step, section, the mark again: they differ while it is being written


class Place:
    """The rank's end. `descriptor` is for the supervisor."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("lumina-place", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, _LAYOUT.size)
        self._memory = mmap.mmap(self.descriptor, _LAYOUT.size)
        self._mark = 0
        self._names: dict[str, bytes] = {}

    def put(self, step: int, section: str) -> None:
        """The rank is here now."""
        name = self._names.get(section)
        if name is None:
            name = self._names[section] = section.encode()[:_NAME]
        self._mark += 1
        _LAYOUT.pack_into(self._memory, 0, self._mark, step, name, self._mark)


def read_place(descriptor: int) -> tuple[int, str] | None:
    """Step and section that a rank wrote last; None if it has written none, or stopped while it wrote."""
    try:
        data = os.pread(descriptor, _LAYOUT.size, 0)  # not mapped: memory that its owner made shorter would end the reader
    except OSError:
        return None
    if len(data) != _LAYOUT.size:
        return None
    first, step, name, last = _LAYOUT.unpack(data)
    if first == 0 or first != last:
        return None
    return step, name.rstrip(b"\0").decode("utf-8", "replace")
