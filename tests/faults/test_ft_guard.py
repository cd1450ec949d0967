"""The guards of a step (FT04-FT06): skipped on the spot, gone back, given up; with exact counts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina_engine.checkpoint import saving
from lumina_engine.checkpoint.files import CheckpointError
from lumina_engine.checkpoint.verify import read_manifest
from lumina_engine.monitoring import record as rec
from lumina_engine.run.rank import Command
from lumina_engine.training.comm import Comm

from .tiny import Tiny, digest

MANY = 300  # documents: no row comes twice, so what is wrong with one is wrong once


def disturb(tiny: Tiny, steps: set[int], how: Callable[[Any], Any]) -> None:
    """What the model gives in these steps, as often as they are made, goes through `how`."""
    forward = tiny.trainer.engine.forward

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return how(out) if tiny.trainer.progress.step + 1 in steps else out

    tiny.trainer.engine.forward = disturbed  # type: ignore[method-assign]


def times(factor: float) -> Callable[[Any], Any]:
    return lambda out: out._replace(loss_sum=out.loss_sum * factor)


def plus(term: float) -> Callable[[Any], Any]:
    """The loss is not finite, its gradient is."""
    return lambda out: out._replace(loss_sum=out.loss_sum + term)


def moved(tiny: Tiny) -> dict[int, bool]:
    """step -> whether it changed a parameter or the optimizer; filled while training."""
    found: dict[int, bool] = {}
    inner = tiny.trainer.engine.step

    def everything() -> str:
        return digest({**tiny.trainer.engine.model_tensors(), **tiny.trainer.engine.state_tensors()})

    def step(lr: float, allows: Any) -> Any:
        before, number = everything(), tiny.trainer.progress.step + 1
        result = inner(lr, allows)
        found[number] = everything() != before
        return result

    tiny.trainer.engine.step = step  # type: ignore[method-assign]
    return found


def skipped(tiny: Tiny) -> list[int]:
    return [r.step for r in tiny.records if isinstance(r, rec.Step) and r.skipped]


KINDS = {"nan loss": times(math.nan), "inf loss": times(math.inf), "nan loss, finite gradient": plus(math.nan)}


@pytest.mark.parametrize("kind", KINDS)
def test_ft04_one_value_that_is_not_finite_costs_exactly_one_step(
    tmp_path: Path, kind: str, fault_random: random.Random
) -> None:
    at = fault_random.randint(1, 8)
    tiny = Tiny(tmp_path, max_steps=8)
    changed = moved(tiny)
    disturb(tiny, {at}, KINDS[kind])
    tiny.train()
    assert skipped(tiny) == [at] and tiny.trainer.progress.skipped == 1
    assert changed == {step: step != at for step in range(1, 9)}
    assert tiny.alerts() == ["nonfinite_step"]


def test_ft04_a_nan_in_the_gradient_of_one_expert(tmp_path: Path, fault_random: random.Random) -> None:
    at, expert = fault_random.randint(1, 8), fault_random.randrange(4)
    tiny = Tiny(tmp_path, max_steps=8)
    changed = moved(tiny)
    experts_EDF = dict(tiny.trainer.model.named_parameters())["blocks.1.ffn.w2"]

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if tiny.trainer.progress.step + 1 == at:
            gradient = gradient.clone()
            gradient[expert] = math.nan
        return gradient

    experts_EDF.register_hook(poison)
    tiny.train()
    assert changed == {step: step != at for step in range(1, 9)} and tiny.trainer.progress.skipped == 1


def rewinds(tiny: Tiny) -> list[tuple[int, int | None]]:
    return [(r.to_step, r.failed_step) for r in tiny.records if isinstance(r, rec.Rewind)]


def test_ft05_three_in_a_row_go_back_and_past_their_batches(tmp_path: Path) -> None:
    plain = Tiny(tmp_path, "plain", documents=MANY, max_steps=20)
    plain.train()
    bad = {row for step in (13, 14, 15) for row in plain.rows[step]}
    tiny = Tiny(tmp_path, max_steps=20, save_interval=4)
    disturb(tiny, set(range(1, 21)), lambda out: times(math.nan)(out) if bad & set(tiny.rows[_now(tiny)]) else out)
    summary = tiny.train()
    assert (summary["state"], summary["step"]) == ("finished", 20)
    assert rewinds(tiny) == [(8, 15)]  # one interval back and more: 12 is no whole interval before 15
    per_epoch = tiny.loader().rows_per_epoch
    assert tiny.trainer.recovery.skip.ranges == ((8 * 4, 15 * 4),) and per_epoch > 0
    taken = [row for step in range(1, 9) for row in plain.rows[step]]
    taken += [row for step in range(16, 21) for row in plain.rows[step]]
    got = [row for step in range(1, 21) for row in tiny.rows[step]]
    assert got[: len(taken)] == taken  # the same order without the batches of steps 9 to 15
    assert tiny.alerts() == ["nonfinite_step"] * 3 + ["rollback"]
    steps = [r.step for r in tiny.records if isinstance(r, rec.Step)]
    assert steps == [*range(1, 16), *range(9, 21)]
    assert tiny.trainer.progress.skipped == 0  # of the branch that goes on


def _now(tiny: Tiny) -> int:
    return tiny.trainer.progress.step + 1


def test_ft05_endless_nan_ends_with_93_after_the_limit(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path, max_steps=20, save_interval=2, max_rollbacks=2, keep_checkpoints=3)
    inner = tiny.trainer.engine.forward
    endless = {"on": False}

    def forward(*args: Any, **kwargs: Any) -> Any:
        endless["on"] = endless["on"] or _now(tiny) >= 9
        out = inner(*args, **kwargs)
        return times(math.nan)(out) if endless["on"] else out

    tiny.trainer.engine.forward = forward  # type: ignore[method-assign]
    summary = tiny.train()
    assert (summary["state"], summary["exit_code"]) == ("failed", 93)
    assert "2 rollbacks in 1,000 steps did not help" in summary["reason"]
    went = rewinds(tiny)
    assert len(went) == 2 and went[0] == (8, 11)
    assert tiny.alerts().count("nonfinite_step") == 9 and tiny.alerts().count("rollback") == 2
    assert list((tmp_path / "run" / "checkpoints").glob("step-*[0-9]"))  # still something to go on from


def test_ft05_without_a_checkpoint_it_ends_and_says_why(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path, max_steps=20)
    disturb(tiny, set(range(3, 21)), times(math.nan))
    summary = tiny.train()
    assert (summary["exit_code"], summary["step"]) == (93, 5) and "no checkpoint from before it" in summary["reason"]


def test_ft05_a_damaged_checkpoint_is_no_target(tmp_path: Path) -> None:
    plain = Tiny(tmp_path, "plain", documents=MANY, max_steps=16)
    plain.train()
    bad = {row for step in (13, 14, 15) for row in plain.rows[step]}
    tiny = Tiny(tmp_path, max_steps=16, save_interval=2)
    hurt: list[Path] = []

    def at(step: int, section: str) -> None:
        if (step, section) == (13, "data") and not hurt:
            hurt.append(tiny.manager.path_of(12))
            for file in (hurt[0] / "model").glob("*.safetensors"):
                content = bytearray(file.read_bytes())
                content[-5] ^= 1
                file.chmod(0o600)
                file.write_bytes(content)

    tiny.channel.at = at
    disturb(tiny, set(range(1, 17)), lambda out: times(math.nan)(out) if bad & set(tiny.rows[_now(tiny)]) else out)
    tiny.train()
    assert rewinds(tiny) == [(10, 15)] and "checkpoint_damaged" in tiny.alerts()


@pytest.mark.parametrize("set_at", [8, 10])  # 8: the checkpoint to which the run goes back has it
def test_ft05_a_rate_set_since_is_named_and_not_in_force(tmp_path: Path, set_at: int) -> None:
    plain = Tiny(tmp_path, "plain", documents=MANY, max_steps=16)
    plain.train()
    bad = {row for step in (13, 14, 15) for row in plain.rows[step]}
    tiny = Tiny(tmp_path, max_steps=16, save_interval=4)
    tiny.channel.commands[set_at] = [Command(id="c", cmd="set_lr", args={"lr": 1e-2})]
    disturb(tiny, set(range(1, 17)), lambda out: times(math.nan)(out) if bad & set(tiny.rows[_now(tiny)]) else out)
    tiny.train()
    assert rewinds(tiny) == [(8, 15)]
    alert = next(r for r in tiny.records if isinstance(r, rec.Alert) and r.code == "rate_dropped")
    assert f"0.01 at step {set_at + 1}" in alert.message
    assert [tiny.losses[step][4] for step in range(9, 17)] == [plain.losses[step][4] for step in range(9, 17)]


def suspects(tiny: Tiny, steps: range) -> list[int]:
    """Which of these steps have a checkpoint that carries the mark."""
    manifests = {step: read_manifest(tiny.manager.path_of(step)).manifest for step in steps}
    return [step for step, manifest in manifests.items() if manifest.get("flags", {}).get("suspect")]


@pytest.mark.parametrize("policy", ["alert", "skip"])
def test_ft06_a_spike_is_one_event_and_marks_checkpoints(tmp_path: Path, policy: str) -> None:
    keys: dict[str, Any] = {"max_steps": 52, "spike_recover_steps": 4, "spike_policy": policy, "spike_sigma": 8.0}
    tiny = Tiny(tmp_path, save_interval=1, expert_log_interval=50, **keys)
    changed = moved(tiny)
    disturb(tiny, {44}, times(100.0))
    tiny.train()
    assert tiny.alerts() == [tiny.alerts()[0]] and tiny.alerts()[0] in ("loss_spike", "gradient_spike")
    assert skipped(tiny) == ([44] if policy == "skip" else [])
    assert [step for step in range(40, 53) if not changed[step]] == skipped(tiny)
    assert suspects(tiny, range(40, 53)) == [44, 45, 46, 47]  # until four values were normal
    assert any(isinstance(r, rec.Note) and "spike of step 44 is over" in r.message for r in tiny.records)


def test_ft06_a_spike_goes_back_where_the_policy_says_so(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 50, "spike_policy": "rollback", "spike_sigma": 8.0, "expert_log_interval": 50}
    tiny = Tiny(tmp_path, save_interval=4, **keys)
    seen: list[int] = []

    def how(out: Any) -> Any:
        if _now(tiny) == 44 and not seen:
            seen.append(44)
            return times(100.0)(out)
        return out

    disturb(tiny, set(range(1, 51)), how)
    summary = tiny.train()
    assert summary["step"] == 50 and rewinds(tiny) == [(40, 44)]
    assert tiny.alerts().count("rollback") == 1 and len(tiny.alerts()) == 2
    assert tiny.trainer.recovery.skip.ranges == ((160, 176),) and tiny.trainer.guard.open_since is None


@pytest.mark.parametrize(
    "stage", [*(pytest.param(stage, marks=[pytest.mark.slow, pytest.mark.fast]) for stage in (0, 1)), 2, 3]
)
def test_ft06_a_spike_is_left_out_by_deepspeed_too(tmp_path: Path, stage: int) -> None:
    keys: dict[str, Any] = {
        "max_steps": 40,
        "spike_sigma": 8.0,
        "use_deepspeed": True,
        "zero_stage": stage,
        "precision": "fp32",
    }
    tiny = Tiny(tmp_path, comm=Comm.start("gloo"), expert_log_interval=50, **keys)
    changed = moved(tiny)
    disturb(tiny, {36}, times(100.0))
    tiny.train()
    assert skipped(tiny) == [36] == [step for step in range(1, 41) if not changed[step]]


def test_ft06_a_loss_that_steps_up_with_the_next_length_of_a_curriculum_is_left_alone(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"curriculum_learning": True, "min_seq_length": 16, "curriculum_steps": 40}
    tiny = Tiny(tmp_path, max_steps=56, **keys)
    disturb(tiny, set(range(41, 57)), times(3.0))
    tiny.train()
    steps = [record for record in tiny.records if isinstance(record, rec.Step)]
    assert {record.seq_length for record in steps[:40]} == {16} and {record.seq_length for record in steps[40:]} == {32}
    assert skipped(tiny) == [] == tiny.alerts()
    guard = tiny.trainer.guard
    assert guard.shape == (steps[-1].batch, 32) and len(guard.windows["loss"]) == 16


def test_d13_a_stop_waits_for_the_save_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An asynchronous save of the last step that fails in its writer is made again before the run ends."""
    tiny = Tiny(tmp_path, max_steps=10, save_interval=4, async_save=True)
    tiny.channel.commands[8] = [Command(id="a", cmd="checkpoint", args={}), Command(id="b", cmd="stop", args={})]
    write, calls = saving.write_files, []

    def failing(plan: Any, writer: Any) -> Any:
        calls.append(tiny.trainer.progress.step)
        if calls.count(8) == 1:
            raise CheckpointError("injected: the disk is gone")
        return write(plan, writer)

    monkeypatch.setattr(saving, "write_files", failing)
    summary = tiny.train()
    saved = [(r.step, r.failed is None) for r in tiny.records if isinstance(r, rec.Checkpoint)]
    assert summary["state"] == "finished" and saved == [(4, True), (8, False), (8, True)]
    assert json.loads((tiny.manager.path_of(8) / "MANIFEST.json").read_text())["step"] == 8
