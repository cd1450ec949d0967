"""The table of promises in tests/README.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_every_promise_names_tests_that_exist():
    text = (TESTS / "README.md").read_text()
    table = text[text.index("## What the terminal program promises") :]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| capability")]
    there = set()
    for path in TESTS.rglob("test_*.py"):
        there.update(re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))
    assert len(rows) == 27, "a row for each capability"
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert not set(named) - there, f"{sorted(set(named) - there)} in: {row}"
