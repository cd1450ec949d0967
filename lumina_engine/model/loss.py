"""Cross-entropy over a large vocabulary without ever holding all logits.

The gradients of hidden states and head are computed in the forward, chunk by chunk, so that no logits are kept for the backward
(the idea of Apple's cut-cross-entropy and of Liger-Kernel's fused linear cross-entropy).

Shapes: B batch, S sequence, D hidden size, V vocabulary, N trained labels, C rows of a chunk, R rows of a
block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_engine.model.product import product, weight_gradient

IGNORED = -100
# Logits that a CPU turns into their gradient at once: what is made on the way stays in the cache and needs little memory.
_BLOCK = 1 << 20
# Values that are converted at once: on a GPU, and of the head's gradient everywhere.
_PIECE = 1 << 24


def shifted_targets(labels_BS: Tensor, document_ids_BS: Tensor | None = None) -> Tensor:
    """What each position predicts: the label of the next position (labels lie on their own token, this is the only shift).

    The last position predicts nothing, and none predicts across a document border or into padding (document 0).
    """
    targets = torch.full_like(labels_BS, IGNORED)
    targets[:, :-1] = labels_BS[:, 1:]
    if document_ids_BS is not None:
        border = (document_ids_BS[:, 1:] != document_ids_BS[:, :-1]) | (document_ids_BS[:, 1:] == 0)
        targets[:, :-1].masked_fill_(border, IGNORED)
    return targets


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of weights · cross-entropy over rows; rows of hidden states and head must have the same dtype.

    Logits are turned into their gradient in any case: without one `cross_entropy_and_correct` is meant.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor | None, chunk: int
    ) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        rows, wants_head = hidden_ND.shape[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_head = None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, rows, chunk or max(rows, 1)):
                part = slice(start, start + (chunk or rows))
                scale_C = _scale(targets_N, weights_N, part)
                grad_rows = None if grad_hidden is None else grad_hidden[part]
                loss, grad_CV = _chunk(hidden_ND[part], head_VD, targets_N[part], scale_C, grad_rows)
                loss_sum += loss
                if wants_head:
                    grad_head = _head_gradient(grad_CV, hidden_ND[part], grad_head, alone=len(grad_CV) == rows)
                del grad_CV  # before there are logits of the next chunk
        if grad_head is None and wants_head:
            grad_head = torch.zeros_like(head_VD)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtype = head_VD.dtype
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        # With retain_graph the saved gradients serve again; else a second copy of the head's would be the peak of a step.
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = [None if kept is None else _times(kept, grad, ctx.dtype, again) for kept in (grad_hidden, grad_head)]
        return scaled[0], scaled[1], None, None, None


def _times(kept: Tensor, factor: Tensor, dtype: torch.dtype, again: bool) -> Tensor:
    """kept · factor in `dtype`, in the place of `kept` where that has this dtype and is not needed again.

    `factor` is a float32 scalar that is not rounded to `dtype`: it is common to the whole gradient.
    """
    out = kept if kept.dtype == dtype and not again else torch.empty_like(kept, dtype=dtype)
    if kept.dtype == factor.dtype == dtype or (kept.dtype == dtype and kept.device.type == "cpu"):
        return torch.mul(kept, factor, out=out)  # the CPU's kernel takes a scalar as it is
    rows = max(1, (_BLOCK if kept.device.type == "cpu" else _PIECE) // max(1, kept.shape[1]))
    for start in range(0, len(kept), rows):
        part = slice(start, start + rows)
        out[part] = kept[part] * factor.expand(1, 1)
    return out


def _head_gradient(grad_CV: Tensor, hidden_CD: Tensor, so_far: Tensor | None, alone: bool) -> Tensor:
    """The head's gradient with that of one more chunk, in float32; as the product gives it if the chunk is `alone`."""
    if alone or (so_far is None and grad_CV.dtype == torch.float32):
        return weight_gradient(grad_CV, hidden_CD)
    if so_far is None:
        so_far = grad_CV.new_zeros(grad_CV.shape[1], hidden_CD.shape[1], dtype=torch.float32)
    if so_far.dtype == grad_CV.dtype:
        return so_far.addmm_(grad_CV.t(), hidden_CD)
    rows = max(1, _PIECE // hidden_CD.shape[1])  # the product of the whole vocabulary would need as much memory again
    for start in range(0, len(so_far), rows):
        part = slice(start, start + rows)
        so_far[part].add_(weight_gradient(grad_CV[:, part], hidden_CD))
    return so_far


def _chunk(
    hidden_CD: Tensor, head_VD: Tensor, targets_C: Tensor, scale_C: Tensor, grad_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss sum of one chunk and the gradient of its logits; writes its rows of the hidden states' gradient."""
    logits_CV = product(hidden_CD, head_VD)
    loss = torch.zeros((), dtype=torch.float32, device=logits_CV.device)
    for part in _blocks(logits_CV, _BLOCK if logits_CV.device.type == "cpu" else logits_CV.numel()):
        loss += _block(logits_CV[part], targets_C[part], scale_C[part])
    if grad_hidden is not None:
        grad_hidden.copy_(product(logits_CV, head_VD.t()))
    return loss, logits_CV


def _block(logits_RV: Tensor, targets_R: Tensor, scale_R: Tensor) -> Tensor:
    """Loss sum of a few rows, whose logits are replaced by their gradient."""
    probs_RV = F.softmax(logits_RV, dim=-1, dtype=torch.float32)
    index_R1 = targets_R.clamp(min=0)[:, None]
    # The most probable token is never rounded to 0, so it tells the normaliser; one exponential for each logit is enough.
    normaliser_R = logits_RV.amax(-1).float() - probs_RV.amax(-1).log()
    loss = torch.dot(normaliser_R - logits_RV.gather(1, index_R1).squeeze(1).float(), scale_R)
    probs_RV.scatter_add_(1, index_R1, torch.full_like(index_R1, -1, dtype=torch.float32))
    logits_RV.copy_(probs_RV.mul_(scale_R[:, None]))
    return loss


def _blocks(logits_CV: Tensor, most: int) -> Iterator[slice]:
    """Cuts the rows of a chunk into blocks of at most `most` logits, or of one row."""
    step = max(1, most // logits_CV.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits_CV), step))


def _measured(hidden_CD: Tensor, head_VD: Tensor, targets_C: Tensor, scale_C: Tensor) -> tuple[Tensor, Tensor]:
    """Loss sum of one chunk, and how many of its targets are the most probable token; what is in float32 is one block."""
    logits_CV = product(hidden_CD, head_VD)
    loss = torch.zeros((), dtype=torch.float32, device=logits_CV.device)
    correct = torch.zeros((), dtype=torch.int64, device=logits_CV.device)
    for part in _blocks(logits_CV, _BLOCK if logits_CV.device.type == "cpu" else _PIECE):
        exact_RV, targets_R = logits_CV[part].float(), targets_C[part]
        chosen_R = exact_RV.gather(1, targets_R.clamp(min=0)[:, None]).squeeze(1)
        loss += torch.dot(exact_RV.logsumexp(-1) - chosen_R, scale_C[part])
        correct += (exact_RV.argmax(-1) == targets_R).sum()
    return loss, correct


def _scale(targets_N: Tensor, weights_N: Tensor | None, part: slice) -> Tensor:
    """Weight of each row of a chunk in float32, 0 where there is no target."""
    trained_C = targets_N[part] != IGNORED
    return trained_C.float() if weights_N is None else trained_C * weights_N[part].float()


def cross_entropy_sum(
    hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor, weights_BS: Tensor | None = None, chunk: int = 2048
) -> Tensor:
    """Sum over the targets that are not -100 of weight · cross-entropy (nats), float32 scalar; differentiable once.

    At most `chunk` rows of logits exist at a time (0 = all rows at once). `targets_BS` and `weights_BS` are aligned with the
    hidden states: see `shifted_targets`. Softmax and sum run in float32; the head's gradient is accumulated in float32 over the
    chunks. Under autocast hidden states and head are cast first, as autocast would do for a linear layer.
    """
    return _ChunkedCrossEntropy.apply(*_trained_rows(hidden_BSD, head_VD, targets_BS, weights_BS), chunk)


@torch.no_grad()
def cross_entropy_and_correct(
    hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor, weights_BS: Tensor | None = None, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_sum` without gradients, and how many targets are the most probable token (int64 scalar)."""
    hidden_ND, head_VD, targets_N, weights_N = _trained_rows(hidden_BSD, head_VD, targets_BS, weights_BS)
    loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    rows = len(targets_N)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for start in range(0, rows, chunk or max(rows, 1)):
            part = slice(start, start + (chunk or rows))
            scale_C = _scale(targets_N, weights_N, part)
            loss, right = _measured(hidden_ND[part], head_VD, targets_N[part], scale_C)
            loss_sum += loss
            correct += right
    return loss_sum, correct


def _trained_rows(
    hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor, weights_BS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states, head, targets and weights in the dtype of the products, on CPU without the rows that carry no loss."""
    device = hidden_BSD.device.type
    hidden_ND = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    targets_N = targets_BS.reshape(-1)
    weights_N = None if weights_BS is None else weights_BS.reshape(-1)
    if device == "cpu":  # elsewhere the size would have to be fetched from the device first
        rows_N = (targets_N != IGNORED).nonzero().squeeze(1)
        if len(rows_N) < len(targets_N):
            hidden_ND, targets_N = hidden_ND.index_select(0, rows_N), targets_N.index_select(0, rows_N)
            weights_N = None if weights_N is None else weights_N.index_select(0, rows_N)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, head_VD = hidden_ND.to(dtype), head_VD.to(dtype)
    return hidden_ND, head_VD, targets_N, weights_N
