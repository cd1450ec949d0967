"""Experts against a naive reference, capacity, order of service, router options, statistics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.model.experts import experts_grouped, experts_loop
from lumina_engine.model.moe import MoE, _in_turn, balance_loss, capacity_of, dispatch, uniform_routing, z_loss
from lumina_engine.model.transformer import DeepSeekTransformer


def build(**changes: object) -> MoE:
    base = {"vocab_size": 256, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 24}
    moe = MoE(DeepSeekConfig(**(base | {"moe_dropless": True} | changes)).resolved())
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.3)
    return moe


def naive(moe: MoE, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Token by token, choice by choice, with autograd's own operations; dropless."""
    scores = x @ moe.router.weight.t()
    scores = scores.softmax(-1) if moe.router.score == "softmax" else scores.sigmoid()
    rows = []
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            token = x[b, s]
            out = token * 0
            chosen = sorted(range(moe.num_experts), key=lambda e: -(scores[b, s, e] + moe.router.bias[e]).item())[: moe.top_k]
            total = sum(scores[b, s, e] for e in chosen)
            for e in chosen if valid is None or valid[b, s] else []:
                gate = scores[b, s, e] / total if moe.router.normalize else scores[b, s, e]
                first, second = (moe.w13[e] @ token).chunk(2)
                out = out + gate * moe.router.scale * (moe.w2[e] @ (F.silu(first) * second))
            rows.append(out)
    return torch.stack(rows).view(x.shape)


@settings(max_examples=25, deadline=None)
@given(
    experts=st.sampled_from([1, 3, 8, 60]),
    top_k=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    score=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.sampled_from(["auto", False]),
    padded=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_c015_c019_equals_a_naive_loop(experts, top_k, shape, score, normalize, padded, seed):
    torch.manual_seed(seed)
    moe = build(
        num_experts=experts, moe_top_k=min(top_k, experts), router_score=score, router_normalize=normalize, router_scale=1.5
    )
    moe.router.bias.uniform_(-0.3, 0.3)
    x = torch.randn(*shape, 64, requires_grad=True)
    valid = torch.rand(shape) < 0.7 if padded else None
    inputs = (x, moe.w13, moe.w2, moe.router.weight)
    weight = torch.randn(*shape, 64)
    results = []
    for out in (moe(x, valid)[0], naive(moe, x, valid)):
        grads = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        results.append((out.detach(), *grads))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("capacity", [None, 2, 5])
@pytest.mark.parametrize("recompute", [False, True])
def test_c017_grouped_equals_loop(dtype, top_k, capacity, recompute):
    """The two ways to run experts agree, with empty experts, overflow and padding, forward and backward."""
    x = torch.randn(18, 64).to(dtype).requires_grad_()
    gates = torch.rand(18, top_k, requires_grad=True)
    w13, w2 = (torch.randn(5, *shape).mul(0.2).to(dtype).requires_grad_() for shape in ((32, 64), (64, 16)))
    experts = torch.rand(3, 6, 4).topk(top_k).indices  # the fifth expert stays empty
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[1, 4:] = False
    plan = dispatch(experts, 5, valid, None if capacity is None else torch.tensor(capacity))
    weight = torch.randn(18, 64).to(dtype)
    results = []
    for compute, again in ((experts_loop, False), (experts_loop, recompute), (experts_grouped, recompute)):
        out = compute(x, gates, plan.choice_N, plan.ends_E, w13, w2, again)
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), (x, gates, w13, w2))))
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(results[0], results[1], **close)
    torch.testing.assert_close(results[0], results[2], **close)
    assert results[0][3][4].abs().sum() == 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_c015_r16_router_learns_from_the_language_loss_alone(tiny, top_k):
    model = tiny(moe_top_k=top_k)
    tokens = torch.randint(0, 256, (2, 16))
    model(tokens, labels=tokens).backward()
    for layer in model.expert_layers:
        assert layer.router.weight.grad.norm() > 1e-3


