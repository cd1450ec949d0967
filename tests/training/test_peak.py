"""C8, C63, C139: the budget's peak is within 15 % of the resident memory of real steps. `-s` prints the table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.launch import launch

from .peak import corpus

SCRIPT = Path(__file__).with_name("peak.py")
NEAR = 0.15
PLAIN = {"use_deepspeed": False}
DENSE = {"use_moe": False, "intermediate_size": 1024, "num_layers": 6, "batch_size": 8}
MANY_HEADS = {"num_heads": 16, "num_kv_heads": 16, "head_dim": 64}
LATENT = {"attention": "mla", "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
BUCKETS = {"reduce_bucket_size": 4_000_000, "allgather_bucket_size": 4_000_000}
OVERLAPPED = {"overlap_comm": True, "contiguous_gradients": True}
SHORT = {**BUCKETS, "precision": "bf16"}
# case → keys; the shape is that of `peak.SHAPE` where nothing else is said: 13.7 M parameters, 2 of 8 experts, 1,024 tokens
ONE = {
    "dense, bf16, checkpointing": PLAIN | DENSE | {"precision": "bf16", "gradient_checkpointing": True},
    "experts, saved beside a step": PLAIN | {"save_interval": 1},
    "experts, bf16, short documents": PLAIN | {"short": True, "precision": "bf16"},
}
MORE = {
    "experts": PLAIN,
    "experts, checkpointing": PLAIN | {"gradient_checkpointing": True},
    "experts, bf16": PLAIN | {"precision": "bf16"},
    "wide experts, 64 tokens": PLAIN | {"batch_size": 1, "seq_length": 64, "intermediate_size": 1024},
    "dense, many heads, short documents": PLAIN | DENSE | MANY_HEADS | {"short": True},
    "experts, accumulation": PLAIN | {"gradient_accumulation_steps": 2},
    "experts, mixed_bf16": PLAIN | {"precision": "mixed_bf16"},
    "dense, vocabulary 50,048": PLAIN | DENSE | {"vocab_size": 50_048, "loss_chunk_size": 512, "batch_size": 4},
    "experts, short documents": PLAIN | {"short": True},
    "dense, short documents": PLAIN | DENSE | {"short": True},
    "latent, short documents": PLAIN | DENSE | LATENT | {"short": True},
}
TWO = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1, short documents": {"zero_stage": 1, **BUCKETS, "short": True},
    "ZeRO 1, 64 tokens": {"zero_stage": 1, **BUCKETS, "batch_size": 1, "seq_length": 64},
    "ZeRO 1, overlapped, short documents": {"zero_stage": 1, **BUCKETS, **OVERLAPPED, "short": True},
    "ZeRO 2, bf16": {"zero_stage": 2, **SHORT},
    "ZeRO 1, bf16, accumulation": {"zero_stage": 1, **SHORT, "gradient_accumulation_steps": 2},
    "ZeRO 2, bf16, accumulation": {"zero_stage": 2, **SHORT, "gradient_accumulation_steps": 2},
    "ZeRO 3": {"zero_stage": 3, **BUCKETS},
    "ZeRO 3, bf16, accumulation": {"zero_stage": 3, **SHORT, "gradient_accumulation_steps": 2},
    "ZeRO 2, checkpointing": {"zero_stage": 2, **BUCKETS, "gradient_checkpointing": True},
}


def rows(folder: Path, cases: dict[str, dict], ranks: int) -> list[dict]:
    corpus(folder)
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = launch(SCRIPT, ranks, str(folder), json.dumps(cases), **own)
    found = [json.loads(line.removeprefix("PEAK ")) for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    assert len(found) == len(cases), done.stderr[-3000:]
    return found


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not reset the largest memory")
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        pytest.param(1, ONE, id="one rank"),
        pytest.param(1, MORE, id="one rank, more", marks=pytest.mark.slow),
        pytest.param(2, TWO, id="two ranks", marks=pytest.mark.slow),
    ],
)
def test_c139_c008_c063_predicted_peak_is_within_15_percent(ranks: int, cases: dict, tmp_path: Path) -> None:
    far = []
    print(f"\n{'ranks':5}  {'case':36} {'measured':>9} {'predicted':>9}")
    for row in rows(tmp_path, cases, ranks):
        measured, predicted = row["peak"], row["memory"]["total"] + row["saving"]
        off = predicted / measured - 1
        print(f"{ranks:5}  {row['name']:36} {measured / 1e6:6.1f} MB {predicted / 1e6:6.1f} MB  {off:+.1%}")
        if abs(off) > NEAR:
            far.append((row["name"], round(off, 3), row))
    assert not far
