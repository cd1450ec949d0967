"""Panels of the Monitor: experts now and over time, devices through a fake NVML, ranks, step split, alerts, ends of runs."""

from __future__ import annotations

import math
import os
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.hardware import Nvml, Sampler
from lumina_engine.run.directory import RunDirectory
from lumina_tui.ending import Footprint, footprint, kill_run, outcome
from lumina_tui.facts import device_words, hardware_lines, rank_lines, rank_warning, split_bar, split_words, step_split
from lumina_tui.ranks import Beat, Ranks
from lumina_tui.series import RunStore
from lumina_tui.terminal import NAMED, Look
from lumina_tui.widgets.alert_table import AlertTable, alert_lines, alert_rows
from lumina_tui.widgets.expert_cells import DEAD, Ink, fewer_columns, row_cells, row_of, shares
from lumina_tui.widgets.expert_map import ExpertMap
from lumina_tui.widgets.run_panels import StatusLine
from lumina_tui.widgets.trend_panel import TrendPanel

from ..monitoring.test_hardware import FakeNvml
from .helpers import screen_text, until
from .stage import Stage
from .test_frame import HOSTILE_TEXT

INK = Ink(Look().palette, halves=True)
ASCII = Look(glyphs="ascii", palette=NAMED, ansi=True)


def store_of(*records: rec.Record) -> RunStore:
    store = RunStore()
    for seq, record in enumerate(records, start=1):
        record.seq, record.inc = seq, 1
    store.apply(records)
    return store


def observed(layers: int, experts: int, count: int, dead: int | None = None) -> list[rec.Record]:
    """Loads that rise with the expert's number; in the middle of the run one expert gets nothing."""
    records: list[rec.Record] = []
    for n in range(count):
        load = [[float(e + 1) for e in range(experts)] for _ in range(layers)]
        if dead is not None and n == count // 2:
            load[0][dead] = 0.0
        figures = {
            "dead": [row.count(0.0) for row in load],
            "entropy": [0.9] * layers,
            "dropped": [0.01] * layers,
            "bias_range": [0.02] * layers,
        }
        records.append(
            rec.Experts(step=10 * (n + 1), layers=list(range(layers)), load=load, confidence=[0.5] * layers, **figures)
        )
    return records


# ---- cells ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("experts", [1, 2, 7, 8, 64, 65, 256])
@pytest.mark.parametrize("room", [1, 2, 10, 40, 300])
def test_c132_every_expert_is_on_exactly_one_page(experts, room, halves):
    seen: list[int] = []
    column = 0
    while column < experts:
        row = row_of(experts, room, halves, column)
        assert row.width <= max(1, room) and row.first <= column < row.first + row.count
        cells = row_cells([1.0] * experts, [False] * experts, row, Ink(INK.palette, halves=halves), column)
        assert sum(len(text) for text, _ in cells) == row.width
        seen += range(row.first, row.first + row.count)
        column = row.first + row.count
    assert seen == list(range(experts))


@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize("dead", range(6))
def test_c132_a_dead_expert_is_never_hidden(per, dead):
    row = row_of(6, 6 if per == 1 else 3, per == 2, 0)
    assert row.per == per
    flags = [expert == dead for expert in range(6)]
    cells = row_cells([2.5] * 6, flags, row, INK, None)
    assert ["x" in text for text, _ in cells] == [dead in row.of(cell) for cell in range(len(cells))]