def test_r16_gates_by_hand():
    """k = 1 keeps the raw score, k = 2 divides by the sum; the bias decides the choice and never the gate."""
    x = torch.zeros(1, 64)
    x[0, 0] = 1
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0]).softmax(0)
    for changes, bias, expected in (
        ({"moe_top_k": 1}, [0, 0, 0, 0], {0: scores[0]}),
        ({"moe_top_k": 1, "router_scale": 2.5}, [0, 0, 0, 0], {0: 2.5 * scores[0]}),
        ({"moe_top_k": 2}, [0, 0, 0, 0], {0: scores[0] / (scores[0] + scores[1]), 1: scores[1] / (scores[0] + scores[1])}),
        ({"moe_top_k": 1}, [0, 0, 0, 1], {3: scores[3]}),
        ({"moe_top_k": 1, "router_score": "sigmoid"}, [0, 0, 0, 0], {0: torch.tensor(3.0).sigmoid()}),
    ):
        moe = build(num_experts=4, **changes)
        with torch.no_grad():
            moe.router.weight.zero_()
            moe.router.weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
            moe.router.bias.copy_(torch.tensor(bias))
        _, _, experts, gates = moe.router(x)
        assert dict(zip(experts[0].tolist(), gates[0].tolist(), strict=True)) == pytest.approx(
            {e: float(g) for e, g in expected.items()}
        )


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "expected"),
    [
        (8, 4, 1, 1.25, 3),
        (10, 1, 1, 1.1, 11),
        (2048, 8, 1, 1.25, 320),
        (7, 3, 2, 1.0, 5),
        (1, 64, 1, 1.25, 1),
        (30, 1, 1, 0.1, 3),
    ],
)
def test_c017_capacity_of(tokens, experts, top_k, factor, expected):
    assert int(capacity_of(tokens, experts, top_k, factor)) == expected


def test_c017_r17_capacity_by_hand():
    """2 sequences of 4 tokens, 2 experts, capacity ceil(8/2 · 0.75) = 3; choices written out, one padding token."""
    moe = build(num_experts=2, moe_dropless=False, capacity_factor=0.75).train()
    chosen = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]])
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0, 0], moe.router.weight[1, 1] = 1, 1
    x = torch.randn(2, 4, 64)
    x[..., :2] = F.one_hot(chosen, 2) * 4
    out, stats = moe(x)
    # expert 0 is asked, by position and then sequence, for (0,0) (1,0) (0,1) | (1,1) (0,2) (1,3): the last three are lost
    lost = torch.tensor([[False, False, True, False], [False, True, False, True]])
    assert torch.equal(out.abs().sum(-1) == 0, lost)
    assert stats.counts_E.tolist() == [6, 2] and stats.dropped.item() == 3
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[0, 0] = False  # 7 tokens: capacity ceil(7/2 · 0.75) = 3; its place goes to (1, 1)
    out, stats = moe(x, valid)
    lost[0, 0], lost[1, 1] = True, False
    assert torch.equal(out.abs().sum(-1) == 0, lost)
    assert stats.counts_E.tolist() == [5, 2] and stats.dropped.item() == 2
    dropless = build(num_experts=2)
    dropless.load_state_dict(moe.state_dict())
    moe.eval()
    torch.testing.assert_close(moe(x)[0], dropless(x)[0])
    assert moe(x)[1].dropped == 0 and dropless.train()(x)[1].dropped == 0


def test_r17_a_later_token_changes_no_earlier_output_in_training(tiny):
    """Causality of the whole model with capacity in force, at every cut."""
    model = tiny(capacity_factor=0.5, moe_top_k=2).train()
    tokens = torch.randint(0, 256, (3, 12))
    before, stats = model(tokens), model(tokens, return_aux=True).router
    assert stats.dropped_L.min() > 0
    for cut in range(1, 12):
        changed = tokens.clone()
        changed[:, cut:] = torch.randint(0, 256, (3, 12 - cut))
        torch.testing.assert_close(model(changed)[:, :cut], before[:, :cut], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3])
