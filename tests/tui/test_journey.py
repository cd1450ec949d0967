"""A day at the keyboard in a real terminal with a real run: everything by keys, and two kills of `lumina` on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records

from .pane import Pane

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")]


def engine(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "lumina_engine.cli", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )


@pytest.fixture
def no_servers_left(tmp_path):
    """Chat servers outlive `lumina`, also in a test."""
    yield
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in word for word in process.info["cmdline"] or ()):
            process.kill()


def records(folder: Path, run: str) -> list[rec.Record]:
    return list(read_records(folder / "runs" / run / "metrics.jsonl"))


def edit(pane: Pane, field: str, value: str) -> str:
    """Find a field, type a value, take it; the screen while the value stands in the field."""
    pane.press("/")
    pane.type(field)
    pane.see(">" + field, "Enter goes there")
    pane.press("Enter")
    pane.lose("Enter goes there")
    pane.press("Enter")
    pane.see("Enter take")
    pane.press("C-u")
    pane.type(value)
    typed = pane.see(value)
    pane.press("Enter")
    return typed


def budget_of(pane: Pane) -> str:
    found = re.search(r"[\d.]+ [MBT](?= total,| \()", pane.see(" tokens/step"))  # a long line leaves the word out
    assert found is not None
    return found[0]


def test_c138_a_day_by_keys_alone(tmp_path, no_servers_left):
    engine(tmp_path, "train", "--preset", "debug", "--run", "earlier", "max_steps=24", "save_interval=12", "eval_interval=12")
    with Pane(tmp_path) as pane:
        pane.start()
        pane.see("earlier")

        # b1: five fields, two of them wrong first
        pane.press("2")
        pane.see("Presets", "b300")
        pane.press("j")
        pane.see(">b1")
        pane.press("Enter")
        pane.see("copy of b1", "0 changes")
        before = budget_of(pane)
        edit(pane, "warmup_steps", "-5")
        pane.see("must be a whole number from 0", "1!")
        edit(pane, "warmup_steps", "50")
        pane.see("1 change |")
        edit(pane, "learning_rate", "fast")
        pane.see("learning_rate", "fast", "must be")
        edit(pane, "learning_rate", "2e-4")
        edit(pane, "num_layers", "8")
        pane.see("3 changes")
        edit(pane, "batch_size", "2")
        edit(pane, "weight_decay", "0.05")
        pane.see("5 changes")
        assert budget_of(pane) != before
        pane.press("w")
        pane.see("configs/my_b1.yaml")
        pane.press("Enter")
        pane.see("written to")
        assert "num_layers: 8" in (tmp_path / "configs" / "my_b1.yaml").read_text()

        # debug: launched from its review
        pane.press("2")
        pane.see("Presets")
        pane.press("g")
        pane.see(">debug")
        pane.press("a")
        pane.see("4 Launch", "debug", "ready")
        pane.press("Enter")
        pane.see("5 Monitor", "LIVE", "loss  EMA", seconds=120)
        (run,) = {path.name for path in (tmp_path / "runs").iterdir()} - {"earlier"}
        pane.see("step 1", seconds=120)

        # a first kill
        os.kill(pane.pid(), signal.SIGKILL)
        assert pane.ended() == 137
        pane.start(run)
        pane.see("5 Monitor", "LIVE", "loss  EMA")

        # zoom, crosshair, checkpoint, learning rate
        pane.press("+")
        pane.see("zoomed")
        pane.press("c")
        pane.press("h", "h", "h")
        pane.see("EMA", ": ")
        pane.press("f")
        pane.press("C")
        pane.see("applied at step")
        pane.press("S")
        pane.see("earning rate")
        pane.press("C-u")
        pane.type("2e-4")
        pane.press("Enter")
        pane.see("applied at step")

        # compare with the earlier run
        pane.press("1")
        pane.see("1 Home", "earlier", run)
        pane.press("g", "Space", "j", "Space", "=")
        pane.see("6 Compare", "earlier")

        # a second kill, then stop
        os.kill(pane.pid(), signal.SIGKILL)
        assert pane.ended() == 137
        pane.start(run)
        pane.see("5 Monitor", "LIVE", "loss  EMA")
        pane.press("X")
        pane.see("save a checkpoint, then stop")
        pane.press("s")
        pane.see("FILE", seconds=120)

        # chat with two checkpoints
        pane.press("T")
        pane.see("7 Chat", "READY", seconds=120)
        pane.press("Tab")  # out of the field; an Escape right before a letter would be Alt with that letter
        pane.press("S")
        pane.see("choose a checkpoint for the right pane", ">", "earlier")
        pane.press("j")
        pane.press("Enter")
        pane.see("same prompt, same seed", seconds=120)
        pane.type("How much is 2 plus 3?")
        pane.press("Enter")
        pane.settle(lambda text: text.count("tok/s") == 2, "both answers")
        pane.press("Tab")
        pane.press("e")
        pane.see("Export the conversation")
        pane.press("m")
        pane.lose("Export the conversation")
        pane.press("q")
        assert pane.ended() == 0
        assert "Traceback" not in pane.text()

    (saved,) = (tmp_path / "exports").glob("*.md")
    assert "How much is 2 plus 3?" in saved.read_text()
    steps = [record for record in records(tmp_path, run) if isinstance(record, rec.Step)]
    assert [record.step for record in steps] == list(range(1, len(steps) + 1)), "no step was lost or done twice"
    changes = [record for record in records(tmp_path, run) if isinstance(record, rec.Change)]
    assert any(record.what == "learning_rate" and record.by == "user" for record in changes)
    assert json.loads((tmp_path / "runs" / run / "run.json").read_text())["inc"] == 1
