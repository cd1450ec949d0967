"""Files and folders that want to run code, fill memory, leave their folder or hang the reader; each maker writes one.

`canary` is a path that a payload creates when it is run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Maker = Callable[[Path, Path], Path]  # (folder, canary) -> what is to be opened
MEGABYTE = 1 << 20


class Runs:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def payloads(canary: Path) -> dict[str, Any]:
    """Objects whose unpickling creates the canary."""
    touch = f"open({str(canary)!r}, 'w').close()"
    return {
        "system": Runs(os.system, f"touch {canary}"),
        "eval": Runs(eval, f"__import__('os').system('touch {canary}')"),
        "exec": Runs(exec, touch),
        "nested": {"model": {"layer": [Runs(exec, touch), torch.zeros(2)]}},
        "getattr": Runs(getattr, Runs(__import__, "os"), "sep"),
    }


def raw_pickle(kind: str) -> Maker:
    def make(folder: Path, canary: Path) -> Path:
        path = folder / "model.pt"
        path.write_bytes(pickle.dumps(payloads(canary)[kind]))
        return path

    return make


def torch_file(kind: str, zipped: bool) -> Maker:
    """What torch.save writes, with a payload in it."""

    def make(folder: Path, canary: Path) -> Path:
        path = folder / "model.pt"
        torch.save({"state_dict": payloads(canary)[kind]}, path, _use_new_zipfile_serialization=zipped)
        return path

    return make


def legacy_tar(folder: Path, canary: Path) -> Path:
    path = folder / "model.pt"
    data = pickle.dumps(payloads(canary)["system"])
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "../../escaped", "/tmp/escaped"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def zip_names(folder: Path, canary: Path) -> Path:
    """A torch archive with names that leave the folder, absolute ones, and a link."""
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payloads(canary)["exec"]))
        archive.writestr(f"../../{canary.name}", b"x")
        archive.writestr(str(canary), b"x")
        link = zipfile.ZipInfo("archive/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, b"/etc/passwd")
    return path


def zip_bomb(folder: Path, canary: Path) -> Path:
    """256 MiB of zeros in a quarter of a megabyte."""
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with archive.open("archive/data/0", "w") as stream:
            for _ in range(16):
                stream.write(bytes(16 * MEGABYTE))
    return path


def dcp(folder: Path, canary: Path) -> Path:
    """A torch.distributed.checkpoint folder: its `.metadata` is a pickle."""
    made = folder / "dcp"
    made.mkdir()
    (made / ".metadata").write_bytes(pickle.dumps(payloads(canary)["exec"]))
    (made / "__0_0.distcp").write_bytes(pickle.dumps(payloads(canary)["system"]))
    return made


def deepspeed(folder: Path, canary: Path) -> Path:
    """A folder as DeepSpeed leaves it, of another program, with payloads in its shards and in the script it brings."""
    made = folder / "deepspeed"
    step = made / "global_step5"
    step.mkdir(parents=True)
    (made / "latest").write_text("global_step5")
    (made / "zero_to_fp32.py").write_text(f"open({str(canary)!r}, 'w')\n")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": payloads(canary)["exec"], "ds_version": "0.19.8"}, step / name)
    return made


def deepspeed_outside(folder: Path, canary: Path) -> Path:
    """The same, whose `latest` leads out of the folder."""
    made = deepspeed(folder, canary)
    (made / "latest").write_text("../../../../etc")
    return made


def hf(files: Callable[[Path, Path], None]) -> Maker:
    """A Hugging Face folder with a harmless config.json, and what `files` adds or puts in its place."""

    def make(folder: Path, canary: Path) -> Path:
        made = folder / "hf"
        made.mkdir()
        (made / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
        files(made, canary)
        return made

    return make


def _bin(made: Path, canary: Path) -> None:
    (made / "pytorch_model.bin").write_bytes(pickle.dumps(payloads(canary)["exec"]))


def _index(*names: str) -> Callable[[Path, Path], None]:
    def write(made: Path, canary: Path) -> None:
        table = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
        (made / "model.safetensors.index.json").write_text(json.dumps(table))

    return write


def _config(text: str) -> Callable[[Path, Path], None]:
    def write(made: Path, canary: Path) -> None:
        (made / "config.json").write_text(text)
        (made / "model.safetensors").write_bytes(tensor_file(b"{}"))

    return write


def _config_link(made: Path, canary: Path) -> None:
    (made / "config.json").unlink()
    (made / "config.json").symlink_to("/dev/zero")


def _config_fifo(made: Path, canary: Path) -> None:
    (made / "config.json").unlink()
    os.mkfifo(made / "config.json")


def _weights_fifo(made: Path, canary: Path) -> None:
    os.mkfifo(made / "model.safetensors")


def _weights_zero(made: Path, canary: Path) -> None:
    (made / "model.safetensors").symlink_to("/dev/zero")


def _weights(header: bytes, data: bytes = b"", length: int | None = None) -> Callable[[Path, Path], None]:
    def write(made: Path, canary: Path) -> None:
        (made / "model.safetensors").write_bytes(tensor_file(header, data, length))

    return write


def tensor_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _json(table: dict[str, Any]) -> bytes:
    return json.dumps(table).encode()


def manifest(text: bytes) -> Maker:
    """A checkpoint whose manifest is this text and agrees with its digest."""

    def make(folder: Path, canary: Path) -> Path:
        made = folder / "step-000001"
        made.mkdir()
        (made / "MANIFEST.json").write_bytes(text)
        (made / "MANIFEST.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  MANIFEST.json\n")
        return made

    return make


def _keys(count: int) -> bytes:
    return b"{" + b",".join(b'"k%d":1000' % number for number in range(count)) + b"}"


_TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

MAKERS: dict[str, Maker] = {
    **{f"pickle_{kind}": raw_pickle(kind) for kind in ("system", "eval", "exec", "nested", "getattr")},
    **{f"torch_zip_{kind}": torch_file(kind, True) for kind in ("system", "eval", "nested")},
    **{f"torch_legacy_{kind}": torch_file(kind, False) for kind in ("system", "nested")},
    "legacy_tar": legacy_tar,
    "zip_names": zip_names,
    "zip_bomb": zip_bomb,
    "dcp": dcp,
    "deepspeed": deepspeed,
    "deepspeed_outside": deepspeed_outside,
    "hf_pickle": hf(_bin),
    "hf_index_up": hf(_index("../model.safetensors")),
    "hf_index_absolute": hf(_index("/etc/passwd")),
    "hf_index_pickle": hf(_index("pytorch_model.bin")),
    "hf_config_deep": hf(_config('{"a":' + "[" * 100_000)),
    "hf_config_large": hf(_config('{"a":[' + "[]," * 20_000_000 + "[]]}")),
    "hf_config_brackets": hf(_config('{"a":[' + "[]," * 5_000_000 + "[]]}")),
    "hf_config_nan": hf(_config('{"model_type": "llama", "hidden_size": NaN}')),
    "hf_config_twice": hf(_config('{"model_type": "llama", "model_type": "mixtral"}')),
    "hf_config_endless": hf(_config_link),
    "hf_config_fifo": hf(_config_fifo),
    "hf_weights_fifo": hf(_weights_fifo),
    "hf_weights_endless": hf(_weights_zero),
    "header_10_gb": hf(_weights(b"{}", length=10_000_000_000)),
    "header_brackets": hf(_weights(b'{"a":[' + b"[]," * 10_000_000 + b"[]]}")),
    "header_numbers": hf(_weights(b'{"a":[' + b"0.1," * 7_900_000 + b"0]}")),
    "header_text": hf(_weights(b'{"__metadata__":{"a":"' + b"x" * 90_000_000 + b'"}}')),
    "header_parts": hf(_weights(b'{"a":[' + b"[]," * 450_000 + b"[]]}")),
    "header_keys": hf(_weights(_keys(990_000))),
    "header_wide": hf(_weights('{"__metadata__":{"a":"\U0001f600'.encode() + b"x" * 31_000_000 + b'"}}')),
    "manifest_brackets": manifest(b'{"a":[' + b"[]," * 5_300_000 + b"[]]}"),
    "manifest_parts": manifest(b'{"a":[' + b"[]," * 240_000 + b"[]]}"),
    "manifest_keys": manifest(_keys(240_000)),
    "manifest_spaces": manifest(b"{}" + b" " * 250_000_000),
    "header_twice": hf(_weights(_TWICE, b"1234")),
    "header_overlap": hf(_weights(_json({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}), bytes(12))),
    "header_out_of_range": hf(_weights(_json({"a": _entry(0, 4 << 40, [1 << 40])}), bytes(4))),
    "header_false_dtype": hf(_weights(_json({"a": _entry(0, 4, [1], "F64")}), bytes(4))),
    "header_false_shape": hf(_weights(_json({"a": _entry(0, 4, [1 << 62, 1 << 62])}), bytes(4))),
}
