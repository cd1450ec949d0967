"""What an update is: AdamW by its formula, decay of matrices only, clipping, scheduled rates, loss over valid tokens (C73)."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.monitoring import record as rec
from lumina_engine.training import masters
from lumina_engine.training.comm import Comm
from lumina_engine.training.engine import norm_of, parameter_groups
from lumina_engine.training.plain_engine import PlainEngine
from lumina_engine.training.setup import seed_all

from .test_trainer import setup

SHAPE = {"vocab_size": 1024, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "num_experts": 4}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_moe": False},
        {"qk_norm": True, "tie_word_embeddings": False, "num_shared_experts": 1, "num_dense_layers": 1},
        {"attention": "mla", "q_lora_rank": 32},
    ],
)
def test_c073_norms_embeddings_and_routers_do_not_decay(keys: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = DeepSeekTransformer(DeepSeekConfig(**SHAPE, **keys))
    groups = parameter_groups(model, 0.3)
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight").rpartition(".")[2]
        spared = module.endswith("norm") or module in ("embedding", "router")
        assert decay[parameter] == (0.0 if spared else 0.3), name
    biased = nn.ModuleDict({"out": nn.Linear(3, 2)})
    assert {g["weight_decay"]: [p.ndim for p in g["params"]] for g in parameter_groups(biased, 0.3)} == {0.3: [2], 0.0: [1]}


def settings(**keys: Any) -> SimpleNamespace:
    base = {"precision": "fp32", "learning_rate": 1.0, "weight_decay": 0.2, "max_grad_norm": 0.0}
    return SimpleNamespace(**{**base, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-3, **keys})


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_c073_adamw_equals_its_formula_from_the_first_step(clip: float) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"out": nn.Linear(3, 4), "norm": nn.LayerNorm(4)})
    engine = PlainEngine(model, settings(max_grad_norm=clip), Comm())
    want = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    mean = {n: torch.zeros_like(w) for n, w in want.items()}
    square = {n: torch.zeros_like(w) for n, w in want.items()}
    for step, lr in enumerate((1e-2, 3e-2, 2e-2), start=1):
        x = torch.randn(5, 3)
        engine.backward(model["norm"](model["out"](x)).pow(3).sum() / 7, last=True)
        grads = {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in grads.values()))
        result = engine.step(lr)
        assert result.applied and result.grad_norm == pytest.approx(norm, rel=1e-5)  # before clipping
        for name, grad in grads.items():
            grad = grad * min(1.0, clip / norm) if clip else grad
            mean[name] = 0.8 * mean[name] + 0.2 * grad
            square[name] = 0.9 * square[name] + 0.1 * grad**2
            decay = 0.2 if name == "out.weight" else 0.0
            moved = mean[name] / (1 - 0.8**step) / ((square[name] / (1 - 0.9**step)).sqrt() + 1e-3)
            want[name] = want[name] * (1 - lr * decay) - lr * moved
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.double(), want[name], atol=1e-5), name


def trained(tmp_path: Path, **keys: Any) -> list[rec.Step]:
    trainer, dataset, records = setup(tmp_path, num_epochs=1000, **keys)
    trainer.train(dataset)
    return [r for r in records if isinstance(r, rec.Step)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_c073_the_rate_of_each_step_is_the_schedules_from_step_1(tmp_path: Path, kind: str) -> None:
    total, warm = 10, 3
    keys = {"max_steps": total, "warmup_steps": warm, "lr_schedule": kind, "min_lr_ratio": 0.2, "decay_ratio": 0.3}
    steps = trained(tmp_path, batch_size=4, learning_rate=2e-3, **keys)
    for n, step in enumerate(steps, start=1):
        share = (n - warm) / (total - warm)
        after = {
            "cosine": 0.2 + 0.8 * (1 + math.cos(math.pi * share)) / 2,
            "linear": 1 - 0.8 * share,
            "constant": 1.0,
            "wsd": 1.0 if n <= 7 else 1 - 0.8 * (n - 7) / 3,
        }[kind]
        assert step.lr == pytest.approx(2e-3 * (n / warm if n <= warm else after), rel=1e-12)


@pytest.mark.parametrize("engine", [{"use_deepspeed": False}, {"use_deepspeed": True, "zero_stage": 1}])
def test_c072_max_grad_norm_0_clips_nothing(tmp_path: Path, engine: dict[str, Any]) -> None:
    keys = {"batch_size": 4, "max_steps": 4, "warmup_steps": 0, "lr_schedule": "constant", "adam_eps": 0.1, **engine}
    off, huge, low = (trained(tmp_path, max_grad_norm=norm, **keys) for norm in (0.0, 1e9, 0.01))
    assert [s.loss for s in off] == [s.loss for s in huge]
    assert off[0].loss == low[0].loss and off[-1].loss != low[-1].loss
    assert low[0].grad_norm == off[0].grad_norm > 0.01  # recorded before clipping


@pytest.mark.parametrize("keys", [{}, {"train_on": "all", "assistant_loss_weight": 0.3}])
def test_r02_loss_counts_the_valid_tokens_of_the_whole_batch(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Rows of uneven length, so micro batches have unequal numbers of trained tokens, and weights of unequal sum."""
    same = {"max_steps": 5, "packing": "none", "load_balancing_weight": 0.0, **keys}
    whole = trained(tmp_path, batch_size=4, **same)
    for rows, steps in ((1, 4), (2, 2)):
        parts = trained(tmp_path, batch_size=rows, gradient_accumulation_steps=steps, **same)
        for a, b in zip(whole, parts, strict=True):
            assert (a.loss, a.grad_norm) == (pytest.approx(b.loss, rel=1e-5), pytest.approx(b.grad_norm, rel=1e-4))


