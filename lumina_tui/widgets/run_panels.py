"""Two lines of the Monitor: how far the run is, and what happened last."""

from __future__ import annotations

import time
from typing import Any

from textual.strip import Strip
from textual.widget import Widget

from ..facts import Words, rank_warning
from ..feed import Feed, Mode
from ..paint import Piece, clean, count, duration, line, size, whole
from ..runs import held_out_score
from .alert_table import message_of
from .readings import value_text


class ProgressLine(Widget):
    """Step of total, a bar, tokens, time left."""

    DEFAULT_CSS = "ProgressLine { height: 1; }"

    def __init__(self) -> None:
        super().__init__()
        self.feed: Feed | None = None
        self._seen: tuple[object, ...] = ()
        self._text: tuple[str, float, str] = ("", 0.0, "")

    def show(self, feed: Feed) -> None:
        """Speak about another run."""
        self.feed, self._seen = feed, ()
        self.sync()

    def sync(self) -> None:
        """Repaint if the words have changed."""
        feed = self.feed
        if feed is None:
            return
        now = (feed.store.version, feed.mode, self.size.width, id(feed))
        if now == self._seen:
            return
        self._seen = now
        before, self._text = self._text, self._words(feed)
        if before != self._text:
            self.refresh()

    @staticmethod
    def _words(feed: Feed) -> tuple[str, float, str]:
        store = feed.store
        step, total = store.step, store.total_steps
        if step is None:
            return (f"step - of {whole(total)}" if total else ""), 0.0, ""
        head = f"step {whole(step)}" + (f" of {whole(total)}" if total else "")
        tail = [f"{count(store.tokens)} tokens"]
        if store.epoch:
            tail.append(f"epoch {store.epoch}")
        if store.final or feed.mode is Mode.DEAD:
            tail.append(f"{duration(float(store.steps.hours.values[-1]) * 3600)} of training")
        else:
            left = store.seconds_left()
            tail.append(f"{duration(left)} left" if left is not None else f"{duration(store.seconds_per_step())} a step")
        return head, step / total if total else 0.0, "  ".join(tail)

    def render_line(self, y: int) -> Strip:
        palette = self.app.look.palette  # type: ignore[attr-defined]
        head, share, tail = self._text
        width = self.size.width
        percent = f"{100 * share:.0f} %" if share else ""
        room = min(40, width - len(head) - len(percent) - len(tail) - 8)
        pieces: list[Piece] = [(f" {head} ", palette.text)]
        if share and room >= 5:
            done = min(room, round(share * room))
            pieces += [("█" * done, palette.accent), ("░" * (room - done), palette.faint), (f" {percent}", palette.text)]
        elif percent:
            pieces.append((percent, palette.text))
        pieces.append((f"  {tail}", palette.dim))
        return line(width, pieces, base=self.rich_style)


class StatusLine(Widget):
    """One line: the newest command while it is open or just answered, else the newest alert, else the newest checkpoint."""

    DEFAULT_CSS = "StatusLine { height: 1; }"
    SHOW_S = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.feed: Feed | None = None
        self._words: Words = []
        self._answered: dict[str, float] = {}
        self._score: float | None = None  # of the finished run; -1: it has no report

    def show(self, feed: Feed) -> None:
        """Speak about another run."""
        self.feed = feed
        self._answered, self._score = {}, None
        self.sync()

    def sync(self) -> None:
        """Repaint if there is something else to say."""
        words = self._now()
        if words != self._words:
            self._words = words
            self.refresh()

    def _now(self) -> Words:
        feed = self.feed
        if feed is None:
            return []
        for request in reversed(feed.requests):
            ended = self._answered.setdefault(request.id, time.monotonic()) if not request.open else time.monotonic()
            if time.monotonic() - ended < self.SHOW_S:
                role = {"refused": "bad", "applied": "good"}.get(request.phase.value, "accent")
                return [(request.line(feed.clock()), role)]
        if feed.error:
            return [(feed.error, "bad")]
        late = rank_warning(feed.ranks)
        if late:
            return [(late, "bad" if " ended " in late else "warn")]
        if feed.reader.errors:
            many = len(feed.reader.errors)
            where = f"{many} unreadable places in the log, the last" if many > 1 else "an unreadable place in the log"
            start, stop = feed.reader.errors[-1]
            return [(f"{where} at byte {start:,} to {stop:,}; the rest is drawn", "warn")]
        store = feed.store
        if store.state == "finished" and store.step is not None:
            return [(self._finished(feed), "good")]
        if store.final:
            return [(f"{store.state}: {store.reason or 'no reason given'}", "bad")]
        if store.alerts:
            alert = store.alerts[-1]
            clock = time.strftime("%H:%M", time.localtime(alert.t))
            at = f" {whole(alert.step)}" if alert.step is not None else ""
            role = {"info": "accent", "warning": "warn"}.get(alert.severity, "bad")
            message = message_of(alert)
            advice = f" {alert.recommendation}" if alert.recommendation else ""
            return [
                (f"{clock} ! {alert.severity} {alert.code}{at}: ", role),
                (message + "." * (message[-1:] != ".") + advice, "text"),
            ]
        if store.checkpoints:
            newest = store.checkpoints[-1]
            best = next((item for item in reversed(store.checkpoints) if item.best), None)
            text = f"checkpoint at {whole(newest.step)}"
            text += f", {size(newest.bytes)}" if newest.bytes else ""
            text += f", best at {whole(best.step)}" if best else ""
            return [(text, "dim")]
        return [(store.reason or "", "dim")]

    def _finished(self, feed: Feed) -> str:
        store = feed.store
        text = f"finished at step {whole(store.step)}, loss {value_text('loss', store.steps.last('loss'))}"
        if self._score is None:
            self._score = held_out_score(feed.run.path) or -1.0
        if self._score >= 0:
            text += f", held-out questions right: {100 * self._score:.0f} %"
        best = next((item for item in reversed(store.checkpoints) if item.best), None)
        return text + (f", best checkpoint at {whole(best.step)}" if best else "") + (". T chats." if store.checkpoints else "")

    def render_line(self, y: int) -> Strip:
        palette: Any = self.app.look.palette  # type: ignore[attr-defined]
        return line(
            self.size.width,
            [(" ", None), *((clean(text), palette.of(role)) for text, role in self._words)],
            base=self.rich_style,
        )
