"""C54: from the first forward pass of a step to its last backward pass nothing waits for the device to tell a value."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import lumina_engine
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.training.comm import Comm
from lumina_engine.training.trainer import EnhancedConversationTrainer
from tests.parity.modes import write_data
from tests.parity.rows import Records, config_of, store_of

ROOT = Path(lumina_engine.__file__).parent
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::unique", "aten::_unique2", "aten::equal")
# Branches that are taken on a CPU only, where a read costs nothing: rows without loss are left out, experts run one by one.
ON_CPU_ONLY = {("model/loss.py", "_trained_rows"), ("model/experts.py", "forward"), ("model/experts.py", "experts_loop")}


class Reads(TorchDispatchMode):
    """Which functions of the engine read values of tensors while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if func._schema.name in READS:
            self.found.add(_caller())
        return func(*args, **(kwargs or {}))


def _caller() -> tuple[str, str]:
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(str(ROOT)):
        frame = frame.f_back
    assert frame is not None
    return str(Path(frame.f_code.co_filename).relative_to(ROOT)), frame.f_code.co_name


@pytest.mark.parametrize("packing", ["none", "fit", "concat"])
def test_c054_no_read_of_the_device_between_forward_and_backward(tmp_path: Path, packing: str) -> None:
    keys = {"use_deepspeed": False, "batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "packing": packing}
    config = config_of(str(write_data(tmp_path)), {**keys, "router_bias_rate": 0.01})
    tokenizer = ConversationTokenizer(config.tokenizer)
    trainer = EnhancedConversationTrainer(DeepSeekTransformer(config), tokenizer, config, Records(), comm=Comm())
    reads = Reads()
    forward, section = trainer.engine.forward, trainer.section

    def watched(*args: Any, **kwargs: Any) -> Any:
        if not active:
            active.append(reads.__enter__())
        return forward(*args, **kwargs)

    def passed(name: str, step: int) -> None:
        if name == "step":
            active.pop().__exit__(None, None, None)
        section(name, step)

    active: list[Reads] = []
    trainer.engine.forward, trainer.section = watched, passed  # type: ignore[method-assign]
    trainer.train(store_of(config))
    assert reads.calls > 1000
    assert reads.found <= ON_CPU_ONLY
