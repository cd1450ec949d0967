"""Saving and loading: every dtype, every kind of state, several ranks, plain torch objects, pointers, references."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file

from lumina_engine.checkpoint import backup, consolidate, files, keep, saving
from lumina_engine.checkpoint.commit import CheckpointError, list_steps, pointer, verify
from lumina_engine.checkpoint.compress import read_compressed
from lumina_engine.checkpoint.manager import (
    CheckpointManager,
    LocalComm,
    Payload,
    capture_rng,
    pack,
    resolve_checkpoint,
    restore_rng,
    unpack,
)
from lumina_engine.checkpoint.resolve import explain_checkpoint
from lumina_engine.checkpoint.tensors import DTYPES, first_non_finite
from lumina_engine.checkpoint.verify import read_manifest
from lumina_engine.training.saves import Saves
from tests.checkpoint.helpers import Clock, manager, names_in, payload, same, saved, settings

DTYPE_LIST = list(DTYPES)


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {}
    for dtype in DTYPE_LIST:
        base = torch.randint(0, 2 if dtype is torch.bool else 100, (5, 7), generator=generator)
        made[f"t.{dtype}"] = base.to(dtype)
    weights = torch.randn(6, 8, generator=generator)
    return made | {
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 3),
        "transposed": weights.t(),
        "slice": weights[1::2, ::3],
        "expanded": torch.ones(1).expand(4, 4),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "bf16 odd": torch.randn(3, generator=generator).bfloat16(),
    }


@pytest.mark.parametrize("blocking", [True, False])
def test_c078_round_trip_of_every_dtype_and_layout(tmp_path: Path, blocking: bool) -> None:
    tensors = every_dtype()
    made = manager(tmp_path)
    (result,) = made.save(payload(1, rank_tensors=tensors), blocking=blocking) or made.wait()
    assert result.failed is None and result.path is not None
    loaded = made.load(result.path)
    assert set(loaded.rank_tensors) == set(tensors)
    for name, tensor in tensors.items():
        other = loaded.rank_tensors[name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape
        assert torch.equal(
            other.contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        ), name
    foreign = load_file(result.path / "state" / "rank-00000.safetensors")
    assert all(torch.equal(foreign[name], tensor) for name, tensor in tensors.items() if name != "special")


def test_c078_large_tensors_cross_the_digest_chunks(tmp_path: Path) -> None:
    made = manager(tmp_path)
    wanted = payload(1, size=5_000_000)
    (result,) = made.save(wanted)
    assert result.path is not None and same(made.load(result.path), wanted)
    entry = next(entry for entry in verify(result.path).files if entry.path == "model/model.safetensors")
    assert entry.size > 20_000_000 and len(entry.chunks) == 3


def test_a_loaded_tensor_can_be_changed_without_touching_the_file(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-000001"
    made.load(path).model["layer.weight"].fill_(7)
    assert verify(path).ok and same(made.load(path), payload(1))


FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_c078_what_is_not_finite_is_named_and_what_only_sums_to_infinity_is_not(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    sound = {"large": torch.full((500,), most, dtype=dtype), "empty": torch.empty(0, dtype=dtype), "number": torch.tensor([1])}
    assert first_non_finite(sound) is None and first_non_finite({}) is None
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = torch.zeros(70, 3, dtype=dtype)
        bad[-1, -1] = value
        assert first_non_finite({**sound, "first": bad, "second": bad}) == "first"
        assert first_non_finite({"opposed": torch.tensor([value, -value], dtype=dtype)}) == "opposed"


def test_state_keeps_tuples_keys_and_non_finite_numbers() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {
        "a": (1, 2.5, None, True, "x"),
        3: [float("nan"), -float("inf")],
        "nested": {"@odd": {1: torch.arange(3)}, "t": torch.ones(2)},
        "numpy": np.float32(0.5),
        "whole": [[], (), [1, 2], (3,), [True, False], (1, True), [1, (2,)]],
        "big": 2**200,
        "order": {"z": 1, "a": 2},
    }
    back = unpack(json.loads(json.dumps(pack(state, "s", tensors), allow_nan=False)), tensors)
    assert repr(back) == repr({**state, "numpy": 0.5})
    assert pack([np.int64(1), 2], "s") == [1, 2] and type(pack([np.int64(1)], "s")[0]) is int
    with pytest.raises(CheckpointError, match=r"s\.f is a builtin_function"):
        pack({"f": len}, "s")
    with pytest.raises(CheckpointError, match="tensors belong into rank_tensors"):
        pack({"f": torch.ones(1)}, "s")


def test_a_value_that_cannot_be_stored_fails_the_save_only(tmp_path: Path) -> None:
    made = manager(tmp_path)
    (result,) = made.save(payload(1, global_state={"x": object()}))
    assert (
        result.failed
        == "trainer.global_state.x is a object, which a checkpoint cannot hold (numbers, texts, lists, mappings, tensors)"
    )
    (result,) = made.save(payload(1, rank_tensors={"z": torch.ones(2, dtype=torch.complex64)}))
    assert result.failed is not None and "tensor z: torch.complex64" in result.failed


def test_rs04_random_state_of_python_numpy_and_torch_comes_back() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1)
    np.random.standard_normal()
    state, tensors = capture_rng()

    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()]

    first = draw()
    restore_rng(unpack(json.loads(json.dumps(pack(state, "rng")))), tensors)
    assert draw() == first
    with pytest.raises(CheckpointError, match="lacks numpy"):
        restore_rng({"python": state["python"]}, tensors)


# ---- plain torch ---------------------------------------------------------------------------------------------------------


def network(width: int = 8) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Dropout(0.5), torch.nn.Linear(width, 2))


def parts(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


def steps(model: torch.nn.Module, optimizer: Any, scheduler: Any, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()


def test_c080_resume_in_a_plain_script_is_bit_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network()
    optimizer, scheduler = parts(model)
    steps(model, optimizer, scheduler, 5)
    made = manager(tmp_path)
    path = made.save_checkpoint(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        global_step=5,
        current_epoch=3,
        metrics={"loss": 0.5, "tokens": 70},
        is_best=True,
    )
    assert path == tmp_path / "checkpoints" / "step-000005" and pointer(path.parent, "best") == path.name
    steps(model, optimizer, scheduler, 5)
    torch.manual_seed(99)
    other = network()
    other_optimizer, other_scheduler = parts(other)
    epoch = manager(tmp_path).load_checkpoint(
        checkpoint_path=path, model=other, optimizer=other_optimizer, scheduler=other_scheduler, strict=True
    )
    assert (epoch, epoch + 1, epoch.step, epoch.tokens, epoch.metrics) == (3, 4, 5, 70, {"loss": 0.5, "tokens": 70})
    assert epoch.report == ["model: 4 tensors", "optimizer: restored", "scheduler: restored", "random state: restored"]
    steps(other, other_optimizer, other_scheduler, 5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert repr(optimizer.state_dict()) == repr(other_optimizer.state_dict())
    assert scheduler.state_dict() == other_scheduler.state_dict()


def test_r33_strict_false_leaves_out_only_optional_state(tmp_path: Path) -> None:
    made = manager(tmp_path)
    model = network()
    made.save_checkpoint(model=model, global_step=1)
    optimizer, scheduler = parts(model)
    epoch = made.load_checkpoint(model=model, optimizer=optimizer, scheduler=scheduler)
    assert epoch.report[-2:] == [
        "optimizer: not in the checkpoint, left as it is",
        "scheduler: not in the checkpoint, left as it is",
    ]
    with pytest.raises(CheckpointError, match=r"optimizer: not in the checkpoint.*strict=False"):
        made.load_checkpoint(model=model, optimizer=optimizer, strict=True)


def test_r33_weights_that_do_not_fit_are_refused_with_a_diff_and_nothing_changes(tmp_path: Path) -> None:
    made = manager(tmp_path)
    model = network()
    optimizer, scheduler = parts(model)
    steps(model, optimizer, scheduler, 1)
    made.save_checkpoint(model=model, optimizer=optimizer, global_step=1)
    for other, words in (
        (network(9), r"other shape: 0\.weight \(8, 4\) in the checkpoint, \(9, 4\) in the model"),
        (torch.nn.Sequential(*network(), torch.nn.Linear(2, 2)), r"missing in the checkpoint: 3\.weight, 3\.bias"),
        (torch.nn.Sequential(torch.nn.Linear(4, 8)), r"unknown to the model: 2\.bias, 2\.weight"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=words):
                made.load_checkpoint(model=other, strict=strict)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    other = network()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"groups of \[4\] parameters, this one has \[2\]"):
        made.load_checkpoint(model=other, optimizer=torch.optim.SGD(list(other.parameters())[:2], lr=1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_r33_other_precision_is_converted_and_said(tmp_path: Path) -> None:
    made, model = manager(tmp_path), network()
    made.save_checkpoint(model=model, global_step=1)
    epoch = made.load_checkpoint(model=network().bfloat16())
    assert "weights converted from torch.float32 to torch.bfloat16" in epoch.report


def test_c079_a_save_that_fails_raises_in_a_plain_script(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"step 3 was not saved: parameter 0\.weight is not finite"):
        manager(tmp_path).save_checkpoint(model=model, global_step=3)


def test_c079_without_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_RUNS", str(tmp_path / "runs"))
    made = CheckpointManager(settings(experiment_name="mine"))
    assert not (tmp_path / "runs").exists()
    assert made.save_checkpoint(model=network(), global_step=1) == tmp_path / "runs" / "mine" / "checkpoints" / "step-000001"
    assert CheckpointManager(settings()).run_dir.name.startswith("script-")


def test_saving_a_step_twice_is_no_fault_but_another_run_of_it_is(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    (result,) = made.save(payload(1), id="again")
    assert result.failed is None and result.verified and result.id == "again" and result.path is not None
    (result,) = manager(tmp_path).save(payload(1))
    assert result.failed is not None and "exists already and is never overwritten" in result.failed


# ---- emergency, best, start --------------------------------------------------------------------------------------------------


def test_c084_emergency_save_stands_beside_and_is_found(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    path = made.emergency(payload(2))
    assert path == tmp_path / "emergency" / "step-000002" and list_steps(tmp_path / "checkpoints") == ["step-000001"]
    assert made.emergency(payload(2)) == path and made.emergency(payload(1)) == tmp_path / "checkpoints" / "step-000001"
    again = manager(tmp_path)
    assert again.recover() == path and same(again.load(path), payload(2))
    again.save(payload(3))
    assert manager(tmp_path).recover() == tmp_path / "checkpoints" / "step-000003"
    os.truncate(path / "LEASE", 5)
    assert made.emergency(payload(2)) == path and (tmp_path / "emergency" / "step-000002.corrupt").is_dir()


def test_c084_emergency_saves_go_once_two_checkpoints_have_overtaken_them(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    made.emergency(payload(3))
    again = manager(tmp_path)
    assert again.recover() == tmp_path / "emergency" / "step-000003"
    left = []
    for step in (4, 5, 6):
        again.save(payload(step))
        left.append(names_in(tmp_path / "emergency"))
    assert left == [["step-000003"], [], []]


def test_c084_an_emergency_save_is_the_latest_until_a_checkpoint_is(tmp_path: Path) -> None:
    made = saved(tmp_path / "run", 1, 2)
    made.mark_best(2)
    made.emergency(payload(3))
    emergency = tmp_path / "run" / "emergency" / "step-000003"
    assert explain_checkpoint("run@latest", tmp_path) == (emergency, "latest of run run, an emergency save")
    assert explain_checkpoint("run@step-000003", tmp_path) == (emergency, "step-000003 of run run, an emergency save")
    assert resolve_checkpoint("run", tmp_path).name == "step-000002", "the best"
    made.save(payload(3))  # as a start that went on from an earlier one would
    assert resolve_checkpoint("run@step-000003", tmp_path) == tmp_path / "run" / "checkpoints" / "step-000003"
    only = manager(tmp_path / "only")
    path = only.emergency(payload(1))
    why = "latest of run only, an emergency save (no best one is known yet)"
    assert explain_checkpoint("only", tmp_path) == (path, why)


@pytest.mark.parametrize("name", ["checkpoints", "emergency", "backups"])
def test_se05_a_linked_folder_of_a_run_is_refused_at_the_start_and_nothing_is_changed(tmp_path: Path, name: str) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    saved(run, 1).emergency(payload(2))
    (run / "backups").mkdir(exist_ok=True)
    (run / name).rename(disk)
    (run / name).symlink_to(disk)
    before = names_in(disk), names_in(run)
    for clean in (False, True):
        with pytest.raises(CheckpointError, match=rf"run/{name} is a symbolic link to {disk}.*mv {disk} {run / name}"):
            manager(run).recover(clean=clean)
    assert (names_in(disk), names_in(run)) == before
    if name != "backups":
        with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
            explain_checkpoint("run@latest", tmp_path)
    (run / name).unlink()
    disk.rename(run / name)
    assert manager(run).recover() == run / "emergency" / "step-000002", "as the error said"


def test_se05_a_save_into_a_linked_folder_names_the_link_before_a_byte_is_written(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    (result,) = manager(run).save(payload(1))
    assert result.failed is not None and f"checkpoints is a symbolic link to {disk}" in result.failed
    assert names_in(disk) == []


def test_c084_emergency_saves_of_an_abandoned_branch_are_deleted_too(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    made.emergency(payload(5))
    made.rewind(1)
    assert [name.split("-")[0] for name in names_in(tmp_path / "emergency") if ".rewound-" in name] == ["step"]
    made.emergency(payload(4))
    assert names_in(tmp_path / "emergency") == ["step-000004"]
    made.rewind(1)
    made.save(payload(2))
    assert names_in(tmp_path / "emergency") == []


def test_c084_emergency_save_of_plain_objects_can_be_switched_off(tmp_path: Path) -> None:
    model = network()
    path = manager(tmp_path).emergency_save(model=model, global_step=4, current_epoch=1, metrics={"loss": 2.0})
    assert path is not None and manager(tmp_path).load_checkpoint(checkpoint_path=path, model=network()).step == 4
    assert manager(tmp_path / "off", enable_emergency_save=False).emergency_save(model=model, global_step=4) is None


def test_c083_backups_by_the_clock_verified_and_counted(tmp_path: Path) -> None:
    now = 1e9
    made = CheckpointManager(settings(backup_every_n_hours=6.0), tmp_path / "run", clock=lambda: now)
    folder, seen = tmp_path / "run" / "backups", []
    for step in range(1, 26):
        now += 3600
        (result,) = made.save(payload(step))
        assert result.failed is None and result.notes == ()
        made.close()
        seen.append(list_steps(folder))
    assert seen[4] == [] and seen[5] == ["step-000006"] == seen[10] and seen[11] == ["step-000012", "step-000006"]
    assert seen[-1] == ["step-000024", "step-000018"]
    assert all(verify(folder / name).ok for name in seen[-1])
    assert same(made.load(folder / "step-000018"), payload(18))
    assert made.recover() == tmp_path / "run" / "checkpoints" / "step-000025"


def test_c083_restarts_do_not_put_the_first_backup_off(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"id": "x", "created": 1e9}))
    config = settings(backup_every_n_hours=6.0)
    for step, hours in ((1, 5), (2, 7)):
        made = CheckpointManager(config, tmp_path, clock=lambda hours=hours: 1e9 + hours * 3600)
        made.save(payload(step))
        made.close()
        assert bool(list_steps(tmp_path / "backups")) == (hours == 7)
    assert list_steps(tmp_path / "backups") == ["step-000002"]


def test_c083_a_backup_that_fails_costs_nothing_but_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").write_text("a file")
    config = settings(backup_every_n_hours=1e-9, backup_path=str(tmp_path / "elsewhere"))
    made = CheckpointManager(config, tmp_path / "run")
    (result,) = made.save(payload(1))
    made.close()
    (note,) = made.take_notes()
    assert result.failed is None and result.verified and note.startswith("step-000001 was not backed up: ")
    config.backup_path = str(tmp_path / "disk")
    made = CheckpointManager(config, tmp_path / "run")
    (result,) = made.save(payload(2))
    made.close()
    assert result.notes == () and list_steps(made.backups) == ["step-000002"] and made.backups.parent == tmp_path / "disk"
    monkeypatch.setattr(backup, "_copy_file", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    made.save(payload(3), blocking=False)
    made.close()
    (note,) = made.take_notes()
    assert note.startswith("step-000003 was not backed up: ") and made.take_notes() == []


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_c083_a_large_file_is_copied_whether_its_size_was_known_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    """A compressed file is written before its size is known, so its digests are over small chunks however large it gets."""
    monkeypatch.setattr(files, "LARGE_FILE", 100)
    made = manager(tmp_path, backup_every_n_hours=1e-9, checkpoint_compression=compression)
    made.save(payload(1))
    made.close()
    assert made.take_notes() == [] and same(made.load(tmp_path / "backups" / "step-000001"), payload(1))
    (state,) = [f for f in verify(tmp_path / "backups" / "step-000001").files if "rank-00000.safetensors" in f.path]
    assert state.size >= 100 and state.chunk_bytes == (files.LARGE_CHUNK_BYTES if compression == "none" else files.CHUNK_BYTES)


def test_c083_runs_of_one_name_keep_their_own_backups(tmp_path: Path) -> None:
    """Also after --fresh: the old run's higher step must not push out the backup just made."""
    disk, made = tmp_path / "disk", []
    for root, step in (("a", 900), ("b", 5)):
        config = settings(backup_every_n_hours=1e-9, backup_path=str(disk), max_backup_count=1)
        made.append(CheckpointManager(config, tmp_path / root / "same"))
        (result,) = made[-1].save(payload(step))
        made[-1].close()
        assert result.notes == ()
    assert [list_steps(one.backups) for one in made] == [["step-000900"], ["step-000005"]]


