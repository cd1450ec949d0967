"""Runs with a fake worker, each in a folder of its own, and nothing of them left behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.run import launch
from lumina_engine.run.directory import RunDirectory
from tests.runs_end import end_runs, socket_place
from tests.waiting import until

WORKER = str(Path(__file__).with_name("fake_worker.py"))


class Runs:
    """Makes, starts and ends runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: list[RunDirectory] = []

    def make(self, name: str = "r", **plan: Any) -> RunDirectory:
        run = RunDirectory.create(self.root, name)
        (run.path / "plan.json").write_text(json.dumps(plan))
        self.made.append(run)
        return run

    def start(self, run: RunDirectory, resume: bool = False, **settings: Any) -> RunDirectory:
        launch.start(run, [sys.executable, WORKER, str(run.path)], resume=resume, settings=settings)
        return run

    def running(self, name: str = "r", settings: dict[str, Any] | None = None, **plan: Any) -> RunDirectory:
        run = self.start(self.make(name, **plan), **(settings or {}))
        until(lambda: run.info().state == "running", "the run to run")
        return run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """A factory of runs under tmp_path; sockets in a short folder of the test's own."""
    with socket_place("t") as sockets:
        monkeypatch.setenv("LUMINA_SOCKETS", str(sockets))
        monkeypatch.setenv("LUMINA_RUNS", str(tmp_path))
        made = Runs(tmp_path)
        yield made
        end_runs(made.made)
