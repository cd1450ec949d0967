"""RMSNorm, SwiGLU and rotary embedding against hand-computed values, plain torch and transformers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lumina_engine.model.layers import RMSNorm, SwiGLU
from lumina_engine.model.rope import RotaryTables, cos_sin, inverse_frequencies, rotate


def test_c002_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0]))
    # mean square of (3, 4) is 12.5, + 0.5 = 13
    expected = torch.tensor([[3 / math.sqrt(13) * 2, -4 / math.sqrt(13)]])
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), expected)


def test_c002_rms_norm_gradients_equal_torch():
    norm = RMSNorm(16, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(3, 5, 16, requires_grad=True)
    grad = torch.randn(3, 5, 16)
    ours = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    theirs = torch.autograd.grad(F.rms_norm(x, (16,), norm.weight, 1e-3), (x, norm.weight), grad)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_c002_rms_norm_statistics_are_fp32_in_bf16():
    norm = RMSNorm(512, eps=1e-5).to(torch.bfloat16)
    x = torch.randn(4, 512).bfloat16()
    expected = F.rms_norm(x.float(), (512,), None, 1e-5).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=0)


def test_c003_swiglu_by_hand():
    ffn = SwiGLU(1, 1)
    with torch.no_grad():
        ffn.gate_up.weight.copy_(torch.tensor([[2.0], [3.0]]))
        ffn.down.weight.fill_(5.0)
    expected = 5 * (2 / (1 + math.exp(-2))) * 3
    assert ffn(torch.tensor([[1.0]])).item() == pytest.approx(expected, rel=1e-6)


def test_c003_swiglu_gradients_equal_torch():
    ffn = SwiGLU(8, 12)
    x = torch.randn(7, 8, requires_grad=True)
    inputs = (x, ffn.gate_up.weight, ffn.down.weight)
    ours = torch.autograd.grad(ffn(x).square().sum(), inputs)
    gate, up = F.linear(x, ffn.gate_up.weight).chunk(2, -1)
    theirs = torch.autograd.grad(F.linear(F.silu(gate) * up, ffn.down.weight).square().sum(), inputs)
    torch.testing.assert_close(ours, theirs)


def test_c005_r38_far_positions_within_1e6_of_float64():
    frequencies, _ = inverse_frequencies(128, 3e8)
    cos, sin = cos_sin(torch.tensor([1_000_000]), frequencies)
    for pair, frequency in enumerate(3e8 ** (-2 * k / 128) for k in range(64)):
        assert cos[0, pair].item() == pytest.approx(math.cos(1e6 * frequency), abs=1e-6)
        assert sin[0, pair].item() == pytest.approx(math.sin(1e6 * frequency), abs=1e-6)
    assert cos.dtype == torch.float32


def test_c005_rotation_by_hand_is_half_split():
    frequencies, _ = inverse_frequencies(4, 100.0)  # steps 1 and 0.1
    cos, sin = cos_sin(torch.tensor([2]), frequencies)
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4), cos, sin).flatten()
    # pairs (0, 2) by 2 rad and (1, 3) by 0.2 rad
    expected = torch.tensor([math.cos(2), -math.sin(0.2), math.sin(2), math.cos(0.2)])
    torch.testing.assert_close(turned, expected)


def test_c005_rotation_gradient_is_the_inverse_rotation():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float32, requires_grad=True)
    frequencies, _ = inverse_frequencies(8, 100.0)
    cos, sin = cos_sin(torch.arange(3), frequencies)
    turned = rotate(x, cos, sin)
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    torch.testing.assert_close(back, x.detach())


@pytest.mark.parametrize(
    "scaling", [("linear", 4.0, None), ("yarn", 4.0, 128), ("yarn", 16.0, 4096), ("yarn", 1.0, 128)], ids=str
)
def test_c005_scaling_equals_transformers(scaling):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    kind, factor, original = scaling
    parameters = {"rope_type": kind, "factor": factor, "rope_theta": 50_000.0}
    if original:
        parameters["original_max_position_embeddings"] = original
    length = int((original or 128) * factor)
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=1, head_dim=64, max_position_embeddings=length, rope_parameters=parameters
    )
    expected, magnitude = rope.ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    ours, our_magnitude = inverse_frequencies(64, 50_000.0, kind, factor, original)
    torch.testing.assert_close(ours.float(), expected.float(), rtol=1e-5, atol=1e-9)
    assert our_magnitude == pytest.approx(magnitude)


def test_c005_unknown_scaling_is_named():
    with pytest.raises(ValueError, match="rope_scaling: 'ntk' is unknown; use none, linear or yarn"):
        inverse_frequencies(64, 1e4, "ntk")


def test_c005_tables_serve_any_position():
    frequencies, magnitude = inverse_frequencies(16, 1e4)
    tables = RotaryTables(frequencies, magnitude, 8)
    expected = cos_sin(torch.arange(20), frequencies)
    for start, stop in ((0, 8), (3, 5), (6, 20)):
        for ours, theirs in zip(tables.span(start, stop, torch.device("cpu")), expected, strict=True):
            torch.testing.assert_close(ours, theirs[start:stop], rtol=0, atol=0)
    positions = torch.tensor([[1, 7], [0, 3]])
    torch.testing.assert_close(tables.at(positions, 7)[0], expected[0][positions], rtol=0, atol=0)
    torch.testing.assert_close(tables.at(positions + 9, 16)[0], expected[0][positions + 9], rtol=0, atol=0)
