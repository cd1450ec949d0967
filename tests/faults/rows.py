"""The rows of the fault matrix, and which tests prove them.

A test proves the rows whose ids stand in its name or in the id of its parameters (`test_ck09_…`, `[ck02_within_writes]`), and
those of a `row` mark. It may lie anywhere below `tests`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TIERS = {"Fa": "each commit", "Fb": "before a merge", "N": "nightly"}
_ID = re.compile(r"(?<![a-z0-9])(ck|rs|ft|ps|se|mx)(\d\d)(?![0-9])")
_PROVES = re.compile(r"(?<![a-z0-9])(?:ck|rs|ft|ps|se|mx)\d\d_|mark\.row\(")


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its id, the tier it is run in (Fa, Fb, N), the fault, what must hold, and what figures may be at most."""

    id: str
    tier: str
    fault: str
    criterion: str
    bounds: dict[str, float] = field(default_factory=dict)


def matrix() -> dict[str, Row]:
    """All rows by id, in order."""
    rows = json.loads(Path(__file__).with_name("rows.json").read_text(encoding="utf-8"))
    return {row["id"]: Row(**row) for row in rows}


def rows_in(name: str) -> set[str]:
    """The row ids that stand in the name of a test."""
    return {f"{kind}{number}".upper() for kind, number in _ID.findall(name.lower())}


def files_of(rows: Iterable[str]) -> list[Path]:
    """The test files that speak of one of these rows: all that can hold a test of theirs."""
    wanted = set(rows)
    return [path for path in sorted(TESTS.rglob("test_*.py")) if wanted & rows_in(path.read_text(encoding="utf-8"))]


def files_with_rows() -> list[Path]:
    """The test files, outside this folder, that prove a row."""
    own = Path(__file__).parent
    found = (path for path in TESTS.rglob("test_*.py") if own not in path.parents)
    return sorted(path for path in found if _PROVES.search(path.read_text(encoding="utf-8")))
