from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.model.transformer import DeepSeekTransformer

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "seq_length": 64,
    "num_experts": 4,
    "rope_theta": 10_000.0,
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., DeepSeekTransformer]:
    """Builds a tiny model in training mode; keywords are configuration keys. Weights are large enough for routing to differ."""

    def build(**changes: object) -> DeepSeekTransformer:
        model = DeepSeekTransformer(DeepSeekConfig(**(BASE | changes)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.mul_(6)
        return model

    return build
