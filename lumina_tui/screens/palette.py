"""The palette: any action, screen or run by name. What cannot be done now is listed with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textual.containers import Vertical
from textual.widgets import Input

from ..actions import key_text, of_scope
from ..paint import clean
from ..widgets.table import Column, Row, Table
from .layer import Layer

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from .base import LuminaScreen


@dataclass(frozen=True)
class Entry:
    """One thing that can be chosen; `reason` says why it cannot be now."""

    key: str
    title: str
    keys: str
    help: str
    run: Callable[[], Any]
    reason: str | None = None
    danger: bool = False


def entries(screen: LuminaScreen) -> list[Entry]:
    """Actions of the screen, the focused panel and the app."""
    app = screen.lumina
    nodes: list[Any] = [node for node in (screen, screen.focused, app) if node is not None]
    found: dict[str, Entry] = {}
    for node in nodes:
        scope = getattr(node, "scope", "")
        for action in of_scope(scope) if scope else ():
            if action.id == "app.palette" or (action.method == "screen" and not app.has_screen(int(str(action.args[0])))):
                continue
            keys = " ".join(key_text(key) for key in action.keys)

            def run(node: Any = node, identity: str = action.id) -> Any:
                return node.action_do(identity)

            entry = Entry(action.id, action.title, keys, action.help, run, node.refusal(action.id), action.danger)
            found.setdefault(action.id, entry)
    return list(found.values())


def matching(all_entries: list[Entry], text: str) -> list[Entry]:
    """The entries with every word of `text`; those whose title begins with it first."""
    words = text.lower().split()
    rows = [e for e in all_entries if all(word in f"{e.title} {e.help} {e.keys}".lower() for word in words)]
    if not words:
        return rows
    return sorted(rows, key=lambda e: (not e.title.lower().startswith(text.lower().strip()), e.reason is not None))


class Palette(Layer[None]):
    """A field and the list of what matches it. Enter runs the chosen row."""

    scope = "palette"
    DEFAULT_CSS = """
    Palette { align: center top; background: $background 60%; }
    Palette > Vertical { width: 90%; max-width: 100; height: 80%; max-height: 24; margin: 1 0; background: $surface; }
    Palette Input { border: none; height: 1; background: $bar; padding: 0 1; }
    Palette Table { height: 1fr; }
    """

    def __init__(self, below: LuminaScreen) -> None:
        super().__init__()
        self.below = below
        self.all = entries(below)

    def compose(self) -> ComposeResult:
        columns = (Column("title", "", 26), Column("keys", "", 12), Column("help", "", 10, grow=True))
        with Vertical():
            yield Input(placeholder="an action, a screen, a run", compact=True)
            table = Table(columns, title="palette", header=False)
            table.can_focus = False
            yield table

    async def on_mount(self) -> None:
        self._show("")
        app = self.below.lumina
        for name in await app.run_names():

            def run(name: str = name) -> None:
                app.open_monitor(name)

            self.all.append(Entry(f"run:{name}", f"run {clean(name)}", "", "watch it in the Monitor", run))
        self._show(self.query_one(Input).value)

    def _show(self, text: str) -> None:
        table = self.query_one(Table)
        rows = []
        for entry in matching(self.all, text):
            role = "dim" if entry.reason else "bad" if entry.danger else "text"
            help_ = f"not now: {entry.reason}" if entry.reason else entry.help
            keys = (entry.keys, "dim" if entry.reason else "key")
            rows.append(Row(entry.key, ((entry.title, role), keys, (help_, "dim"))))
        table.set_rows(rows)
        table.set_foot("Enter runs it  Esc back", f"{len(rows)}")

    def on_input_changed(self, event: Input.Changed) -> None:
        self._show(event.value)

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        await self._run()

    async def on_table_chosen(self, event: Table.Chosen) -> None:
        await self._run()

    async def _run(self) -> None:
        key = self.query_one(Table).cursor_key
        entry = next((item for item in self.all if item.key == key), None)
        if entry is None:
            return
        self.dismiss(None)
        self.below.lumina.call_later(entry.run)

    @property
    def table(self) -> Table:
        return self.query_one(Table)

    def action_down(self) -> None:
        self.table.action_down()

    def action_up(self) -> None:
        self.table.action_up()

    def action_page_down(self) -> None:
        self.table.action_page_down()

    def action_page_up(self) -> None:
        self.table.action_page_up()
