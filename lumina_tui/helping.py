"""Help, made from the registry and the tables of settings and themes. Lines of (text, role), no widget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

from .actions import FORBIDDEN_KEYS, of_scope
from .places import config_dir
from .settings import table
from .themes import SKINS, why_not

if TYPE_CHECKING:
    from .application import LuminaApp
    from .screens.base import LuminaScreen

Line = Sequence[tuple[str, str]]

CUSTOMS = (  # what the same letters mean wherever they are offered
    ("/", "filter or search"),
    ("n N", "next and previous match"),
    ("y", "copy"),
    ("Y", "copy the exact command"),
    ("e", "export into a file"),
    ("r", "read again, try again"),
    ("o", "sort"),
    ("Space", "mark"),
    ("[ ]", "previous and next"),
    ("j k g G ctrl+d ctrl+u", "move in everything that is read"),
    ("Esc", "leave the field, close the layer, go back"),
)
BADGES = (
    ("LIVE 4 Hz", "records arrive as they are written; panels are painted so many times a second"),
    ("BUSY", "compiling or saving: no records are expected"),
    ("QUIET 42 s", "the supervisor lives, but nothing was written for longer than usual: perhaps it hangs"),
    ("LOADING 63 %", "the run's file is being read"),
    ("FILE", "no live connection: the file is read each second"),
    ("DEAD", "nobody holds the run although it never ended: it crashed"),
    ("preview", "a sample of a long file is shown; the whole of it follows"),
)
SIGNS = (
    ("C ! D < |", "checkpoint, alert, change, rewind, restart on a chart's axis; a digit where they pile up"),
    ("o  x", "evaluation; a value that is not a number"),
    ("^  v", "values above or below the Y range of a chart; i shows all of them"),
    ("a b c", "where the line of a run ends, when several lie over each other"),
    ("* ! ?", "a field: changed, error, warning"),
    ("-", "not known"),
    ("dim", "old: the age stands behind it"),
)


def hanging(line: Line, width: int) -> int:
    """Where the explanation of a line begins: behind the parts that end with a space. Wrapped lines go on there."""
    at = 0
    for text, _ in line:
        if not text.endswith(" "):
            break
        at += cell_len(text)
    return at if 0 < at <= width // 2 + 5 else 8


def _rows(heading: str, rows: Sequence[tuple[str, str]], width: int = 23) -> list[Line]:
    return [(), ((heading, "title"),), *(((f"  {sign:<{width}} ", "key"), (text, "text")) for sign, text in rows)]


def _scope_lines(heading: str, scope: str, node: Any, app: LuminaApp) -> list[Line]:
    """The actions of a scope; what cannot be done now says why."""
    lines: list[Line] = [(), ((heading, "title"),)]
    for action in of_scope(scope):
        if action.method == "screen" and not app.has_screen(int(str(action.args[0]))):
            continue
        reason = node.refusal(action.id)
        parts = [(f"  {app.keys.text(action):<17} ", "key"), (f"{action.title:<18} ", "text"), (action.help, "text")]
        lines.append([*parts, (f"  (not now: {reason})", "dim")] if reason else parts)
    return lines


def screen_help(screen: LuminaScreen) -> list[Line]:
    """What is focused, its keys, those of the screen, those of everywhere, and the signs.

    A node explains what it stands at with `explain() -> Sequence[Line]`, for instance a field of a form.
    """
    focused: Any = screen.focused
    lines: list[Line] = []
    seen: set[str] = set()
    for node in (focused, screen):
        explain = getattr(node, "explain", None)
        if explain is not None and (told := list(explain())):
            lines += [(), *told]
    for node in () if focused is None else focused.ancestors_with_self:
        scope = getattr(node, "scope", "")
        if not scope or scope in seen or scope == "app":
            continue
        seen.add(scope)
        lines += _scope_lines(screen.heading if node is screen else "This panel", scope, node, screen.lumina)
    if screen.scope and screen.scope not in seen:
        lines += _scope_lines(screen.heading, screen.scope, screen, screen.lumina)
    lines += _scope_lines("Everywhere", "app", screen.lumina, screen.lumina)
    lines += _rows("The same wherever it is offered", CUSTOMS)
    return [*lines[1:], *signs_help(screen.lumina)]


def signs_help(app: LuminaApp) -> list[Line]:
    """Badges and signs."""
    return [*_rows("Badges in the first line", BADGES, 13), *_rows("Signs", SIGNS, 13)]


def keys_help(app: LuminaApp) -> list[Line]:
    """How keys are changed."""
    path = config_dir() / "keys.yaml"
    lines: list[Line] = [
        ((f"{path} holds your own keys: an action's id and a key, or a list of keys.", "text"),),
        (("lumina --print-keys lists all ids with the keys in force.", "text"),),
        (),
        (("  home.new: A", "accent"),),
        (('  chart.zoom_in: ["+", f5]', "accent"),),
    ]
    lines += _rows("Yours", [(" ".join(keys), name) for name, keys in app.keys.own.items()] or [("-", "none yet")])
    lines += [((f"  ! {problem}", "bad"),) for problem in app.keys.problems]
    return [*lines, *_rows("Not to be bound", [(key, why) for key, why in FORBIDDEN_KEYS.items() if not key[-1].isdigit()])]


def settings_help(app: LuminaApp) -> list[Line]:
    """All settings with their values."""
    lines: list[Line] = [((f"{config_dir() / 'settings.yaml'} holds your settings, `name: value` a line.", "text"),), ()]
    for name, value, allowed, help_ in table(app.settings):
        lines += [((f"  {name:<15}", "key"), (value, "accent")), ((f"    {help_} ({allowed})", "text"),)]
    themes = [
        (skin.name, skin.title + (f" (not now: {why})" if (why := why_not(skin, app.look.colours)) else ""))
        for skin in SKINS.values()
    ]
    return [*lines, *_rows("Themes", themes)]


# name -> title, lines
PAGES: Mapping[str, tuple[str, Callable[[LuminaApp], list[Line]]]] = MappingProxyType(
    {
        "signs": ("badges and signs", signs_help),
        "keys": ("your own keys", keys_help),
        "settings": ("your settings", settings_help),
    }
)
