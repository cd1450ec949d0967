"""CK rows through the real trainer: full disks, damage met at a resume, slow and failing writers, values not worth keeping."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint import saving
from lumina_engine.checkpoint.commit import list_steps, pointer, verify
from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.launch import wait
from lumina_engine.run.rank import Command
from lumina_engine.training.comm import Comm
from lumina_engine.training.state import restore
from lumina_engine.training.trainer import EnhancedConversationTrainer
from tests.checkpoint.helpers import names_in
from tests.launch import last_line, launch
from tests.parity.modes import write_data
from tests.parity.rows import Records
from tests.training.test_trainer import setup
from tests.waiting import until

from .conftest import TinyRuns
from .tiny import Channel
from .tiny_run import ends, final_manifest, steps

KEYS = {"batch_size": 4, "num_epochs": 1000, "max_steps": 24, "log_interval": 1, "eval_interval": 0}


class Acting(Records):
    """Records, and something done when a step's comes."""

    def __init__(self, act: Callable[[int], None]) -> None:
        super().__init__()
        self.act = act

    def emit(self, record: Any) -> None:
        super().emit(record)
        if isinstance(record, rec.Step):
            self.act(record.step)


def trained(tmp_path: Path, run: Path, records: Acting, **keys: Any) -> dict[str, Any]:
    """A whole run of the real trainer that saves to `run`; its summary."""
    made, dataset, _ = setup(tmp_path, **{**KEYS, **keys})
    manager = CheckpointManager(made.config, run_dir=run, run_id="run")
    trainer = EnhancedConversationTrainer(made.model, made.tokenizer, made.config, records, comm=Comm(), manager=manager)
    summary = trainer.train(dataset, dataset)
    manager.close()
    return summary


