"""A run's newest checkpoint rewritten with another number of experts in its place (C99): what stays, what a crash leaves."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint import compress, growth, ledger
from lumina_engine.checkpoint.commit import Staging, commit, newest_valid
from lumina_engine.checkpoint.files import CheckpointError
from lumina_engine.checkpoint.growth import Plan, Source, drop_copy, growing, in_place, read_source, shrinking
from lumina_engine.checkpoint.keep import pointer
from lumina_engine.checkpoint.manager import CheckpointManager, Payload
from lumina_engine.checkpoint.payload import plan_files, shape_of, write_files
from lumina_engine.checkpoint.verify import Report, require, verify
from lumina_engine.monitoring import record as rec
from tests.checkpoint.crash_model import Recorder, State, materialise
from tests.checkpoint.helpers import names_in, settings, with_sha256
from tests.checkpoint.test_crash_model import Judge
from tests.checkpoint.test_growth import ONE, outputs
from tests.faults.tiny import Tiny

KEYS: dict[str, Any] = {
    **ONE,
    "dropout": 0.1,
    "router_jitter_noise": 0.0,
    "moe_dropless": False,
    "capacity_factor": 1.3,
    "max_steps": 16,
    "adaptive": "act",
    "best_metric": "loss",
}


class Folders:
    """Where the checkpoints of a run lie, and what is the newest of them."""

    def __init__(self, run: Path) -> None:
        self.checkpoints, self.emergency = run / "checkpoints", run / "emergency"

    def newest(self) -> Report:
        report = newest_valid(self.checkpoints, self.emergency).report
        assert report is not None
        return report

    def source(self) -> Source:
        report = self.newest()
        return read_source(report.path, report)

    def grow(self, experts: dict[int, int] | None = None) -> Report:
        source = self.source()
        report = in_place(source, self.plan(source, experts), self.checkpoints, self.emergency)
        drop_copy(report, self.emergency)
        return report

    @staticmethod
    def plan(source: Source, experts: dict[int, int] | None = None) -> Plan:
        return growing(source, experts or dict.fromkeys(source.layers, 0))


def test_c099_in_place_keeps_everything_but_the_experts(tmp_path: Path) -> None:
    first = Tiny(tmp_path, **KEYS)
    first.trainer.extra_state = lambda: {"inc": 3, "log_seq": 17}
    first.train(until=8)
    folders = Folders(tmp_path / "run")
    before, digest = folders.source(), folders.newest().digest
    said = outputs(before.path)
    report = folders.grow({0: 1, 1: 2})
    after = folders.source()
    assert after.path == before.path and names_in(folders.emergency) == []
    for was, now in zip(said, outputs(after.path), strict=True):
        torch.testing.assert_close(now, was, atol=1e-6, rtol=1e-6)
    old, new = before.loaded, after.loaded
    for layer, expert in {0: 1, 1: 2}.items():
        for part in ("w13", "w2", "router.weight"):
            for kind in ("exp_avg", "exp_avg_sq"):
                name = f"optimizer.{kind}.blocks.{layer}.ffn.{part}"
                assert torch.equal(new.rank_tensors[name], twin(old.rank_tensors[name], expert)), name
    same = [name for name in old.rank_tensors if ".ffn." not in name and name != "routing.counts"]
    assert any(name.startswith("rng.") for name in same)
    assert all(torch.equal(old.rank_tensors[name], new.rank_tensors[name]) for name in same)
    assert (new.global_state, new.metrics, new.flags, new.tokens) == (old.global_state, old.metrics, old.flags, old.tokens)
    assert (new.global_state["inc"], new.global_state["log_seq"]) == (3, 17)
    kept = ("run", "step", "inc", "log_seq", "world", "best", "created", "data_fingerprint", "layout", "tokens")
    assert {name: report.manifest[name] for name in kept} == {name: before.report.manifest[name] for name in kept}
    assert pointer(folders.checkpoints, "best") == pointer(folders.checkpoints, "latest") == "step-000008"
    assert report.manifest["experts_changed"] == {
        "before": 4,
        "after": 5,
        "layers": {"0": {"expert": 1}, "1": {"expert": 2}},
        "from": digest,
    }
    assert {digest, report.digest} == ledger.recorded("run", 8)
    assert (after.experts, new.model_config["capacity_factor"]) == (5, 1.3 * 5 / 4)


def test_c099_a_checkpoint_of_the_first_format_is_rewritten_and_its_copy_dropped(tmp_path: Path) -> None:
    Tiny(tmp_path, **KEYS).train(until=8)
    folders = Folders(tmp_path / "run")
    with_sha256(folders.newest().path)
    digest = folders.newest().digest
    ledger.record("run", 8, digest, committed=True)
    report = folders.grow()
    assert report.manifest["experts_changed"]["from"] == digest and names_in(folders.emergency) == []
    assert (report.manifest["format"], report.manifest["algorithm"]) == (2, "blake3")


def test_c099_in_place_tells_that_it_goes_on_in_every_part_of_the_work(tmp_path: Path) -> None:
    Tiny(tmp_path, **KEYS).train(until=8)
    folders = Folders(tmp_path / "run")
    seen: list[tuple[bool, bool, bool]] = []

    def tick(*_: object) -> None:
        there = names_in(folders.checkpoints)
        staged, moved = (any(word in name for name in there) for word in (".tmp-", ".rewound-"))
        seen.append((staged, moved, (folders.emergency / "step-000008").is_dir()))

    source = folders.source()
    report = in_place(source, folders.plan(source), folders.checkpoints, folders.emergency, tick)
    planning_and_copying, read_back, writing, verifying = (
        (False, False, False),
        (False, False, True),
        (True, False, True),
        (False, True, True),
    )
    assert [part for part, _ in itertools.groupby(seen)] == [planning_and_copying, read_back, writing, verifying]
    chunks = sum(len(entry.chunks) for entry in report.files)
    assert seen.count(writing) >= chunks and seen.count(verifying) >= chunks
    assert seen.count(read_back) == sum(len(entry.chunks) for entry in source.report.files)
    made = len(source.loaded.model) + len(source.loaded.rank_tensors)
    assert seen.count(planning_and_copying) >= seen.count(read_back) + made, "every tensor is made before the first is written"


def test_ft07_c099_what_is_read_tells_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests of the newest checkpoint, the state that is unpacked, and the state of the other ranks."""
    piece = 64
    monkeypatch.setattr(compress, "CHUNK_BYTES", piece)
    folders = Folders(tmp_path / "run")
    saved_by(2, folders.checkpoints, compression="zstd")
    ticks: list[object] = []
    report = newest_valid(folders.checkpoints, folders.emergency, progress=lambda *done: ticks.append(done)).report
    assert report is not None and len(ticks) == sum(len(entry.chunks) for entry in report.files)
    ticks.clear()
    source = read_source(report.path, report, lambda *done: ticks.append(done))
    bytes_of = [sum(tensor.nbytes for tensor in payload_of(rank, 2).rank_tensors.values()) for rank in (0, 1)]
    assert len(ticks) >= bytes_of[0] // piece
    ticks.clear()
    source.loaded.saved_state().shards()
    assert len(ticks) >= bytes_of[1] // piece


