"""`python -m tests.faults.matrix [--tier fast|nightly|all] [--seeds N] [--row ID …]`: run the fault matrix and publish it.

Each row's tests are run once a seed; what came out is kept in results.json (rows that were not run keep their last result) and
written as a table to README.md, both beside this file. `--publish` only writes the table again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from .rows import TESTS, TIERS, matrix

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
README = HERE / "README.md"
MARKS = {"fast": "fast", "nightly": "nightly", "all": "fast or nightly"}
BEGIN, END = "<!-- matrix: written by python -m tests.faults.matrix -->", "<!-- end of the matrix -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description="run and publish the fault matrix")
    parser.add_argument("--tier", choices=sorted(MARKS), default="fast")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run with the seeds 1 to N (default 1)")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N")
    parser.add_argument("--row", nargs="*", default=[], metavar="ID", help="only these rows")
    parser.add_argument("--publish", action="store_true", help="run nothing, write the table from the kept results")
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    failed = False
    if not args.publish:
        unknown = sorted(set(args.row) - set(matrix()))
        if unknown:
            parser.error(f"no such row: {', '.join(unknown)}")
        lines = [
            line for seed in range(args.first_seed, args.first_seed + args.seeds) for line in run(args.tier, seed, args.row)
        ]
        found = summed(lines, time.strftime("%Y-%m-%d"))
        kept.update(found)
        RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        failed = any(row["state"] == "red" for row in found.values())
    publish(kept)
    return int(failed)


def run(tier: str, seed: int, rows: list[str]) -> list[dict[str, Any]]:
    """Run the tests of a tier with one seed; a line for each test that ran. The output goes to the terminal."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as results:
        words = [sys.executable, "-m", "pytest", str(HERE), "-m", MARKS[tier], "-p", "no:cacheprovider"]
        words += [f"--fault-seed={seed}", f"--fault-results={results.name}"]
        if rows:
            words += ["--fault-rows=" + ",".join(rows)]
        subprocess.run(words, cwd=TESTS.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return [json.loads(line) for line in Path(results.name).read_text(encoding="utf-8").splitlines()]


def summed(lines: list[dict[str, Any]], date: str) -> dict[str, dict[str, Any]]:
    """What the tests say about each row: red if one failed, skipped if all were skipped, green otherwise."""
    by_row = defaultdict(list)
    for line in lines:
        for row in line["rows"]:
            by_row[row].append(line)
    found = {}
    for row, about in by_row.items():
        outcomes = {line["outcome"] for line in about}
        state = "red" if "failed" in outcomes else "skipped" if outcomes == {"skipped"} else "green"
        figures: dict[str, list[Any]] = defaultdict(list)
        for line in about:
            for name, value in line["figures"].items():
                figures[name].append(value)
        found[row] = {
            "state": state,
            "date": date,
            "seeds": sorted({line["seed"] for line in about}),
            "tests": sorted({line["test"].split("[")[0] for line in about}),
            "cases": len({line["test"] for line in about}),
            "skipped": sorted({f"{line['test']}: {line.get('reason', '')}" for line in about if line["outcome"] == "skipped"}),
            "failed": sorted({f"{line['test']} (seed {line['seed']})" for line in about if line["outcome"] == "failed"}),
            "seconds": round(sum(line["seconds"] for line in about) / len({line["seed"] for line in about}), 1),
            "figures": {name: _span(values) for name, values in sorted(figures.items())},
        }
    return found


def _span(values: list[Any]) -> Any:
    """One value, or the least and the largest of several."""
    different = sorted({json.dumps(value) for value in values})
    if len(different) == 1:
        return values[0]
    if all(isinstance(value, int | float) for value in values):
        return f"{min(values)} to {max(values)}"
    return ", ".join(str(json.loads(value)) for value in different)


def publish(kept: dict[str, dict[str, Any]]) -> None:
    """Put the table between the marks of README.md; the text around it stays."""
    text = README.read_text(encoding="utf-8") if README.exists() else f"# Fault matrix\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    README.write_text(f"{head}{BEGIN}\n{table(kept)}{END}{tail}", encoding="utf-8")


def table(kept: dict[str, dict[str, Any]]) -> str:
    """The rows as a table, after one line of totals."""
    rows = matrix()
    states = [kept[row]["state"] if row in kept else "not run" for row in rows]
    totals = ", ".join(f"{states.count(state)} {state}" for state in ("green", "red", "skipped", "not run"))
    lines = ["", f"{len(rows)} rows: {totals}.", ""]
    lines += ["| id | tier | fault | criterion | tests | last result | figures |", "|---|---|---|---|---|---|---|"]
    for id, row in rows.items():
        lines.append(f"| {id} | {row.tier} | {row.fault} | {row.criterion} | {' | '.join(_cells(kept.get(id)))} |")
    return "\n".join([*lines, "", "Tiers: " + ", ".join(f"{name} {when}" for name, when in TIERS.items()) + ".", ""])


def _cells(row: dict[str, Any] | None) -> list[str]:
    """Tests, last result, figures."""
    if row is None:
        return ["-", "not run", ""]
    files: dict[str, list[str]] = defaultdict(list)
    for test in row["tests"]:
        file, _, name = test.partition("::")
        files[file].append(name)
    tests = "; ".join(f"{file}: {', '.join(f'`{name}`' for name in names)}" for file, names in files.items())
    seeds = row["seeds"]
    span = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({seeds[0]}-{seeds[-1]})"
    result = f"**{row['state']}** {row['date']}, {row['cases']} cases, {span}, {row['seconds']} s"
    for name in ("failed", "skipped"):
        if row[name]:
            result += f"; {len(row[name])} {name}: {row[name][0]}"
    figures = ", ".join(f"{name} {value}" for name, value in row["figures"].items())
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in (tests, result, figures)]


if __name__ == "__main__":
    sys.exit(main())
