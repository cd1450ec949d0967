"""What the tests of the matrix said, kept while it is run: a file for each state of the code, a line for each test.

So a run of the matrix may be interrupted at any time, or made in portions: what was run on the same code is not run again.
The state of the code is the content of every file but results.json, which the matrix writes, and texts (`*.md`).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .rows import TESTS

ROOT = TESTS.parent
FOLDER = Path(__file__).resolve().parent / ".journal"
_RESULTS = "tests/faults/results.json"


def state_of_code() -> str:
    """Twelve digits that change with any file that a test can depend on, committed or not."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    total = hashlib.sha256()
    for name in sorted(set(listed.split("\0")) - {_RESULTS}):
        path = ROOT / name
        if path.is_file() and path.suffix != ".md":
            total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


class Journal:
    """The results of one state of the code.

    A portion is a set of rows run together with one seed in one tier. Its lines count once it has ended; of a row that was run
    twice with one seed the later portion counts.
    """

    def __init__(self, folder: Path = FOLDER, state: str | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / f"{state or state_of_code()}.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self._lines = [json.loads(line) for line in lines]

    def open_portion(self) -> Path:
        """The file to which a portion's tests append their lines."""
        path = self.path.with_suffix(".portion")
        path.unlink(missing_ok=True)
        return path

    def close_portion(self, rows: Iterable[str], seed: int, tier: str) -> None:
        """The portion has run to its end: its lines count from now on."""
        portion = self.path.with_suffix(".portion")
        found = portion.read_text(encoding="utf-8").splitlines() if portion.exists() else []
        entry = {"rows": sorted(rows), "seed": seed, "tier": tier, "tests": [json.loads(line) for line in found]}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        portion.unlink(missing_ok=True)
        self._lines.append(entry)

    def has(self, row: str, seed: int, tier: str) -> bool:
        """Whether that was run."""
        return any(row in entry["rows"] and (entry["seed"], entry["tier"]) == (seed, tier) for entry in self._lines)

    def of_row(self, row: str) -> list[dict[str, Any]]:
        """The lines of a row's tests, all seeds and tiers, each from its latest portion."""
        latest = {(e["seed"], e["tier"]): e["tests"] for e in self._lines if row in e["rows"]}
        return [line for tests in latest.values() for line in tests if row in line["rows"]]

    def rows(self) -> set[str]:
        """The rows that were run."""
        return {row for entry in self._lines for row in entry["rows"]}
