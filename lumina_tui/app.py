"""`lumina`: the command line of the full-screen program. Textual is imported only when a screen can be shown."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from .colours import color_system

if TYPE_CHECKING:
    from .application import LuminaApp, Start
    from .terminal import Glyphs

__all__ = ["LuminaApp", "main"]


def __getattr__(name: str) -> object:
    if name == "LuminaApp":
        from .application import LuminaApp

        return LuminaApp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parser() -> argparse.ArgumentParser:
    """The command line of `lumina`."""
    cli = argparse.ArgumentParser(
        prog="lumina",
        description="Train mixture-of-experts language models and talk to them, in the terminal.",
        epilog="Without a terminal use lumina-engine.",
    )
    cli.add_argument("subject", nargs="?", metavar="RUN | FILE.yaml | CHECKPOINT", help="open its Monitor, Config or Chat")
    cli.add_argument("--start", metavar="PRESET", help="start a run from a preset and watch it")
    cli.add_argument("--readonly", action="store_true", help="change nothing: no commands to runs, no files written")
    cli.add_argument("--runs", metavar="DIR", help="folder of the runs (default: $LUMINA_RUNS, else ./runs)")
    cli.add_argument("--fps", type=float, metavar="N", help="panel repaints a second, 0.2-10 (default 4 over SSH, else 10)")
    cli.add_argument("--slow", action="store_true", help="for slow lines: one repaint a second")
    cli.add_argument("--ascii", action="store_true", help="only ASCII characters")
    cli.add_argument("--no-mouse", action="store_true", help="leave the mouse to the terminal")
    cli.add_argument("--print-keys", action="store_true", help="print all keys and leave")
    return cli


def start_from(subject: str | None, preset: str | None, runs_root: Path) -> Start | str:
    """What to open for the command line's subject, or one line that says what is wrong with it."""
    from .application import Start

    if preset is not None:
        return Start(preset=preset) if subject is None else "lumina: --start and a subject exclude each other; leave one out"
    if subject is None:
        return Start(resume=True)
    path = Path(subject)
    if subject.endswith((".yaml", ".yml")):
        return (
            Start(config=path)
            if path.is_file()
            else f"lumina: {subject}: no such file; lumina-engine presets list names presets"
        )
    run = path if (path / "run.json").exists() else runs_root / subject
    if (run / "run.json").exists():
        return Start(run=run)
    if "@" in subject or (path / "MANIFEST.json").exists():
        return Start(checkpoint=path)
    import difflib

    try:
        names = sorted(entry.name for entry in runs_root.iterdir() if entry.is_dir())
    except OSError:
        names = []
    near = difflib.get_close_matches(subject, names, 1)
    hint = f"did you mean {near[0]}?" if near else "lumina-engine runs list shows what there is"
    return f"lumina: {subject}: no run in {runs_root}, no file, no checkpoint; {hint}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `lumina` command. Returns the exit code."""
    args = parser().parse_args(argv)
    if args.print_keys:
        return print_keys()
    os.environ.setdefault("TEXTUAL_FPS", "15" if args.slow else "30")  # read when textual is imported
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    os.environ.setdefault("TEXTUAL_COLOR_SYSTEM", color_system(os.environ))
    for name in ("COLUMNS", "LINES"):  # textual would believe them, and never see the terminal change its size
        os.environ.pop(name, None)
    streams = {"input": sys.stdin, "output": sys.stdout, "error output (the screen is drawn there)": sys.stderr}
    elsewhere = [name for name, stream in streams.items() if not stream.isatty()]
    if elsewhere or os.environ.get("TERM", "") in ("dumb", ""):
        why = f"{elsewhere[0]} is no terminal" if elsewhere else "TERM=dumb"
        print(
            f"lumina: {why}, no full screen; use lumina-engine (runs list, runs tail RUN, train --preset debug)",
            file=sys.stderr,
        )
        return 2
    runs_root = Path(args.runs or os.environ.get("LUMINA_RUNS") or "runs")
    from lumina_engine.text import safe_text

    from .application import LuminaApp
    from .places import config_dir
    from .settings import load_settings
    from .terminal import detect

    start = start_from(args.subject, args.start, runs_root)
    if isinstance(start, str):
        print(safe_text(start), file=sys.stderr)
        return 2
    settings, problems = load_settings(config_dir() / "settings.yaml")
    hz = args.fps if args.fps is not None else None if args.slow else settings.hz
    glyphs = None if settings.glyphs == "auto" else cast("Glyphs", settings.glyphs)
    look = detect(os.environ, ascii_only=args.ascii, slow=args.slow, hz=hz, glyphs=glyphs)
    app = LuminaApp(runs_root, look=look, readonly=args.readonly, start=start, settings=settings)
    app.problems += problems
    app.run(mouse=settings.mouse and not args.no_mouse)
    if not app.return_code:
        for text in farewell(runs_root, args.runs):
            print(safe_text(text))
    return app.return_code or 0


def print_keys() -> int:
    """Print the keys in force, and on stderr what is wrong with the user's own; 1 if something is."""
    from .keymap import load_keymap
    from .places import config_dir

    keymap = load_keymap(config_dir() / "keys.yaml")
    for name, keys, title, help_ in keymap.table():
        print(f"{name:<24} {keys:<18} {'own' if name in keymap.own else '':<4} {title:<18} {help_}")
    for problem in keymap.problems:
        print(f"lumina: {problem}", file=sys.stderr)
    return 1 if keymap.problems else 0


def farewell(runs_root: Path, given: str | None) -> list[str]:
    """Which runs go on, and how to return to them."""
    from .runs import RunList

    try:
        runs = RunList(runs_root)
        living = [row.name for row in runs.refresh() if row.alive]
        rows = [row for row in runs.refresh(living) if row.alive]
    except OSError:
        return []
    where = f" --runs {given}" if given else ""
    lines = [
        f"{row.name} goes on (step {row.step:,}{f' of {row.total_steps:,}' if row.total_steps else ''})"
        if row.step is not None
        else f"{row.name} goes on"
        for row in rows
    ]
    return [*lines, f"return with: lumina{where} {rows[0].name if len(rows) == 1 else ''}".rstrip()] if rows else []


if __name__ == "__main__":
    sys.exit(main())
