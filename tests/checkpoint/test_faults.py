"""Full disks, failing syncs, slow and dying writers, readers in the way: a save fails cleanly or is whole."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint import saving
from lumina_engine.checkpoint.commit import CheckpointError, Staging, leased, list_steps, pointer, retain, verify
from lumina_engine.checkpoint.files import require_space
from lumina_engine.checkpoint.manager import CheckpointManager, load_model
from tests.checkpoint.helpers import in_child, manager, names_in, payload, same, saved, umask, valid_steps


def names(run: Path) -> list[str]:
    return names_in(run / "checkpoints")


def test_ck06_file_size_limit_at_every_scale(fresh: Callable[[], Path]) -> None:
    run = fresh() / "run"
    saved(run, 1)
    size = sum(entry.size for entry in verify(run / "checkpoints" / "step-000001").files)

    def save_under_limit() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        made = manager(run)
        made.recover()
        for number in range(20):
            limit = number * size * 12 // (19 * 10)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            (result,) = made.save(payload(2, size=20_000))
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert result.failed and "File too large" in result.failed and result.path is None, (limit, result)
            assert names(run) == ["latest", "step-000001"], limit
        (result,) = made.save(payload(2, size=20_000))
        assert result.failed is None and result.verified

    assert in_child(save_under_limit) == 0
    assert valid_steps(run / "checkpoints") == ["step-000002", "step-000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root may mount a file system")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("preflight", [True, False])
def test_ck06_full_disk_at_twenty_sizes(small_disk: Path, monkeypatch: pytest.MonkeyPatch, preflight: bool) -> None:
    made = manager(small_disk / "run")
    filler = small_disk / "filler"
    (result,) = made.save(payload(1, size=40_000))
    assert result.failed is None
    if not preflight:  # somebody else takes the room after the check
        monkeypatch.setattr("lumina_engine.checkpoint.commit.require_space", lambda *_: None)
    outcomes = set()
    for number in range(20):
        info = os.statvfs(small_disk)
        free = info.f_bavail * info.f_frsize
        filler.write_bytes(bytes(max(0, free - result.bytes * 12 * number // 190)))
        (attempt,) = made.save(payload(2, size=40_000))
        outcomes.add(attempt.failed is None)
        filler.unlink()
        if attempt.failed is None:
            shutil.rmtree(small_disk / "run" / "checkpoints" / "step-000002")
            made._saver.verified.discard("step-000002")
            continue
        assert ("not enough room" if preflight else "No space left") in attempt.failed
        assert not [name for name in names(small_disk / "run") if name.startswith(".")]
        assert valid_steps(small_disk / "run" / "checkpoints") == ["step-000001"]
    assert outcomes == {False, True}
    (last,) = made.save(payload(3, size=40_000))
    assert last.failed is None and last.verified


def test_ck06_preflight_writes_no_byte(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not enough room in .*: 1100000000000\.0 MB needed.*keep_checkpoints"):
        Staging(tmp_path / "checkpoints", 1, 10**18)
    assert names_in(tmp_path / "checkpoints") == []
    require_space(tmp_path, 0)


def test_ck08_a_failed_fsync_fails_the_save_and_is_never_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, run = os.fsync, tmp_path / "run"
    (first,) = manager(run).save(payload(1))
    step = 1
    for failing in range(1, 100):
        step += 1
        synced: list[tuple[int, int]] = []

        def fsync(fd: int, failing: int = failing, synced: list[tuple[int, int]] = synced) -> None:
            info = os.fstat(fd)
            synced.append((info.st_dev, info.st_ino))
            if len(synced) == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        before = valid_steps(run / "checkpoints")
        monkeypatch.setattr(os, "fsync", fsync)
        (result,) = manager(run).save(payload(step))
        monkeypatch.undo()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        if len(synced) < failing:
            assert result.failed is None and result.notes == ()
            break
        if result.failed is None:
            assert result.notes and "Input/output error" in result.notes[0], failing  # after the commit: a pointer
            continue
        assert "Input/output error" in result.failed, failing
        assert synced.count(synced[failing - 1]) == 1, failing
        assert valid_steps(run / "checkpoints") == before, failing
        assert not [name for name in names(run) if name.startswith(".")], failing
    assert failing > 12
    assert first.verified


def test_ck16_async_copies_at_the_boundary_and_reports_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), saving.write_files
    monkeypatch.setattr(saving, "write_files", lambda *args: gate.wait(30) and real(*args))
    made = manager(tmp_path)
    live, wanted = payload(1), payload(1)
    assert made.save(live, blocking=False) == []
    for tensor in (*live.model.values(), *live.rank_tensors.values()):
        tensor.fill_(-1)  # training goes on
    live.rank_state["steps"].append(99)
    live.global_state["lr"] = 0.0
    assert made.poll() == [] and list_steps(tmp_path / "checkpoints") == []
    gate.set()
    (result,) = made.wait()
    assert result.path == tmp_path / "checkpoints" / "step-000001" and result.verified and result.failed is None
    assert result.bytes == verify(result.path).bytes and result.seconds > 0 and result.blocking_seconds > 0
    assert made.poll() == [] and made.close() == []
    assert same(made.load(result.path), wanted)


def test_ck16_one_save_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, real, lock = 0, 0, saving.write_files, threading.Lock()

    def counting(*args: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return real(*args)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(saving, "write_files", counting)
    made = manager(tmp_path, keep_checkpoints=9)
    results = [result for step in range(1, 6) for result in made.save(payload(step), blocking=False)]
    results += made.wait()
    assert [result.step for result in results] == [1, 2, 3, 4, 5] and most == 1
    assert not any(result.failed for result in results)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), MemoryError(), SystemExit(3)], ids=repr)
def test_ck16_a_writer_that_dies_is_reported_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    made = saved(tmp_path, 1)

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_files", fail)
        made.save(payload(2), blocking=False, id="c0ffee")
        (result,) = made.wait()
    assert result.failed and type(error).__name__ in result.failed and result.id == "c0ffee" and result.path is None
    assert valid_steps(tmp_path / "checkpoints") == ["step-000001"]
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    (result,) = made.save(payload(2))
    assert result.failed is None


def test_ck16_async_save_false_blocks(tmp_path: Path) -> None:
    made = manager(tmp_path, async_save=False)
    (result,) = made.save(payload(1), blocking=False)
    assert result.verified and result.blocking_seconds >= result.seconds > 0


def test_ck16_damage_between_writing_and_reading_back_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = saved(tmp_path, 1), saving.commit

    def damaged(*args: Any) -> Path:
        path = real(*args)
        os.truncate(path / "model" / "model.safetensors", 9)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(saving, "commit", damaged)
        (result,) = made.save(payload(2))
    assert result.failed and "read back and found damaged" in result.failed and "model/model.safetensors" in result.failed
    assert valid_steps(tmp_path / "checkpoints") == ["step-000001"] == list_steps(tmp_path / "checkpoints")


def test_ck17_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    for mask in (0o000, 0o777):
        parent = tmp_path / f"parent{mask}"
        parent.mkdir()
        parent.chmod(0o777)
        with umask(mask):
            saved(parent / "run", 1)
        for path in (parent / "run").rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        assert stat.S_IMODE((parent / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "lumina" / "checkpoints.jsonl").stat().st_mode) == 0o600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_ck20_a_parameter_that_is_not_finite_refuses_the_save(tmp_path: Path, value: float) -> None:
    made = saved(tmp_path, 1)
    bad = payload(2)
    bad.model["layer.weight"][17] = value
    for blocking in (True, False):
        results = made.save(bad, blocking=blocking) or made.wait()
        assert results[0].failed is not None and "layer.weight is not finite" in results[0].failed
    assert names(tmp_path) == ["latest", "step-000001"]


def hold_lease(path: Path) -> tuple[int, int]:
    """A child that holds a reader's lease; returns its pid and a descriptor whose closing ends it."""
    ready_read, ready_write = os.pipe()
    end_read, end_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end_write)
        with leased(path):
            os.write(ready_write, b"x")
            os.read(end_read, 1)
        os._exit(0)
    os.close(ready_write)
    os.close(end_read)
    assert os.read(ready_read, 1) == b"x"
    os.close(ready_read)
    return child, end_write


