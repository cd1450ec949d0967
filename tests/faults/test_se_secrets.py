"""Keys and tokens of the environment and of the configuration are in nothing that a run writes (SE09)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lumina_engine.config.checks import check
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import MetricLog, read_records
from lumina_engine.run.launch import wait
from lumina_engine.secrets import HIDDEN, Scrubber, Secret, looks_secret, secrets_of
from tests.waiting import until

from .conftest import TinyRuns
from .injector import Fault

SHAPES = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "OPENAI_API_KEY": "sk-proj-abcdefghijklmnopqrstuvwx",
    "GITHUB_TOKEN": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "PROXY_PASSWORD": 'a "quoted" pass\\word',
}


@pytest.mark.parametrize("name", SHAPES)
def test_se09_each_shape_is_hidden_in_text_and_in_records(name: str) -> None:
    value = SHAPES[name]
    scrubber = Scrubber({name: value})
    text = f"401 for {value}: Bearer abcdefgh12345678"
    assert value not in scrubber.text(text) and "abcdefgh12345678" not in scrubber.text(text)
    line = scrubber.line(json.dumps({"message": text}).encode())
    assert value not in json.loads(line)["message"] and json.loads(line)["message"].count(HIDDEN) == 2


def test_se09_what_is_no_secret_stays() -> None:
    scrubber = Scrubber({"TOKENIZERS_PARALLELISM": "false", "KEY": "short", "API_KEY_FILE": "/etc/passwords"})
    digest, snapshot = "a" * 64, "/cache/models--x/snapshots/0123456789abcdef0123456789abcdef01234567/config.json"
    text = f"false short /etc/passwords {digest} {snapshot} sha256 of step-000123, chf_{'a' * 30}"
    assert scrubber.text(text) == text and scrubber.line(text.encode()) == text.encode()


def test_se09_a_secret_cannot_be_printed_stored_or_encoded() -> None:
    (secret,) = secrets_of({"HF_TOKEN": SHAPES["HF_TOKEN"], "HOME": "/home/somebody"})
    assert isinstance(secret, Secret) and secret.reveal() == SHAPES["HF_TOKEN"]
    assert SHAPES["HF_TOKEN"] not in f"{secret} {secret!r} {[secret]}"
    with pytest.raises(TypeError, match="HF_TOKEN"):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        json.dumps(secret)


@pytest.mark.parametrize("name", [n for n in SHAPES if looks_secret(SHAPES[n])])
def test_se09_a_configuration_with_a_key_is_refused_without_repeating_it(name: str, tmp_path: Path) -> None:
    config = Config(train_data_path=f"/data/{SHAPES[name]}.jsonl")
    (found,) = [f for f in check(config) if f.code == "secret"]
    assert found.severity == "error" and "train_data_path" in found.keys and SHAPES[name] not in found.line()
    words = [sys.executable, "-m", "lumina_engine.cli", "train", "--runs", str(tmp_path), f"train_data_path={SHAPES[name]}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "plain text" in done.stderr and SHAPES[name] not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_se09_the_log_hides_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHAPES.items():
        monkeypatch.setenv(name, value)
    with MetricLog(tmp_path / "m", 1, sync_interval=0) as log:
        for value in SHAPES.values():
            log.emit(rec.Alert(severity="warning", code="x", message=f"refused: {value}"))
            log.emit(rec.Change(what=value, before=value, after=1.0))
    content = (tmp_path / "m").read_text()
    assert not [value for value in SHAPES.values() if value in content or json.dumps(value)[1:-1] in content]
    assert len(list(read_records(tmp_path / "m"))) == 2 * len(SHAPES)


def test_se09_a_run_that_crashes_with_them_on_its_lips(tiny_runs: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in the environment, raised in an error, printed: run folder, logs and command lines have none of them."""
    for name, value in SHAPES.items():
        monkeypatch.setenv(name, value)
    run = tiny_runs.running(faults=[Fault("say_environment", 3, "forward")], settings={"max_restarts": 0}, max_steps=8)
    lines: list[str] = []

    def over() -> bool:
        for process in psutil.process_iter():
            try:
                lines.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return not run.alive

    until(over, "the run's end", deadline=120)
    assert wait(run, 60) == 1
    log = run.log_path.read_text()
    assert "InjectedError" in log and HIDDEN in log, "the crash was to name them"
    everything = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    for name, value in SHAPES.items():
        assert value.encode() not in everything and json.dumps(value)[1:-1].encode() not in everything, name
        assert not any(value in line for line in lines), name
    assert os.environ["HF_TOKEN"] == SHAPES["HF_TOKEN"]
