"""Experiment trackers fed from a run's log: what they read back is what the log says, once, whatever happens to them (C149)."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import posixpath
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config import trackers
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog, read_records, whole_length
from lumina_engine.monitoring.trackers.mlflow_sink import metric_name
from lumina_engine.monitoring.trackers.points import Point, Subject, points
from lumina_engine.monitoring.trackers.tensorboard_sink import Sink, crc32c, encode
from lumina_engine.run import launch, tracking
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.process import process, send_signal
from tests.run.conftest import WORKER, Runs
from tests.waiting import until

GOLDEN = (
    "200000000000000029eda95009000000000000f83f10072a130a110a0a747261696e2f6c6f7373150000803ef4985d1a"
    ""
)  # what TensorBoard's own writer makes of this point


def needs(name: str, *modules: str) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"{name} is not installed ('.[trackers]')")


def scalars(folder: Path) -> Any:
    needs("tensorboard", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def log_of(run: RunDirectory, *records: rec.Record) -> None:
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        for record in records:
            log.emit(record)


@pytest.fixture
def over(runs: Runs) -> RunDirectory:
    """A run that is over: 30 steps with everything else that a log holds, and a return from step 20 to 10."""
    run = runs.make()
    steps = [rec.Step(step=n, loss=1 / n, lr=1e-3, grad_norm=math.inf if n == 3 else 1.0) for n in range(1, 21)]
    again = [rec.Step(step=n, loss=2 / n, lr=1e-3, grad_norm=1.0) for n in range(11, 31)]
    log_of(
        run,
        rec.Run(state="running", total_steps=30),
        *steps,
        rec.Rewind(to_step=10, reason="a spike"),
        *again,
        rec.Experts(step=30, layers=[1], load=[[3, 1]], imbalance=[1.5], entropy=[0.8], dead=[0], dropped=[0.25]),
        rec.Hardware(cpu=50.0, devices=[rec.Device(index=0, name="H", memory_used=5)]),
        rec.Eval(step=30, loss=0.5, perplexity=1.6, tasks={"code": 0.4}),
        rec.Alert(severity="warning", code="spike", message="loss 9", recommendation="learning_rate=1e-4", step=20),
        rec.Run(state="finished", exit_code=0),
    )
    return run


def follow(run: RunDirectory, name: str, **more: Any) -> int:
    return tracking.Follower(run, name, **more).follow()


def test_c149_checksum_and_bytes_are_those_of_tensorboard() -> None:
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert encode(Point(1, 1.5, 7, {"train/loss": 0.25})).hex() == GOLDEN


def test_c149_every_number_of_the_log_becomes_a_point(over: RunDirectory) -> None:
    found = list(points(read_records(over.metrics_path), 0))
    values = {name for point in found for name in point.values}
    assert {"train/loss", "train/lr", "experts/layer_1/imbalance", "hardware/cpu", "hardware/device_0/memory_used"} <= values
    assert {"eval/loss", "eval/tasks/code"} <= values and "train/step" not in values
    assert [point.step for point in found if "hardware/cpu" in point.values] == [30]
    assert ("alerts", "warning spike: loss 9 — learning_rate=1e-4") in [point.text for point in found]


def test_c149_tensorboard_reads_back_the_branch_that_counts(over: RunDirectory) -> None:
    assert follow(over, "tensorboard") == 0
    found = scalars(tracking.place(over, "tensorboard"))
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == pytest.approx({n: (1 if n <= 10 else 2) / n for n in range(1, 31)})
    assert len(found.Scalars("train/loss")) == 30 and math.isinf(found.Scalars("train/grad_norm")[2].value)
    assert [event.value for event in found.Scalars("experts/layer_1/dropped")] == [0.25]
    text = found.Tensors("alerts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "warning spike: loss 9 — learning_rate=1e-4"
    assert tracking.status(over, "tensorboard")["state"] == "done"


def test_c149_what_was_delivered_but_not_noted_stands_there_once(over: RunDirectory) -> None:
    subject = Subject("r", "id", over.path, {"seed": 1})
    sink = Sink(subject, None)
    all_points = list(points(read_records(over.metrics_path), 0))
    sink.write(all_points[:5])
    mark = sink.flush()
    sink.write(all_points[5:15])
    sink.flush()
    sink.close(None)  # the follower died here, before it noted its place
    again = Sink(subject, mark)
    again.write(all_points[5:8])
    again.flush()
    assert [event.step for event in scalars(over.path).Scalars("train/loss")] == list(range(1, 8))


def test_c149_a_run_feeds_the_trackers_of_its_configuration(runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from lumina_engine import cli

    fake = (
        f"import json,runpy; json.dump({{'steps': 25}}, open('plan.json', 'w')); runpy.run_path({WORKER!r}, None, '__main__')"
    )
    monkeypatch.setattr(launch, "rank_argv", lambda config, path, world: [sys.executable, "-c", fake, str(path)])
    runs.made.append(RunDirectory(runs.root / "r"))
    assert cli.main(["train", "--run", "r", "--runs", str(runs.root), "trackers=[tensorboard]"]) == 0
    run = runs.made[0]
    until(lambda: tracking.status(run, "tensorboard")["state"] == "done", "the tracker to be done")
    capsys.readouterr()
    assert cli.main(["track", "r", "--runs", str(runs.root), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert (row["tracker"], row["state"], row["step"], row["behind_bytes"]) == ("tensorboard", "done", 25, 0)
    found = scalars(tracking.place(run, "tensorboard"))
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 26))
    assert "tokenizer: lumina-1k" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.fixture
def started() -> Iterator[Any]:
    """Starts followers, and ends them with the test."""
    found: list[Any] = []

    def start(run: RunDirectory, name: str) -> Any:
        (pid,) = tracking.start(run, [name])
        found.append(process(pid))
        return found[-1]

    yield start
    for follower in found:
        if follower is not None:
            send_signal(follower, signal.SIGKILL)


def test_c149_a_follower_that_hangs_costs_the_run_nothing_and_loses_nothing(runs: Runs, started: Any) -> None:
    run = runs.running(steps=400, pace=0.01)  # longer than a follower takes to start
    hung = started(run, "tensorboard")
    until(lambda: tracking.status(run, "tensorboard")["step"] > 20, "the follower to deliver")
    assert send_signal(hung, signal.SIGSTOP)
    until(lambda: not run.alive, "the run to end")
    assert run.info().exit_code == 0 and run.info().step == 400
    assert tracking.status(run, "tensorboard")["behind_bytes"] > 0
    assert follow(run, "tensorboard") == 0  # takes over from the one that hangs
    assert not hung.alive
    assert [event.step for event in scalars(tracking.place(run, "tensorboard")).Scalars("train/loss")] == list(range(1, 401))


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """An HTTP server that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.slow
def test_c149_a_tracker_whose_server_is_silent_costs_the_run_nothing(
    runs: Runs, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("mlflow", *trackers.NEEDS["mlflow"][0])
    run = runs.running(steps=300)
    with silent_server() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        hung = started(run, "mlflow")
        until(lambda: not run.alive, "the run to end")
        assert run.info().exit_code == 0 and hung.alive
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert follow(run, "mlflow") == 0
    assert not hung.alive
    logged = [(item.step, item.loss) for item in read_records(run.metrics_path) if isinstance(item, rec.Step)]
    assert len(logged) == 300 and mlflow_losses(run) == [(step, pytest.approx(loss)) for step, loss in logged]


def mlflow_losses(run: RunDirectory) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tracking.place(run, 'mlflow') / 'mlflow.db'}")
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.info.status == "FINISHED"
    return sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss"))


