"""Attention: grouped queries, fused against written out, document borders, padding, the key/value cache."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lumina_engine.config.counts import kv_cache_bytes_per_token
from lumina_engine.model import attention_core
from lumina_engine.model.attention import KVCache
from lumina_engine.model.attention_core import block_attention, fused_attention, reference_attention
from lumina_engine.model.segments import Segments

from .kinds import KINDS, Largest, peak_bytes


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


@pytest.mark.parametrize("kind", [*KINDS.values(), {"qk_norm": True}, {"num_kv_heads": 1}], ids=[*KINDS, "qk_norm", "1 kv"])
@pytest.mark.parametrize("documents", [False, True])
def test_c006_fused_equals_reference(tiny, kind, documents):
    fused = tiny(moe_dropless=True, **kind)
    plain = tiny(moe_dropless=True, use_flash_attention=False, **kind)
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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("length", [48, 1100])
@pytest.mark.parametrize("fused", [True, False])
def test_c006_documents_are_isolated(tiny, kind, length, fused):
    """A packed row gives each document the logits that it has alone, and padding changes nothing."""
    model = tiny(use_flash_attention=fused, seq_length=1100, num_layers=1 if length > 48 else 2, **kind).eval()
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


# Queries, keys and values of two tokens: scores of the second query are 128 and 128.4.
TWO_KEYS = ([[8, 1], [8, 1]], [[16, 0], [16, 0.4]], [[0, 0], [1, 0]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_c006_short_attention_in_bf16_equals_reference(kv_heads):
    """The products that replace SDPA's slow bf16 backward on CPU, in fp32 where they must agree closely."""
    shapes = [(3, heads, 20, 16) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn(3, 4, 20, 16)
    results = []
    for attend in (block_attention, lambda *qkv: reference_attention(*qkv, None, True)):
        out = attend(*inputs)
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    rounded = [x.bfloat16().detach().requires_grad_() for x in inputs]
    out = fused_attention(*rounded, None, True)
    assert "BlockAttention" in type(out.grad_fn).__name__
    torch.testing.assert_close(out.float(), results[1][0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("autocast", [False, True])
def test_c071_scores_and_softmax_are_fp32_in_bf16(autocast):
    """128 and 128.4 are the same number in bf16, so that rounded scores would give both keys the same probability."""
    query, key, value = (torch.tensor(rows, dtype=torch.bfloat16)[None, None] for rows in TWO_KEYS)
    query.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = fused_attention(query, key, value, None, True, scale=1.0)
    assert "BlockAttention" in type(out.grad_fn).__name__
    second = torch.sigmoid(key[0, 0, 1, 1].float())
    torch.testing.assert_close(out[0, 0, 1, 0].float(), second, atol=2e-3, rtol=0)
    out[0, 0, 1, 0].backward()
    torch.testing.assert_close(query.grad[0, 0, 1, 1].float(), second * (1 - second) * key[0, 0, 1, 1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("documents", ["none", "one", "several", "padded"])
def test_c006_no_square_of_scores_from_1024_on(tiny, kind, documents):
    """No operation makes scores or a mask of a whole row, whatever the documents are (a block's scores are a part of them)."""
    model = tiny(seq_length=1024, loss_chunk_size=128, num_layers=1, use_moe=False, **kind)
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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c006_peak_memory_from_1k_to_4k_grows_with_the_row(tiny, kind, documents, dtype):
    """Forward and backward of one layer's attention: at most 4.5 times as much for four times as many tokens."""
    window = {"sliding_window": 256} if "sliding_window" in kind else {}
    model = tiny(seq_length=4096, num_layers=1, use_moe=False, **kind | window).to(dtype)
    peaks = []
    for length in (1024, 4096):
        x = torch.randn(1, length, 64, dtype=dtype, requires_grad=True)
        document_ids = torch.arange(length)[None] // (length // 2 + 9) + 1 if documents else None
        plan = model._plan(x, ids(1, length), document_ids, None, None)
        peaks.append(peak_bytes(lambda x=x, plan=plan: model.blocks[0].attention(x, plan).sum().backward()))
    assert peaks[1] <= 4.5 * peaks[0], peaks


@pytest.mark.parametrize("heads", [(4, 4, 16, 16), (4, 2, 16, 8), (6, 1, 8, 24)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 256, 257, 299, 300])
def test_c140_blocks_equal_the_reference(monkeypatch, heads, window):
    """Several blocks of queries, groups of heads, values of another width; forward and backward."""
    monkeypatch.setattr(attention_core, "_BLOCK", 64)
    query_heads, kv_heads, key, value = heads
    shapes = [(2, query_heads, 300, key), (2, kv_heads, 300, key), (2, kv_heads, 300, value)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn(2, query_heads, 300, value)
    results = []
    for attend in (block_attention, lambda q, k, v, s, w: reference_attention(q, k, v, None, True, s, w)):
        out = attend(*inputs, 0.3, window)
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


# rows, heads, key/value heads, length, window, and blocks of queries that the memory for scores allows
ON_A_DEVICE = [(1, 32, 8, 8192, 1024, 8), (8, 16, 4, 2048, 512, 5), (8, 32, 8, 8192, 1024, 40), (1, 8, 8, 4096, 16, 16)]


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "window", "most"), ON_A_DEVICE, ids=str)
def test_c140_off_the_cpu_a_window_takes_few_blocks_of_all_heads(batch, heads, kv_heads, length, window, most):
    query = torch.empty(batch * kv_heads, heads // kv_heads, length, 128, device="meta")
    blocks = attention_core._blocks(query, window)
    assert len(blocks) <= most < len(attention_core._blocks(torch.empty(*query.shape[:3], 0), window))
    place = 0
    for pairs, rows, keys in blocks:
        assert (pairs.start, pairs.stop, rows.start) == (0, batch * kv_heads, place)
        assert (keys.start, keys.stop) == (max(0, rows.start - window + 1), rows.stop)
        assert batch * heads * (rows.stop - rows.start) * (keys.stop - keys.start) <= attention_core._DEVICE_SCORES
        place = rows.stop
    assert place == length


@pytest.mark.parametrize("room", [1 << 26, 40_000], ids=["whole windows", "little memory"])
@pytest.mark.parametrize("window", [1, 7, 257, 299])
def test_c140_blocks_of_a_device_equal_the_reference(monkeypatch, window, room):
    """The cut that a GPU takes, computed here; forward and backward."""
    cut = attention_core._blocks
    monkeypatch.setattr(attention_core, "_blocks", lambda query, window: cut(query.to("meta"), window))
    monkeypatch.setattr(attention_core, "_BLOCK", 64)
    monkeypatch.setattr(attention_core, "_DEVICE_SCORES", room)
    inputs = [torch.randn(2, heads, 300, 16, requires_grad=True) for heads in (4, 2, 2)]
    weight = torch.randn(2, 4, 300, 16)
    results = []
    for attend in (block_attention, lambda q, k, v, s, w: reference_attention(q, k, v, None, True, s, w)):
        out = attend(*inputs, 0.3, window)
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gqa window", "mla window"])
@pytest.mark.parametrize("fused", [True, False])
def test_c140_a_window_of_16_is_oneself_and_the_15_before(tiny, kind, fused):
    model = tiny(num_layers=1, use_moe=False, use_flash_attention=fused, **KINDS[kind]).eval()
    tokens = ids(1, 40)
    before = model(tokens)[0, 30]
    for place, seen in ((14, False), (15, True), (30, True), (31, False)):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 256
        assert torch.equal(model(changed)[0, 30], before) is not seen


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("changes", [{"use_moe": False}, {"moe_top_k": 2}, {"moe_top_k": 2, "capacity_factor": 0.5}], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_r17_no_leak_later_tokens_leave_earlier_logits_bit_equal(tiny, kind, changes, fused):
    """Alone, packed and padded; with a capacity also in training."""
    model = tiny(use_flash_attention=fused, **kind, **changes).train("capacity_factor" in changes)
    packed = torch.tensor([[1] * 13 + [2] * 30 + [3] * 5, [1] * 48, [1] * 40 + [0] * 8])
    tokens = ids(3, 48)
    for document_ids in (None, packed):
        before = model(tokens, document_ids=document_ids)
        for cut in range(3, 48, 5):
            changed = tokens.clone()
            changed[:, cut:] = (changed[:, cut:] + 1) % 256
            after = model(changed, document_ids=document_ids)
            assert torch.equal(after[:, :cut], before[:, :cut]), cut
            assert not torch.equal(after[:, cut], before[:, cut])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "mla" in kind])
def test_c140_one_cached_token_attends_to_the_latents_themselves(tiny, kind):
    """The cache has the predicted bytes, and nothing as large as keys or values of all heads is made from it."""
    model = tiny(use_moe=False, num_layers=1, seq_length=600, **KINDS[kind]).eval()
    config = model.config
    cache = KVCache(config, 2, 600, torch.bfloat16)
    assert cache.nbytes == 2 * 600 * kv_cache_bytes_per_token(config, 2) == 2 * 600 * (24 + 8) * 2
    with torch.no_grad():
        model(ids(2, 599), cache=cache)
        with Largest() as largest:
            model(ids(2, 1), cache=cache)
    expanded = 2 * 600 * config.num_heads * min(config.qk_nope_head_dim, config.v_head_dim)
    assert largest.numel <= max(2 * 600 * (24 + 8), 256 * 64) < expanded


def test_c140_chunks_behind_a_latent_cache_take_the_cheaper_form(tiny):
    """Both forms are exact; few new tokens attend to the latents, many to keys expanded once."""
    model = tiny(seq_length=600, **KINDS["mla"] | {"kv_lora_rank": 64}).eval()
    attention = model.blocks[0].attention
    assert attention._absorbs(1, 600) and attention._absorbs(4, 600) and not attention._absorbs(300, 600)
    tokens = ids(1, 600)
    with torch.no_grad():
        cache = KVCache(model.config, 1, 600)
        parts = [model(part, cache=cache) for part in tokens.split([250, 4, 300, 46], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=2e-5, rtol=0)


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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["attention_mask", "document_ids"])
def test_c007_padding_leaves_real_positions_equal(tiny, kind, side, name):
    model = tiny(**kind).eval()
    tokens, pad = ids(1, 31), torch.full((1, 5), 7)
    mask = torch.ones(1, 36, dtype=torch.long)
    if side == "left":
        padded, real = torch.cat((pad, tokens), 1), slice(5, None)
        mask[:, :5] = 0
    else:
        padded, real = torch.cat((tokens, pad), 1), slice(0, 31)
        mask[:, 31:] = 0
    torch.testing.assert_close(model(padded, **{name: mask})[:, real], model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("pieces", [[1] * 40, [5, 30, 1, 1, 3], [40], [1, 39]], ids=lambda pieces: str(pieces[:5]))
@pytest.mark.parametrize("fused", [True, False])
def test_r13_c140_cached_decoding_equals_full_forward(tiny, kind, pieces, fused):
    model = tiny(moe_top_k=2, use_flash_attention=fused, **kind).eval()
    tokens = ids(2, 40)
    with torch.no_grad():
        cache = KVCache(model.config, 2, 40)
        parts = [model(part, cache=cache) for part in tokens.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=0)
    assert cache.length == 40


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("pieces", [[24], [20, 4], [9, 15]], ids=str)
def test_r13_left_padded_cache_equals_each_row_alone(tiny, kind, pieces):
    model = tiny(moe_top_k=2, **kind).eval()
    lengths, total = [3, 24, 19], 24
    rows = [ids(1, length + 4) for length in lengths]
    prompts = torch.full((3, total), 9)
    mask = torch.zeros(3, total, dtype=torch.long)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        prompts[i, total - length :] = row[0, :length]
        mask[i, total - length :] = 1
    with torch.no_grad():
        cache = KVCache(model.config, 3, total + 4)
        parts = zip(prompts.split(pieces, 1), mask.split(pieces, 1), strict=True)
        logits = [[model(part, real, cache=cache)[:, -1] for part, real in parts][-1]]
        for step in range(4):
            following = torch.cat(
                [row[:, length + step : length + step + 1] for row, length in zip(rows, lengths, strict=True)]
            )
            logits.append(model(following, cache=cache)[:, -1])
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            expected = model(row)[0, length - 1 :]
            torch.testing.assert_close(torch.stack([step[i] for step in logits]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("pieces", [[40], [24, 16]], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_r13_right_padded_cache_equals_each_row_alone(tiny, kind, pieces, fused):
    """Padding lies between prompt and answer, and a window counts the real tokens as it does without any."""
    model = tiny(moe_top_k=2, use_flash_attention=fused, **kind).eval()
    with torch.no_grad():
        for block in model.blocks:  # so that a key more or less tells
            block.attention.out.weight.mul_(20)
    lengths, total, answer = [27, 40, 11], 40, 20
    prompts, following = ids(3, total), ids(3, answer)
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        cache = KVCache(model.config, 3, total + answer)
        parts = zip(prompts.split(pieces, 1), mask.split(pieces, 1), strict=True)
        logits = torch.cat([model(part, real, cache=cache) for part, real in parts], 1)
        logits = torch.cat([logits, *(model(part, cache=cache) for part in following.split([1] * 17 + [3], 1))], 1)
        for i, length in enumerate(lengths):
            expected = model(torch.cat((prompts[i : i + 1, :length], following[i : i + 1]), 1))[0]
            real = torch.cat((logits[i, :length], logits[i, total:]))
            torch.testing.assert_close(real, expected, atol=2e-5, rtol=1e-4)


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
    """With qk_norm queries and keys are normalised per head before the rotation: written out for two tokens."""
    model = tiny(qk_norm=True, num_layers=1, use_moe=False).eval()
    block = model.blocks[0]
    attention = block.attention
    with torch.no_grad():
        attention.q_norm.weight.uniform_(0.5, 2.0)
        attention.k_norm.weight.uniform_(0.5, 2.0)
        attention.qkv.weight.mul_(20)  # scores that tell
    seen = {}
    attention.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    attention.register_forward_hook(lambda module, args, out: seen.update(out=out))
    model(ids(1, 2))
    projected_SNd = F.linear(block.attention_norm(seen["x"]), attention.qkv.weight)[0].view(2, 4 + 2 + 2, 16)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * weight

    query = normed(projected_SNd[:, :4], attention.q_norm.weight)
    key = normed(projected_SNd[:, 4:6], attention.k_norm.weight).repeat_interleave(2, 1)
    value = projected_SNd[:, 6:].repeat_interleave(2, 1)
    angle = torch.arange(2)[:, None, None] * model.config.rope_theta ** (-torch.arange(0, 16, 2) / 16)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)

    scores_HST = torch.einsum("shd,thd->hst", turned(query), turned(key)) / 4
    scores_HST = scores_HST.masked_fill(torch.ones(2, 2).triu(1).bool(), -torch.inf)
    out = torch.einsum("hst,thd->shd", scores_HST.softmax(-1), value).reshape(1, 2, -1)
    torch.testing.assert_close(seen["out"], F.linear(out, attention.out.weight), atol=1e-4, rtol=1e-4)
