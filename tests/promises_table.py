"""`python -m tests.promises_table [--json]`: each row C1-C150 of the specification with the tests that prove it.

A test proves the rows whose numbers its name carries (`test_c015_…`, `test_c122_c096_…`). `ALSO` names tests whose names say
something else, `NOT` says of rows without a test why there is none.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROWS = range(1, 151)
_TEST = re.compile(r"^ *(?:async )?def (test_\w+)", re.MULTILINE)
_ROW = re.compile(r"_c(\d{3})(?=_|$)")

ALSO: dict[int, tuple[str, ...]] = {
    12: ("test_r19_r26_each_rule_and_its_fix",),
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
    109: "import of weights whose shape is left open asks for --shape; no test carries the row",
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


def table() -> list[dict[str, object]]:
    """One entry for each row: `row`, `state` (present, explained, missing), `tests`, `why`."""
    rows = []
    for row, tests in row_tests().items():
        why = None if tests else NOT.get(row)
        rows.append(
            {"row": f"C{row}", "state": "present" if tests else "explained" if why else "missing", "tests": tests, "why": why}
        )
    return rows


def main() -> int:
    rows = table()
    if "--json" in sys.argv[1:]:
        print(json.dumps(rows, indent=1))
    else:
        for item in rows:
            tests = item["tests"]
            assert isinstance(tests, list)
            shown = ", ".join(tests[:3]) + (f" and {len(tests) - 3} more" if len(tests) > 3 else "")
            print(f"{item['row']:<5} {item['state']:<9} {shown or item['why'] or ''}")
        counts = {state: sum(item["state"] == state for item in rows) for state in ("present", "explained", "missing")}
        print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return int(any(item["state"] == "missing" for item in rows))


if __name__ == "__main__":
    sys.exit(main())
