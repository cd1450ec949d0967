"""The folder of offload to disk: private, one per process, cleared of what dead processes left (C57, S12)."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_engine.training.swap_folder import SwapRefused, swap_folder
from tests.checkpoint.helpers import umask

CHILD = """
import sys
from lumina_engine.training.swap_folder import swap_folder
folder = swap_folder(sys.argv[1])
(folder / "state").write_bytes(b"x" * 1000)
print(folder, flush=True)
if sys.argv[2] == "die":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()
"""


def child(root: Path, end: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CHILD, str(root), end]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_c057_each_process_has_its_own_and_the_dead_are_cleared(tmp_path: Path) -> None:
    root = tmp_path / "a" / "swap"
    alive = child(root, "live")
    assert alive.stdout is not None
    kept = Path(alive.stdout.readline().strip())
    dead = child(root, "die")  # after the other has looked round
    assert dead.stdout is not None
    left = Path(dead.stdout.readline().strip())
    dead.wait()
    assert kept != left and left.is_dir()
    again = child(root, "live")
    assert again.stdout is not None
    mine = Path(again.stdout.readline().strip())
    assert not left.exists() and (kept / "state").exists() and mine.parent == root
    assert root.stat().st_mode & 0o077 == 0 and mine.stat().st_mode & 0o077 == 0
    for process in (alive, again):
        process.communicate()
    assert not kept.exists() and not mine.exists()


def test_c057_a_second_one_of_the_same_process_leaves_the_first_alone(tmp_path: Path) -> None:
    first, second = swap_folder(tmp_path), swap_folder(tmp_path)
    assert first != second and first.is_dir() and second.is_dir()


def test_s12_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "file", "link"):
        with pytest.raises(SwapRefused, match="nvme_path"):
            swap_folder(tmp_path / name)


def test_ck17_the_lock_of_the_extensions_is_closed_to_others_and_never_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops import op_builder

    from lumina_engine.training.deepspeed_engine import _with_swap_folder

    lock = tmp_path / "lumina" / "torch_extensions" / "lumina.lock"
    modes = []

    class Builder:
        def load(self, verbose: bool) -> None:
            modes.append(stat.S_IMODE(lock.stat().st_mode))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parent))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # it may be added to
    monkeypatch.setattr(op_builder, "AsyncIOBuilder", Builder)
    config = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    with umask(0):
        _with_swap_folder(config, str(tmp_path / "swap"))
    assert modes == [0o600]
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        _with_swap_folder(config, str(tmp_path / "swap"))
    assert not (tmp_path / "elsewhere").exists()
