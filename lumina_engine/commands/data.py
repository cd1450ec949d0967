"""`lumina-engine data`: convert, validate, preview, prepare, sample."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .common import UserError, add_config_arguments, add_json, load_config, print_json, safe, table

if TYPE_CHECKING:
    from ..data.inspection import PreviewRow

HELP = "convert, check, preview and prepare training data"
_SHOWN_PROBLEMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help, allow_abbrev=False)

    convert = add("convert", "any known layout to conversation JSON Lines")
    convert.add_argument("inputs", nargs="+", metavar="IN", help="files, folders or globs")
    convert.add_argument("out", metavar="OUT", help="the file to write")
    _add_format(convert)
    convert.add_argument("--strict", action="store_true", help="a record that would be dropped or cut is an error")
    add_json(convert)

    validate = add("validate", "check files; lists every problem with file and line (exit code 1 if there is one)")
    validate.add_argument("paths", nargs="+", metavar="PATH", help="files, folders or globs")
    _add_format(validate)
    validate.add_argument("--tokenizer", metavar="NAME", help="count tokens with this tokenizer too")
    add_json(validate)

    preview = add("preview", "rows as training sees them: trained, context and padding tokens marked")
    preview.add_argument("path", nargs="?", metavar="PATH", help="file, folder or glob (default: the configured data)")
    add_config_arguments(preview)
    preview.add_argument("--tokenizer", metavar="NAME", help="the same as tokenizer=NAME")
    preview.add_argument("--rows", type=int, default=2, metavar="N", help="rows to show (default 2)")
    preview.add_argument("--sample", type=int, default=500, metavar="N", help="conversations to pack, 0 = all (default 500)")
    add_json(preview)

    prepare = add("prepare", "tokenise the configured data into the token store now")
    add_config_arguments(prepare)
    add_json(prepare)

    sample = add("sample", "write the built-in corpus")
    sample.add_argument("out", nargs="?", metavar="OUT", help="file to write (default: standard output)")
    sample.add_argument("--split", choices=("train", "eval"), default="train")
    sample.add_argument("--skills", metavar="LIST", help="only these skills, separated by commas")
    add_json(sample)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", metavar="NAME", default="auto", help="auto (by content), messages, alpaca, sharegpt or text"
    )


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "convert": _convert,
        "validate": _validate,
        "preview": _preview,
        "prepare": _prepare,
        "sample": _sample,
    }
    return actions[args.action](args)


def _convert(args: argparse.Namespace) -> int:
    from ..data.formats import convert

    meter = _Meter("conversations read")
    result = convert(args.inputs, args.out, args.format, strict=args.strict, progress=meter.show)
    meter.end()
    if args.json:
        print_json(result.to_dict())
        return 0
    print(safe(f"{result.written:,} of {result.read:,} conversations written to {args.out}"))
    for verb, reasons in (("dropped", result.dropped), ("changed", result.changed)):
        for reason, count in sorted(reasons.items()):
            print(f"  {count:,} {verb}: {reason}")
    return 0


def _validate(args: argparse.Namespace) -> int:
    from ..data.inspection import check_files

    tokenizer = None
    if args.tokenizer:
        from ..data.tokenizer import ConversationTokenizer

        tokenizer = ConversationTokenizer(args.tokenizer)
    check = check_files(args.paths, args.format, tokenizer)
    total = check.counts.total()
    if args.json:
        print_json(check.to_dict())
        return 1 if total else 0
    rows = [(safe(entry["path"]), entry["format"] or "?", f"{entry['conversations']:,}") for entry in check.files]
    print(table(rows, ("file", "format", "conversations"), right=(2,)))
    roles = ", ".join(f"{count:,} {role}" for role, count in sorted(check.messages.items()))
    print(f"{check.conversations:,} conversations" + (f": {roles}" if roles else ""))
    if check.tokens is not None:
        print(f"{check.tokens:,} tokens, {check.trained_tokens:,} trained, longest conversation {check.longest:,}")
    for problem in check.problems[:_SHOWN_PROBLEMS]:
        print(safe(str(problem)))
    if total > _SHOWN_PROBLEMS:
        print(f"… and {total - _SHOWN_PROBLEMS:,} more")
    for reason, count in check.counts.most_common():
        print(f"  {count:,} × {safe(reason)}")
    print("no problems" if not total else f"{total:,} problems")
    return 1 if total else 0


def _preview(args: argparse.Namespace) -> int:
    if args.path is not None and "=" in args.path:  # a key=value where the optional path could stand
        args.overrides.insert(0, args.path)
        args.path = None
    if args.tokenizer:
        args.overrides.append(f"tokenizer={args.tokenizer}")
    config = load_config(args, default_preset="debug").config
    from ..data.inspection import preview_rows
    from ..data.layouts import Tally
    from ..data.rows import RowOptions
    from ..data.store import file_source, sample_source
    from ..data.tokenizer import ConversationTokenizer

    path = args.path if args.path is not None else config.train_data_path
    source = sample_source("train") if path is None else file_source(path, config, "PATH")
    tokenizer = ConversationTokenizer(config.tokenizer)
    options = RowOptions.from_config(config)
    rows = list(preview_rows(source.read(Tally()), tokenizer, options, max(1, args.rows), max(0, args.sample)))
    if args.json:
        print_json({"source": source.label, "tokenizer": tokenizer.name, "rows": [_row_json(row) for row in rows]})
        return 0
    print(safe(f"{source.label}, tokenizer {tokenizer.name}, seq_length {options.seq_length:,}, packing {options.packing}"))
    for number, row in enumerate(rows):
        _print_row(number, row)
    return 0


def _row_json(row: PreviewRow) -> dict[str, Any]:
    pieces = [
        {"kind": p.kind, "document": p.document, "tokens": p.tokens, "text": p.text, "ends_turn": p.ends_turn}
        for p in row.pieces
    ]
    return {"documents": row.documents, "tokens": row.tokens, "trained": row.trained, "padding": row.padding, "pieces": pieces}


def _print_row(number: int, row: PreviewRow) -> None:
    print(f"\nrow {number}: {row.documents} documents, {row.tokens:,} tokens, {row.trained:,} trained, {row.padding:,} padding")
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


def _prepare(args: argparse.Namespace) -> int:
    config = load_config(args, default_preset="debug").config
    from ..data.store import open_data
    from ..data.tokenizer import ConversationTokenizer

    tokenizer = ConversationTokenizer(config.tokenizer)
    meter = _Meter("conversations tokenised")
    started = time.monotonic()
    data = open_data(config, tokenizer, progress=meter.show)
    seconds = time.monotonic() - started
    meter.end()
    parts = {name: store for name, store in (("train", data.train), ("eval", data.eval)) if store is not None}
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
    import json

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
    written = sample.write_sample(args.out, args.split, skills)
    if args.json:
        print_json({"path": args.out, "split": args.split, "written": written})
    else:
        print(safe(f"{written:,} conversations ({args.split}) written to {args.out}"))
    return 0


class _Meter:
    """A progress line on standard error, where that is a terminal."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.shown = 0.0
        self.live = sys.stderr.isatty()

    def show(self, count: int, tokens: int | None = None) -> None:
        """Show `count` (and tokens) unless it was shown less than 0.2 s ago."""
        if self.live and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            extra = f", {tokens / 1e6:.1f}M tokens" if tokens is not None else ""
            print(f"\r{count:,} {self.what}{extra}\x1b[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line."""
        if self.live and self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
