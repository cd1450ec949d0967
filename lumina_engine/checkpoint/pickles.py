"""Weights out of files of other programs that are pickles: `.pt` files of torch, and folders that DeepSpeed saved (rule S3).

A pickle is only ever opened in a child process of its own: with limits on memory, time and files, without network, under an
audit hook that refuses to start programs, by `torch.load(weights_only=True)`. What that refuses is refused; there is no other
way in. The child writes safetensors and JSON into an empty folder; only these are read further.

    python -m lumina_engine.checkpoint.pickles SOURCE OUT        prints {"tensors": n, "from": …} or {"error": …}
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import CheckpointError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHT_KEYS = ("model_state_dict", "state_dict", "model", "module", "weights")
SHAPE_KEYS = ("model_config", "config")
TIMEOUT_S = 1800
MAX_MEMBERS = 100_000
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RANK_FILE = re.compile(r"zero_pp_rank_(\d{1,5})_mp_rank_00_(?:model_states|optim_states)\.pt")
_INERT = (  # objects of DeepSpeed beside the weights: their names are known, their code is not loaded
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "pty.", "shutil.")
_NEWUSER, _NEWNET = 0x10000000, 0x40000000


def is_deepspeed(path: Path) -> bool:
    """Whether the folder looks like one that DeepSpeed saved: with `latest`, or a tag's own."""
    return path.is_dir() and ((path / "latest").is_file() or any(path.glob("*mp_rank_00_model_states.pt")))


def unpack_weights(source: Path, out: Path) -> dict[str, Any]:
    """Let a child write the weights of `source` as OUT/model.safetensors, and its configuration, if it has one.

    Returns:
        tensors (a count), from (which files).

    Raises:
        CheckpointError: no file of torch, refused by the safe loader, too large for its limits, or not whole.
    """
    root = str(Path(__file__).resolve().parents[2])
    env = {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": root,
        "OMP_NUM_THREADS": "1",
        "HOME": str(out),
        "LC_ALL": "C.UTF-8",
    }
    words = [sys.executable, "-m", "lumina_engine.checkpoint.pickles", str(source.resolve()), str(out)]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{source}: was not read within {TIMEOUT_S} s") from None
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no word"])[-1][:300]
        raise CheckpointError(f"{source}: its reader died (exit {done.returncode}: {last})") from None
    if "error" in told:
        raise CheckpointError(f"{source}: {told['error']}")
    return dict(told)


# ---- in the child ------------------------------------------------------------------------------------------------------------


def _lose_network() -> None:
    """A network namespace of its own, with nothing in it; where that is not allowed the audit hook alone keeps sockets shut."""
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    if unshare(_NEWNET) != 0:
        unshare(_NEWUSER | _NEWNET)


def _limit(size: int) -> None:
    """Limits for reading files of `size` bytes; what is mapped already stays."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    here = pages * os.sysconf("SC_PAGE_SIZE")
    for name, most in (
        (resource.RLIMIT_AS, here + 3 * size + (192 << 20)),
        (resource.RLIMIT_FSIZE, 2 * size + (1 << 20)),
        (resource.RLIMIT_CPU, 60 + size // 10_000_000),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (most, most))


def _guard(out: Path) -> None:
    """From here on this process starts no program, opens no socket, and opens files for writing in `out` only."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and isinstance(arguments[0], str | bytes):
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not os.path.abspath(os.fsdecode(arguments[0])).startswith(f"{out}{os.sep}"):  # noqa: PTH100
                raise PermissionError("files may be written in the given folder only")

    sys.addaudithook(hook)


