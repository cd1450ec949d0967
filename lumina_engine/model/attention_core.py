"""Softmax attention over given queries, keys and values: written out, by torch's SDPA, and in blocks of queries.

All take queries (B, H, S, d), keys (B, K, T, d) and values (B, K, T, e) with K dividing H, and give (B, H, S, e). Causal means
that the queries are the last S of the T tokens; a window of w lets a token see itself and the w - 1 tokens before it.

Shapes: B batch, S queries, T keys, H query heads, K key/value heads, d and e key and value size, G = H/K heads of a
group, P = B·K pairs, R queries of a block, C keys that a block may see.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_engine.model.product import widens

# Up to this length blocks train faster in bf16 than SDPA's CPU kernel, whose backward is slow (torch 2.13).
_SHORT = 512
# A block has this many queries, or fewer so that its scores stay below the second figure (64 MiB in float32).
_BLOCK = 256
_BLOCK_SCORES = 1 << 24
_NARROWEST = 64
# Pairs of one block that are computed at once have this many scores, so that they stay in the cache.
_CACHED_SCORES = 1 << 19
# Off the CPU each block is a handful of kernels to start: it takes all pairs, and memory alone bounds it (256 MiB in float32).
_DEVICE_SCORES = 1 << 26


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, -inf elsewhere. One such tensor serves all layers; from a boolean mask SDPA would make one per layer."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def document_mask(document_ids_BS: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Additive mask (B, 1, S, S): a token sees itself and earlier tokens of its document. Padding (0) sees padding: no empty
    rows."""
    same = (document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :]).tril_()
    return additive_mask(same if window is None else same.triu_(1 - window), dtype)


