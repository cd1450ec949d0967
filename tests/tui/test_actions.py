"""The registry is the only source of keys, and it is complete."""

from __future__ import annotations

import importlib
import itertools
import pkgutil

import pytest
from textual.binding import Binding

from lumina_tui import actions
from lumina_tui.app import parser
from lumina_tui.application import LuminaApp
from lumina_tui.screens.base import LuminaScreen
from lumina_tui.widgets.acts import Acts


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))


def nodes() -> dict[str, type]:
    """The class of the program that runs each scope's actions."""
    for part in ("screens", "widgets"):
        package = importlib.import_module(f"lumina_tui.{part}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"lumina_tui.{part}.{module.name}")
    ours = [cls for cls in subclasses(Acts) if cls.__module__.startswith("lumina_tui.")]
    found = {cls.scope: cls for cls in sorted(ours, key=lambda c: len(c.__mro__)) if cls.scope}
    return {**found, "app": LuminaApp}


def test_ids_are_unique_and_each_action_explains_itself():
    ids = [action.id for action in actions.ACTIONS]
    assert len(ids) == len(set(ids))
    for action in actions.ACTIONS:
        assert action.title and action.help and action.keys, action.id
        assert not set(actions.FORBIDDEN_KEYS) & set(action.keys), action.id
        assert not any(key.startswith("alt+") and key[4:].isdigit() for key in action.keys), action.id


def test_every_action_has_a_method_where_its_scope_lives():
    known = nodes()
    for action in actions.ACTIONS:
        assert action.scope in known, action.id
        assert callable(getattr(known[action.scope], action.call, None)), f"{action.id} needs {action.call}"


def test_no_key_twice_where_scopes_overlap():
    for group in actions.together():
        keys: dict[str, str] = {}
        for scope in group:
            for action in actions.of_scope(scope):
                for key in map(actions.plain_key, action.keys):
                    assert key not in keys, f"{key}: {keys.get(key)} and {action.id}"
                    keys[key] = action.id


def test_every_screen_and_panel_that_meet_are_checked_together():
    screens = {cls.scope for cls in nodes().values() if issubclass(cls, LuminaScreen)}
    groups = actions.together()
    for screen in screens:
        for panel in actions.PANELS.get(screen, ()):
            assert ("app", screen, panel) in groups
        assert any("app" in group and screen in group for group in groups), screen


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
