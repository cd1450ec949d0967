"""A trained model of 260,000 parameters gives its known output: dense, cached, batched, padded, and copied into experts.

The file is not part of the repository; without it these tests are skipped.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.model.attention import KVCache
from lumina_engine.model.hf import config_from_hf, from_hf, hf_config, to_hf
from lumina_engine.model.transformer import DeepSeekTransformer

MODELS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "models"
WEIGHTS, EXPECTED = MODELS / "stories260K.bin", MODELS / "stories260K.expected.json"
pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="shared/data/models/stories260K.bin is not beside the repository")
HIDDEN, WIDTH, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 64, 172, 5, 8, 4, 512, 512
PADDED_WIDTH = 176  # our widths are multiples of 8; further rows of zeros change nothing


def read() -> dict[str, torch.Tensor]:
    """The matrices of the file, layer first, [out, in]."""
    data = WEIGHTS.read_bytes()
    assert struct.unpack("<7i", data[:28]) == (HIDDEN, WIDTH, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT)
    shapes = {
        "embedding": (VOCAB, HIDDEN),
        "attention_norm": (LAYERS, HIDDEN),
        "q": (LAYERS, HIDDEN, HIDDEN),
        "k": (LAYERS, HIDDEN // 2, HIDDEN),
        "v": (LAYERS, HIDDEN // 2, HIDDEN),
        "o": (LAYERS, HIDDEN, HIDDEN),
        "ffn_norm": (LAYERS, HIDDEN),
        "gate": (LAYERS, WIDTH, HIDDEN),
        "down": (LAYERS, HIDDEN, WIDTH),
        "up": (LAYERS, WIDTH, HIDDEN),
        "norm": (HIDDEN,),
    }
    values, at, out = np.frombuffer(data, "<f4", offset=28), 0, {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        out[name] = torch.from_numpy(values[at : at + size].copy()).view(shape)
        at += size
    return out


def half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from interleaved to half-split rotary pairs."""
    return weight.reshape(heads, 4, 2, HIDDEN).transpose(1, 2).reshape(weight.shape)


def padded(weight: torch.Tensor, dim: int) -> torch.Tensor:
    extra = list(weight.shape)
    extra[dim] = PADDED_WIDTH - WIDTH
    return torch.cat((weight, torch.zeros(extra)), dim)


def stories(**changes: object) -> DeepSeekTransformer:
    """The model; with experts, every one is a copy of the dense network and the router is left as it was initialised."""
    raw = read()
    base = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS}
    base |= {
        "intermediate_size": PADDED_WIDTH,
        "seq_length": CONTEXT,
        "rope_theta": 10_000.0,
        "norm_eps": 1e-5,
        "use_moe": False,
    }
    model = DeepSeekTransformer(DeepSeekConfig(**(base | changes)))
    state = {"embedding.weight": raw["embedding"], "norm.weight": raw["norm"]}
    for i in range(LAYERS):
        name = f"blocks.{i}"
        state[f"{name}.attention.qkv.weight"] = torch.cat(
            (half_split(raw["q"][i], HEADS), half_split(raw["k"][i], KV_HEADS), raw["v"][i])
        )
        state[f"{name}.attention.out.weight"] = raw["o"][i]
        state[f"{name}.attention_norm.weight"] = raw["attention_norm"][i]
        state[f"{name}.ffn_norm.weight"] = raw["ffn_norm"][i]
        gate_up = torch.cat((padded(raw["gate"][i], 0), padded(raw["up"][i], 0)))
        down = padded(raw["down"][i], 1)
        if model.config.use_moe:
            count = model.config.num_experts
            state |= {f"{name}.ffn.w13": gate_up.repeat(count, 1, 1), f"{name}.ffn.w2": down.repeat(count, 1, 1)}
        else:
            state |= {f"{name}.ffn.gate_up.weight": gate_up, f"{name}.ffn.down.weight": down}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(".router." in name for name in missing)
    return model.eval()


def with_router(std: float, **changes: object) -> DeepSeekTransformer:
    model = stories(use_moe=True, num_experts=4, **changes)
    generator = torch.Generator().manual_seed(11)
    for layer in model.expert_layers:
        torch.nn.init.normal_(layer.router.weight, 0, std, generator=generator)
    return model


@pytest.fixture(scope="module")
def expected() -> list[int]:
    ids = json.loads(EXPECTED.read_text())["greedy_ids"]
    assert len(ids) == 200
    return ids


