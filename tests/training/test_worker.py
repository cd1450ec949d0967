"""What a rank says when memory runs out: start again smaller, the user's to mend, or the end with advice (R42)."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina_engine.checkpoint import backup
from lumina_engine.checkpoint.keep import Found
from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.checkpoint.verify import Report
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.growth_watch import failure
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.rank import NullChannel
from lumina_engine.training.comm import Comm
from lumina_engine.training.memory import DoesNotFit
from lumina_engine.training.rollback import Recovery
from lumina_engine.training.settle import NoRoom
from lumina_engine.training.trial import TrialError
from lumina_engine.training.worker import Worker
from tests.checkpoint.helpers import payload
from tests.faults.tiny_run import prepare
from tests.launch import last_line, launch

LOST = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12")


class Ear(NullChannel):
    left: tuple[int, str | None] | None = None

    def leave(self, code: int, reason: str | None = None) -> None:
        self.left = (code, reason)


def failed(root: Path, error: Exception, after: bool = False, **keys: Any) -> tuple[int, str, list[rec.Run]]:
    """The code and the words with which a rank leaves because of `error`, and its own records of the run's state."""
    run = RunDirectory.create(root, "r")
    config = Config(tokenizer="lumina-1k", **keys)
    config.save(run.config_path)
    ear = Ear()
    worker = Worker(run, ear)
    worker.out_of_memory = after
    code = worker._failed(error)
    assert ear.left is not None and ear.left[0] == code
    return code, ear.left[1] or "", [r for r in read_records(run.metrics_path) if isinstance(r, rec.Run)]


class Enough(Exception):
    """The data are there."""


