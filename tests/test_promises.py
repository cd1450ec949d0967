"""What the documents promise beyond the engine: names, keys, files, guide; and a test for each row, or the reason why not."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

import lumina_engine
from lumina_engine.config.checks import check
from lumina_engine.config.declare import show
from lumina_engine.config.loading import merge
from lumina_engine.config.schema import Config, infos_of
from tests.promises_table import ALSO, NOT, ROWS, main, read_results, row_tests, table

TESTS = Path(__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT.parent / "shared" / "spec" / "capabilities.md"
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = [
    "Config",
    "ConfigPresets",
    "DeepSeekTransformer",
    "DeepSeekConfig",
    "ConversationTokenizer",
    "ConversationDataset",
    "EnhancedConversationTrainer",
    "MoEOptimizationManager",
    "CheckpointManager",
    "AdaptiveTrainingOrchestrator",
    "AdaptiveHyperparameterOptimizer",
    "ArchitectureEvolution",
    "TrainingHealthMonitor",
    "convert_to_conversation_format",
    "process_oasst_data",
    "validate_data_comprehensive",
    "create_data_summary_report",
    "validate_environment",
    "optimize_cuda_settings",
    "estimate_training_time",
    "ConfigError",
    "Finding",
    "load_model",
    "generate",
]
TOP = {
    "lumina_tui",
    "lumina_engine",
    "presets",
    "tests",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "Dockerfile",
}


def test_each_row_has_a_test_or_a_reason() -> None:
    assert [item["row"] for item in table()] == [f"C{row}" for row in ROWS]
    assert [item["row"] for item in table() if item["state"] == "missing"] == []
    assert all(len(reason) > 20 for reason in NOT.values())


def test_tests_named_for_a_row_exist() -> None:
    found = row_tests()
    assert [(row, name) for row, names in ALSO.items() for name in names if name not in found[row]] == []


def junit(path: Path, **tests: str) -> Path:
    """A file as pytest writes it; a test's name -> the element within it."""
    cases = "".join(f'<testcase classname="tests.a" name="{name}">{inner}</testcase>' for name, inner in tests.items())
    path.write_text(f'<?xml version="1.0"?><testsuites><testsuite name="pytest">{cases}</testsuite></testsuites>')
    return path


def test_rows_tell_how_their_tests_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, *others = (tests[0] for row, tests in sorted(row_tests().items()) if tests and row in (53, 117, 120, 121))
    bad, skipped = "<failure message='m'/>", "<skipped/>"
    ends = {f"{one}[a]": "", f"{one}[b]": bad, others[0]: skipped, f"{others[1]}[x]": skipped, f"{others[1]}[y]": ""}
    path = junit(tmp_path / "r.xml", **ends)
    assert read_results(path) == {one: {"green", "failed"}, others[0]: {"skipped"}, others[1]: {"green", "skipped"}}
    states = {str(item["row"]): item["state"] for item in table(read_results(path))}
    assert [states[row] for row in ("C53", "C117", "C120", "C121", "C126")] == [
        "failed",
        "skipped",
        "green",
        "not run",
        "explained",
    ]
    counts = {str(item["row"]): (item["ran"], len(item["tests"])) for item in table(read_results(path))}  # type: ignore[arg-type]
    assert counts["C53"][0] == 1 and counts["C117"][0] == 0 and counts["C126"] == (0, 0)
    assert all(item["ran"] is None for item in table())
    assert main(["--results", str(path)]) == 1
    shown = capsys.readouterr().out
    assert re.search(rf"^C53 +failed +.*{one}", shown, re.MULTILINE) and "1 failed, 1 green" in shown
    every = {test: "" for tests in row_tests().values() for test in tests}
    assert main(["--results", str(junit(path, **every))]) == 0 == main([])
    broken = {**every, one: "<error message='m'/>"}
    assert main(["--json", "--results", str(junit(path, **broken))]) == 1


def documented_names() -> list[str]:
    text = SPEC.read_text(encoding="utf-8").partition("Python: every public name imports")[2].partition("\n## ")[0]
    moved = re.findall(r"`[\w.]+` → `([^`]+)`", text.partition("Inner modules")[0])
    also = re.search(r"Also public: `([^`]+)`", text)
    return [name for names in [*moved, also.group(1) if also else ""] for name in names.split(", ")]


def documented_keys() -> list[str]:
    section = SPEC.read_text(encoding="utf-8").partition("## 3. Configuration keys")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [key for cell in first for key in re.findall(r"`(\w+)`", cell)]


