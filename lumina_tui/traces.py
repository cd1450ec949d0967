"""What a model thought while it wrote: the tokens of a reply with probability, alternatives and experts. No widget in here."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.cells import cell_len

from lumina_engine.chat.events import Routed, Token

from .markdown import clean

# lower bounds of the model's own probability, with the role and the mark that say it: the mark also without colour
LEVELS = ((0.9, "text", " "), (0.5, "accent", "."), (0.1, "second", "-"), (0.01, "warn", "?"), (0.0, "bad", "!"))
LEGEND = "model's probability: no mark from 90 %  . 50  - 10  ? 1  ! less"
UNKNOWN = ("dim", " ")
KEPT = 16  # traces of replies that one pane keeps


def level(probability: float | None) -> tuple[str, str]:
    """Role and mark of a probability."""
    if probability is None:
        return UNKNOWN
    return next(((role, mark) for bound, role, mark in LEVELS if probability >= bound), UNKNOWN)


@dataclass
class Traced:
    """One token, and where it went once that is told."""

    token: Token
    routed: Routed | None = None


@dataclass
class Trace:
    """The tokens of one reply in order."""

    tokens: list[Traced] = field(default_factory=list)

    def add(self, event: Token | Routed) -> None:
        """One event of the reply."""
        if isinstance(event, Token):
            self.tokens.append(Traced(event))
        elif 0 <= event.index < len(self.tokens):
            self.tokens[event.index].routed = event

    @property
    def known(self) -> bool:
        """Whether there is anything to show but the text."""
        return any(traced.token.probability is not None for traced in self.tokens)


class Traces:
    """The traces of a pane's replies by (turn, version), the newest `KEPT` of them."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Trace] = {}

    def begin(self, key: tuple[int, int]) -> Trace:
        """An empty trace for a reply that begins."""
        self._found.pop(key, None)
        self._found[key] = Trace()
        while len(self._found) > KEPT:
            del self._found[next(iter(self._found))]
        return self._found[key]

    def get(self, key: tuple[int, int]) -> Trace | None:
        return self._found.get(key)

    def clear(self) -> None:
        self._found.clear()


@dataclass(frozen=True)
class Cell:
    """A stretch of one token in one row."""

    text: str
    index: int


def shown(text: str, newline: str = "↵") -> str:
    """A token's text on one line; a token that completes no character is a dot."""
    return clean(text).replace("\n", newline) or "·"


def strip_rows(trace: Trace, width: int, newline: str = "↵") -> list[list[Cell]]:
    """The tokens in rows of at most `width` cells; a newline ends its row, a token that does not fit goes over rows."""
    if width < 1:
        return []
    rows: list[list[Cell]] = [[]]
    used = 0
    for index, traced in enumerate(trace.tokens):
        raw = clean(traced.token.text)
        pieces = raw.split("\n")
        for number, piece in enumerate(pieces):
            text = piece + (newline if number + 1 < len(pieces) else "")
            if not text and len(pieces) == 1:
                text = "·"
            while text:
                taken, cells = _fitting(text, width - used)
                if not taken:
                    if not used:  # a character wider than the row: nothing fits, so it is left out
                        break
                    rows.append([])
                    used = 0
                    continue
                rows[-1].append(Cell(taken, index))
                used += cells
                text = text[len(taken) :]
            if number + 1 < len(pieces):
                rows.append([])
                used = 0
    return rows


def _fitting(text: str, room: int) -> tuple[str, int]:
    """The longest beginning of `text` in `room` cells, and its cells."""
    if cell_len(text) <= room:
        return text, cell_len(text)
    end = cells = 0
    for letter in text:
        size = cell_len(letter)
        if cells + size > room:
            break
        cells += size
        end += 1
    return text[:end], cells


def row_of(rows: list[list[Cell]], index: int) -> int:
    """The row in which a token begins."""
    return next((number for number, row in enumerate(rows) if any(cell.index == index for cell in row)), 0)


GATES = (0.125, 0.25, 0.5, 0.75)  # bounds of a gate's share of the largest possible, for the map's glyphs


def gate_level(gate: float) -> int:
    """0 to 4: how much of the token's weight an expert has."""
    return sum(gate >= bound for bound in GATES)
