"""C128, C129, C130: presets, editor and launch by keyboard, on a fixed machine and without an engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina_engine.config.checks import check
from lumina_engine.config.presets import NAMES, ConfigPresets
from lumina_tui.application import Start
from lumina_tui.drafts import load_draft
from lumina_tui.own_presets import own_presets
from lumina_tui.screens.config import ConfigScreen
from lumina_tui.screens.config_layers import FieldSearch, YamlView
from lumina_tui.screens.dialogs import Prompt, Question, Sheet
from lumina_tui.screens.launch import LaunchScreen
from lumina_tui.screens.presets import PresetsScreen
from lumina_tui.terminal import to_ascii
from lumina_tui.widgets.fields import FieldList
from lumina_tui.widgets.text_panel import wrapped

from .config_app import ASCII, LAPTOP, App, config_of, enter, place, ready  # noqa: F401
from .helpers import screen_text, until

# presets


async def test_c128_presets_with_the_numbers_of_the_command_line() -> None:
    rows = ConfigPresets.compare_presets()
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.open_presets()
        screen = await ready(pilot, PresetsScreen)
        text = screen_text(pilot.app)
        assert all(name in text for name in NAMES) and "494 K" in text and "3.25 M" in text and "CPU, 4 cores, 16 GB" in text
        assert f"{rows['debug']['active_parameters']:,} active" in text
        assert (screen.verdicts["debug"].text, screen.verdicts["b7"].text) == ("yes", "no")


async def test_c128_own_files_broken_ones_too_and_the_hint_without_any() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.open_presets()
        screen = await ready(pilot, PresetsScreen)
        assert "W in the editor saves one" in screen_text(pilot.app)
        Path("configs").mkdir()
        Path("configs/mine.yaml").write_text("# preset: b1\nseed: 3\n")
        Path("configs/broken.yaml").write_text("x:\n  - [/red]\nbatch_sise: 1\n")
        await pilot.press("r")
        await until(pilot, lambda: "mine" in screen_text(pilot.app))
        screen.table.move_to("configs/broken.yaml")
        await pilot.pause()
        text = screen_text(pilot.app)
        assert "configs/broken.yaml:1: x: unknown key" in text.replace("\n", "").replace("││", "") or "unknown key" in text
        await pilot.press("a")
        assert any("it has errors" in n.text for n in pilot.app.notices)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, YamlView))


async def test_c128_pretended_hardware_marks_and_diff() -> None:
    async with App().run_test(size=(160, 45)) as pilot:
        pilot.app.open_presets(select="b1")
        screen = await ready(pilot, PresetsScreen)
        assert screen.chosen.key == "b1"
        await pilot.press("p")
        await until(pilot, lambda: isinstance(pilot.app.screen, Prompt))
        await pilot.press("8", "x", "enter")
        assert isinstance(pilot.app.screen, Prompt), "a wrong form of devices is refused"
        await pilot.press("8", "0", "G", "B", "enter")
        await until(pilot, lambda: screen.pretended is not None and screen.is_current)
        text = screen_text(pilot.app)
        assert "8 x GPU 80 GB (pretended)" in text and "22+ GPU" in text and "ZeRO-1" in text
        await pilot.press("space", "down", "d")
        await until(pilot, lambda: isinstance(pilot.app.screen, Sheet))
        assert "num_layers" in screen_text(pilot.app)
        await pilot.press("escape")
        assert "against b1" in screen_text(pilot.app)


# the editor


async def test_c129_empty_says_what_to_press() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.open_config()
        screen = await ready(pilot, ConfigScreen)
        assert "2 picks a preset, or lumina FILE.yaml" in screen_text(pilot.app)
        await pilot.press("u", "w", "E", "d", "]", "D", "a")
        assert screen.form is None and any("2 picks a preset" in n.text for n in pilot.app.notices)


async def test_c129_journey_with_two_wrong_values() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="debug")
        await enter(pilot, screen, "warmup_steps", "-5")
        await enter(pilot, screen, "moe_top_k", "9")
        await until(pilot, lambda: len(screen.findings) == 2)
        text = screen_text(pilot.app)
        assert "Findings  2 errors" in text and "Experts" in text and "1* 1!" in text
        assert "more than num_experts = 8" in text
        assert "last valid values" in text, "a refused text is in no figure of the budget"
        lines = {f.line() for f in screen.findings}
        assert {f.line() for f in check(screen.form.config()) if f.code != "bad_value"} <= lines
        await pilot.press("4")
        launch = await ready(pilot, LaunchScreen)
        await until(pilot, lambda: launch.review is not None)
        await pilot.press("enter")
        assert pilot.app.starts == [] and any("blocked" in n.text for n in pilot.app.notices)
        await pilot.press("3", "]")
        await until(pilot, lambda: screen.is_current)
        assert screen.fields.current == "warmup_steps"
        await pilot.press("D", "]")
        await until(pilot, lambda: screen.fields.current == "moe_top_k")
        await pilot.press("u")
        assert screen.form.value("warmup_steps") == "-5"
        await pilot.press("ctrl+r")
        await enter(pilot, screen, "moe_top_k", "2")
        await until(pilot, lambda: screen.findings == [])
        assert [c.name for c in screen.form.changes()] == ["moe_top_k"]
        await pilot.press("a")
        await until(pilot, lambda: isinstance(pilot.app.screen, LaunchScreen) and not pilot.app.screen.review.blocked)
        assert pilot.app.screen.review.arguments[:4] == ("--preset", "debug", "moe_top_k=2", "--run")


async def test_c129_problem_stands_under_the_field_while_typing() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="debug")
        screen.go_to_field("num_layers")
        await pilot.press("enter", "9", "9", "9")
        await until(pilot, lambda: "999: must be a whole number from 1 to 512" in screen_text(pilot.app))
        assert screen.form.value("num_layers") == 2 and not screen.form.dirty
        await pilot.press("escape")
        await until(pilot, lambda: screen.findings == [])
        assert screen.is_current and screen.fields.has_focus and screen.form.value("num_layers") == 2


async def test_c129_choices_by_arrow_and_by_list() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b1")
        screen.go_to_field("precision")
        await pilot.press("right")
        assert screen.form.value("precision") == "fp32"
        await pilot.press("left", "enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, Question))
        await pilot.press("3")
        await until(pilot, lambda: screen.is_current and screen.form.value("precision") == "bf16")
        screen.go_to_field("qk_norm")
        await pilot.press("space")
        assert screen.form.value("qk_norm") is True
        screen.go_to_field("num_layers")
        await pilot.press("right")
        assert any("no fixed choices" in n.text for n in pilot.app.notices)


async def test_c129_search_finds_a_field_in_any_section() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b1")
        await pilot.press("slash")
        await until(pilot, lambda: isinstance(pilot.app.screen, FieldSearch))
        await pilot.press(*"keep", "enter")
        await until(pilot, lambda: screen.is_current)
        assert screen.fields.current == "keep_checkpoints" and screen.section == "checkpoint"


async def test_c129_yaml_view_checks_and_takes_over() -> None:
    async with App().run_test(size=(100, 30)) as pilot:
        screen = await config_of(pilot, preset="b1")
        await pilot.press("E")
        await until(pilot, lambda: isinstance(pilot.app.screen, YamlView))
        view = pilot.app.screen
        area = view.query_one("TextArea")
        area.text = area.text.replace("batch_size: 4", "batch_sise: 4")
        await until(pilot, lambda: "did you mean batch_size" in screen_text(pilot.app))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, Question))
        await pilot.press("k")
        await until(pilot, lambda: pilot.app.screen is view)
        area.text = area.text.replace("batch_sise: 4", "batch_size: 5")
        await pilot.press("escape")
        await until(pilot, lambda: screen.is_current)
        assert screen.form.value("batch_size") == 5 and len(screen.form.changes()) == 1


async def test_c129_yaml_view_can_drop_its_edits() -> None:
    async with App().run_test(size=(100, 30)) as pilot:
        screen = await config_of(pilot, preset="b1")
        await pilot.press("E")
        await until(pilot, lambda: isinstance(pilot.app.screen, YamlView))
        pilot.app.screen.query_one("TextArea").text = "seed: [1"
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, Question))
        await pilot.press("x")
        await until(pilot, lambda: screen.is_current)
        assert not screen.form.dirty


async def test_c129_write_a_file_and_never_overwrite_by_accident() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b1")
        await enter(pilot, screen, "seed", "7")
        await pilot.press("w")
        await until(pilot, lambda: isinstance(pilot.app.screen, Prompt))
        await pilot.press("enter")
        path = Path("configs/my_b1.yaml")
        await until(pilot, path.exists)
        await until(pilot, lambda: screen.is_current and not screen.form.dirty)
        assert "my_b1.yaml" in screen_text(pilot.app).splitlines()[0]
        path.write_text("seed: 8\n")
        import os

        os.utime(path, (1, 1))
        await pilot.press("w")
        await until(pilot, lambda: isinstance(pilot.app.screen, Prompt))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, Question))
        await pilot.press("escape")
        await until(pilot, lambda: screen.is_current)
        assert path.read_text() == "seed: 8\n"
        await pilot.press("r")
        await until(pilot, lambda: screen.form.value("seed") == 8)


async def test_c129_draft_comes_back_and_presets_are_one_undo_step() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b1")
        await enter(pilot, screen, "seed", "7")
        draft = load_draft()
        assert draft is not None and [c.name for c in draft.changes()] == ["seed"]
        pilot.app.open_config(preset="b7")
        await until(pilot, lambda: screen.form.preset == "b7")
        await pilot.press("u")
        assert screen.form.preset == "b1" and screen.form.value("seed") == 7
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.open_config()
        screen = await ready(pilot, ConfigScreen)
        assert screen.form is not None and screen.form.value("seed") == 7


async def test_c129_opens_a_file_from_the_command_line_and_says_what_is_wrong() -> None:
    Path("my.yaml").write_text("batch_size: 0\nrope_theta: 100\n")
    async with App(start=Start(config=Path("my.yaml"))).run_test(size=(80, 24)) as pilot:
        screen = await ready(pilot, ConfigScreen)
        await until(pilot, lambda: len(screen.findings) == 2)
        assert "my.yaml:1: batch_size = 0" in screen_text(pilot.app)
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, path=Path("none.yaml"))
        assert "none.yaml: no such file" in screen_text(pilot.app)


async def test_c129_stale_file_is_told() -> None:
    Path("my.yaml").write_text("batch_size: 3\n")
    async with App().run_test(size=(80, 24)) as pilot:
        await config_of(pilot, path=Path("my.yaml"))
        import os

        os.utime("my.yaml", (1, 1))
        await pilot.press("2")
        await until(pilot, lambda: isinstance(pilot.app.screen, PresetsScreen))
        await pilot.press("3")
        await until(pilot, lambda: any("changed on disk" in n.text for n in pilot.app.notices))


async def test_c129_n_and_shift_n_go_through_what_the_search_found() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b1")
        await pilot.press("n")
        assert any("nothing was searched for yet" in n.text for n in pilot.app.notices)
        await pilot.press("slash")
        await until(pilot, lambda: isinstance(pilot.app.screen, FieldSearch))
        await pilot.press(*"offload", "enter")
        await until(pilot, lambda: screen.is_current)
        first = screen.fields.current
        assert first is not None and "offload" in first
        seen = [first]
        for _ in range(3):
            before = screen.fields.current
            await pilot.press("n")
            await until(pilot, lambda before=before: screen.fields.current != before)
            seen.append(screen.fields.current)
        assert len(set(seen)) == 4
        await pilot.press("N", "N", "N")
        await until(pilot, lambda: screen.fields.current == first)


async def test_c139_budget_and_preview_are_one_key_away_at_80x24() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b1")
        await until(pilot, lambda: "does not fit" in screen_text(pilot.app))
        await pilot.press("b")
        await until(pilot, lambda: isinstance(pilot.app.screen, Sheet))
        text = screen_text(pilot.app)
        assert all(
            part in text for part in ("weights", "experts", "gradients", "optimizer", "activations", "logits", "buckets")
        )
        assert "of 16 GB: does not fit" in text
        await pilot.press("escape", "p")
        await until(pilot, lambda: "lumina-engine train --preset b1" in screen_text(pilot.app))
        await pilot.press("escape")
        await until(pilot, lambda: screen.is_current)


async def test_c139_the_budget_changes_with_what_is_typed_before_it_is_entered() -> None:
    async with App().run_test(size=(100, 30)) as pilot:
        screen = await config_of(pilot, preset="debug")
        await until(pilot, lambda: "2,048 tokens/step" in screen_text(pilot.app))
        screen.go_to_field("batch_size")
        await pilot.press("enter", "1", "6")
        await until(pilot, lambda: "4,096 tokens/step" in screen_text(pilot.app))
        assert screen.form.value("batch_size") == 8
        await pilot.press("escape")
        await until(pilot, lambda: "2,048 tokens/step" in screen_text(pilot.app))


async def test_c129_save_as_preset_is_listed_under_yours_and_clashes_are_refused() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b1")
        await enter(pilot, screen, "seed", "7")
        await pilot.press("W")
        await until(pilot, lambda: isinstance(pilot.app.screen, Prompt))
        pilot.app.screen.query_one("Input").value = "b7"
        await pilot.press("enter")
        await until(pilot, lambda: "built-in preset" in screen_text(pilot.app))
        pilot.app.screen.query_one("Input").value = "mine"
        await pilot.press("enter")
        path = own_presets() / "mine.yaml"
        await until(pilot, path.exists)
        await until(pilot, lambda: screen.is_current and screen.form.path == path and not screen.form.dirty)
        pilot.app.open_presets()
        await until(pilot, lambda: "mine" in screen_text(pilot.app) and "yours" in screen_text(pilot.app))


async def test_c129_a_file_that_changes_on_disk_is_said_for_as_long_as_it_is_so() -> None:
    path = Path("my.yaml")
    path.write_text("# preset: debug\nseed: 3\n")
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, path=path)
        await enter(pilot, screen, "batch_size", "4")
        path.write_text("# preset: debug\nseed: 44\n")
        screen._looked = 0.0
        await until(pilot, lambda: "changed on disk: r reload, w overwrite, d diff" in screen_text(pilot.app))
        await pilot.press("d")
        await until(pilot, lambda: isinstance(pilot.app.screen, Sheet))
        assert "here → on disk" in screen_text(pilot.app) and "44" in screen_text(pilot.app)
        await pilot.press("escape", "r")
        await until(pilot, lambda: screen.form.value("seed") == 44)
        assert "changed on disk:" not in screen_text(pilot.app)
        await pilot.press("u")
        assert screen.form.value("seed") == 3 and screen.form.value("batch_size") == 4
        path.unlink()
        screen._looked = 0.0
        await until(pilot, lambda: "gone from disk: w writes it again" in screen_text(pilot.app))


async def test_c129_yaml_that_does_not_parse_opens_at_its_line_and_locks_the_fields() -> None:
    Path("my.yaml").write_text("".join(f"# line {n}\n" for n in range(40)) + "seed: [3\nbatch_size: 2\n")
    async with App(start=Start(config=Path("my.yaml"))).run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: isinstance(pilot.app.screen, YamlView))
        area = pilot.app.screen.query_one("TextArea")
        assert area.cursor_location[0] >= 40 and "1 error" in screen_text(pilot.app)
        await pilot.press("escape")
        screen = await ready(pilot, ConfigScreen)
        await pilot.press("enter")
        assert screen.fields.editing is None and any("E mends it" in n.text for n in pilot.app.notices)
        await pilot.press("E")
        await until(pilot, lambda: isinstance(pilot.app.screen, YamlView))
        pilot.app.screen.query_one("TextArea").text = "seed: 3\n"
        await pilot.press("escape")
        await until(pilot, lambda: screen.is_current and screen.form.text is None and screen.form.value("seed") == 3)
        assert not screen.fields.locked


async def test_c129_text_of_the_yaml_view_survives_a_lost_line() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        await config_of(pilot, preset="b1")
        await pilot.press("E")
        await until(pilot, lambda: isinstance(pilot.app.screen, YamlView))
        pilot.app.screen.query_one("TextArea").text = "seed: [unfinished"
        await until(pilot, lambda: (draft := load_draft()) is not None and draft.pending == "seed: [unfinished")
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.open_config()
        await until(pilot, lambda: isinstance(pilot.app.screen, YamlView))
        assert pilot.app.screen.query_one("TextArea").text == "seed: [unfinished"


async def test_c129_a_draft_is_one_undo_away_when_something_else_is_opened() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b1")
        await enter(pilot, screen, "seed", "7")
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b7")
        assert screen.form.preset == "b7" and any(
            "copy of b1 was not written: u brings it back" in n.text for n in pilot.app.notices
        )
        await pilot.press("u")
        assert screen.form.preset == "b1" and screen.form.value("seed") == 7


async def test_c129_a_configuration_with_errors_is_written_flagged_and_not_launched() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="debug")
        await enter(pilot, screen, "warmup_steps", "-5")
        await pilot.press("w")
        await until(pilot, lambda: isinstance(pilot.app.screen, Prompt))
        await pilot.press("enter")
        await until(pilot, lambda: Path("configs/my_debug.yaml").exists() and screen.is_current)
        assert any("with 1 error: it cannot be launched yet" in n.text for n in pilot.app.notices)
        pilot.app.open_launch(path=Path("configs/my_debug.yaml"))
        launch = await ready(pilot, LaunchScreen)
        await until(pilot, lambda: launch.review is not None and launch.review.blocked)
        await pilot.press("enter")
        assert pilot.app.starts == []


async def test_c129_200x60_has_two_field_columns_with_help_diff_and_budget_beside() -> None:
    async with App().run_test(size=(200, 60)) as pilot:
        screen = await config_of(pilot, preset="b1")
        assert screen.fields.columns.count == 2
        names = ("sections", "fields", "side_help", "diff", "details")
        regions = {name: screen.query_one(f"#{name}").region for name in names}
        assert regions["sections"].right <= regions["fields"].x and regions["fields"].right <= regions["side_help"].x
        assert all(regions[name].area for name in names)
        await pilot.press("G")
        first = screen.fields.columns.place(screen.fields._line_of(screen.fields.current))
        assert first is not None and first[0] == 1
        await pilot.press("enter", "x")
        await until(pilot, lambda: "error: x" in screen_text(pilot.app).replace("\n", " "))
        field = screen.fields.query_one("ValueInput")
        assert field.region.x > screen.fields.region.x + screen.fields.columns.width
        await pilot.press("escape")
        await pilot.click(FieldList, offset=(3, 2))
        assert screen.fields.current == screen.fields._lines[1].name


async def test_c128_filter_sort_and_the_cause_in_the_row() -> None:
    Path("configs").mkdir()
    Path("configs/broken.yaml").write_text("seed: 3\nbatch_sise: 1\n")
    Path("configs/[red]x.yaml").write_text("# preset: debug\nseed: 3\n")
    async with App().run_test(size=(100, 30)) as pilot:
        pilot.app.open_presets()
        screen = await ready(pilot, PresetsScreen)
        await until(pilot, lambda: "! broken  line 2" in screen_text(pilot.app))
        assert "[red]x" in screen_text(pilot.app)
        await pilot.press("o")
        rows = [row.key for row in screen.table.rows if not row.rule]
        assert rows[: len(NAMES)] == sorted(NAMES)
        await pilot.press("slash")
        await until(pilot, lambda: isinstance(pilot.app.screen, Prompt))
        await pilot.press(*"b1", "enter")
        await until(pilot, lambda: "with b1" in screen_text(pilot.app))
        assert [row.key for row in screen.table.rows if not row.rule] == ["b1", "b100", "b14"]
    async with App().run_test(size=(100, 30)) as pilot:
        pilot.app.open_presets()
        screen = await ready(pilot, PresetsScreen)
        assert screen.sort == "name", "remembered"


async def test_c128_own_files_are_read_again_on_focus() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.open_presets()
        await ready(pilot, PresetsScreen)
        own_presets().mkdir(parents=True)
        (own_presets() / "later.yaml").write_text("seed: 1\n")
        pilot.app.app_focus = False
        pilot.app.app_focus = True
        await until(pilot, lambda: "later" in screen_text(pilot.app))


HOSTILE = "[/][@click=app.bell]x[bold]\u202e\u009b2J\x1b]0;t\x07\x1b[2J"


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
async def test_se01_hostile_names_values_and_texts_on_all_three_screens(size: tuple[int, int]) -> None:
    Path("configs").mkdir()
    hostile = HOSTILE.replace("/", "")
    Path(f"configs/{hostile}.yaml").write_text(f"# preset: debug\n'{hostile}': 1\nseed: 3\n", encoding="utf-8")
    (own_presets()).mkdir(parents=True)
    (own_presets() / f"{hostile}.yaml").write_text(json.dumps({"train_data_path": HOSTILE, "experiment_name": HOSTILE}))

    def clean(app: App) -> bool:
        text = screen_text(app)
        return not any(c in text for c in "\x1b\u202e\x9b\x07")

    async with App().run_test(size=size) as pilot:
        pilot.app.open_presets()
        screen = await ready(pilot, PresetsScreen)
        await until(pilot, lambda: len(screen.own) == 2)
        for entry in screen.own:
            screen.table.move_to(entry.key)
            await pilot.pause()
            assert clean(pilot.app)
            pilot.app.open_config(path=entry.path)
            await until(pilot, lambda: isinstance(pilot.app.screen, ConfigScreen | YamlView))
            assert clean(pilot.app)
            if isinstance(pilot.app.screen, YamlView):
                await pilot.press("escape")
            config = await ready(pilot, ConfigScreen)
            config.go_to_field("train_data_path")
            await pilot.press("d")
            assert clean(pilot.app)
            await pilot.press("escape", "p")
            assert clean(pilot.app)
            await pilot.press("escape", "4")
            launch = await ready(pilot, LaunchScreen)
            await until(pilot, lambda launch=launch: launch.review is not None and not launch.reviewing)
            assert clean(pilot.app) and launch.review.blocked
            pilot.app.open_presets()
            await pilot.pause()


@pytest.mark.parametrize("number", [2, 3, 4])
async def test_c138_ascii_leaves_only_ascii(number: int) -> None:
    async with App(look=ASCII).run_test(size=(160, 45)) as pilot:
        pilot.app.open_screen(number, **({} if number == 2 else {"preset": "b1"}))
        screen = await ready(pilot, {2: PresetsScreen, 3: ConfigScreen, 4: LaunchScreen}[number])
        await until(pilot, lambda: number != 4 or (screen.review is not None and not screen.reviewing))
        assert to_ascii(screen_text(pilot.app)).isascii() and "?????" not in to_ascii(screen_text(pilot.app))


# all three


@pytest.mark.parametrize("number", [2, 3, 4])
async def test_c138_no_size_breaks_a_screen(number: int) -> None:
    async with App().run_test(size=(120, 40)) as pilot:
        pilot.app.open_screen(number, **({} if number == 2 else {"preset": "b1"}))
        await ready(pilot, {2: PresetsScreen, 3: ConfigScreen, 4: LaunchScreen}[number])
        for size in ((20, 6), (10, 3), (1, 1), (59, 15), (80, 24), (200, 60)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            assert screen_text(pilot.app)


@pytest.mark.parametrize(("number", "marker"), [(2, "Space mark"), (3, "Enter edit"), (4, "Enter launch")])
async def test_c138_80x24_has_its_keys_in_the_last_line(number: int, marker: str) -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        pilot.app.open_screen(number, **({} if number == 2 else {"preset": "b1" if number == 3 else "debug"}))
        screen = await ready(pilot, {2: PresetsScreen, 3: ConfigScreen, 4: LaunchScreen}[number])
        await until(pilot, lambda: marker in screen_text(pilot.app).splitlines()[-1])
        assert all(len(line) <= 80 for line in screen_text(pilot.app).splitlines())
        await pilot.press("?")
        await until(pilot, lambda: isinstance(pilot.app.screen, Sheet))
        assert screen.heading in screen_text(pilot.app)


async def test_se01_hostile_values_reach_no_screen_as_escapes() -> None:
    config = ConfigPresets.debug()
    config.train_data_path = "[@click=app.bell]x[/]\u202e\u009b2J"
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, config=config, preset="debug")
        screen.go_to_field("train_data_path")
        await pilot.pause()
        text = screen_text(pilot.app)
        assert "[@click=app.be" in text and "\u202e" not in text and "\x9b" not in text
        pilot.app.open_screen(4)
        launch = await ready(pilot, LaunchScreen)
        await until(pilot, lambda: launch.review is not None)
        assert "\u202e" not in screen_text(pilot.app) and "\x9b" not in screen_text(pilot.app)


def test_c138_text_is_wrapped_at_words_and_never_too_wide() -> None:
    from rich.cells import cell_len

    parts = [("one two ", "text"), ("three\tfour", "dim"), (" " + "x" * 25, "bad"), ("日本語日本語日本語", "text")]
    for width in (4, 7, 10, 20, 80):
        lines = wrapped(parts, width)
        assert all(sum(cell_len(text) for text, _ in line) <= width for line in lines)
        joined = "".join(text for line in lines for text, _ in line).replace(" ", "")
        assert joined == "onetwothreefour" + "x" * 25 + "日本語日本語日本語"


async def test_c138_moving_the_cursor_repaints_two_lines() -> None:
    async with App().run_test(size=(80, 24)) as pilot:
        screen = await config_of(pilot, preset="b1")
        field = screen.query_one(FieldList)
        regions: list[Any] = []
        original = field.refresh
        field.refresh = lambda *given, **named: (regions.append(given), original(*given, **named))[1]  # type: ignore[method-assign]
        await pilot.press("down")
        assert regions and all(given and given[0].height == 1 for given in regions)


def test_layer_screens_import_no_torch() -> None:
    code = (
        "import sys, lumina_tui.application, lumina_tui.screens.presets, lumina_tui.screens.config, lumina_tui.screens.launch\n"
        "bad = {'torch', 'deepspeed', 'transformers', 'plotext'} & set(sys.modules)\nassert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
