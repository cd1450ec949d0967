"""Where the tokens go: layers by experts, each cell the load divided by the fair share, in five levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from rich.style import Style
from textual.binding import BindingType

from ..actions import bindings
from ..paint import Piece, count, fit
from ..series import LayerLoad, RunStore
from .panel import Drawn
from .sparkline import EIGHTHS, EIGHTHS_ASCII

LEVELS = (0.25, 0.75, 1.25, 2.0)  # limits of the share of the fair load
GLYPHS = "·░▒▓█"
GLYPHS_ASCII = " .:+#"
DEAD = "x"
LIMIT_WARN = 2.0  # max / mean from which a layer is marked


def level_of(share: float) -> int:
    """0 (far below the fair share) to 4 (above twice the fair share)."""
    return sum(share >= limit for limit in LEVELS)


class ExpertMap(Drawn):
    """Reads `store.layers`. Rows and columns are merged, the worst of each group shown, when there are too many."""

    scope = "map"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("map"))

    def __init__(self, store: RunStore | None = None, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.store = store or RunStore()
        self._seen: tuple[object, ...] = ()
        self._row, self._column = 0, 0
        self._rows: list[tuple[int, LayerLoad]] = []
        self._merged = 1

    def show(self, store: RunStore) -> None:
        """Show another run."""
        self.store, self._seen, self._row, self._column = store, (), 0, 0
        self.sync()

    def sync(self) -> None:
        """Repaint if there is a new observation."""
        now = (self.store.expert_version, self.inner, self._row, self._column, self.has_focus, id(self.store))
        if now == self._seen or not self.is_attached:
            return
        self._seen = now
        self._arrange()
        self.repaint_changed()

    # arranging

    def _arrange(self) -> None:
        layers = sorted(self.store.layers.items())
        height = self.inner[1]
        rows = max(1, height - (1 if height >= 6 and len(layers) < height else 0))
        self._merged = max(1, -(-len(layers) // rows))
        groups = [layers[i : i + self._merged] for i in range(0, len(layers), self._merged)]
        self._rows = [max(group, key=lambda item: (bool(item[1].dead), _imbalance(item[1]))) for group in groups]
        self._row = min(self._row, max(0, len(self._rows) - 1))
        experts = max((len(load.load) for _, load in layers), default=0)
        self._column = min(self._column, max(0, experts - 1))
        shape = f"{len(layers)} x {experts}" if layers else ""
        tall = self._tall(*self.inner)
        self.set_title(f"experts {shape}".rstrip(), "max/mean" if layers and not tall else "load / fair share" if tall else "")
        self.set_foot(*self._foot(layers))

    def _foot(self, layers: list[tuple[int, LayerLoad]]) -> tuple[str, str]:
        if not layers:
            return "", ""
        right = f"worst of {self._merged}" if self._merged > 1 else ""
        if self.has_focus and self._rows:
            layer, load = self._rows[self._row]
            if self._column < len(load.load):
                tokens = load.load[self._column]
                share = tokens * len(load.load) / (sum(load.load) or 1.0)
                return f"L{layer} E{self._column}: {share:.2f} x fair, {count(tokens)}", right
        dead = sum(load.dead or 0 for _, load in layers)
        dropped = [load.dropped for _, load in layers if load.dropped is not None and math.isfinite(load.dropped)]
        parts = [f"{dead} dead"]
        if dropped:
            parts.append(f"drop {100 * sum(dropped) / len(dropped):.1f} %")
        return ", ".join(parts), right

    # painting

    def _tall(self, width: int, height: int) -> int:
        """Lines for a layer when its experts can be drawn as columns; 0 if there is no room for that."""
        experts = max((len(load.load) for _, load in self._rows), default=0)
        if not self._rows or self._merged > 1 or experts > width - 2:
            return 0
        lines = min(9, height // len(self._rows))
        return lines if lines >= 4 else 0

    def _columns(self, y: int, width: int, tall: int) -> Sequence[Piece]:
        index, line = divmod(y, tall)
        if index >= len(self._rows):
            return ()
        layer, load = self._rows[index]
        worst = _imbalance(load)
        if line == 0:
            role = "warn" if worst >= LIMIT_WARN or load.dead else "text"
            mark = f"  {load.dead} dead" if load.dead else ""
            words: list[Piece] = [(f" L{layer} max/mean ", self.palette.dim), (f"{worst:.2f}{mark}", self.palette.of(role))]
            more = f"  entropy {_share(load.entropy)}" + (f"  drop {_percent(load.dropped)}" if load.dropped else "")
            return [*words, (more if len(more) <= width - 18 - len(mark) else "", self.palette.dim)]
        if line == tall - 1 or not load.load:
            return ()
        each = min(6, (width - 2) // len(load.load))
        rows, level = tall - 2, tall - 2 - line
        fair = sum(load.load) / len(load.load) if load.load else 0.0
        top = max(1.6, worst)
        glyphs = " " + (EIGHTHS_ASCII if self.look.ascii else EIGHTHS)
        pieces: list[Piece] = [(" ", None)]
        for number, tokens in enumerate(load.load):
            share = tokens / fair if fair else 0.0
            filled = int(min(8, max(0, (share / top * rows - level) * 8)))
            text, style = glyphs[min(filled, len(glyphs) - 1)], self.palette.heat[level_of(share)]
            if level == 0 and filled == 0:
                text, style = (DEAD, self.palette.bad) if tokens <= 0 else (glyphs[1], style)
            if self.has_focus and (index, number) == (self._row, self._column):
                style += Style(reverse=True)
            gap = 1 if each >= 3 else 0
            pieces += [(text * (each - gap), style), (" " * gap, None)]
        return pieces

    def _cell_width(self, experts: int, room: int) -> int:
        return max(1, min(3, room // max(1, experts)))

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        layers = self._rows
        tall = self._tall(width, height)
        if tall:
            return self._columns(y, width, tall)
        label = max((len(str(layer)) for layer, _ in layers), default=1) + 2
        extra = width - label - 8
        header = height >= 6
        if not layers:
            return ()
        experts = max(len(load.load) for _, load in layers)
        more = extra - experts >= 18  # room for entropy and dropped share
        room = extra - (14 if more else 0)
        each = self._cell_width(experts, room)
        merged = max(1, -(-experts // max(1, room)))
        cells = -(-experts // merged)
        if header and y == 0:
            return self._header(label, cells * each, experts, each, more)
        index = y - header
        if index >= len(layers):
            return ()
        layer, load = layers[index]
        pieces: list[Piece] = [(fit(f"L{layer}", label - 1) + " ", self.palette.dim)]
        pieces += self._cells(index, load, merged, each)
        worst = _imbalance(load)
        role = "warn" if worst >= LIMIT_WARN else "text"
        pieces.append((fit(f"{worst:.2f}" if math.isfinite(worst) else "-", 6, "right"), self.palette.of(role)))
        pieces.append((" !" if worst >= LIMIT_WARN or load.dead else "  ", self.palette.warn))
        if more:
            pieces.append((fit(_share(load.entropy), 6, "right") + fit(_percent(load.dropped), 8, "right"), self.palette.dim))
        return pieces

    def _header(self, label: int, width: int, experts: int, each: int, more: bool) -> Sequence[Piece]:
        numbers = f"E0{f'E{experts - 1}'.rjust(max(1, width - 2))}" if width >= 6 else ""
        pieces: list[Piece] = [(" " * label + fit(numbers, width) + fit("max", 6, "right") + "  ", self.palette.faint)]
        if more:
            pieces.append((fit("entr.", 6, "right") + fit("drop", 8, "right"), self.palette.faint))
        return pieces

    def _cells(self, row: int, load: LayerLoad, merged: int, each: int) -> list[Piece]:
        total = sum(load.load)
        fair = total / len(load.load) if load.load else 0.0
        pieces: list[Piece] = []
        glyphs = GLYPHS_ASCII if self.look.ascii else GLYPHS
        for start in range(0, len(load.load), merged):
            group = load.load[start : start + merged]
            value = 0.0 if min(group) <= 0 else max(group)  # a dead expert is not hidden by its neighbours
            chosen = self.has_focus and row == self._row and start <= self._column < start + merged
            if value <= 0:
                text, style = DEAD, self.palette.bad
            else:
                level = level_of(value / fair) if fair else 2
                text, style = glyphs[level], self.palette.heat[level]
            pieces.append((text * each if text != DEAD else fit(DEAD, each), style + Style(reverse=True) if chosen else style))
        return pieces

    # cursor

    def _move(self, rows: int, columns: int) -> None:
        experts = max((len(load.load) for _, load in self._rows), default=1)
        self._row = min(max(0, self._row + rows), max(0, len(self._rows) - 1))
        self._column = min(max(0, self._column + columns), experts - 1)
        self.sync()

    def action_down(self) -> None:
        self._move(1, 0)

    def action_up(self) -> None:
        self._move(-1, 0)

    def action_left(self) -> None:
        self._move(0, -1)

    def action_right(self) -> None:
        self._move(0, 1)

    def on_focus(self) -> None:
        self.sync()

    def on_blur(self) -> None:
        self.sync()

    def on_resize(self) -> None:
        self._seen = ()
        self.sync()

    def on_show(self) -> None:
        self.sync()


def _imbalance(load: LayerLoad) -> float:
    if load.imbalance is not None:
        return load.imbalance
    total = sum(load.load)
    return max(load.load) * len(load.load) / total if total > 0 else 0.0


def _share(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"