def twin(tensor: torch.Tensor, expert: int) -> torch.Tensor:
    return torch.cat((tensor, tensor[expert : expert + 1]))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_c099_a_run_goes_on_from_what_was_made_of_its_checkpoint(tmp_path: Path, compression: str) -> None:
    """The proof says that nothing else changed, the next save drops what was given up, and a second growth is no other."""
    own = {**KEYS, "checkpoint_compression": compression}
    Tiny(tmp_path, **own).train(until=8)
    folders = Folders(tmp_path / "run")
    folders.grow()
    assert len(list(folders.checkpoints.glob("*/state/*.zst"))) == 2 * (compression == "zstd"), "the old one and the new one"
    grown = {"num_experts": 5, "capacity_factor": 1.3 * 5 / 4}
    second = Tiny(tmp_path, **{**own, **grown})
    assert second.resume().changed == {}
    second.train(until=12)
    assert [name for name in names_in(folders.checkpoints) if name[0] == "s"] == ["step-000008", "step-000012"]
    folders.grow({0: 4, 1: 4})
    third = Tiny(tmp_path, **{**own, "num_experts": 6, "capacity_factor": 1.3 * 5 / 4 * 6 / 5})
    assert third.resume().changed == {}
    summary = third.train()
    assert summary["state"] == "finished" and all(len(layer.w13) == 6 for layer in third.trainer.model.expert_layers)
    assert [r.failed for r in third.records if isinstance(r, rec.Checkpoint)] == [None]