def band_mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask (S, T) of causal attention, within a window if there is one."""
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
    return additive_mask(allowed if window is None else allowed.triu_(keys - queries - window + 1), dtype)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention written out, scores in float32: the yardstick for the fused path. `scale` is 1/√d if None."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query.float() @ key.float().transpose(-2, -1)) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        scores = scores + band_mask(query.shape[2], key.shape[2], window, scores.dtype, scores.device)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The fastest way that holds no S × T scores; a mask, if given, already has the window in it.

    `is_causal` wants S = T here. SDPA takes one width for keys and values, so narrower values are widened by zeros.
    """
    if is_causal and (_windowed(window, key) or _slow_backward(query, value)):
        return block_attention(query, key, value, scale, window)
    if widens(query):
        wide_mask = None if mask is None else mask.float()
        with torch.autocast("cpu", enabled=False):  # it would make SDPA's arguments narrow again
            out = fused_attention(query.float(), key.float(), value.float(), wide_mask, is_causal, scale, window)
        return out.to(query.dtype)
    gqa = query.shape[1] != key.shape[1]
    narrow = key.shape[-1] - value.shape[-1]
    if narrow < 0:
        query, key, scale = F.pad(query, (0, -narrow)), F.pad(key, (0, -narrow)), scale or query.shape[-1] ** -0.5
    widened = F.pad(value, (0, narrow)) if narrow > 0 else value
    out = F.scaled_dot_product_attention(query, key, widened, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    return out[..., : value.shape[-1]] if narrow > 0 else out


def _windowed(window: int | None, key: Tensor) -> bool:
    """Whether the window hides anything."""
    return window is not None and window < key.shape[2]


def _slow_backward(query: Tensor, value: Tensor) -> bool:
    """Whether SDPA's CPU kernel would be the slower one: training in bf16 on short rows, or with values to be widened."""
    short = query.shape[2] <= _SHORT or query.shape[-1] != value.shape[-1]
    return short and query.requires_grad and query.device.type == "cpu" and query.dtype != torch.float32


@torch.compiler.disable(reason="a loop over parts of tensors, which are written in place")
def block_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, window: int | None = None) -> Tensor:
    """Causal attention (S = T) over blocks of queries, each against the keys that its window reaches.

    Scores and softmax are float32 whatever the dtype of the queries is; the other batched products are in that dtype, or in
    float32 where the processor has none of it. The backward computes the scores again. The heads of a group are stacked, so
    keys and values are not repeated, and the work follows the window.
    """
    return _BlockAttention.apply(query, key, value, scale or query.shape[-1] ** -0.5, window or query.shape[2])


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.window = scale, window
        with torch.autocast(query.device.type, enabled=False):
            query32_PGSd, key32_PTd = _exact(query, key, scale)
            value_PTe = value.flatten(0, 1).to(_multiplied(query)).contiguous()
            out = query.new_empty(*query32_PGSd.shape[:3], value.shape[-1])
            for pairs, rows, keys in _blocks(query32_PGSd, window):
                probs = _probabilities(query32_PGSd[pairs, :, rows], key32_PTd[pairs, keys], rows.start - keys.start, window)
                out[pairs, :, rows] = torch.bmm(probs.to(value_PTe.dtype), value_PTe[pairs, keys]).view_as(out[pairs, :, rows])
        return out.view(*query.shape[:3], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        dtype = _multiplied(query)
        with torch.autocast(grad.device.type, enabled=False):
            query32_PGSd, key32_PTd = _exact(query, key, ctx.scale)
            query_PGSd, key_PTd = query32_PGSd.to(dtype), key32_PTd.to(dtype)
            value_PTe = value.flatten(0, 1).to(dtype).contiguous()
            grad_PGSe = grad.reshape(*query_PGSd.shape[:3], -1).to(dtype)
            grad_q, grad_k, grad_v = torch.empty_like(query_PGSd), torch.zeros_like(key_PTd), torch.zeros_like(value_PTe)
            for pairs, rows, keys in _blocks(query_PGSd, ctx.window):
                query_PRd, grad_PRe = query_PGSd[pairs, :, rows].flatten(1, 2), grad_PGSe[pairs, :, rows].flatten(1, 2)
                before = rows.start - keys.start
                probs = _probabilities(query32_PGSd[pairs, :, rows], key32_PTd[pairs, keys], before, ctx.window)
                grad_v[pairs, keys].baddbmm_(probs.to(dtype).transpose(1, 2), grad_PRe)
                grad_p = torch.bmm(grad_PRe, value_PTe[pairs, keys].transpose(1, 2)).float()
                grad_s = torch.ops.aten._softmax_backward_data(grad_p, probs, -1, grad_p.dtype).to(dtype)
                grad_q[pairs, :, rows] = torch.bmm(grad_s, key_PTd[pairs, keys]).view_as(grad_q[pairs, :, rows])
                grad_k[pairs, keys].baddbmm_(grad_s.transpose(1, 2), query_PRd)
        grads = zip((grad_q.mul_(ctx.scale), grad_k, grad_v), (query, key, value), strict=True)
        grad_q, grad_k, grad_v = (part.view(whole.shape).to(whole.dtype) for part, whole in grads)
        return grad_q, grad_k, grad_v, None, None


def _multiplied(query: Tensor) -> torch.dtype:
    """The dtype of the batched products of a block."""
    return torch.float32 if widens(query) else query.dtype


def _exact(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled queries (P, G, S, d) and keys (P, T, d) in float32, contiguous: what scores are made of."""
    queries = (query.float() * scale).reshape(key.shape[0] * key.shape[1], -1, *query.shape[2:])
    return queries.contiguous(), key.float().flatten(0, 1).contiguous()


def _blocks(query_PGSd: Tensor, window: int) -> list[tuple[slice, slice, slice]]:
    """Pairs, blocks of their queries and the keys that these may see, by place."""
    pairs, groups, length = query_PGSd.shape[:3]
    if query_PGSd.device.type != "cpu":
        return [(slice(0, pairs), rows, _seen(rows, window)) for rows in _long_blocks(pairs * groups, length, window)]
    # Blocks much longer than the window, or than a part of the rows, would mostly compute what is hidden; short ones are slow.
    most = min(_BLOCK, max(_NARROWEST, min(window, length // 8)))
    found = []
    for rows in query_blocks(pairs * groups, length, min(length, window + most), most):
        keys = _seen(rows, window)
        scores = groups * (rows.stop - rows.start) * (keys.stop - keys.start)
        found += [(part, rows, keys) for part in _recurring(pairs, max(1, _CACHED_SCORES // scores))]
    return found


def _seen(rows: slice, window: int) -> slice:
    """The keys that a block of queries may see."""
    return slice(max(0, rows.start - window + 1), rows.stop)


def _long_blocks(heads: int, queries: int, window: int) -> list[slice]:
    """Cuts S queries into blocks as long as the window, or as R·(R + window) scores of all heads leave room for."""
    room = (math.isqrt(window * window + 4 * _DEVICE_SCORES // heads) - window) // 2
    step = max(16, min(max(window, _BLOCK), room // 16 * 16))
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


def _recurring(count: int, most: int) -> list[slice]:
    """Cuts a range into powers of two, at most `most` long: oneDNN generates code for every new number of products, which costs
    more than they do, and documents come in any number."""
    found, start = [], 0
    while start < count:
        size = 1 << (min(most, count - start).bit_length() - 1)
        found.append(slice(start, start + size))
        start += size
    return found


def query_blocks(heads: int, queries: int, keys: int, most: int = _BLOCK) -> list[slice]:
    """Cuts S queries so that the scores of one block stay small; `heads` counts those of all rows of the batch."""
    step = max(16, min(most, _BLOCK_SCORES // (heads * keys)))
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


def _probabilities(query_PGRd: Tensor, key_PCd: Tensor, before: int, window: int) -> Tensor:
    """Softmax of the scores of one block, (P, G·R, C); `before` keys lie before its first query."""
    rows, keys = query_PGRd.shape[2], key_PCd.shape[1]
    scores = torch.bmm(query_PGRd.flatten(1, 2), key_PCd.transpose(1, 2)).view(*query_PGRd.shape[:3], keys)
    hidden = torch.full((rows, rows), float("-inf"), dtype=scores.dtype, device=scores.device)
    scores[..., before:].add_(hidden.triu(1))
    if before + rows > window:  # the last query sees less than its block does
        scores[..., :rows].add_(hidden.tril(before - window))
    return scores.softmax(-1).view(query_PGRd.shape[0], -1, keys)
