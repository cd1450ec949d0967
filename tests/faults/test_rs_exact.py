"""Exact resume (RS01-RS05, RS08, RS11): a run given up anywhere and gone on with is bit for bit the unbroken one."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from lumina_engine.checkpoint.manager import Loaded
from lumina_engine.monitoring import record as rec
from lumina_engine.run.rank import Command

from .tiny import Tiny

STEPS = 24
RATE_AT, RATE = 4, 1e-3  # the user changes the rate after that step


def set_lr(tiny: Tiny, step: int, lr: float) -> None:
    """The user's command at the boundary of a step."""
    tiny.channel.commands[step] = [Command(id=f"c{step}", cmd="set_lr", args={"lr": lr})]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiny, dict[str, Any]]:
    """24 steps with a checkpoint at each boundary; the user changes the rate on the way."""
    folder = tmp_path_factory.mktemp("exact")
    tiny = Tiny(folder, save_interval=1)
    set_lr(tiny, RATE_AT, RATE)
    tiny.train()
    return folder, tiny, tiny.state()


def gone_on(folder: Path, name: str, step: int, change: Callable[[Loaded], None] = lambda loaded: None, **keys: Any) -> Tiny:
    """A new start of the run that was given up after `step`, up to the end; what it saves goes to a folder of its own."""
    tiny = Tiny(folder, name, **keys)
    tiny.manager.path_of = lambda s: folder / "run" / "checkpoints" / f"step-{s:06d}"  # type: ignore[method-assign]
    tiny.resume(step, change)
    if step < RATE_AT:
        set_lr(tiny, RATE_AT, RATE)
    tiny.train()
    return tiny


def routed(tiny: Tiny) -> dict[int, dict[str, Any]]:
    """What each record of the routing says: it counts since the record before, so also what a checkpoint in between kept."""
    records = (msgspec.structs.asdict(r) for r in tiny.records if isinstance(r, rec.Experts))
    return {record["step"]: record | {"seq": 0, "t": 0.0, "inc": 0} for record in records}


def differs(tiny: Tiny, whole: Tiny, state: dict[str, Any]) -> list[str]:
    """The parts in which a run that went on is not the unbroken one."""
    now = tiny.state()
    parts = [name for name in state if now[name] != state[name]]
    parts += ["losses"] if any(whole.losses[s] != row for s, row in tiny.losses.items()) else []
    routing = routed(whole)
    parts += ["routing"] if any(routing[s] != found for s, found in routed(tiny).items()) else []
    parts += ["samples"] if any(whole.rows[s] != rows for s, rows in tiny.rows.items()) else []
    return parts


@pytest.mark.parametrize("step", range(1, STEPS))
def test_rs01_given_up_after_any_step_equals_unbroken(unbroken: tuple[Path, Tiny, dict[str, Any]], step: int) -> None:
    folder, whole, state = unbroken
    tiny = gone_on(folder, f"from-{step}", step)
    assert sorted(tiny.losses) == list(range(step + 1, STEPS + 1)) == sorted(tiny.rows)
    assert differs(tiny, whole, state) == []


def _no_cursor(loaded: Loaded) -> None:
    loaded.global_state["progress"] |= {"epoch": 0, "index": 0}


def _no_rng(part: str) -> Callable[[Loaded], None]:
    def leave_out(loaded: Loaded) -> None:
        from lumina_engine.checkpoint.manager import capture_rng

        state, tensors = capture_rng()  # of the new process: as if that part were not in the checkpoint
        if part == "torch":
            loaded.rank_tensors.update(tensors)
        else:
            loaded.rank_state["rng"][part] = state[part]

    return leave_out


def _no_optimizer(loaded: Loaded) -> None:
    for name, tensor in loaded.rank_tensors.items():
        if name.startswith("optimizer."):
            tensor.zero_()


def _no_schedule(loaded: Loaded) -> None:
    loaded.global_state["schedule"] = {"multiplier": 1.0}


def _no_scale(loaded: Loaded) -> None:
    loaded.global_state["loss_scale"] = None


def _no_bias(loaded: Loaded) -> None:
    names = [name for name in loaded.model if name.endswith("router.bias")]
    assert names
    for name in names:
        loaded.model[name] = torch.zeros_like(loaded.model[name])


def _no_statistics(loaded: Loaded) -> None:
    for name in [n for n in loaded.rank_tensors if n.startswith("routing.")]:
        del loaded.rank_tensors[name]


def _no_window(loaded: Loaded) -> None:
    del loaded.global_state["guard"]


