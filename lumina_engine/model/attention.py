"""Grouped-query attention, the key/value cache, and the plan that all layers of a forward share.

Shapes: B batch, S new tokens, T keys (cached and new), H query heads, K key/value heads, N = H + 2K, d head size, D hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lumina_engine.model.attention_core import additive_mask, fused_attention, reference_attention
from lumina_engine.model.layers import RMSNorm, runner
from lumina_engine.model.product import Linear
from lumina_engine.model.rope import rotate
from lumina_engine.model.segments import Segments

if TYPE_CHECKING:
    from lumina_engine.config.schema import DeepSeekConfig


class KVCache:
    """What attention needs of the tokens so far; `forward(..., cache=cache)` appends.

    Grouped-query attention keeps keys and values of the key/value heads. Latent attention keeps one row per token: the latent
    of all keys and values, and the rotary key that all heads share. `config` is the model's resolved configuration,
    `max_length` the number of slots (tokens, padding included) per row.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        latent = config.attention == "mla"
        heads, width = (1, config.kv_lora_rank + config.qk_rope_head_dim) if latent else (config.num_kv_heads, config.head_size)
        shape = (config.num_layers, batch, heads, max_length, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = None if latent else torch.zeros(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0
        self.valid_BT: Tensor | None = None  # which slots hold a real token; None while all do

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept per token."""
        return self.keys.nbytes + (0 if self.values is None else self.values.nbytes)

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
        assert self.values is not None
        end = self.length + keys_BKSd.shape[2]
        self.keys[layer, :, :, self.length : end] = keys_BKSd
        self.values[layer, :, :, self.length : end] = values_BKSd
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def append_latents(self, layer: int, latents_BSd: Tensor) -> Tensor:
        """Stores the new rows of one layer of latent attention; returns all of them, (B, T, d)."""
        end = self.length + latents_BSd.shape[1]
        self.keys[layer, :, 0, self.length : end] = latents_BSd
        return self.keys[layer, :, 0, :end]


@dataclass
class AttentionPlan:
    """What all layers of one forward share: rotary tables and who may attend to whom.

    `segments` lays documents side by side and needs no mask; the tables then have a row per place. Else `mask` is None or
    additive (B, 1, S, T), 0 or -inf, and without one `is_causal` says whether later keys must be hidden. Keys before
    `first_key` are out of the window of all new tokens; the mask begins there.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    segments: Segments | None = None
    first_key: int = 0


def cached_mask(cache: KVCache, new: int, dtype: torch.dtype, window: int | None = None, first: int = 0) -> Tensor:
    """Additive mask (B or 1, 1, S, T - first) for `new` tokens behind a cache: earlier slots from `first` on that hold a real
    token and lie in the window, and oneself. A window counts real tokens, as positions do."""
    device = cache.keys.device
    total = cache.length + new
    slots = torch.arange(first, total, device=device)
    rows = torch.arange(cache.length, total, device=device)[:, None]
    allowed = (slots <= rows)[None]
    if cache.valid_BT is None:
        allowed = allowed if window is None else allowed & (slots > rows - window)
    else:
        if window is not None:
            counts_BT = cache.valid_BT[:, :total].cumsum(-1)
            allowed = allowed & (counts_BT[:, None, first:] > counts_BT[:, cache.length :, None] - window)
        allowed = allowed & (cache.valid_BT[:, None, first:total] | (slots == rows))
    return additive_mask(allowed[:, None], dtype)


class Attention(nn.Module):
    """Grouped-query self-attention. `qkv` holds the rows of the query heads, then key heads, then value heads."""

    def __init__(self, config: DeepSeekConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_size
        self.fused, self.window = config.use_flash_attention, config.sliding_window
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv = Linear(config.hidden_size, heads * self.head_dim)
        self.out = Linear(self.num_heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_BSD: Tensor,
        plan: AttentionPlan,
        cache: KVCache | None = None,
        norm: RMSNorm | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """`norm` is applied to x first; with `recompute` only the fused projection is kept for the backward pass."""
        run = runner(recompute)
        heads_BSNd = run(lambda x: self.qkv(x if norm is None else norm(x)), x_BSD).unflatten(-1, (-1, self.head_dim))
        return run(self._attend, heads_BSNd, plan, cache)

    def _attend(self, heads_BSNd: Tensor, plan: AttentionPlan, cache: KVCache | None) -> Tensor:
        batch, new = heads_BSNd.shape[:2]
        if plan.segments is not None:
            attended = self._by_document(heads_BSNd, plan, plan.segments)
        else:
            query, key, value = self._rotated(heads_BSNd, plan)
            if cache is not None:
                key, value = cache.append(self.layer, key, value)
                key, value = (x[:, :, plan.first_key :].to(query.dtype) for x in (key, value))
            attend = fused_attention if self.fused else reference_attention
            attended = attend(query, key, value, plan.mask, plan.is_causal, window=self.window).transpose(1, 2)
        return self.out(attended.reshape(batch, new, -1))

    @torch.compiler.disable(reason="its shapes follow the documents of each batch")
    def _by_document(self, heads_BSNd: Tensor, plan: AttentionPlan, segments: Segments) -> Tensor:
        """Attention within documents, (B·S, H, d)."""
        projected = self._rotated(segments.pack(heads_BSNd.flatten(0, 1))[None], plan)
        query, key, value = (x[0].transpose(0, 1) for x in projected)
        return segments.attend(query, key, value, window=self.window)

    def _rotated(self, heads_BSNd: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, S, d), keys and values (B, K, S, d) from the fused projection, with their positions turned in."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qk, value = heads_BSNd.split((heads + kv_heads, kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = qk.split((heads, kv_heads), dim=2)
            qk = torch.cat((self.q_norm(query), self.k_norm(key)), dim=2)
        query, key = rotate(qk, plan.cos, plan.sin).split((heads, kv_heads), dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
