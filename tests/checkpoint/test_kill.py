"""SIGKILL before every durability call of everything that writes, and in the middle of writes (rig K)."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lumina_engine.checkpoint import direct, files
from lumina_engine.checkpoint.commit import retain, rewind, set_pointer
from lumina_engine.checkpoint.manager import CheckpointManager, capture_rng, restore_rng
from tests.checkpoint.helpers import (
    in_child,
    kill_at,
    kill_points,
    manager,
    names_in,
    payload,
    same,
    saved,
    settings,
    valid_steps,
)


def train(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps first … last; the batch of a step follows from its number."""
    for step in range(first, last + 1):
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.dropout(model(rows), 0.5).square().sum().backward()
        optimizer.step()


def trainer() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("written", "past_the_cache"),
    [
        pytest.param(0.0, False, id="0.0"),
        pytest.param(0.0, True, id="past_the_cache"),
        *(pytest.param(share, False, marks=pytest.mark.slow, id=f"ck02_within_writes_{share}") for share in (0.25, 0.5, 0.75)),
        pytest.param(0.7, True, marks=pytest.mark.slow, id="ck02_within_writes_past_the_cache"),
    ],
)
def test_ck01_kill_at_every_call_of_a_save(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, written: float, past_the_cache: bool
) -> None:
    if past_the_cache:
        monkeypatch.setattr(files, "takes_direct", lambda fd, size: size is not None)
        monkeypatch.setattr(direct, "BLOCK_BYTES", 4096 if not written else 3 * 4096)
    model, optimizer = trainer()
    train(model, optimizer, 1, 5)
    unbroken = model.weight.detach().clone()
    template = fresh()
    model, optimizer = trainer()
    train(model, optimizer, 1, 1)
    manager(template / "run").save_checkpoint(model=model, optimizer=optimizer, global_step=1)
    random_state = capture_rng()

    def prepare() -> Path:
        run = fresh() / "run"
        shutil.copytree(template / "run", run)
        return run

    def save_step_2(run: Path) -> None:
        restore_rng(*random_state)
        train(model, optimizer, 2, 2)
        manager(run).save_checkpoint(model=model, optimizer=optimizer, global_step=2)

    found = []
    for number, run in kill_points(prepare, save_step_2, written):
        again = manager(run)
        path = again.recover()
        assert path is not None and not again.notes, number
        assert not [name for name in names_in(run / "checkpoints") if ".tmp-" in name or ".trash-" in name], number
        resumed, resumed_optimizer = trainer()
        epoch = again.load_checkpoint(checkpoint_path=path, model=resumed, optimizer=resumed_optimizer)
        found.append(epoch.step)
        train(resumed, resumed_optimizer, epoch.step + 1, 5)
        assert torch.equal(resumed.weight, unbroken), number
        assert again.save_checkpoint(model=resumed, optimizer=resumed_optimizer, global_step=5).name == "step-000005", number
        shutil.rmtree(run.parent)
        run.parent.mkdir()
    assert 40 < len(found) < 120
    assert found == sorted(found) and set(found) == {1, 2}


def test_ck03_kill_while_a_pointer_moves(fresh: Callable[[], Path]) -> None:
    template = fresh()
    saved(template / "run", 1, 2)

    def prepare() -> Path:
        run = fresh() / "run"
        shutil.copytree(template / "run", run)
        return run

    for number, run in kill_points(prepare, lambda run: set_pointer(run / "checkpoints", "best", "step-000001")):
        again = manager(run)
        path = again.recover()
        assert path is not None and path.name == "step-000002", number
        assert not [name for name in names_in(path.parent) if "tmp" in name], number
        assert len(valid_steps(path.parent)) == 2


def test_ck03_kill_in_retention(fresh: Callable[[], Path]) -> None:
    template = fresh()
    saved(template / "run", 1, 2, 3, 4, keep_checkpoints=4)

    def prepare() -> Path:
        run = fresh() / "run"
        shutil.copytree(template / "run", run)
        return run

    names = ["step-000001", "step-000002", "step-000003", "step-000004"]
    counts = set()
    for number, run in kill_points(prepare, lambda run: retain(run / "checkpoints", 2, names)):
        left = valid_steps(run / "checkpoints")
        counts.add(len(left))
        assert len(left) >= 2, number
        again = manager(run)
        path = again.recover()
        assert path is not None and path.name == left[0] and not again.notes, number
        assert not [name for name in names_in(path.parent) if name.startswith(".")], number
    assert counts == {4, 3, 2}


