"""Damage of every kind is found before a tensor is read, and nothing starts over silently."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumina_engine.checkpoint import commit as commit_module
from lumina_engine.checkpoint import direct
from lumina_engine.checkpoint import payload as payload_module
from lumina_engine.checkpoint import verify as verify_module
from lumina_engine.checkpoint.backup import copied
from lumina_engine.checkpoint.commit import CheckpointError, Staging, commit, newest_valid, verify
from lumina_engine.checkpoint.digest import ALGORITHM, ALGORITHMS
from lumina_engine.checkpoint.files import (
    CHUNK_BYTES,
    LARGE_CHUNK_BYTES,
    LARGE_FILE,
    MAX_JSON_BYTES,
    MAX_JSON_PARTS,
    FileEntry,
    count_parts,
    dump_json,
    load_json,
    open_folder,
)
from lumina_engine.checkpoint.header import parse_header
from lumina_engine.checkpoint.manager import load_model
from lumina_engine.checkpoint.payload import rank_files
from lumina_engine.checkpoint.tensors import read_tensors
from tests.checkpoint.helpers import manager, names_in, payload, rewrite_manifest, same, saved, with_sha256


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_ck09_every_flipped_bit_is_found_and_its_file_named(tmp_path: Path, fault_random: random.Random) -> None:
    saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    files = [path for path in files_of(checkpoint) if path.stat().st_size]
    assert {path.name for path in files} >= {"MANIFEST.json", "MANIFEST.sha256", "model.safetensors", "rank-00000.safetensors"}
    for number in range(200):
        path = files[number % len(files)]
        bit = fault_random.randrange(path.stat().st_size * 8)
        flip(path, bit)
        report = verify(checkpoint)
        assert not report.ok, (path, bit)
        named = {problem.file for problem in report.problems}
        assert str(path.relative_to(checkpoint)) in named or path.name in report.line(), (path, bit, report.line())
        flip(path, bit)
    assert verify(checkpoint).ok


def test_ck09_names_the_tensor_and_stops_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = saved(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step-000002" / "model" / "model.safetensors"
    flip(path, path.stat().st_size * 8 - 1)
    monkeypatch.setattr(payload_module, "read_tensors", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(
        CheckpointError, match=r"model/model\.safetensors: bytes 0 to \d+ are not what was written \(tensor layer"
    ):
        made.load(path.parent.parent)
    monkeypatch.undo()
    again = manager(tmp_path)
    found = again.recover()
    assert found is not None and found.name == "step-000001"
    assert (tmp_path / "checkpoints" / "step-000002.corrupt").is_dir()
    assert "step-000002" in again.notes[0] and "model/model.safetensors" in again.notes[0]
    assert same(again.load(found), payload(1))


def zero(path: Path, offset: int, count: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(len(data[offset : offset + count]))
    path.write_bytes(data)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "truncated_model": lambda one, _: os.truncate(one / "model/model.safetensors", 100),
    "truncated_by_one": lambda one, _: os.truncate(
        one / "state/rank-00000.json", (one / "state/rank-00000.json").stat().st_size - 1
    ),
    "empty_manifest": lambda one, _: os.truncate(one / "MANIFEST.json", 0),
    "empty_digest": lambda one, _: os.truncate(one / "MANIFEST.sha256", 0),
    "zero_4k": lambda one, _: zero(one / "model/model.safetensors", 4096, 4096),
    "zero_64k": lambda one, _: zero(one / "model/model.safetensors", 65536, 65536),
    "appended": lambda one, _: append(one / "state/rank-00000.safetensors"),
    "appended_to_manifest": lambda one, _: append(one / "MANIFEST.json"),
    "appended_to_digest": lambda one, _: append(one / "MANIFEST.sha256"),
    "lease_not_empty": lambda one, _: append(one / "LEASE"),
    "swapped_files": lambda one, _: swap(one / "model/config.json", one / "model/tokenizer.json"),
    "file_of_another_step": lambda one, two: copy(two, one, "model/model.safetensors"),
    "manifests_of_another_step": lambda one, two: copy(two, one, "MANIFEST.json", "MANIFEST.sha256"),
    "all_of_another_step": lambda one, two: replace(two, one),
    "deleted_file": lambda one, _: (one / "state/rank-00000.json").unlink(),
    "deleted_lease": lambda one, _: (one / "LEASE").unlink(),
    "deleted_manifest": lambda one, _: (one / "MANIFEST.json").unlink(),
    "deleted_digest": lambda one, _: (one / "MANIFEST.sha256").unlink(),
    "deleted_folder": lambda one, _: shutil.rmtree(one / "state"),
    "link_for_a_file": lambda one, two: link(one, two, "model/model.safetensors"),
    "link_for_a_folder": lambda one, two: link(one, two, "model"),
    "fifo_for_a_file": lambda one, _: fifo(one / "model/config.json"),
}


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def copy(source: Path, target: Path, *names: str) -> None:
    for name in names:
        shutil.copy(source / name, target / name)


def replace(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def link(one: Path, two: Path, name: str) -> None:
    path = one / name
    keep = one.parent / "moved"
    path.rename(keep)
    path.symlink_to(keep)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("kind", DAMAGE)
def test_ck10_refused(tmp_path: Path, kind: str) -> None:
    made = manager(tmp_path)
    for step in (1, 2):
        made.save(payload(step, size=40_000))
    folder = tmp_path / "checkpoints"
    DAMAGE[kind](folder / "step-000002", folder / "step-000001")
    report = verify(folder / "step-000002")
    assert not report.ok and report.line()
    with pytest.raises(CheckpointError, match="step-000002"):
        made.load(folder / "step-000002")
    found = newest_valid(folder)
    assert found.path == folder / "step-000001"
    assert [name for name, _ in found.rejected] == ["step-000002"]


def test_ck10_a_stray_file_is_reported_and_ignored(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    (checkpoint / "model" / "extra.safetensors").write_bytes(b"anything")
    report = verify(checkpoint)
    assert report.ok and report.strays == ["model/extra.safetensors"]
    assert any("extra.safetensors" in note for note in made.load(checkpoint).notes)


def test_ck11_all_corrupt_refuses_with_every_reason_and_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    for step in ("step-000001", "step-000002"):
        flip(folder / step / "model" / "model.safetensors", 9000)
    before = names_in(folder)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="nothing is started over") as error:
            manager(tmp_path).recover()
        assert error.value.exit_code == 65
        assert "step-000001: model/model.safetensors" in str(error.value) and "step-000002: model" in str(error.value)
    assert names_in(folder) == before


@pytest.mark.parametrize("source", ["log", "ledger", "backup", "damaged backup"])
def test_ck11_a_run_that_committed_is_not_started_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Any one witness will do: checkpoints/ is empty, because its disk is not mounted or somebody removed what was in it."""
    for step in (1, 2):
        saved(tmp_path, step, backup_every_n_hours=1e-9 if "backup" in source else 0.0).close()
    folder, copies = tmp_path / "checkpoints", tmp_path / "backups"
    folder.rename(tmp_path / "gone")
    folder.mkdir()
    if source != "ledger":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    if source == "damaged backup":
        flip(copies / "step-000001" / "model" / "model.safetensors", 9000)
        flip(copies / "step-000002" / "model" / "model.safetensors", 9000)
    made = manager(tmp_path)
    assert made.recover() is None
    with pytest.raises(CheckpointError) as error:
        made.require_new([1, 2] if source == "log" else [])
    words = {
        "log": "its log tells of 2, the last one step-000002",
        "ledger": "checkpoints.jsonl tells of 2, the last one step-000002",
        "backup": f"(cp -a {copies / 'step-000002'} {folder}/)",
        "damaged backup": f"there is no sound backup in {copies} (step-000002 is damaged: model/model.safetensors",
    }
    assert words[source] in str(error.value) and "--fresh" in str(error.value) and error.value.exit_code == 65
    if source == "backup":  # the copy that the message names is one to go on from
        shutil.copytree(copies / "step-000002", folder / "step-000002")
        path = manager(tmp_path).recover()
        assert path is not None and same(manager(tmp_path).load(path), payload(2))


