"""`lumina-engine bench train` runs the real loop and says what it measured. No figure is asserted: this is no timing."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lumina_engine import cli
from lumina_engine.commands.bench import SHAPE
from lumina_engine.config.counts import attention_pair_flops, training_flops_per_token
from lumina_engine.config.schema import Config, DeepSeekConfig
from lumina_engine.training import benchmark, matmul_peak
from lumina_engine.training.matmul_peak import Product, step_products
from lumina_engine.training.memory import memory_stats

TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
    "num_experts": 4,
    "seq_length": 32,
    "batch_size": 2,
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lumina_engine.cli", "bench", *words]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environ)


def test_c148_bench_train_measures_the_real_loop(monkeypatch):
    trained = []
    step = benchmark.EnhancedConversationTrainer._step

    def spied(self, micro_batches, begin, data_time):
        trained.append([tuple(batch.input_ids_BS.shape) for batch in micro_batches])
        step(self, micro_batches, begin, data_time)

    monkeypatch.setattr(benchmark.EnhancedConversationTrainer, "_step", spied)
    config = Config(**{**SHAPE, **TINY, "gradient_accumulation_steps": 2, "deterministic": False})
    seen: list[dict] = []
    figures = benchmark.measure(config, 3, 1, seen.append)
    assert trained == [[(2, 32), (2, 32)]] * 4
    assert [line["step"] for line in seen] == [1, 2, 3, 4] and figures["steps"] == 3
    for line in seen:  # the parts are the whole
        assert sum(line[part] for part in benchmark.PARTS) == pytest.approx(line["seconds"]) and line["telemetry"] >= 0
    assert figures["tokens_per_step"] == 128
    assert figures["tokens_per_s_min"] <= figures["tokens_per_s"] <= figures["tokens_per_s_max"]
    assert figures["matmul_share"] == pytest.approx(figures["flops_per_s"] / figures["matmul_peak_flops_per_s"])
    assert set(figures["split_s"]) == set(benchmark.PARTS) and figures["peak_memory_bytes"] > 0


def test_c148_uniform_routing_for_figures_that_depend_on_no_router(monkeypatch):
    monkeypatch.setattr(benchmark, "_roofs", lambda _: (1.0, 2.0))
    seen: list[dict] = []
    config = Config(**{**SHAPE, **TINY, "deterministic": False})
    benchmark.measure(config, 2, 1, seen.append, uniform=True)
    losses = [line["loss"] for line in seen]
    benchmark.measure(config, 2, 1, seen.append)
    assert losses != [line["loss"] for line in seen[3:]]


def test_c148_roofs_are_measured_behind_the_peak_of_memory_and_by_the_fastest_library(monkeypatch):
    order = []
    monkeypatch.setattr(benchmark, "memory_stats", lambda *_: order.append("memory") or memory_stats(*_))
    monkeypatch.setattr(benchmark, "_roofs", lambda _: order.append("roofs") or (1.0, 2.0))
    benchmark.measure(Config(**{**SHAPE, **TINY, "deterministic": False}), 1, 0, lambda _: None)
    assert order == ["memory", "roofs", "roofs"]
    clock = [0.0]
    monkeypatch.setattr(matmul_peak, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for slow, fast in (("_mm", "model_product"), ("model_product", "_mm")):
        monkeypatch.setattr(matmul_peak, slow, lambda *_: clock.append(clock.pop() + 4.0))
        monkeypatch.setattr(matmul_peak, fast, lambda *_: clock.append(clock.pop() + 2.0))
        assert matmul_peak.products_rate([Product(8, 8, 8, 3)], torch.device("cpu"), torch.float32) == 2 * 8**3 / 2


def test_c148_what_is_many_times_slower_is_tried_twice_only(monkeypatch):
    clock, tried = [0.0], {"_mm": 0, "model_product": 0}

    def multiply(name, seconds):
        tried[name] += 1
        clock[0] += seconds

    monkeypatch.setattr(matmul_peak, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(matmul_peak, "_mm", lambda *_: multiply("_mm", 100.0))
    monkeypatch.setattr(matmul_peak, "model_product", lambda *_: multiply("model_product", 2.0))
    assert matmul_peak.products_rate([Product(8, 8, 8, 1)], torch.device("cpu"), torch.bfloat16, repeats=5) == 2 * 8**3 / 2
    assert tried == {"_mm": 2, "model_product": 6}


def test_the_step_s_own_products_are_its_operations_but_for_attention_and_router():
    for changes in ({}, {"num_shared_experts": 1, "num_dense_layers": 1}, {"use_moe": False}, {"attention": "mla"}):
        values = {k: v for k, v in SHAPE.items() if k in DeepSeekConfig.model_fields}
        model = DeepSeekConfig(**{**values, **changes}).resolved()
        tokens = 4 * 256
        products = 3 * sum(product.flops for product in step_products(model, 4, 256))
        attention = 3 * attention_pair_flops(model, 256) * 4
        assert products + attention == pytest.approx(tokens * training_flops_per_token(model, 256), rel=2e-3)


def test_c148_the_last_line_of_json_is_the_result_and_nothing_else_is_on_stdout():
    words = [f"{name}={value}" for name, value in TINY.items()]
    done = run("train", "--json", *words, "steps=2", "warmup=1", "precision=bf16", "use_deepspeed=true")
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert last["tokens_per_s"] > 0 and last["precision"] == "bf16" and last["engine"] == "deepspeed ZeRO-1"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("hiden_size=64", "did you mean hidden_size"),
        ("warmpu=1", "did you mean warmup"),
        ("steps=0", "not a positive whole number"),
        ("num_heads=3", "num_heads"),
    ],
)
def test_c148_a_wrong_key_is_named_with_its_nearest(word, said, capsys):
    assert cli.main(["bench", "train", "--json", word]) == 2
    out, err = capsys.readouterr()
    assert said in err and out == "" and "Traceback" not in err


def test_c148_bench_generate_counts_prompt_and_answer():
    words = [f"{name}={value}" for name, value in TINY.items() if name != "batch_size"]
    done = run("generate", "--json", *words, "steps=2", "warmup=1", "prompt_tokens=12", "new_tokens=8")
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["reply"] for line in lines] == [1, 2, 3] and last["steps"] == 2
    assert last["tokens_per_s_min"] <= last["tokens_per_s"] <= last["tokens_per_s_max"]
    firsts = [line["prefill_s"] for line in lines[1:]]
    assert last["first_token_s"] == pytest.approx(statistics.median(firsts), rel=1e-6)
    assert last["prefill_tokens_per_s"] == pytest.approx(statistics.median(12 / first for first in firsts), rel=1e-6)
    assert cli.main(["bench", "generate", "prompt_tokens=30", "new_tokens=8", *words]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "num_gpus=2"], "torchrun --nproc-per-node 2"),
        (["generate", "learning_rate=0.1"], "learning_rate has no effect on answers"),
    ],
)
def test_c148_what_a_bench_would_not_do_is_refused(words, said, capsys):
    assert cli.main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_c148_memory_of_bench_generate_is_that_of_its_own_process(monkeypatch):
    """getrusage would tell that of a larger parent, from which this process was forked."""
    from lumina_engine.chat import benchmark
    from lumina_engine.config.schema import Config

    config = Config(
        vocab_size=1024,
        hidden_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=64,
        seq_length=64,
        tokenizer="lumina-1k",
    )
    monkeypatch.setattr("lumina_engine.chat.benchmark.process_memory", lambda name: 1 << 45)
    figures = benchmark.measure(
        config, {"steps": 1, "warmup": 0, "prompt_tokens": 4, "new_tokens": 2}, "fp32", lambda reply: None
    )
    assert figures["peak_memory_bytes"] == 1 << 45
