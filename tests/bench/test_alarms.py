"""Nightly alarms on figures of the fault matrix: each may be twice its goal. `lumina-engine bench` shows them beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from lumina_engine.training.save_benchmark import GOALS
from tests.faults.rows import matrix, rows_in

ALARM = 2.0  # times the goal
WATCHED: dict[str, list[str]] = {
    "ck16_ck19": ["checkpoint"],
    "mx04": ["tui", "--only", "open_long,pan_zoom"],
    "mx05": ["tui", "--only", "many_runs"],
    "mx09": ["tui", "--only", "monitor"],
}


def goals_of(row: str) -> dict[str, float]:
    """What the rows in this text say that figures may be at most."""
    return {name: bound for id in sorted(rows_in(row)) for name, bound in matrix()[id].bounds.items()}


def test_the_goals_of_the_bench_are_those_of_the_matrix() -> None:
    goals = goals_of("ck16_ck19")
    assert {name: GOALS[name] for name in ("save_share", "commit_beyond_write_s", "resume_s")}.items() <= goals.items()


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row}_figures") for row in WATCHED])
def test_a_figure_of_the_matrix_is_below_its_alarm(row: str, figure: Callable[[str, object], None]) -> None:
    words, goals = WATCHED[row], goals_of(row)
    command = [sys.executable, "-m", "lumina_engine.cli", "bench", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in goals:
        figure(name, found[name] if found[name] is None else round(found[name], 3))
    late = {name: found[name] for name, goal in goals.items() if found[name] is None or found[name] > ALARM * goal}
    assert late == {}, f"more than {ALARM:g} times the goals {goals}"
