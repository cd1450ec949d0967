"""`lumina-engine checkpoint`: list the checkpoints of a run, check their digests, exchange models with other programs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import experts
from .common import UserError, add_json, print_json, safe, table

if TYPE_CHECKING:
    from ..checkpoint.commit import Report

HELP = "list, verify, export, import, consolidate, grow and shrink checkpoints"
COLUMNS = ("name", "step", "bytes", "verified", "best", "suspect", "created")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="checkpoints of a run or a folder, newest first")
    listing.add_argument("target", metavar="RUN|DIR", help="name of a run, its directory, or a folder of checkpoints")
    listing.add_argument("--quick", action="store_true", help="check presence and sizes only; verified is then unknown")
    checking = actions.add_parser("verify", help="compare every digest of a checkpoint, or of all of a run")
    checking.add_argument(
        "target", metavar="PATH|RUN", help="a checkpoint (also RUN@best, RUN@step-000123), a run, or a folder"
    )
    exporting = actions.add_parser("export", help="write the model of a checkpoint into a folder for other programs")
    exporting.add_argument("target", metavar="PATH|RUN", help="a checkpoint, or a run (its best one)")
    exporting.add_argument("out", metavar="OUT", help="folder to make")
    exporting.add_argument(
        "--format", choices=("hf", "safetensors"), default="hf", help="Hugging Face layout (default), or our own names"
    )
    importing = actions.add_parser("import", help="commit the model of another program as the first checkpoint of a new run")
    importing.add_argument("folder", metavar="PATH", help="config.json and safetensors; a .pt file; a folder of DeepSpeed")
    importing.add_argument("--shape", metavar="FILE", help="config.json of the model, for weights that come without one")
    importing.add_argument("--run", metavar="NAME", required=True, help="name of the new run")
    importing.add_argument("--tokenizer", metavar="NAME", help="what the ids mean, unless Lumina exported the folder")
    joining = actions.add_parser("consolidate", help="any number of ranks and any stage into the files of one rank")
    joining.add_argument("target", metavar="PATH|RUN", help="a checkpoint, or a run (its best one)")
    joining.add_argument("out", metavar="OUT", help="folder to make; the checkpoint is OUT/step-N")
    for sub in (listing, checking, exporting, importing, joining):
        add_json(sub)
    experts.add_arguments(actions)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 all good, 1 problems found, 2 nothing there to look at."""
    actions = {
        "list": _list,
        "verify": _verify,
        "export": _export,
        "import": _import,
        "consolidate": _consolidate,
        "grow": experts.grow,
        "shrink": experts.shrink,
    }
    return actions[args.action](args)


def _export(args: argparse.Namespace) -> int:
    from ..checkpoint.foreign import export_checkpoint

    done = export_checkpoint(args.target, args.out, args.format)
    if args.json:
        print_json(done)
    else:
        print(safe(f"{done['path']}: {done['layout']}, {done['tensors']} tensors, {done['bytes'] / 1e6:.1f} MB"))
    return 0


def _consolidate(args: argparse.Namespace) -> int:
    from ..checkpoint.consolidate import consolidate

    done = consolidate(args.target, args.out)
    if args.json:
        print_json(done)
    else:
        print(safe(f"{done['path']}: step {done['step']} of {done['ranks']} ranks in one, {done['bytes'] / 1e6:.1f} MB"))
    return 0


def _import(args: argparse.Namespace) -> int:
    from ..checkpoint.foreign import import_folder
    from ..run.directory import runs_root

    done = import_folder(args.folder, runs_root(), args.run, args.tokenizer, args.shape)
    if args.json:
        print_json(done)
    else:
        print(safe(f"{done['path']}: {done['layout']}, {done['parameters']:,} parameters; `lumina-engine chat {done['run']}`"))
    return 0


def _list(args: argparse.Namespace) -> int:
    from ..checkpoint.keep import EMERGENCY

    reports = [report for report, _ in _reports(args.target, full=not args.quick)]
    rows = [_row(report, args.quick) for report in reports]
    if args.json:
        print_json(rows)
    else:
        print(safe(table([_cells(row) for row in rows], COLUMNS, right=(1, 2))))
        for report in reports:
            if report.path.parent.name == EMERGENCY:
                print(safe(f"  {report.path.name} is an emergency save: {report.path}"))
        _print_problems(reports)
    return 0 if all(report.ok for report in reports) else 1


