"""The matrix may be run in portions and interrupted: what counts, what is run again."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import matrix
from .journal import ROOT, Journal, state_of_code
from .rows import files_of

FAULTS = Path(__file__).resolve().parent


def line(row: str, outcome: str = "passed", seed: int = 1, **figures: Any) -> dict[str, Any]:
    kept = {"outcome": outcome, "seconds": 2.0, "seed": seed, "draws": True, "figures": figures}
    return {"test": f"t.py::test_{row}", "rows": [row], **kept}


def portion(journal: Journal, lines: list[dict[str, Any]]) -> None:
    journal.open_portion().write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def wanted(tier: str = "fast", seeds: int = 1, again: bool = False) -> argparse.Namespace:
    return argparse.Namespace(tier=tier, seeds=seeds, first_seed=1, row=["CK01", "CK02", "CK03"], portion=2, again=again)


def test_what_was_interrupted_is_run_again_and_what_was_done_is_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "code")
    assert list(matrix.portions(wanted(seeds=2), journal)) == [
        (["CK01", "CK02"], 1, "fast"),
        (["CK01", "CK02"], 2, "fast"),
        (["CK03"], 1, "fast"),
        (["CK03"], 2, "fast"),
    ]
    portion(journal, [line("CK01"), line("CK02")])
    journal.close_portion(["CK01", "CK02"], 1, "fast")
    portion(journal, [line("CK01", "failed", 2)])  # and killed
    journal = Journal(tmp_path, "code")
    assert journal.rows() == {"CK01", "CK02"} and [entry["outcome"] for entry in journal.of_row("CK01")] == ["passed"]
    assert [seed for _, seed, _ in matrix.portions(wanted(seeds=2), journal)] == [2, 1, 2]
    assert len(list(matrix.portions(wanted(seeds=2, again=True), journal))) == 4
    assert next(matrix.portions(wanted("all"), journal)) == (["CK01", "CK02"], 1, "nightly")
    assert Journal(tmp_path, "other code").rows() == set()


def test_the_later_portion_counts_and_one_red_seed_makes_the_row_red(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "code")
    for seed, outcome in ((1, "passed"), (2, "failed"), (2, "passed"), (3, "failed")):
        portion(journal, [line("CK01", outcome, seed, kills=seed)])
        journal.close_portion(["CK01"], seed, "fast")
    found = matrix.summed(journal.of_row("CK01"), "2030-01-01")
    assert (found["state"], found["seeds"], found["failed"]) == ("red", [1, 2, 3], ["t.py::test_CK01 (seed 3)"])
    assert found["figures"] == {"kills": "1 to 3"} and (found["cases"], found["seconds"]) == (1, 2.0)
    assert matrix.line("CK01", found).startswith("CK01   red 2030-01-01, 1 cases, 3 seeds (1-3), 2.0 s")
    undrawn = [entry | {"draws": False} for entry in journal.of_row("CK01")]
    assert matrix.line("CK01", matrix.summed(undrawn, "2030-01-01")).startswith("CK01   red 2030-01-01, 1 cases, nothing drawn")


def test_a_figure_over_its_bound_is_marked_in_the_table(tmp_path: Path) -> None:
    """Also that of a green row, whose tests are red only from an alarm on."""
    journal = Journal(tmp_path, "code")
    for seed, cold in ((1, 2.5), (2, 3.94)):
        portion(journal, [line("MX04", seed=seed, open_1m_cold_s=cold, open_1m_warm_s=0.7, kills=9)])
        journal.close_portion(["MX04"], seed, "nightly")
    found = matrix.summed(journal.of_row("MX04"), "2030-01-01")
    (shown,) = [text for text in matrix.table({"MX04": found}).splitlines() if text.startswith("| MX04 ")]
    assert "**green** 2030-01-01" in shown
    assert shown.endswith("| kills 9, open_1m_cold_s 2.5 to 3.94 (bound 3), open_1m_warm_s 0.7 |")
    assert "open_1m_cold_s 2.5 to 3.94 (bound 3)" in matrix.line("MX04", found)


@pytest.mark.slow
def test_other_seeds_run_what_draws_from_them() -> None:
    files = [str(FAULTS / "test_mx_values.py"), str(FAULTS / "test_rs_world.py")]
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=--import-mode=importlib", *files]

    def collected(*more: str) -> set[str]:
        done = subprocess.run([*words, *more], capture_output=True, text=True, cwd=ROOT)
        return {line for line in done.stdout.splitlines() if "::" in line}

    every, drawn = collected(), collected("--fault-drawn")
    assert drawn and drawn < every
    assert all("test_rs_world" in name for name in drawn)  # whose runs are drawn by a fixture


def test_the_state_of_the_code_is_the_same_twice_and_a_row_knows_its_files() -> None:
    assert state_of_code() == state_of_code()
    names = {path.name for path in files_of(["CK04"])}
    assert "test_ranks.py" in names and "test_mx_values.py" not in names
