"""A run that changes the number of its experts by itself (C99): the save that is made for it, and the start behind that."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint.files import CheckpointError
from lumina_engine.checkpoint.keep import Found
from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.checkpoint.verify import read_manifest
from lumina_engine.config.machine import Machine
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.growth_watch import FAILED
from lumina_engine.monitoring.log import MetricLog, read_records
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.rank import Command
from lumina_engine.training import experts
from lumina_engine.training.comm import Comm
from lumina_engine.training.experts import TRY, drop_former, experts_in_force, keys_for, pending, way_back
from tests.checkpoint.helpers import kill_points, names_in
from tests.checkpoint.test_growth import outputs
from tests.faults.tiny import Tiny
from tests.faults.tiny_run import prepare
from tests.launch import last_line, launch

RANKS = Path(__file__).with_name("growth_ranks.py")
KEYS: dict[str, Any] = {
    "moe_top_k": 1,
    "num_layers": 1,
    "moe_dropless": False,
    "capacity_factor": 1.3,
    "adaptive": "act",
    "expert_growth": "act",
    "save_interval": 4,
    "spike_policy": "alert",
    "dropout": 0.0,
    "router_jitter_noise": 0.0,
}
AT = 8  # the step of the decision


@pytest.fixture(autouse=True)
def private_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def change(step: int = AT, before: int = 4, by: int = 1) -> rec.Change:
    evidence = {"action": "add_expert", "step": step, "layer": 0, "layers": {"0": 1}, "dropped": 0.2, "eval_loss": None}
    words = "expert 1 of layer 0 is hot"
    return rec.Change(
        what="num_experts", step=step, before=before, after=before + by, by="adaptive", reason=words, evidence=evidence
    )


def growing(folder: Path, at: int = AT, **keys: Any) -> Tiny:
    """A run that wants an expert at one of its saves."""
    tiny = Tiny(folder, **KEYS | keys)
    tiny.trainer.extra_state = lambda: {"inc": 1, "log_seq": len(tiny.records)}
    tiny.trainer.growth = lambda: change(at) if tiny.trainer.progress.step == at else None
    return tiny


class Start:
    """One start of a run after the other, as far as its experts are concerned."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.run, self.config = RunDirectory(folder), config
        self.found: Found | None = None
        self.reported: list[tuple[int, str]] = []

    @classmethod
    def of(cls, tiny: Tiny) -> Start:
        """The run of a trainer that has left, with its log."""
        start = cls(tiny.manager.run_dir, tiny.config)
        with MetricLog(start.run.metrics_path, 1, sync_interval=0) as log:
            for record in tiny.records:
                log.emit(record)
        return start

    def settle(self, failing: int = 0) -> Config:
        """What is in force now. The sync number `failing` of the log meets a disk error."""
        syncs = 0
        with MetricLog(self.run.metrics_path, 2, sync_interval=0) as log:

            def sync() -> None:
                nonlocal syncs
                syncs += 1
                if syncs == failing:
                    raise OSError(errno.EDQUOT, "Disk quota exceeded")
                log.sync()

            tell = (log.emit, sync, lambda step, section: self.reported.append((step, section)))
            self.config, self.found = experts_in_force(self.config, Comm(), self.run, *tell)
        return self.config

    def fits(self) -> None:
        """The model has passed its dry run."""
        with MetricLog(self.run.metrics_path, 2, sync_interval=0) as log:
            drop_former(self.found, self.run, log.emit)

    def path(self) -> Path:
        assert self.found is not None and self.found.path is not None
        return self.found.path

    def records(self, kind: type, **values: Any) -> list[Any]:
        found = [r for r in read_records(self.run.metrics_path) if isinstance(r, kind)]
        return [r for r in found if all(getattr(r, name) == value for name, value in values.items())]

    def told(self) -> list[str]:
        return [r.code for r in self.records(rec.Alert)]


# ---- the save ---------------------------------------------------------------------------------------------------------------


def test_c099_a_save_with_a_decision_ends_the_start_and_has_the_decision_behind_it(tmp_path: Path) -> None:
    tiny = growing(tmp_path)
    summary = tiny.train()
    assert (summary["state"], summary["exit_code"], summary["step"]) == ("restarting", 92, AT)
    assert summary["reason"] == "4 experts in each layer -> 5: expert 1 of layer 0 is hot"
    kinds = [type(r) for r in tiny.records if not isinstance(r, rec.Step | rec.Experts)]
    assert kinds == [rec.Run, rec.Checkpoint, rec.Change, rec.Checkpoint, rec.Run]
    place = next(n for n, r in enumerate(tiny.records, start=1) if isinstance(r, rec.Change))
    loaded = tiny.manager.load(tiny.manager.path_of(AT))
    assert loaded.manifest["log_seq"] >= place and [
        action["step"] for action in loaded.global_state["adaptive"]["actions"]
    ] == [AT]
    assert tiny.trainer.adaptive.spent == 1 and tiny.trainer.config.num_experts == 4


