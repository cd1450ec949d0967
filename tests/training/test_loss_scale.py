"""fp16 and its loss scale (C71): by the rule, in training, across a resume, and refused where DeepSpeed has none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina_engine.config.checks import check
from lumina_engine.config.deepspeed import to_deepspeed
from lumina_engine.config.machine import GB, Machine
from lumina_engine.config.resolve import resolve
from lumina_engine.config.schema import Config, ConfigError
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.health.watch import HealthWatch
from lumina_engine.training.engine import StepResult
from lumina_engine.training.loss_scale import LEAST, MOST, WINDOW, LossScale
from lumina_engine.training.state import restore
from tests.training.test_trainer import setup

CPU = Machine([], 16 * GB, 4, None)


def test_c071_the_scale_halves_at_an_overflow_and_doubles_after_a_quiet_window() -> None:
    scale = LossScale(1024.0)
    assert scale.update(overflow=True) and scale.value == 512
    assert not any(scale.update(overflow=False) for _ in range(WINDOW - 1)) and scale.value == 512
    scale.update(overflow=False)
    assert scale.value == 1024 and scale.good == 0
    scale.value = MOST
    for _ in range(WINDOW):
        scale.update(overflow=False)
    assert scale.value == MOST
    scale.value = LEAST
    assert not scale.update(overflow=True) and scale.value == LEAST  # broken values, not the scale
    assert StepResult.of(math.nan, LossScale(4.0)) == StepResult(pytest.approx(math.nan, nan_ok=True), False, True, 2.0)


def fp16(tmp_path: Path, precision: str, **more: Any) -> Any:
    keys = {"batch_size": 4, "max_steps": 8, "num_epochs": 100, "precision": precision, "save_interval": 0, "async_save": False}
    return setup(tmp_path, **{**keys, **more})


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-2), ("mixed_fp16", 2e-2)])
def test_c071_losses_are_those_of_fp32(tmp_path: Path, precision: str, bound: float) -> None:
    losses = {}
    for name in ("fp32", precision):
        trainer, dataset, records = fp16(tmp_path, name)
        trainer.train(dataset)
        losses[name] = [r.loss for r in records if isinstance(r, rec.Step) and not r.skipped]
    assert len(losses[precision]) == 8 and losses["fp32"][-1] < 0.9 * losses["fp32"][0]
    for got, want in zip(losses[precision], losses["fp32"], strict=True):
        assert got == pytest.approx(want, rel=bound)


@pytest.mark.parametrize(
    ("precision", "more"),
    [("fp16", {}), ("mixed_fp16", {}), ("mixed_fp16", {"use_deepspeed": True, "zero_stage": 1})],
    ids=["fp16", "mixed", "mixed-zero1"],
)
def test_c071_an_overflow_skips_one_step_and_lowers_the_scale(tmp_path: Path, precision: str, more: dict[str, Any]) -> None:
    trainer, dataset, records = fp16(tmp_path, precision, max_nonfinite_in_row=1, **more)
    backward = trainer.engine.backward
    before: list[dict[str, torch.Tensor]] = []

    def overflowing(loss: torch.Tensor, last: bool) -> None:
        before.append({name: t.clone() for name, t in trainer.model.state_dict().items()})
        backward(loss * (1e38 if trainer.progress.step == 2 else 1.0), last)  # finite, but not once it is scaled

    trainer.engine.backward = overflowing  # type: ignore[method-assign]
    summary = trainer.train(dataset)
    steps = [r for r in records if isinstance(r, rec.Step)]
    assert [r.step for r in steps if r.skipped] == [3] and summary["exit_code"] == 0
    assert all(torch.equal(before[2][name], before[3][name]) for name in before[2])
    assert any(not torch.equal(before[3][name], before[4][name]) for name in before[3])
    changes = [r for r in records if isinstance(r, rec.Change)]
    assert [(r.what, r.step, r.before, r.after, r.by) for r in changes] == [("loss_scale", 3, 65536.0, 32768.0, "recovery")]
    assert [r.code for r in records if isinstance(r, rec.Alert)] == []
    health = HealthWatch()
    health.replay(records)
    assert health.seen.steps == 8 and health.summary()["scores"]["numerics"]["value"] == 1.0 and not health.alerts


def test_rs09_the_scale_is_in_the_checkpoint(tmp_path: Path) -> None:
    trainer, dataset, _ = fp16(tmp_path, "fp16", manager=True, max_steps=2)
    trainer.engine.scale.value, trainer.engine.scale.good = 512.0, 7
    trainer.train(dataset)
    again, _, _ = fp16(tmp_path, "fp16", manager=True, max_steps=2)
    again.prepare(dataset)
    restore(again, again.manager.load(again.manager.recover()))
    assert again.engine.scale == LossScale(512.0, 9)


def test_r19_fp16_with_deepspeed_on_a_cpu_is_refused_with_the_reason() -> None:
    config = Config(precision="fp16")
    found = [f for f in check(config, CPU) if f.severity == "error"]
    assert [f.code for f in found] == ["fp16_cpu"] and "no fp16 on a CPU" in found[0].line()
    with pytest.raises(ConfigError, match="no fp16 on a CPU"):
        resolve(config, CPU, tokenizer_vocab=100_277)
    assert resolve(Config(precision="fp16", use_deepspeed=False), CPU, tokenizer_vocab=100_277).precision == "fp16"


def test_r25_blocks_of_fp16() -> None:
    assert to_deepspeed(Config(precision="fp16", zero_stage=1), 1)["fp16"]["enabled"] is True
    assert to_deepspeed(Config(precision="mixed_fp16", zero_stage=1), 1)["torch_autocast"]["dtype"] == "float16"