LEFT_OUT: dict[str, tuple[Callable[[Loaded], None], set[str]]] = {
    "data cursor": (_no_cursor, {"samples", "losses", "parameters"}),
    "python": (_no_rng("python"), {"rng"}),
    "numpy": (_no_rng("numpy"), {"rng"}),
    "torch": (_no_rng("torch"), {"losses", "parameters", "rng"}),
    "optimizer": (_no_optimizer, {"losses", "parameters", "optimizer"}),
    "scheduler": (_no_schedule, {"losses", "schedule", "parameters"}),
    "router bias": (_no_bias, {"router"}),
    "router statistics": (_no_statistics, {"routing"}),
    "spike window": (_no_window, {"guard"}),
}


@pytest.mark.nightly
@pytest.mark.parametrize("item", LEFT_OUT)
def test_rs04_a_state_item_left_out_is_noticed(unbroken: tuple[Path, Tiny, dict[str, Any]], item: str) -> None:
    folder, whole, state = unbroken
    change, expected = LEFT_OUT[item]
    found = differs(gone_on(folder, f"without {item}", 12, change), whole, state)
    assert expected <= set(found), found


@pytest.mark.nightly
def test_rs04_a_loss_scale_left_out_is_noticed(tmp_path: Path) -> None:
    keys = {"precision": "mixed_fp16", "max_steps": 8}
    whole = Tiny(tmp_path, save_interval=4, **keys)
    whole.trainer.engine.scale.value = 1024.0
    whole.train()
    state = whole.state()
    assert differs(gone_on(tmp_path, "kept", 4, **keys), whole, state) == []
    found = differs(gone_on(tmp_path, "left out", 4, _no_scale, **keys), whole, state)
    assert "scale" in found


def chain(folder: Path, name: str, stops: list[tuple[int, str, int]], **keys: Any) -> Tiny:
    """Starts in children that SIGKILL themselves at the given (step, section, count); the last one in this process."""
    for step, section, count in stops:
        child = os.fork()
        if child == 0:
            try:
                _dying(folder, name, step, section, count, keys)
            finally:
                os._exit(3)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (step, section, status)
    tiny = Tiny(folder, name, **keys)
    if tiny.manager.recover() is not None:
        tiny.resume()
    tiny.train()
    return tiny


