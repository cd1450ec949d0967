"""Presets: built-in presets and own files, what they need, and whether these devices have it."""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import replace
from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal

from lumina_engine.config.machine import Machine, parse_devices

from .. import catalogue
from ..catalogue import Entry
from ..launching import train_argv
from ..widgets.table import Column, Row, Table
from ..widgets.text_panel import TextPanel
from .base import LuminaScreen

_COLUMNS = (
    Column("name", "name", 8, grow=True, rank=0),
    Column("active", "active", 6, "right", rank=1),
    Column("total", "total", 6, "right", rank=1),
    Column("here", "here", 7, rank=1),
)


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
        self._verdicts: dict[tuple[str, str], tuple[str, str]] = {}
        self._by_name = False

    def retarget(self, **arguments: Any) -> bool:
        self._select = arguments.get("select")
        if self.is_mounted and self._select:
            self.table.move_to(self._select)
        return True

    def content(self) -> ComposeResult:
        with Horizontal(classes="content"):
            yield Table(_COLUMNS, title="Presets", id="list")
            yield TextPanel(id="detail", focusable=False)
            yield TextPanel(id="other", focusable=False)

    def on_mount(self) -> None:
        self.presets = catalogue.preset_entries()
        self._show()
        if self._select:
            self.table.move_to(self._select)
        self.table.focus()
        self._look()

    def on_screen_resume(self) -> None:
        if self.presets:
            self._look()

    def _look(self) -> None:
        self.run_worker(self._look_around(), group="look", exclusive=True, exit_on_error=False)

    async def _look_around(self) -> None:
        """Own files and this machine, in a thread."""
        from lumina_engine.monitoring.hardware import detect

        def both() -> tuple[list[Entry], Machine]:
            return catalogue.own_entries(), detect()

        self.own, self.machine = await asyncio.to_thread(both)
        self._verdicts.clear()
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
        self.set_frame(subject=f"{subject} (pretended)" if self.pretended else subject)
        order = sorted(self.presets, key=lambda e: e.name) if self._by_name else self.presets
        rows = [self._row(entry) for entry in order]
        if self.own:
            rows += [Row("own", (("yours", "dim"),), rule=True), *(self._row(entry) for entry in self.own)]
        self.table.set_rows(rows)
        self.table.set_foot("" if self.own else "w in the editor saves yours")
        self._show_detail()

    def _row(self, entry: Entry) -> Row:
        mark = "*" if entry.key in self.marked else ""
        name = (mark + entry.name, "accent" if mark else "text")
        config = entry.config
        if config is None or entry.error:
            return Row(entry.key, (name, ("-", "dim"), ("-", "dim"), ("error", "bad")))
        active, total = catalogue.parameters_of(config)
        return Row(entry.key, (name, (active, "text"), (total, "text"), self._verdict(entry)))

    def _verdict(self, entry: Entry) -> tuple[str, str]:
        machine, config = self.devices, entry.config
        if machine is None or config is None:
            return "...", "dim"
        key = (entry.key, machine.label)
        if key not in self._verdicts:
            self._verdicts[key] = catalogue.verdict(config, machine)
        return self._verdicts[key]

    def _show_detail(self) -> None:
        entry = self.chosen
        if entry is None:
            return
        detail, other = self.query_one("#detail", TextPanel), self.query_one("#other", TextPanel)
        detail.set_title(entry.name, "computed")
        state = [(catalogue.state_of(entry),)] if entry.path and not entry.error else []
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
            self._show()

        lines = ["Plan for other devices: 8x80GB, 2xH100 80GB or cpu.", "Empty goes back to this machine."]
        self.lumina.prompt("Pretend hardware", take, lines=lines, check=_wrong_devices)

    def action_sort(self) -> None:
        self._by_name = not self._by_name
        self._show()
        self.lumina.notice("sorted by name" if self._by_name else "sorted by size")

    def action_command(self) -> None:
        entry = self.chosen
        if entry is not None and entry.form is not None:
            self.lumina.copy_text(shlex.join(train_argv(entry.form.arguments())[:-2]), "command.txt")

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
