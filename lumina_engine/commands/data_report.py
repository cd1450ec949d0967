"""`lumina-engine data report`: what a data set is worth, as a page or as figures, and its conversations sorted by it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import UserError, print_json, safe, table
from .data_parts import (
    Meter,
    add_force,
    add_format,
    add_progress,
    at_least,
    languages,
    require_different,
    require_new,
    token_lines,
)

if TYPE_CHECKING:
    from ..data.check import Judged, Lost, Sofar
    from ..data.conversation import DataError, Document

_SHOWN_PROBLEMS = 5

HELP = "lengths, repeats, overlap, quality by rule, flags: one HTML page or JSON file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files, folders or globs (default: the built-in corpus)")
    parser.add_argument("--out", metavar="FILE", default="data-report.html", help=".html or .json (default data-report.html)")
    add_format(parser)
    parser.add_argument("--tokenizer", metavar="NAME", default="gpt-4", help="count tokens with this tokenizer (default gpt-4)")
    parser.add_argument("--sample", type=int, metavar="N", help="judge N conversations, 0 = all (default 10000)")
    parser.add_argument("--seq-length", type=int, metavar="S", help="row length for what is cut and padded (default 8192)")
    parser.add_argument("--languages", metavar="LIST", help="wanted languages of the answers, such as en,de")
    parser.add_argument("--against", action="append", metavar="EVAL", help="evaluation data to look for the same ones in")
    parser.add_argument("--filter", nargs=2, metavar=("KEPT", "DROPPED"), help="write what passes and what fails (judges all)")
    parser.add_argument("--texts", action="store_true", help="quote the worst conversations, not only their places")
    add_force(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    from ..data.files import unread_note
    from ..data.report import SAMPLE, summary, write_report
    from ..data.tokenizer import ConversationTokenizer

    at_least(args, sample=0, seq_length=1)
    wanted = languages(args.languages)
    if args.filter and args.sample:
        raise UserError("--filter judges every conversation: leave --sample out")
    _require_targets(args)
    sample = 0 if args.filter else SAMPLE if args.sample is None else args.sample
    meter = Meter("conversations checked", args.progress)

    def told(sofar: Sofar) -> None:
        meter.show(sofar.conversations, sofar.tokens, problems=sofar.problems, bytes=sofar.bytes, total_bytes=sofar.total_bytes)

    with _filtered(args.filter) as (judged, lost):
        found = summary(
            args.paths or None,
            ConversationTokenizer(args.tokenizer),
            format=args.format,
            sample=sample,
            seq_length=args.seq_length,
            languages=wanted,
            against=args.against,
            texts=args.texts,
            judged=judged,
            lost=lost,
            progress=told,
        )
        _require_some(found)
    meter.end()
    out = write_report(found, args.out)
    if args.json:
        print_json({**found, "not_read": unread_note(args.paths)})
        return 0
    _print_quality(found)
    for line in unread_note(args.paths):
        print(safe(line))
    print(safe(f"report: {out}"))
    return 0


def _require_targets(args: argparse.Namespace) -> None:
    """Refuse a suffix that no report has, two outputs in one file, and to write over what is read or what is no report.

    Raises `UserError`, `DataError`.
    """
    from ..data.files import expand
    from ..data.report import is_report, require_suffix

    require_suffix(args.out)
    require_different([args.out, *(args.filter or [])])
    targets = [*(args.filter or []), *([] if is_report(args.out) else [args.out])]
    require_new(targets, args.force)
    read = [*(expand(args.paths) if args.paths else []), *(expand(args.against, "--against") if args.against else [])]
    inputs = [path for path in read if isinstance(path, Path)]  # no URL is a file here
    inputs += [path for path in [Path(args.tokenizer)] if path.is_file()]  # or a name
    for target in map(Path, [*(args.filter or []), args.out]):
        if target.exists() and any(target.samefile(path) for path in inputs):
            raise UserError(f"{target} is one of the inputs: name another file")


def _require_some(found: dict[str, Any]) -> None:
    """Raises `DataError` with the first problem where not one conversation could be read: there is nothing to report on."""
    if found["total_conversations"] or not found["problems"]:
        return
    from ..data.conversation import DataError

    first = {key: found["problems"][0][key] for key in ("message", "path", "line", "fix", "reason")}
    raise DataError(**first)


def _print_quality(found: dict[str, Any]) -> None:
    quality = found["quality"]
    score = "-" if quality["score"] is None else f"{100 * quality['score']:.1f} %"
    bounds = "" if quality["score"] is None else f" (95 %: {100 * quality['low']:.1f} to {100 * quality['high']:.1f})"
    print(f"quality {score}{bounds} of the tokens of {quality['conversations']:,} conversations judged")
    rows = [
        (name, f"{rule['conversations']:,}", safe(f"{rule['places'][0]['path']}:{rule['places'][0]['line']}"))
        for kind in ("rules", "flags")
        for name, rule in quality[kind].items()
        if rule["conversations"]
    ]
    if rows:
        print(table(rows, ("rule or flag", "conversations", "the first"), right=(1,)))
    for line in token_lines(found):
        print(line)
    problems = sum(found["problem_counts"].values())
    print(f"{problems:,} record{'s' * (problems > 1)} with a problem" if problems else "no record with a problem")
    for problem in found["problems"][:_SHOWN_PROBLEMS]:
        place = problem["path"] if problem["line"] is None else f"{problem['path']}:{problem['line']}"
        print(safe(f"  {place}: {problem['message']}; {problem['fix']}"))
    if problems > _SHOWN_PROBLEMS:
        print(f"  … and {problems - _SHOWN_PROBLEMS:,} more")


@contextmanager
def _filtered(targets: list[str] | None) -> Iterator[tuple[Judged | None, Lost | None]]:
    """Where judged conversations go, and what is none: two files that appear whole when all is judged, or nowhere."""
    if targets is None:
        yield None, None
        return
    places = [Path(target) for target in targets]
    stagings = [place.with_name(f".{place.name}.{os.getpid()}.tmp") for place in places]
    try:
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
        with (
            stagings[0].open("w", encoding="utf-8") as kept,
            # "backslashreplace": a file name that is not UTF-8 stands there as JSON escapes
            stagings[1].open("w", encoding="utf-8", errors="backslashreplace") as dropped,
        ):

            def judged(document: Document, broken: list[str]) -> None:
                record = document.to_record()
                if broken:
                    record["rules"] = broken
                (dropped if broken else kept).write(json.dumps(record, ensure_ascii=False) + "\n")

            def lost(error: DataError) -> None:
                record = {"path": error.path, "line": error.line, "message": error.message, "rules": [error.reason]}
                dropped.write(json.dumps(record, ensure_ascii=False) + "\n")

            yield judged, lost
        for staging, place in zip(stagings, places, strict=True):
            staging.replace(place)
    except OSError as error:
        where = " and ".join(targets)
        raise UserError(
            f"--filter: {where}: cannot be written ({error.strerror or error}); check the folder and the free space"
        ) from None
    finally:
        for staging in stagings:
            with suppress(OSError):  # it was never made
                staging.unlink()