def test_c083_backups_of_an_abandoned_branch_give_way(tmp_path: Path) -> None:
    now = 1e9
    config = settings(backup_every_n_hours=1.0, max_backup_count=2)
    made = CheckpointManager(config, tmp_path, clock=lambda: now)
    folder = tmp_path / "backups"
    for step in (1, 2, 3):
        now += 3601
        made.save(payload(step))
        made.close()
    made.rewind(1)
    for step in (2, 3):
        now += 3601
        (result,) = made.save(payload(step, tokens=7))
        made.close()
        assert result.notes == () and result.failed is None
        # the newest is of this branch, and the second newest is the last one before it
        assert made.load(folder / f"step-{step:06d}").tokens == 7
    assert list_steps(folder) == ["step-000003", "step-000002"] and made.load(folder / "step-000002").tokens == 7
    assert names_in(folder) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("explained", [True, False])
def test_ck11_a_backup_of_another_history_is_dropped_only_where_the_log_explains_it(tmp_path: Path, explained: bool) -> None:
    """Steps 2 and 3 are saved again from step 1 (or from scratch): the log has a rewind behind the copies, or has none."""
    rewinds: list[tuple[int, int]] = []
    config = settings(backup_every_n_hours=1e-9, max_backup_count=2)

    def start() -> CheckpointManager:
        return CheckpointManager(config, tmp_path, run_id="r", rewinds=lambda: rewinds)

    def save(made: CheckpointManager, step: int, seq: int) -> None:
        (result,) = made.save(payload(step, global_state={"inc": 1, "log_seq": seq}))
        assert result.failed is None
        made.close()

    first, folder = start(), tmp_path / "backups"
    for step, seq in ((1, 10), (2, 20), (3, 30)):
        save(first, step, seq)
    again = start()
    again.rewind(1)
    if explained:
        rewinds.append((31, 1))
    save(again, 2, 40)
    notes = again.take_notes()
    save(again, 3, 50)
    assert list_steps(folder) == ["step-000003", "step-000002"] and again.take_notes() == []
    kept = [name for name in names_in(folder) if ".other-" in name]
    if explained:
        assert kept == [] and notes == []
    else:
        assert [name.partition(".")[0] for name in kept] == ["step-000002", "step-000003"] and len(notes) == 2
        assert all(verify(folder / name).ok for name in kept)


