"""Home: all runs below the root, what this machine has, and one run in more detail."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from textual.containers import Horizontal
from textual.widget import Widget

from lumina_engine.run.directory import RunDirectory, RunError, RunInfo

from ..paint import age, clean, count, whole
from ..runs import Preview, RunList, preview
from ..widgets.bars import STATE_ROLES
from ..widgets.home_parts import DetailLine, DetailPanel, MachineLine
from ..widgets.table import Column, Row, Table
from .base import LuminaScreen, State
from .dialogs import Choice

if TYPE_CHECKING:
    from lumina_engine.monitoring.record import Hardware

REFRESH_S = 2.0
LOCKS_S = 0.5
MACHINE_S = 10.0

GLYPHS = {"running": "●", "paused": "‖", "finished": "✓", "failed": "✗", "crashed": "✗", "preempted": "↓", "unreadable": "?"}
COLUMNS = (
    Column("state", "state", 12),
    Column("name", "name", 22, grow=True),
    Column("preset", "preset", 8, rank=5),
    Column("step", "step", 9, "right", rank=1),
    Column("of", "of", 9, "right", rank=4),
    Column("done", "done", 5, "right", rank=6),
    Column("loss", "loss", 7, "right", rank=2),
    Column("rate", "tokens/s", 8, "right", rank=7),
    Column("age", "age", 5, "right", rank=3),
)
SORTS: tuple[tuple[str, Callable[[RunInfo], tuple[object, ...]]], ...] = (
    ("age", lambda row: (not row.alive, row.age_s if row.age_s is not None else math.inf)),
    ("name", lambda row: (row.name,)),
    ("state", lambda row: (row.state, row.name)),
    ("loss", lambda row: (row.loss is None or not math.isfinite(row.loss), row.loss or 0.0)),
)


WELCOME = (
    "No runs in {root} yet. a starts one from a preset.\n\n"
    "debug trains a small mixture-of-experts chat model on this machine, GPU or not, in minutes: "
    "watch it, leave, come back, talk to it.\n\n"
    "? shows all keys, 2 the presets, q leaves (runs go on)."
)


class HomeScreen(LuminaScreen):
    """The list of runs. It opens no sockets: files and locks only."""

    scope = "home"
    number = 1
    heading = "Home"
    smallest = (30, 8)
    DEFAULT_CSS = """
    HomeScreen #body { height: 1fr; }
    HomeScreen #runs { width: 1fr; height: 1fr; }
    HomeScreen #detail { width: 52; height: 1fr; display: none; }
    HomeScreen.-wide #detail { display: block; }
    HomeScreen.-wide DetailLine { display: none; }
    HomeScreen.-tiny #body, HomeScreen.-tiny MachineLine, HomeScreen.-tiny DetailLine { display: none; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[RunInfo] = []
        self.filter = ""
        self.order = 0
        self._list: RunList | None = None
        self._busy = False
        self._refreshed = self._looked = self._sampled = -math.inf
        self._previewed = ""

    def content(self) -> Iterable[Widget]:
        yield MachineLine()
        yield Horizontal(Table(COLUMNS, title="runs", id="runs"), DetailPanel(id="detail"), id="body")
        yield DetailLine()

    def on_mount(self) -> None:
        self.table.set_state(State.LOADING, f"reading {clean(self.lumina.runs_root)} …")
        self.table.focus()
        self.set_frame(subject=str(self.lumina.runs_root))

    @property
    def table(self) -> Table:
        return self.query_one("#runs", Table)

    @property
    def chosen(self) -> RunInfo | None:
        """The run under the cursor."""
        key = self.table.cursor_key
        return next((row for row in self.rows if row.name == key), None)

    # reading

    def tick(self) -> None:
        now = time.monotonic()
        if not self._busy and now - self._refreshed >= REFRESH_S:
            self._busy = True
            self.lumina.spawn(self._refresh())
        elif (
            not self._busy and self._list is not None and now - self._looked >= LOCKS_S and any(row.alive for row in self.rows)
        ):
            self._busy = True
            self.lumina.spawn(self._look())
        if now - self._sampled >= MACHINE_S and self._refreshed > 0:
            self._sampled = now
            self.lumina.spawn(self._machine())

    async def _refresh(self) -> None:
        self._list = self._list or RunList(self.lumina.runs_root)
        try:
            self.rows = await asyncio.to_thread(self._list.refresh)
        except OSError as error:
            self.table.set_state(State.ERROR, f"{self.lumina.runs_root}: {error.strerror or error}\nr reads it again")
            return
        finally:
            self._busy = False
            self._refreshed = self._looked = time.monotonic()
        if self.is_attached:
            self.show_rows()
            await self._preview()

    async def _look(self) -> None:
        assert self._list is not None
        try:
            died = await asyncio.to_thread(self._list.look_at_living)
        finally:
            self._busy = False
            self._looked = time.monotonic()
        if died:
            self._refreshed = -math.inf

    async def _machine(self) -> None:
        sample = await asyncio.to_thread(_sample, str(self.lumina.runs_root))
        for part in self.query(MachineLine):
            part.show(sample, sum(row.alive for row in self.rows))

    async def _preview(self) -> None:
        row = self.chosen
        found = await asyncio.to_thread(preview, row.path) if row is not None else Preview()
        for panel in self.query(DetailPanel):
            panel.show(row, found)
        for part in self.query(DetailLine):
            part.show(row, found)

    # showing

    def show_rows(self) -> None:
        """Fill the table from the rows, with filter and order."""
        _, key = SORTS[self.order]
        rows = sorted((row for row in self.rows if matches(row, self.filter)), key=key)
        table = self.table
        if not self.rows:
            table.set_rows(())
            table.set_state(State.EMPTY, WELCOME.format(root=clean(self.lumina.runs_root)))
        elif not rows:
            table.set_rows(())
            table.set_state(State.EMPTY, f"No run matches {clean(self.filter)}. / changes the filter.")
        else:
            table.set_state(State.LIVE)
            table.set_rows([Row(row.name, cells(row, self.look.ascii)) for row in rows])
        live = sum(row.alive for row in self.rows)
        shown = f"{len(rows)} of {len(self.rows)}" if self.filter else str(len(self.rows))
        table.set_title(
            f"runs {shown}" if self.rows else "runs", f"/{self.filter}" if self.filter else f"by {SORTS[self.order][0]}"
        )
        self.set_frame(badge=f"{live} live" if live else "", badge_role="good")
        self.refresh_keys()

    def on_table_moved(self, event: Table.Moved) -> None:
        self.refresh_keys()
        self.lumina.spawn(self._preview())

    def on_table_chosen(self, event: Table.Chosen) -> None:
        row = self.chosen
        if row is not None:
            self.lumina.open_monitor(row.path)

    # actions

    def why_not(self, action_id: str) -> str | None:
        row, verb = self.chosen, action_id.rpartition(".")[2]
        if verb in ("resume", "stop", "chat", "copy") and row is None:
            return "no run is chosen"
        if verb in ("resume", "stop", "new") and self.lumina.readonly:
            return "--readonly: runs are left as they are"
        if verb == "resume" and row is not None:
            if row.alive:
                return f"{row.name} is running"
            return "its run.json cannot be read" if row.state == "unreadable" else None
        if verb == "stop" and row is not None and not row.alive:
            return f"{row.name} is not running"
        if verb == "chat" and not self.lumina.has_screen(7):
            return "this version has no Chat"
        return None

    def action_new(self) -> None:
        if self.lumina.has_screen(2):
            self.lumina.open_presets()
        else:
            self.lumina.spawn(self.lumina.start_preset("debug"))

    def action_resume(self) -> None:
        row = self.chosen
        assert row is not None
        self.lumina.spawn(self.lumina.resume_run(row.name))

    def action_stop(self) -> None:
        row = self.chosen
        assert row is not None
        choices = [Choice("s", "save a checkpoint, then stop", "save"), Choice("x", "stop without saving", "stop")]
        self.lumina.ask(f"Stop {row.name}?", choices, lambda how: self._stop(row, how == "save"), ["R resumes it later."])

    def _stop(self, row: RunInfo, save: bool) -> None:
        async def stop() -> None:
            from lumina_engine.run.client import send_command

            try:
                await asyncio.to_thread(send_command, RunDirectory(row.path), "stop", {"save": save})
            except (RunError, OSError) as error:
                self.lumina.notice(f"{row.name}: {error}", "error")
                return
            self.lumina.notice(f"{row.name}: stop accepted{', a checkpoint is saved first' if save else ''}")

        self.lumina.spawn(stop())

    def action_chat(self) -> None:
        row = self.chosen
        assert row is not None
        self.lumina.open_chat(row.name)

    def action_sort(self) -> None:
        self.order = (self.order + 1) % len(SORTS)
        self.show_rows()

    def action_filter(self) -> None:
        def set_filter(text: str) -> None:
            self.filter = " ".join(text.split())
            self.show_rows()

        hint = "Words of the name; also state:failed, preset:b1. Empty shows all."
        self.lumina.prompt("Show runs with", set_filter, value=self.filter, lines=[hint])

    def action_copy(self) -> None:
        row = self.chosen
        assert row is not None
        self.lumina.copy_text(str(row.path))

    def action_reload(self) -> None:
        self._list = None
        self._refreshed = self._sampled = -math.inf
        self.tick()


