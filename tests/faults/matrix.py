"""`python -m tests.faults.matrix [--tier fast|nightly|all] [--seeds N] [--row ID …]`: run the fault matrix and publish it.

The rows are run in the order of the matrix, some at a time, with each seed: all tests with the first one, with the others those
that draw from it (`--every`: all again). After each portion there is a line for each of its
rows, and what is known so far stands in results.json and as a table in README.md, both beside this file. What was run on this
state of the code is not run again (`--again` does), so an interrupted run goes on where it was; `--minutes` ends one by itself.
Rows that were not run on this code keep their last result. `--publish` runs nothing and writes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .journal import Journal
from .rows import TESTS, TIERS, files_of, matrix

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
README = HERE / "README.md"
MARKS = {"fast": "fast", "nightly": "nightly"}
BEGIN, END = "<!-- matrix: written by python -m tests.faults.matrix -->", "<!-- end of the matrix -->"
NOTHING_FOUND = 5  # pytest's exit code when no test was chosen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description="run and publish the fault matrix")
    parser.add_argument("--tier", choices=[*MARKS, "all"], default="fast")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run with the seeds 1 to N (default 1)")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N")
    parser.add_argument("--row", nargs="*", default=[], metavar="ID", help="only these rows")
    parser.add_argument("--portion", type=int, default=4, metavar="N", help="rows run together (default 4)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="tests at a time, of different files (default 1)")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="M", help="begin no portion after M minutes")
    parser.add_argument("--every", action="store_true", help="with each seed also the tests that draw nothing from it")
    parser.add_argument("--again", action="store_true", help="also what was run on this code before")
    parser.add_argument("--publish", action="store_true", help="run nothing, write the table from the kept results")
    args = parser.parse_args()
    unknown = sorted(set(args.row) - set(matrix()))
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}")
    journal, end = Journal(), time.monotonic() + 60 * args.minutes
    for rows, seed, tier in () if args.publish else portions(args, journal):
        if args.minutes and time.monotonic() > end:
            print("time is up: the same command goes on here")
            break
        run(rows, seed, tier, journal, args.workers, drawn=seed != args.first_seed and not args.every)
        kept = publish(journal)
        for row in rows:
            print(line(row, kept.get(row)), flush=True)
    kept = publish(journal)
    return int(any(kept[row]["state"] == "red" for row in journal.rows() if row in kept))


def portions(args: argparse.Namespace, journal: Journal) -> Iterator[tuple[list[str], int, str]]:
    """(rows, seed, tier) of what is to be run: every seed of some rows, then the next rows."""
    wanted = [row for row in matrix() if not args.row or row in args.row]
    for first in range(0, len(wanted), args.portion):
        for tier in MARKS if args.tier == "all" else (args.tier,):
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                rows = wanted[first : first + args.portion]
                rows = rows if args.again else [row for row in rows if not journal.has(row, seed, tier)]
                if rows:
                    yield rows, seed, tier


def run(rows: Sequence[str], seed: int, tier: str, journal: Journal, workers: int = 1, *, drawn: bool = False) -> None:
    """Run the tests of these rows that belong to a tier, with `drawn` those that draw. Their output goes to the terminal.

    Raises:
        SystemExit: pytest did not run to its end; what it had done does not count.
    """
    words = [sys.executable, "-m", "pytest", *map(str, files_of(rows)), "-m", MARKS[tier], "-p", "no:cacheprovider"]
    words += [f"--fault-seed={seed}", f"--fault-results={journal.open_portion()}", "--fault-rows=" + ",".join(rows)]
    words += ["--fault-drawn"] * drawn
    if workers > 1:
        words += ["-n", str(workers), "--dist", "loadfile"]
    code = subprocess.run(words, cwd=TESTS.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code not in (0, 1, NOTHING_FOUND):
        raise SystemExit(f"pytest ended with {code} in {', '.join(rows)}, seed {seed}: this portion does not count")
    journal.close_portion(rows, seed, tier)


def summed(lines: list[dict[str, Any]], date: str) -> dict[str, Any]:
    """What its tests say about a row: red if one failed, skipped if all were skipped, green otherwise."""
    outcomes = {line["outcome"] for line in lines}
    seeds = sorted({line["seed"] for line in lines})
    figures: dict[str, list[Any]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        times[line["test"]].append(line["seconds"])
        for name, value in line["figures"].items():
            figures[name].append(value)
    return {
        "state": "red" if "failed" in outcomes else "skipped" if outcomes == {"skipped"} else "green",
        "date": date,
        "seeds": seeds if any(line["draws"] for line in lines) else [],
        "tests": sorted({line["test"].split("[")[0] for line in lines}),
        "cases": len({line["test"] for line in lines}),
        "skipped": sorted({f"{line['test']}: {line.get('reason', '')}" for line in lines if line["outcome"] == "skipped"}),
        "failed": sorted({f"{line['test']} (seed {line['seed']})" for line in lines if line["outcome"] == "failed"}),
        "seconds": round(sum(sum(found) / len(found) for found in times.values()), 1),  # with one seed
        "figures": {name: _span(values) for name, values in sorted(figures.items())},
    }


def _span(values: list[Any]) -> Any:
    """One value, or the least and the largest of several."""
    different = sorted({json.dumps(value) for value in values})
    if len(different) == 1:
        return values[0]
    if all(isinstance(value, int | float) for value in values):
        return f"{min(values)} to {max(values)}"
    return ", ".join(str(json.loads(value)) for value in different)


def publish(journal: Journal) -> dict[str, dict[str, Any]]:
    """Take over what the journal knows, and put the table between the marks of README.md; the text around it stays."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for row in journal.rows():
        if lines := journal.of_row(row):
            kept[row] = summed(lines, time.strftime("%Y-%m-%d"))
    RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8") if README.exists() else f"# Fault matrix\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    README.write_text(f"{head}{BEGIN}\n{table(kept)}{END}{tail}", encoding="utf-8")
    return kept


