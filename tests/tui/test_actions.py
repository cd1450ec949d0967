"""The registry is the only source of keys, and it is complete."""

from __future__ import annotations

import importlib
import itertools

import pytest
from textual.binding import Binding

from lumina_tui import actions
from lumina_tui.app import parser
from lumina_tui.application import SCREENS, LuminaApp
from lumina_tui.screens.base import LuminaScreen
from lumina_tui.widgets.acts import Acts

FORBIDDEN = {"ctrl+i", "ctrl+m", "ctrl+h", "ctrl+s", "ctrl+a", "ctrl+b", "shift+enter", "ctrl+enter", "alt+enter"}


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))


def nodes() -> dict[str, type]:
    """The class that runs each scope's actions."""
    for module, _ in SCREENS.values():
        if importlib.util.find_spec(f"lumina_tui.screens.{module}"):
            importlib.import_module(f"lumina_tui.screens.{module}")
    found = {cls.scope: cls for cls in sorted(subclasses(Acts), key=lambda c: len(c.__mro__)) if cls.scope}
    return {**found, "app": LuminaApp}


def test_ids_are_unique_and_each_action_explains_itself():
    ids = [action.id for action in actions.ACTIONS]
    assert len(ids) == len(set(ids))
    for action in actions.ACTIONS:
        assert action.title and action.help and action.keys, action.id
        assert not FORBIDDEN & set(action.keys), action.id
        assert not any(key.startswith("alt+") and key[4:].isdigit() for key in action.keys), action.id


def test_every_action_has_a_method_where_its_scope_lives():
    known = nodes()
    for action in actions.ACTIONS:
        assert action.scope in known, action.id
        assert callable(getattr(known[action.scope], action.call, None)), f"{action.id} needs {action.call}"


def test_no_key_twice_where_scopes_overlap():
    def normal(key: str) -> str:
        return next(iter(Binding.make_bindings([Binding("comma" if key == "," else key, "x")]))).key

    screens = {cls.scope for cls in nodes().values() if issubclass(cls, LuminaScreen)}
    for screen in screens:
        for panel in (*actions.PANELS.get(screen, ()), None):
            keys: dict[str, str] = {}
            for scope in ("app", screen, panel):
                for action in actions.of_scope(scope) if scope else ():
                    for key in map(normal, action.keys):
                        assert key not in keys, f"{key}: {keys.get(key)} and {action.id}"
                        keys[key] = action.id


def test_bindings_of_screens_and_panels_come_from_the_registry():
    for scope, cls in nodes().items():
        declared = {binding.id for binding in cls.BINDINGS if isinstance(binding, Binding)}
        assert declared == {action.id for action in actions.of_scope(scope)}, scope


def test_key_list_has_every_action_once(capsys):
    from lumina_tui.app import main

    assert main(["--print-keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(actions.ACTIONS)


@pytest.mark.parametrize(
    "flag", ["--start", "--readonly", "--runs", "--fps", "--slow", "--ascii", "--no-mouse", "--print-keys"]
)
def test_flags_of_the_command(flag):
    assert flag in parser().format_help()


def test_numbers_of_screens_are_keys():
    for (number, *_), action in itertools.zip_longest(actions.SCREENS, actions.NUMBERS):
        assert action.keys == (str(number),)
