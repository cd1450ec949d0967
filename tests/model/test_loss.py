"""Chunked cross-entropy against F.cross_entropy, and the one shift of the labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lumina_engine.model import loss as loss_module
from lumina_engine.model.loss import cross_entropy_and_correct, cross_entropy_sum, shifted_targets


def test_r01_labels_are_shifted_once():
    labels = torch.tensor([[10, 11, 12, 13]])
    assert shifted_targets(labels).tolist() == [[11, 12, 13, -100]]


def test_r01_no_target_across_a_document_border_or_in_padding():
    labels = torch.tensor([[10, 11, 12, 13, 14, 15]])
    documents = torch.tensor([[1, 1, 2, 2, 0, 0]])
    assert shifted_targets(labels, documents).tolist() == [[11, -100, 13, -100, -100, -100]]


@pytest.mark.parametrize("chunk", [0, 1, 5, 16, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_c001_loss_and_gradients_equal_torch(chunk, weighted):
    hidden = torch.randn(3, 7, 16, requires_grad=True)
    head = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (3, 7))
    targets[0, :3] = -100
    weights = torch.rand(3, 7) if weighted else None
    ours = cross_entropy_sum(hidden, head, targets, weights, chunk)
    each = F.cross_entropy((hidden @ head.t()).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    theirs = (each * (1 if weights is None else weights.flatten())).sum()
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(loss * 0.37, (hidden, head)) for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_c001_evaluation_equals_torch_whatever_the_blocks_are(monkeypatch, chunk, dtype, weighted):
    """Loss and correct predictions of plain logits; blocks of 2 rows, of one row that is longer, and of all rows."""
    hidden, head = torch.randn(3, 7, 16).to(dtype), torch.randn(50, 16).to(dtype)
    logits = (hidden @ head.t()).flatten(0, 1)
    targets = torch.where(torch.rand(21) < 0.5, logits.float().argmax(-1), torch.randint(0, 50, (21,)))
    targets[:3] = -100
    weights = torch.rand(21) if weighted else torch.ones(21)
    each = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="none")
    for block in (100, 1, 1 << 20):
        monkeypatch.setattr(loss_module, "_BLOCK", block)
        given = weights.view(3, 7) if weighted else None
        loss, correct = cross_entropy_and_correct(hidden, head, targets.view(3, 7), given, chunk)
        torch.testing.assert_close(loss, (each * weights).sum())
        assert loss.dtype == torch.float32 and correct.dtype == torch.int64
        assert correct == (logits.float().argmax(-1) == targets).sum() > 5


def test_c001_evaluation_of_nothing_gives_zero():
    loss, correct = cross_entropy_and_correct(torch.randn(1, 4, 8), torch.randn(20, 8), torch.full((1, 4), -100))
    assert (float(loss), int(correct)) == (0.0, 0)


def test_c001_tied_weight_used_twice():
    """Gradient of an embedding that is the head, too; backward twice through the same graph."""
    weight = torch.randn(30, 8, requires_grad=True)
    tokens, targets = torch.randint(0, 30, (2, 9)), torch.randint(0, 30, (2, 9))
    ours = cross_entropy_sum(F.embedding(tokens, weight), weight, targets, chunk=4)
    theirs = F.cross_entropy((F.embedding(tokens, weight) @ weight.t()).flatten(0, 1), targets.flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(theirs, weight)
    for _ in range(2):
        (grad,) = torch.autograd.grad(ours, weight, retain_graph=True)
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-5)


def test_c001_only_one_needs_a_gradient():
    hidden, head = torch.randn(1, 6, 8), torch.randn(20, 8)
    targets = torch.randint(0, 20, (1, 6))
    expected = torch.autograd.grad(cross_entropy_sum(hidden, w := head.clone().requires_grad_(), targets), w)[0]
    frozen = head.clone()
    assert not cross_entropy_sum(hidden, frozen, targets).requires_grad
    h = hidden.clone().requires_grad_()
    cross_entropy_sum(h, frozen, targets).backward()
    assert h.grad is not None and expected.abs().sum() > 0


def test_c001_nothing_to_train_gives_zero():
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    loss = cross_entropy_sum(hidden, torch.randn(20, 8), torch.full((1, 4), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0


def test_c001_bf16_sums_in_fp32():
    """The loss is a float32 sum and the head's gradient is accumulated over chunks in float32, then rounded once."""
    hidden = torch.randn(1, 4096, 16).bfloat16()
    head = (torch.randn(32, 16) * 0.1).bfloat16().requires_grad_()
    targets = torch.randint(0, 32, (1, 4096))
    loss = cross_entropy_sum(hidden, head, targets, chunk=8)
    assert loss.dtype == torch.float32
    loss.backward()
    exact_head = head.detach().double().requires_grad_()
    exact = F.cross_entropy((hidden[0].double() @ exact_head.t()), targets[0], reduction="sum")
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    error = (head.grad.double() - exact_head.grad).norm() / exact_head.grad.norm()
    assert head.grad.dtype == torch.bfloat16 and error < 0.01


def test_c001_autocast_equals_a_cast_by_hand():
    hidden, head = torch.randn(2, 5, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(0, 40, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        ours = cross_entropy_sum(hidden, head, targets)
    theirs = cross_entropy_sum(hidden.bfloat16(), head.bfloat16(), targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(loss, (hidden, head)) for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs)
    assert ours[1].dtype == torch.float32


def test_r38_never_all_logits_at_once():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.seen = max(self.seen, out.numel())
            return out

    hidden, head = torch.randn(1, 512, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    targets = torch.randint(0, 1000, (1, 512))
    with Largest() as largest:
        cross_entropy_sum(hidden, head, targets, chunk=32).backward()
    assert largest.seen == 32 * 1000
