"""What a GPU wants: the CUDA settings, through a stand-in for torch, and saved state put back on the device (C112, RS01)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lumina_engine
from lumina_engine.checkpoint.universal import SavedState, Shard
from lumina_engine.training.cuda import optimize_cuda_settings
from lumina_engine.training.deepspeed_engine import DeepSpeedEngine
from lumina_engine.training.engine import MOMENTS, load_named_state
from lumina_engine.training.partitions import Piece


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


@pytest.mark.parametrize(
    ("torch", "environment"),
    [
        (Torch(initialized=True), {}),
        (Torch(), {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}),
        (Torch(), {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}),
        (Torch(), {"PYTORCH_HIP_ALLOC_CONF": "max_split_size_mb:128"}),
    ],
)
def test_c112_the_allocator_is_set_only_in_time_and_over_nobody(torch: Torch, environment: dict) -> None:
    before = dict(environment)
    assert "allocator" not in optimize_cuda_settings(backend=torch, environment=environment) and environment == before


def test_c112_nothing_on_a_cpu() -> None:
    assert optimize_cuda_settings(backend=Torch(available=False), environment={}) == {}
    assert lumina_engine.optimize_cuda_settings is optimize_cuda_settings


def saved_step(count: int) -> SavedState:
    """AdamW's state of a parameter `w` of so many values, as a checkpoint gives it: on the CPU."""
    moments = {f"optimizer.{key}.w": torch.ones(count) for key in MOMENTS}
    return SavedState(Shard({**moments, "optimizer.step.w": torch.tensor(7.0), "master.w": torch.ones(count)}))


def test_rs01_the_state_of_the_optimizer_is_put_back_on_the_device_of_its_weights() -> None:
    """The fused kernels of a GPU refuse a step counter on the host."""
    weight = torch.nn.Parameter(torch.empty(2, 3, device="meta"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    load_named_state(optimizer, {weight: "w"}, {}, saved_step(6))
    assert {key: value.device.type for key, value in optimizer.state[weight].items()} == dict.fromkeys(
        ("step", *MOMENTS), "meta"
    )
    assert optimizer.state[weight]["step"].dtype == torch.float32


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_rs09_the_state_of_a_partition_is_put_back_on_its_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """On the GPU, or on the host where it is offloaded."""
    partition = torch.nn.Parameter(torch.empty(6, device=device))
    inner = torch.optim.AdamW([partition], fused=True)
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.stage = 1
    engine.optimizer = SimpleNamespace(single_partition_of_fp32_groups=[partition], optimizer=inner)
    monkeypatch.setattr(engine, "_pieces", lambda index: [Piece("w", 0, 0, 6)])
    engine.load_state(saved_step(6))
    assert {key: value.device.type for key, value in inner.state[partition].items()} == dict.fromkeys(
        ("step", *MOMENTS), device
    )
    assert inner.state[partition]["step"].dtype == torch.float32
