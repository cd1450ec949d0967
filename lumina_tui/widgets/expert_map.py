"""Where the tokens go: layers by experts now, one layer over time, or one figure of all layers over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from rich.style import Style
from textual.binding import BindingType

from lumina_engine.monitoring.experts import LayerLoad

from ..actions import bindings
from ..paint import Piece, count, fit, whole
from ..series import RunStore
from .expert_cells import DEAD, LIMIT_WARN, Ink, Row, imbalance, level_of, row_cells, row_of, shares
from .expert_time import BY_NAME, FIGURES, Figure, Picture, figure_picture, figures_below, layer_picture
from .run_panel import RunPanel
from .sparkline import EIGHTHS, EIGHTHS_ASCII
from .text_panel import Line

WIDTHS = {"dead": 5, "entropy": 6, "dropped": 8, "bias_range": 7, "confidence": 6}  # figures beside a layer, first one first


class ExpertMap(RunPanel):
    """Reads `store.layers` and `store.routing`. Layers are merged when there are too many, the worst of each group shown;
    experts share a cell, then come in pages.
    """

    scope = "map"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("map"))
    stem = "experts"

    def __init__(self, store: RunStore | None = None, *, id: str | None = None) -> None:
        super().__init__(store, id=id)
        self._row, self._column = 0, 0  # of the map: layer, expert
        self._expert, self._time = 0, 10**9  # of a layer over time: expert, column
        self._rows: list[tuple[int, LayerLoad]] = []
        self._merged = 1
        self._experts = 0  # in a layer
        self._plan: tuple[int, Row, list[str]] = (3, Row(0, 0, 1, 1), [])
        self._layer: int | None = None  # shown over time
        self._figure: Figure | None = None  # of all layers over time
        self._picture = Picture([])
        self._below: list[list[Piece]] = []  # figures over time where the map leaves room

    def show(self, store: RunStore) -> None:
        """Show another run."""
        self._row = self._column = self._expert = 0
        self._time, self._layer, self._figure = 10**9, None, None
        super().show(store)

    def versions(self) -> tuple[object, ...]:
        here = (self._row, self._column, self._expert, self._time, self._layer, self._figure)
        return (self.store.expert_version, self.store.routing.version, here)

    @property
    def _ink(self) -> Ink:
        return Ink(self.palette, self.look.ascii, not self.look.ascii and not self.look.ansi)

    # arranging

    def prepare(self) -> None:
        layers = sorted(self.store.layers.items())
        height = self.inner[1]
        rows = max(1, height - (1 if height >= 6 and len(layers) < height else 0))
        self._merged = max(1, -(-len(layers) // rows))
        groups = [layers[i : i + self._merged] for i in range(0, len(layers), self._merged)]
        self._rows = [max(group, key=lambda item: (bool(item[1].dead), _known(imbalance(item[1])))) for group in groups]
        self._row = min(self._row, max(0, len(self._rows) - 1))
        experts = self._experts = max((len(load.load) for _, load in layers), default=0)
        self._column = min(self._column, max(0, experts - 1))
        self._plan = self._laid_out(self.inner[0])
        if self._layer is not None:
            self._arrange_layer(self._layer)
        elif self._figure is not None:
            self._arrange_figure(self._figure)
        else:
            shape = f" {len(layers)} x {experts}" if layers else ""
            tall = self._tall(*self.inner)
            free = height - self._used(tall) - 1
            known = self.store.routing.layers
            fits = known and self._merged == 1 and free >= len(known) + 3
            self._below = figures_below(self.store.routing, known, self.inner[0], free, self._ink) if fits else []
            right = "load / fair share" if tall else "max/mean" if layers else ""
            self.set_title(f"experts{shape}", self.aged(right))
            self.set_foot(*self._foot(layers))

    def _arrange_layer(self, layer: int) -> None:
        time = self.store.routing.layer(layer)
        width, height = self.inner
        if time is None or not len(time.last_T):
            self._layer = None
            return
        self._expert = min(self._expert, time.dead_TE.shape[1] - 1)
        if self._time >= 10**9:
            self._time = len(time.last_T) - 1
        self._picture, words = layer_picture(time, width, height, self._ink, self._expert, self._time)
        self._time = min(self._time, max(0, self._picture.cells - 1))
        newest = [(figure, float(time.figures[figure.name][-1])) for figure in FIGURES]
        known = [f"{figure.title} {figure.text(value)}" for figure, value in newest if math.isfinite(value)]
        self.set_title(f"L{layer} over time", self.aged("Enter back"))
        self.set_foot(words if self.has_focus else ", ".join(known[: max(1, width // 17)]))

    def _arrange_figure(self, figure: Figure) -> None:
        layers = self.store.routing.layers
        if self._time >= 10**9:
            self._time = max(0, self.inner[0])
        width, height = self.inner
        self._picture, words = figure_picture(
            self.store.routing, figure, layers, width, height, self._ink, self._row, self._time
        )
        self._time = min(self._time, max(0, self._picture.cells - 1))
        self.set_title(f"{figure.title} over time", self.aged("] next"))
        self.set_foot(words if self.has_focus else "")

    def _foot(self, layers: list[tuple[int, LayerLoad]]) -> tuple[str, str]:
        if not layers:
            return "", ""
        row = self._plan[1]
        page = f"E{row.first}-{row.first + row.count - 1} of {self._experts}" if row.count < self._experts else ""
        right = ", ".join(part for part in (f"worst of {self._merged}" if self._merged > 1 else "", page) if part)
        if self.has_focus and self._rows:
            layer, load = self._rows[self._row]
            if self._column < len(load.load):
                tokens, share = load.load[self._column], shares(load.load)[self._column]
                value = f"{share:.2f} x fair" if math.isfinite(share) else "-"
                return f"L{layer} E{self._column}: {value}, {count(tokens)}", right
        dead = sum(load.dead or 0 for _, load in layers)
        dropped = [load.dropped for _, load in layers if load.dropped is not None and math.isfinite(load.dropped)]
        parts = [f"{dead} dead"]
        if dropped:
            parts.append(f"drop {100 * sum(dropped) / len(dropped):.1f} %")
        return ", ".join(parts), right

    # painting

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        if self._layer is not None or self._figure is not None:
            return self._picture.lines[y] if y < len(self._picture.lines) else ()
        if not self._rows:
            return [(" no figures yet", self.palette.dim)] if y == 0 else ()
        tall = self._tall(width, height)
        below = y - self._used(tall) - 1
        if 0 <= below < len(self._below):
            return self._below[below]
        return self._columns(y, width, tall) if tall else self._line(y, width, height)

    def _used(self, tall: int) -> int:
        """Lines that the map of now takes."""
        return len(self._rows) * tall if tall else len(self._rows) + 1

    def _tall(self, width: int, height: int) -> int:
        """Lines for a layer when its experts can be drawn as columns; 0 if there is no room for that."""
        if not self._rows or self._merged > 1 or self._experts > width - 2:
            return 0
        lines = min(9, height // len(self._rows))
        return lines if lines >= 4 else 0

    def _columns(self, y: int, width: int, tall: int) -> Sequence[Piece]:
        index, at = divmod(y, tall)
        if index >= len(self._rows):
            return ()
        layer, load = self._rows[index]
        if at == 0:
            return self._heading(layer, load, width)
        if at == tall - 1 or not load.load:
            return ()
        each = min(6, (width - 2) // len(load.load))
        rows, level = tall - 2, tall - 2 - at
        top = max(1.6, _known(imbalance(load)))
        glyphs = " " + (EIGHTHS_ASCII if self.look.ascii else EIGHTHS)
        pieces: list[Piece] = [(" ", None)]
        for expert, (share, tokens) in enumerate(zip(shares(load.load), load.load, strict=True)):
            filled = int(min(8, max(0, (_known(share) / top * rows - level) * 8)))
            text, style = glyphs[min(filled, len(glyphs) - 1)], self.palette.heat[level_of(share)]
            if level == 0 and filled == 0:
                text, style = (DEAD, self.palette.bad) if tokens <= 0 else (glyphs[1], style)
            if self.has_focus and (index, expert) == (self._row, self._column):
                style += Style(reverse=True)
            gap = 1 if each >= 3 else 0
            pieces += [(text * (each - gap), style), (" " * gap, None)]
        return pieces

    def _heading(self, layer: int, load: LayerLoad, width: int) -> list[Piece]:
        worst = imbalance(load)
        role = "warn" if worst >= LIMIT_WARN or load.dead else "text"
        mark = f"  {load.dead} dead" if load.dead else ""
        words = f"{worst:.2f}{mark}" if math.isfinite(worst) else "-"
        pieces: list[Piece] = [(f" L{layer} max/mean ", self.palette.dim), (words, self.palette.of(role))]
        used = sum(len(text) for text, _ in pieces)
        for name in ("entropy", "dropped", "bias_range", "confidence"):
            value = getattr(load, name)
            text = f"  {BY_NAME[name].head} {BY_NAME[name].text(_nan(value))}"
            if value is not None and used + len(text) <= width and not (name == "dropped" and value == 0):
                pieces.append((text, self.palette.dim))
                used += len(text)
        return pieces

    def _laid_out(self, width: int) -> tuple[int, Row, list[str]]:
        """Columns of the label, how the experts lie, and the figures beside each layer besides max/mean."""
        label = max((len(str(layer)) for layer, _ in self._rows), default=1) + 2
        room = max(1, width - label - 8)
        cells, beside = min(room, 2 * self._experts), list[str]()
        for name, wide in WIDTHS.items():
            if room - cells - sum(WIDTHS[other] for other in beside) < wide:
                break
            if any(getattr(load, name) is not None for _, load in self._rows):
                beside.append(name)
        room -= sum(WIDTHS[name] for name in beside)
        return label, row_of(self._experts, room, self._ink.halves, self._column), beside

    def _line(self, y: int, width: int, height: int) -> Sequence[Piece]:
        label, row, beside = self._plan
        header = int(height >= 6 and len(self._rows) < height)
        if header and y == 0:
            return self._header(label, row, beside)
        index = y - header
        if index >= len(self._rows):
            return ()
        layer, load = self._rows[index]
        chosen = self._column if self.has_focus and index == self._row else None
        dead = [tokens <= 0 for tokens in load.load]
        pieces: list[Piece] = [(fit(f"L{layer}", label - 1) + " ", self.palette.dim)]
        pieces += row_cells(shares(load.load), dead, row, self._ink, chosen)
        worst = imbalance(load)
        role = "warn" if worst >= LIMIT_WARN else "text"
        pieces.append((fit(f"{worst:.2f}" if math.isfinite(worst) else "-", 6, "right"), self.palette.of(role)))
        pieces.append((" !" if worst >= LIMIT_WARN or load.dead else "  ", self.palette.warn))
        for name in beside:
            text = BY_NAME[name].text(_nan(getattr(load, name)))
            style = self.palette.warn if name == "dead" and load.dead else self.palette.dim
            pieces.append((fit(text, WIDTHS[name], "right"), style))
        return pieces

    def _header(self, label: int, row: Row, beside: Sequence[str]) -> Sequence[Piece]:
        first, last = f"E{row.first}", f"E{row.first + row.count - 1}"
        numbers = first + last.rjust(max(1, row.width - len(first))) if row.width >= len(first) + len(last) + 1 else ""
        heads = "".join(fit(BY_NAME[name].head, WIDTHS[name], "right") for name in beside)
        return [(" " * label + fit(numbers, row.width) + fit("max", 6, "right") + "  " + heads, self.palette.faint)]

    # cursor

    def _move(self, rows: int, columns: int) -> None:
        if self._layer is not None:
            self._expert = max(0, self._expert + rows)
            self._time = max(0, min(self._picture.cells - 1, self._time + columns))
        elif self._figure is not None:
            self._row = min(max(0, self._row + rows), max(0, len(self.store.routing.layers) - 1))
            self._time = max(0, min(self._picture.cells - 1, self._time + columns))
        else:
            self._row = min(max(0, self._row + rows), max(0, len(self._rows) - 1))
            self._column = min(max(0, self._column + columns), max(0, self._experts - 1))
        self.sync()

    def action_down(self) -> None:
        self._move(1, 0)

    def action_up(self) -> None:
        self._move(-1, 0)

    def action_left(self) -> None:
        self._move(0, -1)

    def action_right(self) -> None:
        self._move(0, 1)

    # over time

    def why_not(self, action_id: str) -> str | None:
        return "there are no figures of experts yet" if not self.store.layers else None

    def action_over_time(self) -> None:
        if self._layer is not None:
            self._layer = None
        elif self._figure is not None:
            layers = self.store.routing.layers
            self._layer = layers[min(self._row, len(layers) - 1)]
        elif self._rows:
            self._layer, self._expert = self._rows[self._row][0], self._column
        self._time = 10**9
        self.sync()

    def action_figure(self) -> None:
        order: list[Figure | None] = [None, *FIGURES]
        self._figure = order[(order.index(self._figure) + 1) % len(order)] if self._layer is None else self._figure
        self._layer, self._time = None, 10**9
        self.sync()

    def explain(self) -> Sequence[Line]:
        """For the help: the signs of the map."""
        limits = ("under 0.25", "to 0.75", "to 1.25", "to 2", "above")
        values = (0.1, 0.5, 1.0, 1.5, 3.0)
        cells = [(self._ink.cell(value, False)[0], words) for value, words in zip(values, limits, strict=True)]
        signs = [part for sign, words in cells for part in ((f"  {sign or ' '} ", "key"), (words, "text"))]
        dead = [(f"  {DEAD} ", "bad"), ("no token at all", "text")]
        return [[("  Load of an expert, its fair share being 1:", "text")], [*signs, *dead]]

    # export

    def text(self) -> str:
        """Every layer with its loads and figures, in columns separated by tabs."""
        heads = ["step", "layer", *(figure.name for figure in FIGURES), *(f"expert_{e}" for e in range(self._experts))]
        rows = ["\t".join(heads)]
        for layer, load in sorted(self.store.layers.items()):
            figures = [imbalance(load), *(getattr(load, figure.name) for figure in FIGURES[1:])]
            cells = ["" if value is None else f"{value:.6g}" for value in (*figures, *load.load)]
            rows.append("\t".join([whole(load.step).replace(",", ""), str(layer), *cells]))
        return "\n".join(rows) + "\n"

    def action_export(self) -> None:
        self.lumina.save_export(self.stem, "tsv", self.text())


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _known(value: float) -> float:
    """For comparisons: what is not finite counts as nothing."""
    return value if math.isfinite(value) else 0.0
