"""Whole screens as text that a reviewer can read (tests/tui/snapshots/*.txt), and the program in a real tmux.

`LUMINA_SNAPSHOTS=write pytest tests/tui/test_snapshots.py` writes them again after a wanted change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config.loading import write_config
from lumina_engine.config.machine import GB, Accelerator, Machine
from lumina_engine.config.schema import Config
from lumina_engine.doctor.row import Row
from lumina_engine.monitoring import hardware
from lumina_engine.monitoring import record as rec
from lumina_tui import preview, review
from lumina_tui.application import LuminaApp, Start
from lumina_tui.chatting import Phase
from lumina_tui.feed import Mode
from lumina_tui.overview import Reader
from lumina_tui.screens.data import DataScreen
from lumina_tui.screens.doctor import DoctorScreen
from lumina_tui.terminal import NAMED, AsciiFilter, Look, to_ascii
from lumina_tui.widgets.picture import Limits
from tests.chat.chat_screen import App as ChatApp
from tests.chat.chat_screen import runs, servers
from tests.chat.fakes import FakeBackend

from .fake_engine import FakeEngine
from .helpers import screen_text, until

__all__ = ["runs", "servers"]  # fixtures

FOLDER = Path(__file__).parent / "snapshots"
LOOKS = {"braille": Look(hz=4), "ascii": Look(glyphs="ascii", palette=NAMED, ansi=True, hz=4)}


@pytest.fixture(autouse=True)
def fixed_clock(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


async def compare(pilot: Any, name: str, edit: Callable[[str], str] = lambda text: text) -> None:
    """The screen, after `edit`, against the stored picture; differences in rate are no differences.

    A part that is painted a moment later is waited for.
    """

    def text() -> str:
        shown = re.sub(r"LIVE [\d.]+ Hz", "LIVE 4 Hz", edit(screen_text(pilot.app)))
        return "\n".join(line.rstrip() for line in shown.split("\n")) + "\n"

    path = FOLDER / f"{name}.txt"
    if os.environ.get("LUMINA_SNAPSHOTS") == "write":
        FOLDER.mkdir(exist_ok=True)
        await asyncio.sleep(1)  # writing only: what is painted late belongs into the picture
        path.write_text(text())
    assert path.exists(), f"{path.name} is missing; LUMINA_SNAPSHOTS=write makes it"
    wanted = path.read_text()
    with contextlib.suppress(AssertionError):
        await until(pilot, lambda: text() == wanted, seconds=10)
    assert text() == wanted, f"{path.name} has changed:\n{text()}"


def story(engine: FakeEngine) -> None:
    """The same run every time."""
    engine.t = 1_764_000_000.0
    engine.state("running")
    for part in range(8):
        engine.steps(50)
        engine.experts(4, 8, hot=3 if part == 7 else None, dead=5)
        engine.emit(rec.Eval(step=engine.step_number, loss=1.75 + 3.0 / (part + 1)))
        engine.emit(rec.Checkpoint(step=engine.step_number, bytes=12_000_000, best=part == 7))
    engine.emit(
        rec.Alert(
            severity="warning", code="loss_spike", message="6.3 sigma, step skipped", recommendation="Nothing to do.", step=333
        )
    )
    engine.emit(
        rec.Hardware(
            cpu=93.0,
            cpu_count=2,
            memory_used=int(6.1e9),
            memory_total=int(16e9),
            rss=int(1.9e9),
            disk_free=int(1.1e12),
            disk_total=int(2e12),
        )
    )
    engine.log("lumina engine", "device: cpu, 2 threads", "step 400: evaluated")


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (160, 45), (200, 60)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("glyphs", LOOKS)
async def test_monitor(tmp_path, size, glyphs):
    async with FakeEngine(tmp_path, "b1-oasst") as engine:
        story(engine)
        app = LuminaApp(tmp_path, look=LOOKS[glyphs], start=Start(run=engine.run.path))
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: app.screen.feed is not None and app.screen.feed.mode is Mode.LIVE)
            for chart in app.screen.charts:  # axes that remember no earlier picture
                chart.show(app.screen.store)
            await until(pilot, lambda: all(part in screen_text(app) for part in ("loss_spike", "C checkpoint", "2.58", "LIVE")))
            assert glyphs != "ascii" or any(isinstance(item, AsciiFilter) for item in app.get_line_filters())
            await compare(pilot, f"monitor-{size[0]}x{size[1]}-{glyphs}", lambda text: _ascii_or(glyphs, text))


AGES = {"debug-1": 0.1, "crashed-one": 0.2, "b1-oasst": 0.3}  # s: the clock stands still, however slow the test


@pytest.mark.parametrize("size", [(80, 24), (160, 45), (200, 60)], ids=lambda size: f"{size[0]}x{size[1]}")
async def test_home(tmp_path, size, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        Reader,
        "_hardware",
        lambda reader, live: rec.Hardware(cpu_count=2, memory_used=int(6e9), memory_total=int(16e9), disk_free=int(1.1e12)),
    )
    monkeypatch.setattr("lumina_tui.runs._aged", lambda item, now: replace(item.info, age_s=AGES[item.info.name]))
    async with (
        FakeEngine(Path("runs"), "b1-oasst", preset="b1") as live,
        FakeEngine(Path("runs"), "debug-1") as over,
        FakeEngine(Path("runs"), "crashed-one") as dead,
    ):
        for engine in (live, over, dead):
            story(engine)
        await over.finish()
        await dead.crash()
        app = LuminaApp("runs", look=LOOKS["braille"])
        async with app.run_test(size=size) as pilot:
            await until(
                pilot,
                lambda: len(app.screen.rows) == 3 and "disk free" in screen_text(app) and "step 400, best" in screen_text(app),
            )

            def edited(text: str) -> str:
                text = re.sub(r"made\s+\d{4}-\d\d-\d\d \d\d:\d\d", "made   2025-11-24 16:00", text)
                text = text.replace(str(tmp_path), "~")
                if size == (80, 24):
                    text = re.sub(r"path .*", "path …", text)
                return re.sub(r"path +[/…][^│\n]*", lambda m: "path".ljust(len(m[0])), text)

            await compare(pilot, f"home-{size[0]}x{size[1]}", edited)


COMPARED = [((80, 24), "braille"), ((80, 24), "ascii"), ((160, 45), "braille"), ((200, 60), "braille")]


@pytest.mark.parametrize(
    ("size", "glyphs"), COMPARED, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
async def test_compare(tmp_path, size, glyphs):
    """A run, one with another learning rate that stopped early, one that cannot be read; the crosshair at step 102."""
    paths = [tmp_path / name for name in ("first", "slower", "broken")]
    for seed, name in enumerate(("first", "slower")):
        engine = FakeEngine(tmp_path, name)
        engine.run.update_identity(id=f"run-{name}")
        write_config(Config(learning_rate=1e-3 / (1 + seed)), engine.run.config_path)
        engine._random.seed(seed)
        await engine.serve(socket=False)
        story(engine)
        engine.steps(0 if seed else 100)
        await (engine.crash() if seed else engine.finish())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{oops")
    app = LuminaApp(tmp_path, look=LOOKS[glyphs])
    async with app.run_test(size=size) as pilot:
        app.open_compare(paths)
        await until(pilot, lambda: app.screen.number == 6 and len(app.screen.runs) == 3)
        screen, charts = app.screen, 5 if size[0] >= 160 else 1
        await until(pilot, lambda: [len(run.feed.store.steps) for run in screen.runs[:2]] == [500, 400])
        await until(pilot, lambda: "dead" in screen_text(app) and screen_text(app).count("a 500:") == charts)
        for chart in (screen.chart, *screen.small):  # axes that remember no earlier picture
            chart._limits = Limits()
        screen.chart.cursor.step = 102
        await until(pilot, lambda: screen_text(app).count("a 102:") == charts and "at step 102" in screen_text(app))
        await until(pilot, lambda: charts == 1 or "restarts" in screen_text(app))
        name = f"compare-{size[0]}x{size[1]}-{glyphs}"
        await compare(pilot, name, lambda text: _ascii_or(glyphs, text.replace(str(tmp_path), "~")))


CHECKED = [((80, 24), "braille"), ((80, 24), "ascii"), ((200, 60), "braille")]


@pytest.mark.parametrize(
    ("size", "glyphs"), CHECKED, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
async def test_doctor(tmp_path, size, glyphs, monkeypatch):
    found = [
        Row("python", "python", "ok", "3.11.7, .venv/bin/python"),
        Row("package.torch", "python", "ok", "2.13.0+cu128 (>=2.10)"),
        Row("driver", "devices", "ok", "driver 570.1, CUDA 12.8, 2 GPUs"),
        Row("driver.gpu0", "devices", "ok", "H100 80GB HBM3, 79 of 80 GB free, 41 C, bf16, flash attention"),
        Row("compiler.ninja", "deepspeed", "warn", "not found: operators cannot be compiled", "pip install ninja"),
        Row("memory", "memory", "ok", "64.0 GB, 60.0 GB free"),
        Row("runs", "disk", "fail", "runs, ext4, 0.5 of 2,000.0 GB free", "free space there, or set LUMINA_RUNS (or --runs)"),
        Row("launcher.pdsh", "network", "skipped", "not found; one machine does without", "install it for several nodes"),
    ]

    async def engine(self: DoctorScreen) -> None:
        self.checkup.take({"progress": "checks", "checks": [{"id": "torch", "group": "python", "slow": True, "about": ""}]})
        for row in found:
            self.checkup.take({"progress": "row", "row": row.to_dict()})
        self.show_rows()

    monkeypatch.setattr(DoctorScreen, "_run_engine", engine)
    monkeypatch.setattr("os.uname", lambda: os.uname_result(("Linux", "gpu01", "", "", "")))
    app = LuminaApp(tmp_path, look=LOOKS[glyphs])
    async with app.run_test(size=size) as pilot:
        app.open_screen(9)
        await until(pilot, lambda: "running torch" in screen_text(app))
        await compare(pilot, f"doctor-{size[0]}x{size[1]}-{glyphs}", lambda text: _ascii_or(glyphs, text))


SOURCES = [((80, 24), "braille"), ((80, 24), "ascii"), ((120, 40), "braille"), ((200, 60), "braille")]


@pytest.mark.parametrize(
    ("size", "glyphs"), SOURCES, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
async def test_data(tmp_path, size, glyphs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talks = [{"instruction": f"Count to {n}.", "output": ", ".join(map(str, range(1, n)))} for n in (2, 9, 60, 9)]
    Path("count.json").write_text(json.dumps(talks, indent=1))
    Path("broken.jsonl").write_bytes(b'{"messages": "caf\xe9"}\n')
    app = LuminaApp("runs", look=LOOKS[glyphs])
    async with app.run_test(size=size) as pilot:
        app.memory.set("data.paths", ["count.json", "broken.jsonl"])
        screen = app.open_screen(8)
        await until(pilot, lambda: screen.is_current and all(row.look for row in screen.sources.rows.values()))
        screen.table.move_to("count.json")
        await screen.action_do("data.validate")
        source = screen.chosen
        await until(pilot, lambda: source.check is not None)
        if size == (80, 24):
            await compare(pilot, f"data-list-80x24-{glyphs}", lambda text: _ascii_or(glyphs, text))
            await pilot.press("enter")
        source.checked_at = 1_764_000_000.0
        await until(pilot, lambda: source.rows and "checked at 16:00" in _shown_again(screen))
        await compare(pilot, f"data-{size[0]}x{size[1]}-{glyphs}", lambda text: _ascii_or(glyphs, text))


def _shown_again(screen: DataScreen) -> str:
    screen._show()
    return screen_text(screen.app)


def _ascii_or(glyphs: str, text: str) -> str:
    return to_ascii(text) if glyphs == "ascii" else text


TALKED = [((80, 24), "braille"), ((80, 24), "ascii"), ((120, 40), "braille"), ((200, 60), "braille")]
ANSWERS = {
    "step-000200": "Trees stop feeding their leaves:\n\n1. a layer of *cork* cuts each leaf off\n2. the **wind** does the rest",
    "step-000100": "Leaves leaves fall because\n```\nautumn = True\n```",
}


@pytest.mark.parametrize(
    ("size", "glyphs"), TALKED, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
async def test_chat(tmp_path, size, glyphs, monkeypatch, servers, runs):
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "sockets"))
    for name, answer in ANSWERS.items():
        servers.others[name] = FakeBackend(step=int(name[-6:]))
        servers.others[name].reply = answer
    app = ChatApp(runs, checkpoint="autumn", starter=servers, chats_dir=tmp_path / "chats", look=LOOKS[glyphs], readonly=True)
    async with app.run_test(size=size) as pilot:
        chat = app.chat
        await until(pilot, lambda: chat.left.link.phase is Phase.READY)
        chat.settings.seed = 7
        chat.right.wanted = "autumn@step-000100"
        chat.action_split()
        await until(pilot, lambda: chat.right.link.phase is Phase.READY)
        chat.use_settings()
        chat.field.put("Why do leaves fall in autumn?")
        chat.field.focus()
        await pilot.press("enter")
        await until(pilot, lambda: all(p.link.phase is Phase.READY and not p._grown and p.session.history for p in chat.panes))
        await until(pilot, lambda: "READY" in screen_text(app) and screen_text(app).count("tok") >= 2)
        await compare(pilot, f"chat-{size[0]}x{size[1]}-{glyphs}", lambda text: _ascii_or(glyphs, text))
        chat.right.toggle_tokens()
        chat.right.tokens.action_last()
        await until(pilot, lambda: "6 of 6" in screen_text(app) and "5:0.75" in screen_text(app))
        await until(pilot, lambda: "next token" in screen_text(app) or "l next" in screen_text(app))
        await compare(pilot, f"chat-tokens-{size[0]}x{size[1]}-{glyphs}", lambda text: _ascii_or(glyphs, text))


CONFIGURED = [((80, 24), "braille"), ((80, 24), "ascii"), ((120, 40), "braille"), ((200, 60), "braille")]


def two_gpus(tmp_path, monkeypatch):
    """A fixed machine, folder, clock and free disk for presets, editor and launch."""
    (tmp_path / "work" / "configs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("LUMINA_SOCKETS", "sockets")
    machine = Machine([Accelerator("H100", 80 * GB)] * 2, 1000 * GB, 32, 1100 * GB)
    monkeypatch.setattr(hardware, "detect", lambda *_: machine)
    monkeypatch.setattr(review, "free_space", lambda path: (Path(), 1100 * GB))
    monkeypatch.setattr(review, "auto_name", lambda stem: f"{stem}-20261124-120000")
    monkeypatch.setattr(preview, "rank_argv", lambda *_: ["torchrun", "-m", "lumina_engine.training.worker"])
    Path("configs/my_run.yaml").write_text("# preset: b1\ntraining:\n  seed: 3\n  batch_size: 16\n  warmup_steps: -5\n")
    Path("configs/broken.yaml").write_text("training:\n  batch_sise: 3\n")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    Path("d.jsonl").write_text(json.dumps({"messages": turns}) + "\n")


@pytest.mark.parametrize("name", ["presets", "config", "launch"])
@pytest.mark.parametrize(
    ("size", "glyphs"), CONFIGURED, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
async def test_presets_config_launch(tmp_path, size, glyphs, name, monkeypatch):
    two_gpus(tmp_path, monkeypatch)
    app = LuminaApp("runs", look=LOOKS[glyphs])
    async with app.run_test(size=size) as pilot:
        if name == "presets":
            app.open_presets(select="b1")
            await until(pilot, lambda: getattr(app.screen, "verdicts", None) is not None)
        elif name == "config":
            app.open_config(preset="b1")
            await until(pilot, lambda: getattr(app.screen, "machine", None) is not None)
            for field, value in (("batch_size", "16"), ("eval_interval", "0"), ("warmup_steps", "-5")):
                app.screen.form.set_text(field, value)
            app.screen._rules()
            await until(pilot, lambda: app.screen._data.of(app.screen.form.config()) is not None)
            app.screen._rules()
            app.screen.go_to_field("warmup_steps")
        else:
            app.open_launch(config=Config(train_data_path="d.jsonl", hidden_size=128, num_layers=2, tokenizer="lumina-1k"))
            await until(pilot, lambda: getattr(app.screen, "review", None) is not None and not app.screen.reviewing)
        await compare(pilot, f"{name}-{size[0]}x{size[1]}-{glyphs}", lambda text: _ascii_or(glyphs, text))


def test_no_snapshot_is_unused():
    wanted = {f"monitor-{w}x{h}-{g}.txt" for w, h in ((80, 24), (120, 40), (160, 45), (200, 60)) for g in LOOKS} | {
        *(f"compare-{w}x{h}-{g}.txt" for (w, h), g in COMPARED),
        "home-80x24.txt",
        "home-160x45.txt",
        "home-200x60.txt",
        *(f"doctor-{w}x{h}-{g}.txt" for (w, h), g in CHECKED),
        *(f"data-{w}x{h}-{g}.txt" for (w, h), g in SOURCES),
        *(f"data-list-80x24-{g}.txt" for g in LOOKS),
        *(f"chat-{w}x{h}-{g}.txt" for (w, h), g in TALKED),
        *(f"chat-tokens-{w}x{h}-{g}.txt" for (w, h), g in TALKED),
        *(f"{name}-{w}x{h}-{g}.txt" for name in ("presets", "config", "launch") for (w, h), g in CONFIGURED),
    }
    assert {path.name for path in FOLDER.glob("*.txt")} == wanted


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize("size", [(80, 24), (160, 45)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_c138_in_a_real_tmux(tmp_path, size):
    engine = FakeEngine(tmp_path / "runs")
    story(engine)
    engine.emit(rec.Run(state="finished"))
    socket = str(tmp_path / "tmux")
    tmux = ["tmux", "-S", socket, "-f", "/dev/null"]
    status = tmp_path / "status"
    lumina = f"env LC_ALL=C.UTF-8 {sys.executable} -m lumina_tui.app --runs {tmp_path}/runs"
    command = f"{lumina}; echo $? >{status}; cat"  # cat keeps the pane for what was printed last

    def seen(*texts: str) -> str:
        deadline = time.monotonic() + 30
        while True:
            pane = subprocess.run([*tmux, "capture-pane", "-p", "-t", "a"], capture_output=True, text=True).stdout
            if all(text in pane for text in texts):
                return pane
            assert time.monotonic() < deadline, pane

    def exit_status() -> str:
        deadline = time.monotonic() + 30
        while not (status.exists() and status.read_text().strip()):
            assert time.monotonic() < deadline, "it did not end"
        return status.read_text().strip()

    def press(*keys: str) -> None:
        subprocess.run([*tmux, "send-keys", "-t", "a", *keys], check=True)

    new = [*tmux, "new-session", "-d", "-s", "a", "-x", str(size[0]), "-y", str(size[1])]
    subprocess.run([*new, command], check=True)
    try:
        seen("demo")
        press("Enter")
        seen("FINISHED", "loss  EMA", "experts 4 x 8", "T chats")
        press("?")
        seen("Help: Monitor")
        press("Escape")
        subprocess.run([*tmux, "resize-window", "-t", "a", "-x", "50", "-y", "12"], check=True)
        seen("400 / 1,000")
        subprocess.run([*tmux, "resize-window", "-t", "a", "-x", str(size[0]), "-y", str(size[1])], check=True)
        seen("loss  EMA")
        press("q")
        assert exit_status() == "0"
        assert "Traceback" not in seen()
    finally:
        subprocess.run([*tmux, "kill-server"], capture_output=True)
