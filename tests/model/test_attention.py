"""Attention: grouped queries, fused against written out, document borders, padding, the key/value cache."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lumina_engine.model.attention import KVCache, _ShortAttention, fused_attention, reference_attention
from lumina_engine.model.segments import Segments


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_c004_grouped_equals_full_heads_with_repeated_keys(tiny, kv_heads):
    grouped = tiny(use_moe=False, num_kv_heads=kv_heads).eval()
    full = tiny(use_moe=False, num_kv_heads=4).eval()
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("qkv.weight")]:
        query, key, value = state[name].view(-1, 16, 64).split((4, kv_heads, kv_heads))
        repeats = 4 // kv_heads
        parts = (query, key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0))
        state[name] = torch.cat(parts).reshape(-1, 64)
    full.load_state_dict(state)
    tokens = ids(2, 17)
    torch.testing.assert_close(grouped(tokens), full(tokens), atol=1e-5, rtol=1e-5)


def test_c004_cache_holds_kv_heads_only(tiny):
    model = tiny(num_kv_heads=1)
    assert KVCache(model.config, 3, 10).nbytes == 2 * 2 * 3 * 1 * 10 * 16 * 4
    assert KVCache(model.config, 3, 10, torch.bfloat16).nbytes == 2 * 2 * 3 * 1 * 10 * 16 * 2


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_c006_fused_equals_reference(tiny, kv_heads, documents, qk_norm):
    fused = tiny(num_kv_heads=kv_heads, qk_norm=qk_norm, moe_dropless=True)
    plain = tiny(num_kv_heads=kv_heads, qk_norm=qk_norm, moe_dropless=True, use_flash_attention=False)
    plain.load_state_dict(fused.state_dict())
    tokens = ids(3, 40)
    document_ids = None
    if documents:
        document_ids = torch.tensor([[1] * 13 + [2] * 20 + [3] * 7, [1] * 40, [1] * 30 + [0] * 10])
    grads = []
    for model in (fused, plain):
        loss = model(tokens, labels=tokens, document_ids=document_ids)
        grads.append((loss.detach(), torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_c006_reference_by_hand():
    # one head of size 1: scores of the second query are q·k = (1, 2), weights e/(e+e²) and e²/(e+e²)
    query, key, value = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    out = reference_attention(*(t.view(1, 1, 2, 1) for t in (query, key, value)), None, True).flatten()
    weight = torch.tensor([1.0, 2.0]).softmax(0)
    torch.testing.assert_close(out, torch.stack((torch.tensor(10.0), weight @ value)))


@pytest.mark.parametrize("length", [24, 1100])
@pytest.mark.parametrize("fused", [True, False])
def test_c006_documents_are_isolated(tiny, length, fused):
    """A packed row gives each document the logits that it has alone, and padding changes nothing."""
    model = tiny(use_flash_attention=fused, seq_length=1100).eval()
    cuts = [0, length // 5, length // 2, length - 3]
    row, packed = ids(1, length), torch.zeros(2, length, dtype=torch.long)
    for number, (start, end) in enumerate(pairwise(cuts), start=1):
        packed[0, start:end] = number
    packed[1] = 1
    logits = model(row.expand(2, -1), document_ids=packed)
    for start, end in pairwise(cuts):
        torch.testing.assert_close(logits[:1, start:end], model(row[:, start:end]), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1:], model(row), atol=2e-4, rtol=1e-4)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_c006_short_attention_in_bf16_equals_reference(kv_heads):
    """The products that replace SDPA's slow bf16 backward on CPU, in fp32 where they must agree closely."""
    shapes = [(3, heads, 20, 16) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn(3, 4, 20, 16)
    results = []
    for attend in (_ShortAttention.apply, lambda *qkv: reference_attention(*qkv, None, True)):
        out = attend(*inputs)
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    rounded = [x.bfloat16().detach().requires_grad_() for x in inputs]
    out = fused_attention(*rounded, None, True)
    assert "ShortAttention" in type(out.grad_fn).__name__
    torch.testing.assert_close(out.float(), results[1][0], atol=0.05, rtol=0.05)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("documents", ["none", "one", "several", "padded"])
def test_c006_no_square_of_scores_from_1024_on(tiny, documents):
    """Peak memory grows with S, not with its square, whatever the documents are."""
    model = tiny(seq_length=1024, loss_chunk_size=128)
    tokens = ids(1, 1024)
    lengths = {"none": None, "one": [1024], "several": [100, 500, 424], "padded": [900]}[documents]
    document_ids = None
    if lengths is not None:
        document_ids = torch.zeros(1, 1024, dtype=torch.long)
        for number, (start, end) in enumerate(pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]), start=1):
            document_ids[:, start:end] = number
    with Largest() as largest:
        model(tokens, labels=tokens, document_ids=document_ids).backward()
    assert largest.numel < 1024 * 1024 / 4


