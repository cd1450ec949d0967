"""C128, C129, C139: what the configuration screens show, without a screen: lines of fields, budget, catalogue, previews."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.config.budget import budget, stage_table
from lumina_engine.config.checks import check
from lumina_engine.config.machine import GB, Accelerator, Machine, gb_text
from lumina_engine.config.presets import NAMES, ConfigPresets
from lumina_engine.config.schema import SECTIONS
from lumina_tui import budget_text, catalogue, checking, config_text
from lumina_tui.field_lines import TWO_COLUMNS, FieldLine, columns, field_lines
from lumina_tui.form import INFOS, Form
from lumina_tui.own_presets import own_presets, wrong_name
from lumina_tui.preview import command, in_force, preview_lines
from lumina_tui.widgets.text_panel import Line

LAPTOP = Machine([], 16 * GB, 4, 500 * GB)
TWO = Machine([Accelerator("H100", 80 * GB)] * 2, 1000 * GB, 32, 2000 * GB)


def text_of(lines: list[Line]) -> str:
    return "\n".join("".join(text for text, _ in line) for line in lines)


# fields


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(0, 250),
    st.integers(0, 60),
    st.integers(0, 30),
)
def test_c129_every_line_has_one_place_in_the_columns(extra: list[int], width: int, height: int, top: int) -> None:
    lines = [FieldLine(f"f{n}", "" if not k else f"w{k}") for n, more in enumerate(extra) for k in range(more + 1)]
    where = columns(lines, width, height, min(top, len(lines)))
    places = [where.place(index) for index in range(len(lines))]
    seen = [place for place in places if place is not None]
    assert len(set(seen)) == len(seen) and all(0 <= c < where.count and 0 <= r < where.rows for c, r in seen)
    assert all(where.index(*place) == index for index, place in enumerate(places) if place is not None)
    assert where.rows <= max(1, height) and where.count * where.width + where.count - 1 <= max(width, 0)
    if width >= TWO_COLUMNS and len(lines) <= where.page and where.top == 0 and len(lines) <= 2 * max(1, height):
        assert len(seen) == len(lines)


def test_c129_marks_are_in_words_below_the_field() -> None:
    form = Form.from_preset("b1")
    form.set_text("batch_size", "16")
    form.set_text("warmup_steps", "-5")
    problems = checking.worst_by_field(form.findings())
    words = {
        item.name: item.text for item in field_lines(form, ["batch_size", "warmup_steps", "seed"], problems, 90) if item.text
    }
    assert words["batch_size"] == "changed: preset b1 has 4" and words["warmup_steps"].startswith("error: -5: must be")
    assert "seed" not in words
    form.set_text("rope_theta", "100")
    problems = checking.worst_by_field(form.findings())
    assert any("warning: " in item.text for item in field_lines(form, ["rope_theta"], problems, 90))


def test_c129_sections_count_changes_warnings_and_errors() -> None:
    form = Form.from_preset("b1")
    form.set_text("batch_size", "16")
    form.set_text("warmup_steps", "-5")
    form.set_text("max_steps", "9")
    marks = checking.section_marks(form, "training", checking.worst_by_field(form.findings()))
    assert (marks.text, marks.role) == ("3* 1!", "bad")
    assert checking.section_marks(form, "data", {}).text == ""
    assert sum(checking.section_marks(form, s, {}).changed for s in SECTIONS) == 3


@pytest.mark.parametrize("name", INFOS)
def test_c129_every_field_tells_range_unit_origin_and_reason(name: str) -> None:
    form = Form.from_preset("debug")
    info = INFOS[name]
    for width in (0, 58, 200):
        told = config_text.help_title(name, width) + text_of(config_text.help_lines(name, width))
        assert info.requirement() in told and info.help in told and info.unit in told
    assert config_text.help_foot(form, name).startswith(("the default", "from the preset"))


# checks and budget


@pytest.mark.parametrize("name", NAMES)
def test_c129_findings_and_budget_are_those_of_the_command_line(name: str) -> None:
    for machine in (LAPTOP, TWO):
        found = checking.checked(Form.from_preset(name), machine)
        assert list(found.findings) == check(ConfigPresets.get(name), machine)
        assert found.figures == budget(ConfigPresets.get(name), machine)


def test_c129_the_budget_follows_the_text_that_is_typed() -> None:
    form = Form.from_preset("debug")
    now = checking.checked(form, LAPTOP).figures
    typed = checking.checked(form, LAPTOP, ("batch_size", "64")).figures
    assert now is not None and typed is not None and typed["tokens_per_step"] == 8 * now["tokens_per_step"]
    assert checking.checked(form, None).reason.startswith("looking at this machine")
    form.set_text("attention", "mla")
    latent = checking.checked(form, LAPTOP).figures
    assert latent is not None and latent["parameters"]["attention"] != now["parameters"]["attention"]


def test_c139_tokens_are_looked_up_once_for_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x" * 4000)
    form = Form.from_preset("b1")
    form.set_text("train_data_path", str(tmp_path))
    count = checking.DataLook()
    assert count.of(form.config()) is None
    tokens, lines = count.look(form.config())
    assert tokens == (1000, "guessed from the size of the files") and count.of(form.config()) == (tokens, lines)
    assert len(lines) == 1 and lines[0].startswith("unknown until the data is prepared")
    figures = checking.checked(form, LAPTOP, tokens=tokens, data=lines).figures
    assert figures is not None and figures["steps"] == 1 and "guessed" in figures["basis"]["steps"]
    assert lines[0][:20] in text_of(budget_text.detail_lines(figures, 70))
    form.set_text("train_data_path", "other")
    assert count.of(form.config()) is None


def test_c139_memory_by_component_against_what_there_is() -> None:
    figures = budget(ConfigPresets.b1(), TWO)
    lines = budget_text.memory_lines(figures, 60)
    labels = [line[0][0].strip() for line in lines[:9]]
    parts = ["weights", "experts", "gradients", "optimizer", "activations", "logits", "buckets", "temporaries"]
    assert labels == [*parts, "at once"]
    cells = {label: line[1][0].count("█") for label, line in zip(labels, lines, strict=False)}
    assert cells["experts"] <= cells["weights"] and max(cells[part] for part in parts) < cells["at once"]
    assert cells["at once"] <= sum(cells[part] for part in parts if part != "experts") + 3
    assert "most in the " in text_of(lines[9:])
    assert (
        budget_text.bar(0, 10, 5) == "░" * 5
        and budget_text.bar(0.001, 10, 5) == "█░░░░"
        and budget_text.bar(99, 10, 5) == "█" * 5
    )
    assert budget_text.bar(1, 0, 5) == "" and budget_text.bar(1, 1, 0) == ""


@pytest.mark.parametrize("width", [0, 5, 40, 74, 200])
@pytest.mark.parametrize("name", ["debug", "b1", "b300"])
def test_c139_what_does_not_fit_says_what_would(name: str, width: int) -> None:
    for machine in (LAPTOP, TWO):
        figures = budget(ConfigPresets.get(name), machine)
        text = text_of(budget_text.detail_lines(figures, width))
        fits = figures["device"]["total"] <= figures["device"]["limit"]
        assert ("does not fit" not in text) == fits and all(advice in text for advice in figures["advice"])
        assert ("what would make it fit" in text) == bool(figures["advice"]) == (not figures["fits"])
        assert f"{figures['tokens_per_step']:,}" in text and "guessed" in text and "computed" in text
        assert f"saving a checkpoint {gb_text(figures['host']['saving'])}" in text
        assert len(budget_text.summary_lines(figures, width)) == 3


# previews


def test_c129_the_preview_is_the_command_and_the_json_of_the_engine() -> None:
    form = Form.from_preset("debug")
    form.set_text("seed", "9")
    text = text_of(preview_lines(form, LAPTOP, form.findings(LAPTOP)))
    assert (
        "lumina-engine train --preset debug seed=9" in text
        and '"train_batch_size": 8' in text
        and "training.worker RUN" in text
    )
    force = in_force(form.config(), LAPTOP, [])
    assert force.resolved is not None and json.loads(force.deepspeed) == force.resolved.to_deepspeed(force.world)
    form.set_text("batch_size", "0")
    text = text_of(preview_lines(form, LAPTOP, form.findings(LAPTOP)))
    assert "without the refused values of batch_size" in text and "errors are mended" in text
    assert command(["--config", "a b.yaml"]) == "lumina-engine train --config 'a b.yaml'"


# own presets, catalogue


@pytest.mark.parametrize("name", [*NAMES, "B7", "", " ", "a/b", "../x", "-x", "a\x1b", "x" * 65, "ä"])
def test_c128_names_that_clash_or_are_no_names_are_refused(name: str) -> None:
    assert wrong_name(name)


def test_c128_a_saved_preset_is_listed_under_yours_and_starts_by_its_file() -> None:
    assert wrong_name("my_run.v2") is None
    form = Form.from_preset("b1")
    form.set_text("seed", "5")
    path = form.save(own_presets() / "mine.yaml")
    entries = catalogue.own_entries()
    assert [entry.name for entry in entries] == ["mine"] and entries[0].path == path
    assert entries[0].form is not None and entries[0].form.preset == "b1"
    assert catalogue.state_of(entries[0]) == ("b1 + 1", "dim")
    assert entries[0].form.arguments() == ["--config", str(path)]


def test_c128_a_broken_file_has_its_line_and_cause(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 3\nx: [\n")
    (tmp_path / "b.yaml").write_text("seed: 3\n\nbatch_sise: 3\n")
    (tmp_path / "c.yaml").write_text("seed: nine\n")
    (tmp_path / "d.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "e.txt").write_text("no")
    causes = {entry.name: entry.error for entry in catalogue.own_entries([tmp_path, tmp_path / "none"])}
    assert [*causes] == ["a", "b", "c", "d"]
    assert causes["a"].startswith("line 3: not YAML") and causes["b"].startswith("line 3: batch_sise: unknown key")
    assert causes["c"].startswith("line 1: seed = nine") and "UTF-8" in causes["d"]


def test_c128_verdicts_rows_and_order_come_from_the_budget() -> None:
    entries = catalogue.preset_entries()
    for machine in (LAPTOP, TWO):
        found = catalogue.verdicts(entries, machine)
        for entry in entries:
            figures = budget(entry.config, machine)
            assert found[entry.key].fits == (figures["device"]["total"] <= figures["device"]["limit"])
            assert (entry.active, entry.total) == (figures["parameters"]["active"], figures["parameters"]["total"])
    assert [e.name for e in catalogue.in_order(entries, "name", {})] == sorted(NAMES)
    assert [e.name for e in catalogue.in_order(entries, "size", {})] == list(NAMES)
    fits = catalogue.verdicts(entries, TWO)
    order = [fits[e.key].fits for e in catalogue.in_order(entries, "fit", fits)]
    assert order == sorted(order, reverse=True)
    assert [e.name for e in catalogue.matching(entries, "b1 built")] == ["b1", "b14", "b100"]


def test_c128_the_detail_has_every_stage_time_and_cache() -> None:
    entry = next(e for e in catalogue.preset_entries() if e.name == "b1")
    text = text_of(catalogue.detail_lines(entry, TWO))
    table = stage_table(ConfigPresets.b1(), TWO)
    for row in table:
        name = "3 + offload" if row["offload"] else f"ZeRO-{row['stage']}"
        line = next(line for line in text.splitlines() if name in line)
        assert f"{row['total'] / 1e9:.1f}"[:2] in line and ("yes" if row["fits"] else "no") in line
    assert "a token" in text and "20.1 B tokens" in text and "(guessed)" in text
