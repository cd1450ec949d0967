"""The column cache of a long log: what comes from it and the rest of the log is what comes from the log alone."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import struct
import time
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import LogReader, MetricLog, sampled_records
from lumina_engine.run.directory import RunDirectory
from lumina_tui import columns
from lumina_tui.feed import Feed, Mode
from lumina_tui.history import History
from lumina_tui.long_log import read_whole
from lumina_tui.routing import RoutingHistory
from lumina_tui.series import RunStore

from .fake_engine import FakeEngine
from .test_feed import attached, same, wait


def content(value: Any) -> Any:
    """All that a store holds, as plain values; version counters count batches and are left out."""
    if isinstance(value, RoutingHistory):
        return {name: array.tolist() for name, array in value.to_arrays().items()}
    if isinstance(value, History | RunStore) or dataclasses.is_dataclass(value):
        return {k: content(v) for k, v in vars(value).items() if not k.endswith("version") and k != "_smooth"}
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    if isinstance(value, rec._Record):
        return repr(value)
    if hasattr(value, "values") and not isinstance(value, np.ndarray):
        value = value.values
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.tolist()]
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        return [content(item) for item in value]
    return value


def read(
    run: RunDirectory, store: RunStore | None = None, offset: int = 0, stop: int | None = None
) -> tuple[RunStore, LogReader]:
    store, reader = store or RunStore(), LogReader(run.metrics_path, offset)
    records = []
    while found := reader.read_new():
        records += found
    store.apply(records[:stop])
    return store, reader


number = st.one_of(st.none(), st.floats(width=32), st.sampled_from([math.nan, math.inf]))
row = st.fixed_dictionaries({"tokens": st.integers(0, 10**12), "loss": number, "grad_norm": number, "step_time": number})
load = st.lists(st.lists(st.floats(0, 1e6), min_size=4, max_size=4), min_size=2, max_size=2)
EVENTS = st.one_of(
    *[st.tuples(st.just("step"), row)] * 3,
    st.tuples(st.just("eval"), st.fixed_dictionaries({"loss": number, "perplexity": number})),
    st.tuples(st.just("experts"), st.fixed_dictionaries({"layers": st.just([0, 3]), "load": load, "dead": st.just([0, 1])})),
    st.tuples(st.just("alert"), st.fixed_dictionaries({"message": st.text(max_size=5)})),
    st.tuples(st.just("checkpoint"), st.fixed_dictionaries({"failed": st.sampled_from([None, "disk"])})),
    st.tuples(st.just("change"), st.fixed_dictionaries({"before": number, "id": st.sampled_from([None, "a", "b"])})),
    st.tuples(st.just("rewind"), st.integers(0, 20)),
    st.tuples(st.just("again"), st.integers(0, 20)),
    st.tuples(st.just("run"), st.sampled_from(["running", "failed"])),
    st.tuples(st.just("hardware"), number),
)


def records_of(events: list[tuple[str, Any]], step: int = 0) -> list[rec.Record]:
    """A log as a trainer could write it: each record belongs to the step before it; rewinds and repeats go back."""
    found: list[rec.Record] = []
    for kind, values in events:
        match kind:
            case "step":
                step += 1
                found.append(rec.Step(step=step, **values))
            case "eval" | "experts" | "checkpoint" if step:
                found.append(rec.RECORD_TYPES[kind](step=step, **values))
            case "alert":
                found.append(rec.Alert(severity="warning", code="x", step=step, **values))
            case "change":
                found.append(rec.Change(what="lr", **values))
            case "rewind":
                step = max(0, step - values)
                found.append(rec.Rewind(to_step=step))
            case "again":  # no rewind was written: the step simply comes again
                step = max(0, step - values)
            case "run":
                found.append(rec.Run(state=values, total_steps=60))
            case "hardware":
                found.append(rec.Hardware(cpu=values, devices=[rec.Device(index=0, name="d", utilisation=math.nan)]))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EVENTS, max_size=60), st.integers(0, 60), st.integers(1, 3))
def test_c133_cache_and_tail_equal_the_log(tmp_path, events, cut, incarnations):
    records = records_of(events)
    run = RunDirectory.create(tmp_path, f"run-{time.monotonic_ns()}")
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        for record in records[:cut]:
            log.emit(record)
    store, reader = read(run)
    assert columns.write(run, columns.snapshot(store), reader.offset, reader.errors)
    with MetricLog(run.metrics_path, incarnations, sync_interval=0) as log:
        for record in records[cut:]:
            log.emit(record)
    cached = columns.load(run)
    assert cached is not None and cached.offset == reader.offset
    got, _ = read(run, cached.store, cached.offset)
    whole, _ = read(run)
    np.testing.assert_equal(content(got), content(whole))


def long_run(root: Path, steps: int = 4000, name: str = "long") -> FakeEngine:
    engine = FakeEngine(root, name, total_steps=None)
    engine.state("running")
    for n in range(steps // 500):
        engine.steps(500)
        engine.experts()
        engine.emit(rec.Eval(step=engine.step_number, loss=2.0 + n))
        engine.emit(rec.Alert(severity="warning", code="x", message=f"alert {n}", step=engine.step_number))
    return engine


@pytest.fixture
def small_caches(monkeypatch):
    """Logs of a few hundred KiB count as long."""
    monkeypatch.setattr(columns, "LEAST", 1 << 16)
    monkeypatch.setattr(columns, "GROWN", 1 << 16)


async def test_c133_a_long_log_comes_from_its_cache(tmp_path, small_caches, monkeypatch):
    async with long_run(tmp_path) as engine:
        async with attached(engine) as feed:
            await wait(lambda: feed.mode is Mode.LIVE)
            assert not feed.store.preview
            same(feed)
        assert columns.cache_path(engine.run.metrics_path).exists()
        engine.steps(50)
        read_from = []
        original = LogReader.read_new
        monkeypatch.setattr(
            LogReader, "read_new", lambda self, limit=0: (read_from.append(self.offset), original(self, limit))[1]
        )
        async with attached(engine) as feed:
            await wait(lambda: feed.mode is Mode.LIVE)
            assert min(read_from) > 500_000  # the tail only
            same(feed)
            fresh, _ = read(engine.run)
            assert content(feed.store.alerts) == content(fresh.alerts) and content(feed.store.events) == content(fresh.events)


async def test_a_feed_that_may_not_write_uses_a_cache_but_makes_none(tmp_path, small_caches):
    async with long_run(tmp_path) as engine:
        feed = Feed(RunDirectory(engine.run.path), caching=False)
        feed.start()
        await wait(lambda: feed.mode is Mode.LIVE)
        await feed.close()
        assert not columns.cache_path(engine.run.metrics_path).exists()


async def test_c133_a_preview_stands_in_until_all_is_read(tmp_path, small_caches, monkeypatch):
    """It is labelled, and replaced in the same store, so that charts keep their zoom and crosshair."""
    seen = []

    def slow(reader: LogReader, told: MethodType, together: int) -> RunStore:
        feed, store = told.__self__, told.__self__.store
        assert feed.shown.is_set() and not feed.opened.is_set()
        seen.append((store.preview, len(store.steps), store.total_steps, store.step, feed.mode))
        return read_whole(reader, told, together)

    monkeypatch.setattr("lumina_tui.feed.read_whole", slow)
    async with long_run(tmp_path, 20_000) as engine:
        engine.emit(rec.Run(state="running", total_steps=20_000))
        async with attached(engine) as feed:
            store = feed.store
            await wait(lambda: feed.mode is Mode.LIVE)
            ((preview, points, total, step, mode),) = seen
            assert preview and mode is Mode.LOADING and 2000 < points < 20_000 and (total, step) == (20_000, 20_000)
            assert feed.store is store and not store.preview and feed.opened.is_set()
            same(feed)


async def test_rs10_a_rewind_while_the_preview_is_shown(tmp_path, small_caches, monkeypatch):
    async with long_run(tmp_path) as engine:

        def slow(*given: Any) -> RunStore:
            engine.emit(rec.Rewind(to_step=1000, reason="resumed"))
            engine.step_number = 1000
            engine.steps(20)
            return read_whole(*given)

        monkeypatch.setattr("lumina_tui.feed.read_whole", slow)
        async with attached(engine) as feed:
            await wait(lambda: feed.mode is Mode.LIVE)
            assert feed.store.step == 1020 and len(feed.store.tails) == 1
            same(feed)


def cached_run(root: Path) -> tuple[RunDirectory, Path]:
    engine = long_run(root, 1000)
    store, reader = read(engine.run)
    assert columns.write(engine.run, columns.snapshot(store), reader.offset, [])
    return engine.run, columns.cache_path(engine.run.metrics_path)


@pytest.mark.row("MX04")
def test_ps06_a_damaged_cache_is_ignored_and_written_anew(tmp_path):
    run, path = cached_run(tmp_path)
    good = path.read_bytes()
    assert columns.load(run) is not None
    rng = np.random.default_rng(3)
    places = [0, 9, 13, 40, *rng.integers(0, len(good), 200).tolist()]
    for at in places:
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        assert columns.load(run) is None, at
    for length in (len(good), 1 << 31, (1 << 32) - 1):  # a length that the file does not have asks for no memory
        path.write_bytes(good[:8] + struct.pack("<I", length) + good[12:])
        assert columns.load(run) is None, length
    for size in (0, 5, 16, 200, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        assert columns.load(run) is None, size
    path.unlink()
    assert columns.load(run) is None
    store, reader = read(run)
    assert columns.write(run, columns.snapshot(store), reader.offset, []) and columns.load(run) is not None
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "arrays", [[("|O", [4])], [("<f4", [1 << 60])], [("<f4", [-1])], [("nonsense", [1])], [("<M8[s]", [1])]]
)
def test_a_cache_with_arrays_of_other_kinds_is_ignored(tmp_path, arrays):
    """Whole and with the right sums, but not ours: never objects, never more than the file has."""
    run, path = cached_run(tmp_path)
    data = path.read_bytes()
    _, length, _ = columns._LEAD.unpack(data[: columns._LEAD.size])
    head = columns.msgspec.msgpack.decode(data[columns._LEAD.size : columns._LEAD.size + length], type=columns.Head)
    head.arrays = [*arrays, *head.arrays]
    made = columns.msgspec.msgpack.encode(head)
    lead = columns._LEAD.pack(columns.MAGIC, len(made), columns.zlib.crc32(made))
    path.write_bytes(lead + made + data[columns._LEAD.size + length :])
    assert columns.load(run) is None


def test_a_cache_of_another_log_is_ignored(tmp_path):
    run, _ = cached_run(tmp_path)
    lines = run.metrics_path.read_bytes()
    identity = run.identity()
    run.update_identity(id="0123456789ab")  # the same place, another run
    assert columns.load(run) is None
    run.write_identity(identity)
    assert columns.load(run) is not None
    other = run.metrics_path.with_name("copy")
    other.write_bytes(lines)
    other.replace(run.metrics_path)  # the same bytes in another file
    assert columns.load(run) is None
    store, reader = read(run)
    assert columns.write(run, columns.snapshot(store), reader.offset, [])
    with run.metrics_path.open("r+b") as file:
        file.truncate(len(lines) - 10)  # shorter
    assert columns.load(run) is None
    with run.metrics_path.open("r+b") as file:
        file.seek(len(lines) - 200)
        file.write(b"9")  # as long, but not the same at its end
        file.truncate(len(lines))
    assert columns.load(run) is None


def test_a_cache_with_other_columns_is_ignored(tmp_path, monkeypatch):
    run, _ = cached_run(tmp_path)
    monkeypatch.setattr(columns.history, "BASES", ("step",))
    assert columns.load(run) is None


def test_a_store_that_is_cut_meanwhile_is_not_written(tmp_path):
    run, path = cached_run(tmp_path)
    path.unlink()
    store, reader = read(run)
    taken = columns.snapshot(store)
    store.apply([rec.Rewind(seq=10**6, inc=1, to_step=10)])
    assert not columns.write(run, taken, reader.offset, []) and not list(path.parent.iterdir())


def test_all_caches_together_stay_within_their_limit(tmp_path):
    place = tmp_path / "columns"
    place.mkdir()
    for age, name in enumerate(("new", "middle", "old")):
        (place / f"{name}.columns").write_bytes(bytes(1000))
        os.utime(place / f"{name}.columns", (1e9 - age, 1e9 - age))
    for name, age in ((".half.columns.aa", 7200), (".now.columns.bb", 0)):
        (place / name).write_bytes(bytes(9000))
        os.utime(place / name, (time.time() - age, time.time() - age))
    columns.prune(place, 2500)
    assert {entry.name for entry in place.iterdir()} == {"new.columns", "middle.columns", ".now.columns.bb"}


def test_a_disk_that_refuses_costs_only_the_cache(tmp_path, monkeypatch):
    engine = long_run(tmp_path, 1000)
    store, reader = read(engine.run)
    place = columns.folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file where the folder should be")
    assert not columns.write(engine.run, columns.snapshot(store), reader.offset, [])
    assert columns.load(engine.run) is None


def test_a_sample_spans_the_log_and_has_its_end_in_full(tmp_path):
    engine = long_run(tmp_path, 5000)
    with engine.run.metrics_path.open("ab") as file:
        file.write(b'{"type":"step","seq":99999,"step":9')  # a torn line
    everything = {r.seq: r for r in read_all(engine.run)}
    found = sampled_records(engine.run.metrics_path, 100, near_end=50_000)
    numbers = [record.seq for record in found]
    assert numbers == sorted(set(numbers)) and set(numbers) <= set(everything)
    assert numbers[0] == 1 and numbers[-1] == max(everything)
    run_on = np.diff(numbers).tolist()
    assert max(run_on) < 3 * len(everything) / 100 and run_on[-100:] == [1] * 100
    assert sampled_records(tmp_path / "none") == []
    short = FakeEngine(tmp_path, "short")
    short.steps(3)
    assert [r.seq for r in sampled_records(short.run.metrics_path)] == [1, 2, 3]


def read_all(run: RunDirectory) -> list[rec.Record]:
    reader, records = LogReader(run.metrics_path), []
    while found := reader.read_new():
        records += found
    return records


async def test_closing_while_a_log_is_read_leaves_at_once(tmp_path, small_caches, monkeypatch):
    engine = long_run(tmp_path, 4000)
    monkeypatch.setattr("lumina_tui.long_log.SLICE", 1 << 16)
    feed = Feed(RunDirectory(engine.run.path))
    feed.start()
    await wait(lambda: feed.progress > 0)
    await feed.close()
    await asyncio.sleep(0)
    assert not columns.cache_path(engine.run.metrics_path).exists() or not feed.store.preview
