"""The user's settings: `settings.yaml` in the configuration folder. Every setting is declared once, here.

A row that cannot be taken is reported with its line and left at its default. Flags of the command line win over the file.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .themes import SKINS


@dataclass(frozen=True)
class About:
    """What a setting may be: its help, the words or bounds allowed, and the types YAML may give for it."""

    help: str
    kinds: tuple[type, ...] = (str,)
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


def setting(default: Any, help_: str, *kinds: type, choices: tuple[str, ...] = (), low: float = 0, high: float = 0) -> Any:
    """A field of `Settings` with what it may be; bounds hold if `high` is given."""
    bounds = (low, high) if high else (None, None)
    return field(default=default, metadata={"about": About(help_, kinds or (str,), choices, *bounds)})


@dataclass(frozen=True)
class Settings:
    """The settings in force."""

    theme: str = setting("auto", "colours; a theme chosen in the palette holds until this is changed", choices=("auto", *SKINS))
    glyphs: str = setting("auto", "what charts are drawn with", choices=("auto", "braille", "block", "ascii"))
    hz: float | None = setting(None, "panel repaints a second; left out: 4 over SSH, else 10", int, float, low=0.2, high=10.0)
    smoothing: float = setting(0.9, "weight of the smoothed line of noisy metrics; 0 is none", int, float, low=0.0, high=0.999)
    alert_command: tuple[str, ...] = setting(
        (), "program and arguments, run without a shell for a critical alert; the alert comes as JSON on its input", list
    )
    mouse: bool = setting(True, "false leaves the mouse to the terminal", bool)
    exports: str = setting("exports", "folder of exports; ~ is your home, else from where lumina was started")


def about() -> Mapping[str, About]:
    """What is known of each setting, by name."""
    return MappingProxyType({f.name: f.metadata["about"] for f in dataclasses.fields(Settings)})


def load_settings(path: Path) -> tuple[Settings, tuple[str, ...]]:
    """The settings of a file and what was wrong with it. A missing file gives the defaults. Never raises."""
    if not path.exists():
        return Settings(), ()
    from lumina_engine.config.yaml_text import Entries, YamlError, parse, read_text

    try:
        entries = parse(read_text(path))
    except YamlError as error:
        where = f"{path}, line {error.line}" if error.line else str(path)
        return Settings(), (f"{where}: {error}; the default settings are used",)
    if entries is None:
        return Settings(), ()
    if not isinstance(entries, Entries):
        return Settings(), (f"{path}: expected lines like `theme: light`; the default settings are used",)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for entry in entries:
        value, wrong = check(entry.key, entry.value)
        if wrong:
            problems.append(f"{path.name}, line {entry.line}: {wrong}")
        else:
            values[entry.key] = value
    return Settings(**values), tuple(problems)


def check(name: str, value: Any) -> tuple[Any, str]:
    """The value of a setting as it is kept, and what is wrong with it ("" if nothing)."""
    known = about()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        return None, f"no setting is called {name}; {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(known)}"
    what = known[name]
    fits: bool = isinstance(value, what.kinds)  # (a bool is an int for Python, not for a reader of YAML)
    if isinstance(value, bool) != (what.kinds == (bool,)) or not fits:
        return None, f"{name} must be {_expected(what)}, not {_shown(value)}"
    if isinstance(value, list):
        if not all(isinstance(item, str) and item and "\0" not in item for item in value):
            return None, f"{name} must be a list of texts, each in quotes where YAML would read something else"
        return tuple(value), ""
    if what.choices and value not in what.choices:
        near = difflib.get_close_matches(value, what.choices, 1)
        return None, f"{name}: {_shown(value)} is none of {', '.join(what.choices)}" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    if what.low is not None and what.high is not None and not what.low <= value <= what.high:
        return None, f"{name} = {value}: must be {what.low:g} to {what.high:g}"
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        return None, f"{name} must not be empty"
    return (float(value) if float in what.kinds else value), ""


def _expected(what: About) -> str:
    if what.choices:
        return f"one of {', '.join(what.choices)}"
    if what.kinds == (bool,):
        return "true or false"
    if list in what.kinds:
        return "a list: [notify-send, lumina]"
    return f"a number, {what.low:g} to {what.high:g}" if float in what.kinds else "a text"


def _shown(value: Any) -> str:
    return repr(value)[:40] if not isinstance(value, bool) else str(value).lower()


def table(settings: Settings) -> list[tuple[str, str, str, str]]:
    """Rows (name, value in force, what it may be, help)."""
    rows = []
    for name, what in about().items():
        value = getattr(settings, name)
        text = " ".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
        rows.append((name, "-" if value in (None, ()) else text, _expected(what), what.help))
    return rows
