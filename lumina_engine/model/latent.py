"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434, section 2.1).

Keys and values of all heads are expanded from one latent per token. Only that latent and a rotary key that all heads share are
cached. Since expansion is linear, W_k and W_v can be moved over to the queries and the output, q·(W_k c) = (W_kᵀq)·c and
Σ p·(W_v c) = W_v (Σ p·c): a new token then attends to the cached rows themselves and nothing is expanded.

Shapes: B batch, S new tokens, T keys (cached and new), P places of documents, H heads, n and r parts of a head without and with
rotary positions, d = n + r, e value size, c latent size, D hidden size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lumina_engine.model.attention import AttentionPlan, KVCache
from lumina_engine.model.attention_core import fused_attention, query_blocks, reference_attention
from lumina_engine.model.layers import RMSNorm, runner
from lumina_engine.model.product import Linear
from lumina_engine.model.rope import rotate
from lumina_engine.model.segments import Segments

if TYPE_CHECKING:
    from lumina_engine.config.schema import DeepSeekConfig

# DeepSeek's models have this under the root of the latents' norms, whatever the other norms have.
LATENT_EPS = 1e-6


def attention_scale(config: DeepSeekConfig) -> float:
    """1/√d; with YaRN times (0.1·ln(factor) + 1)², which DeepSeek puts here instead of on cosines and sines."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    return scale * (0.1 * math.log(config.rope_scaling_factor) + 1) ** 2 if config.rope_scaling == "yarn" else scale


class LatentAttention(nn.Module):
    """MLA. `compress` holds the rows of the query latent (of all query heads without `q_lora_rank`), of the latent of keys and
    values, and of the rotary key. A head has its part without positions first; `kv_expand` has keys, then values of each head.
    """

    def __init__(self, config: DeepSeekConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.fused, self.window = config.num_heads, config.use_flash_attention, config.sliding_window
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank, self.scale = config.kv_lora_rank, attention_scale(config)
        queries = self.num_heads * (self.nope + self.rope)
        self.query_rows = config.q_lora_rank or queries
        self.compress = Linear(config.hidden_size, self.query_rows + self.rank + self.rope)
        self.q_norm = RMSNorm(config.q_lora_rank, LATENT_EPS) if config.q_lora_rank else None
        self.q_expand = Linear(config.q_lora_rank, queries) if config.q_lora_rank else None
        self.kv_norm = RMSNorm(self.rank, LATENT_EPS)
        self.kv_expand = Linear(self.rank, self.num_heads * (self.nope + self.value))
        self.out = Linear(self.num_heads * self.value, config.hidden_size)

    def forward(
        self,
        x_BSD: Tensor,
        plan: AttentionPlan,
        cache: KVCache | None = None,
        norm: RMSNorm | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """`norm` is applied to x first; with `recompute` only results of projections are kept for the backward pass."""
        run = runner(recompute)
        compressed = run(lambda x: self.compress(x if norm is None else norm(x)), x_BSD)
        query, latent, rope = compressed.split((self.query_rows, self.rank, self.rope), dim=-1)
        if self.q_norm is not None and self.q_expand is not None:
            q_norm, q_expand = self.q_norm, self.q_expand
            query = run(lambda query: q_expand(q_norm(query)), query)
        query, rope = query.unflatten(-1, (self.num_heads, -1)), rope.unsqueeze(2)
        if cache is not None:
            return self._output(self._cached(query, self.kv_norm(latent), rope, plan, cache))
        expanded = run(lambda latent: self.kv_expand(self.kv_norm(latent)), latent).unflatten(-1, (self.num_heads, -1))
        return run(self._attend, query, expanded, rope, plan)

    def _attend(self, query_BSHd: Tensor, expanded_BSHv: Tensor, rope_BS1r: Tensor, plan: AttentionPlan) -> Tensor:
        """The output (B, S, D) for new tokens alone, from projections that are not rotated yet."""
        if plan.segments is not None:
            attended = self._by_document(query_BSHd, expanded_BSHv, rope_BS1r, plan, plan.segments)
            return self._output(attended.unflatten(0, query_BSHd.shape[:2]))
        query, rope = self._rotated(query_BSHd, plan), rotate(rope_BS1r, plan.cos, plan.sin)
        return self._output(self._expanded(query, expanded_BSHv, rope, plan))

    def _cached(self, query_BSHd: Tensor, latent_BSc: Tensor, rope_BS1r: Tensor, plan: AttentionPlan, cache: KVCache) -> Tensor:
        """Attention behind a cache, (B, S, H, e), to which the new tokens are added."""
        query, rope = self._rotated(query_BSHd, plan), rotate(rope_BS1r, plan.cos, plan.sin)
        stored = cache.append_latents(self.layer, torch.cat((latent_BSc, rope[:, :, 0]), dim=-1))
        stored = stored[:, plan.first_key :].to(query.dtype)
        if cache.length and self._absorbs(query.shape[1], stored.shape[1]):
            return self._absorbed(query, stored, plan.mask)
        latent = latent_BSc
        if cache.length:
            latent, rope = stored[..., : self.rank], stored[..., None, self.rank :]
        return self._expanded(query, self.kv_expand(latent).unflatten(-1, (self.num_heads, -1)), rope, plan)

    def _output(self, attended_BSHe: Tensor) -> Tensor:
        return self.out(attended_BSHe.flatten(2))

    def _rotated(self, query_BSHd: Tensor, plan: AttentionPlan) -> Tensor:
        nope, rope = query_BSHd.split((self.nope, self.rope), dim=-1)
        return torch.cat((nope, rotate(rope, plan.cos, plan.sin)), dim=-1)

    @torch.compiler.disable(reason="its shapes follow the documents of each batch")
    def _by_document(
        self, query_BSHd: Tensor, expanded_BSHv: Tensor, rope_BS1r: Tensor, plan: AttentionPlan, segments: Segments
    ) -> Tensor:
        """Attention within documents, (B·S, H, e)."""
        parts = (query_BSHd, expanded_BSHv, rope_BS1r)
        query, expanded, rope = (segments.pack(x.flatten(0, 1))[None] for x in parts)
        key, value = self._keys(expanded, rotate(rope, plan.cos, plan.sin))
        return segments.attend(self._rotated(query, plan)[0], key[0], value[0], self.scale, self.window)

    def _keys(self, expanded_BTHv: Tensor, rope_BT1r: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, T, H, d) and values (B, T, H, e) of all heads."""
        nope, value = expanded_BTHv.split((self.nope, self.value), dim=-1)
        return torch.cat((nope, rope_BT1r.expand(-1, -1, self.num_heads, -1)), dim=-1), value

    def _expanded(self, query_BSHd: Tensor, expanded_BTHv: Tensor, rope_BT1r: Tensor, plan: AttentionPlan) -> Tensor:
        """Attention over expanded keys and values, (B, S, H, e); queries and rotary key are rotated."""
        key, value = self._keys(expanded_BTHv, rope_BT1r)
        query, key, value = (x.transpose(1, 2) for x in (query_BSHd, key, value))
        attend = fused_attention if self.fused else reference_attention
        return attend(query, key, value, plan.mask, plan.is_causal, self.scale, self.window).transpose(1, 2)

    def _absorbs(self, new: int, keys: int) -> bool:
        """Whether attending to the latents takes fewer operations than expanding them. Always for one new token."""
        head = self.nope + self.value
        absorbed = new * (self.rank * head + keys * (2 * self.rank + self.rope))
        return new == 1 or absorbed < keys * self.rank * head + new * keys * (head + self.rope)

    def _absorbed(self, query_BSHd: Tensor, stored_BTd: Tensor, mask: Tensor | None) -> Tensor:
        """Attention to the cached rows as they are, (B, S, H, e)."""
        batch, new = query_BSHd.shape[:2]
        to_key, to_value = self.kv_expand.weight.unflatten(0, (self.num_heads, -1)).split((self.nope, self.value), dim=1)
        nope, rope = (query_BSHd * self.scale).split((self.nope, self.rope), dim=-1)
        # (H, B·S, n) @ (H, n, c); then heads are rows of a product with the rows of the cache
        moved = torch.bmm(nope.flatten(0, 1).transpose(0, 1), to_key.to(nope.dtype)).transpose(0, 1)
        query_BSHc = torch.cat((moved.view(batch, new, self.num_heads, -1), rope), dim=-1)
        summed = []
        for rows in query_blocks(batch * self.num_heads, new, stored_BTd.shape[1]):
            query = query_BSHc[:, rows]
            scores = torch.bmm(query.flatten(1, 2), stored_BTd.transpose(1, 2)).unflatten(1, query.shape[1:3])
            if mask is not None:
                scores = scores + mask[:, 0, rows, None]
            probs = scores.softmax(-1, dtype=torch.float32).to(stored_BTd.dtype)
            summed.append(torch.bmm(probs.flatten(1, 2), stored_BTd[..., : self.rank]).unflatten(1, query.shape[1:3]))
        latents = torch.cat(summed, dim=1).flatten(0, 1).transpose(0, 1)
        values = torch.bmm(latents, to_value.transpose(1, 2).to(latents.dtype))
        return values.transpose(0, 1).unflatten(0, (batch, new))
