"""Feed and store against a scripted run: file and socket together give every record once, whatever happens between."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import last_records, read_records, surviving
from lumina_engine.run.directory import RunDirectory
from lumina_tui import feed as feeds
from lumina_tui.feed import Feed, Mode
from lumina_tui.requests import Phase

from .fake_engine import FakeEngine


async def wait(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def attached(engine: FakeEngine) -> AsyncIterator[Feed]:
    feed = Feed(RunDirectory(engine.run.path))
    feed.start()
    try:
        yield feed
    finally:
        await feed.close()


def expected_steps(path: Path) -> list[tuple[int, float]]:
    kept = [r for r in surviving(read_records(path)) if isinstance(r, rec.Step)]
    return [(r.step, float(np.float32(r.loss if r.loss is not None and math.isfinite(r.loss) else math.nan))) for r in kept]


def got_steps(feed: Feed) -> list[tuple[int, float]]:
    return list(zip(feed.store.steps.step.values.tolist(), feed.store.steps.metrics["loss"].values.tolist(), strict=True))


def same(feed: Feed) -> None:
    np.testing.assert_equal(got_steps(feed), expected_steps(feed.run.metrics_path))


async def test_c133_file_then_live_gives_every_record_once(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(500)
        async with attached(engine) as feed:
            await wait(lambda: feed.mode is Mode.LIVE)
            engine.steps(200)
            await wait(lambda: feed.store.step == 700)
            same(feed)
            assert feed.badge().text.startswith("LIVE") and feed.gaps == 0


async def test_mx05_no_file_is_asked_for_its_length_on_the_event_loop(tmp_path, monkeypatch):
    """A disk of the network may take its time: keys are answered meanwhile."""
    asked: list[threading.Thread] = []
    real = feeds.length_of
    monkeypatch.setattr(feeds, "length_of", lambda reader: (asked.append(threading.current_thread()), real(reader))[1])
    async with FakeEngine(tmp_path) as engine:
        engine.steps(40)
        async with attached(engine) as feed:
            await wait(lambda: len(feed.store.steps) == 40)
    assert asked and threading.main_thread() not in asked


async def test_c133_a_jump_and_a_gap_are_filled_from_the_file(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(10)
        async with attached(engine) as feed:
            await wait(lambda: feed.mode is Mode.LIVE)
            engine.hold_live = True
            engine.steps(50)
            engine.hold_live = False
            engine.steps(1)
            await wait(lambda: feed.store.step == 61)
            assert feed.gaps == 1
            engine.hold_live = True
            engine.steps(9)
            engine.gap()
            await wait(lambda: feed.store.step == 70 and feed.gaps == 2)  # the reading for the jump may have met these too
            same(feed)


async def test_rs10_rewind_and_new_incarnation_show_the_surviving_branch(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(100)
        engine.emit(rec.Eval(step=40, loss=3.0))
        engine.emit(rec.Eval(step=80, loss=2.5))
        async with attached(engine) as feed:
            await wait(lambda: feed.mode is Mode.LIVE)
            smooth = feed.store.steps.smooth("loss", 0.9)
            assert len(smooth) == 100
            await engine.crash()
            await wait(lambda: feed.mode is Mode.DEAD)
            assert feed.badge().text == "DEAD"
            await engine.restart(60)
            engine.steps(30)
            await wait(lambda: feed.store.step == 90 and feed.mode is Mode.LIVE)
            same(feed)
            assert feed.store.evals.step.values.tolist() == [40]
            assert [len(tail.step) for tail in feed.store.tails] == [40]
            assert [e.sign for e in feed.store.events if e.sign in "<|"] in (["|", "<"], ["<", "|"])
            fresh = Feed(RunDirectory(engine.run.path))
            await fresh._read_file()
            np.testing.assert_allclose(
                feed.store.steps.smooth("loss", 0.9).values, fresh.store.steps.smooth("loss", 0.9).values, rtol=1e-5
            )


async def test_ps05_attach_at_random_moments_with_restarts(tmp_path):
    rng = random.Random(11)
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        for round_ in range(25):
            async with attached(engine) as feed:
                for _ in range(rng.randint(0, 6)):
                    engine.steps(rng.randint(0, 20))
                    engine.hold_live = rng.random() < 0.2
                    await asyncio.sleep(0)
                engine.hold_live = False
                if round_ % 6 == 5:
                    await engine.crash()
                    await engine.restart(max(0, engine.step_number - 15))
                engine.steps(1)
                last = engine._log.seq
                await wait(lambda feed=feed, last=last: feed.store.seq == last)
                same(feed)


async def test_c134_commands_pending_accepted_applied_refused(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(42)
        async with attached(engine) as feed:
            assert feed.command("pause", "pause").phase is Phase.REFUSED  # still loading
            await wait(lambda: feed.mode is Mode.LIVE)
            request = feed.command("checkpoint", "checkpoint now")
            await wait(lambda: not request.open)
            assert request.phase is Phase.APPLIED and request.note == "applied at step 42"
            engine.refuse["set_lr"] = "the schedule is fixed"
            request = feed.command("set_lr", "learning rate 1e-4", lr=1e-4)
            await wait(lambda: not request.open)
            assert request.phase is Phase.REFUSED and request.note == "the schedule is fixed"
            engine.silent_to_commands = True
            request = feed.command("pause", "pause")
            await wait(lambda: len(engine.commands) == 3)
            assert "sent" in request.line(request.sent + 1)
            assert "waits for a step boundary" in request.line(request.sent + 11)
            engine.effect("pause", request.id, {})  # the effect alone answers, also without a reply
            await wait(lambda: request.phase is Phase.APPLIED)
            assert engine.commands[1]["args"] == {"lr": 1e-4}


async def test_mx10_without_socket_the_file_is_polled_and_says_why(tmp_path):
    engine = FakeEngine(tmp_path)
    await engine.serve(socket=False)
    engine.state("running")
    engine.steps(5)
    async with attached(engine) as feed:
        await wait(lambda: feed.mode is Mode.FILE and feed.why)
        assert "socket" in feed.why
        engine.steps(5)
        feed.wake()
        await wait(lambda: feed.store.step == 10)
        await engine.finish()
        feed.wake()
        await wait(lambda: feed.store.final)
        assert feed.badge().text == "FILE" and "finished" in feed.badge().why
        assert feed.command("pause", "pause").phase is Phase.REFUSED
    await engine.end()


@pytest.mark.parametrize(
    "answer", [b"", b"garbage\n", b'{"op":"bye","reason":"too many"}\n', b'{"op":"hello","proto":9}\n', b"[]\n"]
)
async def test_a_strange_socket_leaves_the_file(tmp_path, answer):
    engine = FakeEngine(tmp_path)

    async def strange(reader, writer):
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(strange, str(engine._socket))
    await engine.serve(socket=False)
    engine.state("running")
    engine.steps(3)
    async with attached(engine) as feed:
        await wait(lambda: feed.why)
        assert feed.mode is Mode.FILE and feed.store.step == 3
        if b"too many" in answer:
            assert "too many" in feed.why
    server.close()
    await engine.end()


async def test_ps06_damaged_lines_cost_only_themselves(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(20)
        with engine.run.metrics_path.open("ab") as file:
            file.write(b"\0\0\0 not json\n")
        async with attached(engine) as feed:
            await wait(lambda: feed.mode is Mode.LIVE)
            assert feed.store.step == 20 and len(feed.reader.errors) == 1


def test_badge_quiet_busy_and_loading(tmp_path):
    engine = FakeEngine(tmp_path)
    now = [1000.0]
    feed = Feed(engine.run, clock=lambda: now[0])
    assert feed.badge().text == "LOADING 0 %"
    feed.mode = Mode.LIVE
    feed.store.apply([rec.Run(seq=1, t=1000.0, inc=1, state="compiling")])
    now[0] = 1042.0
    assert feed.badge().text == "BUSY compiling 42 s"
    feed._apply([rec.Run(seq=2, t=1042.0, inc=1, state="running")])
    now[0] = 1042.0 + 19
    assert feed.badge().text.startswith("LIVE")
    now[0] = 1042.0 + 42
    assert feed.badge().text == "QUIET 42 s"
    feed.store.apply([rec.Checkpoint(seq=3, t=1042.0, inc=1, step=1, blocking=30.0)])
    assert feed.badge().text.startswith("LIVE")  # a run that saves for half a minute may be silent for a minute
    feed.hz = 2.5  # what the screen has adapted to
    assert feed.badge().text == "LIVE 2.5 Hz"


def test_nan_gaps_and_time_left(tmp_path):
    feed = Feed(FakeEngine(tmp_path).run)
    rows = [rec.Step(seq=i, t=float(i), inc=1, step=i, loss=math.nan if i == 3 else 1.0, step_time=2.0) for i in range(1, 11)]
    feed.store.apply([*rows, rec.Run(seq=11, t=11.0, inc=1, state="running", total_steps=110)])
    assert math.isnan(feed.store.steps.metrics["loss"].values[2])
    assert feed.store.seconds_left() == 200.0
    assert feed.store.x_of(10, "hours") == pytest.approx(20 / 3600)


async def test_c133_a_replaced_log_is_read_from_its_start(tmp_path):
    """Cut, or exchanged for another file: widgets keep the store and see a new version."""
    engine = FakeEngine(tmp_path)
    engine.state("running")
    engine.steps(40)
    other = FakeEngine(tmp_path / "other", "demo")
    other.state("running")
    other.steps(70, loss=7.0)
    async with attached(engine) as feed:
        store = feed.store
        await wait(lambda: store.step == 40 and feed.mode is Mode.DEAD)
        versions = (store.version, store.steps.version, store.event_version)
        feed.run.metrics_path.write_bytes(other.run.metrics_path.read_bytes()[: 40 * 200])
        feed.wake()
        await wait(lambda: store.steps.metrics["loss"].values.max() == 7.0)
        assert feed.store is store and (store.version, store.steps.version, store.event_version) > versions
        same(feed)
        (tmp_path / "next").write_bytes(other.run.metrics_path.read_bytes())  # longer, by rename: only the inode tells
        (tmp_path / "next").replace(feed.run.metrics_path)
        feed.wake()
        await wait(lambda: store.step == 70)
        same(feed)


async def test_c133_a_deleted_log_leaves_what_was_read_and_says_so(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(40)
        async with attached(engine) as feed:
            await wait(lambda: feed.mode is Mode.LIVE)
            content = engine.run.metrics_path.read_bytes()
            engine.run.metrics_path.unlink()
            engine.steps(5)  # the writer has it open; who is attached hears them
            await wait(lambda: feed.store.step == 45)
            engine.gap()
            await wait(lambda: "is gone" in feed.error)
            assert len(feed.store.steps) == 45 and feed.mode is Mode.LIVE
            engine.run.metrics_path.write_bytes(content)
            engine.gap()
            await wait(lambda: not feed.error)


async def test_c133_a_viewer_that_stood_still_misses_nothing(tmp_path):
    """The real supervisor's socket: it cuts a viewer that does not read back to the file, and the viewer reads on there."""
    engine = FakeEngine(tmp_path)
    engine.steps(10)
    await engine.end()
    words = [sys.executable, "-m", "lumina_engine.bench.player", str(engine.run.path), "--rate", "20000"]
    player = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    try:
        await player.stdout.readline()
        async with attached(engine) as feed:
            await wait(lambda: feed.mode is Mode.LIVE)
            size = engine.run.metrics_path.stat().st_size
            while engine.run.metrics_path.stat().st_size < size + 3_000_000:  # the loop stands still, nothing is read
                pass
            await wait(lambda: feed.gaps)
            player.terminate()
            await player.wait()
            last = last_records(engine.run.metrics_path, 1)[0].seq
            await wait(lambda: feed.store.seq == last)
            same(feed)
    finally:
        with contextlib.suppress(ProcessLookupError):
            player.kill()


