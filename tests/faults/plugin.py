"""What pytest needs for the fault matrix: the seed, the tiers, the tests of rows that lie elsewhere, the results as lines.

Loaded by `tests/conftest.py`, so that the options exist whatever part of the suite is run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .rows import TESTS, files_with_rows, matrix, rows_in

FAULTS = Path(__file__).resolve().parent
_NOT_FAST = ("slow", "nightly", "soak")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--fault-seed", type=int, default=1, metavar="N", help="seed of all random faults (default 1)")
    group.addoption("--fault-results", metavar="FILE", help="append a line of JSON for each test of a row of the fault matrix")
    group.addoption("--fault-drawn", action="store_true", help="only tests that draw from the seed")
    group.addoption("--fault-rows", metavar="ID,…", help="only the tests of these rows of the fault matrix")


def pytest_report_header(config: pytest.Config) -> str:
    return f"fault seed: {config.getoption('fault_seed')}"


def pytest_configure(config: pytest.Config) -> None:
    """`pytest tests/faults` runs the whole matrix: also the tests of its rows in the other folders."""
    there = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    if there == [FAULTS]:
        config.args += [str(path) for path in files_with_rows()]
        config.stash[_ONLY_ROWS] = True


_ONLY_ROWS = pytest.StashKey[bool]()


def rows_of(item: pytest.Item) -> list[str]:
    """The rows that a test proves."""
    found = rows_in(item.name)
    for mark in item.iter_markers("row"):
        found.update(mark.args)
    return sorted(found & set(matrix()))


def draws(item: pytest.Item) -> bool:
    """Whether another seed gives a test other faults."""
    return "fault_seed" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks: `fast` on every test of a row that is not slow, nightly or soak; `nightly` on the slow ones that are not fast."""
    others, wanted = [], set(filter(None, (config.getoption("fault_rows") or "").split(",")))
    drawn = config.getoption("fault_drawn")
    for item in items:
        rows = rows_of(item)
        if not rows or (wanted and not wanted & set(rows)) or (drawn and not draws(item)):
            others.append(item)
            continue
        kept_out = any(item.get_closest_marker(name) for name in _NOT_FAST)
        if not kept_out:
            item.add_marker("fast")
        elif item.get_closest_marker("slow") and not item.get_closest_marker("fast"):
            item.add_marker("nightly")
    if wanted or drawn or config.stash.get(_ONLY_ROWS, False):
        left_out = [item for item in others if wanted or drawn or FAULTS not in item.path.parents]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    report.lumina_rows = rows_of(item)
    if report.failed and report.lumina_rows:
        report.sections.append(("fault seed", str(item.config.getoption("fault_seed"))))
    if report.lumina_rows and (report.when == "call" or not report.passed):
        _write_result(item, report)


def _write_result(item: pytest.Item, report: pytest.TestReport) -> None:
    target = item.config.getoption("fault_results")
    if not target:
        return
    line = {
        "test": f"{item.path.relative_to(TESTS)}::{item.name}",
        "rows": rows_of(item),
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "seed": item.config.getoption("fault_seed"),
        "draws": draws(item),
        "figures": dict(item.user_properties),
    }
    if report.skipped and isinstance(report.longrepr, tuple):
        line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
    with Path(target).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")


@pytest.fixture(scope="session")
def fault_seed(pytestconfig: pytest.Config) -> int:
    """The seed of this session's random faults (`--fault-seed`, printed at the start)."""
    return int(pytestconfig.getoption("fault_seed"))


@pytest.fixture
def fault_random(request: pytest.FixtureRequest, fault_seed: int) -> random.Random:
    """A generator of this test's own: the same for the same seed, whatever else runs."""
    return random.Random(f"{fault_seed}:{request.node.name}")


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """`figure(name, value)` puts a measured figure into the matrix beside the row's result."""
    return record_property