def test_c36_while_the_data_are_tokenised_a_rank_counts_conversations_in_a_section_of_its_own(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []

    class Told(Ear):
        def report(self, step: int, section: str) -> None:
            told.append((step, section))
            if told.count((0, "data")) == 2:
                raise Enough

    run = RunDirectory.create(tmp_path, "r")
    Config(tokenizer="lumina-1k", data_cache_dir=str(tmp_path / "cache")).save(run.config_path)
    with pytest.raises(Enough):
        Worker(run, Told())._train()
    assert told[0] == told[-1] == (0, "data") and len(told) > 2
    assert {section for _, section in told[1:-1]} == {"tokenise"} and all(count > 0 for count, _ in told[1:-1])


def test_c098_a_rate_that_was_set_before_the_first_checkpoint_is_set_again(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "r")
    Config(tokenizer="lumina-1k").save(run.config_path)
    worker = Worker(run, Ear())
    worker.emit(rec.Change(what="learning_rate", step=7, before=1e-3, after=1e-4, by="user"))
    worker.emit(rec.Step(step=9, loss=1.0))
    boundary, told = SimpleNamespace(rates={}, replay={}), []
    adaptive = SimpleNamespace(catch_up=lambda backs, step: told.append((list(backs), step)))
    new = CheckpointManager(worker.config, run_dir=run)
    worker.manager = SimpleNamespace(recover=lambda known: None, require_new=new.require_new, notes=[])
    worker.trainer = SimpleNamespace(comm=Comm(), boundary=boundary, adaptive=adaptive, recovery=Recovery())  # type: ignore[assignment]
    worker._restore(None)
    assert boundary.rates == boundary.replay == {7: 1e-4} and told == [([], 0)]
    assert [r.to_step for r in read_records(run.metrics_path) if isinstance(r, rec.Rewind)] == [0]


def test_c099_what_an_earlier_start_did_about_balance_counts_for_growth(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "r")
    keys: dict[str, Any] = {
        "num_experts": 4,
        "moe_top_k": 1,
        "router_bias_rate": 0.0,
        "load_balancing_weight": 0.01,
        "adaptive": "act",
    }
    Config(tokenizer="lumina-1k", **keys).save(run.config_path)

    def go_on(worker: Worker, steps: range) -> None:
        for step in steps:
            worker.emit(rec.Experts(step=step, layers=[1], load=[[60.0, 12.0, 14.0, 14.0]], dropped=[0.12]))
            worker.emit(rec.Eval(step=step, loss=4 - step / 1e4))

    first = Worker(run, Ear())
    go_on(first, range(50, 950, 50))
    first.emit(rec.Change(what="load_balancing_weight", step=901, before=0.01, after=0.02, by="adaptive"))
    second = Worker(run, Ear())
    boundary, adaptive = SimpleNamespace(rates={}, replay={}), SimpleNamespace(catch_up=lambda backs, step: None)
    second.trainer = SimpleNamespace(comm=Comm(), boundary=boundary, adaptive=adaptive, recovery=Recovery())  # type: ignore[assignment]
    second._catch_up(900, None)
    go_on(second, range(950, 1_150, 50))
    assert [r.code for r in read_records(run.metrics_path) if isinstance(r, rec.Alert)] == ["add_expert"]


def test_c099_what_was_refused_in_earlier_starts_counts(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "r")
    Config(tokenizer="lumina-1k", num_experts=4, moe_top_k=1, router_bias_rate=0.001, adaptive="act", expert_growth="act").save(
        run.config_path
    )

    class Supervised(Ear):
        supervised = True

    def hot(worker: Worker, last: int) -> rec.Change | None:
        for step in range(last - 1_000, last + 1, 50):
            worker.emit(rec.Experts(step=step, layers=[1], load=[[60.0, 12.0, 14.0, 14.0]], dropped=[0.12]))
            worker.emit(rec.Eval(step=step, loss=4 - step / 1e4))
        return worker.growth.wanted(last, 0)

    for number in range(3):
        worker = Worker(run, Supervised())
        boundary, adaptive = SimpleNamespace(rates={}, replay={}), SimpleNamespace(catch_up=lambda backs, step: None)
        worker.trainer = SimpleNamespace(comm=Comm(), boundary=boundary, adaptive=adaptive, recovery=Recovery())  # type: ignore[assignment]
        worker._catch_up(2_000 * number, None)
        change = hot(worker, 2_000 * (number + 1))
        if number < 2:
            assert change is not None
            worker.emit(change)
            worker.emit(failure(change, "no room"))
    assert change is None


@pytest.mark.parametrize("broken", [False, True])
def test_ft07_the_wait_for_a_backup_at_the_end_is_no_other_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """The copy goes on once the rank has said what it waits for; one that fails this late is told too."""
    run = RunDirectory.create(tmp_path, "r")
    Config(tokenizer="lumina-1k", backup_every_n_hours=1e-9).save(run.config_path)
    told, said, real = [], threading.Event(), backup.back_up

    class Told(Ear):
        def report(self, step: int, section: str) -> None:
            told.append((step, section))
            said.set()

    def slow(*arguments: Any) -> Path:
        assert said.wait(30)
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(backup, "back_up", slow)
    worker = Worker(run, Told())
    worker.manager = CheckpointManager(worker.config, run_dir=run)
    worker.trainer = SimpleNamespace(progress=SimpleNamespace(step=3))
    worker.manager.save(payload(3))
    worker._close()
    assert told == [(3, "backup")] and [path.name for path in run.backups.iterdir()] == ["step-000003"] * (not broken)
    alerts = [r.message for r in read_records(run.metrics_path) if isinstance(r, rec.Alert)]
    assert [message.partition(":")[0] for message in alerts] == ["step-000003 was not backed up"] * broken


@pytest.mark.parametrize("error", [LOST, MemoryError()])
def test_r42_out_of_memory_asks_for_a_smaller_micro_batch(tmp_path: Path, error: Exception) -> None:
    code, reason, records = failed(tmp_path, error, batch_size=6)
    assert (code, records) == (91, [])  # the supervisor records the crash, and starts the run again
    assert "out of memory with micro batches of 6 rows" in reason


def test_r42_batch_1_that_does_not_fit_ends_the_run_with_advice(tmp_path: Path) -> None:
    code, reason, records = failed(tmp_path, LOST, batch_size=1, gradient_accumulation_steps=8)
    assert code == 93 and [r.state for r in records] == ["failed"]
    assert "set gradient_checkpointing=true, lower seq_length" in reason


def test_r42_after_recovery_found_nothing_smaller_the_run_ends(tmp_path: Path) -> None:
    assert failed(tmp_path, NoRoom("no room"), batch_size=8)[0] == 93


@pytest.mark.parametrize(
    ("keys", "after", "code"),
    [
        ({}, False, 2),  # what the user asked for does not fit: the user's to mend
        ({"dynamic_batching": True}, False, 91),
        ({}, True, 91),
        ({"dynamic_batching": True, "min_batch_size": 8}, True, 2),
    ],
)
def test_r42_a_dry_run_that_does_not_fit(tmp_path: Path, keys: dict[str, Any], after: bool, code: int) -> None:
    config = Config(tokenizer="lumina-1k", batch_size=8, **keys)
    found, reason, _ = failed(tmp_path, DoesNotFit(8, 2048, config), after, batch_size=8, **keys)
    assert found == code and "of 2048 tokens does not fit: lower " in reason


def test_r42_c061_ranks_of_a_machine_started_by_hand_start_as_the_supervised_one_was_told_to(tmp_path: Path) -> None:
    run = prepare(tmp_path, "r", world=2, use_moe=False)
    found = last_line(launch(Path(__file__).with_name("by_hand_ranks.py"), 2, str(run.path)), "BY HAND ")
    assert found == [[True, True, 2, 2]] * 2, "half of 4 rows, twice"


def test_c099_experts_that_the_run_chose_itself_and_that_do_not_fit_get_a_smaller_micro_batch(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "r")
    config = Config(tokenizer="lumina-1k", batch_size=8)
    config.save(run.config_path)
    for own, code in ((True, 91), (False, 2)):
        worker = Worker(run, Ear())
        worker.other_experts = own
        assert worker._failed(DoesNotFit(8, 2048, config)) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [(DoesNotFit(1, 2048, Config(batch_size=1)), 2), (LOST, 93), (NoRoom("no room"), 93), (ValueError("no matter"), 1)],
)
def test_c099_a_run_that_has_grown_and_ends_for_want_of_memory_names_the_way_back(
    tmp_path: Path, error: Exception, code: int
) -> None:
    run = RunDirectory.create(tmp_path, "r")
    Config(tokenizer="lumina-1k", batch_size=1).save(run.config_path)
    ear = Ear()
    worker = Worker(run, ear)
    grown = run.checkpoints / "step-000008"
    report = Report(grown, manifest={"experts_changed": {"before": 4, "after": 5}})
    worker.found, worker.other_experts = Found(grown, report), True
    assert worker._failed(error) == code and ear.left is not None
    assert ("step-000008 was given 5 experts in each layer instead of 4" in (ear.left[1] or "")) == (code != 1)


