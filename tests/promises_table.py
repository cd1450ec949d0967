"""`python -m tests.promises_table [--json] [--results FILE]`: each row C1-C150 of the specification with its tests.

A test proves the rows whose numbers its name carries (`test_c015_…`, `test_c122_c096_…`). `ALSO` names tests whose names say
something else, `NOT` says of rows without a test why there is none. With what `pytest --junit-xml FILE` wrote, each row says
how its tests ended.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROWS = range(1, 151)
_TEST = re.compile(r"^ *(?:async )?def (test_\w+)", re.MULTILINE)
_ROW = re.compile(r"_c(\d{3})(?=_|$)")

ALSO: dict[int, tuple[str, ...]] = {
    12: ("test_r19_r26_each_rule_and_its_fix",),
    109: ("test_c103_a_pt_file_becomes_a_run",),
    65: (
        "test_c064_train_takes_the_data_that_it_is_given",
        "test_c001_one_batch_is_learned_by_heart_and_said_back_through_chat",
    ),
    69: ("test_c062_debug_training_setup_tells_the_truth",),
    90: ("test_c087_c088_c092_a_loop_of_ones_own",),
    94: (
        "test_mx06_one_spike_in_a_million_is_in_every_picture",
        "test_plot_hands_plotext_at_most_500_points_and_keeps_the_spike",
    ),
    95: ("test_emit_numbers_records_and_sets_the_common_fields", "test_ps16_a_flood_on_stdout_is_capped"),
    115: ("test_c031_the_page_is_well_formed_and_holds_what_the_document_holds",),
    116: (
        "test_out_names_both_files_and_json_says_where",
        "test_differences_from_the_preset_and_the_graded_questions_are_there",
    ),
    147: ("test_rs02_killed_at_ten_instants_equals_unbroken", "test_rs01_given_up_after_any_step_equals_unbroken"),
}
NOT: dict[int, str] = {
    118: "one command in a fresh environment: .ci/run is that command, and no test runs it within the suite",
    126: "the default command needs minutes: `.ci`'s start and test_c144_* show its parts; README has the measured run",
}


def row_tests() -> dict[int, list[str]]:
    """Names of the tests of each row, sorted."""
    found: dict[int, set[str]] = {row: set() for row in ROWS}
    names = {name for path in TESTS.rglob("test_*.py") for name in _TEST.findall(path.read_text(encoding="utf-8"))}
    for name in names:
        for number in _ROW.findall(name):
            if int(number) in found:
                found[int(number)].add(name)
    for row, also in ALSO.items():
        found[row].update(name for name in also if name in names)
    return {row: sorted(tests) for row, tests in found.items()}


def read_results(path: Path) -> dict[str, set[str]]:
    """How the tests of a JUnit XML file ended, by name without parameters: green, skipped, failed.

    Raises:
        OSError, xml.etree.ElementTree.ParseError: it cannot be read, or is no XML.
    """
    found: dict[str, set[str]] = {}
    for case in ET.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        ended = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "green"
        found.setdefault(case.get("name", "").partition("[")[0], set()).add(ended)
    return found


def table(results: Mapping[str, set[str]] | None = None) -> list[dict[str, object]]:
    """One entry for each row: `row`, `state`, `tests`, `why`, `ran` (of the tests; None without results).

    States: explained, missing; else present without results, and with them failed (one failed), green (one passed), skipped,
    not run. Tests marked slow do not run by default, so `ran` may be less than all.
    """
    rows = []
    for row, tests in row_tests().items():
        why = None if tests else NOT.get(row)
        state = "explained" if why else "missing"
        if tests:
            state = "present" if results is None else _ended(tests, results)
        ran = None if results is None else sum(bool(results.get(test, set()) - {"skipped"}) for test in tests)
        rows.append({"row": f"C{row}", "state": state, "tests": tests, "why": why, "ran": ran})
    return rows


def _ended(tests: Sequence[str], results: Mapping[str, set[str]]) -> str:
    ends = set().union(*(results.get(test, set()) for test in tests))
    return next((state for state in ("failed", "green", "skipped") if state in ends), "not run")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a row is missing or its tests failed, were all skipped, or did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--results", type=Path, metavar="FILE", help="what pytest --junit-xml wrote")
    args = parser.parse_args(argv)
    rows = table(read_results(args.results) if args.results else None)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        for item in rows:
            tests = item["tests"]
            assert isinstance(tests, list)
            shown = ", ".join(tests[:3]) + (f" and {len(tests) - 3} more" if len(tests) > 3 else "")
            ran = "" if item["ran"] is None or not tests else f"{item['ran']} of {len(tests)}"
            print(f"{item['row']:<5} {item['state']:<9} {ran:<10} {shown or item['why'] or ''}")
        states = [str(item["state"]) for item in rows]
        print(", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))))
    return int(any(item["state"] not in ("present", "green", "explained") for item in rows))


if __name__ == "__main__":
    sys.exit(main())
