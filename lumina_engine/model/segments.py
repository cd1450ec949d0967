"""Attention inside documents without a mask: documents of a batch are laid side by side in a few rectangles.

A document of 37 tokens becomes a row of a rectangle that is 64 wide, its end filled with zeros. Under causal attention the
filler comes after every real token, so no mask is needed and no S × S tensor exists; the work follows the documents' lengths.

Shapes: B batch, S sequence, T = B·S tokens, M tokens that are not padding, P places in all rectangles, H and K query and
key/value heads, d and e key and value size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lumina_engine.config.activations import NARROWEST
from lumina_engine.model.attention_core import fused_attention


@dataclass(frozen=True, slots=True)
class DocumentLayout:
    """What a forward pass has to know of `document_ids`, found out on the CPU, so that no step waits for the device.

    `full`: there is no padding. `segments`: None where each row is one document without padding. Positions are within a row.
    """

    full: bool
    segments: Segments | None

    @staticmethod
    def of(document_ids_BS: Tensor) -> DocumentLayout:
        """The layout of a batch. Reads the tensor."""
        full = bool((document_ids_BS > 0).all())
        one = full and bool((document_ids_BS == document_ids_BS[:, :1]).all())
        return DocumentLayout(full, None if one else Segments.of(document_ids_BS))

    def to(self, device: torch.device | str) -> DocumentLayout:
        """The layout on `device`."""
        return self if self.segments is None else replace(self, segments=self.segments.to(device))


@dataclass
class Segments:
    """Where the tokens of a batch lie in the rectangles, (documents, width) each, stored one after the other."""

    tokens_M: Tensor  # flat index of each real token
    places_M: Tensor  # its place
    rectangles: list[tuple[int, int]]
    num_tokens: int
    num_places: int

    @staticmethod
    def of(document_ids_BS: Tensor) -> Segments:
        """Segments of a batch; a document is a run of equal ids in a row, 0 is padding. Reads the tensor."""
        device, ids_BS = document_ids_BS.device, document_ids_BS.cpu()
        num_tokens = ids_BS.numel()
        first_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        first_BS[:, 1:] = ids_BS[:, 1:] != ids_BS[:, :-1]
        run_T = first_BS.view(-1).cumsum(0) - 1
        starts = first_BS.view(-1).nonzero().squeeze(1)
        lengths = torch.diff(starts, append=torch.tensor([num_tokens]))
        real = ids_BS.reshape(-1)[starts] > 0
        widths = _widths(lengths).masked_fill(~real, 0)
        base = torch.zeros_like(starts)
        rectangles, places = [], 0
        for width in widths.unique().tolist():
            if width:
                members = (widths == width).nonzero().squeeze(1)
                base[members] = places + torch.arange(len(members)) * width
                rectangles.append((len(members), width))
                places += len(members) * width
        tokens_M = real[run_T].nonzero().squeeze(1)
        run_M = run_T[tokens_M]
        places_M = base[run_M] + tokens_M - starts[run_M]
        return Segments(tokens_M.to(device), places_M.to(device), rectangles, num_tokens, places)

    def to(self, device: torch.device | str) -> Segments:
        """The segments on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens_M", "places_M")}
        return replace(self, **moved)

    def pack(self, x_T: Tensor) -> Tensor:
        """Rows per token (T, …) to rows per place (P, …), zeros in the filler."""
        return _Move.apply(x_T, self.tokens_M, self.places_M, self.num_places)

    def unpack(self, x_P: Tensor) -> Tensor:
        """Rows per place (P, …) to rows per token (T, …), zeros for padding."""
        return _Move.apply(x_P, self.places_M, self.tokens_M, self.num_tokens)

    def attend(
        self, query_PHd: Tensor, key_PKd: Tensor, value_PKe: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Attention within documents, (T, H, e), of what lies in the places. `scale` and `window` as for `fused_attention`."""
        attended: list[Tensor] = []
        if not self.rectangles:  # all padding: an empty output that keeps the projections in the graph
            attended.append(query_PHd[:0, :, :1] + key_PKd[:0, :1, :1] + value_PKe[:0, :1])
        start = 0
        for rows, width in self.rectangles:
            end = start + rows * width
            # (P, N, d) to (rows, N, width, d)
            query, key, value = (
                x[start:end].unflatten(0, (rows, width)).transpose(1, 2) for x in (query_PHd, key_PKd, value_PKe)
            )
            attended.append(fused_attention(query, key, value, None, True, scale, window).transpose(1, 2).flatten(0, 1))
            start = end
        return self.unpack(torch.cat(attended))


def _widths(lengths: Tensor) -> Tensor:
    """The width of the rectangle for each length: the next power of two, and no less than the narrowest."""
    bits = (lengths.clamp(min=NARROWEST) - 1).double().log2().floor().long() + 1
    return torch.ones_like(lengths) << bits


class _Move(torch.autograd.Function):
    """out[to] = x[source], zeros elsewhere; the gradient moves the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source_M: Tensor, to_M: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(source_M, to_M)
        ctx.rows = x.shape[0]
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, to_M, x.index_select(0, source_M))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        source_M, to_M = ctx.saved_tensors
        moved = grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, source_M, grad.index_select(0, to_M))
        return moved, None, None, None