def test_c100_room_that_was_doubled_stays_doubled(tmp_path: Path) -> None:
    first = Tiny(tmp_path, **KEYS)
    first.trainer.adaptive._balance._s.doubled["capacity_factor"] = 1.3
    first.train(until=8)
    Folders(tmp_path / "run").grow()
    second = Tiny(tmp_path, **{**KEYS, "num_experts": 5, "capacity_factor": 1.3 * 5 / 4})
    second.resume()
    assert second.trainer.adaptive._balance.capacity == 2 * 1.3 * 5 / 4
    assert {layer.capacity_factor for layer in second.trainer.model.expert_layers} == {2 * 1.3 * 5 / 4}


def test_c099_a_rollback_behind_a_growth_goes_to_no_checkpoint_of_other_experts(tmp_path: Path) -> None:
    """Three bad steps behind a growth lead to its checkpoint, and no older one is called damaged for having other experts."""
    keys = {**KEYS, "save_interval": 4, "spike_policy": "rollback", "max_nonfinite_in_row": 3}
    Tiny(tmp_path, **keys).train(until=8)
    Folders(tmp_path / "run").grow()
    second = Tiny(tmp_path, **{**keys, "num_experts": 5, "capacity_factor": 1.3 * 5 / 4})
    second.resume()
    assert [step for step, _ in second.manager.committed()] == [8]
    poisoned, inner = {9, 10, 11}, second.trainer.engine.backward

    def backward(loss: torch.Tensor, last: bool) -> None:
        bad = second.trainer.progress.step + 1 in poisoned
        inner(loss * float("nan") if bad else loss, last=last)
        if last:
            poisoned.discard(second.trainer.progress.step + 1)

    second.trainer.engine.backward = backward  # type: ignore[method-assign]
    assert second.train()["state"] == "finished"
    assert [r.to_step for r in second.records if isinstance(r, rec.Rewind)] == [8]
    assert "checkpoint_damaged" not in second.alerts()


# ---- several ranks ----------------------------------------------------------------------------------------------------------


class Keys(SimpleNamespace):
    """The configuration of a run, as far as checkpoints are concerned."""

    def to_dict(self, sectioned: bool = True) -> dict[str, Any]:
        return dict(vars(self))


def keys(experts: int = 3) -> Keys:
    own = {"num_experts": experts, "capacity_factor": 1.5, "max_num_experts": 8, "expert_parallel_size": 1}
    return Keys(**vars(settings(**own)))


