"""The user's own keys and settings: what is taken, and how what is wrong is reported."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_tui import actions
from lumina_tui.application import LuminaApp
from lumina_tui.keymap import Keymap, load_keymap, wrong_key
from lumina_tui.places import config_dir
from lumina_tui.settings import Settings, about, check, load_settings, table
from lumina_tui.terminal import Look
from lumina_tui.widgets.acts import next_match

from .fake_engine import FakeEngine
from .helpers import screen_text, until


def own(text: str | bytes, name: str = "keys.yaml") -> Path:
    path = config_dir() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_user_keymap_replaces_keys_and_leaves_the_rest():
    keymap = load_keymap(own('home.new: A\nchart.zoom_in: ["+", f5, ","]\napp.leave: 7\napp.screen_7: q\n'))
    assert keymap.problems == ()
    assert keymap.own["chart.zoom_in"] == ("+", "f5", ",") and keymap.for_textual()["chart.zoom_in"] == "+,f5,comma"
    assert keymap.first("home.new") == "A" and keymap.text(actions.by_id()["home.sort"]) == "o"
    assert (keymap.first("app.leave"), keymap.first("app.screen_7")) == ("7", "q")  # two that change places


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("home.nwe: A", ("no action is called home.nwe", "did you mean home.new?")),
        ("zzz: A", ("no action is called zzz", "--print-keys")),
        ("home.new: fo", ("no key is called fo",)),
        ("home.new: pageupp", ("did you mean pageup?",)),
        ("home.new: ctrl+i", ("arrives as Tab",)),
        ("home.new: ctrl+s", ("flow control",)),
        ("home.new: ctrl+b", ("tmux",)),
        ("home.new: alt+enter", ("arrives as plain Enter",)),
        ("home.new: alt+7", ("stray character",)),
        ("home.new: shift+enter", ("kitty",)),
        ("home.new: shift+a", ("arrives as A",)),
        ("home.new: ctrl+A", ("write ctrl+shift+a",)),
        ("home.new: []", ("needs a key",)),
        ("home.new:", ("needs a key",)),
        ("home.new: true", ("needs a key", "quotes")),
        ("home.new: {a: b}", ("needs a key",)),
        ("home.new: X", ("X is the key of home.stop (Stop) already", "home.new keeps its default")),
        ("home.new: j", ("table.down",)),
        ("home.new: q", ("app.leave",)),
        ("app.jump: C", ("already",)),
    ],
)
def test_user_keymap_names_line_and_cause_and_keeps_the_default(row: str, words: tuple[str, ...]):
    keymap = load_keymap(own(f"# mine\nhome.sort: O\n{row}\n"))
    assert dict(keymap.own) == {"home.sort": ("O",)}
    (problem,) = keymap.problems
    assert problem.startswith("keys.yaml, line 3: ")
    for word in words:
        assert word in problem, problem


@pytest.mark.parametrize("text", ["[", "- a", "a: 1\na: 2", b"\xff", "x" * (2 << 20), "hello", "\t: ", "a: &a [*a]"])
def test_user_keymap_that_is_no_mapping_gives_the_defaults(text: str | bytes):
    path = own(text)
    keymap = load_keymap(path)
    assert not keymap.own and len(keymap.problems) == 1 and "keys.yaml" in keymap.problems[0]
    settings, problems = load_settings(path)
    assert settings == Settings() and len(problems) == 1


def test_a_clash_of_two_own_rows_leaves_the_first():
    keymap = load_keymap(own("home.new: Z\nhome.sort: Z\n"))
    assert dict(keymap.own) == {"home.new": ("Z",)} and "line 2" in keymap.problems[0]


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([action.id for action in actions.ACTIONS]),
        st.lists(
            st.sampled_from(["a", "b", "q", "j", "?", "f5", "ctrl+t", "escape", "1", "Z", ",", "+"]), min_size=1, max_size=3
        ),
        max_size=6,
    )
)
def test_whatever_the_user_writes_no_key_means_two_things(tmp_path_factory, rows):
    import json

    path = tmp_path_factory.mktemp("k") / "keys.yaml"
    path.write_text(json.dumps(rows))
    keymap = load_keymap(path)
    assert len(keymap.own) + len(keymap.problems) == len(rows)
    for group in actions.together():
        keys = [actions.plain_key(k) for scope in group for a in actions.of_scope(scope) for k in keymap.keys(a)]
        assert len(keys) == len(set(keys)), group


def test_every_default_key_could_be_written_by_a_user():
    for action in actions.ACTIONS:
        for key in action.keys:
            assert wrong_key(key) is None, key
    assert not Keymap().problems


async def test_own_keys_work_and_are_shown_everywhere(tmp_path):
    own("app.help: f2\napp.notices: f3\nhome.sort: Z\nhome.new: ctrl+i\n")
    app = LuminaApp(tmp_path / "runs", look=Look())
    async with app.run_test(size=(120, 60)) as pilot:
        await until(pilot, lambda: "No runs in" in screen_text(app))
        assert "f2 help" in screen_text(app).split("\n")[-1]
        assert any("keys.yaml, line 4" in notice.text and "arrives as Tab" in notice.text for notice in app.notices)
        await pilot.press("question_mark")
        await pilot.press("exclamation_mark")
        assert getattr(app.screen, "number", 0) == 1  # the old keys mean nothing now
        before = app.screen.order
        await pilot.press("Z")
        await until(pilot, lambda: app.screen.order != before)
        await pilot.press("f2")
        await until(pilot, lambda: "Z  " in screen_text(app) and "Sort" in screen_text(app))


def test_print_keys_prints_the_keys_in_force(tmp_path):
    own("home.sort: Z\nhome.new: ctrl+h\n")
    done = subprocess.run(
        [sys.executable, "-m", "lumina_tui.app", "--print-keys"], capture_output=True, text=True, env=os.environ.copy()
    )
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["home.sort"][:2] == ["Z", "own"] and rows["home.new"][0] == "a"
    assert set(rows) == {action.id for action in actions.ACTIONS}
    assert done.returncode == 1 and "line 2" in done.stderr and "arrives as Backspace" in done.stderr


# settings


def test_settings_are_read_with_their_types():
    text = (
        "theme: light\nglyphs: ascii\nhz: 2\nsmoothing: 0.99\nalert_command: [notify-send, lumina]\nmouse: false\n"
        "exports: ~/out\n"
    )
    settings, problems = load_settings(own(text, "settings.yaml"))
    assert problems == ()
    assert settings == Settings("light", "ascii", 2.0, 0.99, ("notify-send", "lumina"), False, "~/out")
    assert isinstance(settings.hz, float)
    assert [row[0] for row in table(settings)] == [field.name for field in dataclasses.fields(Settings)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("themme: light", "did you mean theme?"),
        ("colour: light", "there are theme, glyphs"),
        ("theme: ligt", "did you mean light?"),
        ("hz: 0", "0.2 to 10"),
        ("hz: true", "a number"),
        ("hz: fast", "a number"),
        ("smoothing: 1.5", "0 to 0.999"),
        ("smoothing: .nan", "0 to 0.999"),
        ("mouse: 1", "true or false"),
        ("mouse: off", "true or false"),
        ("alert_command: rm -rf", "a list"),
        ("alert_command: [a, 1]", "list of texts"),
        ('exports: ""', "must not be empty"),
        ("exports: [a]", "a text"),
        ("theme:", "one of auto"),
    ],
)
def test_settings_name_line_and_cause_and_keep_the_default(row: str, words: str):
    settings, problems = load_settings(own(f"\n{row}\nglyphs: block\n", "settings.yaml"))
    assert settings == dataclasses.replace(Settings(), glyphs="block")
    (problem,) = problems
    assert problem.startswith("settings.yaml, line 2: ") and words in problem


def test_every_setting_explains_itself_and_its_default_is_allowed():
    for name, what in about().items():
        assert what.help, name
        value = getattr(Settings(), name)
        if value is not None:
            assert check(name, list(value) if isinstance(value, tuple) else value) == (value, "")


async def test_settings_are_obeyed(tmp_path, monkeypatch):
    from lumina_tui import app as command
    from lumina_tui import application

    seen: dict[str, object] = {}

    class Probe(LuminaApp):
        def run(self, **kwargs):
            seen.update(kwargs, look=self.look, skin=self.skin.name, exports=self.exports_folder, problems=self.problems)

    class Tty:
        def isatty(self):
            return True

        def write(self, text):
            return len(text)

        def flush(self):
            return None

    monkeypatch.setattr(application, "LuminaApp", Probe)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, Tty())
    own(f"theme: light\nglyphs: block\nhz: 2\nmouse: false\nexports: {tmp_path}/out\nbad: 1\n", "settings.yaml")
    assert command.main(["--runs", str(tmp_path)]) == 0
    look = seen["look"]
    assert isinstance(look, Look) and (look.glyphs, look.hz) == ("block", 2.0)
    assert (seen["mouse"], seen["skin"], seen["exports"]) == (False, "light", tmp_path / "out")
    assert any("line 6" in str(text) for text in seen["problems"])  # type: ignore[attr-defined]
    assert command.main(["--runs", str(tmp_path), "--fps", "5", "--ascii"]) == 0  # flags win
    look = seen["look"]
    assert isinstance(look, Look) and (look.glyphs, look.hz) == ("ascii", 5.0)


async def test_theme_is_chosen_and_kept_until_the_setting_changes(tmp_path):
    async def opened(**kwargs) -> LuminaApp:
        app = LuminaApp(tmp_path, look=Look(), **kwargs)
        async with app.run_test(size=(80, 24)):
            if choice := kwargs.get("settings"):
                assert choice
        return app

    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(80, 24)) as pilot:
        assert app.skin.name == "dark"
        for name in ("light", "colour-blind", "high-contrast", "ansi-dark", "ansi-light", "light"):
            app.choose_theme(name)
            await pilot.pause()
            assert app.theme == app.skin.textual and app.look.ansi == app.skin.ansi
    assert (await opened()).skin.name == "light"
    assert (await opened(settings=Settings(theme="high-contrast"))).skin.name == "high-contrast"
    assert (await opened()).skin.name == "light"


async def test_smoothing_of_noisy_metrics_begins_at_the_setting(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(5)
        app = LuminaApp(tmp_path, look=Look(), settings=Settings(smoothing=0.75))
        async with app.run_test(size=(100, 30)) as pilot:
            app.open_monitor("demo")
            await until(pilot, lambda: "EMA 0.75" in screen_text(app))


@settings(deadline=None)
@given(st.lists(st.text("ab ", max_size=4), max_size=8), st.text("ab", min_size=1, max_size=2), st.integers(0, 7))
def test_search_goes_round_and_finds_every_match(lines: list[str], needle: str, at: int):
    matches = [i for i, line in enumerate(lines) if needle in line]
    at = min(at, max(0, len(lines) - 1))
    found = next_match(lines, needle, at, 0)
    if not matches:
        assert found is None and next_match(lines, needle, at, 1) is None
        return
    assert found == min((i for i in matches if i >= at), default=matches[0])
    seen, place = [], at
    for _ in matches:
        place = next_match(lines, needle, place, 1) or 0
        seen.append(place)
    assert sorted(seen) == matches
    back = next_match(lines, needle, place, -1)
    assert back is not None and next_match(lines, needle, back, 1) == place