async def test_quiet_names_the_last_record_and_the_last_line_of_the_log(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(7)
        engine.log("loading", "rank 0 waits for \x1b[31mrank 1")
        now = [time.time()]
        feed = Feed(RunDirectory(engine.run.path), clock=lambda: now[0])
        feed.start()
        await wait(lambda: feed.mode is Mode.LIVE)
        now[0] += 60
        await wait(lambda: "waits for" in feed.badge().why)
        assert feed.badge().text.startswith("QUIET 1")
        assert "nothing came after step 7 (record 8)" in feed.badge().why and "\x1b" not in feed.badge().why
        engine.steps(1)
        await wait(lambda: feed.badge().text.startswith("LIVE"))
        await feed.close()


async def test_a_defect_in_reading_is_shown(tmp_path, monkeypatch):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        feed = Feed(RunDirectory(engine.run.path))
        monkeypatch.setattr(feed.store, "apply", lambda records: 1 // 0)
        feed.start()
        await wait(lambda: feed.error)
        assert "ZeroDivisionError" in feed.error and "r reads the run again" in feed.error
        await feed.close()


def test_farewell_names_living_runs(tmp_path):
    from lumina_tui.app import farewell

    engine = FakeEngine(tmp_path)
    assert farewell(tmp_path, None) == [] and farewell(tmp_path / "none", None) == []
    asyncio.run(engine.serve(socket=False))
    engine.steps(7)
    assert farewell(tmp_path, "x") == ["demo goes on (step 7 of 1,000)", "return with: lumina --runs x demo"]
    asyncio.run(engine.end())
