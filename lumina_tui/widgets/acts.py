"""What a node needs so that actions of the registry can run on it."""

from __future__ import annotations

from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from ..actions import by_id

if TYPE_CHECKING:
    from ..application import LuminaApp


class Acts:
    """Mixin of app, screens and panels: runs `do('scope.name')` bindings and explains what cannot be done now."""

    scope = ""

    @property
    def lumina(self) -> LuminaApp:
        """The application with its own type."""
        node: Any = self
        app: LuminaApp = node.app
        return app

    def why_not(self, action_id: str) -> str | None:
        """Why an action cannot run now, in one sentence for the user; None if it can."""
        return None

    async def action_do(self, action_id: str) -> None:
        """Run an action of the registry on this node, or say why not."""
        action = by_id()[action_id]
        reason = self.why_not(action_id)
        if reason is not None:
            self.lumina.notice(reason, "warning")
            return
        result = getattr(self, action.call)(*action.args)
        if isawaitable(result):
            await result
