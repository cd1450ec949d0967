"""A screen on which nothing changes repaints nothing, so it sends nothing; and a change repaints what it concerns."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual.widget import Widget

from lumina_engine.monitoring import record as rec
from lumina_tui.application import LuminaApp, Start
from lumina_tui.feed import Mode
from lumina_tui.steady import Steady
from lumina_tui.terminal import Look
from lumina_tui.widgets.home_parts import FREE_SHARE, MATERIAL, MachineLine, machine_parts

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


@settings(deadline=None)
@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=100), st.floats(1e-3, 1e12))
def test_c138_a_steady_figure_is_never_off_by_the_band(values, band):
    steady = Steady()
    shown = [steady("x", value, band) for value in values]
    assert all(abs(value - figure) < band for value, figure in zip(values, shown, strict=True))
    assert all(after in (before, value) for before, after, value in zip(shown[:-1], shown[1:], values[1:], strict=True))


@settings(deadline=None)
@given(st.floats(0, 1e12), st.floats(1, 1e12), st.lists(st.floats(-0.49, 0.49), max_size=50), st.floats(1.001, 50))
def test_c138_jitter_is_painted_once_and_a_real_change_at_once(start, band, noise, jump):
    steady = Steady()
    first = steady("x", start, band)
    assert {steady("x", start + share * band, band) for share in noise} <= {first}
    changed = start + jump * band
    assert steady("x", changed, band) == changed
    assert {steady("x", changed + share * band, band) for share in noise} <= {changed}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 64 * 10**9), st.integers(0, 10**12)), min_size=1, max_size=30), st.integers(0, 2))
def test_c138_the_machine_line_is_never_far_from_the_truth(samples, live):
    steady = Steady()
    for used, free in samples:
        sample = rec.Hardware(cpu_count=2, memory_used=used, memory_total=64 * 10**9, disk_free=free, disk_total=10**12)
        _, _, memory, disk, _ = machine_parts(sample, live, steady)
        told = "mem " in memory
        assert told or (not live and used < (0.85 + MATERIAL) * 64e9)
        assert not told or live or used > (0.85 - MATERIAL) * 64e9
        if told:
            assert abs(int(memory.split()[1]) * 1e9 - used) <= MATERIAL * 64e9 + 0.5e9
        number, unit, *_ = disk.split()
        shown = float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
        assert abs(shown - free) <= min(MATERIAL * 1e12, FREE_SHARE * free) + 0.051 * shown + 1  # two digits are shown


async def test_c138_a_machine_that_jitters_is_painted_once(tmp_path, repaints, monkeypatch):
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "s"))
    old_run(tmp_path / "runs")
    app = LuminaApp(tmp_path / "runs", look=Look(hz=0.2))
    async with app.run_test(size=(120, 40)) as pilot:
        home = app.screen
        await until(pilot, lambda: home.rows)
        line = home.query_one(MachineLine)

        def sampled(used: float, free: float) -> None:
            total = rec.Hardware(memory_total=int(25e9), memory_used=int(used), disk_free=int(free), disk_total=int(270e9))
            monkeypatch.setattr(home.reader, "_hardware", lambda live: total)

        sampled(6e9, 84e9)
        await home._refresh()
        await pilot.pause()
        repaints.clear()
        for used, free in ((7e9, 84.4e9), (0.9e9, 83.6e9), (2.9e9, 85.1e9), (5.7e9, 83.9e9)):  # GB and GB, as measured
            sampled(used, free)
            await home._refresh()
            await pilot.pause()
        assert not repaints
        sampled(24e9, 60e9)
        await home._refresh()
        assert repaints == ["MachineLine#None"]
        assert "mem 24 of 25 GB" in line._text and "60 GB disk free" in line._text
