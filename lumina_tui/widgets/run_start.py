"""The Monitor before the first step, and in a very small terminal."""

from __future__ import annotations

from collections.abc import Sequence

from textual.strip import Strip
from textual.widget import Widget

from ..feed import Feed, Mode
from ..paint import Piece, clean, duration, fit, line, whole
from .panel import Drawn
from .readings import value_text


class StartPanel(Drawn):
    """What happens before the first step: state, for how long, why."""

    STEPS = ("run directory", "supervisor", "ranks", "first step")

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(title="start", id=id)
        self.feed: Feed | None = None
        self._seen: tuple[object, ...] = ()

    def show(self, feed: Feed) -> None:
        """Speak about another run."""
        self.feed, self._seen = feed, ()
        self.sync()

    def sync(self) -> None:
        """Repaint once a second while something is awaited."""
        feed = self.feed
        if feed is None or not self.is_attached or not self.is_on_screen:
            return
        now = (feed.store.state_version, feed.alive, feed.mode, int(feed.clock()))
        if now != self._seen:
            self._seen = now
            self.repaint_changed()

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        feed = self.feed
        if feed is None:
            return ()
        store = feed.store
        if store.final or feed.mode is Mode.DEAD:
            return self._ended(y, feed)
        reached = 2 if store.state in ("compiling", "running", "paused") else 1 if feed.alive else 0
        if y < len(self.STEPS):
            done = y <= reached
            mark = "ok " if done else ".. " if y == reached + 1 else "   "
            style = self.palette.good if done else self.palette.accent if y == reached + 1 else self.palette.faint
            pieces: list[Piece] = [
                (f"  {mark}", style),
                (fit(self.STEPS[y], 16), self.palette.text if done else self.palette.dim),
            ]
            if y == reached + 1 and store.state:
                since = feed.clock() - store.state_since if store.state_since else 0.0
                pieces.append((f"{store.state} {duration(max(0.0, since))}", self.palette.accent))
                pieces.append((f"  {clean(store.reason)}" if store.reason else "", self.palette.dim))
            return pieces
        if y == len(self.STEPS) + 1:
            return [("  Charts appear with the first step; the log below shows what is being done.", self.palette.faint)]
        return ()

    def _ended(self, y: int, feed: Feed) -> Sequence[Piece]:
        store = feed.store
        state = store.state if store.final else "crashed"
        lines: list[Piece] = [
            (f"  {state} before the first step", self.palette.bad),
            (f"  {clean(store.reason or 'its supervisor was killed, or the machine went down')}", self.palette.text),
            ("  The log below says more. 1 Home: R resumes it, a starts a new run.", self.palette.dim),
        ]
        return [lines[y]] if y < len(lines) else ()


class Ticker(Widget):
    """Three lines for a very small terminal: state, step, loss and alerts."""

    DEFAULT_CSS = "Ticker { height: 3; }"

    def __init__(self) -> None:
        super().__init__()
        self.feed: Feed | None = None
        self._words: list[str] = []

    def show(self, feed: Feed) -> None:
        """Speak about another run."""
        self.feed = feed
        self.sync()

    def sync(self) -> None:
        """Repaint if the words have changed."""
        feed = self.feed
        if feed is None:
            return
        store = feed.store
        words = [
            f"{store.state or 'preparing'} {feed.badge().text}",
            f"{whole(store.step)} / {whole(store.total_steps)}  {duration(store.seconds_left())}",
            f"loss {value_text('loss', store.steps.last('loss'))}  !{len(store.alerts)}",
        ]
        if words != self._words:
            self._words = words
            self.refresh()

    def render_line(self, y: int) -> Strip:
        text = self._words[y] if y < len(self._words) else ""
        return line(self.size.width, [(clean(text), None)], base=self.rich_style)
