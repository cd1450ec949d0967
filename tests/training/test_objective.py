"""What a step minimises and reports (C16, C72)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lumina_engine.config.schema import fields_info
from lumina_engine.training.comm import Comm
from lumina_engine.training.objective import GlobalBatch, Objective

# Shapes: L expert layers, E experts.


def part(counts_E: list[float], probs_E: list[float], loss: float = 3.0) -> Any:
    """The output of one micro batch of a model with one expert layer."""
    router = SimpleNamespace(
        counts_LE=torch.tensor([counts_E]), prob_sum_LE=torch.tensor([probs_E]), z_sum_L=torch.tensor([4.0])
    )
    return SimpleNamespace(loss_sum=torch.tensor(loss), router=router)


def objective(labels: float, tokens: int) -> Objective:
    return Objective(GlobalBatch(labels, tokens), Comm(), 0.01, 0.001, top_k=1)


def test_c016_the_balance_loss_that_is_told_is_that_of_the_whole_batch() -> None:
    """Two micro batches that use one expert each are balanced together: exactly 1, as in one piece."""
    split, whole = objective(8.0, 8), objective(8.0, 8)
    split.add(part([4.0, 0.0], [3.0, 1.0]), 4)
    split.add(part([0.0, 4.0], [1.0, 3.0]), 4)
    whole.add(part([4.0, 4.0], [4.0, 4.0]), 8)
    assert split.reduce()[1] == pytest.approx(1.0, abs=1e-12)
    assert whole.reduce()[1] == pytest.approx(1.0, abs=1e-12)


def test_c016_a_micro_batch_is_judged_by_its_own_loads_and_the_earlier_ones() -> None:
    """As the help of load_balancing_weight tells: what it pushes is w · E/k · n_e/T of the choices so far, over all tokens."""
    done = objective(8.0, 8)
    done.z_weight = 0.0
    for counts_E, so_far_E in (([4.0, 0.0], [4.0, 0.0]), ([1.0, 3.0], [5.0, 3.0])):
        output = part(counts_E, [2.0, 2.0])
        probs_LE = output.router.prob_sum_LE.requires_grad_()
        (pushed_LE,) = torch.autograd.grad(done.add(output, 4), probs_LE)
        assert pushed_LE[0].tolist() == pytest.approx([0.01 * 2 * n / sum(so_far_E) / 8 for n in so_far_E])
    told = {info.name: info.help for info in fields_info()}
    assert "earlier micro batches" in told["load_balancing_weight"] and "load_balancing_weight" in told["dynamic_batching"]


@pytest.mark.parametrize("labels", [0.3, 1.0, 7.0])
def test_c072_weights_that_sum_to_less_than_one_are_divided_by_their_sum(labels: float) -> None:
    done = objective(labels, 4)
    done.balance_weight = done.z_weight = 0.0
    loss = done.add(part([2.0, 2.0], [2.0, 2.0], loss=0.6), 4)
    assert float(loss) == pytest.approx(0.6 / labels)
    assert done.reduce()[0] == pytest.approx(0.6 / labels)


def test_r15_without_a_trained_token_the_loss_is_zero() -> None:
    done = objective(0.0, 4)
    assert float(done.add(part([2.0, 2.0], [2.0, 2.0], loss=0.0), 4)) < 0.1
    assert done.reduce()[0] == 0.0