@torch.no_grad()
def greedy(
    model: DeepSeekTransformer, rows: int = 1, prompt: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> list:
    """200 greedy ids per row through the cache."""
    following = torch.ones(rows, 1, dtype=torch.long) if prompt is None else prompt
    cache = KVCache(model.config, rows, following.shape[1] + 200)
    out = []
    for _ in range(200):
        logits = model(following, mask, cache=cache, logits_to_keep=1)
        mask, following = None, logits.argmax(-1)
        out.append(following)
    return torch.cat(out, 1).tolist()


@torch.no_grad()
def test_stories_full_forward(expected):
    """One forward over the expected ids predicts each of them, and their distances are as published."""
    model = stories()
    tokens = torch.tensor([[1, *expected[:-1]]])
    logits = model(tokens)
    assert logits.argmax(-1)[0].tolist() == expected
    best = logits[0].topk(2, -1).values
    gap = best[:, 0] - best[:, 1]
    assert gap.argmin() == 185 and gap.min().item() == pytest.approx(0.0042, abs=2e-4)


@torch.no_grad()
def test_stories_full_forward_step_by_step(expected):
    model, tokens = stories(), torch.ones(1, 1, dtype=torch.long)
    for _ in range(40):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    assert tokens[0, 1:].tolist() == expected[:40]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_r13_stories_cached(expected, rows, fused):
    assert greedy(stories(use_flash_attention=fused), rows) == [expected] * rows


def test_r13_stories_left_padded_batch(expected):
    """Rows that start 0, 3 and 11 tokens later in the batch, cached."""
    prompt, mask = torch.full((3, 12), 5), torch.zeros(3, 12, dtype=torch.long)
    for row, start in enumerate((0, 3, 11)):
        prompt[row, start:] = torch.tensor([1, *expected[: 11 - start]])
        mask[row, start:] = 1
    for row, ids in enumerate(greedy(stories(), 3, prompt, mask)):
        done = 11 - (0, 3, 11)[row]
        assert ids[: 200 - done] == expected[done:]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_c007_stories_padding_side(expected, side):
    model, tokens = stories(), torch.tensor([[1, *expected[:-1]]])
    rows, mask = torch.full((2, 220), 9), torch.zeros(2, 220, dtype=torch.long)
    rows[1, :200], mask[1, :200] = tokens[0], 1
    real = slice(20, 220) if side == "left" else slice(0, 200)
    rows[0, real], mask[0, real] = tokens[0], 1
    logits = model(rows, mask)
    assert logits[0, real].argmax(-1).tolist() == expected and logits[1, :200].argmax(-1).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_c015_stories_in_four_experts(expected, std, top_k, score):
    """Copies behind any router with gates that sum to 1 are the dense model. Logits, not only ids."""
    dense = stories()
    experts = with_router(std, moe_top_k=top_k, router_normalize=True, router_score=score)
    tokens = torch.tensor([[1, *expected[:-1]]])
    logits = experts(tokens)
    torch.testing.assert_close(logits, dense(tokens), atol=1e-3, rtol=0)
    assert logits.argmax(-1)[0].tolist() == expected
    counts = experts(tokens, return_aux=True).router.counts_LE
    assert (counts > 0).sum() > 5 * top_k


def test_r13_stories_in_four_experts_cached(expected):
    assert greedy(with_router(1.0, moe_top_k=2), 2) == [expected] * 2


@torch.no_grad()
def test_r16_stories_raw_gates_differ(expected):
    """What must not pass: gates that do not sum to 1, and a capacity that drops tokens."""
    tokens = torch.tensor([[1, *expected[:-1]]])
    logits = stories()(tokens)
    for changes in ({"moe_top_k": 2, "router_normalize": False}, {"moe_top_k": 1}):
        assert (with_router(0.02, **changes)(tokens) - logits).abs().max() > 1
    limited = with_router(1.0, moe_top_k=2)
    assert (limited.train()(tokens) - logits).abs().max() > 1
    torch.testing.assert_close(limited.eval()(tokens), logits, atol=1e-3, rtol=0)


def test_c015_stories_gradients_of_the_copies_add_up(expected):
    dense, experts = stories(), with_router(1.0, moe_top_k=2)
    tokens = torch.tensor([[1, *expected]])
    for model in (dense, experts):
        model(tokens, labels=tokens).backward()
    for ours, theirs in zip(experts.blocks, dense.blocks, strict=True):
        torch.testing.assert_close(ours.ffn.w13.grad.sum(0), theirs.ffn.gate_up.weight.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(ours.ffn.w2.grad.sum(0), theirs.ffn.down.weight.grad, atol=1e-5, rtol=1e-3)
        assert ours.ffn.router.weight.grad.abs().max() < 1e-6


@torch.no_grad()
def test_c143_stories_as_llama_both_ways(expected, tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    model, tokens = stories(), torch.tensor([[1, *expected[:-1]]])
    save_file(to_hf(model.state_dict(), model.config), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model.config)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True).eval()
    logits = theirs(tokens).logits
    assert theirs.config.model_type == "llama" and logits.argmax(-1)[0].tolist() == expected
    torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "back")
    config = config_from_hf(json.loads((tmp_path / "back" / "config.json").read_text()))
    again = DeepSeekTransformer(config).eval()
    again.load_state_dict(from_hf(load_file(tmp_path / "back" / "model.safetensors"), config))
    torch.testing.assert_close(again(tokens), logits, atol=1e-4, rtol=0)
    assert greedy(again) == [expected]