def _verify(args: argparse.Namespace) -> int:
    reports = []
    rows = []
    for report, seconds in _reports(args.target, every=True):
        reports.append(report)
        problems = [{"file": item.file, "reason": item.reason, "tensors": list(item.tensors)} for item in report.problems]
        rows.append(
            {**_row(report, False), "path": str(report.path), "seconds": seconds, "problems": problems, "strays": report.strays}
        )
        if not args.json:
            verdict = "ok" if report.ok else "DAMAGED"
            size = f"{report.bytes / 1e6:.1f} MB in {len(report.files)} files, {seconds:.1f} s"
            print(safe(f"{report.path.name}: {verdict} ({size})"))
            _print_problems([report])
    if args.json:
        print_json(rows)
    return 0 if all(report.ok for report in reports) else 1


def _reports(target: str, *, full: bool = True, every: bool = False) -> Iterator[tuple[Report, float]]:
    """The report of each checkpoint that the text stands for, newest first, and the seconds it took; see `verify`.

    Each is read under its lease. A living run goes on saving: what it has removed since the names were listed is told on
    stderr and left out.

    Raises:
        UserError: nothing there (exit code 2).
    """
    from ..checkpoint.commit import leased, verify
    from ..checkpoint.keep import GoneError

    found = 0
    for path in _targets(target):
        begin = time.monotonic()
        try:
            with leased(path):
                report = verify(path, full, every=every)
        except GoneError:
            print(safe(f"{path.name} is left out: its run has removed it meanwhile"), file=sys.stderr)
            continue
        found += 1
        yield report, time.monotonic() - begin
    if not found:
        raise UserError(f"{target}: its run has removed it meanwhile; ask again, or for the newest one")


def _print_problems(reports: list[Report]) -> None:
    for report in reports:
        for problem in report.problems:
            print(safe(f"  {report.path.name}: {problem}"))
        for stray in report.strays:
            print(safe(f"  {report.path.name}: {stray} is not part of the checkpoint (ignored)"))


def _row(report: Report, quick: bool) -> dict[str, Any]:
    from ..checkpoint.commit import pointer

    flags = report.manifest.get("flags")
    return {
        "name": report.path.name,
        "step": report.step,
        "bytes": report.bytes,
        "verified": None if quick and report.ok else report.ok,
        "best": pointer(report.path.parent, "best") == report.path.name,
        "suspect": bool(isinstance(flags, dict) and flags.get("suspect")),
        "created": report.manifest.get("created"),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    created = row["created"]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created)) if isinstance(created, int | float) else "-"
    verified = {True: "yes", False: "NO", None: "-"}[row["verified"]]
    step = "-" if row["step"] is None else str(row["step"])
    return [row["name"], step, f"{row['bytes']:,}", verified, _yes(row["best"]), _yes(row["suspect"]), when]


def _yes(value: bool) -> str:
    return "yes" if value else ""


def _targets(text: str) -> list[Path]:
    """Checkpoint folders that the text stands for: one, or all of a run (emergency saves too) or folder, newest first.

    Raises:
        UserError: nothing there (exit code 2).
        CheckpointError: the run's folder of them is a link (exit code 65).
    """
    from ..checkpoint.files import CheckpointError, require_unlinked
    from ..checkpoint.keep import EMERGENCY, committed_paths, is_run
    from ..checkpoint.resolve import resolve_checkpoint
    from ..checkpoint.verify import MANIFEST, step_of
    from ..run.directory import runs_root

    path = Path(text).expanduser()
    if not path.is_dir() and os.sep not in text and "@" not in text:
        path = runs_root() / text
    if path.is_dir() and step_of(path.name) is None and not (path / MANIFEST).is_file():
        folder = path / "checkpoints" if is_run(path) else path
        if folder.name == "checkpoints":
            require_unlinked(folder, folder.with_name(EMERGENCY))
        paths = committed_paths(folder.resolve())
        if not paths:
            raise UserError(f"{text}: no committed checkpoint in {folder}")
        return paths
    try:
        return [resolve_checkpoint(text, runs_root())]
    except CheckpointError as error:
        raise UserError(str(error)) from error
