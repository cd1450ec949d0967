"""What all screens share: lines, layers, sizes, hostile text, terminals."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.widget import Widget
from textual.widgets import Input

from lumina_tui.application import LuminaApp
from lumina_tui.launching import LaunchError, train_argv
from lumina_tui.opening import SCREENS
from lumina_tui.paint import age, clean, count, duration, fit, line, number, size, whole
from lumina_tui.screens.base import LuminaScreen
from lumina_tui.screens.dialogs import Choice, Prompt, Question, Sheet
from lumina_tui.screens.palette import Palette
from lumina_tui.terminal import NAMED, AsciiFilter, ControlFilter, Look, detect, to_ascii
from lumina_tui.widgets.bars import KeyBar
from lumina_tui.widgets.panel import frame_text, message_lines

from .fake_engine import FakeEngine
from .helpers import screen_text, until

SIZES = [(80, 24), (20, 6), (10, 3), (1, 1), (160, 45), (60, 15), (200, 60), (3, 40), (120, 2)]
WHOLE = [(80, 24), (160, 45), (200, 60)]
HOSTILE = [
    "\x1b]52;c;aGk=\x07",
    "\x1b[2J\x1b[6n",
    "\x1bc",
    "\x9b31m",
    "\x1bPq\x1b\\",
    "[/x]",
    "[@click=app.leave]x[/]",
    "[bold",
    "[link=http://x]y",
    "‮abc‬",
    "\x00\x07\x08\r\x7f",
    "[" * 300,
    "漢字" * 40,
]
HOSTILE_TEXT = " ".join(HOSTILE)


def app_for(root, **kwargs) -> LuminaApp:
    return LuminaApp(root, look=kwargs.pop("look", Look()), **kwargs)


async def test_first_and_last_line(tmp_path):
    app = app_for(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "No runs in" in screen_text(app))
        lines = screen_text(app).split("\n")
        assert lines[0].startswith(" lumina  1 Home")
        assert lines[-1].rstrip().endswith("? help")
        assert all(cell_len(text) == 80 for text in lines)
        assert len(app.screen.query_one(KeyBar).actions_here()) <= 6


@pytest.mark.parametrize("number", list(SCREENS))
@pytest.mark.parametrize(
    "look",
    [
        pytest.param(Look(), id="braille"),
        pytest.param(Look(glyphs="ascii", palette=NAMED, ansi=True), id="ascii", marks=pytest.mark.slow),
    ],
)
async def test_every_screen_at_every_size(tmp_path, number, look):
    async with FakeEngine(tmp_path) as engine:
        engine.state("running")
        engine.steps(30)
        engine.experts()
        engine.hardware(1)
        app = app_for(tmp_path, look=look)
        async with app.run_test(size=(80, 24)) as pilot:
            screen = app.open_screen(number)
            assert screen is not None
            await until(pilot, lambda: app.screen is screen and screen.is_mounted)
            for width, height in SIZES:
                await pilot.resize_terminal(width, height)
                await pilot.pause()
                text = screen_text(app)
                assert len(text.split("\n")) == height
                if (width, height) in WHOLE:  # what reaches beyond the edge would be cut off
                    parts = [part for part in screen.query(".content Panel, .content Drawn").results(Widget) if part.region]
                    assert [part for part in parts if part.is_on_screen and part.region.right > width] == []


@pytest.mark.parametrize("number", list(SCREENS))
async def test_a_terminal_that_was_too_small_gives_the_keys_back_to_the_same_panel(tmp_path, number):
    async with FakeEngine(tmp_path) as engine:
        engine.steps(3)
        app = app_for(tmp_path)
        async with app.run_test(size=(80, 24)) as pilot:
            app.open_screen(number)
            await until(pilot, lambda: app.screen.number == number and app.screen.focused is not None)
            held = app.screen.focused
            await pilot.resize_terminal(20, 6)
            await until(pilot, lambda: app.screen.has_class("-tiny"))
            await pilot.pause()
            await pilot.resize_terminal(80, 24)
            await until(pilot, lambda: app.screen.focused is held and all(node.display for node in held.ancestors_with_self))


async def test_keys_switch_screens_and_esc_goes_back(tmp_path):
    app = app_for(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        for key, number in (("5", 5), ("2", 2), ("1", 1), ("5", 5), ("1", 1)):
            await pilot.press(key)
            await until(pilot, lambda number=number: getattr(app.screen, "number", 0) == number)
        await pilot.press("2")
        await until(pilot, lambda: getattr(app.screen, "number", 0) == 2)
        await pilot.press("escape")
        await until(pilot, lambda: getattr(app.screen, "number", 0) == 1)


async def test_help_names_the_keys_of_panel_screen_and_app(tmp_path):
    app = app_for(tmp_path)
    async with app.run_test(size=(120, 60)) as pilot:
        await until(pilot, lambda: "No runs" in screen_text(app))
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        text = screen_text(app)
        for part in ("This panel", "Next row", "Start a run from a preset", "Everywhere", "not now: no run is chosen"):
            assert part in text, part
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, LuminaScreen))


async def test_palette_finds_runs_and_actions_and_says_why_not(tmp_path):
    (tmp_path / "a-run").mkdir()
    app = app_for(tmp_path)
    async with app.run_test(size=(100, 30)) as pilot:
        await until(pilot, lambda: "No runs" in screen_text(app))
        await pilot.press("colon")
        await until(pilot, lambda: isinstance(app.screen, Palette) and "New run" in screen_text(app))
        field = app.screen.query_one(Input)
        field.value = "resume"
        await until(pilot, lambda: "not now: no run is chosen" in screen_text(app) and "New run" not in screen_text(app))
        field.value = "a-run"
        await until(pilot, lambda: "run a-run" in screen_text(app))
        field.value = "notices"
        await until(pilot, lambda: "What was said so far" in screen_text(app))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, LuminaScreen))


async def test_question_and_prompt(tmp_path):
    app, answers = app_for(tmp_path), []
    async with app.run_test(size=(80, 24)) as pilot:
        app.ask("Stop [/x] run?", [Choice("s", "save", "save"), Choice("x", "stop", "stop")], answers.append, ["\x1b[2J line"])
        await until(pilot, lambda: isinstance(app.screen, Question) and "Stop [/x] run?" in screen_text(app))
        assert "␛[2J line" in screen_text(app)
        await pilot.press("enter")  # no accident
        await pilot.press("x")
        await until(pilot, lambda: answers == ["stop"])
        app.prompt("Number", answers.append, value="a", check=lambda text: None if text.isdigit() else "digits only")
        await until(pilot, lambda: isinstance(app.screen, Prompt))
        await pilot.press("enter")
        await until(pilot, lambda: "digits only" in screen_text(app))
        assert isinstance(app.screen, Prompt)
        app.screen.query_one(Input).value = "12"
        await pilot.press("enter")
        await until(pilot, lambda: answers == ["stop", "12"])
        app.ask("Again?", [Choice("s", "save", "save")], answers.append)
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, LuminaScreen))
        assert answers == ["stop", "12"]


async def test_se03_notices_keep_hostile_text_and_do_not_obey_it(tmp_path):
    app = app_for(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        for text in HOSTILE:
            app.notice(text, "error")
        await pilot.pause()
        assert len(app.notices) == len(HOSTILE)
        await pilot.press("exclamation_mark")
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        shown = screen_text(app)
        assert "[@click=app.leave]x[/]" in shown and "[/x]" in shown
        assert all(c.isprintable() or c == "\n" for c in shown)


async def test_se03_frame_titles_are_never_markup(tmp_path):
    app = app_for(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = app.screen
        screen.set_frame(subject=HOSTILE_TEXT, state=HOSTILE_TEXT[:30], badge="[/x]")
        for panel in screen.query("Drawn"):
            panel.set_title(HOSTILE_TEXT, HOSTILE_TEXT)
            panel.set_foot(HOSTILE_TEXT)
        await pilot.pause()
        assert all(c.isprintable() or c == "\n" for c in screen_text(app))


def test_se01_filter_kills_controls_in_any_segment():
    segments = [Segment(text) for text in HOSTILE] + [Segment("plain"), Segment("\x1b[?25l", None, [(1,)])]
    out = ControlFilter().apply(segments, Color(0, 0, 0))
    assert all(segment.text.isprintable() for segment in out if not segment.control)
    assert out[-1].text == "\x1b[?25l"  # Textual's own control segments pass
    assert [len(segment.text) for segment in out] == [len(segment.text) for segment in segments]


def test_ascii_filter_lets_only_ascii_out_and_keeps_widths():
    text = "│┌─┐ ⡇▒█ 漢字 … · é ✓ ₤"
    assert to_ascii(text).isascii() and len(to_ascii(text)) == cell_len(text)
    assert AsciiFilter().apply([Segment(text)], Color(0, 0, 0))[0].text.isascii()


@pytest.mark.parametrize(
    ("environ", "glyphs", "ansi", "hz"),
    [
        ({"TERM": "xterm-256color"}, "braille", False, 10.0),
        ({"TERM": "xterm", "COLORTERM": "truecolor", "SSH_TTY": "/dev/pts/1"}, "braille", False, 4.0),
        ({"TERM": "linux"}, "block", True, 10.0),
        ({"TERM": "screen"}, "braille", True, 10.0),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, "braille", True, 10.0),
    ],
)
def test_c138_detects_what_the_terminal_can(environ, glyphs, ansi, hz):
    look = detect(environ, encoding="utf-8")
    assert (look.glyphs, look.ansi, look.hz) == (glyphs, ansi, hz)
    assert detect(environ, encoding="ANSI_X3.4-1968").ascii
    assert detect(environ, ascii_only=True, slow=True, encoding="utf-8").hz == 1.0


async def test_readonly_starts_nothing(tmp_path):
    app = app_for(tmp_path, readonly=True)
    async with app.run_test(size=(80, 24)):
        with pytest.raises(LaunchError, match="readonly"):
            await app.start_run(["--preset", "debug"])


async def test_launch_reads_the_answer_and_shows_the_engines_reason(tmp_path, monkeypatch):
    import sys

    from lumina_tui import launching

    assert train_argv(["--preset", "debug"])[1:] == [
        "-m",
        "lumina_engine.cli",
        "train",
        "--preset",
        "debug",
        "--detach",
        "--json",
    ]
    code = "import sys, json; print('noise'); print(json.dumps({'run': 'a', 'path': sys.argv[1]}))"
    monkeypatch.setattr(launching, "train_argv", lambda arguments: [sys.executable, "-c", code, *arguments])
    launched = await launching.launch([str(tmp_path)], tmp_path)
    assert (launched.run, launched.path) == ("a", tmp_path)
    code = "import sys; print('first\\nlumina-engine: no such preset', file=sys.stderr); sys.exit(2)"
    with pytest.raises(LaunchError, match="lumina-engine: no such preset") as error:
        await launching.launch([], tmp_path)
    assert error.value.code == 2 and "first" in error.value.output
    code = "print('{}')"
    with pytest.raises(LaunchError, match="named no run"):
        await launching.launch([], tmp_path)
    code = "import time; time.sleep(60)"
    with pytest.raises(LaunchError, match="no answer"):
        await launching.launch([], tmp_path, timeout=0.2)
    with pytest.raises(LaunchError, match="line break"):
        await launching.launch(["a\nb"], tmp_path)


def test_numbers_for_people():
    assert [number(v) for v in (None, 0, float("nan"), 3.14159, 0.0001234, 2.5e7, 1234.5)] == [
        "-", "0", "nan", "3.14", "1.23e-4", "2.5e7", "1,234"
    ]  # fmt: skip
    assert [count(v) for v in (None, 7, 81_234, 1_580_000_000, 999_700)] == ["-", "7", "81.2 k", "1.58 G", "1.00 M"]
    assert [size(v) for v in (None, 512, 71e9, 1.1e12)] == ["-", "512 B", "71 GB", "1.1 TB"]
    assert [duration(v) for v in (None, 0, 0.35, 4.2, 42, 29_000, 3e5, -1)] == [
        "-", "0 s", "350 ms", "4.2 s", "42 s", "8 h 03 m", "3 d 11 h", "-"
    ]  # fmt: skip
    assert [age(v) for v in (None, 0.5, 42, 500, 9000, 5e5)] == ["-", "now", "42 s", "8 m", "2 h", "6 d"]
    assert whole(48_210) == "48,210"


def test_text_in_cells():
    assert fit("漢字漢字", 5) == "漢字…" and cell_len(fit("漢字漢字", 4, "right")) == 4
    assert fit("abc", 6, "right") == "   abc" and fit("abcdef", 4) == "abc…" and fit("a", 0) == ""
    assert clean("a\x1b[2J\r\nb\tc") == "a␛[2J␍ b c"
    for width in range(30):
        strip = line(width, [("漢字 left text", None)], [("right", None)])
        assert strip.cell_length == width
    assert frame_text("left", "right", 20, "-") == "left ------- right"
    assert frame_text("left", "right", 8, "-") == "left" and frame_text("left", "", 0, "-") == ""
    assert message_lines("a b c\n[/x]", 3) == ["a b", "c", "[/x", "]"] and message_lines("x", 0) == []
