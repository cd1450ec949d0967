"""What using `lumina` costs, measured from outside: it runs in a pseudo-terminal against generated runs.

Each measurement gives `Figure`s: a value beside its goal. A figure that cannot be measured says why and has no value.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..monitoring.log import last_records
from ..monitoring.record import Step
from .picture import Picture
from .player import make_run
from .viewer import MeasureError, Viewer

_CROSSHAIR = re.compile(r"[└+][ ─-]*([\d,]+): ")
_STEP = re.compile(r"step ([\d,]+)")
_LINE = re.compile(r"line (\d+) of the engine")
MONITOR = (120, 40)


@dataclass(frozen=True)
class Figure:
    """One measured value. `goal` is its upper limit; `value` None: not measured, `note` says why."""

    name: str
    label: str
    unit: str
    goal: float | None
    value: float | None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached; None without a goal or a value."""
        return None if self.goal is None or self.value is None else self.value <= self.goal


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    starts: int = 20
    keys: int = 60
    idle_s: float = 60.0
    live_s: float = 30.0
    long_steps: int = 1_000_000
    opens: int = 5
    flood_s: float = 60.0
    frozen_s: float = 30.0
    runs: int = 200
    living: int = 20
    repeats: int = 30
    first_steps: int = 3_000


QUICK = Sizes(
    starts=2,
    keys=4,
    idle_s=1.0,
    live_s=2.0,
    long_steps=30_000,
    opens=1,
    flood_s=2.0,
    frozen_s=1.0,
    runs=12,
    living=2,
    repeats=2,
    first_steps=300,
)


