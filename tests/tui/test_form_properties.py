"""C129: properties of the form model: any walk of edits, undos, redos and loads against a plain list of states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.config.presets import NAMES
from lumina_engine.config.schema import Config
from lumina_tui.drafts import load_draft, save_draft
from lumina_tui.form import INFOS, UNDO_STEPS, Form, reference_values, same

TEXTS = {
    "seed": ("3", "4", "x"),
    "batch_size": ("1", "8", "0"),
    "precision": ("bf16", "fp32", "auto"),
    "max_steps": ("null", "7", "-1"),
    "train_data_path": ("a.jsonl", "[a, b]", "null"),
    "deepspeed_overrides": ("{dump_state: true}", "{a", "{}"),
    "use_moe": ("true", "false", "maybe"),
}
EDIT = st.sampled_from([("set", name, text) for name, texts in TEXTS.items() for text in texts])
STEP = st.one_of(
    EDIT,
    EDIT,
    st.sampled_from([("undo", "", ""), ("redo", "", "")]),
    st.sampled_from([("reset", name, "") for name in TEXTS] + [("cycle", "precision", "")]),
    st.sampled_from([("load", name, "") for name in NAMES[:3]]),
)


def state(form: Form) -> tuple[Any, ...]:
    values = tuple((name, type(form.value(name)).__name__, repr(form.value(name)), form.origin(name)) for name in INFOS)
    return form.preset, form.path, sorted(form.bad), values


def do(form: Form, step: tuple[str, str, str]) -> None:
    kind, name, text = step
    if kind == "set":
        form.set_text(name, text)
    elif kind == "load":
        form.load_preset(name)
    elif kind in ("undo", "redo"):
        getattr(form, kind)()
    elif kind == "reset":
        form.reset(name)
    else:
        form.cycle(name, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=25))
def test_c129_undo_and_redo_are_those_of_a_list_of_states(steps: list[tuple[str, str, str]]) -> None:
    form = Form.from_preset("debug")
    past, here, future = [], state(form), []
    for step in steps:
        do(form, step)
        now = state(form)
        if step[0] == "undo" and past:
            future.append(here)
            here = past.pop()
        elif step[0] == "redo" and future:
            past.append(here)
            here = future.pop()
        elif step[0] not in ("undo", "redo") and (now != here or step[0] == "load"):
            past, here, future = [*past, here][-UNDO_STEPS:], now, []
        assert now == here
    while form.undo() is not None:
        pass
    assert form.changes() == [] and not form.dirty and form.preset == "debug"


@settings(max_examples=60, deadline=None)
@given(st.lists(EDIT, max_size=12))
def test_c129_the_diff_is_what_differs_and_each_change_has_its_origin(steps: list[tuple[str, str, str]]) -> None:
    form = Form.from_preset("b1")
    for step in steps:
        do(form, step)
    base = reference_values("b1")
    changed = {c.name for c in form.changes()}
    assert changed == {n for n in INFOS if n in form.bad or not same(form.value(n), base[n])}
    touched = {name for _, name, _ in steps}
    assert changed <= touched and all(form.origin(n) == "you" for n in changed)
    assert all(form.origin(n) in ("preset", "default") for n in INFOS if n not in touched)
    assert form.dirty == bool(changed)
    for name in changed:
        form.reset(name)
    assert form.changes() == [] and form.config() == Config(**base)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(EDIT, max_size=10), written=st.booleans())
def test_c129_a_draft_brings_back_values_origins_problems_and_what_was_written(
    steps: list[tuple[str, str, str]], written: bool, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("draft")
    form = Form.from_preset("debug")
    for step in steps[: len(steps) // 2]:
        do(form, step)
    if written:
        form.save(folder / "my.yaml")
    for step in steps[len(steps) // 2 :]:
        do(form, step)
    save_draft(form, folder / "draft.json")
    again = load_draft(folder / "draft.json")
    assert again is not None and state(again) == state(form)
    assert again.dirty == form.dirty and again.disk_state() == form.disk_state() == "same"


def test_c129_a_written_file_that_changes_or_goes_is_seen(tmp_path: Path) -> None:
    form = Form.from_preset("debug")
    assert form.disk_state() == "same"
    path = form.save(tmp_path / "my.yaml")
    assert form.disk_state() == "same" and not form.dirty
    form.set_text("seed", "9")
    assert form.dirty and form.disk_state() == "same"
    path.write_text("seed: 1\n")
    assert form.disk_state() == "changed"
    path.unlink()
    assert form.disk_state() == "gone"


def test_c129_loading_a_file_is_one_step_and_undo_goes_back_to_the_file_before(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    form = Form.from_preset("b1")
    form.set_text("seed", "7")
    form.save(one)
    form.set_text("seed", "8")
    two.write_text("seed: 1\nbatch_sise: 3\n")
    form.load(Form.from_file(two))
    assert form.path == two and form.text is not None and form.text_findings
    assert form.undo() == "everything" and form.path == one and form.value("seed") == 8 and form.dirty and form.text is None
    assert form.undo() == "seed" and not form.dirty
    assert form.redo() == "seed" and form.redo() == "everything" and form.path == two


def test_c129_a_file_written_with_errors_says_so_in_its_head_and_is_no_base_of_a_command(tmp_path: Path) -> None:
    form = Form.from_preset("b1")
    form.set_text("batch_size", "0")
    path = form.save(tmp_path / "my.yaml")
    assert path.read_text().splitlines()[:2][1].startswith("# 1 error: cannot be launched")
    assert Form.from_file(path).preset == "b1"
    form.set_text("batch_size", "3")
    assert form.arguments() == ["--preset", "b1", "batch_size=3"]
    form.save(path)
    assert form.arguments() == ["--config", str(path)] and "error" not in path.read_text()


def test_c129_text_of_the_yaml_view_that_was_not_taken_over_is_kept(tmp_path: Path) -> None:
    form = Form.from_preset("b1")
    form.pending = "seed: [\n"
    save_draft(form, tmp_path / "d.json")
    again = load_draft(tmp_path / "d.json")
    assert again is not None and again.pending == "seed: [\n"
    (tmp_path / "x.yaml").write_text("batch_sise: 3\nseed: 5\n")
    broken = Form.from_file(tmp_path / "x.yaml")
    save_draft(broken, tmp_path / "d.json")
    again = load_draft(tmp_path / "d.json")
    assert again is not None and again.text == broken.text and again.value("seed") == 5