def test_c150_every_documented_name_is_there() -> None:
    assert [name for name in NAMES if name not in lumina_engine.__all__] == []
    if not SPEC.is_file():
        pytest.skip("the specification is not beside this repository; the copy of its names was checked")
    assert sorted(documented_names()) == sorted(NAMES)


def test_c053_every_documented_key_is_there() -> None:
    if not SPEC.is_file():
        pytest.skip("the specification is not beside this repository; tests/config/table.py has the keys")
    found = documented_keys()
    assert len(found) > 100 and [key for key in found if key not in infos_of(Config)] == []


def test_c119_public_names_have_docstrings_and_types() -> None:
    for name in sorted(set(lumina_engine.__all__) - {"__version__"}):
        item = getattr(lumina_engine, name)
        assert inspect.getdoc(item), name
        if inspect.isfunction(item):
            untyped = [p.name for p in inspect.signature(item).parameters.values() if p.annotation is p.empty]
            assert not untyped and "return" in item.__annotations__, (name, untyped)


def test_c118_c119_one_way_to_check_style_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text()  # no tomllib in Python 3.10
    assert "\ntest = [" in project and "\ndev = [" in project
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    run = (ROOT / ".ci" / "run").read_text()
    assert [hook["entry"] for hook in hooks] == ["ruff format", "ruff check", "mypy"]
    assert all(f'/{hook["entry"].split()[0]}"' in run for hook in hooks)


def test_c117_the_image_trains_by_default_and_not_as_root() -> None:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)
    assert (
        "WORKDIR /app" in lines
        and 'VOLUME ["/app/data", "/app/runs"]' in lines
        and lines[-1] == 'CMD ["lumina-engine", "train"]'
    )
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users and users[-1] not in ("root", "0")
    assert "docker build -t lumina ." in README and "-v $(pwd)/data:/app/data -v $(pwd)/runs:/app/runs" in README


def test_c117_the_documented_container_can_write_where_it_must() -> None:
    """Docker makes a folder that is mounted and missing as root; a user without an entry in /etc/passwd has / for a home."""
    text = (ROOT / "Dockerfile").read_text()
    for said in (README, text):
        command = said.index("docker run --gpus all --user $(id -u):$(id -g) -v $(pwd)/data:/app/data")
        assert 0 < said.index("mkdir -p data runs") < command
    home = re.search(r"^ENV .*HOME=(\S+)", text, re.MULTILINE)
    assert (
        home is not None and re.search(rf"chmod 1777 .*{home[1]}\b", text) and re.search(r"^ENV .*USER=\w", text, re.MULTILINE)
    )


def test_c120_licence_and_how_to_contribute() -> None:
    assert (ROOT / "LICENSE").read_text().startswith("MIT License") and (ROOT / ".gitignore").is_file()
    section = README.partition("## Contributing")[2]
    assert all(
        word in section for word in ("config.yaml", "engine.log", "doctor --json", "ruff", "mypy", "pytest", "pre-commit")
    )


def test_c121_the_top_level_is_the_documented_one() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    there = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".") and entry.name not in ignored}
    assert {name for name in there if not name.endswith(".egg-info")} == TOP


def advice() -> list[str]:
    section = README.partition("## Performance and trouble")[2].partition("\n## ")[0]
    return re.findall(r"`(\w+=[^`\s]+)`", section)


@pytest.mark.parametrize("text", advice())
def test_c125_each_advice_of_the_guide_is_a_valid_override(text: str) -> None:
    key, _, value = text.partition("=")
    config = merge(None, None, [text]).config
    assert show(getattr(config, key)).lower() == value or float(getattr(config, key)) == float(value)
    assert [f.message for f in check(config) if f.severity == "error"] == []


def test_c125_the_guide_covers_what_it_must() -> None:
    keys = {text.partition("=")[0] for text in advice()}
    must = (
        "use_deepspeed gradient_checkpointing zero_stage cpu_offload load_balancing_weight capacity_factor num_workers compile"
    )
    assert set(must.split()) <= keys


def test_each_file_with_slow_tests_is_in_the_list_of_them() -> None:
    _, _, listed = (TESTS / "README.md").read_text(encoding="utf-8").partition("\nMarked `slow`:\n")
    listed = listed[: listed.index("\n\nMarked `nightly`")]
    slow = {str(p.relative_to(TESTS)) for p in TESTS.rglob("test_*.py") if re.search(r"mark\.slow", p.read_text("utf-8"))}
    assert slow - set(re.findall(r"`([\w/]+\.py)`", listed)) == set()
