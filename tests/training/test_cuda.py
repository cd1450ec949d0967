"""C112: the CUDA settings through a stand-in for torch: what is set is returned, and nothing without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import lumina_engine
from lumina_engine.training.cuda import optimize_cuda_settings


class Torch:
    """What the settings touch of torch."""

    def __init__(self, available: bool = True, initialized: bool = False) -> None:
        self.cuda = SimpleNamespace(is_available=lambda: available, is_initialized=lambda: initialized)
        self.backends = SimpleNamespace(cudnn=SimpleNamespace(benchmark=False))
        self.precision = "highest"

    def set_float32_matmul_precision(self, value: str) -> None:
        self.precision = value


def test_c112_all_settings_on_a_gpu() -> None:
    torch, environment = Torch(), {}
    done = optimize_cuda_settings(backend=torch, environment=environment)
    assert done == {"allocator": "expandable_segments:True", "float32_matmul_precision": "high", "cudnn_benchmark": "True"}
    assert torch.precision == "high" and torch.backends.cudnn.benchmark is True
    assert environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def test_c112_deterministic_leaves_arithmetic_alone() -> None:
    torch = Torch()
    assert set(optimize_cuda_settings(True, backend=torch, environment={})) == {"allocator"}
    assert torch.precision == "highest" and torch.backends.cudnn.benchmark is False


@pytest.mark.parametrize(("torch", "environment"), [(Torch(initialized=True), {}), (Torch(), {"PYTORCH_CUDA_ALLOC_CONF": "x"})])
def test_c112_the_allocator_is_set_only_in_time_and_over_nobody(torch: Torch, environment: dict) -> None:
    before = dict(environment)
    assert "allocator" not in optimize_cuda_settings(backend=torch, environment=environment) and environment == before


def test_c112_nothing_on_a_cpu() -> None:
    assert optimize_cuda_settings(backend=Torch(available=False), environment={}) == {}
    assert lumina_engine.optimize_cuda_settings is optimize_cuda_settings
