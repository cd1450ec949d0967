"""PS04: `lumina` in a terminal that nobody reads, beside a real run: it holds nothing up, and nothing is missing after it."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_engine.bench.picture import Picture
from lumina_engine.bench.tui import step_of
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.client import RunClient, send_command
from lumina_engine.run.launch import wait
from tests.tui.test_terminal import Terminal
from tests.waiting import until

from .conftest import TinyRuns
from .tiny_run import steps

FROZEN_S = 30.0
SIZE = (200, 60)


@pytest.mark.slow
@pytest.mark.fast
def test_ps04_a_terminal_that_nobody_reads(
    tiny_runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str, object], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tiny_runs.running(max_steps=1_000_000, num_epochs=1_000_000, save_interval=0, eval_interval=0)
    until(lambda: len(steps(run)) > 20, "steps", 120)
    sockets = os.environ["LUMINA_SOCKETS"]
    with Terminal("--runs", str(tmp_path), run.name, size=SIZE, LUMINA_SOCKETS=sockets) as terminal:
        terminal.expect(b"loss  EMA", 60)
        until(terminal.stalled, "the terminal to be full", 60)
        with RunClient(run, timeout=60) as client:
            frozen, before, seqs = time.monotonic() + FROZEN_S, len(steps(run)), []
            for record in client.records():
                seqs.append(record.seq)
                if time.monotonic() > frozen and len(seqs) > client.hello["head_seq"] + 100:
                    break
        assert seqs == list(range(1, len(seqs) + 1)), "another viewer misses nothing meanwhile"
        assert terminal.stalled(), "and nobody has read"
        figure("steps meanwhile", len(steps(run)) - before)
        current, begun = max(steps(run)), time.monotonic()
        picture, fed = Picture(*SIZE), 0
        while step_of(picture) < current:
            assert terminal.read() and time.monotonic() - begun < 20, f"step {step_of(picture)} is shown, not {current}"
            picture.feed(terminal.raw[fed:])
            fed = len(terminal.raw)
        figure("current step after, s", round(time.monotonic() - begun, 2))
        assert send_command(run, "stop")["ok"] and wait(run, 60) == 0
        while "FINISHED" not in picture.row(0):
            assert terminal.read() and time.monotonic() - begun < 120, picture.row(0)
            picture.feed(terminal.raw[fed:])
            fed = len(terminal.raw)
        terminal.send(b"e")
        terminal.expect(b"Full series, not what is in view")
        terminal.send(b"c")
        (saved,) = until(lambda: terminal.read() and list((tmp_path / "exports").glob("*.csv")), "the export")
        until(lambda: terminal.read() and saved.read_text().count("\n") > len(steps(run)), "all of it")
    rows = [row for row in csv.DictReader(saved.read_text().splitlines()) if row["kind"] == "step"]
    logged = steps(run)
    assert [int(row["step"]) for row in rows] == sorted(logged) == list(range(1, len(logged) + 1))
    assert [float(row["value"]) for row in rows] == pytest.approx([logged[step].loss for step in sorted(logged)], rel=1e-6)
    assert [r.seq for r in read_records(run.metrics_path)] == list(range(1, len(list(read_records(run.metrics_path))) + 1))
