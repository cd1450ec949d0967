"""`bench supervise` measures: every figure is there and comes from the runs that it made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_bench_supervise_gives_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    words = [sys.executable, "-m", "lumina_engine.cli", "bench", "supervise", "--seconds", "1.5", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    figures = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert {figure["row"] for figure in figures.values()} == {"MX01", "PS01", "PS03", "PS13"}
    assert figures["lost"]["value"] == 0
    assert all(figure["value"] > 0 for name, figure in figures.items() if name != "lost")


def test_bench_supervise_refuses_a_senseless_time() -> None:
    words = [sys.executable, "-m", "lumina_engine.cli", "bench", "supervise", "--seconds", "0"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "0.5 to 600" in done.stderr