@pytest.mark.parametrize("blocking", [False, True])
def test_c083_a_backup_on_a_slow_disk_holds_no_save_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocking: bool) -> None:
    """Nor does it lengthen a blocking save, by whose time the watchdog of hangs goes."""
    copying, go_on = threading.Event(), threading.Event()
    real = backup._copy_file

    def slow(*arguments: Any) -> Any:
        copying.set()
        assert go_on.wait(60)
        return real(*arguments)

    monkeypatch.setattr(backup, "_copy_file", slow)
    made = manager(tmp_path, backup_every_n_hours=1e-9, max_backup_count=5)
    results = made.save(payload(1), blocking=blocking)
    assert copying.wait(60) and made.backing_up
    for step in (2, 3, 4):  # none of these waits, and retention leaves what is being copied
        results += made.save(payload(step), blocking=blocking) + made.wait()
    results += made.wait()
    assert [(result.step, result.failed) for result in results] == [(step, None) for step in (1, 2, 3, 4)]
    assert list_steps(tmp_path / "checkpoints") == ["step-000004", "step-000003", "step-000001"]
    go_on.set()
    made.close()
    assert list_steps(tmp_path / "backups") == ["step-000001"] and made.take_notes() == [] and not made.backing_up
    made.save(payload(5), blocking=False)
    made.close()
    assert list_steps(tmp_path / "backups") == ["step-000005", "step-000001"]
    assert list_steps(tmp_path / "checkpoints") == ["step-000005", "step-000004"]


