"""What a node needs so that actions of the registry can run on it."""

from __future__ import annotations

from collections.abc import Sequence
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

    def refusal(self, action_id: str) -> str | None:
        """Why an action is not run now: `--readonly`, or what `why_not` says; None if it is."""
        action = by_id()[action_id]
        if action.changes and self.lumina.readonly:
            return f"--readonly: {action.title.lower()} is refused, nothing is changed or written"
        return self.why_not(action_id)

    async def action_do(self, action_id: str) -> None:
        """Run an action of the registry on this node, or say why not."""
        action = by_id()[action_id]
        reason = self.refusal(action_id)
        if reason is not None:
            self.lumina.notice(reason, "warning")
            return
        result = getattr(self, action.call)(*action.args)
        if isawaitable(result):
            await result


class Finds(Acts):
    """Mixin of a panel in which one can search: `n` and `N` go through the matches of the last search or filter.

    The panel declares `*finding("<scope>")` in its block of the registry and says what there is to search; its `/`, or that of
    its screen, calls `find(text)`.
    """

    needle = ""

    if TYPE_CHECKING:  # what the panel itself has

        def find_lines(self) -> Sequence[str]:
            """The texts to search, one for each place that can be gone to."""

        def find_at(self) -> int:
            """The place where one is now."""

        def find_show(self, index: int) -> None:
            """Go to a place."""

    def find(self, text: str) -> None:
        """Search for lines with all words of `text`, from here on; nothing changes if there is none."""
        self.needle = " ".join(text.split())
        if self.needle:
            self._find(0)

    def action_next_match(self) -> None:
        self._find(1)

    def action_previous_match(self) -> None:
        self._find(-1)

    def _find(self, step: int) -> None:
        if not self.needle:
            self.lumina.notice("nothing was searched for yet: / does", "warning")
            return
        index = next_match(self.find_lines(), self.needle, self.find_at(), step)
        if index is None:
            self.lumina.notice(f"no match for {self.needle}", "warning")
        else:
            self.find_show(index)


def next_match(lines: Sequence[str], words: str, at: int, step: int) -> int | None:
    """Index of the line with all `words` (any case): the first one from `at` on with step 0, else the next one in direction
    `step` (1 or -1), around the end. None if no line has them."""
    wanted, count = words.casefold().split(), len(lines)
    for k in range(count):
        index = (at + k) % count if step == 0 else (at + step * (k + 1)) % count
        text = lines[index].casefold()
        if all(word in text for word in wanted):
            return index
    return None
