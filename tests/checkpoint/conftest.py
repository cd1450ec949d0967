from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def fresh() -> Iterator[Callable[[], Path]]:
    """Makes new folders in memory where there is such a file system: these tests need many saves, not a disk."""
    shm = Path("/dev/shm")
    made: list[Path] = []

    def make() -> Path:
        made.append(Path(tempfile.mkdtemp(prefix="lumina-", dir=shm if shm.is_dir() else None)))
        return made[-1]

    yield make
    for path in made:
        shutil.rmtree(path)


@pytest.fixture
def tmp_path(fresh: Callable[[], Path]) -> Path:
    return fresh()


@pytest.fixture(autouse=True)
def private_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger of commits lies in this test's own folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
