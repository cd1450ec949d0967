"""Writing a configuration: ask where, never overwrite by accident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..form import Form, stamp_of
from ..own_presets import own_presets, wrong_name
from .dialogs import Choice

if TYPE_CHECKING:
    from ..application import LuminaApp

FOLDER = Path("configs")


def ask_and_write(app: LuminaApp, form: Form, done: Callable[[Path], None]) -> None:
    """Ask for a path and write there."""
    suggestion = form.path or FOLDER / f"my_{form.preset or 'config'}.yaml"
    app.prompt(
        "Write configuration",
        lambda text: _write_there(app, form, Path(text.strip()).expanduser(), done),
        value=str(suggestion),
        check=_wrong,
    )


def ask_and_save_preset(app: LuminaApp, form: Form, done: Callable[[Path], None]) -> None:
    """Ask for a name and write an own preset."""
    folder = own_presets()
    known = form.path.stem if form.path is not None and form.path.parent == folder else f"my_{form.preset or 'preset'}"
    app.prompt(
        "Save as preset",
        lambda text: _write_there(app, form, folder / f"{text.strip()}.yaml", done),
        value=known,
        lines=["It is listed under yours in 2 Presets, and lies in", str(folder)],
        check=wrong_name,
    )


def _write_there(app: LuminaApp, form: Form, path: Path, done: Callable[[Path], None]) -> None:
    now, known = stamp_of(path), form.content.document
    if now is None or (path == known.path and now == known.stamp):
        _write(app, form, path, done)
        return
    why = "it was changed on disk since it was read" if path == known.path else "it exists"
    choices = [Choice("w", "overwrite it", "write")]
    app.ask(f"Overwrite {path.name}?", choices, lambda _: _write(app, form, path, done), [f"{path}: {why}"])


def _write(app: LuminaApp, form: Form, path: Path, done: Callable[[Path], None]) -> None:
    try:
        form.save(path)
    except OSError as error:
        app.notice(f"{path}: {error.strerror or error}; nothing was written", "error")
        return
    errors = sum(f.severity == "error" for f in form.findings())
    flag = f", with {errors} error{'s' if errors > 1 else ''}: it cannot be launched yet" if errors else ""
    app.notice(f"written to {path}{flag}", "warning" if errors else "information")
    done(path)


def _wrong(text: str) -> str | None:
    path = Path(text.strip()).expanduser()
    if not text.strip():
        return "name a file"
    if path.suffix not in (".yaml", ".yml"):
        return "the name must end in .yaml"
    if "\0" in text:
        return "the name holds a NUL"
    return f"{path} is a folder" if path.is_dir() else None
