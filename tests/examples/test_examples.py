"""The examples of the README are run, at a size for a test (C122, C123), and quoted as they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumina_engine import AdaptiveTrainingOrchestrator, ConfigPresets, process_oasst_data
from lumina_engine.monitoring.log import read_records
from lumina_engine.monitoring.record import Step
from lumina_engine.run.directory import RunDirectory, RunError, list_runs
from tests.examples import mixtral_style_moe, small_conversation_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("config.", "trainer", "monitor", "dataset", "model =", "summary", '"')  # lines of an example that the README repeats
QUICK = {"max_steps": 2, "seq_length": 64, "eval_interval": 0, "save_interval": 0, "precision": "fp32"}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LUMINA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for info in list_runs(tmp_path / "runs") if (tmp_path / "runs").exists() else ():
        RunDirectory(info.path).signal(signal.SIGKILL)


def trees(path: Path, count: int) -> Path:
    """Made-up Open Assistant trees, one a line."""
    rows = []
    for n in range(count):
        reply = {
            "message_id": f"a{n}",
            "parent_id": f"p{n}",
            "role": "assistant",
            "text": f"It is {2 * n}.",
            "rank": 0,
            "replies": [],
        }
        rows.append(
            {
                "message_tree_id": f"p{n}",
                "tree_state": "ready_for_export",
                "prompt": {"message_id": f"p{n}", "role": "prompter", "text": f"What is {n} + {n}?", "replies": [reply]},
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_c122_c096_the_small_conversation_model(runs: Path) -> None:
    summary = small_conversation_model.main(str(trees(runs / "oasst.jsonl", 60)), str(runs / "train.jsonl"), **QUICK)
    assert (summary["run"], summary["state"], summary["exit_code"]) == ("small_conversation_model", "finished", 0)
    assert summary["step"] == summary["total_steps"] == 2 and summary["starts"] == 1
    assert (Path(summary["path"]) / "checkpoints" / "latest").exists()


def test_c123_c097_experts_over_two_ranks(runs: Path) -> None:
    process_oasst_data(str(trees(runs / "oasst.jsonl", 60)), str(runs / "train.jsonl"))
    small = QUICK | {"batch_size": 1, "gradient_accumulation_steps": 2, "num_gpus": 2}
    summary = mixtral_style_moe.main(str(runs / "train.jsonl"), preset="debug", **small)
    assert (summary["state"], summary["step"]) == ("finished", 2)
    written = json.loads((Path(summary["path"]) / "deepspeed.json").read_text())
    assert written["zero_optimization"]["stage"] == 3 and written["train_batch_size"] == 4


def test_c124_c065_a_loop_of_ones_own_under_the_health_monitor(runs: Path) -> None:
    process_oasst_data(str(trees(runs / "oasst.jsonl", 60)), str(runs / "train.jsonl"))
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "seq_length": 64}
    settings = {
        "max_steps": 3,
        "precision": "fp32",
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "tokenizer": "lumina-1k",
    }
    code = "import json, sys; from tests.examples.custom_loop import main; main(**json.loads(sys.argv[1]))"
    given = json.dumps({"train": "train.jsonl", "tokenizer_name": "lumina-1k", "shape": shape, **settings})
    done = subprocess.run(  # a process of its own: the trainer makes a process group
        [sys.executable, "-c", code, given],
        cwd=runs,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((runs / "reports" / "health.json").read_text())
    assert report["health_status"] == "warming_up", report
    steps = [record.step for record in read_records(runs / "monitoring" / "metrics.jsonl") if isinstance(record, Step)]
    assert steps == [1, 2, 3]


def test_c097_a_second_call_changes_nothing_and_what_is_refused_says_why(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ConfigPresets.debug()
    config.experiment_name = "r"
    orchestrator = AdaptiveTrainingOrchestrator(config)
    plan = orchestrator.initialize_training()
    assert orchestrator.initialize_training() is plan and {"findings", "budget", "argv", "deepspeed"} <= set(plan)
    assert not (runs / "runs" / "r").exists()
    config.num_heads, config.hidden_size = 3, 64
    with pytest.raises(RunError, match="num_heads"):
        AdaptiveTrainingOrchestrator(config).run_adaptive_training()
    monkeypatch.setitem(os.environ, "RANK", "0")
    with pytest.raises(RunError, match="num_gpus"):
        AdaptiveTrainingOrchestrator(config).initialize_training()


@pytest.mark.parametrize("name", ["small_conversation_model", "mixtral_style_moe", "custom_loop"])
def test_c122_c123_c124_the_readme_quotes_what_runs_here(name: str) -> None:
    readme = (ROOT / "README.md").read_text()
    source = (ROOT / "tests" / "examples" / f"{name}.py").read_text()
    body = [line.strip() for line in source.partition("def main")[2].splitlines()[1:] if line.strip().startswith(WORDS)]
    section = readme.partition(f"tests/examples/{name}.py")[2].partition("```\n")[0]
    assert body and section and [line for line in body if line.partition("  #")[0] not in section] == []
