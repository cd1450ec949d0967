"""The supervisor's eye on the log: whole lines as they appear, with what they say about the run."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..monitoring.log import MAX_LINE, Head, head

CHUNK = MAX_LINE  # bytes of consecutive records that go to a viewer as one piece
_READ = 1 << 20  # bytes read at once
_ID = re.compile(rb'"id":"([^"\\]{1,64})"')
# lines that the supervisor wants to know more of
_INTERESTING = (b'"type":"run"', b'"type":"checkpoint"', b'"type":"rewind"', b'"id":"')


class Mark(Head):
    """What the supervisor follows a run by: the head of a record, and where a checkpoint or a rewind stands."""

    step: int | None = None
    to_step: int | None = None
    verified: bool = False


_mark = msgspec.json.Decoder(Mark)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive lines exactly as in the file, where they start, and their first and last `seq`."""

    data: bytes
    start: int
    first: int
    last: int


class LogTail:
    """Reads on from (`offset`, `head_seq`): the byte after the last record taken, and its number."""

    def __init__(self, path: Path, offset: int, head_seq: int) -> None:
        self.offset = offset
        self.head_seq = head_seq
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def poll(self) -> tuple[list[Chunk], list[Mark]]:
        """New records as chunks, and the marks of those that say how the run stands or carry a command's id.

        A line that is no record is left out; readers of the file name it. At most 1 MiB a call, so `offset` may lag behind.
        """
        size = os.fstat(self._fd).st_size
        if size <= self.offset:
            return [], []
        data = os.pread(self._fd, min(size - self.offset, _READ), self.offset)
        cut = data.rfind(b"\n") + 1
        if cut == 0 and len(data) == _READ:
            cut = _READ  # no record is that long: garbage without a newline
        chunks: list[Chunk] = []
        marks: list[Mark] = []
        begin = position = first = last = 0
        while position < cut:
            end = data.find(b"\n", position) + 1 or cut
            line = data[position:end]
            found = head(line)
            if found is None or end - begin > CHUNK:
                if position > begin:
                    chunks.append(Chunk(data[begin:position], self.offset + begin, first, last))
                begin = position if found is not None else end
                first = 0
            if found is not None:
                first = first or found.seq
                last = found.seq
                self.head_seq = max(self.head_seq, found.seq)
                if any(text in line for text in _INTERESTING):
                    with contextlib.suppress(msgspec.DecodeError):  # a record of another Lumina: viewers get it, as it is
                        marks.append(_mark.decode(line))
            position = end
        if cut > begin:
            chunks.append(Chunk(data[begin:cut], self.offset + begin, first, last))
        self.offset += cut
        return chunks, marks

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def command_ids(path: Path) -> set[str]:
    """The ids of all commands whose effect is in the log."""
    found: set[str] = set()
    rest = b""
    with path.open("rb") as file:
        while block := file.read(_READ):
            block = rest + block
            cut = block.rfind(b"\n") + 1
            found.update(match.decode("utf-8", "replace") for match in _ID.findall(block[:cut]))
            rest = block[cut:][-MAX_LINE:]
    return found
