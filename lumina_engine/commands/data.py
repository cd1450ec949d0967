"""`lumina-engine data`: convert, validate, report, preview, prepare, sample."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from . import data_report
from .common import UserError, add_config_arguments, add_json, load_config, print_json, safe, table
from .data_parts import (
    Meter,
    add_force,
    add_format,
    add_progress,
    at_least,
    counted,
    languages,
    require_different,
    require_new,
    token_lines,
    words,
)

if TYPE_CHECKING:
    from ..config.schema import Config
    from ..data.ahead import Ahead
    from ..data.check import Check, Sofar
    from ..data.inspection import PreviewRow
    from ..data.oasst import OasstOptions

HELP = "convert, check, preview and prepare training data"
_SHOWN_PROBLEMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help, allow_abbrev=False)

    convert = add("convert", "any known layout to conversation JSON Lines")
    convert.add_argument("inputs", nargs="+", metavar="IN", help="files, folders or globs")
    convert.add_argument("out", metavar="OUT", help="the file to write")
    add_force(convert)
    add_format(convert)
    convert.add_argument("--strict", action="store_true", help="a record that would be dropped or cut is an error")
    text = "a line for each dropped record (default OUT.rejects.jsonl); --force removes an earlier one where none is dropped"
    convert.add_argument("--rejects", metavar="FILE", help=text)
    _add_tree_options(convert.add_argument_group("message trees (oasst)"))
    add_progress(convert)

    validate = add("validate", "check files; lists every problem with file and line (exit code 1 if there is one)")
    validate.add_argument("paths", nargs="*", metavar="PATH", help="files, folders or globs (default: the built-in corpus)")
    add_format(validate)
    validate.add_argument("--tokenizer", metavar="NAME", help="count tokens with this tokenizer too")
    validate.add_argument("--sample", type=int, default=0, metavar="N", help="tokenise N conversations, 0 = all (default)")
    validate.add_argument("--seq-length", type=int, metavar="S", help="count what rows of S tokens would cut off")
    validate.add_argument("--against", action="append", metavar="EVAL", help="evaluation data to look for the same ones in")
    add_progress(validate)

    data_report.add_arguments(add("report", data_report.HELP))

    preview = add("preview", "rows as training sees them: trained, context and padding tokens marked")
    text = "file, folder or glob (default: the configured data; with multi_task rows of each task)"
    preview.add_argument("path", nargs="?", metavar="PATH", help=text)
    add_config_arguments(preview)
    preview.add_argument("--tokenizer", metavar="NAME", help="the same as tokenizer=NAME")
    preview.add_argument("--rows", type=int, default=2, metavar="N", help="rows to show, of each task (default 2)")
    preview.add_argument("--first", type=int, default=0, metavar="N", help="begin with row N (default 0)")
    text = "conversations to pack, of each task, 0 = all (default 500)"
    preview.add_argument("--sample", type=int, default=500, metavar="N", help=text)
    add_progress(preview)

    prepare = add("prepare", "tokenise the configured data into the token store now")
    add_config_arguments(prepare)
    text = "processes that tokenise (default: one a processor, for ray of the whole cluster)"
    prepare.add_argument("--workers", type=int, metavar="N", help=text)
    text = "local processes (default), or workers of Ray: the cluster of RAY_ADDRESS, else one started here"
    prepare.add_argument("--engine", choices=("local", "ray"), default="local", help=text)
    add_progress(prepare)

    sample = add("sample", "write the built-in corpus")
    sample.add_argument("out", nargs="?", metavar="OUT", help="file to write (default: standard output)")
    sample.add_argument("--split", choices=("train", "eval"), default="train")
    sample.add_argument("--skills", metavar="LIST", help="only these skills, separated by commas")
    add_force(sample)
    add_json(sample)


def _add_tree_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--paths", choices=("best", "all"), default="best", help="best-ranked path (default) or every path")
    group.add_argument("--languages", "--lang", metavar="LIST", help="only these languages, such as en,de (default: all)")
    group.add_argument("--max-rank", type=int, metavar="N", help="leave out answers ranked behind N (0 is the best)")
    group.add_argument("--deleted", action="store_true", help="use deleted messages too")
    group.add_argument("--rejected", action="store_true", help="use messages that review rejected too")
    group.add_argument("--reviewed", "--reviewed-only", action="store_true", help="use only messages that review accepted")
    group.add_argument("--no-synthetic", action="store_true", help="leave out messages written by a model")
    group.add_argument("--tree-states", metavar="LIST", help="states of trees to read (default ready_for_export)")


def _tree_options(args: argparse.Namespace) -> OasstOptions:
    from ..data.conversation import nearest
    from ..data.oasst import READY, TREE_STATES, OasstOptions

    at_least(args, max_rank=0)
    states = tuple(words(args.tree_states)) or (READY,)
    for state in states:
        if state not in TREE_STATES:
            like = nearest(state, TREE_STATES)
            raise UserError(
                f"--tree-states {state}: " + (f"did you mean {like}?" if like else "one of " + ", ".join(TREE_STATES))
            )
    return OasstOptions(
        paths=args.paths,
        languages=tuple(languages(args.languages)),
        max_rank=args.max_rank,
        deleted=args.deleted,
        rejected=args.rejected,
        reviewed=args.reviewed,
        synthetic=not args.no_synthetic,
        tree_states=states,
    )


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "convert": _convert,
        "validate": _validate,
        "report": data_report.run,
        "preview": _preview,
        "prepare": _prepare,
        "sample": _sample,
    }
    before = signal.signal(signal.SIGTERM, _leave)  # so that what is half written is cleared away
    try:
        return actions[args.action](args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _convert(args: argparse.Namespace) -> int:
    from ..data.files import unread_note
    from ..data.formats import convert, rejects_path

    targets = [args.out, args.rejects or rejects_path(args.out)]
    require_different(targets)
    require_new(targets, args.force)
    meter = Meter("conversations read", args.progress)
    options = _tree_options(args)
    result = convert(
        args.inputs, args.out, args.format, strict=args.strict, oasst=options, rejects=args.rejects, progress=meter.show
    )
    meter.end()
    unread = unread_note(args.inputs)
    if args.json:
        print_json({**result.to_dict(), "not_read": unread})
        return 0
    tally = result.tally
    print(safe(f"{result.written:,} of {tally.read:,} conversations written to {args.out}"))
    if tally.used:
        print(f"{tally.used:,} of {tally.used + tally.left_out.total():,} messages used")
    for verb, reasons in (("dropped", tally.dropped), ("changed", tally.changed), ("messages left out", tally.left_out)):
        for reason, count in sorted(reasons.items()):
            print(safe(f"  {count:,} {verb}: {reason}"))
    if result.rejects:
        print(safe(f"each dropped record, with file and line: {result.rejects}"))
    for line in unread:
        print(safe(line))
    return 0


def _validate(args: argparse.Namespace) -> int:
    from ..data.check import check_files
    from ..data.files import unread_note

    at_least(args, sample=0, seq_length=1)
    tokenizer = None
    if args.tokenizer:
        from ..data.tokenizer import ConversationTokenizer

        tokenizer = ConversationTokenizer(args.tokenizer)
    meter = Meter("conversations checked", args.progress)

    def told(sofar: Sofar) -> None:
        meter.show(sofar.conversations, sofar.tokens, problems=sofar.problems, bytes=sofar.bytes, total_bytes=sofar.total_bytes)

    check = check_files(
        args.paths or None,
        args.format,
        tokenizer,
        sample=args.sample,
        seq_length=args.seq_length,
        against=args.against,
        progress=told,
    )
    meter.end()
    total = check.counts.total()
    unread = unread_note(args.paths)
    if args.json:
        print_json({**check.to_dict(), "not_read": unread})
        return 1 if total else 0
    _print_check(check)
    for line in unread:
        print(safe(line))
    return 1 if total else 0


def _print_check(check: Check) -> None:
    rows = [(safe(entry["path"]), entry["format"] or "?", f"{entry['conversations']:,}") for entry in check.files]
    print(table(rows, ("file", "format", "conversations"), right=(2,)))
    roles = ", ".join(f"{count:,} {role}" for role, count in sorted(check.messages.items()))
    print(counted(check.conversations, "conversation") + (f": {roles}" if roles else ""))
    figures = check.to_dict()
    for line in token_lines(figures):
        print(line)
    for what, repeats in (("repeating an earlier one", check.duplicates), ("also in the evaluation data", check.overlap)):
        if repeats is not None and repeats.conversations:
            first = repeats.examples[0]
            print(safe(f"{counted(repeats.conversations, 'conversation')} {what}, the first: {first.path}:{first.line}"))
    total = check.counts.total()
    for problem in check.problems[:_SHOWN_PROBLEMS]:
        print(safe(str(problem)))
    if total > _SHOWN_PROBLEMS:
        print(f"… and {total - _SHOWN_PROBLEMS:,} more")
    for reason, count in check.counts.most_common():
        print(f"  {count:,} × {safe(reason)}")
    print("no problems" if not total else counted(total, "problem"))


def _preview(args: argparse.Namespace) -> int:
    if args.path is not None and "=" in args.path:  # a key=value where the optional path could stand
        args.overrides.insert(0, args.path)
        args.path = None
    if args.tokenizer:
        args.overrides.append(f"tokenizer={args.tokenizer}")
    at_least(args, rows=1, first=0, sample=0)
    config = load_config(args, default_preset="debug").config
    from ..data.inspection import preview_tasks
    from ..data.rows import RowOptions
    from ..data.tasks import documents_at, train_documents
    from ..data.tokenizer import ConversationTokenizer

    if args.path is None and config.multi_task:
        sources = train_documents(config)
    else:
        given = (args.path, "PATH") if args.path is not None else (config.train_data_path, "train_data_path")
        sources = {"": documents_at(given[0], config.data_format, given[1])}
    tokenizer = ConversationTokenizer(config.tokenizer)
    options = RowOptions.from_config(config)
    meter = Meter("conversations tokenised", args.progress)
    documents = {task: read for task, (_, read) in sources.items()}
    seen = preview_tasks(documents, tokenizer, options, args.rows, args.sample, first=args.first, progress=meter.show)
    meter.end()
    labels = {task: f"task {task}: {label}" if task else label for task, (label, _) in sources.items()}
    if args.json:
        print_json(
            {
                "source": "; ".join(labels.values()),
                "tokenizer": tokenizer.name,
                "seq_length": options.seq_length,
                "packing": options.packing,
                "conversations": sum(found.conversations for found in seen.values()),
                "total_rows": sum(found.total_rows for found in seen.values()),
                "first": args.first,
                "rows": [_row_json(row, task) for task, found in seen.items() for row in found.rows],
            }
        )
        return 0
    for task, found in seen.items():
        print(safe(f"{labels[task]}, tokenizer {tokenizer.name}, seq_length {options.seq_length:,}, packing {options.packing}"))
        for number, row in enumerate(found.rows, found.first):
            _print_row(number, row)
    return 0


def _row_json(row: PreviewRow, task: str) -> dict[str, Any]:
    pieces = [
        {"kind": p.kind, "document": p.document, "tokens": p.tokens, "text": p.text, "ends_turn": p.ends_turn}
        for p in row.pieces
    ]
    told = {"documents": row.documents, "tokens": row.tokens, "trained": row.trained, "padding": row.padding, "pieces": pieces}
    return told | ({"task": task} if task else {})


def _print_row(number: int, row: PreviewRow) -> None:
    what = f"{counted(row.documents, 'document')}, {row.tokens:,} tokens, {row.trained:,} trained, {row.padding:,} padding"
    print(f"\nrow {number}: {what}")
    document = 0
    for piece in row.pieces:
        if piece.kind == "padding":
            print(f"padding | {piece.tokens:,} tokens")
            continue
        if piece.document != document:
            document = piece.document
            print(f"--- document {document}")
        for line in safe(piece.text).split("\n"):
            if line:
                print(f"{piece.kind} | {line}")


def _ahead(config: Config, args: argparse.Namespace) -> Ahead:
    """Processes for a large source that is not prepared yet."""
    from ..data.ahead import Ahead, processors

    found, most = Ahead(), config.streaming_threshold_gb * 1e9
    if args.engine == "local" and not config.multi_task and config.train_data_path is not None:
        found.expect(config.train_data_path, "train_data_path", Path(config.data_cache_dir), args.workers or processors(), most)
    return found


def _prepare(args: argparse.Namespace) -> int:
    at_least(args, workers=1)
    for word in args.overrides:
        if "=" not in word:
            raise UserError(f"{word}: prepare takes keys of the configuration; write train_data_path={word}")
    config = load_config(args, default_preset="debug").config
    with closing(_ahead(config, args)) as ahead:  # before this process imports and loads what it needs itself
        from ..data.mixed import stores_of
        from ..data.store import open_data
        from ..data.tokenizer import ConversationTokenizer

        tokenizer = ConversationTokenizer(config.tokenizer)
        meter = Meter("conversations tokenised", args.progress)
        started = time.monotonic()
        data = open_data(config, tokenizer, progress=meter.show, workers=args.workers, engine=args.engine, ahead=ahead)
    seconds = time.monotonic() - started
    meter.end()
    parts = {
        f"{name} {task}".rstrip(): store
        for name, whole in (("train", data.train), ("eval", data.eval))
        if whole is not None
        for task, store in stores_of(whole).items()
    }
    if args.json:
        stores = {
            name: {
                "path": str(store.path),
                "conversations": len(store),
                "tokens": store.num_tokens,
                "trained_tokens": store.num_trained,
                "fingerprint": store.fingerprint,
            }
            for name, store in parts.items()
        }
        print_json({"stores": stores, "notes": data.notes, "seconds": round(seconds, 3)})
        return 0
    rows = [(n, f"{len(s):,}", f"{s.num_tokens:,}", f"{s.num_trained:,}", safe(str(s.path))) for n, s in parts.items()]
    print(table(rows, ("part", "conversations", "tokens", "trained", "store"), right=(1, 2, 3)))
    for note in data.notes:
        print(safe(note))
    return 0


def _sample(args: argparse.Namespace) -> int:
    import difflib

    from ..data import sample

    skills = [name.strip() for name in args.skills.split(",") if name.strip()] if args.skills else None
    for name in skills or ():
        if name not in sample.SKILLS:
            near = difflib.get_close_matches(name, sample.SKILLS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown skill {name!r}: {hint}skills are {', '.join(sample.SKILLS)}")
    if args.out is None:
        if args.json:
            raise UserError("data sample --json needs OUT: the corpus itself goes to standard output without it")
        for conversation in sample.conversations(args.split, skills):
            sys.stdout.write(json.dumps(conversation.to_record(), ensure_ascii=False) + "\n")
        return 0
    require_new([args.out], args.force)
    try:
        written = sample.write_sample(args.out, args.split, skills)
    except OSError as error:
        raise UserError(
            f"{args.out}: cannot be written ({error.strerror or error}); check the folder and the free space"
        ) from None
    if args.json:
        print_json({"path": args.out, "split": args.split, "written": written})
    else:
        print(safe(f"{written:,} conversations ({args.split}) written to {args.out}"))
    return 0
