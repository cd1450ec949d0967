"""Small panels of the Monitor: progress, newest values with sparklines, devices and host, what happened last."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from textual.strip import Strip
from textual.widget import Widget

from lumina_engine.monitoring.record import Device, Hardware

from ..feed import Feed, Mode
from ..history import METRICS
from ..paint import Piece, clean, count, duration, fit, line, size, whole
from ..runs import held_out_score
from ..series import RunStore
from .panel import Drawn
from .readings import value_text
from .sparkline import spark, spark_values

RECENT = 600  # steps in a sparkline


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


class TrendPanel(Drawn):
    """Newest values of the main series with sparklines; beside them devices and host, if there is room."""

    METRICS = ("tokens_per_s", "grad_norm", "lr", "step_time")

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(title="trend", id=id)
        self.store = RunStore()
        self._seen: tuple[object, ...] = ()

    def show(self, store: RunStore) -> None:
        """Show another run."""
        self.store, self._seen = store, ()
        self.sync()

    def sync(self) -> None:
        """Repaint the lines if there are new values."""
        now = (self.store.steps.version, self.store.hardware_version, id(self.store))
        if now != self._seen and self.is_attached:
            self._seen = now
            self.repaint_changed()

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        left = width if self.store.hardware is None else max(30, min(width - 40, width // 2)) if width >= 70 else width
        pieces: list[Piece] = []
        if y < min(height, len(self.METRICS)):
            pieces += self._metric(self.METRICS[y], left)
        else:
            pieces.append((" " * left, None))
        if left < width:
            lines = hardware_lines(self.store, width - left - 2, self.look.ascii, height)
            if y < len(lines):
                pieces += [("  ", None), *((text, self.palette.of(role)) for text, role in lines[y])]
        return pieces

    def _metric(self, name: str, width: int) -> list[Piece]:
        metric = METRICS[name]
        history = self.store.steps
        value = value_text(name, history.last(name))
        if name == "step_time" and history.last(name) is not None:
            value = duration(history.last(name))
        label = f" {fit(metric.label if name != 'lr' else 'lr', 10)} {fit(value, 9, 'right')} "
        text = spark(history.metrics[name], width - len(label), metric.keep, self.look.ascii, RECENT)
        return [(label[:12], self.palette.dim), (label[12:], self.palette.text), (text, self.palette.curve)]


class HardwarePanel(Drawn):
    """Devices and host."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(title="devices", id=id)
        self.store = RunStore()
        self._seen: tuple[object, ...] = ()

    def show(self, store: RunStore) -> None:
        """Show another run."""
        self.store, self._seen = store, ()
        self.sync()

    def sync(self) -> None:
        """Repaint if there are new figures."""
        now = (self.store.hardware_version, id(self.store))
        if now != self._seen and self.is_attached:
            self._seen = now
            self.repaint_changed()

    def draw(self, y: int, width: int, height: int) -> Sequence[Piece]:
        lines = hardware_lines(self.store, width - 2, self.look.ascii, height, sparks=True)
        if self.store.hardware is None:
            return [(" no figures yet", self.palette.dim)] if y == 0 else ()
        return [(" ", None), *((text, self.palette.of(role)) for text, role in lines[y])] if y < len(lines) else ()


Words = list[tuple[str, str]]  # text, role


def hardware_lines(store: RunStore, width: int, ascii_only: bool, height: int, sparks: bool = False) -> list[Words]:
    """One line a device, then the host; the busiest devices are left out last when there are too many."""
    now = store.hardware
    if now is None:
        return []
    host = _host(now, width)
    room = max(0, height - len(host))
    devices = now.devices if len(now.devices) <= room else now.devices[: max(0, room - 1)]
    lines = [_device(device, store, width, ascii_only, sparks) for device in devices]
    if len(devices) < len(now.devices):
        lines.append([(f"and {len(now.devices) - len(devices)} more devices", "dim")])
    if sparks and not now.devices and "cpu" in store.usage:
        room = max(0, min(60, width - 5))
        lines.append([("cpu  ", "dim"), (spark_values(store.usage["cpu"], room, ascii_only, 0, 100), "curve")])
        if "memory" in store.usage:
            lines.append([("mem  ", "dim"), (spark_values(store.usage["memory"], room, ascii_only, 0, 100), "raw")])
    return [*host, *lines] if not now.devices else [*lines, *host]


def _known(value: float | None, text: str) -> str:
    return text.format(value) if value is not None and math.isfinite(value) else "-"


def _device(device: Device, store: RunStore, width: int, ascii_only: bool, sparks: bool) -> Words:
    used = "-"
    if device.memory_used is not None and device.memory_total:
        used = f"{device.memory_used / 1e9:.0f} of {device.memory_total / 1e9:.0f} GB"
    hot = device.temperature is not None and device.temperature >= 85
    words: Words = [
        (f"gpu{device.index} ", "dim"),
        (fit(_known(device.utilisation, "{:.0f} %"), 6, "right") + "  ", "text"),
        (fit(used, 12) + "  ", "text"),
        (fit(_known(device.power, "{:.0f} W"), 6, "right") + " ", "text"),
        (fit(_known(device.temperature, "{:.0f} C"), 5, "right"), "bad" if hot else "text"),
    ]
    if device.link_rx is not None or device.link_tx is not None:
        words.append((f"  link {size(device.link_rx)}/s in {size(device.link_tx)}/s out", "dim"))
    rest = width - sum(len(text) for text, _ in words) - 2
    if sparks and rest >= 8:
        usage = store.usage.get(f"gpu{device.index}", ())
        words.append(("  " + spark_values(usage, min(40, rest), ascii_only, 0, 100), "curve"))
    return words


def _host(now: Hardware, width: int) -> list[Words]:
    memory = "-"
    if now.memory_used is not None and now.memory_total:
        memory = f"{now.memory_used / 1e9:.1f} of {now.memory_total / 1e9:.0f} GB"
    cores = f" of {now.cpu_count} cores" if now.cpu_count else ""
    parts: list[tuple[str, str]] = [
        ("cpu", _known(now.cpu, "{:.0f} %") + cores),
        ("mem", memory),
        ("run", size(now.rss) if now.rss is not None else ""),
        ("disk", f"{size(now.disk_free)} free" if now.disk_free is not None else ""),
    ]
    lines: list[Words] = [[]]
    used = 0
    for label, text in parts:
        if not text:
            continue
        length = len(label) + len(text) + 3
        if used and used + length > width:
            lines.append([])
            used = 0
        lines[-1] += [(f"{label} ", "dim"), (text + "  ", "text")]
        used += length
    return lines


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
        if feed.reader.errors:
            start, stop = feed.reader.errors[-1]
            return [
                (f"{len(feed.reader.errors)} unreadable place(s) in the log, the last at byte {start:,} to {stop:,}", "warn")
            ]
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
            advice = f" {alert.recommendation}" if alert.recommendation else ""
            return [
                (f"{clock} ! {alert.severity} {alert.code}{at}: ", role),
                (alert.message + "." * (alert.message[-1:] != ".") + advice, "text"),
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
        return text + (f", best checkpoint at {whole(best.step)}" if best else "") + ". T chats."

    def render_line(self, y: int) -> Strip:
        palette: Any = self.app.look.palette  # type: ignore[attr-defined]
        return line(
            self.size.width,
            [(" ", None), *((clean(text), palette.of(role)) for text, role in self._words)],
            base=self.rich_style,
        )
