"""What one can do with the runs and chat servers on Home: start, resume, stop, unload, talk, compare, export."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Iterable

from lumina_engine.run.directory import UNREADABLE, RunDirectory, RunError, RunInfo
from lumina_engine.run.listing import listed, matches, ordered, row_dict

from ..actions import Action
from ..overview import Server
from ..widgets.table import Table
from .base import LuminaScreen
from .dialogs import Choice

MOST_MARKS = 8


class RunActions(LuminaScreen):
    """A screen with the tables `#runs` and `#servers`. Subclasses fill `rows` and `servers`, and read again in `look_soon`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[RunInfo] = []
        self.servers: list[Server] = []
        self.marked: list[str] = []
        self.filter = ""
        self.order = "age"

    # to override

    def show_rows(self) -> None:
        """Fill the tables."""

    def look_soon(self) -> None:
        """Read again."""

    @property
    def table(self) -> Table:
        return self.query_one("#runs", Table)

    @property
    def server_table(self) -> Table:
        return self.query_one("#servers", Table)

    @property
    def chosen(self) -> RunInfo | None:
        """The run under the cursor."""
        key = self.table.cursor_key
        return next((row for row in self.rows if row.name == key), None)

    @property
    def shown_rows(self) -> list[RunInfo]:
        """The runs on the screen."""
        keys = set(self.table.visible_keys)
        return [row for row in self.rows if row.name in keys]

    @property
    def server(self) -> Server | None:
        """The chat server under the cursor, while its table has the focus."""
        key = self.server_table.cursor_key if self.is_mounted and self.server_table.has_focus else None
        return next((server for server in self.servers if str(server.card.pid) == key), None)

    # actions

    def footer_text(self, action: Action) -> str:
        return "unload" if action.id == "home.stop" and self.server is not None else super().footer_text(action)

    def why_not(self, action_id: str) -> str | None:
        row, verb = self.chosen, action_id.rpartition(".")[2]
        if verb == "stop" and self.server is not None:
            return None
        if verb in ("resume", "stop", "chat", "copy", "mark") and row is None:
            return "no run is chosen"
        if verb == "resume" and row is not None:
            if row.alive:
                return f"{row.name} is running"
            return "its run.json cannot be read" if row.state == UNREADABLE else None
        if verb == "stop" and row is not None and not row.alive:
            return f"{row.name} is not running"
        if verb == "chat" and not self.lumina.has_screen(7):
            return "this version has no Chat"
        if verb == "compare" and len(self._compared()) < 2:
            return "mark two or more runs with Space first"
        return "there are no runs" if verb == "export" and not self.rows else None

    def action_new(self) -> None:
        self.lumina.open_presets()

    def action_resume(self) -> None:
        row = self.chosen
        assert row is not None
        self.lumina.spawn(self.lumina.resume_run(row.name))

    def action_stop(self) -> None:
        row, server = self.chosen, self.server
        if server is not None:
            name = server.card.name or server.card.checkpoint or "the loading checkpoint"
            choices = [Choice("x", "unload it; a reply that is being written ends", "unload")]
            self.lumina.ask(f"Unload {name}?", choices, lambda _: self._unload(server), ["Conversations are kept."])
            return
        assert row is not None
        choices = [Choice("s", "save a checkpoint, then stop", "save"), Choice("x", "stop without saving", "stop")]
        self.lumina.ask(f"Stop {row.name}?", choices, lambda how: self._stop(row, how == "save"), ["R resumes it later."])

    def _unload(self, server: Server) -> None:
        from lumina_engine.chat.card import unload

        gone = "is asked to leave" if unload(server.card) else "has left already"
        self.lumina.notice(f"the chat server of {server.card.name or server.card.checkpoint} {gone}")
        self.look_soon()

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

    def action_mark(self) -> None:
        row = self.chosen
        assert row is not None
        if row.name in self.marked:
            self.marked.remove(row.name)
        elif len(self.marked) == MOST_MARKS:
            self.lumina.notice(f"{MOST_MARKS} runs can be compared; Space takes a mark back", "warning")
        else:
            self.marked.append(row.name)
        self.show_rows()

    def _compared(self) -> list[RunInfo]:
        """The marked runs in the order of their marks; with a single mark, the chosen one too."""
        names = [*self.marked]
        if len(names) == 1 and self.chosen is not None and self.chosen.name not in names:
            names.append(self.chosen.name)
        by_name = {row.name: row for row in self.rows}
        return [by_name[name] for name in names if name in by_name]

    def action_compare(self) -> None:
        self.lumina.open_compare([row.path for row in self._compared()])

    def action_export(self) -> None:
        def export(kind: str) -> None:
            self.lumina.spawn(self._export(kind))

        self.lumina.ask("Export the list of runs as", [Choice("c", "CSV", "csv"), Choice("j", "JSON", "json")], export)

    async def _export(self, kind: str) -> None:
        """The rows that the filter shows, with the figures of all of them, as `lumina-engine runs list` gives them."""
        try:
            found = await asyncio.to_thread(listed, self.lumina.runs_root)
            rows = [row_dict(row) for row in ordered((row for row in found if matches(row, self.filter)), self.order)]
            self.lumina.save_export("runs", kind, as_csv(rows) if kind == "csv" else json.dumps(rows, indent=1))
        except OSError as error:
            self.lumina.notice(f"not written: {error}", "error")

    def action_copy(self) -> None:
        row = self.chosen
        assert row is not None
        self.lumina.copy_text(str(row.path))


def as_csv(rows: Iterable[dict[str, object]]) -> str:
    """Rows with one set of keys as CSV with a head line."""
    out, rows = io.StringIO(), list(rows)
    writer = csv.DictWriter(out, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
