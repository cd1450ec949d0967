"""C129: the form model: origins, problems, undo, diff, YAML, drafts, the command that gives the same configuration."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.config.loading import merge
from lumina_engine.config.schema import Config, ConfigError
from lumina_tui.drafts import drop_draft, load_draft, save_draft
from lumina_tui.form import INFOS, UNDO_STEPS, Form, check_value, edit_text


def rebuilt(form: Form) -> Config:
    """The Config that the form's command line gives, read as the engine reads it."""
    words = form.arguments()
    options = {"--preset": None, "--config": None}
    while words and words[0] in options:
        options[words[0]], words = words[1], words[2:]
    from pathlib import Path

    file = None if options["--config"] is None else Path(options["--config"])
    return merge(options["--preset"], file, words).config


@pytest.mark.parametrize(("preset", "advice"), [("b7", "set 1 or 32"), (None, "set 1 or 8")])
def test_c129_advice_names_the_value_of_the_preset_at_hand(preset, advice) -> None:
    form = Form.from_preset(preset) if preset else Form.from_config(Config())
    problem = form.set_text("num_layers", "0")
    assert problem is not None and problem.fix == advice == form.findings()[0].fix


def test_c129_a_copy_of_a_preset() -> None:
    form = Form.from_preset("b1")
    assert form.changes() == [] and not form.dirty and form.findings() == []
    assert (form.origin("hidden_size"), form.origin("weight_decay")) == ("preset", "default")
    assert form.arguments() == ["--preset", "b1"]


def test_c130_without_a_preset_the_command_names_the_one_that_the_engine_would_take() -> None:
    from lumina_engine.commands import common, train

    form = Form.from_config(Config(seed=4))
    words = form.arguments()
    assert words[:2] == ["--preset", "debug"] and rebuilt(form) == Config(seed=4)
    parser = train.argparse.ArgumentParser()
    train.add_arguments(parser)
    assert common.load_config(parser.parse_args(words), default_preset="debug").config == Config(seed=4)


def test_c129_each_key_is_checked_and_refused_text_is_kept() -> None:
    form = Form.from_preset("b1")
    problem = form.set_text("warmup_steps", "-5")
    assert problem is not None
    assert problem.line() == "warmup_steps = -5: must be a whole number from 0 to 1,000,000, or auto; set 0 or auto"
    assert form.value("warmup_steps") == "-5" and form.origin("warmup_steps") == "you" and form.changed("warmup_steps")
    assert [f.keys[0] for f in form.findings()] == ["warmup_steps"] and form.config().warmup_steps == "auto"
    assert form.set_text("warmup_steps", "100") is None and form.findings() == []
    assert [(c.name, c.before, c.after) for c in form.changes()] == [("warmup_steps", "auto", "100")]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "3e-4", 3e-4),
        ("batch_size", "1,000", 1000),
        ("batch_size", " 16 ", 16),
        ("max_steps", "null", None),
        ("max_steps", "", None),
        ("warmup_steps", "auto", "auto"),
        ("use_moe", "off", False),
        ("adaptive", "off", "off"),
        ("experiment_name", "12", "12"),
        ("tokenizer", "lumina-1k", "lumina-1k"),
        ("train_data_path", "a b.jsonl", "a b.jsonl"),
        ("train_data_path", "[a, b]", ["a", "b"]),
        ("train_data_path", "null", None),
        ("deepspeed_overrides", "{dump_state: true}", {"dump_state": True}),
        ("deepspeed_overrides", "", {}),
        ("trackers", "[]", []),
    ],
)
def test_c129_text_of_a_field_as_meant(name: str, text: str, value: object) -> None:
    got, problem = check_value(INFOS[name], text)
    assert problem is None and got == value and type(got) is type(value)
    again, problem = check_value(INFOS[name], edit_text(INFOS[name], got))
    assert problem is None and again == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("learning_rate", "fast"),
        ("precision", "bf61"),
        ("batch_size", "1.5"),
        ("deepspeed_overrides", "{a"),
        ("trackers", "[x]"),
        ("experiment_name", "a/b"),
        ("task_weights", "{a: x}"),
    ],
)
def test_c129_bad_text_names_the_field_and_a_fix(name: str, text: str) -> None:
    value, problem = check_value(INFOS[name], text)
    assert value == text and problem is not None and name in problem.message and problem.fix


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(INFOS)), st.text(max_size=12))
def test_c129_no_text_breaks_the_form(name: str, text: str) -> None:
    form = Form.from_preset("debug")
    form.set_text(name, text)
    form.findings()
    assert isinstance(form.to_yaml(), str) and isinstance(form.shown(name), str)
    form.undo()
    assert form.changes() == []


def test_c129_undo_and_redo_at_the_model() -> None:
    form = Form.from_preset("b1")
    form.set_text("batch_size", "8")
    form.set_text("batch_size", "8")
    form.cycle("precision", 1)
    form.load_preset("b7")
    assert form.preset == "b7" and form.value("batch_size") == 1
    assert form.undo() == "everything" and form.preset == "b1" and form.value("batch_size") == 8
    assert form.undo() == "precision" and form.undo() == "batch_size" and form.undo() is None
    assert form.changes() == [] and not form.dirty
    assert [form.redo() for _ in range(4)] == ["batch_size", "precision", "everything", None]
    assert form.preset == "b7"
    form.undo()
    form.set_text("seed", "4")
    assert form.redo() is None, "an edit forgets what was undone"


def test_c129_undo_keeps_200_steps() -> None:
    form = Form.from_preset("b1")
    for step in range(UNDO_STEPS + 20):
        form.set_text("seed", str(step + 1))
    assert sum(form.undo() is not None for _ in range(UNDO_STEPS + 20)) == UNDO_STEPS
    assert form.value("seed") == 20


