"""The user's own keys: `keys.yaml` in the configuration folder, action id to one key or a list of keys.

    home.new: A
    chart.zoom_in: ["+", f5]

Rows that cannot be taken are reported with their line and left out; the rest is in force.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from textual.keys import Keys

from .actions import ACTIONS, FORBIDDEN_KEYS, Action, by_id, key_text, plain_key, together

_PLAIN_NAMES = frozenset({*(str(key.value) for key in Keys if not key.value.startswith("<")), "comma"})
_MODIFIERS = ("ctrl+", "alt+", "shift+")


@dataclass(frozen=True)
class Keymap:
    """The keys in force. `own` holds the user's rows that are taken, `problems` what was wrong with the others."""

    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def keys(self, action: Action) -> tuple[str, ...]:
        """The keys of an action."""
        return self.own.get(action.id, action.keys)

    def text(self, action: Action) -> str:
        """The keys of an action as a person writes them."""
        return " ".join(key_text(key) for key in self.keys(action))

    def first(self, action_id: str) -> str:
        """The first key of an action as a person writes it, for sentences like "a starts one"."""
        return key_text(self.keys(by_id()[action_id])[0])

    def for_textual(self) -> dict[str, str]:
        """What `App.set_keymap` takes."""
        return {name: ",".join("comma" if key == "," else key for key in keys) for name, keys in self.own.items()}

    def table(self, scopes: Iterable[str] | None = None) -> list[tuple[str, str, str, str]]:
        """Rows (action id, keys, title, help) for help, `--print-keys` and documentation."""
        wanted = None if scopes is None else list(scopes)
        rows = [a for a in ACTIONS if wanted is None or a.scope in wanted]
        if wanted is not None:
            rows.sort(key=lambda action: wanted.index(action.scope))
        return [(action.id, self.text(action), action.title, action.help) for action in rows]


def load_keymap(path: Path) -> Keymap:
    """The user's keymap; a missing file is an empty one. Never raises: what is wrong is in `problems`."""
    if not path.exists():
        return Keymap()
    from lumina_engine.config.yaml_text import Entries, YamlError, parse, read_text

    try:
        entries = parse(read_text(path))
    except YamlError as error:
        return Keymap({}, (f"{path}{f', line {error.line}' if error.line else ''}: {error}; the default keys are used",))
    if entries is None:
        return Keymap()
    if not isinstance(entries, Entries):
        return Keymap({}, (f"{path}: expected lines like `home.new: A`; the default keys are used",))
    rows: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    problems: list[str] = []
    for entry in entries:
        keys, wrong = _row(entry.key, entry.value)
        if wrong:
            problems.append(f"{path.name}, line {entry.line}: {wrong}")
        else:
            rows[entry.key], lines[entry.key] = keys, entry.line
    while clash := _clash(rows, lines):
        name, why = clash
        problems.append(f"{path.name}, line {lines[name]}: {why}; {name} keeps its default")
        del rows[name]
    return Keymap(rows, tuple(problems))


def _row(name: str, value: object) -> tuple[tuple[str, ...], str]:
    """The keys of a row, or what is wrong with it."""
    actions = by_id()
    if name not in actions:
        near = difflib.get_close_matches(name, actions, 1)
        return (), f"no action is called {name}; {f'did you mean {near[0]}?' if near else 'lumina --print-keys lists them'}"
    given = value if isinstance(value, list) else [value]
    keys = tuple(str(key) for key in given if isinstance(key, str | int) and not isinstance(key, bool))
    if not keys or len(keys) != len(given):
        return (), f"{name} needs a key or a list of keys, in quotes where YAML would read something else"
    for key in keys:
        if why := wrong_key(key):
            return (), f"{name}: {why}"
    return tuple(dict.fromkeys(keys)), ""


def wrong_key(key: str) -> str | None:
    """Why a key cannot be bound; None if it can."""
    if key in FORBIDDEN_KEYS:
        return f"{key} {FORBIDDEN_KEYS[key]}; choose another key"
    rest, modifiers = key, set()
    while rest.startswith(_MODIFIERS) and rest.partition("+")[2]:
        modifier, _, rest = rest.partition("+")
        modifiers.add(modifier)
    if len(rest) == 1 and modifiers == {"shift"}:
        return f"{key} arrives as {rest.upper()}; write that"
    if rest.isascii() and rest.isupper() and len(rest) == 1 and modifiers:
        return f"{key} is not sent; write {key[:-1]}shift+{rest.lower()}"
    if len(rest) == 1 and (rest.isalnum() if modifiers else rest.isprintable()):
        return None
    if key in _PLAIN_NAMES or rest in _PLAIN_NAMES or _named(rest):
        return None
    near = difflib.get_close_matches(key, _PLAIN_NAMES, 1)
    hint = f"did you mean {near[0]}?" if near else "write a character, or a name like f5, ctrl+t, pageup"
    return f"no key is called {key[:40]}; {hint}"


def _named(key: str) -> bool:
    """Whether this is the name of a character, like `question_mark`."""
    import unicodedata

    try:
        return unicodedata.lookup(key.replace("_", " ").upper()).isprintable()
    except KeyError:
        return False


def _clash(rows: Mapping[str, Sequence[str]], lines: Mapping[str, int]) -> tuple[str, str] | None:
    """A row of the user's that takes a key which another action has in the same place: (its id, why)."""
    for group in together():
        taken: dict[str, Action] = {}
        for action in ACTIONS:
            for key in map(plain_key, rows.get(action.id, action.keys)) if action.scope in group else ():
                other = taken.setdefault(key, action)
                mine = [a for a in (other, action) if a.id in rows]
                if other is not action and mine:
                    loser = max(mine, key=lambda a: lines[a.id])
                    winner = action if loser is other else other
                    return loser.id, f"{key_text(key)} is the key of {winner.id} ({winner.title}) already"
    return None
