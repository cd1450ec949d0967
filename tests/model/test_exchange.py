"""Experts behind an all-to-all, in a group of one process: the same results, gradients and statistics (C20, C21).

Several ranks are in parity/test_expert_parallel.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_engine.config.activations import block_activation_bytes, selective_activation_bytes
from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.model.exchange import ExpertGroup
from lumina_engine.model.moe import MoE
from lumina_engine.model.transformer import DeepSeekTransformer
from tests.config.test_counts import KEPT, saved_bytes, small
from tests.model.test_moe import build


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if mine:
        dist.destroy_process_group()


def alone(overlap: bool) -> ExpertGroup:
    return ExpertGroup(dist.group.WORLD, 0, 1, dist.group.WORLD, 1, overlap)


def pair(overlap: bool, **changes: object) -> tuple[MoE, MoE]:
    """A layer, and its twin whose experts are reached through the exchange."""
    one, other = build(**changes), build(**changes)
    other.load_state_dict(one.state_dict())
    other.spread(alone(overlap))
    return one.train(), other.train()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to float32 rounding of the largest value: sums in another order."""
    return bool((one - other).abs().max() <= 2e-5 * other.abs().max() + 1e-7)


@settings(max_examples=40, deadline=None)
@given(
    experts=st.sampled_from([1, 3, 8]),
    top_k=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7)),
    capacity=st.sampled_from([None, 0.5, 1.25]),
    padding=st.sampled_from(["none", "some", "all"]),
    overlap=st.booleans(),
    recompute=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_c020_equals_the_layer_without_exchange(experts, top_k, shape, capacity, padding, overlap, recompute, seed):
    torch.manual_seed(seed)
    keys = {"num_experts": experts, "moe_top_k": min(top_k, experts), "num_shared_experts": seed % 2}
    keys |= {"moe_dropless": capacity is None, "capacity_factor": capacity or 1.25}
    one, other = pair(overlap, **keys)
    valid = {"none": None, "some": torch.rand(shape) < 0.6, "all": torch.zeros(shape, dtype=torch.bool)}[padding]
    x = torch.randn(*shape, 64)
    results = []
    for layer in (one, other):
        inputs = x.clone().requires_grad_()
        out, stats = layer(inputs, valid, recompute=recompute)
        (out.square().sum() + stats.prob_sum_E.square().sum()).backward()
        results.append((out, stats, inputs.grad, {name: p.grad for name, p in layer.named_parameters()}))
    (out, stats, grad, grads), (far, far_stats, far_grad, far_grads) = results
    assert close(far, out) and close(far_grad, grad)
    for name in grads:
        assert far_grads[name] is not None, name  # also of experts without a token
        assert close(far_grads[name], grads[name]), name
    assert all(torch.equal(a, b) for a, b in zip(far_stats, stats, strict=True))


def test_c020_evaluation_is_dropless() -> None:
    _, layer = pair(False, num_experts=4, moe_dropless=False, capacity_factor=0.1)
    x = torch.randn(1, 32, 64)
    assert layer.train()(x)[1].dropped > 0
    with torch.no_grad():
        assert layer.eval()(x)[1].dropped == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_c020_autocast_sends_what_it_computes_in(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair(overlap, num_experts=4, moe_top_k=2)
    sent = []
    exchange = dist.all_to_all_single
    monkeypatch.setattr(
        dist, "all_to_all_single", lambda out, rows, *a, **k: sent.append(rows.dtype) or exchange(out, rows, *a, **k)
    )
    x = torch.randn(2, 8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(other(x)[0], one(x)[0])
    assert sent == [torch.int64] + [torch.bfloat16] * (4 if overlap else 2)


def test_c020_a_rank_draws_its_own_experts_of_the_same_model() -> None:
    config = DeepSeekConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=4)
    whole = DeepSeekTransformer(config).state_dict()
    for place in (0, 1):
        with torch.device("meta"):
            model = DeepSeekTransformer(config)
        model.spread_experts(ExpertGroup(dist.group.WORLD, place, 2, dist.group.WORLD, 1))
        model.to_empty(device="cpu")
        model.init_weights(0)
        for name, tensor in model.state_dict().items():
            want = whole[name]
            if name.endswith((".w13", ".w2")):
                want = want[2 * place : 2 * place + 2]
            assert torch.equal(tensor, want), name


def test_c020_experts_that_the_ranks_do_not_divide_are_refused() -> None:
    layer = build(num_experts=3)
    with pytest.raises(ValueError, match="does not divide num_experts = 3"):
        layer.spread(ExpertGroup(dist.group.WORLD, 0, 2, dist.group.WORLD, 1))


@pytest.mark.parametrize("checkpointing", [False, "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["plain", "top-2", "shared"])
def test_c139_activations_with_exchange_are_those_that_autograd_keeps(
    shape: str, precision: str, checkpointing: bool | str
) -> None:
    dtype, value = (torch.float32, 4) if precision == "fp32" else (torch.bfloat16, 2)
    said = selective_activation_bytes if checkpointing else block_activation_bytes
    ids = torch.arange(256).reshape(4, 64)
    kept = []
    for layers in (2, 4):
        config = small(moe_dropless=True, num_layers=layers, gradient_checkpointing=checkpointing, **KEPT[shape])
        model = DeepSeekTransformer(config).to(dtype).train()
        model.spread_experts(alone(overlap=False))
        kept.append(saved_bytes(model, ids))
    spread = config.model_copy(update={"expert_parallel_size": 2})
    assert kept[1] - kept[0] == pytest.approx(2 * said(spread, 256, value), rel=0.05)
