"""S3, C103: `.pt` files and folders of DeepSpeed come in through a process of their own or not at all; nothing in them runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lumina_engine.checkpoint.commit import CheckpointError
from lumina_engine.checkpoint.foreign import import_folder
from lumina_engine.checkpoint.manager import load_model
from lumina_engine.checkpoint.pickles import unpack_weights
from tests.checkpoint.test_load_model import model_of
from tests.launch import last_line, launch
from tests.parity.modes import write_data


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


def archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, body in members.items():
            made.writestr(name, body)


def pickled(value: Any) -> dict[str, bytes]:
    return {"archive/data.pkl": pickle.dumps(value, protocol=2), "archive/version": b"3\n", "archive/byteorder": b"little"}


def tar(path: Path, _: Path) -> None:
    with tarfile.open(path, "w") as made:
        info = tarfile.TarInfo("pickle")
        info.size = 3
        made.addfile(info, io.BytesIO(b"N.\n"))


def bomb(path: Path, _: Path) -> None:
    archive(path, {"archive/data.pkl": bytes(200 << 20)}, zipfile.ZIP_DEFLATED)


HOSTILE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "os.system": (lambda p, c: archive(p, pickled(Call(os.system, f"touch {c}"))), "refused by the loader"),
    "eval": (lambda p, c: archive(p, pickled(Call(eval, f"open({str(c)!r}, 'w')"))), "refused by the loader"),
    "nested": (lambda p, c: archive(p, pickled({"model": {"w": Call(map, Call(os.system, f"touch {c}"))}})), "refused by the"),
    "bare": (lambda p, c: p.write_bytes(pickle.dumps(Call(os.system, f"touch {c}"))), "no zip archive"),
    "tar": (tar, "no zip archive"),
    "outside": (lambda p, c: archive(p, {"../x": b"1", **pickled({})}), "lies outside of the archive"),
    "absolute": (lambda p, c: archive(p, {f"{c}": b"1", **pickled({})}), "lies outside of the archive"),
    "bomb": (bomb, "is packed, which torch never does"),
    "numbers": (lambda p, c: torch.save([1, 2], p), "holds a list, not a table of tensors"),
    "text": (lambda p, c: torch.save({"a": "b"}, p), "'a' among the weights is a str"),
    "empty": (lambda p, c: p.write_bytes(b""), "no zip archive"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_se05_a_hostile_pt_file_is_refused_and_nothing_runs(tmp_path: Path, kind: str) -> None:
    make, words = HOSTILE[kind]
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    make(path, canary)
    with pytest.raises(CheckpointError, match=words):
        import_folder(path, tmp_path / "runs", "new", "lumina-1k")
    assert not canary.exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("latest", "words"), [("../x", "no folder beside"), ("/etc", "no folder"), ("step1", "No such|no complete")]
)
def test_se05_latest_of_a_deepspeed_folder_leads_nowhere_else(tmp_path: Path, latest: str, words: str) -> None:
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "latest").write_text(latest)
    with pytest.raises(CheckpointError, match=words):
        import_folder(tmp_path / "ds", tmp_path / "runs", "new", "lumina-1k")


def test_s3_the_reader_has_no_network_starts_nothing_and_writes_in_one_folder(tmp_path: Path) -> None:
    """The guard itself, tried from inside the child, since the loader lets nothing through that could try it."""
    code = (
        "import os, socket, subprocess, sys; from pathlib import Path; from lumina_engine.checkpoint import pickles\n"
        f"out = Path({str(tmp_path / 'out')!r}); pickles._lose_network(); pickles._guard(out)\n"
        "tries = [lambda: socket.socket(), lambda: subprocess.run(['true']), lambda: os.system('true'), lambda: os.fork(),\n"
        f"  lambda: open({str(tmp_path / 'a')!r}, 'w'), lambda: os.open({str(tmp_path / 'b')!r}, os.O_CREAT | os.O_WRONLY)]\n"
        "refused = 0\n"
        "for one in tries:\n"
        "    try: one()\n"
        "    except PermissionError: refused += 1\n"
        "open(out / 'fine', 'w').write('x')\n"
        "print(refused, len(tries))"
    )
    (tmp_path / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "6"] and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    "form",
    [
        "state_dict",
        "bare",
        "config inside",
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("model_state_dict", "wrapped")),
    ],
)
def test_c103_a_pt_file_becomes_a_run(tmp_path: Path, form: str) -> None:
    model = model_of()
    state, shape = model.state_dict(), model.config.to_dict()
    content: dict[str, Any] = {"bare": state, "wrapped": {f"module.{name}": t for name, t in state.items()}}.get(
        form, {"model_state_dict" if form != "state_dict" else form: state, "epoch": 3}
    )
    if form == "config inside":
        content["config"] = shape
    torch.save(content, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(shape))
    if form == "bare":
        with pytest.raises(CheckpointError, match="give --shape FILE"):
            import_folder(tmp_path / "model.pt", tmp_path / "runs", "new", "lumina-1k")
    given = None if form == "config inside" else tmp_path / "config.json"
    done = import_folder(tmp_path / "model.pt", tmp_path / "runs", "new", "lumina-1k", given)
    loaded, _, facts = load_model(done["path"])
    assert facts["step"] == 0 and all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_c103_what_deepspeed_really_saves_becomes_a_run(tmp_path: Path, world: int) -> None:
    data = write_data(tmp_path)
    program = Path(__file__).with_name("deepspeed_saves.py")
    last_line(launch(program, world, str(data), str(tmp_path), "[0, 1, 2, 3]"), "SAVES ")
    for stage in range(4):
        source, wanted = tmp_path / f"{stage}-{world}", load_file(tmp_path / f"{stage}-{world}.safetensors")
        done = import_folder(source, tmp_path / "runs", f"z{stage}", "lumina-1k", tmp_path / "config.json")
        loaded = load_model(done["path"])[0].state_dict()
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted), stage
    if world == 2:
        next((tmp_path / "3-2" / "global_step2").glob("zero_pp_rank_1_*optim*")).unlink()
        (tmp_path / "out").mkdir()
        with pytest.raises(CheckpointError):
            unpack_weights(tmp_path / "3-2", tmp_path / "out")
