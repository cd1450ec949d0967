"""Which kind of file system a place lies on (C57, C78, C112)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lumina_engine import mounts
from lumina_engine.mounts import file_system


def row(point: str, kind: str) -> str:
    return f"21 1 8:1 / {point} rw,noatime master:1 - {kind} /dev/x rw\n"


def test_c057_c078_the_nearest_mount_above_a_place_counts(tmp_path: Path) -> None:
    here = os.path.realpath(tmp_path)
    table = (
        row("/", "ext4") + row(here, "xfs") + row(f"{here}/a\\040b", "tmpfs") + "garbage - \n - \n\n" + row(f"{here}x", "nfs4")
    )
    (tmp_path / "a b").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/")
    found = {name: file_system(tmp_path / name, table) for name in ("", "a b", "file", "link")}
    assert found == {"": "xfs", "a b": "tmpfs", "file": "xfs", "link": "ext4"}
    assert (file_system(f"{here}x", table), file_system(f"{here}y", table), file_system("/", "")) == ("nfs4", "ext4", "")
    with (tmp_path / "file").open() as file:
        assert file_system(f"/proc/self/fd/{file.fileno()}", table) == "xfs"


def test_c078_names_of_mounts_are_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, table = os.path.realpath(tmp_path), tmp_path / "mountinfo"
    folder = tmp_path / os.fsdecode(b"m\xfcsik\x0c\xe2\x80\xa8")
    folder.mkdir()
    table.write_bytes(row(here, "ext4").encode() + os.fsencode(row(f"{here}/{folder.name}", "vfat")))
    monkeypatch.setattr(mounts, "MOUNTS", table)
    assert (file_system(tmp_path), file_system(folder)) == ("ext4", "vfat")
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "none")
    assert file_system(tmp_path) == ""