@pytest.mark.parametrize(
    "name", ["step-000007.corrupt", "step-7", "global_step100", "epoch_5.pt", "latest", "step-000003.rewound-00000000"]
)
def test_ck11_anything_like_a_checkpoint_refuses(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / name).write_text("x") if "." in name[-4:] or name == "latest" else (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        manager(tmp_path).recover()
    assert names_in(folder) == [name]


def test_ck11_only_what_was_never_committed_is_a_fresh_start(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step-000001-00000000" / "model").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert manager(tmp_path).recover() is None
    assert names_in(folder) == ["notes.txt"]
    assert manager(tmp_path / "nothing").recover() is None


def test_ck11_the_way_out_that_the_refusal_names_is_what_fresh_does(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    flip(tmp_path / "checkpoints" / "step-000001" / "state" / "trainer.json", 80)
    with pytest.raises(CheckpointError, match=r"--fresh \(moves the whole run aside\)"):
        manager(tmp_path).recover()


@pytest.mark.parametrize(
    "pointer", ["", "\0\xff garbage", "../x", "step-000009", "step-000002", "/etc/passwd", "step-000001\nstep-000002", None]
)
def test_ck12_the_latest_pointer_is_never_needed(tmp_path: Path, pointer: str | None) -> None:
    saved(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    flip(folder / "step-000002" / "state" / "trainer.json", 80)
    (folder / "latest").unlink()
    if pointer is not None:
        (folder / "latest").write_bytes(pointer.encode("latin-1"))
    assert manager(tmp_path).recover() == folder / "step-000001"


def replace_entry(checkpoint: Path, name: str, data: bytes) -> None:
    """Let the manifest list these bytes as the file's."""
    files = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    (found,) = (listed for listed in files if listed["path"] == name)
    pieces = (data[begin : begin + CHUNK_BYTES] for begin in range(0, len(data), CHUNK_BYTES))
    found.update(size=len(data), chunks=[ALGORITHMS[ALGORITHM](piece).hexdigest() for piece in pieces])
    rewrite_manifest(checkpoint, files=files)


def test_ck18_a_newer_format_is_refused_with_both_versions_and_not_set_aside(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    rewrite_manifest(tmp_path / "checkpoints" / "step-000002", format=7, files="another form")
    with pytest.raises(CheckpointError, match=r"format 7 is newer than this version of Lumina reads \(2\)"):
        manager(tmp_path).recover()
    assert {"step-000001", "step-000002"} <= set(names_in(tmp_path / "checkpoints"))


def test_ck18_an_older_format_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = saved(tmp_path, 1)
    monkeypatch.setattr(verify_module, "FORMAT", 3)
    assert same(made.load(tmp_path / "checkpoints" / "step-000001"), payload(1))


def test_ck18_a_checkpoint_of_the_first_format_is_read_damaged_copied_and_followed(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    with_sha256(checkpoint)
    (tmp_path / "state" / "lumina" / "checkpoints.jsonl").unlink()
    assert verify(checkpoint).ok and same(made.load(checkpoint), payload(1))
    copy = copied(checkpoint, tmp_path / "copies")
    assert copied(checkpoint, copy.parent) == copy and names_in(copy.parent) == [copy.name]
    assert (copy / "MANIFEST.json").read_bytes() == (checkpoint / "MANIFEST.json").read_bytes()
    (result,) = made.save(payload(2))
    assert result.failed is None and verify(checkpoint.with_name("step-000002")).manifest["algorithm"] == "blake3"
    flip(copy / "model" / "model.safetensors", 200)
    assert "model/model.safetensors: bytes 0 to" in verify(copy).line()


def test_c078_each_digest_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks a file is read in."""
    monkeypatch.setattr(direct, "BLOCK_BYTES", 4096)
    manager(tmp_path).save(payload(1, size=30_000))
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    name = "model/model.safetensors"
    data = (checkpoint / name).read_bytes()
    compared: list[str] = []

    class Digest(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            compared.append(self)
            return str.__eq__(self, other)

    chunks = tuple(Digest(ALGORITHMS["blake3"](data[begin : begin + 500]).hexdigest()) for begin in range(0, len(data), 500))
    folder = open_folder(checkpoint)
    problem = verify_module._check_digests(folder, FileEntry(name, len(data), chunks, 500), lambda count: None, False)
    os.close(folder)
    assert problem is None and len(chunks) > 200 and len(compared) == len(chunks)


def test_ck18_digests_of_two_kinds_are_not_committed_together(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "checkpoints", 1)
    entries = [staging.write("a", [b"a"]), staging.write("b", [b"b"], like=FileEntry("b", 1, (), algorithm="sha256"))]
    with pytest.raises(CheckpointError, match="digests of blake3 and sha256"):
        commit(staging, entries, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"format": True},
        {"format": 0},
        {"format": "1"},
        {"algorithm": "md5"},
        {"algorithm": []},
        {"chunk_bytes": 0},
        {"step": "1"},
        {"files": None},
    ]
    + [
        {"files": [{"path": path, "size": 0, "chunks": []}]}
        for path in ("../x", "/etc/passwd", "a/../b", "a//b", ".x", "a\0b", "", 5)
    ]
    + [{"files": [{"path": "a", "size": size, "chunks": []}]} for size in (-1, 1, True, 10**30, "0")]
    + [{"files": [{"path": "a", "size": 1, "chunks": ["zz"]}]}, {"files": [{"path": "a", "size": 0, "chunks": []}] * 2}],
    ids=str,
)
def test_s4_manifests_that_say_something_else_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    rewrite_manifest(checkpoint, **changes)
    report = verify(checkpoint)
    assert not report.ok and "MANIFEST.json" in report.line()


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"format": 1, "format": 1}', '{"format": NaN}', "[" * 100_000, '{"format": ' + "9" * 5000 + "}"]
)
def test_se05_manifests_that_are_no_json_are_refused(tmp_path: Path, text: str) -> None:
    saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    (checkpoint / "MANIFEST.json").write_text(text)
    (checkpoint / "MANIFEST.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  MANIFEST.json\n")
    assert not verify(checkpoint).ok


@pytest.mark.parametrize("name", ["model/config.json", "model/tokenizer.json", "state/trainer.json"])
def test_se05_a_description_larger_than_any_that_is_written_is_refused(tmp_path: Path, name: str) -> None:
    made = saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    body = b'{"a":[' + b"[]," * (400_000 if name.startswith("model/") else 12_000_000) + b"[]]}"
    (checkpoint / name).write_bytes(body)
    replace_entry(checkpoint, name, body)
    (tmp_path / "state" / "lumina" / "checkpoints.jsonl").unlink()
    assert verify(checkpoint).ok
    with pytest.raises(CheckpointError, match=rf"{name} has {len(body)} bytes; at most \d+ are read"):
        made.load(checkpoint) if name.startswith("state/") else load_model(checkpoint)


def test_se05_json_of_many_parts_is_refused_before_it_is_parsed() -> None:
    inner = b"[]," * (MAX_JSON_PARTS // 2 - 2)
    assert len(load_json(b'{"a":[' + inner + b"[]]}", "x")["a"]) == MAX_JSON_PARTS // 2 - 1
    for text in (b'{"a":[' + inner + b"[],1]}", b'["' + b"a:" * MAX_JSON_PARTS + b'"]'):
        with pytest.raises(
            CheckpointError, match=rf"^x has \d+ brackets, commas and colons; at most {MAX_JSON_PARTS} are read$"
        ):
            load_json(text, "x")


def test_s4_a_manifest_that_could_not_be_read_back_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = saved(tmp_path, 1)
    monkeypatch.setattr(commit_module, "MAX_JSON_PARTS", 20)
    (result,) = made.save(payload(2))
    assert result.failed and "MANIFEST.json would have" in result.failed and "save a smaller model" in result.failed
    assert names_in(tmp_path / "checkpoints") == ["latest", "step-000001"]


@pytest.mark.parametrize(
    ("share", "chunk_bytes"),  # of a file; two for each of 1,024 ranks: 2 and 27 TB in all
    [(LARGE_FILE, CHUNK_BYTES), (100 * (LARGE_CHUNK_BYTES), LARGE_CHUNK_BYTES)],
)
def test_s4_the_manifest_of_many_ranks_and_terabytes_is_within_the_limits(share: int, chunk_bytes: int) -> None:
    chunks = ("0" * 64,) * (share // chunk_bytes)
    entries = [FileEntry(file, share, chunks, chunk_bytes) for rank in range(1024) for file in rank_files(rank)]
    body = dump_json({"files": [entry.to_json() for entry in entries]})
    assert len(body) < MAX_JSON_BYTES / 1.5 and count_parts(body) < MAX_JSON_PARTS / 1.5
    assert [FileEntry.from_json(entry) for entry in load_json(body, "x")["files"]] == entries


def test_s4_a_large_file_has_larger_chunks_and_a_flipped_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina_engine.checkpoint.files.LARGE_FILE", 1000)
    monkeypatch.setattr("lumina_engine.checkpoint.files.LARGE_CHUNK_BYTES", 300)
    saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    found = verify(checkpoint)
    assert found.ok
    entry = next(entry for entry in found.files if entry.path == "model/model.safetensors")
    assert entry.chunk_bytes == 300 and len(entry.chunks) == -(-entry.size // 300) > 1
    assert {other.chunk_bytes for other in found.files if other.size < 1000} == {CHUNK_BYTES}
    data = bytearray((checkpoint / entry.path).read_bytes())
    data[-1] ^= 1
    (checkpoint / entry.path).write_bytes(data)
    problem = verify(checkpoint).problems[0]
    assert f"bytes {(len(data) - 1) // 300 * 300} to {len(data) - 1} are not what was written" in problem.reason


@pytest.mark.parametrize("size", [0, -1, True, "8", (8 << 20) * 65])
def test_se05_an_entry_with_chunks_of_no_known_size_is_refused(size: object) -> None:
    with pytest.raises(CheckpointError, match="chunk_bytes is no known size"):
        FileEntry.from_json({"path": "a", "size": 0, "chunks": [], "chunk_bytes": size})


def test_se11_a_replaced_checkpoint_is_refused_although_its_digests_agree(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    path = checkpoint / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["layer.bias"] += 1
    save_file(tensors, path)
    replace_entry(checkpoint, "model/model.safetensors", path.read_bytes())
    assert verify(checkpoint).ok
    with pytest.raises(CheckpointError, match="replaced after this run committed it"):
        made.load(checkpoint)


def test_se11_naming_another_run_in_the_replaced_manifest_does_not_help(tmp_path: Path) -> None:
    made = saved(tmp_path / "run", 1)
    saved(tmp_path / "other", 1)  # of this user, so its digest is in the ledger
    path = tmp_path / "run" / "checkpoints" / "step-000001"
    for manifest in ({"run": "somebody else", "tokens": 1}, {"run": str(tmp_path / "other"), "tokens": 2}):
        rewrite_manifest(path, **manifest)
        with pytest.raises(CheckpointError, match="replaced after this run committed it"):
            made.load(path)
        with pytest.raises(CheckpointError, match="replaced after this run committed it"):
            load_model(path)
    path.rename(path.with_name("aside"))
    (tmp_path / "other" / "checkpoints" / "step-000001").rename(path)  # genuine, but not of this run
    with pytest.raises(CheckpointError, match="replaced after this run committed it"):
        made.load(path)


def test_s2_a_checkpoint_of_another_machine_loads_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = saved(tmp_path, 1)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    loaded = made.load(tmp_path / "checkpoints" / "step-000001")
    assert same(loaded, payload(1)) and "not committed by this user" in loaded.notes[0]


def tensor_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "short": b"\1\0\0",
    "header_10_gb": tensor_file({}, length=10_000_000_000),
    "header_past_end": tensor_file({}, length=100),
    "no_json": tensor_file(b"\xff\xfe{"),
    "no_object": tensor_file([]),
    "duplicate_keys": tensor_file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"
    ),
    "nan": tensor_file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
    "overlap": tensor_file({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "gap": tensor_file({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "gap_at_start": tensor_file({"a": entry(4, 8, [1])}, bytes(8)),
    "data_left_over": tensor_file({"a": entry(0, 4, [1])}, bytes(8)),
    "out_of_range": tensor_file({"a": entry(0, 400, [100])}, bytes(4)),
    "backwards": tensor_file({"a": entry(4, 0, [1])}, bytes(4)),
    "false_shape": tensor_file({"a": entry(0, 4, [2])}, bytes(4)),
    "false_dtype": tensor_file({"a": entry(0, 4, [1], "F64")}, bytes(4)),
    "unknown_dtype": tensor_file({"a": entry(0, 4, [1], "PICKLE")}, bytes(4)),
    "huge_shape": tensor_file({"a": entry(0, 4, [2**62, 2**62])}, bytes(4)),
    "negative_shape": tensor_file({"a": entry(0, 4, [-1, -1])}, bytes(4)),
    "boolean_shape": tensor_file({"a": entry(0, 4, [True])}, bytes(4)),
    "extra_key": tensor_file({"a": {**entry(0, 4, [1]), "code": "x"}}, bytes(4)),
    "metadata_no_text": tensor_file({"__metadata__": {"a": 1}}),
    "deep": tensor_file(b"[" * 50_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_se05_hostile_safetensors_headers_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(HOSTILE[kind])
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_tensors(folder, "x.safetensors")
    finally:
        os.close(folder)


def test_s1_a_sound_header_of_the_library_is_read(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(7, dtype=torch.int8), "a": torch.randn(3, 5), "e": torch.empty(0, 4), "s": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        loaded = read_tensors(folder, "x.safetensors")
    finally:
        os.close(folder)
    assert all(torch.equal(loaded[name], tensor) and loaded[name].shape == tensor.shape for name, tensor in tensors.items())
    assert parse_header(b"{}", 10, "x").tensors == ()
