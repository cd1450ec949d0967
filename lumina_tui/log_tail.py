"""The end of a growing text file: a ring of lines, and which of them hold some words. No widget in here.

Lines are kept as bytes and made text only when they are shown or matched: 10,000 lines a second cost little more than reading.
"""

from __future__ import annotations

import bisect
import os
import time
from collections.abc import Callable
from pathlib import Path

from lumina_engine.text import safe_text

from .paint import size as bytes_text

KEEP = 20_000  # lines
KEEP_BYTES = 32 << 20
FIRST = 1 << 20  # bytes read from the end at first
SLICE = 1 << 18  # bytes read at once afterwards
BEHIND = 8 << 20  # bytes that are read one after the other; beyond, the middle is left out
LINE = 16_384  # bytes of a line that are kept
BUDGET_S = 0.02  # of one call


class TextTail:
    """Lines of a file as it grows. A file that shrinks or is replaced is read again from its start, the old one to its end.

    `lines[i]` is line number `dropped + i` of all that were read.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self.path = path
        self.lines: list[bytes] = []
        self.dropped = 0  # lines forgotten at the front
        self.error = ""
        self._bytes = 0
        self._clock = clock
        self._file = -1
        self._offset = 0
        self._cut = False  # the next piece begins within a line
        self._rest = b""

    @property
    def end(self) -> int:
        """The number of the line that comes next."""
        return self.dropped + len(self.lines)

    def text(self, number: int) -> str:
        """A line as safe text, by its number."""
        return line_text(self.lines[number - self.dropped])

    def poll(self, budget_s: float = BUDGET_S) -> bool:
        """Read what is new, for at most `budget_s`; True if there is something."""
        until, before = self._clock() + budget_s, self.end
        try:
            while self._read() and self._clock() < until:
                pass
            self.error = ""
        except FileNotFoundError:
            self.error = ""
        except OSError as error:
            self.error = f"{self.path}: {error.strerror}"
        return self.end != before

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()

    def _read(self) -> bool:
        """One slice; False if there was none."""
        if self._file < 0:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            behind = os.fstat(self._file).st_size - FIRST
            if self._offset == 0 and not self.end and behind > 0:
                self._offset, self._cut = behind, True
        size = os.fstat(self._file).st_size
        if size - self._offset > BEHIND:
            left_out, self._offset = size - FIRST - self._offset, size - FIRST
            self._rest, self._cut = b"", True
            self._add([f"... {bytes_text(left_out)} left out: the log grows faster than it can be read ...".encode()])
        data = os.pread(self._file, SLICE, self._offset)
        if not data:
            return self._next_file(size)
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > FIRST:
            whole, self._rest = [*whole, self._rest], b""
        if self._cut and whole:
            del whole[0]
            self._cut = False
        self._add(whole)
        return True

    def _next_file(self, size: int) -> bool:
        """At the end: was the file truncated, or is another one in its place?"""
        if size < self._offset:
            self._offset, self._rest, self._cut = 0, b"", False
            return size > 0
        found, mine = self.path.stat(), os.fstat(self._file)
        if (found.st_ino, found.st_dev) == (mine.st_ino, mine.st_dev):
            return False
        self.close()
        if self._rest:
            self._add([self._rest])
        self._offset, self._rest, self._cut = 0, b"", False
        return True

    def _add(self, lines: list[bytes]) -> None:
        kept = [line if len(line) <= LINE else _shortened(line) for line in lines[-KEEP:]]
        self.dropped += len(lines) - len(kept)
        self.lines += kept
        self._bytes += sum(map(len, kept))
        over = max(0, len(self.lines) - KEEP)
        gone = sum(map(len, self.lines[:over]))
        while self._bytes - gone > KEEP_BYTES and over < len(self.lines) - 1:
            gone += len(self.lines[over])
            over += 1
        if over:
            self._bytes -= gone
            self.dropped += over
            del self.lines[:over]


def _shortened(line: bytes) -> bytes:
    """A line that is too long: a progress bar keeps its last state, others their beginning."""
    last = line.rstrip(b"\r").rpartition(b"\r")[2]
    return last[:LINE]


def line_text(line: bytes) -> str:
    """A line as it is shown: a progress bar in its last state, nothing that a terminal obeys."""
    return safe_text(line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")).replace("\t", "    ")


class Matches:
    """Numbers of the lines that hold all of some words, in any case; grows with the tail."""

    def __init__(self, words: str) -> None:
        self.words = words.casefold().split()
        self.numbers: list[int] = []
        self._next = 0
        self._plain = [word.encode() for word in self.words if word.isascii()]
        self._other = [word for word in self.words if not word.isascii()]

    def advance(self, tail: TextTail, budget_s: float = BUDGET_S) -> bool:
        """Look at lines not seen yet, for about `budget_s`; whether all have been."""
        del self.numbers[: bisect.bisect_left(self.numbers, tail.dropped)]
        until = time.perf_counter() + budget_s
        self._next = max(self._next, tail.dropped)
        while self._next < tail.end:
            stop = min(tail.end, self._next + 500)
            part = tail.lines[self._next - tail.dropped : stop - tail.dropped]
            self.numbers += [self._next + i for i, line in enumerate(part) if self.match(line)]
            self._next = stop
            if time.perf_counter() >= until:
                break
        return self._next >= tail.end

    def match(self, line: bytes) -> bool:
        """Whether a line holds all words."""
        low = line.lower()
        if not all(word in low for word in self._plain):
            return False
        if not self._other and b"\r" not in line:
            return True
        text = line_text(line).casefold()
        return all(word in text for word in self.words)

    def beside(self, number: int, direction: int) -> int | None:
        """The next match behind line `number` (1) or before it (-1), around the end; None if there is none."""
        if not self.numbers:
            return None
        if direction > 0:
            return self.numbers[bisect.bisect_right(self.numbers, number) % len(self.numbers)]
        return self.numbers[bisect.bisect_left(self.numbers, number) - 1]
