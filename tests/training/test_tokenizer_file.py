"""A tokenizer from a file, data behind a URL: a run and its chat find both, and refuse other ids (R11)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.data.vocabulary import tiktoken_file
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.launch import wait
from tests.training.test_resume import KEYS, conversations

TOKENS = [*(bytes((byte,)) for byte in range(256)), b"say", b" and"]


def lumina(root: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(root / "state")}
    return subprocess.run([sys.executable, "-m", "lumina_engine.cli", *words], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, RunDirectory]:
    """A run whose tokenizer was named by a relative path."""
    root = tmp_path_factory.mktemp("vocabulary")
    vocabulary = root / "own.tiktoken"
    vocabulary.write_bytes(tiktoken_file([*TOKENS, b"qzq"]))
    data = conversations(root / "train.jsonl")
    words = ["train", "--runs", str(root), "--run", "own", "--resume", "--detach", *KEYS, "curriculum_learning=false"]
    words += ["max_steps=6", f"train_data_path={data.as_uri()}", "data_cache_dir=cache", "tokenizer=own.tiktoken"]
    run = RunDirectory(root / "own")
    for _ in range(2):  # a requeued job gives the same command
        done = lumina(root, root, *words)
        assert done.returncode == 0, done.stderr
        assert wait(run, 180) == 0, run.log_path.read_text()[-2000:]
        assert run.newest_step() == 6
    return root, vocabulary, run


def test_c040_c034_a_run_finds_a_relative_vocabulary_and_a_url(trained: tuple[Path, Path, RunDirectory]) -> None:
    root, vocabulary, run = trained
    said = run.config_path.read_text()
    assert f"tokenizer: {vocabulary}" in said and f"train_data_path: {(root / 'train.jsonl').as_uri()}" in said
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    words = ["chat", str(run.checkpoints / "step-000006"), "--json", "--prompt", "say 3 and 21", "--max-new-tokens", "4"]
    done = lumina(root, elsewhere, *words)
    assert done.returncode == 0, done.stderr


def test_r11_another_vocabulary_is_refused_by_resume_and_chat(trained: tuple[Path, Path, RunDirectory]) -> None:
    """One token changes that no text of the data has: the ids of the data, and so their fingerprint, stay the same."""
    root, vocabulary, run = trained
    then = vocabulary.read_bytes()
    before = ConversationTokenizer(str(vocabulary)).digest
    try:
        vocabulary.write_bytes(tiktoken_file([*TOKENS, b"qzx"]))
        after = ConversationTokenizer(str(vocabulary)).digest
        assert before != after
        for more in ((), ("--accept-data-change",)):
            resumed = lumina(
                root, root, "train", "--runs", str(root), "--run", "own", "--detach", "--resume", "max_steps=8", *more
            )
            assert resumed.returncode == 0, resumed.stderr
            assert wait(run, 180) == 65
            reason = run.info().reason or ""
            assert f"saved with tokenizer {vocabulary} of digest {before[:16]}" in reason and after[:16] in reason
        chat = lumina(root, root, "chat", str(run.checkpoints / "step-000006"), "--prompt", "say", "--max-new-tokens", "4")
        assert chat.returncode == 65 and f"trained with tokenizer {vocabulary} of digest {before[:16]}" in chat.stderr
        assert "put that file back as it was" in chat.stderr and "Traceback" not in chat.stderr
        vocabulary.unlink()
        chat = lumina(root, root, "chat", str(run.checkpoints / "step-000006"), "--prompt", "say", "--max-new-tokens", "4")
        assert chat.returncode == 65 and f"{vocabulary}: the file cannot be read (No such file or directory)" in chat.stderr
    finally:
        vocabulary.write_bytes(then)
    resumed = lumina(root, root, "train", "--runs", str(root), "--run", "own", "--detach", "--resume", "max_steps=8")
    assert resumed.returncode == 0, resumed.stderr
    assert wait(run, 180) == 0, run.log_path.read_text()[-2000:]
    assert run.newest_step() == 8
