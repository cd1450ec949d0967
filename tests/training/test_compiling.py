"""`compile=true`: the same losses, the state shown, and a failure with its reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_engine.commands.bench import SHAPE
from lumina_engine.config.checks import check
from lumina_engine.config.schema import Config

TINY = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
    "num_experts": 2,
    "num_dense_layers": 1,
    "seq_length": 32,
    "batch_size": 2,
    "steps": 2,
    "warmup": 1,
    "vocab_size": 1024,
}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


def bench(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    shape = [f"{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "lumina_engine.cli", "bench", "train", "--json", *shape, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)


def losses(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr[-2000:]
    return [line["loss"] for line in map(json.loads, done.stdout.splitlines()) if "step" in line]


MODES = {
    "plain": (),
    "checkpointing": ("gradient_checkpointing=true",),
    "zero 1": ("use_deepspeed=true", "zero_stage=1"),
    "bf16": ("precision=bf16",),
    "mixed": ("precision=mixed_bf16",),
    "latent attention": ("attention=mla",),
    "two lengths": ("curriculum_learning=true", "min_seq_length=16", "curriculum_steps=2"),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("words", MODES.values(), ids=MODES.keys())
def test_c013_compiled_losses_equal_eager_in_every_mode(tmp_path, words):
    eager = losses(bench(*words))
    compiled = losses(bench("compile=true", *words, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)))
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert any(tmp_path.rglob("*.so")), "nothing was compiled"


@pytest.mark.slow
def test_c013_without_a_compiler_the_error_says_so_and_nothing_runs_uncompiled(tmp_path):
    done = bench("compile=true", CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 2 and "compile=true" in done.stderr and "compile=false" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("changes", [{"use_deepspeed": True, "zero_stage": 3}, {"gradient_checkpointing": "selective"}])
def test_c013_what_cannot_be_compiled_is_refused_with_the_reason(changes):
    config = Config(**{**SHAPE, "compile": True, **changes})
    assert any(f.severity == "error" and f.keys[0] == "compile" for f in check(config))


def test_c013_the_state_compiling_comes_before_the_dry_run(monkeypatch, tmp_path: Path):
    from lumina_engine.data.tokenizer import ConversationTokenizer
    from lumina_engine.model.transformer import DeepSeekTransformer
    from lumina_engine.training import trainer as module

    seen: list[object] = []
    monkeypatch.setattr(module, "compile_blocks", lambda model: seen.append("compile") or len(model.blocks))
    monkeypatch.setattr(module.memory, "dry_run", lambda *_: seen.append("dry run"))

    class Log:
        def emit(self, record: object) -> None:
            seen.append(record.state)

    shape = {name: value for name, value in TINY.items() if name not in ("steps", "warmup")}
    config = Config(**{**SHAPE, **shape, "compile": True, "precision": "fp32"})
    module.EnhancedConversationTrainer(DeepSeekTransformer(config), ConversationTokenizer("lumina-1k"), config, Log())
    assert seen == ["compile", "compiling", "dry run"]