def test_c016_uniform_router_gives_one(tiny, top_k):
    model = tiny(moe_top_k=top_k, router_score="softmax")
    for layer in model.expert_layers:
        torch.nn.init.zeros_(layer.router.weight)
    router = model(torch.randint(0, 256, (2, 16)), return_aux=True).router
    uniform = torch.full_like(router.counts_LE, 32 * top_k / 4)
    assert balance_loss(router.prob_sum_LE, uniform, router.tokens, router.tokens, top_k).item() == pytest.approx(1)
    assert balance_loss(router.prob_sum_LE, router.counts_LE, router.tokens, router.tokens, top_k).item() == pytest.approx(1)
    assert z_loss(router.z_sum_L, router.tokens).item() == pytest.approx(math.log(4) ** 2)


def test_c016_collapsed_router_gives_the_number_of_experts():
    prob_sum, counts = torch.tensor([[10.0, 0, 0, 0]]), torch.tensor([[10.0, 0, 0, 0]])
    assert balance_loss(prob_sum, counts, torch.tensor(10.0), torch.tensor(10.0), 1).item() == 4


def test_c016_parts_of_two_ranks_add_up(tiny):
    model = tiny(moe_top_k=2, moe_dropless=True)
    tokens = torch.randint(0, 256, (4, 16))
    whole = model(tokens, return_aux=True).router
    halves = [model(half, return_aux=True).router for half in tokens.split(2)]
    counts = halves[0].counts_LE + halves[1].counts_LE
    expected = balance_loss(whole.prob_sum_LE, whole.counts_LE, whole.tokens, whole.tokens, 2)
    parts = [balance_loss(half.prob_sum_LE, counts, whole.tokens, whole.tokens, 2) for half in halves]
    torch.testing.assert_close(sum(parts), expected)
    torch.testing.assert_close(sum(z_loss(half.z_sum_L, whole.tokens) for half in halves), z_loss(whole.z_sum_L, whole.tokens))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_r14_padding_is_in_no_figure(tiny, score):
    model = tiny(moe_top_k=2, capacity_factor=0.5, router_score=score)
    tokens = torch.randint(0, 256, (1, 10))
    padded = torch.cat((tokens, torch.full((1, 6), 3)), 1)
    documents = (torch.arange(16) < 10).long()[None]
    alone = model(tokens, labels=tokens, return_aux=True)
    labels = torch.cat((tokens, torch.full((1, 6), -100)), 1)
    together = model(padded, labels=labels, document_ids=documents, return_aux=True)
    torch.testing.assert_close(together.router._asdict(), alone.router._asdict())
    assert alone.router.tokens == 10 and alone.router.dropped_L.sum() > 0
    assert alone.router.counts_LE.sum(-1).tolist() == [20, 20]
    torch.testing.assert_close(together.loss_sum, alone.loss_sum)
    if score == "sigmoid":
        torch.testing.assert_close(alone.router.prob_sum_LE.sum(-1), torch.tensor([10.0, 10.0]))


def test_c018_jitter_only_in_training_and_from_the_global_generator(tiny):
    model = tiny(router_jitter_noise=0.3, moe_top_k=2, moe_dropless=True)
    calm = tiny(moe_top_k=2, moe_dropless=True)
    calm.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 256, (2, 16))
    torch.manual_seed(5)
    first, second = model(tokens), model(tokens)
    torch.manual_seed(5)
    assert torch.equal(model(tokens), first) and not torch.allclose(first, second)
    assert torch.equal(model.eval()(tokens), calm.eval()(tokens))


def test_c141_shared_experts_take_every_token():
    moe = build(num_experts=3, num_shared_experts=2)
    assert moe.shared.gate_up.weight.shape == (2 * 48, 64)
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(moe(x)[0], naive(moe, x) + moe.shared(x), atol=1e-4, rtol=1e-4)


