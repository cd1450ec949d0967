"""The palette finds everything by name; help and jump mode come from the registry."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual.widgets import Input, Static

from lumina_tui import actions
from lumina_tui.application import LuminaApp
from lumina_tui.finder import Entry, gather, search
from lumina_tui.helping import PAGES
from lumina_tui.screens.base import LuminaScreen
from lumina_tui.screens.dialogs import Prompt, Sheet
from lumina_tui.screens.jump import Jump, labels
from lumina_tui.screens.palette import Palette
from lumina_tui.terminal import NAMED, Look
from lumina_tui.widgets.fields import FieldList
from lumina_tui.widgets.panel import Panel

from .fake_engine import FakeEngine
from .helpers import screen_text, until

TITLES = ["Resume", "New run", "Set learning rate", "run alpha", "learning_rate", "zero_stage", "theme light"]


def entry(title: str, help_: str = "", **more) -> Entry:
    return Entry("action", title, title, help_, **more)


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("res", "Resume"),
        ("zero", "zero_stage"),
        ("zst", "zero_stage"),
        ("learning_r", "learning_rate"),
        ("rate set", "Set learning rate"),
        ("alpha", "run alpha"),
        ("LIGHT", "theme light"),
    ],
)
def test_palette_finds_by_parts_and_by_letters_in_order(query: str, first: str):
    found, count = search([entry(title) for title in TITLES], query)
    assert found[0].title == first and count == len(found)


def test_palette_puts_what_cannot_be_done_now_behind():
    found, _ = search([entry("Stop run", reason="no run"), entry("Stop run now")], "stop")
    assert [item.title for item in found] == ["Stop run now", "Stop run"]


@settings(deadline=None)
@given(st.lists(st.text("abc ", min_size=1, max_size=6), max_size=20), st.text("abc ", max_size=4))
def test_search_gives_every_entry_with_the_words_and_no_other(titles: list[str], query: str):
    entries = [Entry("action", str(i), title, "help words") for i, title in enumerate(titles)]
    found, count = search(entries, query, most=1000)
    assert len(found) == count == len({item.key for item in found})
    words = query.lower().split()
    for item in entries:
        if all(word in item.title for word in words):
            assert item in found
        letters = all(_in_order(word, item.title) or word in item.text for word in words)
        assert letters or item not in found


def _in_order(word: str, text: str) -> bool:
    rest = iter(text)
    return all(letter in rest for letter in word)


def test_search_takes_only_the_best_and_counts_all():
    found, count = search([entry(f"run {i}") for i in range(500)], "run", most=50)
    assert len(found) == 50 and count == 500 and found[0].title == "run 0"


def checkpoints(run: Path, *names: str) -> None:
    for name in names:
        (run / "checkpoints" / name).mkdir(parents=True)


def test_gather_finds_runs_checkpoints_presets_configs_and_all_fields(tmp_path):
    from lumina_tui.form import INFOS

    checkpoints(tmp_path / "runs" / "one", "step-000002", "step-000010", "step-1000000", ".step-000011.part", "junk")
    (tmp_path / "runs" / "one" / "checkpoints" / "best").write_text("step-000010")
    (tmp_path / "runs" / ".hidden").mkdir()
    (tmp_path / "runs" / "one" / "emergency" / "step-000011").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "emergency" / "step-000010").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("")
    entries = gather(tmp_path / "runs", [tmp_path / "configs", tmp_path / "missing"])
    of = lambda kind: [item.target for item in entries if item.kind == kind]  # noqa: E731
    assert of("run") == ["one"]
    assert of("checkpoint") == [f"one@{name}" for name in ("best", "step-1000000", "step-000011", "step-000010", "step-000002")]
    assert of("config") == [str(tmp_path / "configs" / "mine.yaml")]
    assert set(of("field")) == set(INFOS) and "b1" in of("preset")
    assert gather(tmp_path / "nothing", []) and len({item.key for item in entries}) == len(entries)


async def opened(pilot, app: LuminaApp, query: str = "", complete: bool = True) -> Palette:
    app.action_palette()
    await until(pilot, lambda: isinstance(app.screen, Palette))
    palette = app.screen
    assert isinstance(palette, Palette)
    if complete:
        await until(pilot, lambda: palette.complete)
    palette.query_one(Input).value = query
    await pilot.pause()
    return palette


def at_field(app: LuminaApp, name: str) -> bool:
    """Whether the cursor of the config editor is on a field."""
    return any(fields.current == name for fields in app.screen.query(FieldList))


async def test_palette_opens_runs_fields_presets_themes_and_help(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(3)
        app = LuminaApp(tmp_path, look=Look())
        async with app.run_test(size=(120, 40)) as pilot:
            await until(pilot, lambda: "demo" in screen_text(app))

            async def take(query: str) -> None:
                await opened(pilot, app, query)
                await pilot.press("enter")

            await take("theme light")
            await until(pilot, lambda: app.skin.name == "light")
            await take("run demo")
            await until(pilot, lambda: getattr(app.screen, "number", 0) == 5)
            await take("preset b1")
            await until(pilot, lambda: getattr(app.screen, "number", 0) == 3)
            app.open_home()
            await take("zero_stage")
            await until(pilot, lambda: at_field(app, "zero_stage"))
            await take("help badges")
            await until(pilot, lambda: isinstance(app.screen, Sheet) and "supervisor lives" in screen_text(app))


async def test_palette_lists_disabled_actions_with_the_reason_and_other_screens(tmp_path):
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: "No runs" in screen_text(app))
        palette = await opened(pilot, app)
        listed = {item.target for item in palette.all if item.kind == "action"}
        here = {a.id for scope in ("home", "table", "app") for a in actions.of_scope(scope)} - {"app.palette"}
        here -= {f"app.screen_{n}" for n in range(1, 10) if not app.has_screen(n)}
        assert here <= listed
        palette.query_one(Input).value = "resume"
        await until(pilot, lambda: "not now: no run is chosen" in screen_text(app))
        palette.query_one(Input).value = "redo"
        await until(pilot, lambda: "on screen 3, Config; Enter goes there" in screen_text(app))
        await pilot.press("enter")
        await until(pilot, lambda: getattr(app.screen, "number", 0) == 3)


async def test_palette_asks_the_same_question_for_dangerous_actions(tmp_path):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(3)
        app = LuminaApp(tmp_path, look=Look())
        async with app.run_test(size=(120, 40)) as pilot:
            await until(pilot, lambda: "demo" in screen_text(app))
            await opened(pilot, app, "stop")
            await pilot.press("enter")
            await until(pilot, lambda: "Stop demo?" in screen_text(app))
            assert not engine.commands


async def test_palette_says_why_a_theme_cannot_be_shown(tmp_path):
    app = LuminaApp(tmp_path, look=Look(glyphs="ascii", palette=NAMED, ansi=True, colours=16))
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: "No runs" in screen_text(app))
        await opened(pilot, app, "theme colour")
        assert "this terminal has 16 colours" in screen_text(app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, LuminaScreen))
        await until(pilot, lambda: "16 colours" in app.notices[-1].text)
        assert app.skin.name == "ansi-dark"


async def test_palette_gathers_behind_the_keys(tmp_path, monkeypatch):
    """Typing works while the files are still being read."""
    import threading

    gate = threading.Event()

    def slow(*arguments):
        gate.wait(20)
        return gather(*arguments)

    monkeypatch.setattr("lumina_tui.screens.palette.gather", slow)
    (tmp_path / "a-run").mkdir()
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(120, 40)) as pilot:
        try:
            palette = await opened(pilot, app, "notices", complete=False)
            await until(pilot, lambda: "What was said so far" in screen_text(app) and "reading runs" in screen_text(app))
            palette.query_one(Input).value = "a-run"
            await pilot.pause()
        finally:
            gate.set()
        await until(pilot, lambda: "run a-run" in screen_text(app))


# help


@pytest.mark.parametrize("width", [69, 103])
def test_wrapped_help_goes_on_below_the_explanation(width):
    from lumina_tui.helping import SIGNS, _rows, hanging
    from lumina_tui.widgets.text_panel import wrapped

    keys, title = ("  ctrl+r            ", "key"), ("Redo               ", "text")
    lines = {39: [keys, title, ("Make it again " * 20 + ".", "text"), ("  (not now)", "dim")], 16: _rows("Signs", SIGNS, 13)[2]}
    for begin, line in lines.items():
        rows = ["".join(text for text, _ in parts) for parts in wrapped(line, width, hanging(line, width))]
        assert all(row.startswith(" " * begin) and row[begin] != " " for row in rows[1:])
        assert begin == 16 or len(rows) > 3


@pytest.mark.parametrize("size", [(80, 24), (160, 45)])
async def test_help_is_wrapped_once(tmp_path, size):
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=size) as pilot:
        app.open_help("signs")
        await until(pilot, lambda: isinstance(app.screen, Sheet) and any(text.size.height for text in app.screen.query(Static)))
        assert app.screen.query_one(Static).size.height == len(app.screen.text.plain.rstrip("\n").split("\n")) + 1
        app.screen.dismiss(None)


async def test_help_shows_every_action_of_panel_screen_and_app(tmp_path):
    from lumina_tui.helping import screen_help

    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(3)
        app = LuminaApp(tmp_path, look=Look())
        async with app.run_test(size=(120, 40)) as pilot:
            screen = app.open_screen(5)
            assert screen is not None
            await until(pilot, lambda: app.screen is screen and screen.focused is not None)
            text = "\n".join("".join(part for part, _ in line) for line in screen_help(screen))
            order = [text.index(heading) for heading in ("This panel", "\nMonitor\n", "\nEverywhere\n", "Badges", "Signs")]
            assert order == sorted(order)
            for scope in ("chart", "monitor", "app"):
                for action in actions.of_scope(scope):
                    if action.method != "screen":
                        assert action.help in text, action.id
            for page in PAGES:
                app.open_help(page)
                await until(pilot, lambda: isinstance(app.screen, Sheet))
                app.screen.dismiss(None)
                await until(pilot, lambda: app.screen is screen)


async def test_help_in_a_form_explains_the_field(tmp_path):
    from lumina_tui.form import INFOS

    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(120, 60)) as pilot:
        app.open_field("zero_stage")
        await until(pilot, lambda: at_field(app, "zero_stage"))
        app.action_help()
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        lines = screen_text(app)
        assert "zero_stage" in lines and INFOS["zero_stage"].help[:40] in lines


async def test_sheet_searches_its_text(tmp_path):
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(100, 20)) as pilot:
        app.action_help()
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        sheet = app.screen
        assert isinstance(sheet, Sheet)
        await pilot.press("n")
        assert "nothing was searched" in app.notices[-1].text
        await pilot.press("slash")
        await until(pilot, lambda: isinstance(app.screen, Prompt))
        app.screen.query_one(Input).value = "supervisor lives"
        await pilot.press("enter")
        await until(pilot, lambda: app.screen is sheet and "supervisor lives" in screen_text(app))
        sheet.find("no such words")
        assert "no match for no such words" in app.notices[-1].text


# jump mode and one panel alone


def test_jump_labels_are_different_and_none_begins_another():
    for count in (0, 1, 26, 27, 600):
        found = labels(count)
        assert len(set(found)) == count and len({len(label) for label in found}) <= 1


@pytest.mark.parametrize("number", [1, 3, 5])
async def test_jump_puts_a_letter_on_every_target_and_goes_there(tmp_path, number):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(5)
        engine.experts()
        app = LuminaApp(tmp_path, look=Look())
        async with app.run_test(size=(160, 50)) as pilot:
            screen = app.open_screen(number)
            assert screen is not None
            await until(pilot, lambda: app.screen is screen and screen.focused is not None)
            await until(pilot, lambda: number != 5 or screen.query_one("#experts").is_on_screen)
            chain = screen.focus_chain
            for index, wanted in enumerate(chain):
                app.action_jump()
                await until(pilot, lambda: isinstance(app.screen, Jump))
                jump = app.screen
                assert isinstance(jump, Jump) and list(jump.targets.values()) == chain
                assert all(f" {label} " in screen_text(app) for label in jump.targets)
                assert f"{number} {screen.heading}" in app.export_screenshot().replace("&#160;", " ")  # not hidden by it
                await pilot.press(*list(jump.targets)[index])
                await until(pilot, lambda wanted=wanted: app.screen is screen and screen.focused is wanted)
            app.action_jump()
            await until(pilot, lambda: isinstance(app.screen, Jump))
            await pilot.press("escape")
            await until(pilot, lambda: app.screen is screen and screen.focused is chain[-1])


@pytest.mark.parametrize("number", [1, 2, 3, 5])
async def test_any_panel_stands_alone_and_comes_back(tmp_path, number):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(5)
        app = LuminaApp(tmp_path, look=Look())
        async with app.run_test(size=(160, 50)) as pilot:
            screen = app.open_screen(number)
            assert screen is not None
            await until(pilot, lambda: app.screen is screen and app.focused_panel() is not None)
            panel = app.focused_panel()
            assert panel is not None
            before = panel.size
            await app.action_do("app.maximise")
            await until(pilot, lambda: panel.size.width >= 158 and panel.size.height > before.height - 1)
            others = [p for p in screen.query(Panel) if p is not panel and p not in panel.ancestors]
            assert not any(other.is_on_screen for other in others)
            assert screen_text(app).split("\n")[-1].strip()  # the key line stays
            await app.action_do("app.maximise")
            await until(pilot, lambda: panel.size == before)
            await app.action_do("app.maximise")
            await app.action_back()
            await until(pilot, lambda: panel.size == before)


async def test_palette_with_two_hundred_runs_shows_no_more_than_it_must(tmp_path):
    for i in range(200):
        checkpoints(tmp_path / f"run-{i:03d}", "step-000001")
    app = LuminaApp(tmp_path, look=Look())
    async with app.run_test(size=(120, 40)) as pilot:
        palette = await opened(pilot, app, "")
        assert len(palette.all) > 600
        began = time.perf_counter()
        for query in ("r", "ru", "run", "run 1", "run-19", "step", "lr"):
            palette._show(query)
            assert len(palette.table.rows) <= 100
        print(f"{(time.perf_counter() - began) / 7 * 1000:.1f} ms a key, {len(palette.all)} entries")
