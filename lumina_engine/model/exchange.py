"""Experts spread over ranks: tokens travel to the experts that they chose, and the results travel back.

The ranks of an expert group each hold E/R experts of every block. A block's forward pass is one all-to-all of counts, one of
rows towards the experts, one of results back; its backward pass is the same two all-to-alls of gradients. Their number depends
on no routing and their order on no rank, so an expert or a rank without a single token hangs nothing (Switch Transformers,
arXiv:2101.03961, and GShard, arXiv:2006.16668, describe the scheme; sizes are uneven here, so nothing is padded).

Shapes: T tokens here, K experts per token, N served choices of these tokens, M rows received, R ranks of the group, E experts,
F = E/R experts held here, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# (rows (M, D), order (M), ends (F)) → outputs (M, D): runs the local experts over rows; `order` sorts them by expert.
LocalExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertGroup:
    """The ranks that hold all experts together, and the ranks that hold the same experts as this one."""

    peers: dist.ProcessGroup  # R ranks; the one at place r holds experts r·E/R to (r+1)·E/R
    place: int  # of this rank among its peers
    size: int  # R
    replicas: dist.ProcessGroup  # the ranks with the same experts, one of each group of peers
    copies: int  # how many replicas there are
    overlap: bool = False  # rows travel in two parts, one under way while the experts work on the other

    def own(self, stack: Tensor) -> Tensor:
        """This rank's part of a tensor whose first dimension counts experts."""
        count = len(stack) // self.size
        return stack[self.place * count : (self.place + 1) * count]


class _Transfer:
    """One all-to-all of rows: its sizes by rank, and what is under way."""

    def __init__(self, peers: dist.ProcessGroup, send: list[int], receive: list[int]) -> None:
        self.peers, self.send, self.receive = peers, send, receive
        self._pending: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, back: bool = False) -> Tensor:
        """The buffer that the rows of all ranks are on their way into; not to be read before `finish`."""
        sizes_in, sizes_out = (self.receive, self.send) if back else (self.send, self.receive)
        rows = rows.contiguous()
        buffer = rows.new_empty(sum(sizes_out), *rows.shape[1:])
        work = dist.all_to_all_single(buffer, rows, sizes_out, sizes_in, group=self.peers, async_op=True)
        self._pending = (work, buffer, rows)  # the rows must live as long as they are read from
        return buffer

    def finish(self) -> Tensor:
        """The buffer that `start` gave, filled (on a GPU: as soon as the current stream gets there)."""
        assert self._pending is not None
        work, buffer, _ = self._pending
        work.wait()
        self._pending = None
        return buffer


class _Start(torch.autograd.Function):
    """Begins a transfer. Its gradient's transfer was begun by `_Finish`, so backward only waits for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _Finish(torch.autograd.Function):
    """Waits for a transfer; backward sends the gradients the other way."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.finish().view_as(buffer)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # What arrives has the rows of the other side, so it goes past autograd, which wants those of `buffer`.
        ctx.transfer.start(grad, back=True)
        return grad, None


class _Combine(torch.autograd.Function):
    """Sums gate · row into the rows' tokens. Autograd's own operations would keep the product as well as the rows."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, gates_N: Tensor, token_N: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(y_ND, gates_N, token_N)
        weighted_ND = y_ND * gates_N[:, None].to(y_ND.dtype)
        return y_ND.new_zeros(tokens, y_ND.shape[1]).index_add_(0, token_N, weighted_ND)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_ND, gates_N, token_N = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, token_N)
        grad_gates_N = (grad_ND * y_ND).sum(-1, dtype=gates_N.dtype)
        return grad_ND.mul_(gates_N[:, None]), grad_gates_N, None, None


@dataclass(slots=True)
class _Part:
    """Rows that travel together: which choices they are, and how many come from each rank for each expert held here."""

    choice_N: Tensor
    inward: _Transfer
    outward: _Transfer
    got_RF: Tensor


def experts_elsewhere(
    x_TD: Tensor, gates_TK: Tensor, choice_N: Tensor, ends_E: Tensor, group: ExpertGroup, experts: LocalExperts
) -> Tensor:
    """Σ over a token's served choices of gate · expert(token), (T, D), with each expert computed on the rank that holds it.

    `choice_N` and `ends_E` as in `moe.Dispatch`. All ranks of the group must call it together; the sizes are read from the
    device once. With `group.overlap` rows travel in two parts.
    """
    top_k = gates_TK.shape[1]
    parts = _parts(choice_N, ends_E, group)
    # All calls of this block are begun in the same order on every rank; autograd runs them in the reverse order.
    for_experts = [_Start.apply(x_TD.index_select(0, part.choice_N // top_k), part.inward) for part in parts]
    returning = []
    for part, buffer in zip(parts, for_experts, strict=True):
        order_M, ends_F = _by_expert(part.got_RF, sum(part.inward.receive))
        rows_MD = experts(_Finish.apply(buffer, part.inward), order_M, ends_F)
        returning.append(_Start.apply(rows_MD, part.outward))
    y_ND = torch.cat([_Finish.apply(buffer, part.outward) for part, buffer in zip(parts, returning, strict=True)])
    served_N = torch.cat([part.choice_N for part in parts])
    gates_N = gates_TK.reshape(-1).index_select(0, served_N)
    return _Combine.apply(y_ND, gates_N, served_N // top_k, len(x_TD))


def _parts(choice_N: Tensor, ends_E: Tensor, group: ExpertGroup) -> list[_Part]:
    """The served choices in one part, or cut in two with half of each expert's queue in either."""
    served_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    got_RF = torch.empty_like(served_E)
    dist.all_to_all_single(got_RF, served_E, group=group.peers)
    cuts = [_halves(served_E), _halves(got_RF)] if group.overlap else [[served_E], [got_RF]]
    # (2, parts, R): rows sent to and received from each rank, the one read from the device
    sizes = torch.stack([torch.stack(halves).unflatten(1, (group.size, -1)).sum(-1) for halves in cuts]).tolist()
    choices = choice_N[: sum(map(sum, sizes[0]))]
    if group.overlap:
        choices = choices[_first_halves_first(served_E, ends_E, len(choices))]
    parts = []
    for send, receive, got, chosen in zip(*sizes, cuts[1], choices.split([sum(send) for send in sizes[0]]), strict=True):
        inward, outward = _Transfer(group.peers, send, receive), _Transfer(group.peers, receive, send)
        parts.append(_Part(chosen, inward, outward, got.unflatten(0, (group.size, -1))))
    return parts


def _halves(counts: Tensor) -> list[Tensor]:
    return [(counts + 1) // 2, counts // 2]


def _first_halves_first(served_E: Tensor, ends_E: Tensor, total: int) -> Tensor:
    """Reorders choices sorted by expert: the first half of each expert's queue, then the second halves."""
    device = served_E.device
    expert_N = torch.repeat_interleave(torch.arange(len(served_E), device=device), served_E, output_size=total)
    place_N = torch.arange(total, device=device) - (ends_E - served_E)[expert_N]
    late_N = place_N >= _halves(served_E)[0][expert_N]
    return late_N.sort(stable=True).indices


def _by_expert(got_RF: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The order that sorts received rows, which lie by rank and then by expert, by expert; and the experts' ends in it."""
    expert_RF = torch.arange(got_RF.shape[1], device=got_RF.device).expand_as(got_RF)
    expert_M = torch.repeat_interleave(expert_RF.reshape(-1), got_RF.reshape(-1), output_size=total)
    return expert_M.sort(stable=True).indices, got_RF.sum(0).cumsum(0)