def test_ck15_retention_waits_for_a_reader_in_another_process(tmp_path: Path) -> None:
    made = saved(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    child, end = hold_lease(folder / "step-000001")
    (result,) = made.save(payload(3))
    assert result.failed is None and result.notes == ("step-000001 is being read and stays for now",)
    assert valid_steps(folder) == ["step-000003", "step-000002", "step-000001"]
    os.close(end)
    os.waitpid(child, 0)
    made.save(payload(4))
    assert list_steps(folder) == ["step-000004", "step-000003"]


def test_ck15_a_reader_that_comes_too_late_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-000001"
    monkeypatch.setattr("fcntl.lockf", lambda *_: path.rename(path.with_name(".trash-x")))
    with pytest.raises(CheckpointError, match="removed by retention"), leased(path):
        pytest.fail("got a lease on a removed checkpoint")
    with pytest.raises(CheckpointError, match="no checkpoint there"), leased(path):
        pytest.fail("got a lease on nothing")


def test_retention_keeps_the_best_and_one_from_before_the_trouble(tmp_path: Path) -> None:
    made = manager(tmp_path)
    for step in range(1, 9):
        made.save(payload(step, flags={"suspect": step >= 5}), best=step == 2)
    folder = tmp_path / "checkpoints"
    assert list_steps(folder) == ["step-000008", "step-000007", "step-000004", "step-000002"]
    assert pointer(folder, "best") == "step-000002" and pointer(folder, "latest") == "step-000008"


def test_retention_counts_only_verified_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep_checkpoints=3)
    folder = tmp_path / "checkpoints"
    assert retain(folder, 1, ["step-000003"]) == ([], [])
    os.truncate(folder / "step-000002" / "model" / "model.safetensors", 9)
    made = CheckpointManager(saved(tmp_path / "other", 1).config, tmp_path)
    assert made.recover() == folder / "step-000003"
    made.save(payload(4))
    assert list_steps(folder) == ["step-000004", "step-000003"]


def test_se05_a_pickle_never_reaches_torch(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes(b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    made = saved(tmp_path / "run", 1)
    for load in (load_model, lambda path: made.load_checkpoint(checkpoint_path=path, model=torch.nn.Linear(1, 1))):
        with pytest.raises(CheckpointError, match="checkpoint import"):
            load(checkpoint)
    assert not canary.exists()
