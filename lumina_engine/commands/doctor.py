"""`lumina-engine doctor`: check this machine."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from ..doctor.checks import Check
    from ..doctor.row import Row

HELP = "check this machine: packages, devices, disk, limits, sockets"
_EPILOG = """Exit code 0: nothing failed (warnings may be there); 1: something failed; 2: usage.
--json prints one list of rows: id, group, status (ok, warn, fail, skipped), value, fix.
--progress json tells each step on standard error: {"progress": "checks", "checks": […]} first, then a
{"progress": "row", "row": {…}} as soon as a row is known."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", metavar="GROUPS", help="only these groups of checks, e.g. disk,python")
    parser.add_argument(
        "--filter", metavar="WORDS", default="", help="show only rows with these words: fail, group:disk, torch"
    )
    parser.add_argument(
        "--skip", metavar="IDS", action="append", default=[], help="leave out these checks, e.g. deepspeed,torch"
    )
    parser.add_argument("--quick", action="store_true", help="leave out the slow checks (imports of torch and DeepSpeed)")
    parser.add_argument("--runs", metavar="DIR", help="folder of the runs (default ./runs or $LUMINA_RUNS)")
    common.add_json(parser)
    parser.add_argument("--progress", choices=("json",), help="rows as they come, as JSON lines on standard error")


def run(args: argparse.Namespace) -> int:
    from ..doctor.row import counts, matches, summary
    from ..doctor.run import run_checks
    from ..doctor.system import System

    checks = _chosen(args.only)
    skip = _skipped(args.skip, checks) | {check.id for check in checks if args.quick and check.slow}
    rows: list[Row] = []
    if args.progress:
        plan = [{"id": check.id, "group": check.group, "slow": check.slow, "about": check.about} for check in checks]
        _tell({"progress": "checks", "checks": plan})
    for row in run_checks(System.here(Path(args.runs) if args.runs else None), checks, skip=skip):
        rows.append(row)
        if args.progress:
            _tell({"progress": "row", "row": row.to_dict()})
        if not args.json and matches(row, args.filter):
            print(common.safe(describe(row)), flush=True)
    if args.json:
        order = {check.id: index for index, check in enumerate(checks)}
        rows.sort(key=lambda row: order[row.id.partition(".")[0]])  # the order of ending is chance
        common.print_json([row.to_dict() for row in rows if matches(row, args.filter)])
    else:
        print(summary(rows))
    return 1 if counts(rows)["fail"] else 0


def _tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), file=sys.stderr, flush=True)


def _chosen(only: str | None) -> list[Check]:
    from ..doctor.checks import CHECKS

    groups = list(dict.fromkeys(check.group for check in CHECKS))
    wanted = _words([only] if only else [], groups, "--only", "group")
    return [check for check in CHECKS if not wanted or check.group in wanted]


def _skipped(skip: list[str], checks: Iterable[Check]) -> set[str]:
    from ..doctor.checks import CHECKS

    return _words(skip, [check.id for check in CHECKS], "--skip", "check") & {check.id for check in checks}


def _words(texts: list[str], known: list[str], option: str, kind: str) -> set[str]:
    """
    Raises:
        UserError: a word that is not known; the nearest one is named.
    """
    words = {word.strip() for text in texts for word in text.split(",") if word.strip()}
    for word in sorted(words - set(known)):
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{kind}s: {', '.join(known)}"
        raise common.UserError(f"{option} {word}: there is no such {kind}; {hint}")
    return words


def describe(row: Row) -> str:
    """A row for a person: status, id and value; the fix on a line of its own."""
    head = f"{row.status:<8}{row.id:<20} {row.value}"
    return head + (f"\n{'':<8}{'':<20} -> {row.fix}" if row.fix else "")