def saves(records: Records) -> list[tuple[int, bool]]:
    return [(r.step, r.failed is None) for r in records if isinstance(r, rec.Checkpoint)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for four checkpoints of the tiny model."""
    path, mount = tmp_path / "disk", shutil.which("mount")
    path.mkdir()
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root may mount a file system")
    if subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("background", [False, True], ids=["blocking", "async"])
def test_ck06_the_trainer_goes_on_with_a_full_disk(small_disk: Path, tmp_path: Path, background: bool) -> None:
    """Full from step 5 to 13 or so, an evaluation that improves in between: two saves fail, `best` too, nothing else."""
    filler, folder = small_disk / "filler", small_disk / "run" / "checkpoints"

    def act(step: int) -> None:
        if step == 5:
            until(lambda: [name for name in names_in(folder) if name[0] in ".s"] == ["step-000004"], "the save that has room")
            fill(filler)
        elif step >= 13 and filler.exists() and (12, False) in saves(records):
            filler.unlink()

    records = Acting(act)
    keys = {"save_interval": 4, "eval_interval": 6, "eval_batches": 1, "async_save": background}
    summary = trained(tmp_path, small_disk / "run", records, **keys)
    assert summary["state"] == "finished" and summary["step"] == 24
    assert sorted(saves(records)) == [(4, True), (8, False), (12, False), (16, True), (20, True), (24, True)]
    alerts = [r for r in records if isinstance(r, rec.Alert) and r.code == "checkpoint_failed"]
    assert [r.step for r in alerts] == [8, 12] and all("room" in r.message or "No space" in r.message for r in alerts)
    assert all(verify(folder / name).ok for name in list_steps(folder)) and list_steps(folder)[0] == "step-000024"
    assert not [name for name in names_in(folder) if name.startswith(".")]


def fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass


def started(tmp_path: Path, run: Path, records: Records, channel: Channel) -> dict[str, Any]:
    """As `trained`, with commands, and from the newest checkpoint if there is one."""
    made, dataset, _ = setup(tmp_path, **KEYS, save_interval=4, async_save=True)
    manager = CheckpointManager(made.config, run_dir=run, run_id="run")
    trainer = EnhancedConversationTrainer(
        made.model, made.tokenizer, made.config, records, comm=Comm(), manager=manager, channel=channel
    )
    trainer.prepare(dataset)
    if (path := manager.recover()) is not None:
        restore(trainer, manager.load(path))
    summary = trainer.train(dataset)
    manager.close()
    return summary


@pytest.mark.parametrize("stop_at", [None, 10], ids=["end", "stop"])
def test_ck06_a_run_whose_last_step_is_not_saved_is_not_finished(small_disk: Path, tmp_path: Path, stop_at: int | None) -> None:
    """The disk stays full to the end: the run has failed, says what is saved, and a resume reaches the end."""
    filler, run, channel = small_disk / "filler", small_disk / "run", Channel()
    folder, last = run / "checkpoints", stop_at or 24

    def act(step: int) -> None:
        if step == 5:
            until(lambda: (folder / "latest").exists(), "the save that has room")
            fill(filler)

    if stop_at:
        channel.commands[stop_at] = [Command("7", "stop")]
    records = Acting(act)
    summary = started(tmp_path, run, records, channel)
    assert (summary["state"], summary["exit_code"], summary["step"]) == ("failed", 93, last)
    assert summary["id"] == ("7" if stop_at else None)
    assert "step-000004" in summary["reason"] and "free space, then --resume" in summary["reason"]
    assert "room" in summary["reason"] or "No space" in summary["reason"]
    assert saves(records).count((last, False)) == 2 and list_steps(folder) == ["step-000004"]
    filler.unlink()
    summary = started(tmp_path, run, Acting(lambda step: None), Channel())
    assert (summary["state"], summary["exit_code"]) == ("finished", 0) and list_steps(folder)[0] == "step-000024"


def test_ck06_the_last_save_is_tried_twice(small_disk: Path, tmp_path: Path) -> None:
    filler, run = small_disk / "filler", small_disk / "run"

    class Freeing(Acting):
        def emit(self, record: Any) -> None:
            super().emit(record)
            if isinstance(record, rec.Checkpoint) and record.failed and record.step == 24:
                filler.unlink()

    records = Freeing(lambda step: fill(filler) if step == 22 else None)
    summary = started(tmp_path, run, records, Channel())
    assert (summary["state"], summary["exit_code"]) == ("finished", 0)
    assert saves(records)[-2:] == [(24, False), (24, True)] and list_steps(run / "checkpoints")[0] == "step-000024"


def test_ck20_a_nan_parameter_is_refused_and_told(tmp_path: Path) -> None:
    made, dataset, _ = setup(tmp_path, **KEYS, save_interval=4)
    parameter = next(made.model.parameters())

    def act(step: int) -> None:
        if step == 7:
            with torch.no_grad():
                parameter.view(-1)[0] = math.nan

    records = Acting(act)
    manager = CheckpointManager(made.config, run_dir=tmp_path / "run", run_id="run")
    config = made.config.model_copy(update={"max_nonfinite_in_row": 30})
    EnhancedConversationTrainer(made.model, made.tokenizer, config, records, comm=Comm(), manager=manager).train(dataset)
    manager.close()
    assert saves(records)[:2] == [(4, True), (8, False)]
    told = [r.message for r in records if isinstance(r, rec.Alert) and r.code == "checkpoint_failed"]
    assert told and "is not finite, so this step is not worth keeping" in told[0]
    assert list_steps(tmp_path / "run" / "checkpoints") == ["step-000004"]


def test_ck16_a_slow_disk_holds_no_step_up_and_one_save_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, gate, writing = saving.write_files, threading.Event(), threading.Lock()
    stepped_meanwhile: list[int] = []

    def slow(*arguments: Any) -> Any:
        assert writing.acquire(blocking=False), "two saves in flight"
        assert gate.wait(60)
        try:
            return real(*arguments)
        finally:
            writing.release()

    def act(step: int) -> None:
        if writing.locked() and not gate.is_set():
            stepped_meanwhile.append(step)
        if step == 7:
            gate.set()

    monkeypatch.setattr(saving, "write_files", slow)
    records = Acting(act)
    trained(tmp_path, tmp_path / "run", records, save_interval=4, async_save=True)
    assert stepped_meanwhile == [5, 6, 7]
    assert sorted(saves(records)) == [(step, True) for step in range(4, 25, 4)]


def test_ck16_a_writer_that_fails_is_told_within_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed, start, started = saving.write_files, threading.Event(), saving.Saver._start, list[Any]()

    def kept(saver: Any, job: Any, work: Any) -> None:
        start(saver, job, work)
        started.append(job.writing)

    def broken(plan: Any, write: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise MemoryError("no host memory")
        return real(plan, write)

    seen: list[int] = []

    def act(step: int) -> None:
        if step == 4:
            seen.append(step)
        if step > 4 and failed.is_set() and len(seen) == 1:
            started[0].result(60)  # it has ended by the boundary of this step
            seen.append(step)

    monkeypatch.setattr(saving, "write_files", broken)
    monkeypatch.setattr(saving.Saver, "_start", kept)
    records = Acting(act)
    summary = trained(tmp_path, tmp_path / "run", records, save_interval=4, async_save=True)
    assert summary["state"] == "finished" and saves(records)[0] == (4, False)
    order = [r.step for r in records if isinstance(r, rec.Step) or (isinstance(r, rec.Checkpoint) and r.failed)]
    at = order.index(4, order.index(4) + 1)  # the failure's record, behind that of step 4
    assert order[at - 1] <= seen[1]


@pytest.mark.slow
@pytest.mark.fast
def test_ck16_two_ranks_commit_a_save_while_they_evaluate(tmp_path: Path) -> None:
    """A fault in an evaluation costs nothing, however many ranks have to agree on the save before it."""
    program = Path(__file__).with_name("eval_ranks.py")
    done = launch(program, 2, str(write_data(tmp_path)), str(tmp_path), XDG_STATE_HOME=str(tmp_path / "state"))
    assert last_line(done, "EVAL ") == {"committed": True, "resumed": [3, 4]}


def test_ck11_train_resume_refuses_when_every_checkpoint_is_damaged(tiny_runs: TinyRuns) -> None:
    run = tiny_runs.running(max_steps=12)
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    names = list_steps(run.checkpoints)
    assert len(names) >= 2
    for name in names:
        path = run.checkpoints / name / "model" / "model.safetensors"
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 4
        path.write_bytes(body)
    before, last = names_in(run.checkpoints), max(steps(run))
    words = ["train", "--runs", str(tiny_runs.root), "--run", run.name, "--resume", "max_steps=16"]
    command = [sys.executable, "-m", "lumina_engine.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 65, done.stderr
    state, inc, reason = ends(run)[-1], ends(run)[-1][0], run.info().reason or ""
    assert state[1:] == ("failed", 65) and inc == 2
    assert all(f"{name}: model/model.safetensors" in reason for name in names)
    assert names_in(run.checkpoints) == before and max(steps(run)) == last


def test_ck11_train_resume_refuses_when_the_checkpoints_are_gone(tiny_runs: TinyRuns) -> None:
    """An unmounted disk: nothing is started from scratch, the backups stay, and one of them that is copied back goes on."""
    run = tiny_runs.running(max_steps=12, backup_every_n_hours=1e-9)
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    copies = {name: (run.backups / name / "MANIFEST.json").read_bytes() for name in list_steps(run.backups)}
    assert copies and len(list_steps(run.checkpoints)) >= 2
    run.checkpoints.rename(run.path / "unmounted")
    run.checkpoints.mkdir(mode=0o700)
    words = ["train", "--runs", str(tiny_runs.root), "--run", run.name, "--resume", "max_steps=16"]
    command = [sys.executable, "-m", "lumina_engine.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 65, done.stderr
    newest, last = next(iter(copies)), max(steps(run))
    assert f"cp -a {run.backups / newest} {run.checkpoints}/" in (run.info().reason or "") and last == 12
    assert {name: (run.backups / name / "MANIFEST.json").read_bytes() for name in list_steps(run.backups)} == copies
    subprocess.run(["cp", "-a", str(run.backups / newest), f"{run.checkpoints}/"], check=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rewinds = [r.to_step for r in read_records(run.metrics_path) if isinstance(r, rec.Rewind)]
    assert rewinds == [int(newest[5:])] and max(steps(run)) == 16


@pytest.mark.slow
def test_c080_a_resumed_run_has_the_value_of_best_from_its_log(tiny_runs: TinyRuns) -> None:
    """Evaluated at the end only, after its last save: no manifest has the loss of what `best` names."""
    run = tiny_runs.running(max_steps=6, eval_interval=0)
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    assert pointer(run.checkpoints, "best") == "step-000006" and final_manifest(run)["best"] is None
    (loss,) = [r.loss for r in read_records(run.metrics_path) if isinstance(r, rec.Eval)]
    words = ["train", "--runs", str(tiny_runs.root), "--run", run.name, "--resume", "max_steps=8"]
    command = [sys.executable, "-m", "lumina_engine.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert final_manifest(run)["best"] == {"name": "step-000006", "metric": "eval_loss", "value": loss}
