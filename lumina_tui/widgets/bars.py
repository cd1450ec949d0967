"""First and last line of every screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from textual.strip import Strip
from textual.widget import Widget

from ..actions import Action, of_scope
from ..paint import Piece, clean, fit, line

if TYPE_CHECKING:
    from ..screens.base import LuminaScreen

STATE_ROLES = {
    "running": "good",
    "finished": "good",
    "compiling": "accent",
    "preparing": "accent",
    "paused": "warn",
    "stopping": "warn",
    "preempted": "warn",
    "failed": "bad",
    "crashed": "bad",
}


LAST = 99  # this rank always has its place, at the right end


class TitleBar(Widget):
    """Number and name of the screen, subject, state word, feed badge, open alerts."""

    DEFAULT_CSS = "TitleBar { height: 1; dock: top; background: $bar; }"

    def render_line(self, y: int) -> Strip:
        screen: LuminaScreen = self.screen  # type: ignore[assignment]
        app: Any = self.app
        palette = app.look.palette
        width = self.size.width
        right: list[Piece] = []
        if screen.state_word:
            right += [
                (clean(screen.state_word).upper(), palette.of(STATE_ROLES.get(screen.state_word.lower(), "text"))),
                ("  ", None),
            ]
        if screen.badge:
            right += [(clean(screen.badge), palette.of(screen.badge_role)), ("  ", None)]
        if screen.alerts:
            right += [(f"!{screen.alerts}", palette.of("bad" if screen.critical else "warn")), ("  ", None)]
        elif app.open_alerts:
            right += [(f"!{app.open_alerts} on {app.keys.first('app.screen_5')}", palette.bad), ("  ", None)]
        if right:
            right[-1] = (" ", None)
        taken = sum(cell_len(text) for text, _ in right)
        head = f" {screen.number} {screen.heading}" if screen.number else f" {screen.heading}"
        left: list[Piece] = [(" lumina ", palette.accent), (head, palette.title)]
        room = width - taken - sum(cell_len(text) for text, _ in left) - 3
        if screen.subject and room > 2:
            subject = clean(screen.subject)
            left += [("  ", None), (fit(subject, min(room, cell_len(subject))), palette.text)]
        if taken > width - 12:  # narrow: the state is worth more than the program's name
            return line(width, right[:1], base=self.rich_style)
        return line(width, left, right, base=self.rich_style)


class KeyBar(Widget):
    """The most useful keys here, six at most, `? help` last."""

    DEFAULT_CSS = "KeyBar { height: 1; dock: bottom; background: $bar; }"

    def __init__(self) -> None:
        super().__init__()
        self._shown: list[tuple[str, str]] = []

    def actions_here(self) -> list[Action]:
        """Footer actions of the focused panel, the screen and the app, best first, without those that cannot run now."""
        screen: LuminaScreen = self.screen  # type: ignore[assignment]
        nodes: list[Any] = [node for node in (screen.focused, screen, screen.lumina) if node is not None]
        found: dict[str, Action] = {}
        for node in nodes:
            scope = getattr(node, "scope", "")
            for action in of_scope(scope) if scope else ():
                if action.footer and node.refusal(action.id) is None:
                    found.setdefault(action.id, action)
        ranked = sorted(found.values(), key=lambda action: action.footer)
        return [*[action for action in ranked if action.footer < LAST][:5], *(a for a in ranked if a.footer >= LAST)]

    def sync(self) -> None:
        """Repaint if there are other keys than on the screen."""
        if self._items() != self._shown:
            self.refresh()

    def _items(self) -> list[tuple[str, str]]:
        app: Any = self.app
        screen: LuminaScreen = self.screen  # type: ignore[assignment]
        return [(app.keys.first(action.id), screen.footer_text(action)) for action in self.actions_here()]

    def render_line(self, y: int) -> Strip:
        app: Any = self.app
        palette = app.look.palette
        width = self.size.width
        items = self._items()
        self._shown = list(items)
        while len(items) > 1 and sum(len(key) + len(text) + 3 for key, text in items) > width + 1:
            del items[-2]
        pieces: list[Piece] = [(" ", None)]
        for index, (key, text) in enumerate(items):
            pieces += [("  " if index else "", None), (key, palette.key), (" " + text, palette.dim)]
        return line(width, pieces, base=self.rich_style)
