"""C113: the public estimate is that of the budget command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lumina_engine
from lumina_engine.config.presets import ConfigPresets
from lumina_engine.doctor.estimate import estimate_training_time


def test_c113_a_float_with_its_interval_and_basis() -> None:
    config = ConfigPresets.debug()
    config.max_steps = None
    hours = lumina_engine.estimate_training_time(config, 10_000, tokens=2_000_000)
    assert isinstance(hours, float) and hours == hours.p50 < hours.p90 and hours.device_hours == hours.p50
    assert hours.basis.startswith("guessed") and "given" in hours.basis
    assert estimate_training_time(config, 1_000) < estimate_training_time(config, 2_000)
    with pytest.raises(ValueError, match="nothing to train on"):
        estimate_training_time(config, 0)


def test_c113_the_same_as_the_command(tmp_path: Path) -> None:
    config = ConfigPresets.debug()
    config.max_steps = None
    argv = [sys.executable, "-m", "lumina_engine.cli", "budget", "--preset", "debug", "--tokens", "5000000", "max_steps=null"]
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, cwd=tmp_path)
    time = json.loads(done.stdout)["time"]
    hours = estimate_training_time(config, 1, tokens=5_000_000)
    assert hours.p50 == pytest.approx(time["p50_h"]) and hours.p90 == pytest.approx(time["p90_h"])


def test_c113_the_average_of_prepared_data_is_used(tmp_path: Path) -> None:
    from lumina_engine.data.size import average_tokens
    from lumina_engine.data.store import open_data
    from lumina_engine.data.tokenizer import ConversationTokenizer

    path = tmp_path / "train.jsonl"
    turns = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four " * 30}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(40)))
    config = ConfigPresets.debug()
    config.train_data_path, config.data_cache_dir, config.eval_split = str(path), str(tmp_path / "cache"), 0.0
    assert average_tokens(config)[1] == "guessed"
    store = open_data(config, ConversationTokenizer(config.tokenizer)).train
    each, basis = average_tokens(config)
    assert basis == "measured" and each == pytest.approx(store.num_tokens / 40)