def matches(row: RunInfo, words: str) -> bool:
    """Whether a row has all words of a filter: `state:x`, `preset:x`, or a part of the name."""
    for word in words.lower().split():
        field, _, wanted = word.rpartition(":")
        text = {"state": row.state, "preset": row.preset or ""}.get(field, row.name if not field else "")
        if wanted not in text.lower():
            return False
    return True


def cells(row: RunInfo, ascii_only: bool) -> tuple[tuple[str, str], ...]:
    """The cells of a run's row."""
    role = STATE_ROLES.get(row.state, "dim" if row.state != "unreadable" else "bad")
    stale = "dim" if not row.alive else "text"
    glyph = GLYPHS.get(row.state, "○")
    if ascii_only:
        glyph = {"●": "*", "‖": "=", "✓": "+", "✗": "x", "↓": "v", "○": "o"}.get(glyph, glyph)
    share = f"{100 * row.step / row.total_steps:.0f} %" if row.step is not None and row.total_steps else "-"
    loss = (
        "-" if row.loss is None else f"{row.loss:.3f}" if math.isfinite(row.loss) and abs(row.loss) < 1000 else count(row.loss)
    )
    if row.state == "unreadable":
        reason = (row.reason or "").replace(f"{row.path}{os.sep}", "")
        return ((f"{glyph} {row.state}", role), (f"{row.name}: {reason}", "bad"), *((("", "text"),) * 7))
    return (
        (f"{glyph} {row.state}", role),
        (row.name, "text"),
        (row.preset or "-", "dim"),
        (whole(row.step), stale),
        (whole(row.total_steps), "dim"),
        (share, stale),
        (loss, stale),
        (count(row.tokens_per_s) if row.alive else "-", stale),
        (age(row.age_s), "dim"),
    )


def _sample(root: str) -> Hardware | None:
    from lumina_engine.monitoring.hardware import Sampler

    try:
        return Sampler(root).sample()
    except OSError:
        return None