class Moody:
    """A tracker that raises at every second delivery, after it has kept part of it."""

    def __init__(self, kept: dict[int, Point]) -> None:
        self.kept, self.calls = kept, 0

    def __call__(self, name: str, subject: Subject, mark: Any) -> Moody:
        return self

    def write(self, delivered: Any) -> None:
        self.calls += 1
        taken = list(delivered)
        if self.calls % 2:
            self.kept.update({point.seq: point for point in taken[:3]})
            raise ConnectionError("the server is gone")
        self.kept.update({point.seq: point for point in taken})

    def flush(self) -> Any:
        return None

    def close(self, state: str | None) -> None:
        if state is None:
            raise ConnectionError("not even a goodbye")


def test_c149_a_tracker_that_fails_is_tried_again_from_where_it_stands(over: RunDirectory, monkeypatch: Any) -> None:
    monkeypatch.setattr(tracking, "PIECE", 1)  # the reader's least: 64 KiB
    kept: dict[int, Point] = {}
    filler = [rec.Note(message="x" * 500) for _ in range(300)]
    log_of(over, *filler, rec.Step(step=31, loss=0.1))
    assert follow(over, "tensorboard", opener=Moody(kept), pause=0.001) == 0
    assert list(kept.values()) == list(points(read_records(over.metrics_path), 0))


