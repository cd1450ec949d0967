"""CK05: every state that a kill or a power cut may leave of the real writer's trace, put through the start-up rule."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lumina_engine.checkpoint import keep
from lumina_engine.checkpoint.commit import CheckpointError, newest_valid
from tests.checkpoint.crash_model import ROOT, Recorder, State, materialise
from tests.checkpoint.helpers import manager, payload


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