@pytest.mark.parametrize("columns", [1, 5, 40, 41, 256])
def test_c132_merged_columns_keep_deaths_and_extremes(columns):
    generator = np.random.default_rng(columns)
    share_TE = generator.random((columns, 4)).astype(np.float32) * 1.5 + 0.3
    dead_TE = np.zeros((columns, 4), bool)
    share_TE[columns // 2, 1], dead_TE[columns - 1, 2] = 9.0, True
    share, dead, starts = fewer_columns(share_TE, dead_TE, 10)
    assert len(share) == len(starts) <= 10 and share.max() == 9.0 and dead.sum() == 1
    stops = [*starts[1:], columns]
    assert all(share[i, e] in share_TE[a:b, e] for i, (a, b) in enumerate(zip(starts, stops, strict=True)) for e in range(4))


def test_c132_shares_of_nothing_are_unknown():
    assert shares([1.0, 3.0]) == [0.5, 1.5] and shares([]) == []
    assert all(math.isnan(value) for value in (*shares([0.0, 0.0]), *shares([math.inf, 1.0])))
    assert INK.cell(math.nan, False)[0] == " " and INK.cell(math.nan, True)[0] == DEAD


# ---- the map -------------------------------------------------------------------------------------------------------------


async def test_c132_a_layer_over_time(tmp_path):
    panel = ExpertMap(store_of(*observed(2, 8, 30, dead=3)))
    app = Stage(panel)
    async with app.run_test(size=(70, 20)) as pilot:
        panel.focus()
        panel.sync()
        await until(pilot, lambda: "experts 2 x 8" in screen_text(app))
        panel.action_over_time()
        await until(pilot, lambda: "L0 over time" in screen_text(app))
        lines = screen_text(app).split("\n")
        row = next(line for line in lines if line.startswith("│E3"))
        assert row.count("x") >= 1 and "0.89" in row  # 4 of a mean of 4.5
        assert any(line.startswith("│   10") and "300" in line for line in lines)
        panel.action_down()
        await until(pilot, lambda: "E1 0.44 x fair, steps 300 to 300" in screen_text(app))
        panel.action_over_time()
        await until(pilot, lambda: "experts 2 x 8" in screen_text(app))
        for title in ("max/mean", "entropy", "dead experts", "dropped share", "bias range", "confidence"):
            panel.action_figure()
            await until(pilot, lambda title=title: f"{title} over time" in screen_text(app))
        panel.action_over_time()
        await until(pilot, lambda: "L0 over time" in screen_text(app))
        panel.show(store_of(*observed(1, 4, 2)))
        await until(pilot, lambda: "experts 1 x 4" in screen_text(app))


@pytest.mark.parametrize("look", [Look(), ASCII], ids=["colour", "ascii"])
@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (2, 8), (16, 8), (61, 256), (3, 64)])
async def test_c132_each_view_at_each_size(look, layers, experts):
    panel = ExpertMap(store_of(*observed(layers, experts, 3)))
    app = Stage(panel, look)
    async with app.run_test(size=(100, 30)) as pilot:
        panel.focus()
        for size in ((100, 30), (30, 12), (200, 60), (20, 6), (10, 3), (3, 3), (1, 1)):
            await pilot.resize_terminal(*size)
            for move in ("over_time", "down", "right", "figure", "figure", "up", "left", "over_time", "over_time"):
                getattr(panel, f"action_{move}")()
            await pilot.pause()
        assert panel.text().count("\n") == layers + 1
        await pilot.resize_terminal(100, 30)
        panel.show(panel.store)
        await until(pilot, lambda: f"experts {layers} x {experts}" in screen_text(app))


async def test_c132_many_experts_share_cells_then_come_in_pages():
    panel = ExpertMap(store_of(*observed(4, 256, 1)))
    app = Stage(panel)
    async with app.run_test(size=(60, 12)) as pilot:
        panel.focus()
        panel.sync()
        await until(pilot, lambda: "▀▀▀▀" in screen_text(app) and "of 256" in screen_text(app))
        panel._move(0, 200)
        await until(pilot, lambda: "L0 E200" in screen_text(app))


async def test_c132_figures_beside_a_layer_where_there_is_room():
    panel = ExpertMap(store_of(*observed(10, 8, 1)))
    app = Stage(panel)
    async with app.run_test(size=(90, 16)) as pilot:
        panel.sync()
        await until(pilot, lambda: "max" in screen_text(app))
        for part in ("dead", "entr.", "drop", "bias", "conf", "1.0 %", "0.020", "0.50", "1.78"):
            assert part in screen_text(app), part


# ---- devices and host ----------------------------------------------------------------------------------------------------


def text_of(words) -> str:
    return "".join(text for text, _ in words)


def test_c131_devices_as_nvml_tells_them():
    nvml = FakeNvml(2)
    store = store_of(Sampler(nvml=Nvml(nvml)).sample(), Sampler(nvml=Nvml(nvml)).sample())
    lines = [text_of(line) for line in hardware_lines(store, 120, False, 9, sparks=True)]
    assert lines[0].startswith("gpu0   97 %  0 of 80 GB    352 of 700 W  61 C  link 3.07 kB/s in 2.05 kB/s out")
    assert lines[0].rstrip().endswith("██") and lines[1].startswith("gpu1   96 %  0 of 80 GB  ")
    assert "W" not in lines[1] and "link" not in lines[1] and " - " in lines[1], "what a device does not offer is unknown"
    host = " ".join(lines[2:])
    assert "cpu " in host and "mem " in host and "run " in host and "disk " in host


