"""The palette: any action, run, checkpoint, configuration, field, theme or help page by name.

What cannot be done now is listed with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.containers import Vertical
from textual.widgets import Input

from ..actions import ACTIONS, PANELS, SCREENS, of_scope
from ..finder import Entry, gather, search
from ..helping import PAGES
from ..places import config_dir
from ..themes import SKINS, why_not
from ..widgets.acts import Acts
from ..widgets.table import Column, Row, Table
from .layer import Layer

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from .base import LuminaScreen

COLUMNS = (Column("title", "", 28), Column("keys", "", 11, rank=1), Column("help", "", 10, grow=True, rank=2))
FOLDERS = (Path("configs"),)


def nodes_of(screen: LuminaScreen) -> dict[str, Any]:
    """The nodes whose actions can be run here, by scope: the focused panel, the screen, its other panels, the app."""
    panels = [node for node in screen.query("*") if isinstance(node, Acts) and node.display]
    found: dict[str, Any] = {}
    for node in (screen.focused, screen, *panels, screen.lumina):
        scope = getattr(node, "scope", "")
        if scope:
            found.setdefault(scope, node)
    return found


def action_entries(screen: LuminaScreen, nodes: dict[str, Any]) -> Iterator[Entry]:
    """The actions that can be run here, then those of the other screens."""
    app = screen.lumina
    for scope, node in nodes.items():
        for action in of_scope(scope):
            if action.id == "app.palette" or (action.method == "screen" and not app.has_screen(int(str(action.args[0])))):
                continue
            reason = node.refusal(action.id) or ""
            yield Entry("action", action.id, action.title, action.help, app.keys.text(action), reason, action.danger)
    titles = {title.lower(): (number, title) for number, title, _ in SCREENS if app.has_screen(number)}
    here = {scope for names in PANELS.values() for scope in names} | set(nodes)
    for action in ACTIONS:
        if action.scope in titles and action.scope not in here:
            number, title = titles[action.scope]
            reason = f"on screen {number}, {title}; Enter goes there"
            yield Entry("action", action.id, action.title, action.help, app.keys.text(action), reason, action.danger)


def own_entries(screen: LuminaScreen) -> Iterator[Entry]:
    """Themes and pages of help."""
    app = screen.lumina
    for skin in SKINS.values():
        now = " (now)" if skin is app.skin else ""
        yield Entry("theme", skin.name, f"theme {skin.name}{now}", skin.title, "", why_not(skin, app.look.colours) or "")
    for name, (title, _) in PAGES.items():
        yield Entry("help", name, f"help: {title}", "read it")


class Palette(Layer[None]):
    """A field and the list of what matches it. Enter runs the chosen row."""

    scope = "palette"
    DEFAULT_CSS = """
    Palette { align: center top; }
    Palette > Vertical { width: 96%; max-width: 120; height: 90%; max-height: 32; margin: 1 0; background: $surface; }
    Palette Input { border: none; height: 1; background: $bar; padding: 0 1; }
    Palette Table { height: 1fr; }
    """

    def __init__(self, below: LuminaScreen) -> None:
        super().__init__()
        self.below = below
        self.nodes = nodes_of(below)
        self.all = [*action_entries(below, self.nodes), *own_entries(below)]
        self.complete = False

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Input(placeholder="an action, run, checkpoint, configuration, field, theme, help", compact=True)
            table = Table(COLUMNS, title="palette", header=False)
            table.can_focus = False
            yield table

    async def on_mount(self) -> None:
        self._show("")
        self.below.lumina.spawn(self._gather())

    async def _gather(self) -> None:
        """The rest, read in a thread: it appears when it is there."""
        folders = (*FOLDERS, config_dir() / "presets")
        self.all += await asyncio.to_thread(gather, self.below.lumina.runs_root, folders)
        self.complete = True
        if self.is_attached:
            self._show(self.query_one(Input).value)

    @property
    def table(self) -> Table:
        return self.query_one(Table)

    def _show(self, text: str) -> None:
        entries, count = search(self.all, text)
        rows = []
        for item in entries:
            role = "dim" if item.reason else "bad" if item.danger else "text"
            help_ = f"not now: {item.reason}" if item.reason else item.help
            rows.append(Row(item.key, ((item.title, role), (item.keys, "dim" if item.reason else "key"), (help_, "dim"))))
        self.table.set_rows(rows)
        self.table.action_top()
        more = "" if self.complete else ", reading runs and fields …"
        self.table.set_title("palette", f"{count:,} found{more}")
        self.table.set_foot("Enter runs it  Esc back")

    def on_input_changed(self, event: Input.Changed) -> None:
        self._show(event.value)

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        self._run()

    async def on_table_chosen(self, event: Table.Chosen) -> None:
        self._run()

    def _run(self) -> None:
        chosen = next((item for item in self.all if item.key == self.table.cursor_key), None)
        if chosen is not None:
            self.dismiss(None)
            self.below.lumina.call_later(self._open, chosen)

    async def _open(self, chosen: Entry) -> None:
        """Do what an entry stands for."""
        app, target = self.below.lumina, chosen.target
        if chosen.kind == "action":
            scope = target.rpartition(".")[0]
            if scope in self.nodes:
                await self.nodes[scope].action_do(target)
            else:
                app.open_screen(next(number for number, title, _ in SCREENS if title.lower() == scope))
        elif chosen.reason:
            app.notice(chosen.reason, "warning")
        elif chosen.kind == "run":
            app.open_monitor(target)
        elif chosen.kind == "checkpoint":
            app.open_chat(target)
        elif chosen.kind == "preset":
            app.open_config(preset=target)
        elif chosen.kind == "config":
            app.open_config(path=Path(target))
        elif chosen.kind == "field":
            app.open_field(target)
        elif chosen.kind == "theme":
            app.choose_theme(target)
        else:
            app.open_help(target)

    def action_down(self) -> None:
        self.table.action_down()

    def action_up(self) -> None:
        self.table.action_up()

    def action_page_down(self) -> None:
        self.table.action_page_down()

    def action_page_up(self) -> None:
        self.table.action_page_up()