def test_c099_a_save_that_fails_costs_the_change_and_no_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, real = growing(tmp_path), os.statvfs
    full = SimpleNamespace(f_bavail=0, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: full if tiny.trainer.progress.step == AT else real(path))
    summary = tiny.train()
    assert (summary["exit_code"], summary["step"]) == (0, 24) and tiny.alerts() == ["checkpoint_failed", FAILED]
    [told] = [r.message for r in tiny.records if isinstance(r, rec.Alert) and r.code == FAILED]
    assert told.startswith("step 8: the run stays with 4 experts: its checkpoint failed: not enough room in ")
    assert [step for step, _ in tiny.manager.committed()] == [24, 20, 16, 12, 4]


def test_c099_only_a_save_of_the_interval_is_asked_for_a_decision(tmp_path: Path) -> None:
    last = growing(tmp_path / "last", at=8, max_steps=8, save_interval=8)
    assert last.train()["exit_code"] == 0
    told = growing(tmp_path / "told")
    told.channel.commands[AT] = [Command(id="c", cmd="checkpoint", args={})]
    assert told.train()["exit_code"] == 0, "it is saved already, with nothing of a decision in its log"
    without = growing(tmp_path / "without")
    without.trainer.growth = None
    assert without.train()["exit_code"] == 0 and not [r for r in without.records if isinstance(r, rec.Change)]


@pytest.mark.slow
def test_c099_c071_ranks_of_a_machine_started_by_hand_obey_the_supervised_one(tmp_path: Path) -> None:
    """Two ranks, of which only the first has a supervisor that starts it again."""
    run = prepare(tmp_path, "r", world=2, **KEYS | {"precision": "bf16", "dynamic_precision": True})
    found = last_line(launch(RANKS, 2, str(run.path)), "GROWTH ")
    assert found == {"codes": [92, 92], "steps": [AT, AT], "ladders": [True, True]}
    [told] = [r for r in read_records(run.metrics_path) if isinstance(r, rec.Change)]
    assert (told.what, told.step) == ("num_experts", AT)


# ---- the start behind it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """A run that has left for a change, which each test copies."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        tiny = growing(folder)
        assert tiny.train()["exit_code"] == 92
        Start.of(tiny)
    yield tiny


@pytest.fixture
def start(left: Tiny, tmp_path: Path) -> Callable[..., Start]:
    def make(name: str = "run", only: bool = False, **keys: Any) -> Start:
        folder = tmp_path / name
        shutil.copytree(left.manager.run_dir, folder)
        shutil.copytree(left.manager.run_dir.parent / "state", tmp_path / "state", dirs_exist_ok=True)
        if only:
            shutil.rmtree(folder / "checkpoints" / "step-000004")
        return Start(folder, left.config.model_copy(update=keys))

    return make


def test_c099_the_next_start_rewrites_the_checkpoint_and_goes_on_from_it(start: Callable[..., Start], left: Tiny) -> None:
    here = start()
    before = outputs(here.run.checkpoints / "step-000008")
    config = here.settle()
    assert (config.num_experts, config.capacity_factor) == (5, 1.3 * 5 / 4) and here.path().parent == here.run.checkpoints
    for was, now in zip(before, outputs(here.path()), strict=True):
        torch.testing.assert_close(now, was, atol=1e-6, rtol=1e-6)
    assert here.told() == [TRY] and names_in(here.run.emergency) == ["step-000008"], "until the other experts are known to fit"
    here.fits()
    assert here.told() == [TRY] and names_in(here.run.emergency) == []
    effects = [(r.what, r.step, r.before, r.after) for r in here.records(rec.Change, by="recovery")]
    assert effects == [("num_experts", AT, 4, 5), ("capacity_factor", AT, 1.3, 1.3 * 5 / 4)]
    here.config = left.config  # killed before config.yaml said it
    assert here.settle() == config and here.told() == [TRY]
    assert here.settle() == config and len(here.records(rec.Change, by="recovery")) == 4, "nothing is left to be said"