def test_c083_a_plain_script_that_ends_after_its_save_has_its_backup(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    manager(tmp_path, backup_every_n_hours=1e-9).save_checkpoint(model=model, global_step=4)
    assert list_steps(tmp_path / "backups") == ["step-000004"]


def test_c083_damaged_backups_do_not_count(tmp_path: Path) -> None:
    made = manager(tmp_path, backup_every_n_hours=1e-9, max_backup_count=2)
    for step in (1, 2):
        made.save(payload(step))
        made.close()
    os.truncate(tmp_path / "backups" / "step-000002" / "model" / "model.safetensors", 9)
    again = manager(tmp_path, backup_every_n_hours=1e-9, max_backup_count=2)
    again.recover()
    again.save(payload(3))
    again.close()
    assert names_in(tmp_path / "backups") == ["step-000001", "step-000002.corrupt", "step-000003"]


def test_c084_damaged_emergency_saves_do_not_count(tmp_path: Path) -> None:
    made = manager(tmp_path)
    for step in (1, 2):
        made.emergency(payload(step))
    os.truncate(tmp_path / "emergency" / "step-000002" / "model" / "model.safetensors", 9)
    made.emergency(payload(3))
    assert list_steps(tmp_path / "emergency") == ["step-000003", "step-000002", "step-000001"]
    made.emergency(payload(4))
    assert list_steps(tmp_path / "emergency") == ["step-000004", "step-000003"]


def test_best_follows_the_loss_and_survives_a_restart(tmp_path: Path) -> None:
    made = manager(tmp_path, best_metric="loss")
    folder = tmp_path / "checkpoints"
    moved = []
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, float("nan"))):
        (result,) = made.save(payload(step, metrics={"loss": loss}))
        moved.append(result.best)
    assert moved == [True, True, False, False] and pointer(folder, "best") == "step-000002"
    again = manager(tmp_path, best_metric="loss")
    again.recover()
    (result,) = again.save(payload(5, metrics={"loss": 2.4}))
    assert not result.best
    (result,) = again.save(payload(6, metrics={"loss": 1.0}, flags={"suspect": True}))
    assert not result.best and pointer(folder, "best") == "step-000002"
    (result,) = again.save(payload(7, metrics={"loss": 1.5}))
    assert result.best and pointer(folder, "best") == "step-000007"


