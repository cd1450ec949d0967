"""Keys typed faster than the screen follows: each waits until the one before has had its whole effect.

A key that opens a field or a layer takes effect over several messages (the key climbs to the app, the layer is built, its
field gets the focus). Over a slow line the next keys are there already; without this they would reach whatever had the focus
before, where a digit changes the screen and a letter starts or stops something.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from textual import events
from textual.app import App

if TYPE_CHECKING:
    from textual.dom import DOMNode
    from textual.message_pump import MessagePump

PATIENCE = 0.3  # s at most that a key waits for one node: a busy node must not swallow the keyboard
ROUNDS = 2  # opening a layer hands the focus from the app to the layer and back


class TypeAhead(App[None], inherit_bindings=False):
    """An app whose key events take effect one after the other, in the order in which they were typed."""

    def __init__(self) -> None:
        super().__init__()
        self._typed: deque[events.Key] = deque()
        self._settling: asyncio.Task[None] | None = None

    async def on_event(self, event: events.Event) -> None:
        if not isinstance(event, events.Key) or event.is_forwarded:
            await super().on_event(event)
        elif self._settling is not None and not self._settling.done():
            self._typed.append(event)
        else:
            target = self.focused or self.screen
            await super().on_event(event)
            self._settling = asyncio.create_task(self._type(target), name="keys")

    async def _type(self, target: DOMNode) -> None:
        await self._settled(target)
        while self._typed and self.is_running:
            event, target = self._typed.popleft(), self.focused or self.screen
            await super().on_event(event)
            await self._settled(target)

    async def _settled(self, target: DOMNode) -> None:
        """Return when `target` and all above it, then the screen on top, have nothing of this key left to do."""
        for node in target.ancestors_with_self:
            await self._idle(node)
        for _ in range(ROUNDS):
            await self._idle(self.screen)
            if self.focused is not None:
                await self._idle(self.focused)
            await self._idle(self)

    @staticmethod
    async def _idle(node: MessagePump) -> None:
        reached = asyncio.Event()
        if node.call_later(reached.set):
            try:
                await asyncio.wait_for(reached.wait(), PATIENCE)
            except asyncio.TimeoutError:
                return
