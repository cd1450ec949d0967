"""Grouped-query attention with document borders, padding and a key/value cache.

Shapes: B batch, S new tokens, T keys (cached and new), H query heads, K key/value heads, N = H + 2K, d head size, D hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_engine.model.layers import RMSNorm
from lumina_engine.model.rope import rotate
from lumina_engine.model.segments import Segments

if TYPE_CHECKING:
    from lumina_engine.config.schema import DeepSeekConfig


# Up to this length plain products are 1.5 to 5 times as fast in bf16 as SDPA's CPU kernel, whose backward is slow (torch 2.13).
_SHORT = 256


class KVCache:
    """Keys and values of the tokens so far, key/value heads only; `forward(..., cache=cache)` appends.

    `config` is the model's resolved configuration, `max_length` the number of slots (tokens, padding included) per row.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_layers, batch, config.num_kv_heads, max_length, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0
        self.valid_BT: Tensor | None = None  # which slots hold a real token; None while all do

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, batch: int, new: int) -> None:
        """Raises ValueError if `new` tokens of `batch` rows do not fit."""
        if batch != self.keys.shape[1]:
            raise ValueError(f"KVCache: made for {self.keys.shape[1]} rows, got {batch}")
        if self.length + new > self.max_length:
            raise ValueError(f"KVCache: {self.length} + {new} tokens exceed max_length {self.max_length}; make a longer cache")

    def mark(self, valid_BS: Tensor) -> None:
        """Notes which of the new slots are padding."""
        if self.valid_BT is None:
            if bool(valid_BS.all()):
                return
            self.valid_BT = torch.ones(self.keys.shape[1], self.max_length, dtype=torch.bool, device=self.keys.device)
        self.valid_BT[:, self.length : self.length + valid_BS.shape[1]] = valid_BS

    def append(self, layer: int, keys_BKSd: Tensor, values_BKSd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values of one layer; returns all of them, (B, K, T, d)."""
        end = self.length + keys_BKSd.shape[2]
        self.keys[layer, :, :, self.length : end] = keys_BKSd
        self.values[layer, :, :, self.length : end] = values_BKSd
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@dataclass
class AttentionPlan:
    """What all layers of one forward share: rotary tables and who may attend to whom.

    `segments` lays documents side by side and needs no mask; the tables then have a row per place. Else `mask` is None or
    additive (B, 1, S, T), 0 or -inf, and without one `is_causal` says whether later keys must be hidden.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    segments: Segments | None = None


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, -inf elsewhere. One such tensor serves all layers; from a boolean mask SDPA would make one per layer."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def document_mask(document_ids_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, S, S): a token sees itself and earlier tokens of its document. Padding (0) sees padding: no empty
    rows."""
    same = document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :]
    return additive_mask(same.tril_(), dtype)


def cached_mask(cache: KVCache, new: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (B or 1, 1, S, T) for `new` tokens behind a cache: earlier slots that hold a real token, and oneself."""
    device = cache.keys.device
    total = cache.length + new
    slots = torch.arange(total, device=device)
    rows = slots[cache.length :, None]
    allowed = (slots <= rows)[None, None]
    if cache.valid_BT is not None:
        allowed = allowed & (cache.valid_BT[:, None, None, :total] | (slots == rows))
    return additive_mask(allowed, dtype)


def reference_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Softmax attention written out, scores in float32: the yardstick for the fused path. Arguments as for SDPA with GQA."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query.float() @ key.float().transpose(-2, -1)) * query.shape[-1] ** -0.5
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(later, float("-inf"))
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


class _ShortAttention(torch.autograd.Function):
    """Causal attention as batched matrix products in the dtype of the queries; the backward computes the scores again.

    The heads of a group are stacked, so keys and values are not repeated.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        _, _, v, probabilities = _stacked_probabilities(query, key, value)
        return torch.bmm(probabilities, v).view(query.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            q, k, v, probabilities = _stacked_probabilities(query, key, value)
            grad_out = grad.reshape(q.shape)
            grad_v = torch.bmm(probabilities.transpose(1, 2), grad_out)
            grad_p = torch.bmm(grad_out, v.transpose(1, 2))
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, probabilities, -1, grad_p.dtype)
            grad_q = torch.bmm(grad_s, k).mul_(query.shape[-1] ** -0.5)
            grad_k = torch.bmm(grad_s.transpose(1, 2), q)
        return grad_q.view(query.shape), grad_k.view(key.shape), grad_v.view(key.shape)


def _stacked_probabilities(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled queries (B·K, H/K·S, d), keys and values (B·K, S, d), causal probabilities (B·K, H/K·S, S)."""
    length, size = query.shape[2:]
    pairs = key.shape[0] * key.shape[1]
    q, k, v = (
        (query * size**-0.5).reshape(pairs, -1, size),
        key.reshape(pairs, length, size),
        value.reshape(pairs, length, size),
    )
    later = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    scores = torch.bmm(q, k.transpose(1, 2)).view(pairs, -1, length, length).add_(later)
    return q, k, v, scores.softmax(-1).view(pairs, -1, length)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """torch's SDPA; queries (B, H, S, d), keys and values (B, K, T, d) with K dividing H."""
    if (
        is_causal
        and query.shape[2] <= _SHORT
        and query.requires_grad
        and query.device.type == "cpu"
        and query.dtype != torch.float32
    ):
        return _ShortAttention.apply(query, key, value)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)


class Attention(nn.Module):
    """Grouped-query self-attention. `qkv` holds the rows of the query heads, then key heads, then value heads."""

    def __init__(self, config: DeepSeekConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_size
        self.fused = config.use_flash_attention
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, plan: AttentionPlan, cache: KVCache | None = None) -> Tensor:
        batch, new, _ = x_BSD.shape
        heads_BSNd = self.qkv(x_BSD).view(batch, new, -1, self.head_dim)
        if plan.segments is not None:
            attended = self._by_document(heads_BSNd, plan, plan.segments)
        else:
            query, key, value = self._rotated(heads_BSNd, plan)
            if cache is not None:
                key, value = cache.append(self.layer, key, value)
                key, value = key.to(query.dtype), value.to(query.dtype)
            attend = fused_attention if self.fused else reference_attention
            attended = attend(query, key, value, plan.mask, plan.is_causal).transpose(1, 2)
        return self.out(attended.reshape(batch, new, -1))

    def _by_document(self, heads_BSNd: Tensor, plan: AttentionPlan, segments: Segments) -> Tensor:
        """Attention within documents, (T, H, d)."""
        projected = self._rotated(segments.pack(heads_BSNd.flatten(0, 1))[None], plan)
        # Of a batch that is all padding nothing is left; its empty queries keep the projection in the graph.
        attended = [projected[0][0, :, :0].transpose(0, 1)]
        start = 0
        for rows, width in segments.rectangles:
            end = start + rows * width
            # (1, N, P, d) to (rows, N, width, d)
            query, key, value = (x[0, :, start:end].unflatten(1, (rows, width)).transpose(0, 1) for x in projected)
            attended.append(fused_attention(query, key, value, None, True).transpose(1, 2).flatten(0, 1))
            start = end
        return segments.unpack(torch.cat(attended))

    def _rotated(self, heads_BSNd: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, S, d), keys and values (B, K, S, d) from the fused projection, with their positions turned in."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qk, value = heads_BSNd.split((heads + kv_heads, kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = qk.split((heads, kv_heads), dim=2)
            qk = torch.cat((self.q_norm(query), self.k_norm(key)), dim=2)
        query, key = rotate(qk, plan.cos, plan.sin).split((heads, kv_heads), dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