def test_best_follows_mark_best_for_eval_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), saving.write_files
    monkeypatch.setattr(saving, "write_files", lambda *args: gate.wait(30) and real(*args))
    made = manager(tmp_path)
    made.save(payload(1, metrics={"eval_loss": 1.0}), blocking=False)
    threading.Timer(0.01, gate.set).start()
    assert made.mark_best(1) and pointer(tmp_path / "checkpoints", "best") == "step-000001"
    assert [result.step for result in made.poll()] == [1]
    made.save(payload(2, metrics={"eval_loss": 0.5}))  # measured before this step, so it says nothing about it
    assert pointer(tmp_path / "checkpoints", "best") == "step-000001"
    assert not made.mark_best(9)


def test_c080_best_moves_to_a_lower_value_and_the_manifest_tells_it(tmp_path: Path) -> None:
    made = saved(tmp_path, 1, keep_checkpoints=9)
    folder = tmp_path / "checkpoints"
    assert made.mark_best(1, 2.0)
    made.save(payload(2))
    assert not made.mark_best(2, 2.5) and not made.mark_best(9, 0.1) and pointer(folder, "best") == "step-000001"
    assert read_manifest(folder / "step-000002").manifest["best"] == {
        "name": "step-000001",
        "metric": "eval_loss",
        "value": 2.0,
    }
    assert made.mark_best(1, 2.2)  # measured again
    made.save(payload(3))
    assert made.mark_best(3, 2.1) and pointer(folder, "best") == "step-000003"


@pytest.mark.parametrize("logged", [True, False])
def test_c080_a_value_that_no_manifest_tells_may_be_known_from_elsewhere(tmp_path: Path, logged: bool) -> None:
    saved(tmp_path, 1).mark_best(1, 2.0)
    again = manager(tmp_path)
    again.recover()
    again.know_best({1: 2.0} if logged else {})
    again.save(payload(2))
    assert again.mark_best(2, 2.5) is not logged  # of what is not known, the next one is the better


def test_an_unusable_best_pointer_is_mended_at_start(tmp_path: Path) -> None:
    made = manager(tmp_path, best_metric="loss", keep_checkpoints=5)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        made.save(payload(step, metrics={"loss": loss}))
    best = tmp_path / "checkpoints" / "step-000002"
    os.truncate(best / "MANIFEST.json", 5)
    best.rename(best.with_name("step-000002.corrupt"))
    again = manager(tmp_path, best_metric="loss")
    again.recover()
    assert pointer(best.parent, "best") == "step-000003" and "best" in again.notes[0]


def test_rewind_gives_the_newer_steps_up(tmp_path: Path) -> None:
    made = manager(tmp_path, keep_checkpoints=9, best_metric="loss")
    for step in (1, 2, 3, 4):
        made.save(payload(step))
    made.rewind(2)
    assert list_steps(tmp_path / "checkpoints") == ["step-000002", "step-000001"]
    assert pointer(tmp_path / "checkpoints", "best") == "step-000002"
    assert made.recover() == tmp_path / "checkpoints" / "step-000002"
    (result,) = made.save(payload(3, global_state={"branch": 2}))
    assert result.failed is None and result.path is not None
    assert made.load(result.path).global_state == {"branch": 2}
    assert not [name for name in names_in(tmp_path / "checkpoints") if "rewound" in name]


def test_c080_after_a_rewind_best_and_its_value_are_of_one_checkpoint(tmp_path: Path) -> None:
    made = manager(tmp_path, keep_checkpoints=9, best_metric="loss")
    folder = tmp_path / "checkpoints"

    def save(step: int, loss: float) -> bool:
        (result,) = made.save(payload(step, metrics={"loss": loss}, global_state={"loss": loss}))
        assert result.failed is None
        return result.best

    assert [save(10, 5.0), save(20, 4.0), save(30, 1.0)] == [True] * 3
    made.rewind(20)
    assert pointer(folder, "best") == "step-000020" and "step-000020 takes its place" in made.take_notes()[0]
    assert save(30, 4.5) is False
    told = read_manifest(folder / "step-000030").manifest["best"]
    assert told == {"name": "step-000020", "metric": "loss", "value": 4.0}
    assert save(40, 3.0) is True and pointer(folder, "best") == "step-000040"


def test_c080_after_a_rewind_an_earlier_evaluated_step_is_best_and_is_kept(tmp_path: Path) -> None:
    made = saved(tmp_path, 30)
    folder = tmp_path / "checkpoints"
    assert made.mark_best(30, 2.0)
    for step in (40, 50, 60):
        made.save(payload(step))
    assert made.mark_best(60, 1.0)
    made.rewind(50)
    assert pointer(folder, "best") == "step-000030" and "step-000030 takes its place" in made.take_notes()[0]
    for step in (60, 70, 80):
        made.save(payload(step, global_state={"branch": 2}))
    assert list_steps(folder) == ["step-000080", "step-000070", "step-000030"]
    assert not made.mark_best(80, 2.5) and made.mark_best(80, 1.5)


def test_ck06_a_best_that_is_owed_is_forgotten_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = saved(tmp_path, 1, 2, 3, keep_checkpoints=9)
    assert made.mark_best(1, 2.0)
    made.save(payload(4))

    def full(folder: Path, name: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / name))

    with monkeypatch.context() as patch:
        patch.setattr(saving, "set_pointer", full)
        assert not made.mark_best(4, 1.0)
    made.rewind(3)
    made.save(payload(5))
    folder = tmp_path / "checkpoints"
    assert pointer(folder, "best") == "step-000001" and not list(folder.glob("step-000004*"))
    assert made.mark_best(5, 1.5)


def test_p7_the_log_is_synced_before_the_commit(tmp_path: Path) -> None:
    seen = []
    made = CheckpointManager(settings(), tmp_path, sync_log=lambda: seen.append(list_steps(tmp_path / "checkpoints")))
    made.save(payload(1))
    assert seen == [[]]

    def broken() -> None:
        raise OSError(5, "Input/output error")

    (result,) = CheckpointManager(settings(), tmp_path, sync_log=broken).save(payload(2))
    assert result.failed == "Input/output error" and list_steps(tmp_path / "checkpoints") == ["step-000001"]