def test_c099_while_a_checkpoint_is_rewritten_the_rank_says_so(start: Callable[..., Start]) -> None:
    here = start()
    looking, rewriting = (0, "data"), (AT, "experts")
    before = chunks(here.run.checkpoints / "step-000008")
    here.settle()
    parts = {place: len(list(words)) for place, words in itertools.groupby(here.reported)}
    assert list(parts) == [looking, rewriting] and parts[looking] == before, "every digest is compared first"
    assert parts[rewriting] > 4 * len(read_manifest(here.path()).files), "read, copied, written and read back"
    here.reported.clear()
    here.settle()
    assert here.reported == [looking] * chunks(here.path()), "nothing is rewritten any more"


def test_ft07_c099_behind_a_try_that_failed_the_rank_says_that_it_looks_again(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = start()

    def refused(*_: object) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr(experts, "read_source", refused)
    here.settle()
    assert here.told() == [TRY, FAILED]
    assert here.reported.count((AT, "experts")) == 1 + chunks(here.path()), "the beginning of the try, and all that is read"


def chunks(path: Path) -> int:
    """How many pieces a checkpoint is read in when its digests are compared."""
    return sum(len(entry.chunks) for entry in read_manifest(path).files)


def test_c099_what_was_verified_here_is_not_read_again_and_what_was_damaged_is_told(start: Callable[..., Start]) -> None:
    here = start()
    here.settle()
    shutil.copytree(here.path(), here.run.checkpoints / "step-000012")  # says that it is of another step
    here.settle()
    manager = CheckpointManager(here.config, here.run.path)
    assert manager.recover(known=here.found) == here.path() and len(manager.notes) == 1
    assert manager.notes[0].startswith("step-000012 is damaged and was set aside as step-000012.corrupt")


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_c099_killed_anywhere_in_it_the_next_start_reaches_the_same(
    start: Callable[..., Start], tmp_path: Path, every: int
) -> None:
    """Where the checkpoint of the decision is the only one. Rig K: at every durability call, those of the log too; with each
    commit at every fourth."""
    template = start("template", only=True)
    before = outputs(template.run.checkpoints / "step-000008")
    seen: set[str] = set()
    met: set[tuple[int, str]] = set()

    def prepare() -> Path:
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template.run.path, folder)
        return folder

    def run(folder: Path) -> None:
        here = Start(folder, template.config)
        here.settle()
        here.fits()

    for number, folder in kill_points(prepare, run, every=every):
        here = Start(folder, template.config)
        config = here.settle()
        here.fits()
        assert (config.num_experts, here.path()) == (5, here.run.checkpoints / "step-000008"), number
        manager = CheckpointManager(config, here.run.path, run_id="run")
        assert manager.recover(known=here.found) == here.path() and not manager.notes, number
        assert manager.load(here.path()).model_config["num_experts"] == 5, number
        assert names_in(here.run.emergency) == [] and FAILED not in here.told(), number
        tries = len(here.records(rec.Alert, code=TRY))
        assert tries == 1 or not [name for name in names_in(here.run.checkpoints) if name.startswith(".tmp")], number
        met.add((tries, here.found.report.digest))  # type: ignore[union-attr]
        if here.found.report.digest not in seen:  # type: ignore[union-attr]
            seen.add(here.found.report.digest)  # type: ignore[union-attr]
            for was, now in zip(before, outputs(here.path()), strict=True):
                torch.testing.assert_close(now, was, atol=1e-6, rtol=1e-6)
    assert number > 60 and {tries for tries, _ in met} == {1, 2}


def test_c099_what_ends_the_process_is_tried_twice(start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch) -> None:
    here = start()

    class Gone(BaseException):
        pass

    def dies(*args: Any) -> None:
        raise Gone

    monkeypatch.setattr(experts, "in_place", dies)
    for _ in range(2):
        with pytest.raises(Gone):
            here.settle()
    for _ in range(2):
        assert here.settle().num_experts == 4 and here.told() == [TRY, TRY, FAILED]
    [alert] = here.records(rec.Alert, code=FAILED)
    assert alert.message.endswith("stays with 4 experts: each of 2 tries to rewrite its checkpoint ended with the process")


