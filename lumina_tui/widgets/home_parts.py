"""Parts of Home beside the tables: their columns and cells, what the machine has, and the chosen run in one line or a panel."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.cells import cell_len
from textual.strip import Strip
from textual.widget import Widget

from lumina_engine.run.directory import UNREADABLE, RunInfo
from lumina_engine.run.listing import Figures

from ..paint import Piece, age, clean, count, duration, fit, line, size, whole
from ..steady import Steady
from .bars import STATE_ROLES
from .panel import Drawn
from .table import Column, Row
from .text_panel import wrapped

if TYPE_CHECKING:
    from lumina_engine.monitoring.record import Hardware

    from ..overview import Change, Server

GLYPHS = {"running": "●", "paused": "‖", "finished": "✓", "failed": "✗", "crashed": "✗", "preempted": "↓", UNREADABLE: "?"}
_GLYPHS_ASCII = {"●": "*", "‖": "=", "✓": "+", "✗": "x", "↓": "v", "○": "o"}
CURVE_WIDTH = 12
MATERIAL = 0.02  # of the whole: memory or disk that changed by less is shown as before
FREE_SHARE = 0.1  # of the free disk: where little is left, less is material
TIGHT = 0.85  # of the memory in use: from here on it is told how much
USE_BAND = 10.0  # points of utilisation
RUN_COLUMNS = (
    Column("state", "state", 12),
    Column("name", "name", 20, grow=True),
    Column("preset", "preset", 6, rank=8),
    Column("step", "step", 9, "right", rank=1),
    Column("of", "of", 9, "right", rank=7),
    Column("loss", "loss", 7, "right", rank=2),
    Column("rate", "tokens/s", 8, "right", rank=6),
    Column("left", "left", 9, "right", rank=5),
    Column("age", "age", 5, "right", rank=3),
    Column("alerts", "alerts", 6, "right", rank=4),
    Column("curve", "newest loss", CURVE_WIDTH, rank=9),
)
SERVER_COLUMNS = (
    Column("checkpoint", "checkpoint", 20, grow=True),
    Column("device", "device", 8, rank=2),
    Column("memory", "memory", 10, "right", rank=1),
    Column("idle", "idle", 9, "right", rank=1),
    Column("leaves", "leaves in", 9, "right", rank=3),
)


def run_row(row: RunInfo, figures: Figures | None, marked: bool, ascii_only: bool) -> Row:
    """The row of a run; dots stand for figures that were not read yet."""
    glyph = GLYPHS.get(row.state, "○")
    glyph = _GLYPHS_ASCII.get(glyph, glyph) if ascii_only else glyph
    role = STATE_ROLES.get(row.state, "bad" if row.state == UNREADABLE else "dim")
    name = ("*" if marked else "") + row.name
    if row.state == UNREADABLE:
        reason = (row.reason or "").replace(f"{row.path}/", "")
        return Row(row.name, ((f"{glyph} {row.state}", role), (f"{name}: {reason}", "bad")))
    known, stale = row.alerts is not None, "text" if row.alive else "dim"
    alerts = f"{'!!' if row.critical else '!'}{row.alerts}" if row.alerts else "" if known else "…"
    late = row.alive and row.age_s is not None and row.age_s > 60
    cells = (
        (f"{glyph} {row.state}", role),
        (name, "accent" if marked else "text"),
        (row.preset or "-", "dim"),
        (whole(row.step) if known else "…", stale),
        (whole(row.total_steps), "dim"),
        (_loss(row.smoothed_loss) if known else "…", stale),
        (count(row.tokens_per_s) if row.alive else "-", stale),
        (duration(row.left_s), stale),
        (age(row.age_s), "warn" if late else "dim"),
        (alerts, "bad" if row.critical else "warn"),
        ("".join(block_chart(figures.losses, CURVE_WIDTH, 1, ascii_only)) if figures else "", "curve" if row.alive else "dim"),
    )
    return Row(row.name, cells)


def _loss(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if math.isfinite(value) and abs(value) < 1000 else count(value)


def server_row(server: Server, now: float) -> Row:
    """The row of a loaded chat server."""
    card = server.card
    idle = None if card.active is None else max(0.0, now - card.active)
    leaves = "-" if idle is None or not card.idle_timeout_s else age(max(0.0, card.idle_timeout_s - idle))
    loading = card.state == "loading"
    return Row(
        str(card.pid),
        (
            ("loading …" if loading else card.name or card.checkpoint, "dim" if loading else "text"),
            (card.device or "-", "dim"),
            (size(server.memory_bytes), "text"),
            ("busy" if card.active is None else age(idle), "good" if card.active is None else "dim"),
            (leaves, "dim"),
        ),
    )


@dataclass(frozen=True)
class Chosen:
    """Everything known about the chosen run. `changes`: keys that differ from its preset; None: not looked at."""

    row: RunInfo | None = None
    figures: Figures = field(default_factory=Figures)
    changes: Sequence[Change] | None = None


class MachineLine(Widget):
    """What this machine has, in one line. It is painted again when a figure changed materially."""

    DEFAULT_CSS = "MachineLine { height: 1; }"

    def __init__(self) -> None:
        super().__init__()
        self._text = ""
        self._steady = Steady()

    def show(self, sample: Hardware | None, live: int) -> None:
        """New figures."""
        text = "  |  ".join(machine_parts(sample, live, self._steady))
        if text != self._text:
            self._text = text
            self.refresh()

    def render_line(self, y: int) -> Strip:
        palette = self.app.look.palette  # type: ignore[attr-defined]
        return line(self.size.width, [(" " + self._text, palette.dim)], base=self.rich_style)


def machine_parts(sample: Hardware | None, live: int, steady: Steady) -> list[str]:
    """Devices with their use, memory, free disk, and how many runs live; what is not known is left out.

    Memory in use is told while a run lives or little is left: what other programs take and give back is no news.
    """
    if sample is None:
        return []
    parts = [_devices(sample, steady), f"{sample.cpu_count} cores" if sample.cpu_count else ""]
    if sample.memory_total:
        total = sample.memory_total
        used = steady("memory", sample.memory_used, MATERIAL * total) if sample.memory_used is not None else None
        told = used is not None and (live or used >= TIGHT * total)
        parts.append(f"mem {used / 1e9:.0f} of {total / 1e9:.0f} GB" if used is not None and told else f"{size(total)} memory")
    if sample.disk_free is not None:
        band = min(MATERIAL * (sample.disk_total or math.inf), FREE_SHARE * sample.disk_free)
        parts.append(f"{size(steady('disk', sample.disk_free, max(1.0, band)))} disk free")
    parts.append(f"{live} live" if live else "no live run")
    return [part for part in parts if part]


def _devices(sample: Hardware, steady: Steady) -> str:
    names = [clean(device.name).removeprefix("NVIDIA ") for device in sample.devices]
    if not names:
        return "no GPU"
    uses = [device.utilisation for device in sample.devices if device.utilisation is not None]
    used = [device.memory_used for device in sample.devices if device.memory_used is not None]
    total = sum(device.memory_total for device in sample.devices if device.memory_total)
    text = f"{len(names)} x {names[0]}"
    text += f" {steady('devices', sum(uses) / len(uses), USE_BAND):.0f} %" if uses else ""
    if used and total:
        text += f", {steady('device memory', sum(used), MATERIAL * total) / 1e9:.0f} of {total / 1e9:.0f} GB"
    return text


def facts(chosen: Chosen) -> list[tuple[str, str]]:
    """(label, text) of what is worth knowing about a run; texts may come from outside."""
    row, figures = chosen.row, chosen.figures
    if row is None:
        return []
    saved = figures.checkpoint
    newest = figures.alerts[-1] if figures.alerts else None
    rows = [
        ("why", row.reason or ""),
        ("alert", f"{newest.code}: {newest.message}" if newest is not None else ""),
        ("left", duration(row.left_s) if row.left_s is not None else ""),
        (
            "saved",
            f"step {whole(saved.step)}{', best' if saved.best else ''}, {size(saved.bytes)}" if saved is not None else "",
        ),
        ("made", time.strftime("%Y-%m-%d %H:%M", time.localtime(row.created)) if row.created else ""),
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

    def show(self, chosen: Chosen) -> None:
        """Another run, or other facts."""
        rows = facts(chosen)
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
    """The chosen run, at some length: newest losses, facts, last alerts with advice, what differs from its preset."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(title="run", id=id)
        self._shown = Chosen()

    def show(self, chosen: Chosen) -> None:
        """Another run, or newer figures."""
        if chosen != self._shown:
            self._shown = chosen
            row = chosen.row
            self.set_title(row.name if row is not None else "run", row.state if row is not None else "")
            self.repaint_changed()

    def on_resize(self) -> None:
        self.refresh()

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        lines = self._lines(width)
        return lines[y] if y < len(lines) else ()

    def _lines(self, width: int) -> list[list[Piece]]:
        row, figures = self._shown.row, self._shown.figures
        if row is None:
            return []
        lines: list[list[Piece]] = []
        if figures.losses:
            head = f"{figures.losses[-1]:.3f}, smoothed {_loss(figures.smoothed_loss)}, newest {len(figures.losses)} steps"
            lines.append([(" loss   ", self.palette.dim), (head, self.palette.text)])
            rows = block_chart(figures.losses, width - 2, 6, self.look.ascii)
            lines += [[(" " + text, self.palette.curve)] for text in rows]
            lines.append([])
        for label, text in facts(self._shown):
            if label == "path":  # its end is what tells runs apart
                shown = clean(text)
                room = width - 9
                cut = shown if cell_len(shown) <= room else "…" + shown[-max(1, room - 1) :]
                lines.append([(" path   ", self.palette.dim), (fit(cut, room), self.palette.text)])
            elif label != "alert":
                lines += self._wrapped(f" {fit(label, 7)}", text, "text", width)
        for alert in reversed(figures.alerts[-3:]):
            role = "bad" if alert.severity == "critical" else "warn"
            lines += [[], *self._wrapped(f" ! {clean(alert.code)} ", alert.message, "text", width, role)]
            lines += self._wrapped("   ", alert.recommendation, "dim", width) if alert.recommendation else []
        return lines + self._change_lines(width)

    def _change_lines(self, width: int) -> list[list[Piece]]:
        row, changes = self._shown.row, self._shown.changes
        if changes is None or row is None:
            return []
        head = f" against preset {clean(row.preset)}" if changes else f" as preset {clean(row.preset)}"
        lines: list[list[Piece]] = [[], [(head, self.palette.dim)]]
        name_width = min(24, max((len(change.name) for change in changes), default=0))
        for change in changes:
            name = (f" {fit(change.name, name_width)} ", self.palette.text)
            lines.append([name, (clean(change.now), self.palette.accent), (f"  was {clean(change.preset)}", self.palette.dim)])
        return lines

    def _wrapped(self, label: str, text: str, role: str, width: int, label_role: str = "dim") -> list[list[Piece]]:
        room = max(4, width - len(label) - 1)
        parts = wrapped([(text, role)], room, 0)
        lines: list[list[Piece]] = []
        for index, found in enumerate(parts):
            lead = label if index == 0 else " " * len(label)
            lines.append([(lead, self.palette.of(label_role)), *((piece, self.palette.of(name)) for piece, name in found)])
        return lines


def block_chart(values: Sequence[float], width: int, height: int, ascii_only: bool) -> list[str]:
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
    lowest = 1 if height == 1 else 0  # a single line shows its smallest value too
    rows = []
    for row in range(height - 1, -1, -1):
        text = ""
        for value in means:
            if not math.isfinite(value):
                text += " "
                continue
            share = min(1.0, (value - low) / (high - low)) if high > low else 0.0
            text += glyphs[int(min(8, max(lowest, (share * height - row) * 8)))]
        rows.append(text)
    return rows