def table(kept: dict[str, dict[str, Any]]) -> str:
    """The rows as a table, after one line of totals."""
    rows = matrix()
    states = [kept[row]["state"] if row in kept else "not run" for row in rows]
    totals = ", ".join(f"{states.count(state)} {state}" for state in ("green", "red", "skipped", "not run"))
    lines = ["", f"{len(rows)} rows: {totals}.", ""]
    lines += ["| id | tier | fault | criterion | tests | last result | figures |", "|---|---|---|---|---|---|---|"]
    for id, row in rows.items():
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in _cells(kept.get(id), row.bounds)]
        lines.append(f"| {id} | {row.tier} | {row.fault} | {row.criterion} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Tiers: " + ", ".join(f"{name} {when}" for name, when in TIERS.items()) + ".", ""])


def _figure(name: str, value: Any, bound: float | None) -> str:
    """A figure, with the bound of the row where the (largest) value is over it: only twice the bound makes a test red."""
    over = bound is not None and value is not None and float(str(value).rpartition(" to ")[2]) > bound
    return f"{name} {value} (bound {bound:g})" if over else f"{name} {value}"


def _cells(row: dict[str, Any] | None, bounds: dict[str, float]) -> tuple[str, str, str]:
    """Tests, last result, figures."""
    if row is None:
        return "-", "not run", ""
    files: dict[str, list[str]] = defaultdict(list)
    for test in row["tests"]:
        file, _, name = test.partition("::")
        files[file].append(name)
    tests = "; ".join(f"{file}: {', '.join(f'`{name}`' for name in names)}" for file, names in files.items())
    seeds = row["seeds"]
    span = (
        "nothing drawn"
        if not seeds
        else f"seed {seeds[0]}"
        if len(seeds) == 1
        else f"{len(seeds)} seeds ({seeds[0]}-{seeds[-1]})"
    )
    result = f"**{row['state']}** {row['date']}, {row['cases']} cases, {span}, {row['seconds']} s"
    for name in ("failed", "skipped"):
        if row[name]:
            result += f"; {len(row[name])} {name}: {row[name][0]}"
    return tests, result, ", ".join(_figure(name, value, bounds.get(name)) for name, value in row["figures"].items())


def line(id: str, row: dict[str, Any] | None) -> str:
    """A row for the terminal: result, date, cases, seeds, seconds a seed, figures."""
    _, result, figures = _cells(row, matrix()[id].bounds)
    return "  ".join(part for part in (f"{id:<5}", result.replace("**", ""), figures) if part)


if __name__ == "__main__":
    sys.exit(main())