def test_c149_a_tracker_that_never_works_leaves_its_place_and_says_why(over: RunDirectory) -> None:
    def opener(name: str, subject: Subject, mark: Any) -> Any:
        raise OSError("no route")

    assert follow(over, "tensorboard", opener=opener, pause=0.001) == 1
    row = tracking.status(over, "tensorboard")
    assert row["state"] == "failing" and row["error"] == "OSError: no route" and row["behind_bytes"] > 0


class Full:
    """A disk that takes a state file only when `free`; what it took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.refused, self.inner = False, 0, tracking.write_json
        monkeypatch.setattr(tracking, "write_json", self)

    def __call__(self, path: Path, content: Any) -> None:
        if not self.free:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        self.inner(path, content)


def test_c149_a_full_disk_ends_no_follower(over: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With a tracker that fails at every second delivery: nothing is lost, and nothing that was taken is sent again."""
    monkeypatch.setattr(tracking, "PIECE", 1)
    log_of(over, *[rec.Note(message="x" * 500) for _ in range(300)], rec.Step(step=31, loss=0.1))
    disk, kept = Full(monkeypatch), dict[int, Point]()
    tracker = Moody(kept)
    assert follow(over, "tensorboard", opener=tracker, pause=0.001) == 0
    assert list(kept.values()) == list(points(read_records(over.metrics_path), 0))
    pieces = whole_length(over.metrics_path) / (64 << 10)
    assert disk.refused > 2 and tracker.calls <= 2 * (pieces + 1)
    assert capsys.readouterr().err.count("cannot be saved") == 1
    assert tracking.read_state(over, "tensorboard") == {}