def test_c129_cycle_goes_round_and_reset_goes_back() -> None:
    form = Form.from_preset("b1")
    seen = []
    for _ in range(6):
        form.cycle("zero_stage", 1)
        seen.append(form.value("zero_stage"))
    assert seen == [0, 1, 2, 3, "auto", 0]
    form.cycle("zero_stage", -1)
    assert form.value("zero_stage") == "auto" and not form.cycle("batch_size", 1)
    form.cycle("use_moe", 1)
    assert form.value("use_moe") is False
    form.set_text("hidden_size", "99999999")
    form.reset("hidden_size")
    assert form.value("hidden_size") == 1536 and form.origin("hidden_size") == "preset" and "hidden_size" not in form.bad


def test_c129_trial_text_is_checked_without_being_entered() -> None:
    form = Form.from_preset("b1")
    assert [f.code for f in form.findings(trial=("moe_top_k", "9"))] == ["top_k"]
    assert [f.code for f in form.findings(trial=("moe_top_k", "nine"))] == ["bad_value"]
    assert form.findings() == [] and not form.dirty


def test_c129_written_files_come_back(tmp_path) -> None:
    form = Form.from_preset("b1")
    form.set_text("learning_rate", "5e-4")
    form.set_text("batch_size", "0")
    path = form.save(tmp_path / "configs" / "my.yaml")
    assert not form.dirty
    again = Form.from_file(path)
    assert again.preset == "b1" and again.value("learning_rate") == 5e-4 and again.origin("learning_rate") == "file"
    assert again.bad.keys() == {"batch_size"} and again.bad["batch_size"].where.startswith(str(path))
    assert [c.name for c in again.changes()] == ["batch_size", "learning_rate"]
    again.set_text("batch_size", "3")
    again.save(path)
    assert Config.load(path) == again.config()


def test_c129_file_that_no_form_can_hold_keeps_its_text(tmp_path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("batch_sise: 4\nseed: 3\n")
    form = Form.from_file(path)
    assert form.text == path.read_text() and [f.code for f in form.findings()] == ["unknown_key"] and form.value("seed") == 3
    assert form.apply_yaml("batch_sise: 4") and form.text is not None
    assert form.apply_yaml("batch_size: 4\nseed: 3\n") == [] and form.text is None and form.findings() == []
    assert form.value("batch_size") == 4
    with pytest.raises(ConfigError, match="no such file"):
        Form.from_file(tmp_path / "none.yaml")


def test_c129_yaml_edit_is_one_undo_step_and_marks_what_changed() -> None:
    form = Form.from_preset("b1")
    text = form.to_yaml(full=True).replace("batch_size: 4", "batch_size: 6")
    assert form.apply_yaml(text) == []
    assert form.value("batch_size") == 6 and form.origin("batch_size") == "you" and form.origin("hidden_size") == "preset"
    assert form.undo() == "batch_size" and form.changes() == []
    assert form.apply_yaml(form.to_yaml(full=True)) == [] and form.undo() is None


@pytest.mark.parametrize("preset", [None, "debug", "b7"])
def test_c130_command_line_gives_the_same_configuration(preset: str | None, tmp_path) -> None:
    form = Form.from_preset(preset) if preset else Form.from_config(Config(seed=4))
    for name, text in {
        "learning_rate": "0.00012345678901",
        "train_data_path": "[a b.jsonl, 'c''d']",
        "experiment_name": "12",
        "adaptive": "off",
        "max_steps": "7",
        "deepspeed_overrides": "{dump_state: true, zero_optimization: {round_robin_gradients: true}}",
        "tokenizer": "null",
    }.items():
        assert form.set_text(name, text) is None, name
    assert rebuilt(form) == form.config()
    form.save(tmp_path / "x.yaml")
    assert form.arguments() == ["--config", str(tmp_path / "x.yaml")] and rebuilt(form) == form.config()
    form.set_text("seed", "9")
    assert form.arguments()[2:] == ["seed=9"] and rebuilt(form) == form.config()


def test_c129_origins_of_a_config_at_hand() -> None:
    config = merge("debug", None, ["seed=3"]).config
    form = Form.from_config(config, preset="debug")
    assert form.origin("seed") == "you" and form.origin("hidden_size") == "preset"
    loaded = merge("debug", None, ["seed=3"])
    assert Form.from_config(loaded.config, loaded.origins, "debug").origin("seed") == "cli"


def test_c129_draft_survives_and_bad_drafts_are_left_out(tmp_path) -> None:
    path = tmp_path / "deep" / "draft.json"
    form = Form.from_preset("b7")
    form.set_text("batch_size", "0")
    form.set_text("train_data_path", "[a, b]")
    save_draft(form, path)
    assert path.stat().st_mode & 0o777 == 0o600 and [p.name for p in path.parent.iterdir()] == ["draft.json"]
    again = load_draft(path)
    assert again is not None and again.changes() == form.changes() and again.bad.keys() == {"batch_size"}
    for broken in ("", "[]", '{"values": 3}', '{"preset": "nope", "values": {"zzz": 1}}', "x" * 2_000_000):
        path.write_text(broken)
        found = load_draft(path)
        assert found is None or (found.preset is None and found.changes() == [])
    drop_draft(path)
    assert load_draft(path) is None


def test_c129_a_value_set_back_to_the_default_is_written() -> None:
    form = Form.from_preset("b1")
    form.set_text("num_layers", "8")  # the default; b1 has 16
    assert "num_layers: 8" in form.to_yaml()
