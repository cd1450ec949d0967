"""Products by the libraries that suit the processor: against float64, and a whole model whose processor has no bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.model import product as products
from lumina_engine.model.product import Linear, generates_code, linear, product, weight_gradient
from lumina_engine.model.transformer import DeepSeekTransformer

HALVES = [torch.bfloat16, torch.float16]
size = st.integers(0, 40)


@pytest.fixture
def without_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies neither bfloat16 nor float16, whatever this one can do."""
    monkeypatch.setattr(products, "_UNSUPPORTED", frozenset(HALVES))


def rounded_once(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.double() @ weight.double().t()).to(dtype)


@given(rows=size, inner=size, outer=size, part=st.integers(1, 50), dtype=st.sampled_from(HALVES), turned=st.booleans())
def test_c071_widened_parts_give_the_product_rounded_once(rows, inner, outer, part, dtype, turned):
    generator = torch.Generator().manual_seed(rows + 41 * inner)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    weight = torch.randn(*((inner, outer) if turned else (outer, inner)), generator=generator).to(dtype)
    weight = weight.t() if turned else weight
    into = torch.full((rows, outer), float("nan"), dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_SIDE", part)
        result = products._widened(x, weight, into)
    assert result is into
    # sums of float32 differ from those of float64 by less than one rounding to 16 bits
    torch.testing.assert_close(result, rounded_once(x, weight, dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_c071_every_product_equals_float64(dtype, without_halves):
    x, weight, grad = torch.randn(70, 33).to(dtype), torch.randn(50, 33).to(dtype), torch.randn(70, 50).to(dtype)
    bound = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(product(x, weight), rounded_once(x, weight, dtype), **bound)
    torch.testing.assert_close(product(grad, weight.t()), rounded_once(grad, weight.t(), dtype), **bound)
    expected = rounded_once(grad.t(), x.t(), dtype)
    torch.testing.assert_close(weight_gradient(grad, x), expected, **bound)
    into = torch.empty(50, 33, dtype=dtype)
    assert weight_gradient(grad, x, out=into) is into
    torch.testing.assert_close(into, expected, **bound)


@pytest.mark.parametrize("intel", [False, True])
def test_c071_the_library_goes_by_the_processor(intel, monkeypatch):
    """On Intel's the very bits of `torch.mm`, and no rows of filler; on another one those of oneDNN."""
    taken: list[str] = []
    monkeypatch.setattr(products, "_HAS_ONEDNN", True)
    monkeypatch.setattr(products, "_ONLY_AVX2", False)
    monkeypatch.setattr(products, "_INTEL", intel)

    class Operators:
        @staticmethod
        def _linear_pointwise(x, weight, *_):
            taken.append("oneDNN")
            return torch.mm(x, weight.t())

    monkeypatch.setattr(torch.ops, "mkldnn", Operators)
    x, weight = torch.randn(37, 64), torch.randn(96, 64)
    assert torch.equal(product(x, weight), torch.mm(x, weight.t()))
    assert taken == ([] if intel else ["oneDNN"])
    assert generates_code(x) is not intel
    assert generates_code(x.bfloat16())


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_c071_a_linear_layer_without_the_instructions_keeps_dtype_and_gradients(autocast, without_halves):
    layer = Linear(24, 40)
    layer = layer if autocast else layer.to(torch.bfloat16)
    x = torch.randn(3, 7, 24, dtype=layer.weight.dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    assert out.dtype == torch.bfloat16 and out.shape == (3, 7, 40)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (x, layer.weight), grad)
    wide_x, wide_weight = (part.detach().bfloat16().double().requires_grad_() for part in (x, layer.weight))
    theirs = torch.autograd.grad(F.linear(wide_x, wide_weight), (wide_x, wide_weight), grad.double())
    assert [part.dtype for part in ours] == [layer.weight.dtype] * 2
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1.6e-2, atol=1e-3)


def tiny(**keys: Any) -> tuple[DeepSeekTransformer, torch.Tensor]:
    shape = {"vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = DeepSeekTransformer(DeepSeekConfig(**shape, use_moe=True, num_experts=4, moe_top_k=2, **keys))
    return model.to(torch.bfloat16), torch.randint(0, 256, (2, 24))


@pytest.mark.parametrize("way", ["weights", "autocast", "selective", "selective autocast"])
@pytest.mark.parametrize("length", [24, 600], ids=["blocks", "sdpa"])
def test_c071_no_product_of_a_step_is_left_to_the_slow_fallbacks(without_halves, way, length):
    """Forward and backward of a whole model in bfloat16: every matrix product that torch is asked for has float32 factors."""
    model, _ = tiny(gradient_checkpointing="selective" if "selective" in way else False)
    autocast = "autocast" in way
    model, ids = model.float() if autocast else model, torch.randint(0, 256, (1, length))
    asked: list[tuple[str, torch.dtype]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in {"mm", "addmm", "bmm", "baddbmm", "baddbmm_", "_linear_pointwise", "linear"} or "attention" in name:
                asked.append((name, args[0].dtype))
            return func(*args, **(kwargs or {}))

    with Watch(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids)
    with Watch():
        loss.backward()
    assert len(asked) > 50 and {dtype for _, dtype in asked} == {torch.float32}
    assert all(part.grad is not None and part.grad.dtype == part.dtype for part in model.parameters())


def test_c071_a_model_without_the_instructions_computes_what_others_do(monkeypatch):
    """The same step in bfloat16 with and without the processor's own products, where it has them; within bfloat16's noise."""
    model, ids = tiny()
    found = {}
    for unsupported in (frozenset(), frozenset(HALVES)):
        monkeypatch.setattr(products, "_UNSUPPORTED", unsupported)
        model.zero_grad()
        loss = model(ids, labels=ids)
        loss.backward()
        found[unsupported] = (loss.item(), torch.cat([part.grad.flatten().float() for part in model.parameters()]))
    (loss, grad), (wide_loss, wide_grad) = found.values()
    assert wide_loss == pytest.approx(loss, rel=2e-3)
    assert ((wide_grad - grad).norm() / grad.norm()).item() < 2e-2


def test_c071_linear_is_torchs_under_another_autocast(without_halves):
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


def test_c071_no_rows_at_all_are_rows_too(without_halves):
    layer = Linear(8, 5).to(torch.bfloat16)
    assert layer(torch.empty(2, 0, 8, dtype=torch.bfloat16)).shape == (2, 0, 5)
