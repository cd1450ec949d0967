"""What the command palette finds: actions of the registry (with the reason when one cannot run), screens, runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.content import Content

from .actions import Action, key_text, of_scope
from .paint import clean

if TYPE_CHECKING:
    from .application import LuminaApp


class ActionProvider(Provider):
    """Actions of the focused panel, the screen and the app."""

    def _rows(self) -> Iterator[tuple[str, str, Any, Action]]:
        app: Any = self.app
        for node in (self.focused, self.screen, app):
            scope = getattr(node, "scope", "")
            for action in of_scope(scope) if scope else ():
                if action.id in ("app.palette",) or (
                    action.method == "screen" and not app.has_screen(int(str(action.args[0])))
                ):
                    continue
                reason = node.why_not(action.id)  # type: ignore[union-attr]
                keys = " ".join(key_text(key) for key in action.keys)
                help_ = f"not now: {clean(reason)}" if reason else action.help
                yield f"{action.title}  [{keys}]" if keys else action.title, help_, node, action

    async def discover(self) -> Hits:
        for text, help_, node, action in self._rows():
            yield DiscoveryHit(Content(text), partial(self._run, node, action.id), text=text, help=help_)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for text, help_, node, action in self._rows():
            score = matcher.match(f"{text} {action.help}")
            if score > 0:
                yield Hit(score, Content(text), partial(self._run, node, action.id), text=text, help=help_)

    async def _run(self, node: Any, action_id: str) -> None:
        await node.action_do(action_id)


class RunProvider(Provider):
    """Runs below the root, by name."""

    async def startup(self) -> None:
        app: LuminaApp = self.app  # type: ignore[assignment]
        self._names = await app.run_names()

    async def search(self, query: str) -> Hits:
        app: LuminaApp = self.app  # type: ignore[assignment]
        matcher = self.matcher(query)
        for name in self._names:
            shown = clean(name)
            score = matcher.match(shown)
            if score > 0:
                yield Hit(score, Content(f"run {shown}"), partial(app.open_monitor, name), text=f"run {shown}", help="Monitor")
