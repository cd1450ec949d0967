"""Scaling advice: planted constants lie in the intervals as often as these say; too few points are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumina_engine.config.presets import ConfigPresets
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.curves import History, read_history
from lumina_engine.monitoring.health.timeline import HealthTimeline
from lumina_engine.monitoring.log import MetricLog
from lumina_engine.monitoring.report import Subject, document
from lumina_engine.monitoring.report_page import page
from lumina_engine.monitoring.scaling import LEAST_POINTS, TooLittle, fit, scaling
from lumina_engine.monitoring.scaling_page import lines

SEEDS = 120


def planted(
    seed: int, count: int, noise: float, even: bool, alike: float = 0.0
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    draw = np.random.default_rng(seed)
    floor, alpha, size = draw.uniform(1, 2.5), draw.uniform(0.15, 0.6), draw.uniform(0.5, 2)
    tokens = (np.linspace(1 / count, 1, count) if even else np.geomspace(1 / 30, 1, count)) * 1e8
    error = draw.normal(0, noise, count)
    for i in range(1, count):
        error[i] = alike * error[i - 1] + math.sqrt(1 - alike**2) * error[i]
    truth = {"floor": floor, "alpha": alpha, "twice": floor + size * 2**-alpha}
    return tokens, floor + size * (tokens / 1e8) ** -alpha + error, truth


@pytest.mark.parametrize(
    ("count", "noise", "even", "alike", "least"),
    [(24, 0.01, True, 0.0, 0.90), (16, 0.005, True, 0.0, 0.90), (48, 0.02, False, 0.0, 0.90), (48, 0.02, True, 0.5, 0.84)],
)
def test_planted_constants_lie_in_the_interval(count: int, noise: float, even: bool, alike: float, least: float) -> None:
    """95 % is claimed. Over 300 seeds: 94 to 96 % with independent residuals, 91 to 92 % where each has half of the last."""
    hits = {"floor": 0, "alpha": 0, "twice": 0}
    for seed in range(SEEDS):
        tokens, loss, truth = planted(seed, count, noise, even, alike)
        found = fit(tokens, loss)
        places, alpha = {"floor": found.at(math.inf), "twice": found.at(2e8)}, found.alpha
        hits["alpha"] += (alpha["low"] or 0) <= truth["alpha"] <= (alpha["high"] or math.inf)
        for name, place in places.items():
            assert place["low"] <= place["loss"] <= place["high"]
            hits[name] += place["low"] <= truth[name] <= place["high"]
    assert all(hit / SEEDS >= least for hit in hits.values()), hits


@pytest.mark.parametrize("seed", range(5))
def test_the_further_the_less_is_claimed(seed: int) -> None:
    tokens, loss, _ = planted(seed, 32, 0.02, even=False)
    found = fit(tokens, loss)
    widths = [found.at(times * 1e8)["high"] - found.at(times * 1e8)["low"] for times in (0.5, 1, 2, 4, 8)]
    assert widths == sorted(widths) and widths[0] > 0
    scaled = fit(tokens * 1000, loss)
    assert scaled.at(2e11) == pytest.approx(found.at(2e8)) and scaled.alpha == pytest.approx(found.alpha)


def test_too_little_is_refused_with_the_reason() -> None:
    tokens, loss, _ = planted(1, 24, 0.01, even=True)
    for points, words in (
        ((tokens[-LEAST_POINTS + 1 :], loss[-LEAST_POINTS + 1 :]), "11 points, at least 12"),
        ((tokens[-13:], loss[-13:]), "span a factor of 2.0"),
        ((tokens, loss[::-1]), "does not fall"),
        ((tokens, np.full(24, np.nan)), "0 points"),
        ((np.zeros(0), np.zeros(0)), "0 points"),
    ):
        with pytest.raises(TooLittle, match=words):
            fit(*points)


def history(folder: Path, steps: int, evals: int = 0) -> History:
    """A run of 1M tokens a step whose loss is 2 + 1.5·(D / 100M)^-0.3, with noise."""
    draw = np.random.default_rng(2)
    with MetricLog(folder / "metrics.jsonl", 1, sync_interval=0) as log:
        log.emit(rec.Run(state="running", total_steps=400))
        for step in range(1, steps + 1):
            loss = 2 + 1.5 * (step / 100) ** -0.3
            log.emit(rec.Step(step=step, loss=loss + draw.normal(0, 0.05), tokens=step * 1_000_000))
            if evals and step % (steps // evals) == 0:
                log.emit(rec.Eval(step=step, loss=loss + draw.normal(0, 0.005)))
    return read_history(folder / "metrics.jsonl")


@pytest.mark.parametrize(("evals", "source"), [(0, "training loss"), (4, "training loss"), (20, "evaluations")])
def test_a_run_s_own_points(tmp_path: Path, evals: int, source: str) -> None:
    config = ConfigPresets.b1().model_copy(update={"vocab_size": 100_352}).to_dict(sectioned=False)
    known = history(tmp_path, 200, evals)
    found = scaling(known, config)
    assert (found["status"], found["from"]) == ("estimated", source) and found["points"] >= LEAST_POINTS
    for name, tokens in (("now", 200), ("end", 400), ("twice_the_data", 400)):
        place = found[name]
        assert place["tokens"] == tokens * 1e6 and place["low"] <= 2 + 1.5 * (tokens / 100) ** -0.3 <= place["high"]
    half = found["half_the_model"]
    assert half["loss"] > found["now"]["loss"] and half["high"] - half["low"] > found["now"]["high"] - found["now"]["low"]
    ratio = found["tokens_per_parameter"]
    assert ratio["value"] == pytest.approx(2e8 / ratio["parameters"]) and ratio["value"] < 1 and "more data" in ratio["advice"]
    report = document(Subject("mine", "runs/mine", "finished", config=config), known, HealthTimeline())
    text = page(report, known)
    assert "with twice the data" in text and "arXiv:2203.15556" in text and report["scaling"] == found
    assert [line.split()[0] for line in lines(found)] == ["scale", "estimate", "estimate", "estimate"]


def test_a_short_run_or_a_small_model_says_unknown(tmp_path: Path) -> None:
    config: dict[str, Any] = ConfigPresets.debug().model_copy(update={"vocab_size": 1024}).to_dict(sectioned=False)
    (tmp_path / "short").mkdir()
    short = scaling(history(tmp_path / "short", 8), config)
    assert short["status"] == "unknown" and "at least 12" in short["reason"] and "twice_the_data" not in short
    assert lines(short)[1].startswith("estimate  unknown: ") and lines(scaling(History(), None)) == []
    small = scaling(history(tmp_path, 200), config)
    assert "published fits are of" in small["half_the_model"]["unknown"]
    assert scaling(history(tmp_path, 200), None)["tokens_per_parameter"]["value"] is None
