"""What a terminal would show for the bytes that a full-screen program sends: the text of each cell, nothing else.

Only what `lumina` uses is understood: placing the cursor, erasing, text. Colours and modes are passed over.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

_TOKEN = re.compile(
    r"\x1b\[([0-9;]*)([A-Za-z])"  # a control sequence with plain parameters
    r"|\x1b\[[<=>?0-9;$ ]*[@-~]"  # one with others: modes and reports
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1bP[^\x1b]*\x1b\\"  # strings to the terminal
    r"|\x1b[()][0-9A-Z]|\x1b[^\[\]P()]"
    r"|[\r\n\x07\x08]"
    r"|[^\x1b\r\n\x07\x08]+"
)


class Picture:
    """`columns` x `lines` cells. `feed` takes bytes in pieces of any length."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self._cells = [[" "] * columns for _ in range(lines)]
        self._x = self._y = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> None:
        """Take what the program sent."""
        text = self._rest + self._decoder.decode(data)
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:  # a sequence whose end has not come yet
                break
            self._take(match)
            at = match.end()
        self._rest = text[at:][-4096:]

    def row(self, y: int) -> str:
        """The text of one line of the screen."""
        return "".join(self._cells[y])

    @property
    def text(self) -> str:
        """The whole screen, one line per row."""
        return "\n".join("".join(line) for line in self._cells)

    def _take(self, match: re.Match[str]) -> None:
        token = match[0]
        if match[2] is not None:
            self._sequence(match[1], match[2])
        elif token == "\r":
            self._x = 0
        elif token == "\n":
            self._y = min(self._y + 1, self.lines - 1)
        elif token == "\x08":
            self._x = max(0, self._x - 1)
        elif token[0] not in "\x1b\x07":
            self._put(token)

    def _put(self, text: str) -> None:
        line = self._cells[self._y]
        for letter in text:
            width = 2 if unicodedata.east_asian_width(letter) in "WF" else 1
            if self._x < self.columns:
                line[self._x] = letter
            self._x += width

    def _sequence(self, parameters: str, final: str) -> None:
        numbers = [int(number) if number else 0 for number in parameters.split(";")]
        first = numbers[0]
        match final:
            case "H" | "f":
                self._y = min(max(first, 1), self.lines) - 1
                self._x = min(max(numbers[1] if len(numbers) > 1 else 1, 1), self.columns) - 1
            case "A":
                self._y = max(0, self._y - max(first, 1))
            case "B":
                self._y = min(self.lines - 1, self._y + max(first, 1))
            case "C":
                self._x = min(self.columns - 1, self._x + max(first, 1))
            case "D":
                self._x = max(0, self._x - max(first, 1))
            case "J" if first in (2, 3):
                self._cells = [[" "] * self.columns for _ in range(self.lines)]
            case "K":
                self._cells[self._y][self._x :] = [" "] * (self.columns - self._x)
