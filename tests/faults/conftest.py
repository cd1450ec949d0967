"""Real runs in folders of their own, nothing of them left behind. The options and marks are in plugin.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.run.directory import RunDirectory
from tests.runs_end import end_runs, socket_place

from .injector import Fault
from .tiny_run import prepare, start


class TinyRuns:
    """Makes, starts and ends runs of the tiny model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: list[RunDirectory] = []

    def make(self, name: str = "r", faults: Sequence[Fault] = (), world: int = 1, **keys: Any) -> RunDirectory:
        run = prepare(self.root, name, faults, world, **keys)
        self.made.append(run)
        return run

    def running(
        self,
        name: str = "r",
        faults: Sequence[Fault] = (),
        world: int = 1,
        settings: dict[str, Any] | None = None,
        **keys: Any,
    ) -> RunDirectory:
        """A started run. `settings` are the supervisor's (`policy.Settings`); restarts are without pause unless they say so."""
        return start(self.make(name, faults, world, **keys), world=world, **{"restart_pause_s": 0.01, **(settings or {})})


@pytest.fixture
def tiny_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyRuns]:
    """A factory of real tiny runs under tmp_path; sockets in a short folder of the test's own."""
    with socket_place("f") as sockets:
        monkeypatch.setenv("LUMINA_SOCKETS", str(sockets))
        monkeypatch.setenv("LUMINA_RUNS", str(tmp_path))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        made = TinyRuns(tmp_path)
        yield made
        end_runs(made.made)
