"""How many operations per second matrix products reach on this device, now, in this process: the roof of a training step.

Two roofs: one large square product, and the products of the model's own step, whose shapes no optimisation of the rest changes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..config.counts import attention_matrices
from ..model.product import product as model_product

_SQUARE = {"cpu": 2048, "cuda": 8192}
# Times the best so far: what is so slow will not become the best one.
_HOPELESS = 3.0


@dataclass(frozen=True)
class Product:
    """`count` products (rows x inner) @ (inner x columns) a step."""

    rows: int
    inner: int
    columns: int
    count: float

    @property
    def flops(self) -> float:
        """Operations of all of them; one multiply-add is two."""
        return 2.0 * self.rows * self.inner * self.columns * self.count


def step_products(model: Any, batch: int, length: int) -> list[Product]:
    """The forward products of one micro batch: projections, experts at an even load, output head. `model`: resolved shape."""
    tokens, hidden = batch * length, model.hidden_size
    layers, moe = model.num_layers, model.expert_layers
    found = [Product(tokens, inputs, outputs, layers) for outputs, inputs in attention_matrices(model)]
    found.append(Product(tokens, hidden, model.vocab_rows, 1))
    networks = [
        (model.expert_width, max(1, tokens * model.moe_top_k // model.num_experts), moe * model.num_experts),
        (model.num_shared_experts * model.expert_width, tokens, moe),
        (model.dense_width, tokens, layers - moe),
    ]
    for width, rows, count in networks:
        if width and count:
            found += [Product(rows, hidden, 2 * width, count), Product(rows, width, hidden, count)]
    return found


def square_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The best of `repeats` square products, in operations per second."""
    size = _SQUARE.get(device.type, 2048)
    return 2.0 * size**3 / _seconds(Product(size, size, size, 1), device, dtype, repeats)


def products_rate(products: list[Product], device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of the products one after the other, each at the best of `repeats`."""
    seconds = sum(product.count * _seconds(product, device, dtype, repeats) for product in products)
    return sum(product.flops for product in products) / seconds


def _seconds(product: Product, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """The shortest time of one product x @ w.T, as layers do it, by `torch.mm` or what the model takes, the faster one.

    One that is several times slower is not repeated: on a processor without 16-bit products `torch.mm` would take minutes.
    """
    x = torch.randn(product.rows, product.inner, device=device).to(dtype)
    weight = torch.randn(product.columns, product.inner, device=device).to(dtype)
    best = float("inf")
    for multiply in (model_product, _mm):
        for number in range(repeats + 1):
            _wait(device)
            begin = time.perf_counter()
            multiply(x, weight)
            _wait(device)
            seconds = time.perf_counter() - begin
            if number:  # the first one may generate code
                best = min(best, seconds)
            if number == 1 and seconds > _HOPELESS * best:
                break
    return best


def _mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.t())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