def test_c149_the_place_is_saved_when_the_disk_has_room_again(over: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Full(monkeypatch)
    follower = tracking.Follower(over, "tensorboard", pause=0.001)
    assert not follower._deliver() and follower.failures == 1 and tracking.read_state(over, "tensorboard") == {}
    disk.free = True
    assert not follower._deliver() and follower.failures == 0, "nothing new in the log"
    assert tracking.status(over, "tensorboard")["behind_bytes"] == 0
    follower.sink.close(None)  # type: ignore[union-attr]


def test_c149_mlflow_reads_back_what_the_log_says(over: RunDirectory) -> None:
    needs("mlflow", *trackers.NEEDS["mlflow"][0])
    assert follow(over, "mlflow") == 0
    losses = mlflow_losses(over)
    assert len(losses) == 40 and losses[-1] == (30, pytest.approx(2 / 30))
    # the place is lost: everything is delivered to the same run again, and stands there once
    state = tracking.read_state(over, "mlflow")
    (tracking.place(over, "mlflow") / "state.json").write_text(json.dumps({"mark": state["mark"]}))
    assert follow(over, "mlflow") == 0
    assert mlflow_losses(over) == losses


NAMES = [
    "eval/tasks/code",
    "eval/tasks/C++",
    "eval/tasks/C__",
    "eval/tasks/C--",
    "eval/tasks/C#+",
    "eval/tasks//C",
    "eval/tasks/C",
    "eval/tasks/C/",
    "/eval/tasks/C",
    "eval/tasks/./C",
    "eval/tasks/../C",
    "eval/tasks/..",
    "eval/tasks/Gr\u00fc\u00dfe \u4e2d\u6587",
    "eval/tasks/a\nb",
    "eval/tasks/\ud800",
    "..",
    "+",
    "",
    *(f"eval/tasks/{'x' * length}{end}" for length in (238, 239, 400) for end in "ab"),
]


def test_c149_every_name_is_one_that_mlflow_takes_and_its_own() -> None:
    found = [metric_name(name) for name in NAMES]
    for name in found:  # mlflow/utils/validation.py: characters, no other path as a file, length
        assert re.fullmatch(r"[/\w.\- ]+", name) and len(name) <= 250
        assert posixpath.normpath(name) == name and not name.startswith(("..", "/"))
    assert len(set(found)) == len(NAMES)
    assert found[0] == NAMES[0] and found[12] == NAMES[12] and re.fullmatch(r"eval/tasks/C__-[0-9a-f]{8}", found[1])


def test_c149_trackio_reads_back_what_the_log_says(over: RunDirectory) -> None:
    needs("trackio", "trackio")
    # read in a process of its own: trackio fixes its folder when it is imported
    script = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "print(json.dumps([[r['step'], r['value']] for r in S.get_metric_values('lumina', 'r', 'train/loss')]))\n"
        "print(json.dumps([a['text'] for a in S.get_alerts('lumina', 'r')]))"
    )
    for _ in range(2):
        code = tracked(over, "trackio")
        assert code == 0
        out = python(script, TRACKIO_DIR=str(tracking.place(over, "trackio")))
        losses, alerts = (json.loads(line) for line in out.splitlines()[-2:])
        assert len(losses) == 40 and losses[-1] == [30, pytest.approx(2 / 30)]
        assert any("loss 9" in text for text in alerts)
        (tracking.place(over, "trackio") / "state.json").unlink()  # delivered again, once there all the same


def test_c149_wandb_writes_an_offline_run(over: RunDirectory) -> None:
    needs("wandb", "wandb")
    assert tracked(over, "wandb") == 0
    (file,) = tracking.place(over, "wandb").glob("wandb/offline-run-*/run-*.wandb")
    # the file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB of fragments (crc u32, length u16, kind u8)
    script = """if True:
        import sys
        from wandb.proto import wandb_internal_pb2 as pb
        data, at, whole, found = open(sys.argv[1], "rb").read(), 7, b"", []
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record, whole = pb.Record.FromString(whole), b""
                items = record.history.item
                found += [i.value_json for i in items if "train/loss" in (i.key, *i.nested_key)]
        print(len(found), found[-1])
    """
    count, last = python(script, str(file)).split()[-2:]
    assert (int(count), float(last)) == (40, pytest.approx(2 / 30))


def python(script: str, *arguments: str, **environment: str) -> str:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=os.environ | environment, check=True
    )
    return done.stdout


def tracked(run: RunDirectory, name: str) -> int:
    """A follower in a process of its own, until it is done."""
    (pid,) = tracking.start(run, [name])
    found = process(pid)
    until(lambda: found is None or not found.alive, f"the follower for {name} to end", 60)
    row = tracking.status(run, name)
    assert row["state"] == "done", (row, (tracking.place(run, name) / "tracker.log").read_text())
    return 0


def test_c149_a_tracker_that_is_not_installed_is_refused_before_the_run_is_made(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from lumina_engine import cli

    monkeypatch.setitem(trackers.NEEDS, "wandb", (("no_such_module",), "wandb"))
    assert cli.main(["train", "--run", "r", "--runs", str(runs.root), "trackers=[wandb]"]) == 2
    assert "pip install wandb" in capsys.readouterr().err and not (runs.root / "r").exists()
