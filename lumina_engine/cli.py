"""`lumina-engine`: find the verb, parse its arguments, run it, turn errors into one line and an exit code.

Each verb lives in `commands/<verb>.py` (`HELP`, `add_arguments`, `run`) and imports what it needs only when it runs, so help
and completion cost no torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from importlib import import_module

from . import __version__
from .commands.common import UserError, report

VERBS = (
    "train",
    "serve",
    "chat",
    "data",
    "presets",
    "config",
    "budget",
    "checkpoint",
    "runs",
    "report",
    "track",
    "bench",
    "doctor",
)


class Parser(argparse.ArgumentParser):
    """argparse with the nearest name behind an unknown choice, and `_` accepted for `-` in options."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.print_usage(sys.stderr)
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser. Only the wanted verb's module is asked for its arguments."""
    parser = Parser(prog="lumina-engine", description="Train mixture-of-experts language models, headless.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lumina {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for name in VERBS:
        module = import_module(f".commands.{name}", __package__)
        sub = verbs.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        if name == verb:
            module.add_arguments(sub)
    return parser


def _dashes(argv: list[str]) -> list[str]:
    """Options may be written with `_` or `-`: `--max_history 3` is `--max-history 3`."""
    out: list[str] = []
    for index, word in enumerate(argv):
        if word == "--":
            return out + argv[index:]
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            word = name.replace("_", "-") + sign + value
        out.append(word)
    return out


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (capabilities: 0 done, 1 crashed, 2 usage, 65 refused, 75, 93, 130)."""
    argv = _dashes(list(sys.argv[1:] if argv is None else argv))
    verb = next((word for word in argv if not word.startswith("-")), None)
    try:
        if verb is not None and verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else "verbs: " + ", ".join(VERBS)
            raise UserError(f"unknown verb {verb!r}: {hint}")
        args, rest = _parser(verb).parse_known_args(argv)
        if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
            args.overrides = [*args.overrides, *rest]  # key=value words may stand on both sides of an option
        elif rest:
            raise UserError(f"unrecognized arguments: {' '.join(rest)} (see `lumina-engine {verb} --help`)")
        code = import_module(f".commands.{args.verb}", __package__).run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader of our output (head, less) has left: nothing more can be said, and that is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return report(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