def test_r02_a_weighted_loss_is_a_weighted_mean(tmp_path: Path) -> None:
    """(0.3 A + C) / (0.3 a + c) for the summed losses A, C and the numbers a, c of assistant and other tokens."""
    same = {"batch_size": 4, "max_steps": 1, "packing": "none", "train_on": "all"}
    loss, count = {}, {}
    for weight in (0.0, 0.3, 1.0):
        trainer, dataset, records = setup(tmp_path, **same, assistant_loss_weight=weight)
        count[weight] = sum(int((row["labels"] >= 0).sum()) for row in dataset)
        trainer.train(dataset)
        loss[weight] = next(float(r.loss or 0) for r in records if isinstance(r, rec.Step))
    other = loss[0.0] * count[0.0]
    assistant = loss[1.0] * count[1.0] - other
    want = (0.3 * assistant + other) / (0.3 * (count[1.0] - count[0.0]) + count[0.0])
    assert loss[0.3] == pytest.approx(want, rel=1e-5) and loss[0.3] != pytest.approx(loss[1.0], rel=1e-4)


def test_deterministic_asks_for_deterministic_kernels() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        seed_all(SimpleNamespace(deterministic=False, seed=3), Comm())
        assert not torch.are_deterministic_algorithms_enabled()
        seed_all(SimpleNamespace(deterministic=True, seed=3), Comm())
        assert torch.are_deterministic_algorithms_enabled()
        one = torch.rand(3)
        seed_all(SimpleNamespace(deterministic=True, seed=3), Comm())
        assert torch.equal(one, torch.rand(3))
        seed_all(SimpleNamespace(deterministic=True, seed=3), Comm(rank=1, world_size=2))
        assert not torch.equal(one, torch.rand(3))  # dropout differs between ranks
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_c071_masters_are_updated_as_if_all_gradients_were_fp32(clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch at a time (the last one shorter), over three steps: AdamW on fp32 copies, and weights rounded."""
    monkeypatch.setattr(masters, "_STRETCH_CPU", 64)
    torch.manual_seed(0)
    model = nn.ModuleDict({"out": nn.Linear(30, 7), "idle": nn.Linear(2, 2)})
    engine = PlainEngine(model, settings(precision="bf16", max_grad_norm=clip), Comm())
    copies = {n: nn.Parameter(p.detach().float()) for n, p in model.named_parameters() if "idle" not in n}
    plain = torch.optim.AdamW(
        [{"params": [copies["out.weight"]], "weight_decay": 0.2}, {"params": [copies["out.bias"]], "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-3,
        fused=True,
    )
    idle = {n: p.detach().clone() for n, p in model.named_parameters() if "idle" in n}
    for lr in (0.1, 0.2, 0.05):
        for name, copy in copies.items():
            gradient = torch.randn(copy.shape).bfloat16()
            model.get_parameter(name).grad, copy.grad = gradient, gradient.float()
        norm = torch.nn.utils.get_total_norm([copy.grad for copy in copies.values()])
        plain.grad_scale = ((norm + 1e-6) / clip).clamp(min=1) if clip else None
        for group in plain.param_groups:
            group["lr"] = lr
        plain.step()
        assert engine.step(lr).grad_norm == pytest.approx(float(norm), rel=1e-6)
    for name, copy in copies.items():
        torch.testing.assert_close(engine.masters[model.get_parameter(name)], copy, atol=1e-6, rtol=1e-6)
        assert torch.equal(model.get_parameter(name), engine.masters[model.get_parameter(name)].bfloat16())
    assert all(torch.equal(model.get_parameter(n), p) for n, p in idle.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c073_the_gradient_norm_is_exact_for_tensors_of_any_size(dtype: torch.dtype) -> None:
    """As large as stacked experts are: a naive sum in fp32 loses a fifth of a percent over these 34 M values."""
    torch.manual_seed(0)
    grads = [torch.randn(1 << 25, dtype=dtype), torch.randn(3, 5, dtype=dtype).t(), torch.ones((), dtype=dtype)]
    want = math.sqrt(sum(float(part.double().square().sum()) for grad in grads for part in grad.reshape(-1).split(1 << 22)))
    assert float(norm_of(grads)) == pytest.approx(want, rel=2e-6)


def test_c073_the_gradient_norm_is_exact_over_very_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million rows of equal norm, as of billions of values: a plain fp32 sum over them loses 5e-4."""
    monkeypatch.setattr(masters, "_ROW", 16)
    value = 0.37
    norm = float(norm_of([torch.full((1 << 24,), value)]))
    assert norm == pytest.approx(float(torch.tensor(value)) * 2**12, rel=1e-5)


class _OtherRank(Comm):
    """A second rank whose gradient is the same number everywhere, far below what a bf16 sum could show."""

    def __init__(self, gradient: float) -> None:
        super().__init__(world_size=2)
        self.gradient = gradient

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.dtype == torch.float32
        return tensor.add_(self.gradient)


def test_c071_gradients_of_several_ranks_reach_the_masters_as_their_sum_in_fp32() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"out": nn.Linear(30, 7)})
    other = 2.0**-12
    engine = PlainEngine(model, settings(precision="bf16"), _OtherRank(other))
    copies = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    groups = [{"params": [copy], "weight_decay": decay} for copy, decay in zip(copies, (0.2, 0.0), strict=True)]
    plain = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-3, fused=True)
    for _ in range(2):
        for parameter, copy in zip(model.parameters(), copies, strict=True):
            parameter.grad = torch.randn(copy.shape).bfloat16()
            copy.grad = parameter.grad.float() + other
        norm = torch.nn.utils.get_total_norm([copy.grad for copy in copies])
        plain.step()
        assert engine.step(0.1).grad_norm == pytest.approx(float(norm), rel=1e-6)
    for parameter, copy in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(engine.masters[parameter], copy, atol=1e-6, rtol=1e-6)
        assert parameter.grad is None and engine.masters[parameter].grad is None