def test_c131_a_device_at_its_limits_stands_out():
    device = rec.Device(index=3, name="x", power=699.0, power_limit=700.0, temperature=91.0)
    roles = {text.strip(): role for text, role in device_words(device, RunStore(), 100, False, False)}
    assert roles["699 of 700 W"] == "warn" and roles["91 C"] == "bad"


def test_c131_more_devices_than_lines():
    store = store_of(rec.Hardware(devices=[rec.Device(index=i, name="x") for i in range(16)], cpu=1.0))
    lines = [text_of(line) for line in hardware_lines(store, 60, False, 6)]
    assert len(lines) == 6 and lines[4] == "and 12 more devices"


def test_c131_unknown_is_a_dash_and_never_zero():
    lines = [
        text_of(line) for line in hardware_lines(store_of(rec.Hardware(devices=[rec.Device(index=0, name="x")])), 90, False, 9)
    ]
    assert "0" not in lines[0][5:] and lines[0].count("-") == 4 and lines[1].strip() == "cpu -  mem -"


def test_c131_ranks_that_are_late_or_dead_come_first():
    ranks = Ranks([Beat(0, 813, "forward", 1.0), Beat(1, 812, "backward", 90.0), Beat(2, 811, connected=False)], 3)
    lines = rank_lines(ranks, 5)
    assert [text_of(line)[:10] for line in lines] == ["rank 2  DE", "rank 1  LA", "rank 0  fo"]
    assert [line[-1][1] for line in lines] == ["bad", "warn", "text"]
    many = rank_lines(Ranks([Beat(rank, 5, "forward", 0.1) for rank in range(64)], 64), 4)
    assert [text_of(line) for line in many] == ["64 ranks, step 5: forward"]
    assert rank_warning(Ranks([Beat(1, 812, "backward", 90.0)])) == "rank 1 is 1 m 30 s in backward of step 812"
    assert "the others wait" in rank_warning(ranks) and rank_warning(Ranks([])) == "" and rank_lines(Ranks([]), 3) == []


# ---- the split of a step -------------------------------------------------------------------------------------------------


def steps(**times: float | None) -> RunStore:
    return store_of(*(rec.Step(step=n, loss=1.0, step_time=0.2, **times) for n in range(1, 11)))


def test_c131_shares_of_a_step_add_up():
    parts = step_split(steps(data_time=0.01, forward_time=0.06, backward_time=0.1, optimizer_time=0.02).steps)
    assert [part.name for part in parts] == ["data", "forward", "backward", "optimizer", "other"]
    assert [round(part.share, 3) for part in parts] == [0.05, 0.3, 0.5, 0.1, 0.05]
    assert text_of(split_words(parts, 80)) == "data 5 %  forward 30 %  backward 50 %  optimizer 10 %  other 5 %  "
    assert text_of(split_words(parts, 46)) == "data 5  fwd 30  bwd 50  opt 10  other 5 %  "
    assert text_of(split_words(parts, 30)) == "d 5  f 30  b 50  o 10  . 5  "
    for width in range(5, 60):
        bar = text_of(split_bar(parts, width))
        assert len(bar) == width and set(bar) == set("dfbo."), "what is small is seen too"
    assert text_of(split_bar(parts, 0)) == ""


def test_c131_a_split_that_is_not_known_is_not_shown():
    assert step_split(steps(data_time=0.01).steps) == [] and step_split(RunStore().steps) == []
    only = step_split(steps(data_time=0.01, forward_time=0.1, backward_time=0.05).steps)
    assert [part.name for part in only] == ["data", "forward", "backward", "other"]


async def test_c131_rate_with_utilisation_where_it_is_known():
    store = store_of(rec.Step(step=1, tokens_per_s=81_200.0, mfu=0.413, step_time=0.5))
    panel = TrendPanel()
    app = Stage(panel)
    async with app.run_test(size=(80, 9)) as pilot:
        panel.show(store)
        await until(pilot, lambda: "81.2 k MFU 41 %" in screen_text(app))
        panel.show(steps())
        await until(pilot, lambda: "MFU" not in screen_text(app) and "step" in screen_text(app))


