"""The digest of each chunk of a file, while its bytes pass by (standard library and BLAKE3).

BLAKE3 is as hard to forge as SHA-256 and takes a quarter of the time: a save beside training on a CPU costs little else, and a
start waits for every byte of a checkpoint to be compared (figures in tests/bench/README.md). The manifest names the algorithm;
checkpoints with SHA-256 are read and copied as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

from blake3 import blake3

ALGORITHM: Final = "blake3"  # of what is written
ALGORITHMS: Final[dict[str, Callable[[], Any]]] = {"blake3": blake3, "sha256": hashlib.sha256}


class ChunkDigests:
    """Takes the bytes of a file in order; `found` has the digest (hex) of every chunk that is complete.

    Args:
        algorithm: one of `ALGORITHMS`.
        chunk_bytes: of each chunk but the last.
        ended: told the bytes of each chunk that is complete.
    """

    def __init__(self, algorithm: str, chunk_bytes: int, ended: Callable[[int], None] = lambda _: None) -> None:
        self.found: list[str] = []
        self.bytes = 0  # that were taken
        self._new, self._chunk_bytes, self._ended = ALGORITHMS[algorithm], chunk_bytes, ended
        self._hash, self._room = self._new(), chunk_bytes

    def update(self, view: memoryview) -> None:
        self.bytes += len(view)
        while len(view):
            part = view[: self._room]
            self._hash.update(part)
            self._room, view = self._room - len(part), view[len(part) :]
            if not self._room:
                self._close()

    def finish(self) -> None:
        """The file ends here: its last chunk may be shorter."""
        if self._room != self._chunk_bytes:
            self._close()

    def _close(self) -> None:
        self.found.append(self._hash.hexdigest())
        self._ended(self._chunk_bytes - self._room)
        self._hash, self._room = self._new(), self._chunk_bytes