def layer_of(experts: int) -> dict[str, torch.Tensor]:
    """A layer of experts that is no model: two of each."""
    draw = torch.Generator().manual_seed(experts)
    shapes = {"router.weight": (experts, 2), "w13": (experts, 4, 2), "w2": (experts, 2, 2)}
    tensors = {f"blocks.0.ffn.{name}": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    zeros = {f"blocks.0.ffn.router.{name}": torch.zeros(experts) for name in ("bias", "log2_multiplicity")}
    return {"head.weight": torch.randn(2, 2, generator=draw), **tensors, **zeros}


def payload_of(rank: int, world: int, step: int = 3, experts: int = 3) -> Payload:
    """What a rank has of a checkpoint: its part of the moments, its random state and its routing statistics."""
    model = layer_of(experts)
    tensors: dict[str, torch.Tensor] = {"rng.torch": torch.full((4,), rank, dtype=torch.uint8)}
    tensors["routing.counts"] = torch.tensor([[1.0 + rank, 2.0, 3.0]], dtype=torch.float64)
    begins = {}
    for name, weight in model.items():
        if not name.endswith(("bias", "multiplicity")):
            size = weight.numel() // world
            begins[name] = rank * size
            for number, kind in enumerate(("exp_avg", "exp_avg_sq")):
                tensors[f"optimizer.{kind}.{name}"] = (weight.reshape(-1) + number)[begins[name] : begins[name] + size]
            tensors[f"optimizer.step.{name}"] = torch.tensor(5.0)
    shape = {"num_experts": experts, "moe_top_k": 1, "moe_dropless": False, "capacity_factor": 1.5, "use_moe": True}
    return Payload(
        step=step,
        epoch=0,
        tokens=9,
        model=model if rank == 0 else {},
        model_config=shape,
        tokenizer={"name": "none"},
        global_state={"inc": 1, "log_seq": 5},
        rank_state={"rng": {"python": rank}, "begins": begins, "world": world},
        rank_tensors=tensors,
    )


def saved_by(world: int, folder: Path, run: str = "r", compression: str = "none") -> Path:
    """A committed checkpoint of so many ranks."""
    own = keys().to_dict()
    files = [
        file
        for rank in range(world)
        for file in plan_files(payload_of(rank, world), rank, world, own, copy=False, compression=compression)
    ]
    staging = Staging(folder, 3)
    manifest = {"run": run, "world": world, "log_seq": 5, "inc": 1}
    return commit(staging, write_files(files, staging.write), manifest, lambda digest: ledger.record(run, 3, digest))


def test_c099_every_rank_keeps_its_own_random_state_and_counts(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "run")
    saved_by(2, folders.checkpoints)
    report = folders.grow({0: 1})
    assert report.manifest["world"] == 2
    manager = CheckpointManager(keys(4), tmp_path / "run", run_id="r")
    for rank in (0, 1):
        manager.comm.rank = rank
        loaded = manager.load(report.path, same_config=False)
        manager.comm.rank = 0
        assert loaded.rank_state["rng"] == {"python": rank} and loaded.rank_tensors["rng.torch"].tolist() == [rank] * 4
        assert loaded.rank_tensors["routing.counts"].tolist() == [[1.0 + rank, 2.0, 3.0, 0.0]]
        saved, old = loaded.saved_state(), layer_of(3)
        for name, weight in old.items():
            if name.endswith(("bias", "multiplicity")):
                continue
            whole = weight if name == "head.weight" else twin(weight, 1)
            for number, kind in enumerate(("exp_avg", "exp_avg_sq")):
                part = saved.part(f"optimizer.{kind}", name, 0, whole.numel())
                assert part is not None and torch.equal(part, whole.reshape(-1) + number), (rank, name)
            assert float(saved.scalar("optimizer.step", name) or 0) == 5


# ---- refusals ---------------------------------------------------------------------------------------------------------------


def test_c099_no_room_and_a_broken_disk_leave_the_checkpoint_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Folders(tmp_path / "run")
    path = saved_by(1, folders.checkpoints)
    before = verify(path).digest
    free = SimpleNamespace(f_bavail=verify(path).bytes * 2, f_frsize=1)  # of two checkpoints, one of which is to be larger
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda folder: free)
        with pytest.raises(CheckpointError, match="not enough room"):
            folders.grow()
    assert folders.newest().path == path and not folders.emergency.exists(), "nothing is written that cannot be of use"
    calls = 0

    def failing(fd: int, inner: Callable[[int], None] = os.fsync) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.EIO, "Input/output error")
        inner(fd)

    for number in range(1, 200):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            try:
                folders.grow()
            except (CheckpointError, OSError):
                found = folders.newest()
                grown = shape_of(found.path)["num_experts"] == 4  # only the clean-up behind the commit failed
                assert grown or found.digest == before, number
                assert found.manifest["step"] == 3 and found.digest in ledger.recorded("r", 3)
                assert grown or not [name for name in names_in(folders.checkpoints) if name.startswith(".tmp")], number
                gone = not (folders.checkpoints / "step-000003").exists()
                copies = list(folders.emergency.glob("step-*"))
                assert grown or bool(copies) == (found.path.parent == folders.emergency) == gone, number
                shutil.rmtree(tmp_path / "run")
                saved_by(1, folders.checkpoints)
                continue
        break
    assert 25 < number < 199 and shape_of(folders.newest().path)["num_experts"] == 4


