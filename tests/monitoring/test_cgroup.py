"""The memory of a control group, in both versions of the tree, at its own place and above (R42, C139)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina_engine.monitoring.cgroup import in_use, limit, limiting_folder, memory_folders, oom_kills

V2, V1 = "0::/job/step\n", "9:cpu:/else\n4:memory,hugetlb:/job/step\n"


def tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def membership(root: Path, text: str) -> Path:
    path = root / "membership"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "top", "name", "kills"),
    [(V2, "", "memory.max", "memory.events"), (V1, "memory/", "memory.limit_in_bytes", "memory.oom_control")],
)
def test_the_lowest_limit_counts_and_the_kills_are_of_the_own_group(
    tmp_path: Path, text: str, top: str, name: str, kills: str
) -> None:
    own = membership(tmp_path, text)
    assert limit(tmp_path, own) is None and oom_kills(tmp_path, own) == 0
    tree(tmp_path, {f"{top}job/step/{name}": "max\n", f"{top}job/{name}": "5000\n", f"{top}{name}": "9000\n"})
    assert limit(tmp_path, own) == 5000
    tree(tmp_path, {f"{top}job/step/{name}": "4000\n"})
    assert limit(tmp_path, own) == 4000
    tree(tmp_path, {f"{top}job/step/{kills}": "oom 3\noom_kill 2\n", f"{top}job/{kills}": "oom_kill 7\n"})
    assert oom_kills(tmp_path, own) == 2
    assert memory_folders(tmp_path, own)[:3] == [tmp_path / f"{top}job/step", tmp_path / f"{top}job", tmp_path / top]


@pytest.mark.parametrize("text", ["0::/host/path/of/it\n", "4:memory:/../../etc\n", "no such lines", ""])
def test_a_path_that_is_the_hosts_falls_back_to_the_top(tmp_path: Path, text: str) -> None:
    tree(tmp_path, {"memory.max": "7000\n", "memory/memory.oom_control": "oom_kill 1\n"})
    own = membership(tmp_path, text)
    assert limit(tmp_path, own) == 7000 and oom_kills(tmp_path, own) == 1
    assert limit(tmp_path, tmp_path / "none") == 7000


V2_STAT = "anon 900\nfile 2100\nshmem 100\ninactive_file 700\nactive_file 1300\n"
V1_STAT = "inactive_file 1\nactive_file 2\ntotal_inactive_file 700\ntotal_active_file 1300\n"


@pytest.mark.parametrize(
    ("text", "top", "limits", "use", "stat"),
    [
        (V2, "", "memory.max", "memory.current", V2_STAT),
        (V1, "memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", V1_STAT),
    ],
)
def test_c139_use_is_that_of_the_folder_whose_limit_counts_without_page_cache(
    tmp_path: Path, text: str, top: str, limits: str, use: str, stat: str
) -> None:
    own = membership(tmp_path, text)
    assert limiting_folder(tmp_path, own) is None
    tree(tmp_path, {f"{top}job/step/{limits}": "9000\n", f"{top}job/{limits}": "5000\n", f"{top}{limits}": "max\n"})
    assert limiting_folder(tmp_path, own) == (5000, tmp_path / f"{top}job")
    assert in_use(tmp_path / f"{top}job") is None
    tree(tmp_path, {f"{top}job/{use}": "3000\n"})
    assert in_use(tmp_path / f"{top}job") is None, "use with an unknown share of cache is unknown"
    tree(tmp_path, {f"{top}job/memory.stat": stat})
    assert in_use(tmp_path / f"{top}job") == 1000
    tree(tmp_path, {f"{top}job/step/{limits}": "5000\n"})
    assert limiting_folder(tmp_path, own) == (5000, tmp_path / f"{top}job"), "the use of the step's neighbours counts as well"