def test_the_manifest_says_what_a_reader_wants_to_know(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"id": "abc123"}))
    made = manager(tmp_path)
    made.save(payload(1, global_state={"inc": 2, "log_seq": 77, "data_fingerprint": "f00"}, flags={"suspect": True}))
    manifest = verify(tmp_path / "checkpoints" / "step-000001").manifest
    wanted = {
        "run": "abc123",
        "step": 1,
        "epoch": 0,
        "tokens": 100,
        "inc": 2,
        "log_seq": 77,
        "data_fingerprint": "f00",
        "world": 1,
    }
    assert {name: manifest[name] for name in wanted} == wanted
    assert manifest["flags"] == {"suspect": True} and manifest["metrics"] == {"loss": 1.0}
    assert (manifest["format"], manifest["algorithm"]) == (2, "blake3")
    assert manifest["versions"]["torch"] == str(torch.__version__)


# ---- configuration and world size ------------------------------------------------------------------------------------------


def test_ck18_another_configuration_names_the_fields(tmp_path: Path) -> None:
    from lumina_engine.config.schema import Config

    config = Config(hidden_size=512, seed=3)
    CheckpointManager(config, tmp_path).save(payload(1))
    path = tmp_path / "checkpoints" / "step-000001"
    CheckpointManager(Config(hidden_size=512, seed=3, save_interval=7, vocab_size=1024), tmp_path).load(path)
    with pytest.raises(CheckpointError) as error:
        CheckpointManager(Config(hidden_size=256, seed=4), tmp_path).load(path)
    assert "hidden_size was 512, is 256; seed was 3, is 4" in str(error.value)


class Ranks:
    """Collectives between threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=30)
        self.values: list[Any] = [None] * count

    def comm(self, rank: int) -> ThreadComm:
        return ThreadComm(self, rank)

    def run(self, action: Callable[[ThreadComm], Any]) -> list[Any]:
        results: list[Any] = [None] * self.count

        def call(rank: int) -> None:
            try:
                results[rank] = action(self.comm(rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class ThreadComm:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.world_size = ranks, rank, ranks.count

    def all_gather(self, value: Any) -> list[Any]:
        self.ranks.values[self.rank] = json.dumps(value)
        self.ranks.barrier.wait()
        values = [json.loads(text) for text in self.ranks.values]
        self.ranks.barrier.wait()
        return values

    def barrier(self) -> None:
        self.all_gather(None)


def rank_payload(step: int, rank: int) -> Payload:
    made = payload(step, rank_state={"rank": rank}, rank_tensors={"shard": torch.full((9,), float(10 * step + rank))})
    if rank:
        made.model = {}
    return made


@pytest.mark.parametrize("blocking", [True, False])
def test_two_ranks_save_and_load_their_own_files(tmp_path: Path, blocking: bool) -> None:
    def work(comm: ThreadComm) -> Any:
        made = CheckpointManager(settings(), tmp_path, comm)
        results = []
        for step in (1, 2):
            results += made.save(rank_payload(step, comm.rank), blocking=blocking)
            while len(results) < step:
                results += made.poll()
        again = CheckpointManager(settings(), tmp_path, comm)
        path = again.recover()
        assert path is not None
        loaded = again.load(path)
        made.mark_best(1)
        return (
            [(r.step, r.verified, r.failed, r.path) for r in results],
            path.name,
            loaded.rank_state,
            loaded.rank_tensors,
            loaded.model,
        )

    first, second = Ranks(2).run(work)
    assert (
        first[:2] == second[:2]
        and first[1] == "step-000002"
        and [row[:3] for row in first[0]] == [(1, True, None), (2, True, None)]
    )
    for rank, outcome in enumerate((first, second)):
        assert outcome[2] == {"rank": rank} and torch.equal(outcome[3]["shard"], torch.full((9,), 20.0 + rank))
        assert torch.equal(outcome[4]["layer.weight"], payload(2).model["layer.weight"])
    assert pointer(tmp_path / "checkpoints", "best") == "step-000001"


@pytest.mark.parametrize("ranks", [1, 2])
def test_ft01_what_a_save_took_is_not_when_its_end_was_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """An evaluation of an hour between the writing and each boundary; the slower of two ranks wrote for 4 seconds."""
    clock, real = Clock(), saving.write_files

    def write(plan: Any, to: Any) -> Any:
        last = any(f"rank-{ranks - 1:05d}" in file.path for file in plan)
        clock.now += 4 if last else 0
        return real(plan, to)

    monkeypatch.setattr(saving, "time", clock)
    monkeypatch.setattr(saving, "write_files", write)

    def work(comm: ThreadComm | LocalComm) -> tuple[float, float, bool]:
        made = CheckpointManager(settings(), tmp_path, comm)
        saves = Saves(made, lambda record: None, lambda: rank_payload(1, comm.rank))
        saves.save(1, blocking=False)
        while made.busy:
            if (writing := made._saver._job and made._saver._job.writing) is not None:
                writing.result()
            comm.barrier()
            if comm.rank == 0:
                clock.now += 3600
            comm.barrier()
            saves.settle()
        took = saves.seconds
        saves.save(1, blocking=True)  # asked for once more: nothing is written
        return took, saves.seconds, saves.fits(30)

    found = [work(LocalComm())] if ranks == 1 else Ranks(2).run(work)
    assert found == [(4.0, 4.0, True)] * ranks


def test_c080_a_failure_that_is_told_late_costs_the_next_save_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes out when the next save waits for the one before; that one may be the best all the same."""
    real = saving.write_files

    def write(plan: Any, to: Any) -> Any:
        plan = list(plan)
        if made._saver._job is None or made._saver._job.step == 1:
            raise OSError(28, "No space left on device")
        return real(plan, to)

    monkeypatch.setattr(saving, "write_files", write)
    made = manager(tmp_path, best_metric="eval_loss")
    steps = iter((1, 2))
    saves = Saves(made, lambda record: None, lambda: payload(next(steps)))
    saves.save(1, blocking=False)
    saves.save(2, blocking=False)
    assert saves.newest == 2
    saves.mark_best(2, 1.0)
    assert pointer(made.checkpoints, "best") == "step-000002" and (saves.newest, saves.safe) == (2, 2)