def test_segments_lay_every_token_once():
    ids_BS = torch.tensor([[1, 1, 2, 0, 0, 3], [3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0]])
    segments = Segments.of(ids_BS)
    assert segments.rectangles == [(4, 16)] and segments.tokens_M.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert segments.places_M.tolist() == [0, 1, 16, 32, 48, 49, 50, 51, 52, 53]
    x = torch.arange(18.0).view(18, 1)
    expected = x * (ids_BS.view(-1, 1) > 0)
    assert torch.equal(segments.unpack(segments.pack(x)), expected) and segments.pack(x).shape == (64, 1)
    wide = Segments.of(torch.tensor([[1] * 17 + [2] * 16 + [3] * 65 + [4] * 2]))
    assert wide.rectangles == [(2, 16), (1, 32), (1, 128)]


@pytest.mark.parametrize("length", [24, 1100])
def test_c006_gradients_stay_inside_the_document(tiny, length):
    model = tiny(seq_length=1100, moe_dropless=True)
    first, half = ids(1, length), length // 2
    document_ids = torch.ones(1, length, dtype=torch.long)
    document_ids[:, half:] = 2
    labels = first.clone()
    labels[:, half:] = -100
    packed = model(first, labels=labels, document_ids=document_ids)
    alone = model(first[:, :half], labels=first[:, :half])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in (packed, alone))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["attention_mask", "document_ids"])
def test_c007_padding_leaves_real_positions_equal(tiny, side, name):
    model = tiny().eval()
    tokens, pad = ids(1, 11), torch.full((1, 5), 7)
    mask = torch.ones(1, 16, dtype=torch.long)
    if side == "left":
        padded, real = torch.cat((pad, tokens), 1), slice(5, None)
        mask[:, :5] = 0
    else:
        padded, real = torch.cat((tokens, pad), 1), slice(0, 11)
        mask[:, 11:] = 0
    torch.testing.assert_close(model(padded, **{name: mask})[:, real], model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [12], [1, 11]], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_r13_cached_decoding_equals_full_forward(tiny, pieces, fused):
    model = tiny(moe_top_k=2, use_flash_attention=fused).eval()
    tokens = ids(2, 12)
    with torch.no_grad():
        cache = KVCache(model.config, 2, 12)
        parts = [model(part, cache=cache) for part in tokens.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-4)
    assert cache.length == 12


def test_r13_left_padded_cache_equals_each_row_alone(tiny):
    model = tiny(moe_top_k=2).eval()
    lengths, total = [3, 8, 5], 8
    rows = [ids(1, length + 4) for length in lengths]
    prompts = torch.full((3, total), 9)
    mask = torch.zeros(3, total, dtype=torch.long)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        prompts[i, total - length :] = row[0, :length]
        mask[i, total - length :] = 1
    with torch.no_grad():
        cache = KVCache(model.config, 3, total + 4)
        logits = [model(prompts, mask, cache=cache)[:, -1]]
        for step in range(4):
            following = torch.cat(
                [row[:, length + step : length + step + 1] for row, length in zip(rows, lengths, strict=True)]
            )
            logits.append(model(following, cache=cache)[:, -1])
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            expected = model(row)[0, length - 1 :]
            torch.testing.assert_close(torch.stack([step[i] for step in logits]), expected, atol=1e-5, rtol=1e-4)


def test_r13_outputs_do_not_depend_on_the_rest_of_the_batch(tiny):
    model = tiny(num_experts=8).eval()
    tokens = ids(4, 16)
    together = model(tokens)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], model(tokens[i : i + 1]), atol=1e-5, rtol=1e-5)


def test_cache_refuses_what_does_not_fit(tiny):
    model = tiny().eval()
    cache = KVCache(model.config, 1, 4)
    with pytest.raises(ValueError, match="made for 1 rows, got 2"):
        model(ids(2, 2), cache=cache)
    with pytest.raises(ValueError, match="0 \\+ 5 tokens exceed max_length 4"):
        model(ids(1, 5), cache=cache)


def test_c006_qk_norm_by_hand(tiny):
    """With qk_norm queries and keys are normalised per head before the rotation."""
    model = tiny(qk_norm=True, num_layers=1, use_moe=False).eval()
    block = model.blocks[0]
    seen = {}
    block.attention.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    block.attention.register_forward_hook(lambda module, args, out: seen.update(out=out))
    model(ids(1, 1))
    attention = block.attention
    # a single token attends to itself only: the output is its value, whatever queries and keys are
    value = F.linear(seen["x"], attention.qkv.weight)[..., -2 * 16 :].view(1, 1, 2, 16).repeat_interleave(2, 2).flatten(2)
    torch.testing.assert_close(seen["out"], F.linear(value, attention.out.weight), atol=1e-5, rtol=1e-5)
    query = attention.q_norm(torch.full((1, 1, 1, 16), 3.0))
    torch.testing.assert_close(query[0, 0, 0], attention.q_norm.weight, atol=1e-5, rtol=1e-5)