def test_c099_experts_that_do_not_fit_in_truth_leave_a_way_back(start: Callable[..., Start]) -> None:
    """By the checkpoint as it was, by the one before it, or, where there is none, by a run with one expert less."""
    here = start("one two")
    assert here.settle().num_experts == 5
    words = way_back(here.found, here.run)
    assert words.startswith("; step-000008 was given 5 experts in each layer instead of 4 by expert_growth=act")
    move, again = re.findall(r"mv .* && |lumina-engine train .*(?= \(which goes on from emergency/step-000008\))", words)
    assert shlex.split(again) == ["lumina-engine", "train", "--run", "one two", "--resume", "expert_growth=advise"]
    subprocess.run(shlex.split(move.removesuffix("&& ")), check=True)
    here.config = here.config.model_copy(update={"expert_growth": "advise"})
    config = here.settle()
    assert (config.num_experts, config.capacity_factor) == (4, 1.3) and here.path() == here.run.emergency / "step-000008"
    manager = CheckpointManager(config, here.run.path, run_id="run")
    assert manager.recover(known=here.found) == here.path() and manager.load(here.path()).step == AT
    assert way_back(here.found, here.run) == ""
    assert here.path().is_dir() and FAILED not in here.told()
    other = start("other")
    other.settle()
    other.fits()
    assert "(which goes on from step-000004)" in way_back(other.found, other.run)
    alone = start("alone", only=True)
    alone.settle()
    alone.fits()
    assert "lumina-engine checkpoint shrink alone@latest --run alone-shrink" in way_back(alone.found, alone.run)


# ---- refusals ---------------------------------------------------------------------------------------------------------------


def refused(here: Start, words: str) -> None:
    """One alert, the run goes on with what it has, and a later start says nothing more."""
    for _ in range(2):
        assert here.settle().num_experts == 4 and here.path() == here.run.checkpoints / "step-000008"
    assert here.told() == [TRY, FAILED]
    [alert] = here.records(rec.Alert, code=FAILED)
    assert (alert.severity, alert.step) == ("warning", AT) and alert.recommendation
    assert alert.message.startswith("step 8: the run stays with 4 experts: ") and words in alert.message
    assert not [name for name in names_in(here.run.checkpoints) if name.startswith(".tmp")]


def test_c099_a_model_that_would_not_fit_is_refused(start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "detect", lambda: Machine([], 1 << 20, 2, None))
    refused(start(), "does not fit")


def test_c099_no_room_for_the_rewritten_checkpoint_is_refused(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs
    monkeypatch.setattr(experts, "detect", lambda: Machine([], 16 << 30, 2, 9))  # what is left on the disk is not its business
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=9, f_frsize=real(path).f_frsize))
    refused(start(), "not enough room in")


def test_c099_a_log_that_cannot_be_brought_onto_the_disk_is_refused(start: Callable[..., Start]) -> None:
    here = start()
    assert here.settle(failing=1).num_experts == 4
    refused(here, "Disk quota exceeded")


def test_c099_a_log_that_fails_once_all_is_done_costs_nothing(start: Callable[..., Start], left: Tiny) -> None:
    here = start()
    config = here.settle(failing=2)
    assert config.num_experts == 5 and here.told() == [TRY, "log_not_synced"]
    assert len(here.records(rec.Change, by="recovery")) == 2
    here.config = left.config  # config.yaml does not say it
    assert here.settle() == config and FAILED not in here.told()


def test_c099_fewer_experts_allowed_than_when_it_was_decided_is_refused(start: Callable[..., Start]) -> None:
    refused(start(max_num_experts=4), "4 experts in each layer, and max_num_experts = 4: set it higher to grow")


def test_c099_as_many_experts_as_are_allowed_are_not_refused(start: Callable[..., Start]) -> None:
    assert start(max_num_experts=5).settle().num_experts == 5


def test_c099_a_merge_that_costs_too_much_is_refused(start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch) -> None:
    here = start()
    lines = here.run.metrics_path.read_text().replace(
        '"before":4,"after":5,"by":"adaptive"', '"before":4,"after":3,"by":"adaptive"'
    )
    here.run.metrics_path.write_text(lines)
    monkeypatch.setattr(experts, "probe_loss", lambda shape, *_: 2.0 + (shape["num_experts"] == 3))
    refused(here, "without these experts the loss goes from 2.0000 to 3.0000")


def test_c099_a_merge_weighs_by_the_load_of_the_log(start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch) -> None:
    here = start()
    lines = here.run.metrics_path.read_text().replace(
        '"before":4,"after":5,"by":"adaptive"', '"before":4,"after":3,"by":"adaptive"'
    )
    here.run.metrics_path.write_text(lines)
    given: list[Any] = []
    real = experts.shrinking
    monkeypatch.setattr(experts, "shrinking", lambda *args: given.append(args[2]) or real(*args))
    monkeypatch.setattr(experts, "probe_loss", lambda *_: 2.0)
    assert here.settle().num_experts == 3 and here.config.capacity_factor == 1.3
    [record] = [r for r in here.records(rec.Experts) if r.step <= AT]
    assert given == [{0: record.load[0]}]