def test_c080_a_suspect_checkpoint_takes_no_lost_pointer(tmp_path: Path) -> None:
    made = manager(tmp_path, best_metric="eval_loss", keep_checkpoints=9)
    for step, value in ((1, 2.0), (2, 1.0), (3, None)):
        made.save(payload(step, flags={"suspect": True} if step == 2 else {}))
        if value is not None:
            made.mark_best(step, value)
    assert pointer(made.checkpoints, "best") == "step-000002"  # where somebody asks for it
    keep.drop_pointer(made.checkpoints, "best")
    (made.checkpoints / "best").write_text("step-000009\n")
    again = manager(tmp_path, best_metric="eval_loss", keep_checkpoints=9)
    again.recover()
    assert pointer(again.checkpoints, "best") == "step-000001"


@pytest.mark.parametrize("stage", ["plan", "write"])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_that_fails_fails_the_save_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, victim: int
) -> None:
    real = saving.write_files

    def write(plan: Any, to: Any) -> Any:
        plan = list(plan)
        if any(f"rank-{victim:05d}" in file.path for file in plan) and stage == "write":
            raise OSError(28, "No space left on device")
        return real(plan, to)

    monkeypatch.setattr(saving, "write_files", write)

    def work(comm: ThreadComm) -> Any:
        made = CheckpointManager(settings(), tmp_path, comm)
        bad = rank_payload(1, comm.rank)
        if stage == "plan" and comm.rank == victim:
            bad.rank_state["x"] = object()
        failed = made.save(bad)[0].failed
        monkeypatch.setattr(saving, "write_files", real)
        return failed, made.save(rank_payload(2, comm.rank))[0].failed

    first, second = Ranks(2).run(work)
    assert first == second and first[0].startswith(f"rank {victim}: ") and first[1] is None
    assert names_in(tmp_path / "checkpoints") == ["latest", "step-000002"]


def test_a_rank_that_has_failed_abandons_its_save_without_the_others(tmp_path: Path) -> None:
    def work(comm: ThreadComm) -> Any:
        made = CheckpointManager(settings(), tmp_path, comm)
        made.save(rank_payload(1, comm.rank), blocking=False)
        made.abandon()
        return made.close()

    assert Ranks(2).run(work) == [[], []]
    assert [name[:17] for name in names_in(tmp_path / "checkpoints")] == [".tmp-step-000001-"]
    assert manager(tmp_path).recover() is None and names_in(tmp_path / "checkpoints") == []


def test_a_rank_that_writes_too_little_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = saving.write_files
    monkeypatch.setattr(
        saving, "write_files", lambda plan, write: real([f for f in plan if "rank-00000.json" not in f.path], write)
    )
    (result,) = manager(tmp_path).save(payload(1))
    assert result.failed == "the ranks did not write state/rank-00000.json" and names_in(tmp_path / "checkpoints") == []


def test_ck18_another_world_size_loads_and_a_rank_of_its_own_has_none(tmp_path: Path) -> None:
    Ranks(2).run(lambda comm: CheckpointManager(settings(), tmp_path, comm).save(rank_payload(1, comm.rank)))
    path = tmp_path / "checkpoints" / "step-000001"
    loaded = Ranks(3).run(lambda comm: CheckpointManager(settings(), tmp_path, comm).load(path))
    assert [bool(one.rank_tensors) for one in loaded] == [True, True, False] and loaded[2].rank_state == {}
    assert all(torch.equal(one.model["layer.weight"], payload(1).model["layer.weight"]) for one in loaded)
    assert [len(one.saved_state().shards()) for one in loaded] == [2, 2, 3]
    flip_last = path / "state" / "rank-00001.safetensors"
    alone = manager(tmp_path).load(path)  # reads what rank 0 saved, until the other's part is asked for
    body = bytearray(flip_last.read_bytes())
    body[-1] ^= 1
    flip_last.write_bytes(body)
    with pytest.raises(CheckpointError, match=r"state/rank-00001\.safetensors"):
        alone.saved_state().shards()


def test_p2_damage_in_one_ranks_file_is_refused_on_all_ranks(tmp_path: Path) -> None:
    Ranks(2).run(lambda comm: CheckpointManager(settings(), tmp_path, comm).save(rank_payload(1, comm.rank)))
    path = tmp_path / "checkpoints" / "step-000001"
    victim = path / "state" / "rank-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    errors = Ranks(2).run(lambda comm: CheckpointManager(settings(), tmp_path, comm).load(path))
    assert all("rank 1: " in str(error) and "state/rank-00001.safetensors" in str(error) for error in errors)
    errors = Ranks(2).run(lambda comm: CheckpointManager(settings(), tmp_path, comm).recover())
    assert all("nothing is started over" in str(error) for error in errors)


# ---- references ------------------------------------------------------------------------------------------------------------


def test_c086_references_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    saved(runs / "first", 1, 2, 3, keep_checkpoints=5).mark_best(2)
    saved(runs / "second", 7)
    os.utime(runs / "first" / "checkpoints", (2e9, 2e9))
    monkeypatch.setenv("LUMINA_RUNS", str(runs))
    for reference, name, why in (
        ("first", "step-000002", "best of run first"),
        ("first@best", "step-000002", "best of run first"),
        ("first@latest", "step-000003", "latest of run first"),
        ("first@step-000001", "step-000001", "step-000001 of run first"),
        ("second", "step-000007", "latest of run second (no best one is known yet)"),
        (str(runs / "first"), "step-000002", "best of run first"),
        (str(runs / "first" / "checkpoints"), "step-000002", None),
        (str(runs / "first" / "checkpoints" / "step-000003"), "step-000003", "the checkpoint named"),
        (None, "step-000002", "best of run first, the most recently updated of 2 runs"),
    ):
        path, said = explain_checkpoint(reference)
        assert path.name == name and said == (why or said), reference
        assert resolve_checkpoint(reference, runs) == path


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("frist", "did you mean first"),
        ("first@step-000009", "run first has no step-000009; it has step-000003, step-000002"),
        ("first@newest", "after @ stands best, latest or a step"),
        ("first/checkpoints/step-000009", r"the best checkpoint of run first is .*step-000002"),
        ("empty", "run empty has no checkpoint yet; runs with checkpoints: first$"),
        ("other", "no run 'other' in .*; runs with checkpoints: first$"),
        ("emptyy", "runs with checkpoints: first$"),
        ("best_model.pt", "checkpoint import"),
        ("../../etc", "does not exist"),
    ],
)
def test_r32_what_is_missing_is_named_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, words: str
) -> None:
    runs = tmp_path / "runs"
    (runs / "empty" / "checkpoints").mkdir(parents=True)
    saved(runs / "first", 1, 2, 3, keep_checkpoints=5).mark_best(2)
    monkeypatch.chdir(runs)
    with pytest.raises(CheckpointError, match=words):
        resolve_checkpoint(reference, runs)


