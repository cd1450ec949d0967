"""Doctor: what is wrong with this machine and terminal, and what to do about it."""

from __future__ import annotations

import asyncio
import json
import locale
import os
import shlex
import time
from collections.abc import Iterable
from typing import Any

from textual.containers import Horizontal
from textual.events import Key
from textual.widget import Widget

from lumina_engine.doctor.row import GROUPS

from ..actions import Action
from ..checkup import COLUMNS, Checkup
from ..jobs import Job, JobState
from ..paint import clean
from ..terminal_check import Terminal, key_row, sent_row, terminal_rows
from ..widgets.table import Table
from .base import LuminaScreen, State
from .sheets import lines_sheet

WIDE_COLUMNS = 3


class DoctorScreen(LuminaScreen):
    """Rows of the check as they come. Nothing is measured but when it is asked for."""

    scope = "doctor"
    number = 9
    heading = "Doctor"
    smallest = (40, 8)
    DEFAULT_CSS = """
    DoctorScreen Table { width: 1fr; height: 1fr; }
    DoctorScreen .more { display: none; }
    DoctorScreen.-wide .more { display: block; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.checkup = Checkup()
        self._job: Job | None = None
        self._old_at: float | None = None

    def content(self) -> Iterable[Widget]:
        first = Table(COLUMNS, title="checks", id="checks", header=False)
        more = [Table(COLUMNS, id=f"checks-{index}", classes="more", header=False) for index in range(1, WIDE_COLUMNS)]
        yield Horizontal(first, *more, classes="content")

    def on_mount(self) -> None:
        self.tables[0].set_state(State.LOADING, "looking at this terminal and machine …")
        self.tables[0].focus()
        self.set_frame(subject=os.uname().nodename)
        self.action_reload()

    @property
    def tables(self) -> list[Table]:
        return list(self.query(Table))

    @property
    def chosen(self) -> str | None:
        """Id of the row under the cursor of the focused table."""
        table = next((table for table in self.tables if table.has_focus), self.tables[0])
        return table.cursor_key

    # checking

    def tick(self) -> None:
        if self._old_at is not None and time.time() >= self._old_at:
            self.show_rows()

    def _terminal(self) -> Terminal:
        wire, size = self.lumina.wire, (self.size.width, self.size.height)
        return Terminal(os.environ, self.look, size, locale.getpreferredencoding(False), wire.sent, wire.seconds)

    async def _check_all(self) -> None:
        rows = await asyncio.to_thread(terminal_rows, self._terminal())
        self.checkup.begin(rows)
        self.show_rows()
        await self._run_engine()
        self.checkup.add(sent_row(self._terminal()))  # the longer it counts, the better
        self.show_rows()

    async def _run_engine(self) -> None:
        """Run the checks that have no row yet, and take their rows as they come."""
        job = Job(self.checkup.arguments(self.lumina.runs_root), changed=lambda _: self.show_rows(), told=self.checkup.take)
        self._job = job
        await job.run()
        if self._job is job:
            self.checkup.end(job.error if job.state is JobState.FAILED else "", job.words)
            self.show_rows()

    async def _restart(self, skip: str) -> None:
        """Do without a check that is running: the process that runs it ends, a new one does the rest."""
        job, self._job = self._job, None
        self.checkup.skip(skip)
        self.show_rows()
        if job is not None:
            await job.cancel()
        if self.checkup.pending:
            await self._run_engine()
        else:
            self.checkup.end()
            self.show_rows()

    # showing

    def show_rows(self) -> None:
        """Fill the tables."""
        if not self.is_attached:
            return
        tables = self.tables
        count = WIDE_COLUMNS if self.has_class("-wide") else 1
        columns = self.checkup.columns(count, self.size.width // count - 2)
        for table, rows in zip(tables, columns, strict=False):
            table.set_state(State.LIVE)
            first = next((row.key for row in table.rows if not row.rule), None)
            at_top = table.cursor_key == first
            table.set_rows(rows)
            if at_top:  # not moved yet: what comes above is worth more than the row of before
                table.action_top()
        if not any(columns):
            words = clean(self.checkup.words)
            tables[0].set_state(
                State.EMPTY, f"No row matches {words}. / changes the filter." if words else "waiting for rows …"
            )
        tables[0].set_title(*self.checkup.title())
        problems = self.checkup.problems
        badge = f"{problems} failed" if problems else "" if self.checkup.running else "nothing failed"
        self.set_frame(badge=badge, badge_role="bad" if problems else "good")
        self._old_at = self.checkup.old_at
        self.refresh_keys()

    def on_resize(self) -> None:
        super().on_resize()
        self.show_rows()

    def on_table_moved(self) -> None:
        self.refresh_keys()

    def on_table_chosen(self, event: Table.Chosen) -> None:
        self.lumina.push_screen(lines_sheet(event.key, self.checkup.detail(event.key)))

    def on_key(self, event: Key) -> None:
        """A key without a meaning here: its name tells how the terminal sends it."""
        if event.key in self.active_bindings:
            return
        self.checkup.add(key_row(f"{event.key}{f' ({event.character!r})' if event.character else ''}"))
        self.show_rows()

    # actions

    def footer_text(self, action: Action) -> str:
        return "detail" if action.id == "table.choose" else super().footer_text(action)

    def why_not(self, action_id: str) -> str | None:
        verb = action_id.rpartition(".")[2]
        if verb == "skip" and not self.checkup.pending:
            return "no check is running"
        if verb == "reload" and self.checkup.running:
            return "the check is running: X does without a slow part of it"
        return "no row is chosen" if verb == "copy" and self.chosen is None else None

    def action_reload(self) -> None:
        self.checkup.running = True
        self.lumina.spawn(self._check_all())

    def action_skip(self) -> None:
        pending = self.checkup.pending
        by_id = {planned.id: planned for planned in pending}
        chosen = by_id.get(self.chosen or "") or next((planned for planned in pending if planned.slow), pending[0])
        self.lumina.spawn(self._restart(chosen.id))

    def action_filter(self) -> None:
        def set_filter(text: str) -> None:
            self.checkup.words = " ".join(text.split())
            self.show_rows()

        groups = ", ".join(GROUPS)
        lines = ["fail, warn, ok or skipped; any word; group:disk. Empty shows all.", f"Groups: {groups}"]
        self.lumina.prompt("Show rows with", set_filter, value=self.checkup.words, lines=lines)

    def action_copy(self) -> None:
        found = self.checkup.found.get(self.chosen or "")
        if found is not None:
            row = found.row
            self.lumina.copy_text(f"{row.status} {row.id}: {row.value}" + (f" -> {row.fix}" if row.fix else ""), "doctor.txt")

    def action_command(self) -> None:
        self.lumina.copy_text(shlex.join(["lumina-engine", "doctor", f"--runs={self.lumina.runs_root}"]), "command.txt")

    def action_export(self) -> None:
        rows: list[dict[str, Any]] = [row.to_dict() for row in self.checkup.shown]
        try:
            self.lumina.save_export("doctor", "json", json.dumps(rows, indent=1))
        except OSError as error:
            self.lumina.notice(f"not written: {error}", "error")
