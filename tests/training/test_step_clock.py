"""The split of a step: parts that add up, both engines, kernels that run behind the clock, no wait for the device (C131)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lumina_engine.config.schema import DeepSeekConfig
from lumina_engine.monitoring import record as rec
from lumina_engine.training import step_clock
from lumina_engine.training.step_clock import StepClock, Utilisation

from .test_trainer import setup

PARTS = ("data_time", "forward_time", "backward_time", "optimizer_time")


@pytest.mark.parametrize("deepspeed", [False, True])
def test_c131_each_step_says_where_its_time_went(tmp_path: Path, deepspeed: bool) -> None:
    trainer, dataset, records = setup(
        tmp_path,
        batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        num_epochs=100,
        use_deepspeed=deepspeed,
        zero_stage=1 if deepspeed else "auto",
    )
    trainer.train(dataset)
    steps = [record for record in records if isinstance(record, rec.Step)]
    assert len(steps) == 5
    for step in steps:
        parts = [getattr(step, name) for name in PARTS]
        assert all(part is not None and part > 0 for part in parts)
        assert sum(parts) <= step.step_time
        assert step.mfu is None, "the peak of a CPU is not known"


class Device:
    """A stream of kernels whose clock goes on only with `run`; events wait in it like in CUDA's."""

    def __init__(self) -> None:
        self.now, self.queue, self.waits = 0.0, [], 0

    def kernels(self, seconds: float) -> None:
        self.queue.append(seconds)

    def event(self) -> Event:
        found = Event(self)
        self.queue.append(found)
        return found

    def run(self) -> None:
        for item in self.queue:
            if isinstance(item, Event):
                item.at = self.now
            else:
                self.now += item
        self.queue.clear()


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, None

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, end: Event) -> float:
        assert self.at is not None and end.at is not None, "read before it has passed: CUDA raises"
        return 1000 * (end.at - self.at)

    def synchronize(self) -> None:
        raise AssertionError("a step never waits for the device")


def test_c131_on_a_device_events_are_read_once_they_have_passed() -> None:
    device = Device()
    clock = StepClock(SimpleNamespace(type="cuda"), device.event)
    seen = []
    for update in (3.0, 5.0, 7.0):
        for _ in range(2):  # micro batches
            clock.start("forward")
            device.kernels(1.0)
            clock.start("backward")
            device.kernels(2.0)
        clock.start("optimizer")
        device.run()  # the gradient norm is read: everything so far has passed
        device.kernels(update)
        seen.append(clock.times())
    assert [times["forward"] for times in seen] == [2.0, 2.0, 2.0]
    assert [times["backward"] for times in seen] == [4.0, 4.0, 4.0]
    assert [times["optimizer"] for times in seen] == [None, 3.0, 5.0], "an update runs in the time of the step that follows"


def test_c131_what_has_not_passed_is_unknown() -> None:
    device = Device()
    clock = StepClock(SimpleNamespace(type="cuda"), device.event)
    clock.start("forward")
    device.kernels(1.0)
    assert clock.times() == {"forward": None, "backward": None, "optimizer": None}


def test_c131_parts_that_follow_each_other_leave_no_gap() -> None:
    moments = iter(range(100))
    stamp = lambda: SimpleNamespace(at=next(moments), query=lambda: True)  # noqa: E731

    def made() -> SimpleNamespace:
        found = stamp()
        found.elapsed_time = lambda end: 1000.0 * (end.at - found.at)
        return found

    clock = StepClock(torch.device("cpu"), made)
    for part in ("forward", "backward", "forward", "backward", "optimizer"):
        clock.start(part)
    assert clock.times() == {"forward": 2.0, "backward": 2.0, "optimizer": 1.0}
    assert clock.times() == {"forward": None, "backward": None, "optimizer": None}


@pytest.mark.parametrize(
    ("name", "precision", "known"),
    [("NVIDIA H100 80GB HBM3", "bf16", True), ("NVIDIA H100 80GB HBM3", "fp32", False), ("Unheard Of 9", "bf16", False)],
)
def test_c131_mfu_only_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch, name: str, precision: str, known: bool) -> None:
    monkeypatch.setattr(step_clock.torch.cuda, "get_device_name", lambda device: name)
    shape = DeepSeekConfig(
        vocab_size=1024, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, gradient_checkpointing=True
    )
    one = Utilisation(shape, precision, SimpleNamespace(type="cuda"), 1).of(1e6, 128)
    two = Utilisation(shape, precision, SimpleNamespace(type="cuda"), 2).of(1e6, 128)
    if not known:
        assert one is None
        return
    plain = shape.model_copy(update={"gradient_checkpointing": False})
    assert one == pytest.approx(1e6 * step_clock.training_flops_per_token(plain, 128) / 989e12)
    assert two == pytest.approx(one / 2)