@pytest.mark.parametrize("open_since", [None, 7])
def test_c099_no_change_of_experts_is_saved_for_while_a_spike_is_open(tmp_path: Path, open_since: int | None) -> None:
    run = RunDirectory.create(tmp_path, "r")
    Config(tokenizer="lumina-1k").save(run.config_path)
    worker = Worker(run, Ear())
    guard, progress = SimpleNamespace(open_since=open_since), SimpleNamespace(step=9)
    worker.trainer = SimpleNamespace(guard=guard, progress=progress, adaptive=SimpleNamespace(spent=3))
    worker.growth = SimpleNamespace(wanted=lambda step, spent: rec.Change(what="num_experts", step=step, before=spent))  # type: ignore[assignment]
    found = worker._wanted_experts()
    assert found is None if open_since else found is not None and (found.step, found.before) == (9, 3)


def test_a_try_that_failed_otherwise_is_a_crash(tmp_path: Path) -> None:
    code, reason, records = failed(tmp_path, TrialError("batch_size: the trial ended with exit code 1"), batch_size=8)
    assert (code, records) == (1, []) and reason.startswith("TrialError")


def resolved(root: Path) -> tuple[Worker, list[Any]]:
    """A worker that is about to write down what is in force, and its records."""
    run = RunDirectory.create(root, "r")
    config = Config(tokenizer="lumina-1k", use_deepspeed=False)
    config.save(run.config_path)
    worker = Worker(run, Ear())
    worker.trainer = SimpleNamespace(config=config, ds_config=None)
    records: list[Any] = []
    worker.emit = records.append  # type: ignore[method-assign]
    return worker, records


def test_ck07_a_configuration_that_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    worker, records = resolved(tmp_path)
    before = worker.directory.config_path.stat()
    worker._write_resolved()
    after = worker.directory.config_path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns) and records == []


def test_ck07_a_configuration_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, records = resolved(tmp_path)
    worker.trainer.config = worker.trainer.config.model_copy(update={"warmup_steps": 7})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    worker._write_resolved()
    (alert,) = records
    assert alert.code == "config_not_written" and "No space left" in alert.message
    assert [path.name for path in worker.directory.path.glob(".config*")] == []