def test_c141_bias_moves_towards_the_starved_and_stays_centred(tiny):
    model = tiny()
    model.update_router_bias(torch.tensor([[10.0, 2, 2, 2], [4, 4, 4, 4]]), 0.1)
    biases = model.router_bias_LE
    torch.testing.assert_close(biases[0], torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    assert biases[1].abs().sum() == 0
    assert "blocks.0.ffn.router.bias" in model.state_dict()


def test_c141_bias_balances_a_skewed_router():
    """200 updates bring max/mean of fixed skewed scores below 1.25; without them it stays where it is."""
    moe = build(num_experts=8)
    x = torch.randn(1, 2048, 64)
    with torch.no_grad():
        moe.router.weight.mul_(0.2)
        x[..., 0] = 1
        moe.router.weight[0, 0] += 2
    model = torch.nn.Module()

    def imbalance() -> float:
        counts = moe(x)[1].counts_E
        return (counts.max() / counts.mean()).item()

    assert imbalance() > 3
    model.expert_layers = [moe]
    for _ in range(200):
        DeepSeekTransformer.update_router_bias(model, moe(x)[1].counts_E[None], 5e-3)
    assert imbalance() < 1.25


def skewed_rows(follows: torch.Tensor) -> torch.Tensor:
    """(8, 64) tokens of 256: the likeliest is 41 times as frequent as the 41st; seven in ten follow from the one before."""
    chances = 1 / torch.arange(1.0, 257)
    rows = torch.multinomial(chances, 8 * 64, replacement=True).view(8, 64)
    fresh = torch.rand(8, 64) < 0.3
    for place in range(1, 64):
        rows[:, place] = torch.where(fresh[:, place], rows[:, place], follows[rows[:, place - 1]])
    return rows


def loads_after_training(score: str, rate: float) -> torch.Tensor:
    """Choices (L, E) of the last 40 of 200 steps on the language loss alone, with or without the bias."""
    shape = {"vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
    model = DeepSeekTransformer(DeepSeekConfig(**shape, num_experts=8, seq_length=64, moe_dropless=True, router_score=score))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    follows, loads = torch.randperm(256), torch.zeros(2, 8)
    for step in range(200):
        tokens = skewed_rows(follows)
        out = model(tokens, labels=tokens, return_aux=True)
        (out.loss_sum / out.num_labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rate:
            model.update_router_bias(out.router.counts_LE, rate)
        if step >= 160:
            loads += out.router.counts_LE
    return loads


@pytest.mark.parametrize("score", [pytest.param("softmax", marks=pytest.mark.slow), "sigmoid"])
def test_c141_the_bias_balances_training_on_skewed_data(score):
    """Below 1.25 of the mean in every layer and no expert dead; without it the same training is far from that."""
    balanced = loads_after_training(score, 5e-3)
    assert (balanced.amax(1) / balanced.mean(1)).max() < 1.25 and balanced.min() > 0
    torch.manual_seed(0)
    left_alone = loads_after_training(score, 0.0)
    assert (left_alone.amax(1) / left_alone.mean(1)).max() > 1.5


@pytest.mark.parametrize("how", [False, True, "selective"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_uniform_routing_gives_every_expert_the_same_load(tiny, top_k, how):
    """Whatever router and bias say, for benchmarks and measures of memory; nothing is dropped, and afterwards it is over."""
    model = tiny(moe_top_k=top_k, capacity_factor=1.0, gradient_checkpointing=how)
    tokens = torch.randint(0, 256, (2, 16))
    model.update_router_bias(torch.tensor([[0.0, 9, 9, 9]] * 2), 5.0)
    chosen = model(tokens, return_aux=True).router
    with uniform_routing(model):
        out = model(tokens, labels=tokens, return_aux=True)
        out.loss_sum.backward()
    assert (out.router.counts_LE == 32 * top_k / 4).all() and not out.router.dropped_L.any()
    assert all(layer.router.weight.grad.norm() > 1e-3 for layer in model.expert_layers)
    assert all((layer.w2.grad.flatten(1).norm(dim=1) > 0).all() for layer in model.expert_layers)
    torch.testing.assert_close(model(tokens, return_aux=True).router._asdict(), chosen._asdict())
    assert (chosen.counts_LE[:, 0] == 32).all()


def test_uniform_routing_serves_each_token_by_different_experts():
    scores = torch.rand(50, 7)
    for top_k in range(1, 8):
        experts = _in_turn(scores, top_k)
        assert all(len(set(row)) == top_k for row in experts.tolist())
        counts = experts.flatten().bincount(minlength=7)
        assert counts.max() - counts.min() <= 1


def test_c015_router_stays_fp32(tiny):
    """bf16 weights and autocast: logits, scores and statistics in fp32, and a bias whose small steps do not round away."""
    model = tiny(moe_top_k=2).to(torch.bfloat16)
    router = model.expert_layers[0].router
    assert router.bias.dtype == torch.float32 and router.weight.dtype == torch.bfloat16
    x = torch.randn(6, 64)
    for value in router(x.bfloat16()):
        assert value.dtype in (torch.float32, torch.int64)
    exact = x.bfloat16().double() @ router.weight.double().t()
    torch.testing.assert_close(router(x.bfloat16())[0].double(), exact, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(router(x.bfloat16())[0].double(), exact, atol=1e-4, rtol=1e-4)
    model.update_router_bias(torch.tensor([[3.0, 1, 1, 1]] * 2), 1e-3)
    model.update_router_bias(torch.tensor([[3.0, 1, 1, 1]] * 2), 1e-3)
    torch.testing.assert_close(model.half().float().router_bias_LE[0, 0], torch.tensor(-0.003), atol=1e-7, rtol=0)
    stats = model.bfloat16()(torch.randint(0, 256, (1, 8)), return_aux=True).router
    assert {tensor.dtype for tensor in stats} == {torch.float32}


def test_c017_filler_of_an_expert_touches_no_token(monkeypatch):
    """Rows are filled up to a round number; an expert whose result overflows for token 0 must not reach it that way."""
    monkeypatch.setattr("lumina_engine.model.experts.generates_code", lambda x_TD: True)  # whatever the processor is
    x_TD = torch.zeros(40, 8)
    x_TD[0] = 1.0
    w13, w2 = torch.ones(2, 8, 8), torch.ones(2, 8, 4)
    w13[1] = 1e30  # token 0 never chose this expert, and would be infinite in it
    x_TD.requires_grad_(True)
    choice_N, gates_TK = torch.arange(40), torch.ones(40, 1)
    out_TD = experts_loop(x_TD, gates_TK, choice_N, torch.tensor([5, 40]), w13, w2)
    out_TD.sum().backward()
    assert out_TD.isfinite().all() and x_TD.grad is not None and x_TD.grad[0].isfinite().all()


def test_c019_the_grouped_products_are_taken_where_a_try_succeeds(monkeypatch, tiny):
    """The device is asked by running, once for each type; compiled, only bf16 can be traced."""
    from lumina_engine.model import experts, moe

    cpu = torch.device("cpu")
    assert experts.grouped_works(cpu, torch.float32) and experts.grouped_works(cpu, torch.bfloat16)
    layer = next(iter(tiny().expert_layers))
    meta = torch.empty(4, 64, device="meta")
    tries = []
    monkeypatch.setattr(moe, "grouped_works", lambda device, dtype: tries.append(dtype) or dtype != torch.float32)
    assert layer._kernel(torch.empty(4, 64)) is experts_loop and not tries
    assert [layer._kernel(meta) for _ in range(2)] == [experts_loop] * 2
    assert layer._kernel(meta.bfloat16()) is experts_grouped and tries == [torch.float32, torch.bfloat16]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer._kernel(meta.half()) is experts_loop and layer._kernel(meta.bfloat16()) is experts_grouped
    assert len(tries) == 2

    def no_kernel(*args, **kwargs):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(experts.F, "grouped_mm", no_kernel)
    assert not experts.grouped_works(cpu, torch.float32)
