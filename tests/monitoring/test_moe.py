"""Routing diagnostics from records and from a model, and DeepSpeed's configuration for experts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumina_engine import Config, ConfigError, MoEOptimizationManager
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog, read_records
from lumina_engine.monitoring.moe import balance_score, stability

EVEN, SKEW, GONE = [25.0] * 4, [55.0, 15.0, 15.0, 15.0], [100.0, 0.0, 0.0, 0.0]


def run_of(folder: Path, *rows: list[list[float]], dropped: float = 0.0, saves: tuple[int, ...] = ()) -> Path:
    with MetricLog(folder / "metrics.jsonl", 1, sync_interval=0) as log:
        for step, load in enumerate(rows, start=1):
            log.emit(rec.Experts(step=step, layers=[1, 2], load=load, dropped=[dropped] * 2))
            if step in saves:
                log.emit(rec.Checkpoint(step=step, path=f"step-{step}", verified=True))
    return folder


def diagnosed(folder: Path, **keys: Any) -> dict[str, Any]:
    return MoEOptimizationManager(Config(**keys)).attach(folder).get_routing_diagnostics()


def test_c024_no_data_is_said_and_nothing_is_scored(tmp_path: Path) -> None:
    for found in (diagnosed(run_of(tmp_path)), MoEOptimizationManager(Config()).get_routing_diagnostics()):
        assert math.isnan(found["expert_balance_score"]) and found["status"] == "no_data"
        assert (found["load_balance_trend"], found["recommendations"], found["dead_experts"]) == ("unknown", [], [])


@pytest.mark.parametrize(
    ("load", "score", "status"), [(EVEN, 1.0, "balanced"), (SKEW, 25 / 55, "imbalanced"), (GONE, 0.25, "imbalanced")]
)
def test_c024_balanced_skewed_and_collapsed(tmp_path: Path, load: list[float], score: float, status: str) -> None:
    found = diagnosed(run_of(tmp_path, *[[EVEN, load]] * 10))
    both = (1 + score) / 2
    assert found["expert_balance_score"] == pytest.approx(both) and found["load_balance_trend"] == "stable"
    (tmp_path / "long").mkdir()
    alone = diagnosed(
        run_of(tmp_path / "long", *[[EVEN[::-1], [1.0, 2, 3, 4]]] * 60, *[[load, load]] * 100)
    )  # steps 61 to 160 count
    assert (alone["status"], alone["expert_balance_score"]) == (status, pytest.approx(score))
    assert len(alone["dead_experts"]) == 2 * load.count(0.0)
    for text in alone["recommendations"]:
        key, _, value = text.partition(":")[0].partition("=")
        assert check_setting(key, value)
    assert bool(alone["recommendations"]) == (status == "imbalanced")


def check_setting(key: str, value: str) -> bool:
    from lumina_engine.config.loading import merge

    return getattr(merge(None, None, [f"{key}={value}"]).config, key) == float(value)


def test_c024_worst_layer_trend_and_what_is_dropped(tmp_path: Path) -> None:
    found = diagnosed(run_of(tmp_path, *[[EVEN, GONE]] * 5, *[[EVEN, SKEW]] * 5, dropped=0.2))
    assert (found["worst_layer"], found["load_balance_trend"], found["dropped"]) == (2, "improving", pytest.approx(0.2))
    assert any(text.startswith("capacity_factor=2:") for text in found["recommendations"])
    assert diagnosed(tmp_path, moe_dropless=True)["recommendations"] == [
        text for text in found["recommendations"] if not text.startswith("capacity_factor")
    ]


def test_c022_a_model_is_read_from_its_own_statistics() -> None:
    import torch

    from lumina_engine import DeepSeekConfig, DeepSeekTransformer

    shape = DeepSeekConfig(
        vocab_size=256, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=4, seq_length=32
    )
    model = DeepSeekTransformer(shape)
    manager = MoEOptimizationManager(shape).attach(model)
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    model(ids)
    assert manager.get_routing_diagnostics()["status"] == "no_data"
    router = model(ids, return_aux=True).router
    found = manager.get_routing_diagnostics()
    assert found["observations"] == 1
    assert found["expert_balance_score"] == pytest.approx(balance_score(np.array(router.counts_LE.tolist())))
    with pytest.raises(TypeError, match="a model or a run"):
        manager.attach(7)


def test_c023_only_what_deepspeed_reads_within_the_limits_of_its_stages() -> None:
    base = {"train_batch_size": 4, "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 1000}}
    plain = MoEOptimizationManager(Config()).create_deepspeed_moe_config(base)
    assert plain == base and plain["zero_optimization"] is not base["zero_optimization"]
    spread = MoEOptimizationManager(Config(expert_parallel_size=2)).create_deepspeed_moe_config(base)
    assert spread == {"train_batch_size": 4, "zero_optimization": {"stage": 2}}
    Config.from_deepspeed(spread)
    with pytest.raises(ConfigError, match="moe"):
        MoEOptimizationManager(Config()).create_deepspeed_moe_config({**base, "moe": {"enabled": True}})


def test_c025_report_moe_says_how_far_the_load_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lumina_engine import cli
    from lumina_engine.run.directory import RunDirectory

    run = RunDirectory.create(tmp_path, "r")
    run_of(run.path, *[[EVEN, EVEN]] * 3, *[[EVEN, SKEW]] * 3, [EVEN, GONE], saves=(3, 6, 7))
    (first, second) = stability(read_records(run.metrics_path))
    assert first == {"from_step": 3, "to_step": 6, "layers": [1, 2], "moved": [0.0, pytest.approx(0.3)]}
    assert second["moved"] == [0.0, pytest.approx(0.45)]
    assert cli.main(["report", "r", "--runs", str(tmp_path), "--moe", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["moe"]
    assert shown["stability"][1]["to_step"] == 7 and shown["worst_layer"] == 2
    assert json.loads((run.reports / "report.json").read_text())["moe"] == shown
    assert cli.main(["report", "r", "--runs", str(tmp_path), "--moe"]) == 0
    assert "moved     step 6 to 7: 45.0 %" in capsys.readouterr().out


def test_c099_a_log_with_two_numbers_of_experts_is_read_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not compare is left out: figures are those since the number is what it is, also where it was so before."""
    from lumina_engine import cli
    from lumina_engine.run.directory import RunDirectory

    run = RunDirectory.create(tmp_path, "r")
    grown = [*SKEW, 0.0]
    rows = [[EVEN, grown[:4]]] * 4, [[[*EVEN, 0.0], grown]] * 4, [[EVEN, EVEN]] * 4
    run_of(run.path, *rows[0], *rows[1], *rows[2], saves=(2, 4, 6, 8, 11))
    with MetricLog(run.metrics_path, 1, sync_interval=0) as log:
        for step in range(1, 13):
            log.emit(rec.Step(step=step, loss=3.0 - step / 100))
    found = diagnosed(run.path)
    assert (found["observations"], found["status"], found["expert_balance_score"]) == (4, "balanced", 1.0)
    moved = stability(read_records(run.metrics_path))
    assert [(row["from_step"], row["to_step"]) for row in moved] == [(2, 4), (6, 8)]
    assert cli.main(["report", "r", "--runs", str(tmp_path), "--moe", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["moe"]["observations"] == 4 and len(shown["moe"]["stability"]) == 2
    routing = json.loads((run.reports / "report.json").read_text())["routing"]
    assert [len(layer["load"]) for layer in routing["layers"]] == [4, 4]
    assert cli.main(["runs", "plot", "r", "--runs", str(tmp_path), "--metrics", "loss,dropped"]) == 0
    assert "loss (nats per token)" in capsys.readouterr().out
