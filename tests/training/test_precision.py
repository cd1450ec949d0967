"""auto_tune_precision decides by measurement; dynamic_precision acts on repeated non-finite steps only (C71, section 7.4)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumina_engine.config.checks import check
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.launch import wait
from lumina_engine.run.rank import NullChannel
from lumina_engine.training.ladder import HOLD, PrecisionLadder, native_bf16, wider
from lumina_engine.training.state import payload, restore
from lumina_engine.training.tune_precision import Row, choose, in_precision, modes

from .test_resume import conversations, steps, train
from .test_trainer import setup

CPU = torch.device("cpu")


def rows(**speeds: float) -> list[Row]:
    return [Row(name, speed, 1000, 5.0, 2.0) for name, speed in speeds.items()]


def test_c071_the_fastest_inside_the_bounds_is_taken_and_the_reason_told() -> None:
    assert choose(rows(fp32=100, bf16=300, mixed_bf16=200)) == ("bf16", "the fastest inside the bounds, 1.50 x the next")
    assert choose(rows(fp32=100, bf16=50, mixed_bf16=60))[0] == "fp32"
    name, reason = choose(rows(fp32=100, bf16=96, mixed_bf16=60))
    assert name == "bf16" and "within 5 % of fp32, the fastest, and a tie goes to bf16" in reason
    assert choose(rows(fp32=100, bf16=94))[0] == "fp32"


@pytest.mark.parametrize(
    "changes", [{"loss": 5.06}, {"loss": 4.94}, {"grad_norm": 2.11}, {"loss": math.nan}, {"grad_norm": math.inf}]
)
def test_c071_what_is_inaccurate_is_not_taken(changes: dict[str, float]) -> None:
    fast = Row(**{"precision": "bf16", "tokens_per_s": 900, "peak": 1, "loss": 5.0, "grad_norm": 2.0, **changes})
    name, reason = choose([*rows(fp32=100), fast])
    assert name == "fp32" and "outside the bounds of 1 % in loss and 5 % in gradient norm: bf16" in reason


def test_c071_want_of_memory_and_short_runs_are_told() -> None:
    lost = Row("bf16", failed="out of memory")
    assert choose([*rows(fp32=100), lost])[0] == "fp32" and lost.text(rows(fp32=100)[0]) == "bf16: out of memory"
    name, reason = choose([Row("fp32", failed="only 2 steps in the whole run"), lost])
    assert name == "fp32" and "only 2 steps" in reason
    line = Row("bf16", 2000, 10**9, 5.01, 2.0).text(rows(fp32=1000)[0])
    assert line == "bf16: 2,000 tokens/s, peak 1 GB, loss 5.0100, norm 2.0000 (+0.20% and +0.00% of fp32)"


def test_c071_only_what_the_device_has_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina_engine.training.ladder.cpu_flags", lambda: {"avx2"})
    assert modes(CPU) == ["fp32"] and not native_bf16(CPU)
    monkeypatch.setattr("lumina_engine.training.ladder.cpu_flags", lambda: {"avx512_bf16"})
    assert modes(CPU) == ["fp32", "bf16", "mixed_bf16"]
    plain, ours = Config(use_deepspeed=False, zero_stage=0), Config(zero_stage=0)
    assert in_precision(plain, "bf16").zero_stage == 0 and in_precision(ours, "bf16").zero_stage == 1
    assert in_precision(ours, "mixed_bf16").zero_stage == 0


def test_c071_findings_of_precision() -> None:
    assert [f.code for f in check(Config(dynamic_precision=True, precision="fp32"))] == ["dynamic_fp32"]
    assert [f.code for f in check(Config(auto_tune_precision=True, precision="fp32"))] == ["auto_tune"]
    assert check(Config(dynamic_precision=True, auto_tune_precision=True)) == []


def test_the_rungs() -> None:
    assert [wider(name, True) for name in ("fp16", "mixed_fp16", "bf16", "mixed_bf16", "fp32")] == [
        *("bf16", "mixed_bf16", "fp32", "fp32", None)
    ]
    assert wider("fp16", False) == wider("mixed_fp16", False) == "fp32"


@given(steps=st.lists(st.booleans(), max_size=400))
def test_a_ladder_acts_at_the_fifth_skip_in_a_hundred_steps_and_never_before(steps: list[bool]) -> None:
    ladder = PrecisionLadder("mixed_bf16", True)
    for step, applied in enumerate(steps, start=1):
        switch = ladder.observe(step, applied)
        recent = sum(not ok for ok in steps[max(0, step - 100) : step])
        assert (switch is not None) == (recent == 5)
        if switch is not None:
            assert switch.precision == "fp32" and not applied
            return


def walk(ladder: PrecisionLadder, bad: set[int], until: int) -> list[tuple[int, str]]:
    found = []
    for step in range(1, until + 1):
        switch = ladder.observe(step, step not in bad)
        if switch is not None:
            found.append((step, switch.precision))
    return found


def test_a_ladder_returns_twice_and_then_stays() -> None:
    bad = {step for start in (10, 600, 1200) for step in range(start, start + 5)}
    assert walk(PrecisionLadder("fp16", True), bad, 4000) == [
        (14, "bf16"),
        (14 + HOLD, "fp16"),
        (604, "bf16"),
        (604 + HOLD, "fp16"),
        (1204, "bf16"),  # the third time for good
    ]
    assert walk(PrecisionLadder("fp16", False), set(range(1, 6)), 20) == [(5, "fp32")]
    assert walk(PrecisionLadder("bf16", True), set(), 4000) == []
    late = {98, 99, 100, 101}
    assert walk(PrecisionLadder("bf16", True), {1, *late}, 120) == []  # 5 skips, but in 101 steps
    assert walk(PrecisionLadder("bf16", True), {2, *late}, 120) == [(101, "fp32")]


def test_a_ladder_falls_further_and_heeds_the_loss_scale_and_its_saved_state() -> None:
    ladder = PrecisionLadder("fp16", True)
    assert ladder.observe(1, True, scale=1.0) is None
    first = ladder.observe(2, True, scale=0.5)
    assert first is not None and first.precision == "bf16" and "loss scale fell to 0.5" in first.reason
    again = PrecisionLadder("bf16", False)
    again.load_state_dict(ladder.state_dict())
    assert (again.home, again.current, again.since) == ("fp16", "bf16", 2)
    second = again.observe(3, False, hopeless=True)
    assert second is not None and second.precision == "fp32"
    back = again.observe(3 + HOLD, True)
    assert back is not None and back.precision == "fp16"


def poison(trainer: Any, bad: set[int]) -> list[torch.dtype | None]:
    """Losses of these steps overflow; the autocast type of each forward pass is noted."""
    forward, seen = trainer.engine.forward, []

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        seen.append(trainer.engine.precision.autocast)
        if trainer.progress.step + 1 in bad:
            out = out._replace(loss_sum=out.loss_sum * math.inf)
        return out

    trainer.engine.forward = poisoned
    return seen


MIXED = {"batch_size": 4, "num_epochs": 1000, "precision": "mixed_bf16", "dynamic_precision": True, "max_nonfinite_in_row": 3}


def test_forced_overflows_walk_the_ladder_in_place(tmp_path: Path) -> None:
    trainer, dataset, records = setup(tmp_path, **MIXED, max_steps=20)
    assert trainer.ladder is not None
    trainer.ladder.hold = 4
    seen = poison(trainer, {2, 3, 4})  # three in a row would end the run
    assert trainer.train(dataset)["state"] == "finished"
    short, full = torch.bfloat16, None
    assert seen == [short] * 4 + [full] * 4 + [short] * 12
    changes = [(r.what, r.step, r.before, r.after, r.by) for r in records if isinstance(r, rec.Change)]
    assert changes == [("precision", 4, "mixed_bf16", "fp32", "adaptive"), ("precision", 8, "fp32", "mixed_bf16", "adaptive")]
    assert payload(trainer).global_state["precision_ladder"]["returns"] == 1


@pytest.mark.parametrize("bad", [set(), {2, 3, 4}], ids=["at home", "on the rung"])
@pytest.mark.parametrize("chosen", ["fp32", "mixed_bf16"])
def test_c071_a_precision_that_the_user_sets_anew_is_the_home_of_a_ladder(tmp_path: Path, chosen: str, bad: set[int]) -> None:
    keys = {**MIXED, "save_interval": 0, "async_save": False}
    trainer, dataset, _ = setup(tmp_path, manager=True, **keys, max_steps=5)
    poison(trainer, bad)
    trainer.train(dataset)
    assert trainer.ladder is not None and trainer.ladder.current == trainer.precision.name == ("fp32" if bad else "mixed_bf16")
    assert trainer.config.precision == "mixed_bf16"  # what a later start reads is what was asked for
    again, dataset, records = setup(tmp_path, manager=True, **{**keys, "precision": chosen}, max_steps=12)
    again.prepare(dataset)
    restore(again, again.manager.load(again.manager.recover()))
    assert again.ladder is not None and (again.ladder.home, again.config.precision) == (chosen, chosen)
    assert again.precision.name == again.ladder.current == ("fp32" if bad else chosen)
    again.ladder.hold = 2
    again.train(dataset)
    back = [("fp32", "mixed_bf16")] if bad and chosen == "mixed_bf16" else []
    assert [(r.before, r.after) for r in records if isinstance(r, rec.Change)] == back


def test_c071_weights_in_another_precision_stay_in_what_the_user_sets_anew(tmp_path: Path) -> None:
    keys = {**MIXED, "precision": "bf16", "save_interval": 0, "async_save": False}
    trainer, dataset, _ = setup(tmp_path, manager=True, **{**keys, "max_steps": 3})
    trainer.channel = trainer.control.channel = Supervised()
    trainer.ladder = trainer._make_ladder()
    trainer.train(dataset)
    again, dataset, records = setup(tmp_path, manager=True, **{**keys, "precision": "fp32", "max_steps": 8})
    again.channel = again.control.channel = Supervised()
    again.ladder = again._make_ladder()
    again.prepare(dataset)
    restore(again, again.manager.load(again.manager.recover()))
    assert again.ladder is not None and (again.ladder.home, again.ladder.current) == ("fp32", "fp32")
    again.ladder.hold = 2
    assert again.train(dataset)["state"] == "finished"
    assert not [r for r in records if isinstance(r, rec.Change)] and again.config.precision == "fp32"


def test_a_clean_run_never_switches_and_fp32_has_nothing_wider(tmp_path: Path) -> None:
    trainer, dataset, records = setup(tmp_path, **MIXED, max_steps=8)
    assert trainer.train(dataset)["state"] == "finished"
    assert not [r for r in records if isinstance(r, rec.Change)]
    trainer, dataset, _ = setup(tmp_path, **{**MIXED, "precision": "fp32"}, max_steps=8)
    poison(trainer, {2, 3, 4})
    assert trainer.train(dataset)["exit_code"] == 93


class Supervised(NullChannel):
    supervised = True


def test_other_weights_are_changed_by_a_restart_from_the_checkpoint(tmp_path: Path) -> None:
    keys = {**MIXED, "precision": "bf16", "save_interval": 0, "async_save": False, "max_steps": 12}
    trainer, dataset, _ = setup(tmp_path, manager=True, **keys)
    assert trainer.ladder is None  # nobody could start a plain script again
    trainer.channel = trainer.control.channel = Supervised()
    trainer.ladder = trainer._make_ladder()
    poison(trainer, {4, 5, 6})
    summary = trainer.train(dataset)
    assert (summary["state"], summary["exit_code"], summary["step"]) == ("restarting", 92, 6)
    assert "precision bf16 -> fp32: 3 of the last 100 steps were not finite" in summary["reason"]
    assert trainer.config.precision == "fp32"
    masters = {trainer.engine.names[m]: m.detach().clone() for m in trainer.engine.masters.values()}
    again, dataset, records = setup(tmp_path, manager=True, **{**keys, "precision": "fp32"})
    again.channel = again.control.channel = Supervised()
    again.ladder = again._make_ladder()
    again.prepare(dataset)
    restore(again, again.manager.load(again.manager.recover()))
    assert again.ladder is not None and (again.ladder.home, again.ladder.current, again.ladder.since) == ("bf16", "fp32", 6)
    assert all(torch.equal(p, masters[n]) for n, p in again.model.named_parameters())  # the masters go on, not their rounding
    again.ladder.hold = 3
    summary = again.train(dataset)
    assert (summary["exit_code"], summary["step"]) == (92, 9) and [r.after for r in records if isinstance(r, rec.Change)] == [
        "bf16"
    ]
    back, dataset, _ = setup(tmp_path, manager=True, **keys)
    back.prepare(dataset)
    restore(back, back.manager.load(back.manager.recover()))
    weights = dict(again.model.named_parameters())
    assert all(torch.equal(m, weights[back.engine.names[m]]) for m in back.engine.masters.values())


@pytest.mark.slow
def test_c071_the_start_measures_says_why_and_leaves_training_as_it_was(tmp_path: Path) -> None:
    data = conversations(tmp_path / "train.jsonl")
    keys = ["max_steps=16", "save_interval=0"]
    tuned = train(tmp_path, "tuned", data, *keys, "auto_tune_precision=true")
    assert wait(tuned, 280) == 0, tuned.log_path.read_text()[-2000:]
    table = [r.message for r in read_records(tuned.metrics_path) if isinstance(r, rec.Note) and "auto_tune" in r.message]
    tried = modes(CPU)
    assert len(table) == len(tried) + 1 and all("tokens/s, peak" in line for line in table[:-1])
    assert [line.split(": ")[1] for line in table[:-1]] == tried
    chosen = Config.load(tuned.config_path)
    assert f"auto_tune_precision: {chosen.precision} it is: " in table[-1]
    assert all(f"lumina: {line}" in tuned.log_path.read_text() for line in table)
    stage = [f"zero_stage={chosen.zero_stage}"] if chosen.precision == "bf16" else []
    plain = train(tmp_path, "plain", data, *keys, f"precision={chosen.precision}", *stage)
    assert wait(plain, 280) == 0, plain.log_path.read_text()[-2000:]
    want, got = steps(plain), steps(tuned)
    assert sorted(got) == sorted(want) == list(range(1, 17))
    assert all(
        (got[n].loss, got[n].grad_norm, got[n].tokens) == (want[n].loss, want[n].grad_norm, want[n].tokens) for n in want
    )


@pytest.mark.parametrize(("native", "rung"), [(True, "mixed_bf16"), (False, "fp32")])
def test_fp16_lowers_its_scale_first_and_then_takes_the_next_rung(tmp_path: Path, native: bool, rung: str) -> None:
    keys = {**MIXED, "precision": "mixed_fp16", "max_steps": 12, "max_nonfinite_in_row": 3}
    trainer, dataset, records = setup(tmp_path, **keys)
    assert trainer.ladder is not None
    trainer.ladder.has_bf16 = native
    seen = poison(trainer, {2, 3, 4, 5, 6})  # a scale that is still sinking does not end the run after three
    assert trainer.train(dataset)["state"] == "finished"
    short = torch.bfloat16 if native else None
    assert seen == [torch.float16] * 6 + [short] * 6
    changes = [(r.what, r.step, r.before, r.after) for r in records if isinstance(r, rec.Change)]
    scales = [(step, before, after) for what, step, before, after in changes if what == "loss_scale"]
    assert scales[:5] == [(n + 2, 2.0 ** (16 - n), 2.0 ** (15 - n)) for n in range(5)]
    assert [change for change in changes if change[0] == "precision"] == [("precision", 6, "mixed_fp16", rung)]


def test_fp16_weights_go_on_as_bf16_with_the_same_masters(tmp_path: Path) -> None:
    keys = {**MIXED, "precision": "fp16", "save_interval": 0, "async_save": False, "max_steps": 9}
    trainer, dataset, _ = setup(tmp_path, manager=True, **keys)
    trainer.channel = trainer.control.channel = Supervised()
    trainer.ladder = trainer._make_ladder()
    assert trainer.ladder is not None
    trainer.ladder.has_bf16 = True
    poison(trainer, {2, 3, 4, 5, 6})
    assert trainer.train(dataset)["exit_code"] == 92 and trainer.config.precision == "bf16"
    again, dataset, _ = setup(tmp_path, manager=True, **{**keys, "precision": "bf16"})
    again.prepare(dataset)
    restore(again, again.manager.load(again.manager.recover()))
    was = {trainer.engine.names[m]: m for m in trainer.engine.masters.values()}
    assert all(torch.equal(m, was[again.engine.names[m]]) for m in again.engine.masters.values())
    assert again.train(dataset)["step"] == 9