class Bench:
    """The measurements, sharing one temporary folder.

    Args:
        folder: where runs are generated and lumina keeps its own files.
        sizes: how much is measured.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes
        self.sockets = folder / "s"
        self._homes = 0
        self._long: Path | None = None

    # what measurements are made of

    def home(self) -> Path:
        """A fresh folder for lumina's own files."""
        self._homes += 1
        return self.folder / f"home-{self._homes}"

    def viewer(self, *arguments: str, size: tuple[int, int] = MONITOR, home: Path | None = None) -> Viewer:
        return Viewer(arguments, size, home or self.home(), self.sockets)

    def runs(self, name: str) -> Path:
        """A fresh folder of runs."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    @contextlib.contextmanager
    def played(self, runs: Sequence[Path], **options: float) -> Iterator[subprocess.Popen[str]]:
        """A process that plays these runs."""
        with self.beside("player", *map(str, runs), *[f"--{name}={value}" for name, value in options.items()]) as process:
            yield process

    @contextlib.contextmanager
    def beside(self, module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A process of ours that runs during a measurement, once it has said that it plays."""
        command = [sys.executable, "-m", f"lumina_engine.bench.{module}", *arguments]
        environ = {**os.environ, "LUMINA_SOCKETS": str(self.sockets)}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environ)
        try:
            assert process.stdout is not None
            if not select.select([process.stdout], [], [], 60)[0] or process.stdout.readline() != "playing\n":
                raise MeasureError(f"the {module} did not start")
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def watched(self, name: str, size: tuple[int, int] = MONITOR, **options: float) -> Iterator[tuple[Viewer, Any, Path]]:
        """Monitor on a living run: (viewer, player, run folder)."""
        root = self.runs(name)
        run = make_run(root, "live", self.sizes.first_steps, state=None)
        with (
            self.played([run.path], **options) as player,
            self.viewer("--runs", str(root), "--fps", "4", "live", size=size) as v,
        ):
            v.until(lambda p: "LIVE" in p.row(0), "LIVE in the first line")
            yield v, player, run.path

    def cost(self, viewer: Viewer, seconds: float) -> tuple[float, int, int]:
        """CPU percent of a core, bytes and zlib bytes over some seconds."""
        cpu, sent, packed, began = viewer.cpu, viewer.sent, viewer.packed, time.monotonic()
        viewer.watch(seconds)
        spent = time.monotonic() - began
        return 100 * (viewer.cpu - cpu) / spent, viewer.sent - sent, viewer.packed - packed

    def long_run(self) -> Path:
        """The folder of runs with the one long, finished run."""
        if self._long is None:
            root = self.runs("long")
            make_run(root, "long", self.sizes.long_steps)
            self._long = root
        return self._long

    def keys(self, viewer: Viewer, keys: str, region: Callable[[Picture], str] | None) -> list[float]:
        """Delays of a number of keys, pressed in turn, in ms.

        Raises:
            MeasureError: a key changed nothing.
        """
        delays = []
        for number in range(self.sizes.keys):
            delay = viewer.key(keys[number % len(keys)], region)
            if delay is None:
                raise MeasureError(f"key {keys[number % len(keys)]!r} changed nothing")
            delays.append(1e3 * delay)
            viewer.watch(0.12)
        return delays

    # measurements, in the order of the table

    def first_paint(self) -> Iterator[Figure]:
        root = self.runs("paint")
        make_run(root, "one", 100)
        times, sizes, spent = [], [], []
        for number in range(self.sizes.starts + 1):
            with self.viewer("--runs", str(root), size=(120, 40), home=self.folder / "paint-home") as viewer:
                shown = viewer.until(lambda p: "Home" in p.row(0), "the first line of Home")
                if number:  # the first one warms the page cache
                    times.append(shown - viewer.began)
                    sizes.append(viewer.rss_mb)
                    spent.append(viewer.cpu)
        spread = f"{min(times):.2f}-{max(times):.2f}, {statistics.median(spent):.2f} s CPU"
        yield Figure("first_paint_s", "start to first paint, 120x40", "s", 0.7, statistics.median(times), spread)
        yield Figure("first_paint_rss_mb", "memory at first paint", "MB", 80 * 1.048576, max(sizes))

    def key_quiet(self) -> Iterator[Figure]:
        root = self.runs("keys")
        for number in range(12):
            make_run(root, f"run-{number:02}", 50)
        with self.viewer("--runs", str(root), size=(120, 40)) as viewer:
            viewer.until(lambda p: "run-11" in p.text, "the list of runs")
            viewer.settle()
            delays = self.keys(viewer, "jjjjkkkk", None)
        yield Figure("key_quiet_p95_ms", "key to paint, quiet", "ms", 50, p95(delays), spread_of(delays))

    def key_live(self) -> Iterator[Figure]:
        with self.watched("key-live", rate=20) as (viewer, _, _):
            viewer.settle(0.05, 2.0)
            viewer.send("c")
            viewer.until(crosshair, "the crosshair's figures")
            viewer.send("hhhh")
            viewer.watch(1.0)
            delays = self.keys(viewer, "hhll", crosshair)
        yield Figure("key_p95_ms", "key to paint, 4 panels at 4 Hz", "ms", 100, p95(delays), spread_of(delays))

    def key_open(self) -> Iterator[Figure]:
        root = self.long_run()
        delays: list[float] = []
        rounds = 0
        while len(delays) < self.sizes.keys and rounds < 12:
            rounds += 1
            with self.viewer("--runs", str(root), "long") as viewer:
                viewer.until(lambda p: "LOADING" in p.row(0) and braille(p), "a chart while the log is read")
                viewer.send("c")
                viewer.until(crosshair, "the crosshair's figures")
                number = 0
                while "LOADING" in viewer.picture.row(0) and len(delays) < self.sizes.keys:
                    delay = viewer.key("hhll"[number % 4], crosshair)
                    number += 1
                    if delay is not None:
                        delays.append(1e3 * delay)
                    viewer.watch(0.03)
        if not delays:
            raise MeasureError("the log was read before a key could be pressed")
        note = f"{len(delays)} keys in {rounds} openings, {spread_of(delays)}"
        yield Figure("key_open_p95_ms", "key to paint, during a cold open", "ms", 150, p95(delays), note)

    def idle(self) -> Iterator[Figure]:
        root = self.runs("idle")
        long_ago = time.time() - 10 * 86_400
        for path in make_run(root, "one", 100).path.iterdir():  # an age in days: none that counts seconds
            os.utime(path, (long_ago, long_ago))
        for name, key, ready, done in (("home", "1", "Home", ""), ("doctor", "9", "Doctor", "checked ")):
            with self.viewer("--runs", str(root), size=(120, 40)) as viewer:
                viewer.until(lambda p: "one" in p.text, "the list of runs")
                viewer.send(key)
                label = f"idle {ready}, {self.sizes.idle_s:.0f} s"
                try:
                    viewer.until(partial(_titled, ready), f"screen {ready}", 5.0)
                    viewer.until(partial(_says, done), f"{done or ready} on the screen", 120.0)
                    viewer.settle(15.0 if self.sizes.idle_s > 5 else 0.5, 120.0)
                except MeasureError as error:
                    yield Figure(f"idle_{name}_cpu_pct", label, "% CPU", 1, None, str(error))
                    continue
                before = viewer.picture.text.split("\n")
                cpu, sent, _ = self.cost(viewer, self.sizes.idle_s)
            yield Figure(f"idle_{name}_cpu_pct", label, "% CPU", 1, cpu)
            changed = [new for old, new in zip(before, viewer.picture.text.split("\n"), strict=True) if old != new]
            note = "changed: " + "; ".join(" ".join(line.split())[:100] for line in changed[:2]) if changed else ""
            yield Figure(f"idle_{name}_bytes", f"{label}: sent", "bytes", 0, sent, note)

    def monitor(self) -> Iterator[Figure]:
        for prefix, size in (("monitor", (120, 40)), ("monitor_80x24", (80, 24))):
            with self.watched(f"live-{size[0]}", size, rate=20) as (viewer, _, _):
                viewer.watch(3.0 if self.sizes.live_s > 5 else 0.5)
                cpu, sent, packed = self.cost(viewer, self.sizes.live_s)
            label = f"Monitor {size[0]}x{size[1]}, 4 Hz, 20 records/s"
            yield Figure(f"{prefix}_cpu_pct", label, "% CPU", 10, cpu)
            yield Figure(f"{prefix}_kib_s", f"{label}: sent", "KiB/s", 40, sent / 1024 / self.sizes.live_s)
            yield Figure(f"{prefix}_zlib_kib_s", f"{label}: after zlib", "KiB/s", 5, packed / 1024 / self.sizes.live_s)

    def charts(self) -> Iterator[Figure]:
        for points in (10_000, self.sizes.long_steps):
            command = [sys.executable, "-m", "lumina_tui.chart_timing", str(points), str(self.sizes.repeats)]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
            label = f"chart 120x30 with axes, {points:,} points"
            try:
                value = float(done.stdout)
            except ValueError:
                last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
                yield Figure(f"chart_{points}_ms", label, "ms CPU", 3, None, last)
                continue
            yield Figure(f"chart_{points}_ms", label, "ms CPU", 3, value)

    def open_long(self) -> Iterator[Figure]:
        root = self.long_run()
        cold, warm, preview, peaks, starts = [], [], [], [], []
        spent: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(self.sizes.opens):
            home = self.home()
            first = self._open(root, home)
            shutil.rmtree(home / "state", ignore_errors=True)  # it would go back to Monitor by itself
            second = self._open(root, home)
            cold.append(first[1])
            if first[0] is not None:
                preview.append(first[0])
            warm.append(second[1])
            peaks += [first[2], second[2]]
            starts.append((first[3], second[3]))
            spent["cold"].append(first[4])
            spent["warm"].append(second[4])
        label = f"open {self.sizes.long_steps:,} steps"
        notes = {name: f"{statistics.median(values):.2f} s CPU" for name, values in spent.items()}
        yield Figure(
            "open_1m_warm_s", f"{label}, with cache", "s", 1, statistics.median(warm), f"{spread_of(warm, 2)}, {notes['warm']}"
        )
        yield Figure(
            "open_1m_cold_s", f"{label}, without", "s", 3, statistics.median(cold), f"{spread_of(cold, 2)}, {notes['cold']}"
        )
        if preview:
            yield Figure("open_1m_preview_s", f"{label}: preview", "s", 0.3, statistics.median(preview), spread_of(preview, 2))
        else:
            yield Figure(
                "open_1m_preview_s", f"{label}: preview", "s", 0.3, None, "the whole log was read before one was shown"
            )
        yield Figure("open_1m_rss_mb", f"{label}: largest memory", "MB", 300, max(peaks))
        yield Figure(
            "start_1m_warm_s",
            "the same from the start of lumina, with cache",
            "s",
            None,
            statistics.median(w for _, w in starts),
        )
        yield Figure(
            "start_1m_cold_s", "the same from the start of lumina, without", "s", None, statistics.median(c for c, _ in starts)
        )

    def _open(self, root: Path, home: Path) -> tuple[float | None, float, float, float, float]:
        """(preview, exact chart) from the key in Home; largest memory in MB; exact chart from the start of the process; CPU
        seconds from the key on."""
        with self.viewer("--runs", str(root), home=home) as viewer:
            viewer.until(lambda p: "finished" in p.text, "the list of runs")
            viewer.watch(2.0)
            began, cpu = time.monotonic(), viewer.cpu
            viewer.send("\r")
            shown = viewer.until(lambda p: braille(p) and ("preview" in p.text or exact(p)), "a chart", 120)
            preview = shown - began if "preview" in viewer.picture.text else None
            whole = viewer.until(exact, "the exact chart of the long run", 120) - began
            cpu = viewer.cpu - cpu
            viewer.settle(0.3, 5.0)
            peak = viewer.peak_mb
            viewer.send("q")
            with contextlib.suppress(MeasureError):
                viewer.watch(10.0)
        with self.viewer("--runs", str(root), "long", home=home if preview is None else self.home()) as viewer:
            start = viewer.until(exact, "the exact chart of the long run", 120) - viewer.began
        return preview, whole, peak, start, cpu

    def pan_zoom(self) -> Iterator[Figure]:
        with self.viewer("--runs", str(self.long_run()), "long") as viewer:
            viewer.until(exact, "the exact chart of the long run", 120)
            viewer.settle()
            delays = self.keys(viewer, "++++hhllhhll----", None)
        label = f"pan and zoom, {self.sizes.long_steps:,} steps"
        yield Figure("pan_zoom_p95_ms", label, "ms", 50, p95(delays), spread_of(delays))

    def flood(self) -> Iterator[Figure]:
        with self.watched("flood", rate=1000) as (viewer, player, run):
            cpu, _, _ = self.cost(viewer, self.sizes.flood_s)
            player.send_signal(signal.SIGTERM)
            player.wait(10)
            last = last_records(run / "metrics.jsonl", 1, ["step"])[0]
            assert isinstance(last, Step)
            label = f"1,000 records/s for {self.sizes.flood_s:.0f} s"
            yield Figure("flood_cpu_pct", label, "% CPU", 15, cpu)
            viewer.until(lambda p: step_of(p) >= last.step, f"step {last.step:,} on the screen", 10.0)
            lost = last.step - step_of(viewer.picture)
            yield Figure("flood_lost", f"{label}: steps behind at the end", "steps", 0, lost)

    def crash(self) -> Iterator[Figure]:
        with self.watched("crash", rate=20) as (viewer, player, _):
            viewer.watch(1.0)
            began = time.monotonic()
            player.kill()
            seen = viewer.until(lambda p: "crashed" in p.row(0).lower(), "crashed in the first line", 20.0) - began
        yield Figure("crash_seen_s", "SIGKILL of the supervisor to crashed on the screen", "s", 1, seen)

    def thaw(self) -> Iterator[Figure]:
        with self.watched("thaw", rate=1000) as (viewer, _, run):
            viewer.watch(0.5)
            time.sleep(self.sizes.frozen_s)  # nobody reads the terminal
            last = last_records(run / "metrics.jsonl", 1, ["step"])[0]
            assert isinstance(last, Step)
            began = time.monotonic()
            seen = viewer.until(lambda p: step_of(p) >= last.step, f"step {last.step:,} on the screen") - began
        label = f"terminal frozen for {self.sizes.frozen_s:.0f} s, drained: current step"
        yield Figure("thaw_s", label, "s", 2, seen)

    def many_runs(self) -> Iterator[Figure]:
        root = self.runs("many")
        paths = [
            make_run(root, f"run-{n:03}", 120, None if n < self.sizes.living else "finished").path
            for n in range(self.sizes.runs)
        ]
        label = f"Home with {self.sizes.runs} runs, {self.sizes.living} live"
        with self.played(paths[: self.sizes.living], rate=1) as _, self.viewer("--runs", str(root)) as viewer:
            first = viewer.until(lambda p: "Home" in p.row(0), "Home")
            listed = viewer.until(lambda p: f"runs {self.sizes.runs}" in p.text, "the list of runs")
            viewer.watch(2.0 if self.sizes.live_s > 5 else 0.1)
            cpu, _, _ = self.cost(viewer, self.sizes.live_s)
        yield Figure("home_list_s", f"{label}: first paint to list", "s", 0.5, listed - first)
        yield Figure("home_cpu_pct", label, "% CPU", 5, cpu)

    def log_lines(self) -> Iterator[Figure]:
        for rate, goal in ((1_000, 10.0), (10_000, None)):
            with self.watched(f"log-{rate}", rate=0.5, lines=rate) as (viewer, _, _):
                viewer.until(lambda p: newest_line(p) >= 0, "a line of the log", 10.0)
                viewer.watch(1.0)
                first, began = newest_line(viewer.picture), time.monotonic()
                cpu, _, _ = self.cost(viewer, self.sizes.live_s)
                rate_shown = (newest_line(viewer.picture) - first) / (time.monotonic() - began)
            name = f"log_{rate}"
            yield Figure(f"{name}_cpu_pct", f"log, {rate:,} lines/s", "% CPU", goal, cpu)
            behind = max(0.0, 1 - rate_shown / rate)
            yield Figure(f"{name}_behind", f"log, {rate:,} lines/s: share it falls behind by", "", 0.1, round(behind, 3))

    def chat(self) -> Iterator[Figure]:
        from .talker import CODE_LINES, make_checkpoint

        root = self.runs("chat")
        checkpoint = make_checkpoint(make_run(root, "bench", 100).checkpoints, 100)
        with self.beside("talker", str(checkpoint)), self.viewer("--runs", str(root), "bench@step-000100") as viewer:
            viewer.until(lambda p: "Chat" in p.row(0), "Chat")
            viewer.settle(1.0, 10.0)
            began = time.monotonic()
            viewer.send("why do leaves fall?\r")
            viewer.until(lambda p: "The leaves fall" in p.text or "The **leaves" in p.text, "a reply", 10.0)
            cpu, _, _ = self.cost(viewer, min(self.sizes.live_s, 12.0))
            yield Figure("chat_cpu_pct", "chat, 50 tokens/s", "% CPU", 15, cpu)
            if self.sizes.live_s < 5:
                return
            viewer.watch(max(0.0, began + 17.0 - time.monotonic()))
            before = viewer.cpu
            viewer.send("code please\r")
            viewer.until(lambda p: f"# line {CODE_LINES - 1}" in p.text, "the last line of code", 30.0)
            viewer.settle(1.0, 5.0)
            yield Figure("chat_code_cpu_s", f"chat, a reply of {CODE_LINES} lines of code", "s CPU", 1, viewer.cpu - before)

    def form(self) -> Iterator[Figure]:
        from ..config.budget import budget
        from ..config.checks import check
        from ..config.loading import build, preset_layer
        from ..config.machine import Machine, parse_devices
        from ..config.presets import NAMES

        name = NAMES[-1]
        values = dict(preset_layer(name).values)
        machine = Machine(devices=parse_devices("8x80GB"), host_memory_bytes=10**12, disk_free_bytes=10**13)
        fields, rules = [], []
        for number in range(self.sizes.repeats):
            began = time.process_time()
            config, _ = build({**values, "warmup_steps": number})
            middle = time.process_time()
            check(config, machine)
            budget(config, machine)
            fields.append(1e3 * (middle - began))
            rules.append(1e3 * (time.process_time() - middle))
        yield Figure("field_check_ms", f"one field of {name} checked", "ms CPU", 30, statistics.median(fields))
        yield Figure("rules_budget_ms", f"rules and budget of {name}", "ms CPU", 100, statistics.median(rules))


