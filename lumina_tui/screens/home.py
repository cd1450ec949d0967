"""Home: all runs below the root, loaded chat servers, what this machine has, and one run in more detail."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable

from textual.containers import Horizontal, Vertical
from textual.widget import Widget

from lumina_engine.run.listing import NEEDS_FIGURES, SORTS, matches, ordered

from ..overview import Overview, Reader
from ..paint import clean
from ..widgets.home_parts import (
    RUN_COLUMNS,
    SERVER_COLUMNS,
    Chosen,
    DetailLine,
    DetailPanel,
    MachineLine,
    run_row,
    server_row,
)
from ..widgets.table import Table
from .base import State
from .home_actions import RunActions

REFRESH_S = 2.0
LOCKS_S = 0.5

WELCOME = (
    "No runs in {root} yet. a starts one from a preset.\n\n"
    "debug trains a small mixture-of-experts chat model on this machine, GPU or not, in minutes: "
    "watch it, leave, come back, talk to it.\n\n"
    "? shows all keys, 2 the presets, q leaves (runs go on)."
)


class HomeScreen(RunActions):
    """The list of runs. It opens no sockets: files and locks only."""

    scope = "home"
    number = 1
    heading = "Home"
    smallest = (30, 8)
    DEFAULT_CSS = """
    HomeScreen #body { height: 1fr; }
    HomeScreen #lists { width: 1fr; height: 1fr; }
    HomeScreen.-wide #lists { width: 2fr; }
    HomeScreen #runs { height: 1fr; }
    HomeScreen #servers { display: none; max-height: 8; }
    HomeScreen.-servers #servers { display: block; }
    HomeScreen #detail { width: 1fr; height: 1fr; display: none; }
    HomeScreen.-wide #detail { display: block; }
    HomeScreen.-wide DetailLine { display: none; }
    HomeScreen.-tiny #body, HomeScreen.-tiny MachineLine, HomeScreen.-tiny DetailLine { display: none; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.reader: Reader | None = None
        self._seen: Overview | None = None
        self._busy = False
        self._refreshed = self._looked = -math.inf

    def content(self) -> Iterable[Widget]:
        lists = (Table(RUN_COLUMNS, title="runs", id="runs"), Table(SERVER_COLUMNS, title="chat servers", id="servers"))
        yield MachineLine()
        yield Horizontal(Vertical(*lists, id="lists"), DetailPanel(id="detail"), id="body")
        yield DetailLine()

    def on_mount(self) -> None:
        self.filter = self.lumina.memory.get("home.filter", "")
        order = self.lumina.memory.get("home.sort", "age")
        self.order = order if order in SORTS else "age"
        self.table.set_state(State.LOADING, f"reading {clean(self.lumina.runs_root)} …")
        self.table.focus()
        self.set_frame(subject=str(self.lumina.runs_root))

    # reading

    def tick(self) -> None:
        now = time.monotonic()
        if self._busy:
            return
        if now - self._refreshed >= REFRESH_S:
            self._busy = True
            self.lumina.spawn(self._refresh())
        elif self.reader is not None and now - self._looked >= LOCKS_S and any(row.alive for row in self.rows):
            self._busy = True
            self.lumina.spawn(self._look(self.reader))

    async def _refresh(self) -> None:
        first = self.reader is None
        self.reader = self.reader or Reader(self.lumina.runs_root)
        visible = None if self.order in NEEDS_FIGURES else self.table.visible_keys
        compare = self.has_class("-wide") and not first  # names first: comparing loads the whole schema
        self._refreshed = time.monotonic()
        try:
            seen = await asyncio.to_thread(self.reader.look, visible, self.table.cursor_key, compare=compare)
        except OSError as error:
            self.table.set_state(State.ERROR, f"{self.lumina.runs_root}: {error.strerror or error}\nr reads it again")
            return
        finally:
            self._busy = False
            self._looked = time.monotonic()
        if self.is_attached:
            self._seen, self.rows, self.servers = seen, seen.rows, seen.servers
            self.show_rows()
            if first:
                self.look_soon()

    async def _look(self, reader: Reader) -> None:
        try:
            died = await asyncio.to_thread(reader.runs.look_at_living)
        finally:
            self._busy = False
            self._looked = time.monotonic()
        if died:
            self.look_soon()

    def look_soon(self) -> None:
        """Read again now, or with the next tick if a look is under way."""
        self._refreshed = -math.inf
        self.tick()

    # showing

    def show_rows(self) -> None:
        """Fill the tables from the last look, with filter and order."""
        rows = ordered((row for row in self.rows if matches(row, self.filter)), self.order)
        figures = self._seen.figures if self._seen is not None else {}
        table = self.table
        if not self.rows:
            table.set_rows(())
            table.set_state(State.EMPTY, WELCOME.format(root=clean(self.lumina.runs_root)))
        elif not rows:
            table.set_rows(())
            table.set_state(State.EMPTY, f"No run matches {clean(self.filter)}. / changes the filter.")
        else:
            table.set_state(State.LIVE)
            ascii_only = self.look.ascii
            table.set_rows([run_row(row, figures.get(row.name), row.name in self.marked, ascii_only) for row in rows])
        shown = f"{len(rows)} of {len(self.rows)}" if self.filter else str(len(self.rows))
        marks = f", {len(self.marked)} marked" if self.marked else ""
        right = f"/{self.filter}" if self.filter else f"by {self.order}"
        table.set_title(f"runs {shown}{marks}" if self.rows else "runs", right)
        live = sum(row.alive for row in self.rows)
        self.set_frame(badge=f"{live} live" if live else "", badge_role="good")
        self._show_servers()
        self._show_detail(live)
        self.refresh_keys()

    def _show_servers(self) -> None:
        had_focus = self.server_table.has_focus
        now = time.time()
        self.server_table.set_rows([server_row(server, now) for server in self.servers])
        self.server_table.styles.height = len(self.servers) + 3
        self.set_class(bool(self.servers), "-servers")
        if had_focus and not self.servers:
            self.table.focus()

    def _show_detail(self, live: int) -> None:
        row, seen = self.chosen, self._seen
        if seen is None:
            return
        known = seen.figures.get(row.name) if row is not None else None
        chosen = Chosen(row, known, seen.changes) if known is not None else Chosen(row)
        self.query_one(DetailPanel).show(chosen)
        self.query_one(DetailLine).show(chosen)
        self.query_one(MachineLine).show(seen.hardware, live)

    def on_table_moved(self, event: Table.Moved) -> None:
        self.refresh_keys()
        if event.table is self.table:
            self.look_soon()

    def on_table_chosen(self, event: Table.Chosen) -> None:
        row, server = self.chosen, self.server
        if event.table is self.server_table and server is not None and server.card.checkpoint:
            self.lumina.open_chat(server.card.checkpoint)
        elif event.table is self.table and row is not None:
            self.lumina.open_monitor(row.path)

    # the list

    def action_sort(self) -> None:
        names = list(SORTS)
        self.order = names[(names.index(self.order) + 1) % len(names)]
        self.lumina.memory.set("home.sort", self.order)
        self.show_rows()
        self.look_soon()

    def action_filter(self) -> None:
        def set_filter(text: str) -> None:
            self.filter = " ".join(text.split())
            self.lumina.memory.set("home.filter", self.filter)
            self.show_rows()
            self.look_soon()

        hint = "Words of the name; also state:failed, preset:b1. Empty shows all."
        self.lumina.prompt("Show runs with", set_filter, value=self.filter, lines=[hint])

    def action_reload(self) -> None:
        self.reader = None
        self.look_soon()
