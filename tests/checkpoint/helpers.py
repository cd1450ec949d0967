"""What the checkpoint tests share: settings, payloads, and the rig that kills a process at its k-th durability call."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lumina_engine.checkpoint.commit import list_steps, verify
from lumina_engine.checkpoint.files import CHUNK_BYTES, dump_json
from lumina_engine.checkpoint.manager import CheckpointManager, Payload

CALLS = ("open", "write", "fsync", "fdatasync", "rename", "replace", "unlink", "mkdir", "rmdir", "posix_fallocate")


class Clock:
    """Stands in for `time` in the module that saves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def settings(**changes: Any) -> SimpleNamespace:
    """The keys of a Config that the manager reads."""
    values = {"keep_checkpoints": 2, "async_save": True, "best_metric": "eval_loss", "enable_emergency_save": True}
    backups = {"backup_every_n_hours": 0.0, "max_backup_count": 2, "backup_path": None}
    return SimpleNamespace(**{**values, **backups, "experiment_name": "auto", **changes})


def manager(run: Path, **changes: Any) -> CheckpointManager:
    return CheckpointManager(settings(**changes), run)


def payload(step: int, size: int = 300, **changes: Any) -> Payload:
    """A payload whose every value follows from its step."""
    generator = torch.Generator().manual_seed(step)
    values: dict[str, Any] = {
        "step": step,
        "epoch": step // 10,
        "tokens": step * 100,
        "model": {"layer.weight": torch.randn(size, generator=generator), "layer.bias": torch.full((3,), float(step))},
        "model_config": {"size": size},
        "tokenizer": {"name": "none", "digest": "0"},
        "global_state": {"position": (step, 7), "lr": 0.5**step},
        "rank_state": {"steps": list(range(step))},
        "rank_tensors": {"moment": torch.randn(size, generator=generator)},
        "metrics": {"loss": 1.0 / step},
    }
    return Payload(**{**values, **changes})


def same(loaded: Any, wanted: Payload) -> bool:
    """Whether a loaded checkpoint gives back a payload bit by bit."""
    plain = ("step", "epoch", "tokens", "model_config", "tokenizer", "global_state", "rank_state", "metrics", "flags")
    return all(getattr(loaded, name) == getattr(wanted, name) for name in plain) and all(
        set(getattr(loaded, name)) == set(getattr(wanted, name))
        and all(torch.equal(tensor, getattr(wanted, name)[key]) for key, tensor in getattr(loaded, name).items())
        for name in ("model", "rank_tensors")
    )


def saved(run: Path, *steps: int, **changes: Any) -> CheckpointManager:
    """A manager that has saved these steps."""
    made = manager(run, **changes)
    for step in steps:
        (result,) = made.save(payload(step))
        assert result.failed is None, result
    return made


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def valid_steps(folder: Path) -> list[str]:
    return [name for name in list_steps(folder) if verify(folder / name).ok]


def rewrite_manifest(checkpoint: Path, **changes: object) -> None:
    """Change entries of a manifest, and its digest with them."""
    manifest = {**json.loads((checkpoint / "MANIFEST.json").read_text()), **changes}
    body = json.dumps(manifest).encode()
    (checkpoint / "MANIFEST.json").write_bytes(body)
    (checkpoint / "MANIFEST.sha256").write_text(f"{hashlib.sha256(body).hexdigest()}  MANIFEST.json\n")


def with_sha256(checkpoint: Path) -> None:
    """What the first format wrote: the same files with digests of SHA-256."""
    files = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    for listed in files:
        data = (checkpoint / listed["path"]).read_bytes()
        pieces = (data[begin : begin + CHUNK_BYTES] for begin in range(0, len(data), CHUNK_BYTES))
        listed["chunks"] = [hashlib.sha256(piece).hexdigest() for piece in pieces]
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    body = dump_json({**manifest, "files": files, "algorithm": "sha256", "format": 1})
    (checkpoint / "MANIFEST.json").write_bytes(body)
    (checkpoint / "MANIFEST.sha256").write_text(f"{hashlib.sha256(body).hexdigest()}  MANIFEST.json\n")


def in_child(action: Callable[[], None], timeout_s: int = 60) -> int:
    """Run in a forked child; its exit code (0 = returned, 1 = raised, -9 = killed). The alarm ends a child that hangs."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(timeout_s)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(number: int, written: float = 0.0) -> None:
    """Let this process die by SIGKILL just before its `number`-th durability call; a write after that share of its bytes."""
    count = 0

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)  # opening to read changes nothing on the disk
            count += 1
            if count == number:
                if written and name == "write":
                    part = int(len(args[1]) * written)
                    past_cache = fcntl.fcntl(args[0], fcntl.F_GETFL) & os.O_DIRECT
                    real(args[0], memoryview(args[1])[: part - part % 4096 if past_cache else part])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, dying(name, getattr(os, name)))


def kill_points(
    prepare: Callable[[], Any], action: Callable[[Any], object], written: float = 0.0, every: int = 1
) -> Iterator[tuple[int, Any]]:
    """For k = 1, 1 + every, … until a run completes: prepare, run the action in a child that dies at call k, yield both."""
    for number in itertools.count(1, every):
        prepared = prepare()

        def run(prepared: Any = prepared, number: int = number) -> None:
            kill_at(number, written)
            action(prepared)

        code = in_child(run)
        assert code in (0, -signal.SIGKILL), code
        yield number, prepared
        if code == 0:
            return


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
