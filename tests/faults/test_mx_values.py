"""Odd values and endless names in a log (MX07), and a flood of records (MX01)."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import LogReader, MetricLog, read_records
from lumina_tui import series
from lumina_tui.series import RunStore
from tests.hostile import PAYLOADS

NUMBERS = [math.nan, math.inf, -math.inf, 1e308, -1e308, 1e-45, 5e-324, 0.0, -0.0, 2**53 + 1, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_mx07_a_number_comes_back_as_it_was(tmp_path: Path, number: float) -> None:
    path = tmp_path / "m"
    with MetricLog(path, 1, sync_interval=0) as log:
        log.emit(rec.Step(step=1, loss=number, tokens=number if isinstance(number, int) else 0))
    json.loads(path.read_bytes(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (record,) = read_records(path)
    assert isinstance(record, rec.Step) and isinstance(record.loss, float)
    assert repr(record.loss) == repr(float(number)) and (not isinstance(number, int) or record.tokens == number)
    store = RunStore()
    store.apply([record])
    shown = float(store.steps.metrics["loss"].values[-1])
    assert math.isnan(shown) if abs(number) > 3e38 or math.isnan(number) else shown == pytest.approx(number, rel=1e-6)


HUGE = "9" * 400
LINES = [
    '{"type":"step","seq":1,"step":%s}',
    '{"type":"step","seq":1,"step":1,"tokens":%s}',
    '{"type":"step","seq":%s,"step":1}',
    '{"type":"eval","seq":1,"step":%s}',
    '{"type":"experts","seq":1,"step":%s,"layers":[1],"load":[[1]]}',
    '{"type":"experts","seq":1,"step":1,"layers":[%s],"load":[[1]]}',
]


@pytest.mark.parametrize("number", [HUGE, str(2**63), str(-(2**63) - 1)], ids=len)
@pytest.mark.parametrize("line", LINES)
def test_mx07_an_integer_beyond_64_bits_makes_a_line_no_record(tmp_path: Path, line: str, number: str) -> None:
    """Such a line ended the viewer: its columns hold 64 bits."""
    path = tmp_path / "m"
    path.write_text(line % number + '\n{"type":"step","seq":2,"step":2}\n')
    reader = LogReader(path)
    records = reader.read_new()
    assert [record.seq for record in records] == [2] and len(reader.errors) == 1
    store = RunStore()
    store.apply(records)
    assert store.step == 2


def test_mx07_endless_names_are_capped_with_one_warning() -> None:
    """500 new names in each record: 10,000 are kept, one alert says that there were more."""
    store = RunStore()
    for turn in range(60):
        devices = [rec.Device(index=500 * turn + i, name="x", utilisation=1.0) for i in range(500)]
        store.apply([rec.Hardware(seq=2 * turn + 1, devices=devices)])
        layers = list(range(500 * turn, 500 * turn + 500))
        store.apply([rec.Experts(seq=2 * turn + 2, step=turn + 1, layers=layers, load=[[1.0, 2.0]] * 500)])
    assert len(store.usage) == len(store.layers) == series.MAX_NAMES == 10_000
    assert [alert.code for alert in store.alerts] == ["too_many_names"]


@pytest.mark.parametrize(
    "name", ["x" * 10_000, "ключ", "名前", "\ud800", *list(PAYLOADS)[:8]], ids=lambda name: repr(name)[:16]
)
def test_mx07_hostile_names_are_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m"
    with MetricLog(path, 1, sync_interval=0) as log:
        log.emit(rec.Eval(step=1, loss=1.0, tasks={name: 2.0}))
        log.emit(rec.Alert(severity="warning", code=name, message=name))
        log.emit(rec.Note(message="after"))
    records = list(read_records(path))
    assert [record.seq for record in records] == [1, 2, 3]
    store = RunStore()
    store.apply(records)
    assert store.seq == 3


def test_mx01_a_flood_is_written_and_followed_without_a_loss(tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    """100,000 records of 16 metrics by four threads, a reader beside them; the rate belongs to `bench supervise`."""
    path, total = tmp_path / "m", 100_000
    log = MetricLog(path, 1, sync_interval=0.5)

    def flood() -> None:
        for number in range(total // 4):
            log.emit(
                rec.Step(
                    step=number, loss=1.0, aux_loss=1.0, z_loss=1.0, lr=1.0, grad_norm=1.0, step_time=1.0, tokens_per_s=1.0,
                    mfu=1.0, seq_length=1, batch=1, data_time=1.0, forward_time=1.0, backward_time=1.0, optimizer_time=1.0,
                    tokens=1,
                )
            )  # fmt: skip

    writers = [threading.Thread(target=flood) for _ in range(4)]
    for writer in writers:
        writer.start()
    reader, seen = LogReader(path), 0
    while any(writer.is_alive() for writer in writers) or seen < total:
        for record in reader.read_new():
            seen += 1
            assert record.seq == seen
        if seen < total and not any(writer.is_alive() for writer in writers) and path.stat().st_size == reader.offset:
            break
    log.close()
    assert (seen, log.lost, reader.errors) == (total, 0, [])
    figure("records", total)
