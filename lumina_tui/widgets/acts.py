"""What a node needs so that actions of the registry can run on it."""

from __future__ import annotations

from inspect import isawaitable
from typing import Any

from ..actions import by_id


class Acts:
    """Mixin of app, screens and panels: runs `do('scope.name')` bindings and explains what cannot be done now."""

    scope = ""

    def why_not(self, action_id: str) -> str | None:
        """Why an action cannot run now, in one sentence for the user; None if it can."""
        return None

    async def action_do(self, action_id: str) -> None:
        """Run an action of the registry on this node, or say why not."""
        action = by_id()[action_id]
        reason = self.why_not(action_id)
        if reason is not None:
            node: Any = self
            node.app.notice(reason, "warning")
            return
        result = getattr(self, action.call)(*action.args)
        if isawaitable(result):
            await result
