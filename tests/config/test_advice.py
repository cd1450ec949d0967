"""C77, C139: whatever the configuration and the machine, each advice of a budget that does not fit makes it fit."""

from __future__ import annotations

import re
from dataclasses import replace

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lumina_engine.config.budget import budget
from lumina_engine.config.checks import check
from lumina_engine.config.machine import GB, Accelerator, Machine
from lumina_engine.config.presets import ConfigPresets
from lumina_engine.config.schema import Config

SHAPES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([128, 512, 1024, 2048]),
        "num_layers": st.integers(1, 32),
        "num_heads": st.just(8),
        "num_kv_heads": st.sampled_from([2, 8]),
        "seq_length": st.sampled_from([256, 1024, 2048]),
        "use_moe": st.booleans(),
        "num_experts": st.sampled_from([2, 8, 32]),
        "moe_top_k": st.integers(1, 2),
        "gradient_checkpointing": st.booleans(),
        "batch_size": st.integers(1, 48),
        "gradient_accumulation_steps": st.sampled_from([1, 3, 8]),
        "loss_chunk_size": st.sampled_from([0, 256, 2048]),
        "precision": st.sampled_from(["auto", "fp32", "bf16", "mixed_bf16"]),
        "use_deepspeed": st.booleans(),
        "zero_stage": st.sampled_from(["auto", 1, 2]),
        "max_steps": st.just(10),
        "keep_checkpoints": st.integers(2, 9),
    }
)
MACHINES = st.one_of(
    st.builds(
        lambda count, gb: Machine([Accelerator("GPU", int(gb * GB))] * count, 4_000 * GB, 64, None),
        st.sampled_from([1, 2, 8]),
        st.floats(0.5, 90),
    ),
    st.builds(lambda gb: Machine([], int(gb * GB), 4, None), st.floats(1.5, 64)),
)


def applied(config: Config, machine: Machine, text: str) -> tuple[Config, Machine]:
    """The configuration and the machine with what an advice names."""
    changed = config.model_copy(deep=True)
    if found := re.search(r"use ([\d,]+) such devices", text):
        machine = replace(machine, devices=machine.devices[:1] * int(found[1].replace(",", "")))
    pairs = re.findall(r"(\w+)=(\S+)", text.split(" (")[0].split("; ")[0])
    assert pairs, text
    for name, value in pairs:
        setattr(changed, name, value.rstrip(","))
    return changed, machine


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(SHAPES, MACHINES)
def test_c077_every_advice_makes_it_fit(shape: dict, machine: Machine) -> None:
    if not shape["use_deepspeed"]:
        shape |= {"zero_stage": "auto"}
    config = Config(**shape)
    assume(not any(f.severity == "error" for f in check(config)))
    figures = budget(config, machine)
    assert figures["fits"] == (not figures["advice"])
    assume(not figures["fits"])
    assert 1 <= len(figures["advice"]) <= 3
    for text in figures["advice"]:
        if text.startswith("choose a smaller preset"):
            assert len(figures["advice"]) == 1
            continue
        changed, where = applied(config, machine, text)
        assert not any(f.severity == "error" for f in check(changed)), text
        again = budget(changed, where)
        assert again["fits"], (text, again["device"], again["host"])
        if "same global batch" in text:
            assert again["tokens_per_step"] == figures["tokens_per_step"] * changed.seq_length // config.seq_length


def test_c077_the_usual_means_are_named() -> None:
    """Checkpointing, a smaller batch, offload where it is offered, a higher stage, more devices."""
    gpu = Machine([Accelerator("GPU", 80 * GB)] * 8, 4_000 * GB, 64, None)
    b1 = ConfigPresets.b1()
    b1.batch_size = 48
    found = " | ".join(budget(b1, gpu)["advice"])
    assert "batch_size=" in found and "gradient_checkpointing=" in found
    small = Machine([Accelerator("GPU", 60 * GB)] * 8, 4_000 * GB, 64, None)
    fixed = ConfigPresets.b1()
    fixed.zero_stage = 1
    fixed.gradient_checkpointing = True
    fixed.batch_size = 2
    assert not budget(fixed, replace(small, devices=[Accelerator("GPU", 42 * GB)] * 8))["fits"]
    assert any(
        "zero_stage=auto" in text for text in budget(fixed, replace(small, devices=[Accelerator("GPU", 42 * GB)] * 8))["advice"]
    )
    one = Machine([Accelerator("GPU", 80 * GB)], 4_000 * GB, 64, None)
    assert any(text.startswith("use ") for text in budget(ConfigPresets.b1(), one)["advice"])


def test_c139_too_little_disk_names_what_takes_it() -> None:
    config = ConfigPresets.debug()
    config.max_steps = None  # as long as it may be, so that backups are counted
    need = budget(config, Machine([], 16 * GB, 4, None))["disk"]
    for room, words in (
        (need["total"] - need["checkpoint"], "keep_checkpoints=2"),
        (need["total"] - 6 * need["checkpoint"], "backup_every_n_hours=0"),
        (need["log"], "free "),
    ):
        figures = budget(config, Machine([], 16 * GB, 4, room))
        assert not figures["fits"] and any(words in text for text in figures["advice"])
        for text in figures["advice"]:
            if text.startswith("set "):
                changed, where = applied(config, Machine([], 16 * GB, 4, room), text)
                assert budget(changed, where)["fits"], text
