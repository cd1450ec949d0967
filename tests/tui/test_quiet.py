"""A screen on which nothing changes repaints nothing, so it sends nothing; and a change repaints what it concerns."""

from __future__ import annotations

import os
import time

import pytest
from textual.widget import Widget

from lumina_engine.monitoring import record as rec
from lumina_tui.application import LuminaApp, Start
from lumina_tui.feed import Mode
from lumina_tui.terminal import Look

from .fake_engine import FakeEngine
from .helpers import until


@pytest.fixture
def repaints(monkeypatch):
    """The widgets that were asked to repaint."""
    seen: list[str] = []
    original = Widget.refresh

    def refresh(self: Widget, *regions: object, **how: object) -> Widget:
        if self.is_attached and self.display:
            seen.append(f"{type(self).__name__}#{self.id}")
        return original(self, *regions, **how)

    monkeypatch.setattr(Widget, "refresh", refresh)
    return seen


def old_run(root) -> FakeEngine:
    engine = FakeEngine(root)
    engine.state("running")
    engine.steps(50)
    engine.experts()
    engine.hardware()
    engine.emit(rec.Run(state="finished", exit_code=0))
    engine.run.update_identity(state="finished", exit_code=0)
    long_ago = time.time() - 10 * 86_400  # an age in days
    for path in engine.run.path.iterdir():
        os.utime(path, (long_ago, long_ago))
    return engine


async def test_c138_an_idle_home_repaints_nothing(tmp_path, repaints, monkeypatch):
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    old_run(tmp_path / "runs")
    app = LuminaApp(tmp_path / "runs", look=Look(hz=0.2))
    async with app.run_test(size=(120, 40)) as pilot:
        home = app.screen
        await until(pilot, lambda: home.rows)
        await home._refresh()
        await pilot.pause()
        repaints.clear()
        for _ in range(3):
            await home._refresh()
            await pilot.pause()
        assert not repaints


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
async def test_c138_a_finished_run_repaints_nothing(tmp_path, repaints, size):
    engine = old_run(tmp_path)
    app = LuminaApp(tmp_path, look=Look(hz=0.2), start=Start(run=engine.run.path))
    async with app.run_test(size=size) as pilot:
        monitor = app.screen
        await until(pilot, lambda: monitor.feed and monitor.feed.mode is Mode.FILE and len(monitor.store.steps) == 50)
        for _ in range(3):  # titles and states settle
            monitor.tick()
            await pilot.pause()
        repaints.clear()
        for _ in range(5):
            monitor.tick()
            await pilot.pause()
        assert not repaints
        monitor.store.apply([rec.Step(seq=1000, inc=1, t=time.time(), step=51, loss=9.0)])
        monitor.tick()
        assert any("LineChart" in name for name in repaints)