def test_c099_a_defect_is_told_too_and_its_traceback_is_in_the_log(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experts, "in_place", lambda *args: {}["nothing"])
    refused(start(), "KeyError: 'nothing'")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [{"expert_growth": "advise"}, {"adaptive": "advise"}])
def test_c099_what_nobody_wants_any_more_is_not_done(start: Callable[..., Start], keys: dict[str, Any]) -> None:
    here = start(**keys)
    assert here.settle().num_experts == 4 and here.told() == []


# ---- which decision, which checkpoint ---------------------------------------------------------------------------------------


def log_of(*records: rec.Record) -> list[rec.Record]:
    for seq, record in enumerate(records, start=1):
        record.seq = seq
    return list(records)


def test_c099_a_decision_is_due_for_its_own_checkpoint_only() -> None:
    log = log_of(rec.Step(step=1), change())
    assert pending(log, AT, 2, 4) == (log[1], 0)
    assert pending(log, AT, 1, 4) is None, "saved before it"
    assert pending(log, AT + 4, 2, 4) is None and pending(log, AT, 2, 5) is None and pending([], AT, 2, 4) is None
    assert pending(log_of(change(), rec.Rewind(to_step=AT)), AT, 9, 4) is not None
    assert pending(log_of(change(), rec.Rewind(to_step=4)), AT, 9, 4) is None
    tries = [rec.Alert(severity="info", code=TRY, message="") for _ in range(2)]
    for count in (1, 2):
        found = pending(log_of(change(), *tries[:count]), AT, 9, 4)
        assert found is not None and found[1] == count
    again = log_of(change(), *tries, rec.Rewind(to_step=4), change())
    assert pending(again, AT, 9, 4) == (again[-1], 0)
    assert pending(log_of(change(), rec.Alert(severity="warning", code=FAILED, message="")), AT, 9, 4) is None
    assert pending(log_of(rec.Change(what="num_experts", step=AT, before=4, after=5, by="recovery")), AT, 9, 4) is None


def test_c099_back_behind_the_change_the_experts_come_back(start: Callable[..., Start]) -> None:
    """What was made is damaged: the run goes on from the checkpoint before, as that was."""
    here = start()
    here.settle()
    here.fits()
    broken = here.path() / "model" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    config = here.settle()
    assert here.path().name == "step-000004" and (config.num_experts, config.capacity_factor) == (4, 1.3)
    assert here.found is not None and [name for name, _ in here.found.rejected] == ["step-000008"]
    assert here.settle() == config


def test_c099_the_room_that_somebody_has_chosen_goes_with_the_experts() -> None:
    config = Config(num_experts=4, capacity_factor=1.3, moe_top_k=1)
    grown = {"num_experts": 5, "capacity_factor": 1.3 * 5 / 4}
    assert keys_for(config, grown, (4, 5)) == grown
    back = config.model_copy(update=grown)
    assert keys_for(back, {"num_experts": 4, "capacity_factor": 1.3}, (4, 5)) == {"num_experts": 4, "capacity_factor": 1.3}
    chosen = config.model_copy(update={"capacity_factor": 2.0})
    assert keys_for(chosen, grown, (4, 5)) == {"num_experts": 5, "capacity_factor": 2.5}
    most = config.model_copy(update={"capacity_factor": 60.0})
    assert keys_for(most, {"num_experts": 5, "capacity_factor": 64.0}, (4, 5))["capacity_factor"] == 64.0
    less = {"num_experts": 3, "capacity_factor": 1.3}
    assert keys_for(config, less, (4, 3)) == less
    assert keys_for(config.model_copy(update={"moe_dropless": True}), grown, (4, 5)) == {"num_experts": 5}
    assert keys_for(config, grown, ()) == keys_for(config, grown, (5, 6)) == keys_for(back, grown, (4, 5)) == {}


def test_c099_a_checkpoint_of_other_experts_than_the_run_ever_had_is_refused(start: Callable[..., Start]) -> None:
    here = start(num_experts=6)
    config = here.settle()
    assert config.num_experts == 6
    with pytest.raises(CheckpointError, match="num_experts was 5, is 6"):
        CheckpointManager(config, here.run.path).load(here.path())


def test_c099_a_run_that_decided_nothing_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = growing(tmp_path, at=-1)
    tiny.train(until=8)
    here = Start.of(tiny)
    monkeypatch.setattr(experts, "newest_valid", lambda *folders, **_: pytest.fail("every digest would be compared twice"))
    assert here.settle() is tiny.config and here.found is None