def test_r32_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run with a checkpoint"):
        resolve_checkpoint(None, tmp_path)


def test_ck06_best_that_cannot_be_written_stops_nothing_and_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pointer is a hint: a disk that is full at an evaluation costs a note, and retention keeps what `best` should name."""
    made = saved(tmp_path, 1)
    real, full = keep.set_pointer, True

    def set_pointer(folder: Path, name: str, target: str) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / name))
        real(folder, name, target)

    monkeypatch.setattr(saving, "set_pointer", set_pointer)
    assert not made.mark_best(1)
    assert "No space left" in made.take_notes()[0] and made.take_notes() == []
    for step in (2, 3, 4):
        (result,) = made.save(payload(step))
        assert result.failed is None and "No space left" in result.notes[0]
    folder = tmp_path / "checkpoints"
    assert list_steps(folder) == ["step-000004", "step-000003", "step-000001"] and pointer(folder, "best") is None
    full = False
    (result,) = made.save(payload(5))
    assert result.notes == () and pointer(folder, "best") == "step-000001" and pointer(folder, "latest") == "step-000005"


def test_ck12_a_dangling_best_on_a_full_disk_does_not_keep_the_run_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "best").write_text("step-000009\n")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("set_pointer", "drop_pointer"):
        monkeypatch.setattr(saving, name, full)
    made = manager(tmp_path)
    assert made.recover() == tmp_path / "checkpoints" / "step-000002" and "could not be mended" in made.notes[0]


@pytest.mark.parametrize("blocking", [True, False])
def test_c082_zstd_packs_the_state_and_gives_it_back(tmp_path: Path, blocking: bool) -> None:
    tensors = every_dtype() | {"moment": torch.zeros(3_000_000), "noise": torch.randn(3_000_000)}
    sizes = {}
    for packing in ("none", "zstd"):
        made = manager(tmp_path / packing, checkpoint_compression=packing)
        wanted = payload(1, rank_tensors=tensors)
        (result,) = made.save(wanted, blocking=blocking) or made.wait()
        assert result.failed is None and result.path is not None
        sizes[packing] = {entry.path: entry.size for entry in verify(result.path).files}
        loaded = manager(tmp_path / packing).load(result.path).rank_tensors  # whatever the configuration says now
        assert {name: tensor.dtype for name, tensor in loaded.items()} == {name: t.dtype for name, t in tensors.items()}
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)), (
                name
            )
        loaded["moment"][0] = 1  # its own memory
    plain, small = (sizes[packing] for packing in ("none", "zstd"))
    assert small.pop("state/rank-00000.safetensors.zst") < 0.6 * plain.pop("state/rank-00000.safetensors")
    assert small["model/model.safetensors"] == plain["model/model.safetensors"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"no frame at all", "cannot be unpacked|say that they unpack"),
        (zstandard.compress(bytes(1 << 28))[:5_000], "say that they unpack to 268435456"),  # a bomb
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100)), "say that they unpack to"),
        (zstandard.compress(bytes(range(256)) * 20)[:-9], "does not unpack to|cannot be unpacked"),
        (zstandard.compress(bytes(5000)) + zstandard.compress(bytes(9)), "header|does not unpack"),
        (zstandard.compress(b"{" * 5000), "header of"),
    ],
)
def test_c082_a_compressed_file_that_is_none_is_refused(tmp_path: Path, body: bytes, words: str) -> None:
    (tmp_path / "x.safetensors.zst").write_bytes(body)
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(CheckpointError, match=words):
        read_compressed(folder, "x.safetensors.zst")
    os.close(folder)


def test_c081_consolidate_makes_one_rank_of_two(tmp_path: Path) -> None:
    whole = {"weight": torch.randn(6, 50), "bias": torch.full((3,), 1.0)}
    kinds = {f"{kind}.{name}": torch.randn(t.shape) for kind in consolidate.KINDS for name, t in whole.items()}
    begin = {"weight": (0, 113), "bias": (0, 0)}

    def held(rank: int) -> dict[str, torch.Tensor]:
        parts = {}
        for key, tensor in kinds.items():
            low, high = begin[key.rsplit(".", 1)[1]]
            part = tensor.reshape(-1)[high:] if rank else tensor.reshape(-1)[low:high]
            parts |= {key: part} if len(part) else {}
        steps = {f"optimizer.step.{name}": torch.tensor(4.0) for name in whole if rank or name == "weight"}
        return parts | steps | {"rng.torch": torch.arange(rank + 1)}

    def save(comm: ThreadComm) -> Any:
        made = CheckpointManager(settings(), tmp_path / "run", comm)
        state = {"begins": {"weight": 113} if comm.rank else {}, "rng": comm.rank}
        return made.save(payload(4, model=whole, rank_tensors=held(comm.rank), rank_state=state))

    Ranks(2).run(save)
    source, out = tmp_path / "run" / "checkpoints" / "step-000004", tmp_path / "out"
    done = consolidate.consolidate(source, out)
    assert done["ranks"] == 2 and verify(out / "step-000004").ok
    loaded = manager(tmp_path / "other").load(out / "step-000004")
    assert loaded.manifest["world"] == 1 and loaded.rank_state["begins"] == {} and loaded.rank_state["rng"] == 0
    assert all(torch.equal(loaded.rank_tensors[key], tensor) for key, tensor in kinds.items())
    assert len(loaded.rank_tensors) == len(kinds) + 3 and not loaded.notes
    with pytest.raises(CheckpointError, match="exists: name a folder that does not"):
        consolidate.consolidate(source, out)
