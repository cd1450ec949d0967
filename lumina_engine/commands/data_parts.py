"""Options and the progress line that the `data` commands share."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from ..data.remote import is_remote
from .common import UserError, add_json


def add_progress(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("--progress", choices=("json",), help="figures so far as JSON lines on standard error, 5 a second")


def add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", metavar="NAME", default="auto", help="auto (by content), messages, oasst, alpaca, sharegpt or text"
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def require_new(paths: Iterable[str | Path], force: bool) -> None:
    """Refuse to write to a URL or a folder, or over a file that exists unless `force`."""
    for given in paths:
        if is_remote(str(given)):
            raise UserError(f"{given} is a URL, and files are written here only: name a local file")
        path = Path(given)
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file")
        if path.exists() and not force:
            raise UserError(f"{path} exists: name another file, or add --force to replace it")


def require_different(paths: Iterable[str | Path]) -> None:
    """Refuse outputs of which one would replace another: the same file by any spelling."""
    for one, other in combinations(map(Path, paths), 2):
        if one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other)):
            raise UserError(f"{one} and {other} are one file: name two")


def token_lines(figures: Mapping[str, Any]) -> list[str]:
    """Tokens, the share that is trained, what rows cut off, and their padding, from the figures of a check or report."""
    if "tokens" not in figures:
        return []
    measured = figures["tokens_basis"] == "measured"
    basis = figures["tokens_basis"] if measured else f"guessed from {figures['sampled_conversations']:,}"
    lines = [
        f"{figures['tokens']:,} tokens ({basis}), {figures['trained_tokens']:,} trained "
        f"({100 * figures['trained_share']:.1f} %), longest conversation {figures['longest']:,}"
    ]
    cut, packing = figures["cut"], figures["packing"]
    if cut is not None:
        how = ", ".join(f"{kind} in {count:,}" for kind, count in sorted(cut["how"].items()))
        what = f"{cut['lost_tokens']:,} tokens cut off ({how})" if cut["conversations"] else "nothing is cut off"
        lines.append(f"{cut['conversations']:,} longer than {cut['seq_length']:,}: {what}")
        lines.append(f"rows of {cut['seq_length']:,}: {packing['rows']:,}, {100 * packing['padding_share']:.1f} % padding")
    return lines


def counted(number: int, what: str) -> str:
    """A number of things: "1 problem", "2 problems"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def words(text: str | None) -> list[str]:
    """The words of a list separated by commas."""
    return [word for word in (part.strip() for part in (text or "").split(",")) if word]


def languages(text: str | None) -> list[str]:
    """The codes of a list of languages, in small letters. Raises `UserError` for a word that is no code."""
    found = [word.lower() for word in words(text)]
    for word in found:
        if not re.fullmatch(r"[a-z]{2,3}", word):
            raise UserError(f"--languages {word}: give codes of two or three letters, such as en,de")
    return found


def at_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse options below their least value."""
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} {given}: give at least {value}")


class Meter:
    """What was done so far, at most five times a second on standard error: a line for a person where that is a terminal, or
    with `form` "json" one JSON object a line: `progress` (what is counted), `conversations`, `tokens`, and further figures."""

    def __init__(self, what: str, form: str | None) -> None:
        self.what, self.form = what, form
        self.shown = 0.0
        self.live = sys.stderr.isatty()

    def show(self, count: int, tokens: int | None = None, **more: int) -> None:
        """Show `count` (and tokens) unless something was shown less than 0.2 s ago."""
        if not (self.live or self.form) or time.monotonic() - self.shown < 0.2:
            return
        self.shown = time.monotonic()
        if self.form == "json":
            line = {"progress": self.what, "conversations": count, "tokens": tokens, **more}
            print(json.dumps(line), file=sys.stderr, flush=True)
            return
        extra = f", {tokens / 1e6:.1f}M tokens" if tokens is not None else ""
        print(f"\r{count:,} {self.what}{extra}\x1b[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line for a person."""
        if self.live and self.shown and self.form is None:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