# ---- alerts --------------------------------------------------------------------------------------------------------------


async def test_alert_table_shows_newest_first_with_advice():
    table = AlertTable()
    app = Stage(table)
    async with app.run_test(size=(80, 12)) as pilot:
        table.show(RunStore())
        await until(pilot, lambda: "No alerts in this run." in screen_text(app))
        alerts = [
            rec.Alert(severity="warning", code="one", message="first", recommendation="Do this.", step=5),
            rec.Alert(severity="critical", code=HOSTILE_TEXT, message=HOSTILE_TEXT, recommendation=HOSTILE_TEXT),
        ]
        table.show(store_of(*alerts))
        await until(pilot, lambda: "first" in screen_text(app))
        text = screen_text(app)
        assert text.index("critical") < text.index("first") < text.index("Do this.")
        assert all(c.isprintable() or c == "\n" for c in text)


def test_the_step_of_an_alert_is_told_once():
    """Some messages begin with it, for those who read them without the record."""
    alert = rec.Alert(severity="info", code="rebalance", message="step 210: layer 1 drops", step=210, t=1.0)
    row = alert_rows([alert], advice=False)[0]
    assert [text for text, _ in row.cells[2:]] == ["210", "rebalance", "layer 1 drops"]
    assert alert_lines(alert)[1] == [("layer 1 drops", "text")]
    feed = SimpleNamespace(requests=[], error=None, ranks=Ranks([]), reader=SimpleNamespace(errors=[]), store=store_of(alert))
    line = StatusLine()
    line.feed = feed
    words = "".join(text for text, _ in line._now())
    assert words.endswith("info rebalance 210: layer 1 drops.")
    assert (
        alert_lines(rec.Alert(severity="info", code="x", message="step 21: elsewhere", step=2))[1][0][0] == "step 21: elsewhere"
    )


# ---- the end of a run ----------------------------------------------------------------------------------------------------


class Busy(FakeNvml):
    """Knows what processes hold on the devices."""

    def __init__(self, held: dict[int, int]) -> None:
        super().__init__(1)
        self.held = held

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.held.items()]

    nvmlDeviceGetComputeRunningProcesses_v3 = nvmlDeviceGetComputeRunningProcesses


@pytest.mark.row("PS15")
def test_c134_a_kill_ends_the_tree_and_says_what_it_freed(tmp_path):
    run = RunDirectory.create(tmp_path, "r")
    run.update_identity(nonce="0123456789abcdef")
    environment = {**os.environ, "LUMINA_NONCE": "0123456789abcdef"}
    children = [
        subprocess.Popen(["sleep", "600"], env=environment, start_new_session=detached, stdout=subprocess.DEVNULL)
        for detached in (False, True)
    ]
    stranger = subprocess.Popen(["sleep", "600"], env={**environment, "LUMINA_NONCE": "other"})
    try:
        deadline = time.monotonic() + 20
        while len(footprint(run).pids) < 2:
            assert time.monotonic() < deadline
        held = {child.pid: 30_000_000_000 for child in children}
        before = footprint(run, Nvml(Busy({**held, stranger.pid: 7})))
        assert sorted(before.pids) == sorted(child.pid for child in children)
        assert before.host_bytes == sum(psutil.Process(child.pid).memory_info().rss for child in children)
        assert before.device_bytes == 60_000_000_000
        kill_run(run)
        after = footprint(run, Nvml(Busy({stranger.pid: 7})))
        assert not after.pids and stranger.poll() is None, "only the run's own processes end"
        assert outcome(before, after).startswith("all 2 processes are gone, 60 GB of device memory freed, ")
    finally:
        for child in (*children, stranger):
            child.kill()
            child.wait()


def test_c134_survivors_are_named_and_unknown_memory_is_not_mentioned():
    text = outcome(Footprint((5, 6), 3_000_000, None), Footprint((6,), 1_000_000, None))
    assert text == "still alive: process 6 (pid), 2.00 MB of host memory freed"
    assert outcome(Footprint(), Footprint()) == "no process is left"
    assert outcome(Footprint((5,), 10, None), Footprint()) == "1 process is gone, 10 B of host memory freed"
