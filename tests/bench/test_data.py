"""`lumina-engine bench data` reads with the real loader, trains with the real loop, opens a real store; no timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lumina_engine.commands.bench import SHAPE
from lumina_engine.config.schema import Config
from lumina_engine.data.batch import TrainLoader
from lumina_engine.training import data_benchmark
from tests.bench.test_train import TINY


@pytest.mark.slow
def test_c148_bench_data_says_what_it_measured():
    words = [f"{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "lumina_engine.cli", "bench", "data", "--json"]
    command += [*words, "steps=2", "warmup=1", "rounds=2", "loaded_tokens=20000", "opened_mb=1000"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("part") for line in lines] == ["loader", *["step"] * 3, "loader", *["open"] * 5, None]
    passes, result = [line for line in lines if line.get("part") == "loader"], lines[-1]
    assert result["tokens_per_s_min"] == min(p["tokens_per_s"] for p in passes) <= result["tokens_per_s"]
    assert result["loader_ratio"] == result["tokens_per_s"] / result["step_tokens_per_s"] > result["loader_ratio_min"] > 0
    assert result["open_s"] == max(line["open_s"] for line in lines if line.get("part") == "open") > 0
    assert 1e9 <= result["opened_bytes"] < 1.3e9 and set(data_benchmark.GOALS) <= set(result)


def test_c033_a_sparse_store_opens_and_a_generated_one_is_read_whole(tmp_path):
    big = data_benchmark.generated_store(tmp_path / "big", 2_000_000_000, 256, 0, sparse=True)
    used = sum(path.stat().st_blocks * 512 for path in big.path.iterdir())
    size = sum(path.stat().st_size for path in big.path.iterdir())
    assert size >= 10e9 and used < 300e6 and len(big.tokens) == 2_000_000_000
    cost = data_benchmark.opening(big)
    assert cost["store_bytes"] >= 10e9 and cost["open_bytes"] < 50e6 and cost["edges"] == [0, 0]
    small = data_benchmark.generated_store(tmp_path / "small", 50_000, 256, 0, sparse=False)
    config = Config(**{**SHAPE, "num_workers": 0, "num_epochs": 1})
    assert sum(batch.num_tokens for step in TrainLoader(small, config) for batch in step) == small.num_tokens > 40_000
    assert data_benchmark.loader_pass(small, config)[1] > 0
