"""CK05: every state that a kill or a power cut may leave of the real writer's trace, put through the start-up rule."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lumina_engine.checkpoint import keep, ledger
from lumina_engine.checkpoint.commit import CheckpointError, newest_valid
from lumina_engine.checkpoint.manager import CheckpointManager
from tests.checkpoint.crash_model import ROOT, Recorder, State, materialise
from tests.checkpoint.helpers import manager, payload, settings


@pytest.fixture
def record(fresh: Callable[[], Path]) -> Iterator[Callable[[int], Recorder]]:
    """Records the save of step 3 beside the committed steps that retention leaves room for."""
    patch = pytest.MonkeyPatch()

    def make(kept: int) -> Recorder:
        run = fresh() / "run"
        made = manager(run, keep_checkpoints=kept)
        patch.setattr(keep, "MIN_KEEP", kept)
        for step in range(3 - kept, 3):
            made.save(payload(step, size=4))
        recorder = Recorder(run / "checkpoints")
        inner = pytest.MonkeyPatch()
        with recorder.recording(inner):
            (result,) = made.save(payload(3, size=4))
        assert result.failed is None and not result.notes
        return recorder

    yield make
    patch.undo()


class Judge:
    """Puts a state on a disk, starts up, and counts what became of it."""

    def __init__(self, recorder: Recorder, folder: Path) -> None:
        final = list(recorder.kill())[-2]
        self.whole = {
            name: self.files(state, name)
            for state in (recorder._tree(recorder.start, recorder.content), final)
            for name in state
        }
        self.folder, self.seen = folder, set[int]()
        self.counts = {"good": 0, "stuck": 0, "wrong": 0, "scratch": 0, "alarm": 0}

    @staticmethod
    def files(state: State, name: str) -> State:
        return {path: content for path, content in state.items() if path.startswith(f"{name}/")}

    def is_red(self, states: Iterator[State]) -> bool:
        """Whether some state loses the run."""
        return any(self.verdict(state) in ("stuck", "scratch") for state in self.unseen(states))

    def judge(self, states: Iterator[State]) -> dict[str, int]:
        for state in self.unseen(states):
            self.counts[self.verdict(state)] += 1
        return self.counts

    def unseen(self, states: Iterator[State]) -> Iterator[State]:
        for state in states:
            key = hash(tuple(sorted(state.items(), key=lambda item: item[0])))
            if key not in self.seen:
                self.seen.add(key)
                yield state

    def verdict(self, state: State) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        materialise(state, self.folder)
        try:
            found = newest_valid(self.folder)
        except CheckpointError:
            return "stuck"
        if found.path is None:
            return "scratch"
        if self.files(state, found.path.name) != self.whole[found.path.name]:
            return "wrong"
        return "alarm" if found.rejected else "good"


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("model", ["kill", "power", "directories"])
def test_ck05_no_state_is_stuck_wrong_from_scratch_or_a_false_alarm(
    fresh: Callable[[], Path], record: Callable[[int], Recorder], kept: int, model: str
) -> None:
    recorder = record(kept)
    counts = Judge(recorder, fresh() / "disk").judge(getattr(recorder, model)())
    assert counts["good"] > 50 and sum(counts.values()) == counts["good"], counts


def test_ck05_red_without_the_fsync_of_any_file(fresh: Callable[[], Path], record: Callable[[int], Recorder]) -> None:
    recorder = record(1)
    committed = next(op for op in recorder.ops if op.kind == "rename" and op.to == "step-000003")
    created = {op.node: op for op in recorder.ops if op.kind == "entry" and op.node >= 0 and op.to != "folder"}
    folders = {committed.node} | {op.node for op in recorder.ops if op.to == "folder" and op.folder == committed.node}
    victims = [node for node, op in created.items() if op.folder in folders and op.name != "LEASE"]
    assert len(victims) == 8
    for victim in victims:
        assert Judge(recorder, fresh() / "disk").is_red(recorder.power({victim})), created[victim].name


def test_ck05_red_without_the_fsync_of_folders(fresh: Callable[[], Path], record: Callable[[int], Recorder]) -> None:
    recorder = record(1)
    committed = next(op for op in recorder.ops if op.kind == "rename" and op.to == "step-000003")
    inner = [op.node for op in recorder.ops if op.to == "folder" and op.folder == committed.node]
    assert len(inner) == 2
    for victim in (committed.node, *inner, ROOT):  # staging, model/, state/, checkpoints/ between commit and first deletion
        states = list(recorder.directories({victim}))[::-1]  # the trouble comes late in the trace
        assert Judge(recorder, fresh() / "disk").is_red(iter(states)), victim


class LedgerJudge(Judge):
    """Judges a run and the ledger beside it: a commit that is on the disk is in the ledger too, or it counts as replaced."""

    def verdict(self, state: State) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        materialise(state, self.folder)
        found = newest_valid(self.folder / "run" / "checkpoints")
        if found.report is None or found.report.step is None:
            return "scratch"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(self.folder / "state"))
            known = found.report.step < 3 or found.report.digest in ledger.recorded("r", found.report.step)
        return "good" if known else "stuck"


@pytest.fixture
def record_with_ledger(fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Recorder]:
    """Records the save of step 3 after a rewind to 2: the ledger has the step with other content, or is a new one."""

    def make(new: bool) -> Recorder:
        root = fresh()
        monkeypatch.setenv("XDG_STATE_HOME", str(root / "state"))
        made = CheckpointManager(settings(), root / "run", run_id="r")
        for step in (1, 2, 3):
            made.save(payload(step, size=4))
        made.rewind(2)
        if new:
            shutil.rmtree(root / "state")
        recorder = Recorder(root)
        with recorder.recording(pytest.MonkeyPatch()):
            (result,) = made.save(payload(3, size=4, tokens=7))
        assert result.failed is None and not result.notes
        return recorder

    return make


@pytest.mark.parametrize("new", [False, True], ids=["again", "new"])
@pytest.mark.parametrize("model", ["kill", "power", "directories"])
def test_ck05_every_commit_that_outlives_a_crash_is_in_the_ledger(
    fresh: Callable[[], Path], record_with_ledger: Callable[[bool], Recorder], model: str, new: bool
) -> None:
    recorder = record_with_ledger(new)
    counts = LedgerJudge(recorder, fresh() / "disk").judge(getattr(recorder, model)())
    assert counts["good"] > 50 and sum(counts.values()) == counts["good"], counts


@pytest.mark.parametrize("new", [False, True], ids=["again", "new"])
def test_ck05_red_without_the_fsync_of_the_ledger(
    fresh: Callable[[], Path], record_with_ledger: Callable[[bool], Recorder], new: bool
) -> None:
    recorder = record_with_ledger(new)
    entries = recorder._entries(op for op in recorder.ops if op.kind in ("entry", "rename"))
    folder = entries[entries[ROOT]["state"]]["lumina"]
    victim = entries[folder]["checkpoints.jsonl"]
    assert LedgerJudge(recorder, fresh() / "disk").is_red(recorder.power({victim}))
    if new:
        states = list(recorder.directories({folder}))[::-1]  # the trouble comes late in the trace
        assert LedgerJudge(recorder, fresh() / "disk").is_red(iter(states))


def test_ck05_a_short_write_leaves_a_whole_entry(fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(fresh()))
    real = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, memoryview(data)[:7]))
        ledger.record("r", 1, "a" * 64)
        ledger.record("r", 1, "b" * 64, committed=True)
    assert ledger.recorded("r", 1) == {"a" * 64, "b" * 64} and ledger.committed_steps("r") == {1}


def test_ck05_a_ledger_that_cannot_take_the_step_again_fails_the_save(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is there with other content: a commit that the ledger does not know would be refused as replaced."""
    made = CheckpointManager(settings(), fresh() / "run", run_id="r")
    for step in (1, 2):
        made.save(payload(step))
    made.rewind(1)
    real = ledger.record

    def broken(run: str, step: int, digest: str, committed: bool = False) -> None:
        if step == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(run, step, digest, committed)

    monkeypatch.setattr(ledger, "record", broken)
    (result,) = made.save(payload(2, tokens=7))
    assert result.failed is not None and "Input/output error; it has this step with other content" in result.failed
    path = made.recover()
    assert path is not None and path.name == "step-000001"
    (result,) = made.save(payload(3))
    assert result.failed is None
