"""Parts of Home beside the table: what the machine has, and the chosen run in one line or in a panel."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.strip import Strip
from textual.widget import Widget

from lumina_engine.run.directory import RunInfo

from ..paint import Piece, clean, duration, fit, line, size, whole
from ..runs import Preview
from .panel import Drawn

if TYPE_CHECKING:
    from lumina_engine.monitoring.record import Hardware


class MachineLine(Widget):
    """What this machine has, in one line."""

    DEFAULT_CSS = "MachineLine { height: 1; }"

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []

    def show(self, sample: Hardware | None, live: int) -> None:
        """New figures."""
        parts: list[str] = []
        if sample is not None:
            names = [clean(device.name) for device in sample.devices]
            parts.append(f"{len(names)} x {names[0]}" if names else "no GPU")
            parts.append(f"{sample.cpu_count} cores" if sample.cpu_count else "")
            if sample.memory_used is not None and sample.memory_total:
                parts.append(f"mem {sample.memory_used / 1e9:.1f} of {sample.memory_total / 1e9:.0f} GB")
            parts.append(f"{size(sample.disk_free)} disk free" if sample.disk_free is not None else "")
        parts = [part for part in parts if part]
        if parts != self._parts:
            self._parts = parts
            self.refresh()

    def render_line(self, y: int) -> Strip:
        palette = self.app.look.palette  # type: ignore[attr-defined]
        return line(self.size.width, [(" " + "  |  ".join(self._parts), palette.dim)], base=self.rich_style)


def facts(row: RunInfo, found: Preview) -> list[tuple[str, str]]:
    """(label, text) of what is worth knowing about a run; texts may come from outside."""
    left = None
    if row.alive and found.seconds_per_step is not None and row.total_steps and row.step is not None:
        left = (row.total_steps - row.step) * found.seconds_per_step
    saved = ""
    if found.checkpoint is not None:
        saved = (
            f"step {whole(found.checkpoint.step)}{', best' if found.checkpoint.best else ''}, {size(found.checkpoint.bytes)}"
        )
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.created)) if row.created else ""
    rows = [
        ("why", row.reason or ""),
        ("left", duration(left) if left is not None else ""),
        ("saved", saved),
        ("made", made),
        ("starts", str(row.inc) if row.inc > 1 else ""),
        ("path", str(row.path)),
    ]
    return [(label, text) for label, text in rows if text]


class DetailLine(Widget):
    """One line about the chosen run."""

    DEFAULT_CSS = "DetailLine { height: 1; }"

    def __init__(self) -> None:
        super().__init__()
        self._facts: list[tuple[str, str]] = []

    def show(self, row: RunInfo | None, found: Preview) -> None:
        """Another run, or other facts."""
        rows = facts(row, found) if row is not None else []
        if rows != self._facts:
            self._facts = rows
            self.refresh()

    def render_line(self, y: int) -> Strip:
        palette = self.app.look.palette  # type: ignore[attr-defined]
        pieces: list[Piece] = [(" ", None)]
        for label, text in self._facts:
            pieces += [(f"{label} ", palette.faint), (clean(text) + "  ", palette.dim)]
        return line(self.size.width, pieces, base=self.rich_style)


class DetailPanel(Drawn, can_focus=False):
    """The chosen run, at some length."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(title="run", id=id)
        self._shown: tuple[RunInfo | None, Preview] = (None, Preview())

    def show(self, row: RunInfo | None, found: Preview) -> None:
        """Another run, or newer figures."""
        if (row, found) != self._shown:
            self._shown = (row, found)
            self.set_title(row.name if row is not None else "run", row.state if row is not None else "")
            self.refresh()

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        row, found = self._shown
        if row is None:
            return ()
        lines: list[list[Piece]] = []
        if found.losses:
            lines.append([(" loss  ", self.palette.dim), (f"{found.losses[-1]:.3f}", self.palette.text)])
            lines += [[(" " + text, self.palette.curve)] for text in _block_chart(found.losses, width - 2, 5, self.look.ascii)]
            lines.append([])
        for label, text in facts(row, found):
            lines.append([(f" {fit(label, 7)}", self.palette.dim), (clean(text), self.palette.text)])
        for alert in found.alerts:
            role = "bad" if alert.severity == "critical" else "warn"
            lines += [[], [(f" ! {clean(alert.code)} ", self.palette.of(role)), (clean(alert.message), self.palette.text)]]
        return lines[y] if y < len(lines) else ()


def _block_chart(values: Sequence[float], width: int, height: int, ascii_only: bool) -> list[str]:
    """A small column chart in plain Python: Home does without numpy."""
    finite = [value for value in values if math.isfinite(value)]
    if width < 1 or not finite:
        return []
    each = max(1.0, len(values) / width)
    means = []
    for i in range(min(width, len(values))):
        part = [v for v in values[int(i * each) : max(int(i * each) + 1, int((i + 1) * each))] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    low, high = min(finite), sorted(finite)[int(0.98 * (len(finite) - 1))]
    glyphs = "  ..--=#" + "#" if ascii_only else " ▁▂▃▄▅▆▇█"
    rows = []
    for row in range(height - 1, -1, -1):
        text = ""
        for value in means:
            share = min(1.0, (value - low) / (high - low)) if high > low and math.isfinite(value) else 0.0
            text += glyphs[int(min(8, max(0, (share * height - row) * 8)))]
        rows.append(text)
    return rows
