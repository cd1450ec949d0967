"""What the verbs share: configuration arguments, JSON and table output, and errors as one line with an exit code."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config.loading import Loaded


class UserError(Exception):
    """Something the user can mend. Printed as one line; `code` becomes the exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def report(error: Exception) -> int:
    """Print an error for a person on stderr and return the exit code.

    Errors of the product carry `exit_code` or are known here by name; anything else is a defect and shows where it came from
    only with LUMINA_DEBUG set.
    """
    code = getattr(error, "code", None) if isinstance(error, UserError) else getattr(error, "exit_code", None)
    known = isinstance(code, int)
    if not known:
        code = {"ConfigError": 2, "DataError": 65, "CheckpointError": 65, "TokenizerError": 2}.get(type(error).__name__)
        known = code is not None
    if not known and isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        print(safe(f"lumina-engine: {where}{error.strerror or error}"), file=sys.stderr)
        return 1
    text = str(error) if known else f"unexpected {type(error).__name__}: {error} (set LUMINA_DEBUG=1 for the place)"
    print(safe("lumina-engine: " + text), file=sys.stderr)
    if os.environ.get("LUMINA_DEBUG"):
        traceback.print_exception(error, file=sys.stderr)
    return code if isinstance(code, int) else 1


def safe(text: str) -> str:
    """Outside text made safe for a terminal."""
    from ..text import safe_text

    return safe_text(text)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`[--preset NAME] [--config FILE] [key=value …]`; later ones win: default < preset < file < key=value."""
    parser.add_argument("--preset", metavar="NAME", help="start from a preset (`lumina-engine presets list`)")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the keys to change")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="single keys, e.g. learning_rate=3e-4")


def load_config(args: argparse.Namespace, default_preset: str | None = None) -> Loaded:
    """The merged Config with the origin of each value.

    Raises:
        ConfigError: unknown keys, wrong values, unreadable file; all at once.
    """
    from ..config.loading import merge

    preset = args.preset
    if preset is None and args.config is None:
        preset = default_preset
    return merge(preset, Path(args.config) if args.config else None, list(args.overrides))


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else there")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def print_json(value: Any, *, lines: bool = False) -> None:
    """JSON on stdout: one indented document, or with `lines` one object on one line. Non-finite numbers become strings."""
    print(json_text(value, lines=lines), flush=lines)


def json_text(value: Any, *, lines: bool = False) -> str:
    """JSON as `print_json` prints it."""
    return json.dumps(_plain(value), ensure_ascii=True, indent=None if lines else 2, allow_nan=False)


def table(rows: Iterable[Sequence[object]], columns: Sequence[str], right: Iterable[int] = ()) -> str:
    """Aligned columns, two spaces apart, with a header; `right` names the columns that are right-aligned."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    aligned = set(right)

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if i in aligned else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return "\n".join(line(row) for row in [list(columns), *cells])
