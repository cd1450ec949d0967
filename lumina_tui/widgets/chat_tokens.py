"""A reply token by token: text coloured and marked by probability, alternatives, and the experts of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.style import Style
from textual.binding import BindingType
from textual.events import Key
from textual.message import Message

from lumina_engine.chat.events import Alternative, Route, Token

from ..actions import bindings
from ..paint import Piece, fit
from ..traces import LEGEND, Cell, Trace, Traced, gate_level, level, row_of, shown, strip_rows
from .panel import Drawn, State

GLYPHS, GLYPHS_ASCII = "·░▒▓█", ".-=+#"
SIDE_BY_SIDE = 72  # cells from which on alternatives and experts stand beside each other
NONE_KNOWN = (
    "This reply has no trace: it was loaded from a file, the settings say trace=off, or its server is of an older Lumina.\n\n"
    ". answers again, x goes back"
)


class TokenPanel(Drawn):
    """Shows one `Trace`; `show()` after it has grown. Posts `Escaped` and `Turned` (another reply is wanted)."""

    scope = "tokens"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("tokens"))

    class Escaped(Message):
        """Esc was pressed here."""

    class Turned(Message):
        """The reply `step` further is wanted."""

        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.trace = Trace()
        self.index = 0
        self._rows: list[list[Cell]] = []
        self._layer = 0  # first layer shown
        self._shape: tuple[int, int, int] = (-1, 0, 0)
        self._seen: tuple[object, ...] = ()
        self._below: list[list[Piece]] = []  # what stands below the text for `_seen`

    def show(self, trace: Trace | None, title: str = "") -> None:
        """Show a reply's trace; None: it has none."""
        if trace is not self.trace:
            self.trace, self.index, self._layer, self._shape = trace or Trace(), 0, 0, (-1, 0, 0)
            self._seen = ()
        if self.trace.known:
            self.set_state(State.LIVE)
        else:
            self.set_state(State.EMPTY, NONE_KNOWN)
        self.set_title(f"tokens  {title}".rstrip(), self._place())
        self._arrange()
        self.repaint_changed()

    def _place(self) -> str:
        return f"{self.index + 1} of {len(self.trace.tokens)}" if self.trace.tokens else ""

    def _arrange(self) -> None:
        shape = (self.inner[0], len(self.trace.tokens), id(self.trace))
        if shape != self._shape:
            self._shape = shape
            self.set_foot(LEGEND if self.inner[0] >= len(LEGEND) + 6 else "marks . - ? ! rarer")
            self._rows = strip_rows(self.trace, self.inner[0] - 2, self._newline)

    def on_resize(self) -> None:
        self._arrange()
        self.refresh()

    @property
    def _newline(self) -> str:
        return "\\n" if self.look.ascii else "↵"

    @property
    def current(self) -> Traced | None:
        """The token under the cursor."""
        return self.trace.tokens[self.index] if self.index < len(self.trace.tokens) else None

    # keys

    def _go(self, index: int) -> None:
        index = max(0, min(index, len(self.trace.tokens) - 1))
        if index != self.index:
            self.index = index
            self.set_title(self._left, self._place())
            self.repaint_changed()

    def action_left(self) -> None:
        self._go(self.index - 1)

    def action_right(self) -> None:
        self._go(self.index + 1)

    def action_far_left(self) -> None:
        self._go(self.index - 10)

    def action_far_right(self) -> None:
        self._go(self.index + 10)

    def action_first(self) -> None:
        self._go(0)

    def action_last(self) -> None:
        self._go(len(self.trace.tokens) - 1)

    def action_unlikely(self) -> None:
        """To the next token that the model itself found unlikely."""
        for index in range(self.index + 1, len(self.trace.tokens)):
            probability = self.trace.tokens[index].token.probability
            if probability is not None and probability < 0.1:
                self._go(index)
                return
        self.lumina.notice("no token further on has less than 10 %")

    def action_down(self) -> None:
        self._layers(1)

    def action_up(self) -> None:
        self._layers(-1)

    def _layers(self, step: int) -> None:
        routes = self.current.routed.routes if self.current is not None and self.current.routed is not None else []
        top = max(0, min(self._layer + step, len(routes) - 1))
        if top != self._layer:
            self._layer = top
            self.repaint_changed()

    def action_next_reply(self) -> None:
        self.post_message(self.Turned(1))

    def action_reply_before(self) -> None:
        self.post_message(self.Turned(-1))

    def on_key(self, event: Key) -> None:
        if event.key == "escape":
            event.stop()
            self.post_message(self.Escaped())

    # painting

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        traced = self.current
        if traced is None or width < 4:
            return ()
        rows = self._strip_height(height)
        if y < rows:
            return self._strip_line(y, rows)
        shape = (self.index, self._layer, width, height - rows, traced.routed is not None)
        if shape != self._seen:
            self._seen, self._below = shape, self._facts(traced, width - 2, height - rows)
        below, at = self._below, y - rows
        return [(" ", None), *below[at]] if at < len(below) else ()

    def _strip_height(self, height: int) -> int:
        """Lines for the text: two for each row, a third of the panel at most."""
        return min(2 * len(self._rows), max(2, height // 3 // 2 * 2))

    def _strip_line(self, y: int, height: int) -> list[Piece]:
        pairs = height // 2
        here = row_of(self._rows, self.index)
        top = max(0, min(here - pairs // 2, len(self._rows) - pairs))
        row = self._rows[top + y // 2] if top + y // 2 < len(self._rows) else []
        pieces: list[Piece] = [(" ", None)]
        for number, cell in enumerate(row):
            role, mark = level(self.trace.tokens[cell.index].token.probability)
            style = self.palette.of(role)
            begins = not number or row[number - 1].index != cell.index
            if y % 2:
                cursor = "^" if cell.index == self.index else ""
                text = (cursor or mark) if begins else " "
                pieces.append((fit(text, _cells(cell.text), ellipsis=""), self.palette.key if cursor else style))
            else:
                pieces.append((cell.text, style + Style(reverse=True) if cell.index == self.index else style))
        return pieces

    def _facts(self, traced: Traced, width: int, height: int) -> list[list[Piece]]:
        token = traced.token
        text = shown(token.text, self._newline)
        dim, plain, wide = self.palette.dim, self.palette.text, width >= 56
        lines: list[list[Piece]] = [
            [(f'"{text}"', self.palette.title), (f"  id {token.token}", dim)],
            [(percent(token.probability), plain), (" by the model" + (": softmax of its raw logits" if wide else ""), dim)],
            [
                (percent(token.chance), plain),
                (" as drawn" + (": after penalty, temperature, top-k, top-p" if wide else ""), dim),
            ],
        ]
        half = (width - 2) // 2
        if width >= SIDE_BY_SIDE:
            left, right = self._alternatives(token, half), self._experts(traced, width - half - 2, height - len(lines))
            for y in range(max(len(left), len(right))):
                pieces = left[y] if y < len(left) else []
                used = sum(_cells(piece) for piece, _ in pieces)
                lines.append([*pieces, (" " * max(0, half + 2 - used), None), *(right[y] if y < len(right) else [])])
            return lines
        lines += self._alternatives(token, width)
        return lines + self._experts(traced, width, height - len(lines))

    def _alternatives(self, token: Token, width: int) -> list[list[Piece]]:
        lines: list[list[Piece]] = [[("likeliest by the model", self.palette.dim)]]
        others = list(token.alternatives)
        if others and token.probability is not None and all(other.id != token.token for other in others):
            others.append(Alternative(token.text, token.token, token.probability))  # what was drawn is always there
        for other in others:
            chosen = other.id == token.token
            text = fit(f'"{shown(other.text, self._newline)}"', max(4, width - 20))
            bar = "█" * round(max(0.0, min(1.0, other.probability)) * 10)
            style = self.palette.title if chosen else self.palette.text
            mark = ">" if chosen else " "
            pieces: list[Piece] = [(mark, self.palette.accent), (percent(other.probability), style), (" ", None)]
            lines.append([*pieces, (text, style), (f" {bar}", self.palette.accent)])
        return lines

    def _experts(self, traced: Traced, width: int, height: int) -> list[list[Piece]]:
        routed = traced.routed
        if routed is None:
            return [[("experts: none told (a dense model has none)", self.palette.dim)]]
        room = max(1, height - 1)
        top = max(0, min(self._layer, len(routed.routes) - room))
        shown_routes = routed.routes[top : top + room]
        more = len(routed.routes) - top - len(shown_routes)
        head = f"experts of {routed.experts}, with gates" + (f"  j: {more} more layers" if more else "  k: more" if top else "")
        return [[(head, self.palette.dim)], *(self._layer_line(route, routed.experts, width) for route in shown_routes)]

    def _layer_line(self, route: Route, experts: int, width: int) -> list[Piece]:
        glyphs = GLYPHS_ASCII if self.look.ascii else GLYPHS
        chosen = sorted(zip(route.experts, route.gates, strict=False), key=lambda pair: -pair[1])
        total = sum(abs(gate) for _, gate in chosen) or 1.0
        pieces: list[Piece] = [(f"L{route.layer:<3}", self.palette.dim)]
        words = "  ".join(f"{expert}:{gate:.2f}" for expert, gate in chosen)
        if 4 + experts + 1 + len(words) <= width:
            shares = dict(chosen)
            for expert in range(experts):
                if expert in shares:
                    step = gate_level(abs(shares[expert]) / total)
                    pieces.append((glyphs[max(1, step)], self.palette.heat[step]))
                else:
                    pieces.append((glyphs[0], self.palette.faint))
            pieces.append((" ", None))
        pieces.append((fit(words, max(0, width - sum(_cells(text) for text, _ in pieces))), self.palette.text))
        return pieces


def percent(probability: float | None) -> str:
    """A probability in six cells; `-` if unknown."""
    if probability is None:
        return "     -"
    value = 100 * probability
    return f"{value:5.1f}%" if value >= 0.05 or value == 0 else f"{value:5.0e}%"[:6]


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