def test_c099_what_cannot_be_read_back_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Folders(tmp_path / "run")
    before = verify(saved_by(1, folders.checkpoints)).digest
    real = growth.commit

    def broken(*args: Any) -> Path:
        path = real(*args)
        target = path / "model" / "model.safetensors"
        target.write_bytes(target.read_bytes()[:-1] + b"x")
        return path

    monkeypatch.setattr(growth, "commit", broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: bytes 0 to"):
        folders.grow()
    monkeypatch.undo()
    found = folders.newest()
    assert (found.path.parent, found.digest) == (folders.emergency, before)
    assert shape_of(folders.grow().path)["num_experts"] == 4, "another try goes on from the copy"


def test_c099_a_merge_in_place_follows_the_probe(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "run")
    saved_by(1, folders.checkpoints)
    source = folders.source()
    plan = shrinking(source, {0: 2}, {0: [5.0, 4.0, 1.0]}, lambda shape, weights: 2.0)
    assert plan.keys == {"num_experts": 2} and (plan.loss_before, plan.loss_after) == (2.0, 2.0)
    report = in_place(source, plan, folders.checkpoints, folders.emergency)
    assert shape_of(report.path) == {**source.loaded.model_config, "num_experts": 2}
    with pytest.raises(CheckpointError, match="undone"):
        shrinking(folders.source(), {0: 1}, None, lambda shape, weights: 2.0 if shape["num_experts"] == 2 else 3.0)


# ---- crashes ----------------------------------------------------------------------------------------------------------------


class GrowthJudge(Judge):
    """Judges a run with one checkpoint and the ledger beside it: the newest one must be that step, old or rewritten."""

    def __init__(self, folder: Path, known: dict[str, int]) -> None:
        self.folder, self.seen, self.known = folder, set[int](), known
        self.counts = {"good": 0, "stuck": 0, "wrong": 0, "scratch": 0, "alarm": 0}
        self.met = set[int]()

    def verdict(self, state: State) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        materialise(state, self.folder)
        try:
            found = newest_valid(self.folder / "run" / "checkpoints", self.folder / "run" / "emergency")
        except CheckpointError:
            return "stuck"
        if found.report is None:
            return "scratch"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(self.folder / "state"))
            if found.report.digest not in ledger.recorded("r", 3):
                return "stuck"
        if found.report.digest not in self.known:
            return "wrong"
        self.met.add(self.known[found.report.digest])
        return "alarm" if found.rejected else "good"


@pytest.fixture
def rewriting(fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Recorder, dict[str, int]]:
    """The recorded requests of a rewriting where the checkpoint is the only one; experts of each manifest by its digest."""
    root = fresh()
    monkeypatch.setenv("XDG_STATE_HOME", str(root / "state"))
    folders = Folders(root / "run")
    before = verify(saved_by(1, folders.checkpoints)).digest
    source = folders.source()
    recorder = Recorder(root)
    with recorder.recording(pytest.MonkeyPatch()):
        report = in_place(source, Folders.plan(source), folders.checkpoints, folders.emergency)
        drop_copy(report, folders.emergency)
    require(verify(report.path))
    return recorder, {before: 3, report.digest: 4}


@pytest.mark.parametrize("model", ["kill", "power", "directories"])
def test_c099_ck05_whatever_a_crash_leaves_of_a_rewriting_is_the_step_old_or_new(
    fresh: Callable[[], Path], rewriting: tuple[Recorder, dict[str, int]], model: str
) -> None:
    recorder, known = rewriting
    judge = GrowthJudge(fresh() / "disk", known)
    counts = judge.judge(getattr(recorder, model)())
    assert counts["good"] > 50 and sum(counts.values()) == counts["good"], counts
    assert judge.met == {3, 4}


def test_c099_ck05_red_without_the_copy(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Between giving the name up and giving it again there would be nothing."""
    monkeypatch.setattr(growth, "copied", lambda path, folder, tick: path)
    recorder, known = request.getfixturevalue("rewriting")
    assert GrowthJudge(fresh() / "disk", known).is_red(recorder.kill())