def _dying(folder: Path, name: str, step: int, section: str, count: int, keys: dict[str, Any]) -> None:
    tiny = Tiny(folder, name, **keys)
    seen = itertools.count(1)

    def at(now: int, where: str) -> None:
        if (now, where) == (step, section) and next(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    tiny.channel.at = at
    if tiny.manager.recover() is not None:
        tiny.resume()
    tiny.train()


def test_rs02_killed_at_ten_instants_equals_unbroken(tmp_path: Path, fault_random: random.Random) -> None:
    keys = {"save_interval": 3, "max_steps": 30}
    whole = Tiny(tmp_path, "whole", **keys)
    whole.train()
    state, losses = whole.state(), whole.losses
    steps = sorted(fault_random.choices(range(1, 31), k=10))  # each at or behind the checkpoint that the one before left
    stops = [
        (
            step,
            *fault_random.choice([("data", 1), ("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2), ("step", 1)]),
        )
        for step in steps
    ]
    tiny = chain(tmp_path, "killed", stops, **keys)
    assert tiny.state() == state, stops
    assert all(losses[step] == row for step, row in tiny.losses.items())
    per_epoch = whole.loader().rows_per_epoch
    taken = [row for step in sorted(whole.rows) for row in whole.rows[step]]
    for first in range(0, len(taken) - per_epoch + 1, per_epoch):
        assert sorted(taken[first : first + per_epoch]) == list(range(per_epoch))
    assert len(taken) >= per_epoch


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("epoch ends", marks=[pytest.mark.slow, pytest.mark.fast]),
        "in accumulation",
        "in evaluation",
        "packing remainder",
    ],
)
def test_rs03_awkward_places_equal_unbroken(tmp_path: Path, case: str) -> None:
    keys: dict[str, Any] = {"save_interval": 1, "max_steps": 18, "eval_split": 0.25, "eval_interval": 2, "eval_batches": 2}
    if case == "packing remainder":
        keys |= {"packing": "concat"}
    if case == "in accumulation":
        keys |= {"gradient_accumulation_steps": 4}
    whole = Tiny(tmp_path, "whole", **keys)
    whole.train()
    epochs = [row[6] for row in whole.losses.values()]
    assert epochs[0] == 0 and epochs[-1] > 0  # the run crosses an epoch
    turn = next(step for step, row in whole.losses.items() if row[6] > 0)
    stops = {
        "epoch ends": [(turn - 1, "data", 1), (turn, "step", 1), (turn + 1, "data", 1)],
        "in accumulation": [(3, "forward", 3), (3, "backward", 4)],
        "in evaluation": [(4, "eval", 1), (4, "eval", 1), (6, "eval", 1)],
        "packing remainder": [(turn, "data", 1), (turn + 1, "data", 1), (turn + 2, "forward", 2)],
    }[case]
    tiny = chain(tmp_path, "broken", stops, **keys)
    assert tiny.state() == whole.state()
    assert tiny.trainer.progress.last_eval == whole.trainer.progress.last_eval


def test_rs05_workers_and_prefetch_change_no_sample(unbroken: tuple[Path, Tiny, dict[str, Any]]) -> None:
    folder, whole, state = unbroken
    for number, keys in enumerate(({"num_workers": 2, "prefetch_batches": 1}, {"num_workers": 1, "prefetch_batches": 4})):
        tiny = gone_on(folder, f"workers-{number}", 8 + number, **keys)
        assert differs(tiny, whole, state) == []


def poison(tiny: Tiny, steps: set[int], value: float = float("nan"), rows: set[int] | None = None) -> None:
    """The loss of these steps times `value`; with `rows` only where one of these rows is in the batch."""
    forward = tiny.trainer.engine.forward

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        step = tiny.trainer.progress.step + 1
        bad = step in steps if rows is None else bool(rows & set(tiny.rows[step]))
        return out._replace(loss_sum=out.loss_sum * value) if bad else out

    tiny.trainer.engine.forward = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("stop", [pytest.param(8, marks=[pytest.mark.slow, pytest.mark.fast]), 12, 16])
def test_rs08_after_a_skipped_step_and_after_a_rollback_equals_unbroken(tmp_path: Path, stop: int) -> None:
    """One batch is not finite (step 6: skipped); three in a row are (steps 13-15: rollback, skip list).

    All of it within one epoch, so that no bad row comes again. Where a run ends it records its experts, so their interval
    is that of the saves: the unbroken run records them there too.
    """
    keys: dict[str, Any] = {"save_interval": 4, "expert_log_interval": 4, "max_steps": 20, "documents": 200}
    plain = Tiny(tmp_path, "plain", **keys)
    plain.train()
    bad = {row for step in (6, 13, 14, 15) for row in plain.rows[step]}

    whole = Tiny(tmp_path, "whole", **keys)
    poison(whole, set(), rows=bad)
    whole.train()
    back = next(r for r in whole.records if isinstance(r, rec.Rewind))
    assert (back.to_step, back.failed_step) == (8, 15) and whole.trainer.progress.step == 20

    first = Tiny(tmp_path, "broken", **keys)
    poison(first, set(), rows=bad)
    if stop == 16:  # given up after the rollback, with a newer checkpoint that knows of it
        first.channel.at = lambda step, section: _give_up(first, step, section, 18)
        with pytest.raises(_GivenUpError):
            first.train()
    else:
        first.train(until=stop)
    second = Tiny(tmp_path, "broken", **keys)
    poison(second, set(), rows=bad)
    second.resume(stop)
    second.train()
    assert second.state() == whole.state()


class _GivenUpError(Exception):
    pass


def _give_up(tiny: Tiny, step: int, section: str, at: int) -> None:
    if (step, section) == (at, "data") and tiny.trainer.recovery.failures:
        tiny.manager.close()
        raise _GivenUpError


@pytest.mark.parametrize("shift", [-3600.0, 86400.0])
def test_rs11_a_clock_that_jumps_changes_nothing(
    unbroken: tuple[Path, Tiny, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    folder, whole, state = unbroken
    real, jumped = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + (shift if next(jumped) % 2 else 0.0))  # back and forth
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        tiny = gone_on(folder, f"clock{shift}", 10)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert differs(tiny, whole, state) == []
    steps = [r for r in tiny.records if isinstance(r, rec.Step)]
    for name in ("step_time", "data_time", "forward_time", "backward_time", "optimizer_time"):
        assert all(getattr(r, name) is None or getattr(r, name) >= 0 for r in steps)


def test_rs_proof_tells_the_next_step_and_what_changed(unbroken: tuple[Path, Tiny, dict[str, Any]]) -> None:
    folder, whole, _ = unbroken
    tiny = Tiny(folder, "proof", save_interval=1, log_interval=2)
    tiny.manager.path_of = lambda s: folder / "run" / "checkpoints" / f"step-{s:06d}"  # type: ignore[method-assign]
    proof = tiny.resume(10)
    rows = whole.rows[11]
    assert tiny.loader().next_rows() == rows
    expected = [sample for row in rows for sample in tiny.loader().plan.members(row)][:8]
    assert proof.samples == expected and proof.step == 10 and proof.tokens == whole.losses[10][5]
    assert proof.lr == whole.losses[11][4]
    assert proof.changed == {"log_interval": (1, 2)}
    again = Tiny(folder, "proof", save_interval=1)
    again.manager.path_of = tiny.manager.path_of  # type: ignore[method-assign]
    same = again.resume(10)
    assert same.changed == {} and (same.rng, same.rows_digest) == (proof.rng, proof.rows_digest)
    assert rec.decode(rec.encode(proof)) == proof
