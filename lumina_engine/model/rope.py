"""Rotary position embedding (RoPE), half-split convention as in Hugging Face, with linear and YaRN scaling.

Angles are computed in float64 and only their cosines and sines are kept in float32: at position 1,000,000 a float32 angle is
off by up to 0.06 rad, which is noise for the fast channels.

Shapes: B batch, S sequence, N heads (query and key heads side by side), d head size, P positions, R rows of a
tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lumina_engine.model.layers import tile_rows

# Up to this many positions the tables are computed once and indexed; beyond, only for the positions of the call.
_TABLE_LIMIT = 65_536


def inverse_frequencies(
    head_dim: int,
    theta: float,
    scaling: str = "none",
    factor: float = 1.0,
    original_length: int | None = None,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> tuple[Tensor, float]:
    """Angular step per position for each of the d/2 channel pairs (float64), and the factor on cos and sin.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). `yarn` keeps the channels that turn more
    than `beta_fast` times within `original_length`, divides those that turn less than `beta_slow` times, blends in between, and
    scales cos and sin by 0.1·ln(factor) + 1 (Peng et al. 2023, arXiv:2309.00071). Raises ValueError for an unknown `scaling`,
    or for yarn without `original_length`.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    frequencies = theta**-exponent
    if scaling == "none":
        return frequencies, 1.0
    if scaling == "linear":
        return frequencies / factor, 1.0
    if scaling != "yarn":
        raise ValueError(f"rope_scaling: {scaling!r} is unknown; use none, linear or yarn")
    if original_length is None:
        raise ValueError("rope_scaling=yarn needs rope_original_length: the length that the model was trained with")

    def channel(turns: float) -> float:
        return head_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(beta_fast)), 0)
    high = min(math.ceil(channel(beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64, device="cpu") - low) / (high - low if high > low else 0.001)
    share_scaled = ramp.clamp(0, 1)
    blended = frequencies * (1 - share_scaled) + frequencies / factor * share_scaled
    return blended, 0.1 * math.log(factor) + 1.0


def cos_sin(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables (…, d/2) in float32 for integer `positions` (…), angles in float64."""
    angles = positions.to(torch.float64)[..., None] * frequencies.to(positions.device)
    return (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()


class RotaryTables:
    """Cosines and sines for a model: computed on first use on the device that asks, so building on `meta` needs no care.

    `length` is the number of positions kept ready; positions at or beyond it are computed for the call.
    """

    def __init__(self, frequencies: Tensor, magnitude: float, length: int) -> None:
        self.frequencies = frequencies
        self.magnitude = magnitude
        self.length = length if length <= _TABLE_LIMIT else 0
        self._tables: tuple[Tensor, Tensor] | None = None

    def span(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables (stop - start, d/2) for consecutive positions."""
        if stop > self.length:
            return cos_sin(torch.arange(start, stop, device=device), self.frequencies, self.magnitude)
        cos, sin = self._ready(device)
        return cos[start:stop], sin[start:stop]

    def at(self, positions: Tensor, highest: int) -> tuple[Tensor, Tensor]:
        """Tables (*positions.shape, d/2); `highest` is a bound on the positions known without looking at them."""
        if highest >= self.length:
            return cos_sin(positions, self.frequencies, self.magnitude)
        cos, sin = self._ready(positions.device)
        return cos[positions], sin[positions]

    def _ready(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._tables is None or self._tables[0].device != device:
            positions = torch.arange(self.length, device=device)
            # Inference mode would mark the kept tables as unusable in a later training step.
            with torch.inference_mode(False):
                self._tables = cos_sin(positions.clone(), self.frequencies, self.magnitude)
        return self._tables


class _Rotate(torch.autograd.Function):
    """Rotation of channel pairs (i, i + d/2) in float32; the gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x_BSNd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BSNd, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BSNd: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_BSNd, cos, sin, -1.0), None, None


def _rotated(x_BSNd: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = torch.empty(x_BSNd.shape, dtype=x_BSNd.dtype, device=x_BSNd.device)
    every = (*x_BSNd.shape[:2], 1, x_BSNd.shape[-1] // 2)
    rows = (x_BSNd.flatten(0, 1), out.flatten(0, 1), cos.expand(every).flatten(0, 1), sin.expand(every).flatten(0, 1))
    tile = tile_rows(x_BSNd, out.shape[2] * out.shape[3])
    for x_RNd, to_RNd, *turn in zip(*(part.split(tile) for part in rows), strict=True):
        _rotate_rows(x_RNd, to_RNd, turn[0], turn[1], sign)
    return out


def _rotate_rows(x_RNd: Tensor, to_RNd: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Writes some rows rotated, computed in float32."""
    first, second = x_RNd.float().chunk(2, dim=-1)
    out = torch.empty(x_RNd.shape, dtype=torch.float32, device=x_RNd.device)
    half = first.shape[-1]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    to_RNd.copy_(out)


def rotate(x_BSNd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads of shape (B, S, N, d) by tables (S, d/2) or (B, S, d/2); computed in float32, returned in x's dtype."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    if torch.compiler.is_compiling():  # it fuses the formula, and cannot trace writes into parts of a tensor
        first, second = x_BSNd.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSNd.dtype)
    return _Rotate.apply(x_BSNd, cos, sin)