def test_ck03_kill_in_a_rewind(fresh: Callable[[], Path]) -> None:
    template = fresh()
    saved(template / "run", 1, 2, 3, 4, keep_checkpoints=4)

    def prepare() -> Path:
        run = fresh() / "run"
        shutil.copytree(template / "run", run)
        return run

    for number, run in kill_points(prepare, lambda run: rewind(run / "checkpoints", 2)):
        again = manager(run)
        path = again.recover()
        assert path is not None and path.name in ("step-000002", "step-000003", "step-000004"), number
        again.rewind(2)
        for step in (3, 4):  # the other branch may use the names again, and the abandoned one goes with its first commit
            (result,) = again.save(payload(step))
            assert result.failed is None
        assert not [name for name in names_in(run / "checkpoints") if "rewound" in name], number


def test_ck03_kill_in_the_start_up_clean_up(fresh: Callable[[], Path]) -> None:
    template = fresh()
    saved(template / "run", 1, 2, 3, keep_checkpoints=3)
    folder = template / "run" / "checkpoints"
    shutil.copytree(folder / "step-000001", folder / ".tmp-step-000004-00000000")
    shutil.copytree(folder / "step-000001", folder / ".trash-step-000000-00000000")
    damaged = folder / "step-000003" / "state" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")

    def prepare() -> Path:
        run = fresh() / "run"
        shutil.copytree(template / "run", run)
        return run

    for number, run in kill_points(prepare, lambda run: manager(run).recover()):
        again = manager(run)
        path = again.recover()
        assert path is not None and path.name == "step-000002", number
        assert valid_steps(path.parent) == ["step-000002", "step-000001"]
        assert (path.parent / "step-000003.corrupt").is_dir()
        assert not [name for name in names_in(path.parent) if name.startswith(".")], number


def test_ck16_kill_at_every_call_of_an_asynchronous_save(fresh: Callable[[], Path]) -> None:
    """The writer thread dies with its process, in staging, in the commit, in retention: as if it had been a blocking save."""
    template = fresh()
    saved(template / "run", 1, 2)

    def prepare() -> Path:
        run = fresh() / "run"
        shutil.copytree(template / "run", run)
        return run

    def save_beside(run: Path) -> None:
        made = manager(run)
        made.save(payload(3), blocking=False)
        (result,) = made.wait()
        assert result.failed is None

    found = []
    for number, run in kill_points(prepare, save_beside):
        path = manager(run).recover()
        assert path is not None and len(valid_steps(run / "checkpoints")) >= 2 - (path.name == "step-000002"), number
        assert same(manager(run).load(path), payload(int(path.name[5:]))), number
        assert not [name for name in names_in(run / "checkpoints") if name.startswith(".")], number
        found.append(path.name)
        shutil.rmtree(run.parent)
        run.parent.mkdir()
    assert found == sorted(found) and set(found) == {"step-000002", "step-000003"}


def test_ck14_random_kills_never_cost_more_than_the_save_in_flight(
    fresh: Callable[[], Path], fault_random: random.Random
) -> None:
    run, choose, cycles = fresh() / "run", fault_random, 50
    committed = most = 0

    def save() -> None:
        kill_at(number)
        made = manager(run)
        made.recover()
        made.save(payload(step))

    for step in range(1, cycles + 1):
        number = choose.randint(20, 110)
        in_child(save)
        left = valid_steps(run / "checkpoints")
        committed, most = max(committed, len(left)), max(most, len(left))
        assert len(left) >= min(committed, 2), step
        if left and choose.random() < 0.3:  # a newest one that a power cut has torn
            torn = run / "checkpoints" / left[0] / "model" / "model.safetensors"
            torn.write_bytes(torn.read_bytes()[:-5])
            assert valid_steps(run / "checkpoints") == left[1:]
            committed = min(committed, len(left) - 1)
            if len(left) > 1:
                path = manager(run).recover()
                assert path is not None and path.name == left[1]
            else:
                shutil.rmtree(run)
    assert most >= 2


def test_c085_a_killed_first_save_leaves_a_run_that_starts(fresh: Callable[[], Path]) -> None:
    saved(fresh() / "other", 1)  # the ledger is there: the calls of each save are the same
    outcomes = set()
    for number, run in kill_points(lambda: fresh() / "run", lambda run: CheckpointManager(settings(), run).save(payload(1))):
        path = manager(run).recover()
        outcomes.add(None if path is None else path.name)
        if path is None:
            manager(run).require_new([])  # the ledger knew of the save, but of no commit
        loaded = None if path is None else manager(run).load(path)
        assert loaded is None or same(loaded, payload(1)), number
    assert outcomes == {None, "step-000001"}
