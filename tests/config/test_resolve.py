"""C54, C58, R24, R25, R38, R39: every auto becomes the value in force, and the budget says what is computed and guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina_engine.config.advice import advice
from lumina_engine.config.budget import budget, parse_devices, stage_table
from lumina_engine.config.checks import check
from lumina_engine.config.machine import GB, Accelerator, Machine, count_text, gb_text
from lumina_engine.config.presets import NAMES, ConfigPresets
from lumina_engine.config.resolve import choose_stage, layout_of, model_config, resolve
from lumina_engine.config.schema import Config, ConfigError, fields_info

LAPTOP = Machine([], 16 * GB, 4, 100 * GB)


def gpus(count: int, gb: float = 80, bf16: bool = True) -> Machine:
    return Machine([Accelerator("GPU", int(gb * GB), bf16)] * count, 4000 * GB, 64, None)


def stage(config: Config, machine: Machine) -> tuple[int, bool]:
    choice = choose_stage(config, machine, model_config(config))
    assert choice.reason
    return choice.stage, choice.fits


def test_c054_resolve_leaves_no_auto_but_what_cannot_be_known_yet() -> None:
    config = resolve(ConfigPresets.debug(), LAPTOP, tokenizer_vocab=1024)
    auto = {i.name for i in fields_info() if getattr(config, i.name) == "auto"}
    # data_format: each file is looked into; lengths of a curriculum, gradients of ZeRO: there are none; the port: each start
    # finds it
    known = {"warmup_steps", "experiment_name", "data_format", "min_seq_length", "max_seq_length", "master_port"}
    assert auto == known | {"reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "contiguous_gradients"}
    for machine, size in ((LAPTOP, 2_000_000), (gpus(2), 200_000_000)):
        split = resolve(Config(use_deepspeed=True, zero_stage=1, num_gpus=2), machine, tokenizer_vocab=1024)
        assert (split.reduce_bucket_size, split.allgather_bucket_size) == (size, size)
    assert (config.vocab_size, config.precision, config.zero_stage, config.num_gpus) == (1024, "fp32", 0, 1)
    assert (config.launcher, config.communication_backend, config.master_addr) == ("none", "gloo", "127.0.0.1")
    assert (config.head_dim, config.dense_intermediate_size, config.router_normalize) == (64, 512, False)
    assert resolve(config, LAPTOP, tokenizer_vocab=1024) == config
    assert config.validate() is not None


@pytest.mark.parametrize(
    ("machine", "keys", "early"),
    [
        (LAPTOP, {"zero_stage": 1}, False),
        (LAPTOP, {"zero_stage": 1, "num_gpus": 1}, False),
        (LAPTOP, {"precision": "bf16"}, False),
        (LAPTOP, {"zero_stage": 2}, True),
        (LAPTOP, {"zero_stage": 3}, True),
        (LAPTOP, {"zero_stage": 1, "expert_parallel_size": 2}, True),
        (gpus(2), {"zero_stage": 1}, True),
    ],
    ids=["cpu-1", "cpu-1-one-rank", "cpu-auto-stage", "cpu-2", "cpu-3", "cpu-1-experts", "gpu-1"],
)
def test_c058_auto_of_how_gradients_are_reduced(machine: Machine, keys: dict, early: bool) -> None:
    config = Config(**({"num_gpus": 2, "seq_length": 512} | keys))
    found = resolve(config, machine, tokenizer_vocab=100_277)
    zero = found.to_deepspeed(2)["zero_optimization"]
    for name in ("overlap_comm", "contiguous_gradients"):
        assert getattr(found, name) is early and zero[name] is early
    layout = layout_of(config, machine, found.zero_stage)
    assert (layout.overlap_comm, layout.contiguous_gradients) == (early, early)
    assert layout_of(found, machine, found.zero_stage) == layout
    assert (found.allgather_bucket_size == "auto") == (found.zero_stage == 3)  # which gathers by keys of its own
    assert [f for f in found.validate() if f.severity != "info"] == []


@pytest.mark.parametrize("machine", [LAPTOP, gpus(2)], ids=["cpu", "gpu"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("overlap", "contiguous"), [(True, True), (False, True), (True, False), (False, False)])
def test_c058_how_gradients_are_reduced_is_kept_where_it_is_said(
    machine: Machine, stage: int, overlap: bool, contiguous: bool
) -> None:
    said = Config(num_gpus=2, seq_length=512, zero_stage=stage, overlap_comm=overlap, contiguous_gradients=contiguous)
    found = resolve(said, machine, tokenizer_vocab=100_277)
    assert (found.overlap_comm, found.contiguous_gradients) == (overlap, contiguous)


def test_c054_resolved_configs_still_pass_their_own_checks() -> None:
    for config in (ConfigPresets.debug(), Config(num_gpus=2, seq_length=512), Config(precision="bf16")):
        again = resolve(config, LAPTOP, tokenizer_vocab=100_277 if config.tokenizer == "gpt-4" else 1024)
        assert [f for f in again.validate() if f.severity != "info"] == []


def test_r24_auto_stage() -> None:
    b1 = ConfigPresets.b1()
    assert stage(ConfigPresets.debug(), LAPTOP) == (0, True)
    assert stage(Config(num_gpus=2, seq_length=512), LAPTOP) == (0, True)
    assert stage(b1, gpus(1)) == (1, False)
    assert stage(b1, gpus(8)) == (1, True)
    assert stage(b1, gpus(4, 68)) == (2, True)
    assert stage(b1, gpus(4, 60)) == (3, True)
    assert stage(ConfigPresets.b7(), gpus(8)) == (3, False)
    assert stage(ConfigPresets.b7(), gpus(22)) == (3, True)
    assert stage(b1.model_copy(update={"expert_parallel_size": 2}), gpus(4, 20)) == (2, False)
    assert stage(Config(cpu_offload=True), LAPTOP) == stage(Config(cpu_offload_optimizer=True), LAPTOP) == (1, True)
    for key in ("cpu_offload_parameters", "nvme_offload_optimizer", "nvme_offload_parameters"):
        assert stage(Config(**{key: True}), LAPTOP) == (3, True)
    assert stage(Config(precision="bf16"), LAPTOP) == (1, True)
    assert stage(Config(precision="mixed_bf16"), LAPTOP) == (0, True)
    assert stage(Config(use_deepspeed=False), LAPTOP) == (0, True)
    assert stage(Config(zero_stage=2), LAPTOP) == (2, True)


def test_c013_compiled_blocks_end_at_stage_2() -> None:
    """Weights that come and go cannot be compiled, also where only stage 3 would fit."""
    large = ConfigPresets.b7().model_copy(update={"batch_size": 1})
    assert stage(large, gpus(32)) == (3, True)
    large.compile = True
    assert stage(large, gpus(32)) == (2, False)


def test_r25_auto_precision() -> None:
    def in_force(machine: Machine) -> str:
        return resolve(Config(), machine, tokenizer_vocab=100_277).precision

    assert (in_force(LAPTOP), in_force(gpus(1)), in_force(gpus(1, bf16=False))) == ("fp32", "bf16", "mixed_fp16")


def test_c058_backend_and_launcher() -> None:
    config = resolve(Config(num_gpus=2, communication_backend="nccl"), LAPTOP, tokenizer_vocab=100_277)
    assert (config.communication_backend, config.launcher, config.num_gpus) == ("gloo", "none", 2)
    config = resolve(Config(), gpus(4), tokenizer_vocab=100_277)
    assert (config.communication_backend, config.launcher, config.num_gpus) == ("nccl", "none", 4)


def test_r07_vocabulary_smaller_than_the_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size = 50,304: gpt-4 has 100,277 ids; set vocab_size=auto \(100,352\)"):
        resolve(Config(vocab_size=50_304), LAPTOP, tokenizer_vocab=100_277)
    assert resolve(Config(tokenizer="x.tiktoken"), LAPTOP, tokenizer_vocab=5_000).vocab_size == 5_120


def test_r24_nothing_fits_is_an_error_with_advice() -> None:
    with pytest.raises(ConfigError, match="use 22 such devices with zero_stage=3"):
        resolve(ConfigPresets.b7(), gpus(8), tokenizer_vocab=100_277)
    with pytest.raises(ConfigError, match="choose a smaller preset"):
        resolve(ConfigPresets.b7(), LAPTOP, tokenizer_vocab=100_277)


@pytest.mark.parametrize(
    ("config", "machine"),
    [
        (ConfigPresets.b1(), gpus(1)),
        (ConfigPresets.b1(), gpus(4, 40)),
        (Config(batch_size=64), Machine([], 8 * GB, 4, None)),
        (Config(batch_size=512, seq_length=512), Machine([], 16 * GB, 4, None)),
        (Config(seq_length=32_768, rope_theta=1e7, batch_size=1), gpus(1, 9)),
    ],
)
def test_c077_advice_applied_fits(config: Config, machine: Machine) -> None:
    model = model_config(config)
    assert not choose_stage(config, machine, model).fits
    found = advice(config, machine, model, max(1, len(machine.devices)))
    assert 1 <= len(found) <= 3
    for text in found:
        again, where = config.model_copy(deep=True), machine
        words = text.split()
        if words[0] == "use":
            where = gpus(int(words[1].replace(",", "")), machine.devices[0].memory_bytes / GB)
        pairs = [w.split("=") for w in words if "=" in w]
        assert pairs
        for name, value in pairs:
            setattr(again, name, value)
        assert choose_stage(again, where, model_config(again)).fits, text
        rows = again.batch_size * again.gradient_accumulation_steps
        assert "same global batch" not in text or rows == config.batch_size * config.gradient_accumulation_steps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("machine", [LAPTOP, gpus(1, 24), gpus(64)], ids=["cpu", "one", "many"])
def test_c139_budget_keys_for_every_preset(name: str, machine: Machine) -> None:
    figures = budget(ConfigPresets.get(name), machine, train_tokens=10**9, tokens_basis="guessed")
    json.dumps(figures, allow_nan=False)
    expected = "parameters device host disk flops_per_token tokens_per_step steps time resolved fits advice basis"
    assert list(figures) == expected.split()
    parts = "weights gradients optimizer activations logits experts buckets total available"
    device = figures["device"]
    assert set(parts.split()) <= set(device) and set(figures["time"]) >= {"p50_h", "p90_h", "basis"}
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buckets", "working")
    assert device["total"] == device["moments"][device["moment"]] == max(device["moments"].values())
    assert device["weights"] + device["optimizer"] < device["total"] < 2 * sum(device[name] for name in names)
    assert figures["time"]["p50_h"] < figures["time"]["p90_h"]
    enough = device["total"] <= device["limit"] and figures["host"]["total"] <= figures["host"]["available"]
    assert (
        figures["fits"]
        == (not figures["advice"])
        == (enough and (machine.disk_free_bytes or 10**18) >= figures["disk"]["total"])
    )
    assert all("computed" in text or "guessed" in text for text in figures["basis"].values())


@pytest.mark.parametrize(
    ("keys", "machine", "each"),
    [
        # bytes of a parameter on one node: of the copy, and of what is put together in host memory before
        ({"use_deepspeed": False, "precision": "fp32"}, LAPTOP, (12, 0)),
        ({"use_deepspeed": False, "precision": "bf16"}, LAPTOP, (14, 0)),
        ({"use_deepspeed": False, "num_gpus": 2}, LAPTOP, (4 + 2 * 8, 0)),
        ({"zero_stage": 1, "num_gpus": 2}, LAPTOP, (12, 0)),
        ({"zero_stage": 3}, LAPTOP, (12, 0)),  # the weights lie there in the place of gradients and activations
        ({"zero_stage": 0, "precision": "mixed_bf16"}, gpus(4), (4 + 4 * 8, 0)),
        ({"zero_stage": 2, "precision": "bf16"}, gpus(4), (14, 0)),
        ({"zero_stage": 2, "precision": "bf16", "num_nodes": 2}, gpus(4), (2 + 12 / 2, 0)),
        ({"zero_stage": 3, "precision": "bf16"}, gpus(4), (14, 2)),
        (
            {"zero_stage": 3, "precision": "bf16", "nvme_offload_optimizer": True, "nvme_path": "/nvme"},
            gpus(4),
            (14, 2 + 12),
        ),
    ],
)
def test_c139_host_memory_counts_a_save(keys: dict, machine: Machine, each: tuple[float, float]) -> None:
    """A save beside training holds a copy of all that the node writes; at stage 3 the weights are gathered before it."""
    config = Config(hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, vocab_size=1024, **keys)
    beside, waiting = (budget(config.model_copy(update={"async_save": on}), machine) for on in (True, False))
    count, (copied, before) = beside["parameters"]["stored"], each
    assert waiting["host"]["saving"] == pytest.approx(count * before, rel=1e-6)
    assert beside["host"]["saving"] == pytest.approx(count * (copied + before), rel=1e-6)
    parts = [beside["host"][name] for name in ("processes", "offload", "training", "saving")]
    assert beside["host"]["total"] == sum(parts)


def test_c139_host_memory_that_a_save_exceeds_is_said_with_what_helps(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "num_layers": 12, "num_heads": 16, "num_kv_heads": 8, "num_experts": 8, "moe_top_k": 2}
    config = Config(**shape, vocab_size=100_352, batch_size=1, seq_length=512, use_deepspeed=False, precision="fp32")
    machine = Machine([], int(25.3 * GB), 4, None)
    figures = budget(config, machine)
    assert figures["device"]["total"] < figures["device"]["limit"] and not figures["fits"]
    assert "set async_save=false (training waits for each save)" in figures["advice"]
    assert budget(config.model_copy(update={"async_save": False}), machine)["fits"]
    data = tmp_path / "data.jsonl"
    data.touch()
    found = {f.code: f for f in check(config.model_copy(update={"train_data_path": str(data)}), machine)}
    text = found["host_memory"].line()
    assert "while a checkpoint is saved" in text and "async_save=false" in text


def test_c113_time_grows_with_data_and_is_unknown_without() -> None:
    config = ConfigPresets.debug()
    config.max_steps = None
    none = budget(config, LAPTOP)
    assert none["steps"] is None and none["time"]["p50_h"] is None and none["time"]["basis"].startswith("unknown")
    hours = [budget(config, LAPTOP, train_tokens=n)["time"]["p50_h"] for n in (10**6, 10**7, 10**8)]
    assert hours == sorted(hours) and hours[0] < hours[2]
    config.max_steps = 10
    assert budget(config, LAPTOP, train_tokens=10**9)["steps"] == 10
    assert budget(config, LAPTOP)["steps"] == 10
    config.num_epochs, config.max_steps = 1, None
    assert budget(config, LAPTOP, train_tokens=20_480)["steps"] == 10


def test_c139_tokens_per_step_and_world() -> None:
    assert budget(Config(num_gpus=2, gradient_accumulation_steps=4), LAPTOP)["tokens_per_step"] == 2 * 4 * 2 * 2048
    two = layout_of(Config(num_gpus=2), LAPTOP, 0)
    assert two.world == 2 and two.on_cpu


def test_c128_stage_table_falls_with_the_stage() -> None:
    rows = stage_table(ConfigPresets.b1(), gpus(8))
    totals = [row["total"] for row in rows]
    assert totals == sorted(totals, reverse=True) and [row["stage"] for row in rows] == [0, 1, 2, 3, 3]
    assert [row["offload"] for row in rows] == [False] * 4 + [True] and rows[4]["state"] < rows[3]["state"]


def test_c139_devices_in_words() -> None:
    assert len(parse_devices("8x80GB")) == 8 and parse_devices("2 x H100 80GB")[0].name == "H100"
    assert parse_devices("cpu") == [] and parse_devices("1x1.5gb")[0].memory_bytes == 1_500_000_000
    for bad in ("8", "x80GB", "0x80GB", "8x0GB", "8x80", "-1x80GB", ""):
        with pytest.raises(ValueError, match="8x80GB"):
            parse_devices(bad)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (80e9, "80 GB"), (6.7556e6, "6.76 MB"), (999.96e9, "1 TB")]
)
def test_c139_bytes_in_words(count: float, text: str) -> None:
    assert gb_text(count) == text


def test_c139_counts_in_words() -> None:
    assert [count_text(c) for c in (12, 494_208, 7.349e9, 1.661e12)] == ["12", "494 K", "7.35 B", "1.66 T"]
