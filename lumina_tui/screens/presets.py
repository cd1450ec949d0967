"""Presets: built-in presets and own files, what they need, and whether these devices have it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal

from lumina_engine.config.machine import Machine, count_text, gb_text, parse_devices

from .. import catalogue
from ..catalogue import SORTS, Entry, Verdict
from ..preview import command
from ..widgets.table import Column, Row, Table
from ..widgets.text_panel import TextPanel
from .base import LuminaScreen

_COLUMNS = (
    Column("name", "name", 8, grow=True, rank=0),
    Column("active", "active", 6, "right", rank=1),
    Column("total", "total", 6, "right", rank=1),
    Column("here", "here", 7, rank=1),
)
_WAITING = Verdict("...", "dim", False)


class PresetsScreen(LuminaScreen):
    """The list on the left, the chosen one in full on the right, the marked one beside it where there is room."""

    scope = "presets"
    number = 2
    heading = "Presets"
    DEFAULT_CSS = """
    PresetsScreen #list { width: 44; }
    PresetsScreen #detail { width: 1fr; }
    PresetsScreen #other { width: 52; display: none; }
    PresetsScreen.-compact #list { width: 37; }
    PresetsScreen.-wide #list { width: 52; }
    PresetsScreen.-wide #other { display: block; }
    """

    def __init__(self, *, select: str | None = None) -> None:
        super().__init__()
        self._select = select
        self.machine: Machine | None = None
        self.pretended: Machine | None = None
        self.presets: list[Entry] = []
        self.own: list[Entry] = []
        self.marked: list[str] = []
        self.words = ""  # of the filter
        self.sort = "size"
        self.verdicts: dict[str, Verdict] | None = None  # None until the devices are known

    def retarget(self, **arguments: Any) -> bool:
        self._select = arguments.get("select")
        if self.is_mounted and self._select:
            self.table.move_to(self._select)
        return True

    def content(self) -> ComposeResult:
        with Horizontal(classes="content"):
            yield Table(_COLUMNS, title="Presets", id="list")
            yield TextPanel(id="detail")
            yield TextPanel(id="other")

    def on_mount(self) -> None:
        self.presets = catalogue.preset_entries()
        self.sort = self.lumina.memory.get("presets.sort", "size")
        self._show()
        if self._select:
            self.table.move_to(self._select)
        self.table.focus()
        self.watch(self.app, "app_focus", self._on_app_focus, init=False)
        self._look()

    def on_screen_resume(self) -> None:
        if self.presets:
            self._look()

    def _on_app_focus(self, focused: bool) -> None:
        if focused and self.is_current:
            self._look()

    def _look(self) -> None:
        """Own files, this machine and the verdicts, in a thread."""
        self.run_worker(self._look_around(), group="look", exclusive=True, exit_on_error=False)

    async def _look_around(self) -> None:
        from lumina_engine.monitoring.hardware import detect

        def look() -> tuple[list[Entry], Machine, dict[str, Verdict]]:
            own, machine = catalogue.own_entries(), detect()
            return own, machine, catalogue.verdicts([*self.presets, *own], self.pretended or machine)

        self.own, self.machine, self.verdicts = await asyncio.to_thread(look)
        self._show()

    @property
    def table(self) -> Table:
        return self.query_one("#list", Table)

    @property
    def devices(self) -> Machine | None:
        """The machine that is planned for."""
        return self.pretended or self.machine

    @property
    def entries(self) -> list[Entry]:
        return [*self.presets, *self.own]

    @property
    def chosen(self) -> Entry | None:
        key = self.table.cursor_key
        return next((entry for entry in self.entries if entry.key == key), None)

    # showing

    def _show(self) -> None:
        machine = self.devices
        subject = "looking at this machine …" if machine is None else machine.label
        disk = gb_text(machine.disk_free_bytes) + " disk free" if machine and machine.disk_free_bytes is not None else ""
        self.set_frame(subject=f"{subject} (pretended)" if self.pretended else subject, badge=disk)
        rows, own = self._rows(self.presets), self._rows(self.own)
        if self.own or not self.words:
            rows.append(Row("own", (("yours" if self.own else "yours: W in the editor saves one", "dim"),), rule=True))
        self.table.set_rows([*rows, *own])
        shown = f"{len([*rows, *own]) - 1} of {len(self.entries)} with {self.words}" if self.words else "/ filter"
        self.table.set_title("Presets", shown)
        self._show_detail()

    def _rows(self, entries: Sequence[Entry]) -> list[Row]:
        found = catalogue.matching(entries, self.words)
        return [self._row(entry) for entry in catalogue.in_order(found, self.sort, self.verdicts or {})]

    def _row(self, entry: Entry) -> Row:
        mark = "*" if entry.key in self.marked else ""
        if entry.error:
            return Row(entry.key, ((f"! {mark}{entry.name}  {entry.error}", "bad"),))
        verdict = (self.verdicts or {}).get(entry.key, _WAITING)
        active, total = ("-" if n is None else count_text(n) for n in (entry.active, entry.total))
        name = (mark + entry.name, "accent" if mark else "text")
        return Row(entry.key, (name, (active, "text"), (total, "text"), (verdict.text, verdict.role)))

    def _show_detail(self) -> None:
        entry = self.chosen
        if entry is None:
            return
        detail, other = self.query_one("#detail", TextPanel), self.query_one("#other", TextPanel)
        detail.set_title(entry.name, "computed")
        state = [((str(entry.path), "dim"),)] if entry.path else []
        if entry.path and not entry.error:
            state.append((catalogue.state_of(entry),))
        detail.set_lines([*state, *catalogue.detail_lines(entry, self.devices)])
        with_ = self._other(entry)
        other.set_title(f"against {with_.name}" if with_ else "Differences")
        other.set_lines(catalogue.difference_lines(entry, with_) if with_ else [(("Space marks one to compare with", "dim"),)])

    def _other(self, entry: Entry) -> Entry | None:
        """What the chosen entry is compared with: the newest mark that is not itself."""
        return next((e for key in reversed(self.marked) for e in self.entries if e.key == key != entry.key), None)

    def on_table_moved(self) -> None:
        self._show_detail()
        self.refresh_keys()

    def on_table_chosen(self, event: Table.Chosen) -> None:
        entry = self.chosen
        if entry is not None:
            self.lumina.open_config(**({"path": entry.path} if entry.path else {"preset": entry.key}))

    # actions

    def why_not(self, action_id: str) -> str | None:
        entry = self.chosen
        if entry is None:
            return "nothing is chosen"
        if action_id == "presets.diff" and self._other(entry) is None:
            return "mark another one with Space first"
        if action_id in ("presets.start", "presets.command") and (entry.form is None or entry.error):
            return "it has errors: Enter opens it in the editor"
        return None

    def action_start(self) -> None:
        entry = self.chosen
        if entry is not None:
            self.lumina.open_launch(**({"path": entry.path} if entry.path else {"preset": entry.key}))

    def action_mark(self) -> None:
        key = self.table.cursor_key
        if key is None:
            return
        self.marked = [k for k in self.marked if k != key] if key in self.marked else [*self.marked[-1:], key]
        self._show()
        self.refresh_keys()

    def action_diff(self) -> None:
        from .sheets import lines_sheet

        entry = self.chosen
        other = self._other(entry) if entry else None
        if entry is not None and other is not None:
            heading = f"{entry.name} against {other.name}"
            self.lumina.push_screen(lines_sheet(heading, catalogue.difference_lines(entry, other)))

    def action_pretend(self) -> None:
        def take(text: str) -> None:
            if not text.strip():
                self.pretended = None
            elif self.machine is not None:
                devices = parse_devices(text)
                host = max(self.machine.host_memory_bytes, 2 * sum(d.memory_bytes for d in devices))
                self.pretended = replace(self.machine, devices=devices, host_memory_bytes=host, disk_free_bytes=None)
            self.verdicts = None
            self._show()
            self._look()

        lines = ["Plan for other devices: 8x80GB, 2xH100 80GB or cpu.", "Empty goes back to this machine."]
        self.lumina.prompt("Pretend hardware", take, lines=lines, check=_wrong_devices)

    def action_sort(self) -> None:
        self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)] if self.sort in SORTS else SORTS[0]
        self.lumina.memory.set("presets.sort", self.sort)
        self._show()
        self.lumina.notice({"size": "sorted by size", "name": "sorted by name", "fit": "what fits comes first"}[self.sort])

    def action_filter(self) -> None:
        def take(text: str) -> None:
            self.words = " ".join(text.split())
            self._show()

        self.lumina.prompt("Filter", take, value=self.words, lines=["Words of a name, a folder or a preset; empty shows all."])

    def action_command(self) -> None:
        entry = self.chosen
        if entry is not None and entry.form is not None:
            self.lumina.copy_text(command(entry.form.arguments()), "command.txt")

    def action_reload(self) -> None:
        self._look()


def _wrong_devices(text: str) -> str | None:
    if not text.strip():
        return None
    try:
        parse_devices(text)
    except ValueError as error:
        return str(error)
    return None