def _check_archive(path: Path) -> None:
    """Refuse what torch's own writer does not make: other formats, packed members, names that leave the archive."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path.name} is no zip archive as torch writes since 1.6: save it anew")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise CheckpointError(f"{path.name} has {len(members)} members, at most {MAX_MEMBERS} are read")
    size = path.stat().st_size
    for member in members:
        parts = member.filename.split("/")
        if member.filename.startswith("/") or ".." in parts or "\\" in member.filename:
            raise CheckpointError(f"{path.name}: the member {member.filename!r} lies outside of the archive")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise CheckpointError(f"{path.name}: the member {member.filename!r} is packed, which torch never does")
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(f"{path.name}: its members claim more bytes than it has")


def _load(path: Path) -> Any:
    import torch

    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path.name} is no regular file")
    _check_archive(path)
    inert: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (type(name.rpartition(".")[2], (_Inert,), {}), name) for name in _INERT
    ]
    with torch.serialization.safe_globals(inert):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _Inert:
    """Stands for an object of DeepSpeed that nobody asks anything."""

    def __init__(self, *_: Any) -> None:
        return


def _torch_file(path: Path) -> tuple[dict[str, Any], Any, str]:
    content = _load(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}, not a table of tensors")
    key = next((key for key in WEIGHT_KEYS if isinstance(content.get(key), Mapping)), None)
    shape = next((content[name] for name in SHAPE_KEYS if isinstance(content.get(name), Mapping)), None)
    return dict(content if key is None else content[key]), shape, path.name


def _deepspeed_folder(path: Path) -> tuple[dict[str, Any], Any, str]:
    if (path / "latest").is_file():
        tag = (path / "latest").read_bytes()[:200].decode("ascii", "replace").strip()
        if not _TAG.fullmatch(tag):
            raise CheckpointError(f"latest names {tag!r}, which is no folder beside it")
        path /= tag
    whole = path / "mp_rank_00_model_states.pt"
    if whole.is_file():
        found = _load(whole)
        if isinstance(found, Mapping) and isinstance(found.get("module"), Mapping) and found["module"]:
            return dict(found["module"]), None, f"{path.name}/{whole.name}"
    return _merged(path), None, f"{path.name}, merged"


def _merged(path: Path) -> dict[str, Any]:
    """The fp32 weights of stage 3: of each parameter every rank has a part, padded at the end, one after the other in its flat
    groups (DeepSpeed's own `zero_to_fp32` describes the layout)."""
    import math

    import torch

    names = sorted((int(m[1]), f.name) for f in path.iterdir() if (m := _RANK_FILE.fullmatch(f.name)) and "optim" in f.name)
    if not names or [rank for rank, _ in names] != list(range(len(names))):
        raise CheckpointError(f"{path.name} has no complete set of zero_pp_rank_N_mp_rank_00_optim_states.pt")
    flats, buffers, shapes = [], {}, {}
    for rank, name in names:
        state = _load(path / name).get("optimizer_state_dict", {})
        groups = state.get("fp32_flat_groups")
        if not isinstance(groups, list) or int(state.get("partition_count", len(names))) != len(names):
            raise CheckpointError(f"{name} holds no flat groups of one of {len(names)} ranks")
        flats.append(torch.cat([group.reshape(-1) for group in groups]))
        if rank == 0:
            model = _load(path / name.replace("_optim_states", "_model_states"))
            shapes = {key: size for group in model["param_shapes"] for key, size in group.items()}
            wanted = model.get("buffer_names") or []
            buffers = {key: value for key, value in model.get("module", {}).items() if key in wanted}
    merged, at = {}, 0
    for key, size in shapes.items():
        count = math.prod(size)
        part = -(-count // len(flats))
        whole = torch.cat([flat[at : at + part] for flat in flats])[:count]
        if whole.numel() != count:
            raise CheckpointError(f"the flat groups end within {key}")
        merged[key], at = whole.reshape(size), at + part
    return merged | buffers


def _tensors(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Plain tensors under their names, without what wrappers put before all of them."""
    import torch

    names = list(found)
    for prefix in ("module.", "_orig_mod."):
        if names and all(isinstance(name, str) and name.startswith(prefix) for name in names):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
            names = list(found)
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name!r} among the weights is a {type(value).__name__}, not a tensor")
        yield name, value.detach()


def _write(source: Path, out: Path) -> dict[str, Any]:
    import torch

    from .files import dump_json, open_folder, write_file
    from .tensors import tensor_file

    found, shape, origin = _deepspeed_folder(source) if source.is_dir() else _torch_file(source)
    tensors = dict(_tensors(found))
    size, pieces = tensor_file(tensors, {"format": "pt"})
    folder = open_folder(out)
    write_file(folder, "model.safetensors", pieces(), size)
    if shape is not None:
        write_file(folder, "config.json", [dump_json(dict(shape))])
    os.close(folder)
    return {"tensors": len(tensors), "from": origin, "torch": str(torch.__version__)}


def main() -> None:
    """The child: limits first, then the one dangerous file."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    os.chdir(out)  # names that are relative to a descriptor of it pass the guard then
    _lose_network()
    import torch
    import torch._weights_only_unpickler

    from . import tensors  # noqa: F401

    torch.set_num_threads(1)
    try:
        size = sum(f.stat().st_size for f in source.rglob("*") if f.is_file()) if source.is_dir() else source.stat().st_size
        _limit(size)
        _guard(out)
        told = _write(source, out)
    except CheckpointError as error:
        told = {"error": str(error)}
    except MemoryError:
        told = {"error": "needs far more memory than its size explains"}
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        told = {"error": f"refused by the loader that opens nothing but tensors ({type(error).__name__}: {first})"}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
