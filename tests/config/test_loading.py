"""C46, R36, R37, S5: YAML and the command line become one Config, with origins, line numbers and all problems at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.config import yaml_text
from lumina_engine.config.loading import merge, text_layer, to_yaml
from lumina_engine.config.presets import NAMES, ConfigPresets
from lumina_engine.config.schema import Config, ConfigError, fields_info


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str | bytes) -> Path:
        path = tmp_path / "my.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def lines_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        merge(None, path, overrides)
    return [f.line() for f in caught.value.findings]


def test_c046_precedence_and_origins(write) -> None:
    path = write("training:\n  batch_size: 3\n  learning_rate: 1e-4\n")
    loaded = merge("debug", path, ["learning_rate=3e-4", "task-temperature=2"])
    assert (loaded.config.hidden_size, loaded.config.batch_size, loaded.config.learning_rate) == (128, 3, 3e-4)
    names = ("num_heads", "batch_size", "learning_rate", "task_temperature", "weight_decay")
    assert [loaded.origins[n] for n in names] == ["preset", "file", "cli", "cli", "default"]
    assert loaded.where["batch_size"] == f"{path}:2" and loaded.where["learning_rate"] == "command line"
    assert set(loaded.origins) == {info.name for info in fields_info()}


@pytest.mark.parametrize("name", NAMES)
def test_c046_save_load_equal(name: str, tmp_path: Path) -> None:
    config = ConfigPresets.get(name)
    path = config.save(tmp_path / "deep" / "c.yaml")
    assert Config.load(path) == config
    assert Config.from_dict(config.to_dict()) == config == Config.from_dict(config.to_dict(sectioned=False))
    assert [p.name for p in path.parent.iterdir()] == ["c.yaml"]


def test_c046_sections_flat_and_mixed_are_the_same(write) -> None:
    flat = merge(None, write("batch_size: 4\nnum_experts: 4\nadaptive: off\n"), []).config
    grouped = merge(
        None, write("training: {batch_size: 4}\nmoe:\n  num_experts: 4\nadaptive:\n  adaptive: off\nrun:\n"), []
    ).config
    assert flat == grouped and flat.adaptive == "off"


def test_c046_problems_name_file_and_line_all_at_once(write) -> None:
    path = write(
        "training:\n  learning_rate: 1e-4\n  batch_sise: 4\nmodel:\n  batch_size: 3\n  hidden_size: 100\n  num_heads: 7\n"
        "modle: {a: 1}\nseed: -1\nseed_: 2\nprecision:\n"
    )
    found = lines_of(path, "num_layers=x", "nonsense")
    for line, words in {
        3: "batch_sise: unknown key; did you mean batch_size?",
        5: "batch_size stands in section model; move it to section training",
        8: "modle: unknown key; did you mean model?",
        9: "seed = -1: must be a whole number",
        10: "seed_: unknown key; did you mean seed?",
        11: "precision = null: must be one of auto",
    }.items():
        assert any(text.startswith(f"{path}:{line}: {words}") for text in found), (line, found)
    assert any(text.startswith("command line: num_layers = x: must be a whole number") for text in found)
    assert any(text.startswith("command line: nonsense: not of the form key=value") for text in found)
    assert any(text.startswith("hidden_size = 100: not a multiple of num_heads = 7") for text in found)


@pytest.mark.parametrize("name", [info.name for info in fields_info()])
def test_r36_typo_in_yaml_and_on_the_command_line(name: str, write) -> None:
    typo = name[0] + name[2:]
    assert lines_of(write(f"# a comment\n{typo}: 1\n"))[0].endswith(f":2: {typo}: unknown key; did you mean {name}?")
    assert lines_of(write(""), f"{typo}=1")[0] == f"command line: {typo}: unknown key; did you mean {name}?"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1E-4", "learning_rate", 1e-4),
        ("learning_rate: .5", "learning_rate", 0.5),
        ("adaptive: off", "adaptive", "off"),
        ('adaptive: "off"', "adaptive", "off"),
        ("adaptive: false", "adaptive", "off"),
        ("use_moe: off", "use_moe", False),
        ("use_moe: no", "use_moe", False),
        ("use_moe: on", "use_moe", True),
        ("router_normalize: yes", "router_normalize", True),
        ("use_moe: False", "use_moe", False),
        ("experiment_name: 2024-01-01", "experiment_name", "2024-01-01"),
        ("experiment_name: 0123", "experiment_name", "0123"),
        ("experiment_name: 12", "experiment_name", "12"),
        ("experiment_name: no", "experiment_name", "no"),
        ("max_steps: 1e3", "max_steps", 1000),
        ("reduce_bucket_size: 200_000_000", "reduce_bucket_size", 200_000_000),
        ("seed: 0x10", "seed", 16),
        ("num_workers: 010", "num_workers", 10),
        ("max_steps: ~", "max_steps", None),
        ("max_steps: null", "max_steps", None),
        ("train_data_path: [a.jsonl, 'b c.jsonl']", "train_data_path", ["a.jsonl", "b c.jsonl"]),
        ("task_weights: {code: 3e-1, chat: 1}", "task_weights", {"code": 0.3, "chat": 1.0}),
        ("deepspeed_overrides: {}", "deepspeed_overrides", {}),
        ("alert_command: []", "alert_command", []),
        ("\ufeffseed: 4", "seed", 4),
        ("seed: 4\r\n", "seed", 4),
    ],
)
def test_r37_yaml_values_as_meant(text: str, name: str, value: object, write) -> None:
    got = getattr(merge(None, write(text), []).config, name)
    assert got == value and type(got) is type(value)
    if "\n" not in text and "\ufeff" not in text:
        key, _, word = text.partition(": ")
        assert getattr(merge(None, None, [f"{key}={word}"]).config, name) == value


def test_r37_number_where_text_is_meant_asks_for_quotes(write) -> None:
    assert "write it in quotes" in lines_of(write("tokenizer: 1e5"))[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", ":2: seed is given twice, first in line 1; remove one of them"),
        ("seed: 1\ntraining:\n  seed: 2\n", ":3: seed is given twice"),
        ("a: !!python/object/apply:os.system [x]\n", ":1: the tag !!python/object/apply:os.system is not allowed"),
        ("seed: !!binary aGk=\n", ":1: the tag !!binary is not allowed"),
        ("[" * 40 + "]" * 40, "nested deeper than 16 levels"),
        ("{a: " * 40 + "1" + "}" * 40, "nested deeper than 16 levels"),
        ("a: &a [*a]\n", "too large or refers to itself"),
        ("a: &a [1]\nb: [" + ", ".join(["*a"] * 17) + "]\n", "more than 16 aliases"),
        ("- 1\n- 2\n", ":1: is not a mapping"),
        ("just text", ":1: is not a mapping"),
        ("seed: 1\n---\nseed: 2\n", "another document"),
        ("\tseed: 1", ":1: not YAML: found character '\\t'"),
        ("seed: [1\n", "not YAML"),
        ("a: 1\n b: 2\n", ":2: not YAML"),
        ("training: 5\n", ":1: training is a section, not a key"),
        ("seed: 1\nbad: \x1b[2J\n", "not YAML"),
        ("[a, b]: 1\n", "a key must be a word"),
        ("seed: " + "9" * 5000 + "\n", "is not a number"),
    ],
)
@pytest.mark.row("SE07")
def test_s05_bad_yaml_is_one_line_with_the_place(text: str, words: str, write) -> None:
    found = lines_of(write(text))
    assert len(found) == 1 and words in found[0] and "\n" not in found[0], found


@pytest.mark.row("SE07")
def test_s05_alias_bomb_is_small(write) -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 4)}]" for i in range(1, 5))
    found = lines_of(write(f"a0: &a0 [{', '.join('x' * 2000)}]\n{levels}\n"))
    assert "too large" in found[0] or "aliases" in found[0]


LARGE = {
    "list": "a: [" + "a," * 100_000 + "a]",
    "lines": "a:\n" + "- a\n" * 100_000,
    "mapping": "\n".join(f"k{i}: 1" for i in range(70_000)),
    "keys": "a: {" + ",".join(f"k{i}" for i in range(100_000)) + "}",
    "pairs": "a: [" + "?," * 100_000 + "?]",
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.row("SE07")
def test_se07_nodes_are_counted_while_they_are_composed(kind: str, write, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("compose_scalar_node", "compose_sequence_node", "compose_mapping_node"):
        compose = getattr(yaml_text._Loader, name)
        monkeypatch.setattr(
            yaml_text._Loader, name, lambda *words, compose=compose: made.append(None) or compose(*words), raising=False
        )
    [found] = lines_of(write(LARGE[kind]))
    assert "too large" in found and len(made) <= 2 * yaml_text.MAX_NODES + 1  # beside each value there may be a key


def test_se07_the_largest_document_is_taken() -> None:
    items = yaml_text.MAX_NODES - 2  # the mapping and the list are nodes too
    assert yaml_text.plain(yaml_text.parse("a: [" + "a," * items + "]")) == {"a": ["a"] * items}
    keys = yaml_text.MAX_NODES - 1
    assert len(yaml_text.parse("\n".join(f"k{i}: 1" for i in range(keys)))) == keys
    for text in ("a: [" + "a," * items + "a]", "\n".join(f"k{i}: 1" for i in range(keys + 1))):
        with pytest.raises(yaml_text.YamlError, match="too large or refers to itself"):
            yaml_text.parse(text)


@pytest.mark.row("SE07")
def test_s05_files_that_are_none(tmp_path: Path, write) -> None:
    assert "larger than 1 MiB" in lines_of(write("#" + "x" * (1 << 20)))[0]
    assert ":2: is not UTF-8" in lines_of(write(b"seed: 1\nexperiment_name: \xff\n"))[0]
    assert "no such file; did you mean" in lines_of(tmp_path / "mi.yaml")[0]
    assert "is a folder" in lines_of(tmp_path)[0]
    import os

    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in lines_of(tmp_path / "pipe")[0]


def test_c046_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="preset debgu: no such preset; did you mean debug"):
        merge("debgu", None, [])
    with pytest.raises(ConfigError, match="did you mean b14"):
        ConfigPresets.get("b144")


_VALUES = {
    "int": st.integers(1, 2000),
    "float": st.floats(1e-12, 1e12),
    "text": st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1),
    "list": st.lists(st.text(st.characters(blacklist_categories=("Cs", "Cc"))), max_size=3),
}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_r37_any_accepted_value_survives_save_and_load(data) -> None:
    values = {}
    for info in data.draw(st.lists(st.sampled_from(fields_info()), max_size=6, unique_by=lambda i: i.name)):
        strategy = _VALUES.get(info.kind)
        if info.choices and (strategy is None or data.draw(st.booleans())):
            strategy = st.sampled_from(info.choices)
        if strategy is None:
            strategy = st.booleans() if info.kind == "bool" else st.just(info.default)
        value = data.draw(strategy)
        try:
            Config(**{info.name: value})
        except ConfigError:
            continue
        values[info.name] = value
    config = Config(**values)
    layer = text_layer(to_yaml(config), "x")
    assert layer.findings == [] and Config(**layer.values) == config


@settings(max_examples=80, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(st.characters(blacklist_categories=("Cs", "Cc"))), lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=5), c, max_size=3), max_leaves=12))  # fmt: skip  # noqa: E501
def test_r37_plain_data_survives_yaml(value) -> None:
    assert yaml_text.plain(yaml_text.parse(yaml_text.dump(value))) == value


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80) | st.text(st.sampled_from(" \n\t:-[]{}&*!|>'\"#%@,?ab01.~e"), max_size=60))
def test_s05_no_text_raises_anything_but_yaml_error(text: str) -> None:
    layer = text_layer(text, "x")
    assert all(f.severity == "error" and "\n" not in f.line() for f in layer.findings)


def test_c046_file_modes_and_atomic_write(tmp_path: Path) -> None:
    path = Config().save(tmp_path / "a.yaml")
    path.chmod(0o600)
    Config(seed=3).save(path)
    assert path.stat().st_mode & 0o777 == 0o600 and Config.load(path).seed == 3


def test_layer_config_imports_no_torch() -> None:
    code = (
        "import sys; from lumina_engine.config import loading, presets, checks, budget, deepspeed, resolve;"
        "loading.merge('debug', None, []); bad = {'torch', 'deepspeed', 'textual', 'numpy', 'msgspec'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
