"""Writing a configuration: ask where, never overwrite by accident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..form import Form
from .dialogs import Choice

if TYPE_CHECKING:
    from ..application import LuminaApp

FOLDER = Path("configs")


def ask_and_write(app: LuminaApp, form: Form, known: float | None, done: Callable[[Path], None]) -> None:
    """Ask for a path and write there. `known` is when the form's own file was last changed, as the form knows it."""
    suggestion = form.path or FOLDER / f"my_{form.preset or 'config'}.yaml"

    def given(text: str) -> None:
        path = Path(text.strip()).expanduser()
        try:
            changed: float | None = path.stat().st_mtime
        except OSError:
            changed = None
        if changed is None or (path == form.path and changed == known):
            write(path)
        else:
            why = "it was changed on disk since it was read" if path == form.path else "it exists"
            app.ask(
                f"Overwrite {path.name}?", [Choice("w", "overwrite it", "write")], lambda _: write(path), [f"{path}: {why}"]
            )

    def write(path: Path) -> None:
        try:
            form.save(path)
        except OSError as error:
            app.notice(f"{path}: {error.strerror or error}; nothing was written", "error")
            return
        errors = sum(f.severity == "error" for f in form.findings())
        app.notice(f"written to {path}" + (f", with {errors} errors: it cannot be launched yet" if errors else ""))
        done(path)

    app.prompt("Write configuration", given, value=str(suggestion), check=_wrong)


def _wrong(text: str) -> str | None:
    path = Path(text.strip()).expanduser()
    if not text.strip():
        return "name a file"
    if path.suffix not in (".yaml", ".yml"):
        return "the name must end in .yaml"
    if "\0" in text:
        return "the name holds a NUL"
    return f"{path} is a folder" if path.is_dir() else None