MEASUREMENTS: tuple[Callable[[Bench], Iterator[Figure]], ...] = (
    Bench.first_paint,
    Bench.key_quiet,
    Bench.key_live,
    Bench.key_open,
    Bench.idle,
    Bench.monitor,
    Bench.charts,
    Bench.open_long,
    Bench.pan_zoom,
    Bench.flood,
    Bench.crash,
    Bench.thaw,
    Bench.many_runs,
    Bench.log_lines,
    Bench.chat,
    Bench.form,
)


# what the last line of --json always has; null: not measured
HEADLINES = (
    *("first_paint_s", "key_p95_ms", "open_1m_warm_s", "open_1m_cold_s", "open_1m_rss_mb"),
    *("monitor_cpu_pct", "monitor_kib_s"),
)


def measure(folder: Path, sizes: Sizes, only: Sequence[str] = ()) -> Iterator[Figure]:
    """Every figure, one after the other; `only` names measurements."""
    bench = Bench(folder, sizes)
    for measurement in MEASUREMENTS:
        name = measurement.__name__
        if only and name not in only:
            continue
        try:
            yield from measurement(bench)
        except MeasureError as error:
            yield Figure(name, name.replace("_", " "), "", None, None, f"not measured: {error}")


def p95(values: Sequence[float]) -> float:
    """The 95th percentile: the value that at most one in twenty exceeds."""
    return sorted(values)[max(0, -(-95 * len(values) // 100) - 1)]


def spread_of(values: Sequence[float], digits: int = 0) -> str:
    """Median and range, for the note beside a figure."""
    return f"median {statistics.median(values):.{digits}f}, {min(values):.{digits}f}-{max(values):.{digits}f}"


def crosshair(picture: Picture) -> str:
    """The step under the crosshair as a chart's lower edge names it; empty without one."""
    match = _CROSSHAIR.search(picture.text)
    return match[1] if match else ""


def _titled(word: str, picture: Picture) -> bool:
    return word in picture.row(0)


def _says(words: str, picture: Picture) -> bool:
    return words in picture.text


def braille(picture: Picture) -> bool:
    """Whether a curve is drawn."""
    return any("⠀" < letter <= "⣿" for letter in picture.text)


def exact(picture: Picture) -> bool:
    """Whether Monitor shows the whole log."""
    return (
        "Monitor" in picture.row(0)
        and "LOADING" not in picture.row(0)
        and "EMA" in picture.text
        and "preview" not in picture.text
        and braille(picture)
    )


def step_of(picture: Picture) -> int:
    """The step in the progress line; -1 without one."""
    match = _STEP.search(picture.text)
    return int(match[1].replace(",", "")) if match else -1


def newest_line(picture: Picture) -> int:
    """The number of the newest line of the log on the screen."""
    return max((int(number) for number in _LINE.findall(picture.text)), default=-1)
