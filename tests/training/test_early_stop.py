"""Early stop on the fitted curve in the real trainer (C100): it ends cleanly, at the same step after a kill, for all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lumina_engine.checkpoint.manager import Loaded
from lumina_engine.checkpoint.verify import step_name
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.decisions import KEYS as RULES
from lumina_engine.monitoring.decisions import Replay, of_controller, replay
from lumina_engine.monitoring.early_stop import EARLY_STOP
from lumina_engine.training.adaptive import rewind_to
from lumina_engine.training.state import payload
from tests.faults.test_ft_guard import rewinds
from tests.faults.tiny import Tiny
from tests.launch import last_line, launch
from tests.parity.modes import write_data
from tests.training.test_adaptive import lifted

PROGRAM = Path(__file__).with_name("early_stop_ranks.py")
KEYS: dict[str, Any] = {
    "adaptive": "act",
    "early_stopping_gain": 0.02,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "eval_interval": 2,
    "eval_split": 0.25,
    "save_interval": 4,
    "spike_policy": "alert",
    "expert_log_interval": 500,
    "gradient_accumulation_steps": 1,
    "num_epochs": 100,
    "max_steps": 44,
}
END = 32  # the first step from which the loss falls by less than 0.02 to the last one


def curve(step: int) -> float:
    """At step 30 there are 0.0212 left to step 44, at step 32 0.0170."""
    return 2.0 + 2.0 / step


def planted(folder: Path, name: str = "run", loss: Callable[[int], float] = curve, **keys: Any) -> Tiny:
    """A run whose evaluation after a step gives `loss` of it."""
    tiny = Tiny(folder, name, **KEYS | keys)

    def figures(data: Any, batches: int) -> dict[str, float]:
        value = loss(tiny.trainer.progress.step)
        return {"loss": value, "perplexity": 1.0, "bits_per_byte": 1.0, "accuracy": 0.0, "tokens": 1}

    tiny.trainer.evaluate = figures  # type: ignore[method-assign]
    return tiny


def decisions(tiny: Tiny) -> list[Any]:
    return [r for r in tiny.records if of_controller(r)]


def differences(tiny: Tiny, before: list[Any] | None = None) -> list[str]:
    log = [*(before or []), *tiny.records]
    return replay([rec.decode(rec.encode(r)) for r in log], tiny.config).differences


def bits(decision: Any) -> bytes:
    """A decision as it stands in a log, but for its place there and the run's name."""
    place = ("seq", "t", "inc", "recommendation")
    return msgspec.json.encode({k: v for k, v in msgspec.structs.asdict(decision).items() if k not in place})


def decided_again(log: list[Any], config: Config) -> tuple[list[bytes], dict[str, Any]]:
    """What the log alone decides, and the state of early stop at its end; `config` is that of the first start."""
    again, found = Replay({name: getattr(config, name) for name in RULES}), []
    for record in (rec.decode(rec.encode(r)) for r in log):
        if of_controller(record):
            found += [bits(due) for due in again._due[:1]]
        again.take(record)
    return found, again._early_stop.state_dict()


def come_back(tiny: Tiny, at: int | None = None) -> list[Any]:
    """Put a checkpoint back, as a worker does; the records of it."""
    found: list[Loaded] = []
    proof = tiny.resume(at, found.append)
    return [rewind_to(found[0], "resumed"), proof]


def upgraded(tiny: Tiny, until: int) -> Tiny:
    """Its checkpoints up to step `until` are of a version that knew nothing of early stop."""
    load = tiny.manager.load

    def earlier(path: Path) -> Loaded:
        loaded = load(path)
        if loaded.step <= until:
            del loaded.config["early_stopping_gain"], loaded.global_state["adaptive"]["early_stop"]
        return loaded

    tiny.manager.load = earlier  # type: ignore[method-assign]
    return tiny


def failed_after(tiny: Tiny, at: int) -> list[Any]:
    """Train to an error in the step after `at`, upon which that boundary is saved; the records."""

    def fail(step: int, section: str) -> None:
        if (step, section) == (at + 1, "forward"):
            raise RuntimeError("lost")

    tiny.channel.at = fail
    with pytest.raises(RuntimeError, match="lost"):
        tiny.train()
    assert tiny.trainer.back_to_boundary() and tiny.manager.emergency(payload(tiny.trainer)).name == step_name(at)
    tiny.manager.close()
    return tiny.records


def test_c100_act_ends_the_run_and_advise_tells_it(tmp_path: Path) -> None:
    found, ends = {}, {}
    for mode in ("off", "advise", "act"):
        found[mode] = planted(tmp_path, mode, adaptive=mode)
        ends[mode] = found[mode].train()
    assert [ends[mode]["step"] for mode in found] == [44, 44, END]
    assert {(end["state"], end["exit_code"]) for end in ends.values()} == {("finished", 0)}
    (change,), (alert,) = decisions(found["act"]), decisions(found["advise"])
    assert (change.what, change.step, change.before, change.after) == (EARLY_STOP, END, 44, END)
    assert (alert.code, alert.step, alert.severity) == (EARLY_STOP, END, "info") and decisions(found["off"]) == []
    assert alert.recommendation == f"end it: lumina-engine runs stop {found['advise'].config.experiment_name}"
    assert alert.message == f"step {END}: {change.reason}" and ends["act"]["reason"] == change.reason
    assert found["act"].losses == {step: row for step, row in found["advise"].losses.items() if step <= END}
    assert found["advise"].losses == found["off"].losses and max(dict(found["act"].manager.committed())) == END
    assert all(differences(tiny) == [] for tiny in found.values())


def test_c100_no_end_without_the_key_without_actions_nor_in_the_flat_part_of_wsd(tmp_path: Path) -> None:
    for number, keys in enumerate([{"early_stopping_gain": 0.0}, {"max_adaptive_actions": 0}, {"lr_schedule": "wsd"}]):
        tiny = planted(tmp_path, str(number), **keys)
        assert tiny.train()["step"] == 44 and decisions(tiny) == [] and differences(tiny) == []


def test_c100_the_step_of_the_end_is_saved_where_no_interval_saves_it(tmp_path: Path) -> None:
    tiny = planted(tmp_path, save_interval=0)
    assert tiny.train()["step"] == END and [step for step, _ in tiny.manager.committed()] == [END]


@pytest.mark.parametrize(
    ("mode", "at"),
    [
        ("act", 28),
        ("advise", 32),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("act", 8), ("act", 32), ("advise", 8), ("advise", 28))),
    ],
)
def test_c100_resumed_anywhere_it_equals_the_unbroken_run(tmp_path: Path, at: int, mode: str) -> None:
    """The checkpoint of step 32 was taken before the evaluation that ends the run, which comes again."""
    whole = planted(tmp_path, adaptive=mode)
    whole.train()
    resumed = planted(tmp_path, adaptive=mode)
    resumed.resume(at)
    resumed.train()
    assert resumed.state() == whole.state() and [r.step for r in decisions(resumed)] == [END]
    assert [getattr(r, "evidence", r.step) for r in decisions(resumed)] == [
        getattr(r, "evidence", r.step) for r in decisions(whole)
    ]
    log = [r for r in whole.records if not (isinstance(r, rec.Run) and r.state == "finished")]
    assert differences(resumed, [*log, rec.Rewind(to_step=at)]) == []


def test_c100_a_run_that_ended_goes_on_without_the_key(tmp_path: Path) -> None:
    """The checkpoint was taken after its evaluation: with the key, the next one ends the run once more."""
    ended = planted(tmp_path, save_interval=0)
    ended.train()
    resumed = planted(tmp_path, save_interval=0, early_stopping_gain=0.0)
    back, proof = come_back(resumed, END)
    assert proof.changed["early_stopping_gain"] == (0.02, 0.0) and resumed.train()["step"] == 44
    assert differences(resumed, [*ended.records, back, proof]) == []
    again = planted(tmp_path, save_interval=0)
    start = come_back(again, END)
    assert again.train()["step"] == END + 2
    log = [*ended.records, *start, *again.records]
    found = replay([rec.decode(rec.encode(r)) for r in log], again.config)
    assert found.differences == [] and found.spent == len(again.trainer.adaptive.state_dict()["actions"]) == 2
    assert [r.evidence["window"] for r in found.decisions] == [END // 2, END // 2 + 1]


@pytest.mark.parametrize(
    ("mode", "at"),
    [
        ("act", 30),
        ("act", 31),
        ("advise", END),  # under act the run has ended there
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("act", 28), ("advise", 28), ("advise", 30), ("advise", 31))
        ),
    ],
)
def test_c100_the_evaluation_that_an_emergency_save_carries_counts(tmp_path: Path, at: int, mode: str) -> None:
    """It is not made again, and what came of it stands: advice is told once, and the end rests on all evaluations."""
    whole = planted(tmp_path, "whole", adaptive=mode, save_interval=0)
    whole.train()
    log = failed_after(planted(tmp_path, adaptive=mode, save_interval=0), at)
    resumed = planted(tmp_path, adaptive=mode, save_interval=0)
    start = come_back(resumed)
    assert (start[0].to_step, start[0].evaluated) == (at, at % 2 == 0)
    resumed.train()
    assert resumed.state() == whole.state()
    log = [*log, *start, *resumed.records]
    own = [bits(r) for r in log if of_controller(r)]
    assert own == [bits(r) for r in decisions(whole)] and len(own) == 1
    assert decided_again(log, whole.config) == (own, resumed.trainer.adaptive.state_dict()["early_stop"])
    assert replay([rec.decode(rec.encode(r)) for r in log], whole.config).differences == []


def test_c100_a_rollback_to_a_step_saved_after_its_evaluation_keeps_that(tmp_path: Path) -> None:
    """The run ended at step 32 and was saved there; it goes on, is rolled back to it, and ends with less left."""
    ended = planted(tmp_path, save_interval=0)
    ended.train()
    keys = {"spike_policy": "rollback", "spike_sigma": 20.0, "max_nonfinite_in_row": 2, "early_stopping_gain": 0.008}
    resumed = planted(tmp_path, save_interval=0, **keys)
    start = come_back(resumed)

    def broken(step: int) -> float:
        return math.nan if step in (35, 36) and not rewinds(resumed) else 1.0

    assert lifted(resumed, broken).train()["step"] == 38 and rewinds(resumed) == [(END, 36)]
    (back,) = (r for r in resumed.records if isinstance(r, rec.Rewind))
    state = resumed.trainer.adaptive.state_dict()
    assert back.evaluated and [item[0] for item in state["early_stop"]["evals"]] == list(range(2, 39, 2))
    log = [*ended.records, *start, *resumed.records]
    own = [bits(r) for r in log if of_controller(r)]
    assert len(own) == 2 and decided_again(log, ended.config) == (own, state["early_stop"])
    found = replay([rec.decode(rec.encode(r)) for r in log], resumed.config)
    assert found.differences == [] and found.spent == resumed.trainer.adaptive.spent == 2


@pytest.mark.parametrize(
    ("what", "end"), [pytest.param("at once", 42, marks=pytest.mark.slow), ("set later", 42), ("rolled back", 40)]
)
def test_c100_a_run_of_a_version_without_the_key_counts_what_is_evaluated_behind_its_resume(
    tmp_path: Path, what: str, end: int
) -> None:
    """12 evaluations over a factor of 4 in tokens are there at step 24, from step 10 on at step 42; the rows that follow those
    which a rollback leaves out have more tokens."""
    keys: dict[str, Any] = {"spike_policy": "rollback", "spike_sigma": 20.0, "max_nonfinite_in_row": 2}
    first = planted(tmp_path, early_stopping_gain=0.0, **keys)
    first.train()
    resumed = upgraded(planted(tmp_path, early_stopping_gain=0.0 if what == "set later" else 100.0, **keys), 8)
    start = come_back(resumed, 8)
    assert not start[0].early_stop
    assert start[1].changed == ({} if what == "set later" else {"early_stopping_gain": (0.0, 100.0)})
    log = [*first.records, *start]
    if what == "set later":
        resumed.train()
        log += resumed.records
        resumed = upgraded(planted(tmp_path, early_stopping_gain=100.0, **keys), 8)
        log += come_back(resumed, 16)

    def broken(step: int) -> float:
        return math.nan if what == "rolled back" and step in (13, 14) and not rewinds(resumed) else 1.0

    assert lifted(resumed, broken).train()["step"] == end
    assert rewinds(resumed) == ([(8, 14)] if what == "rolled back" else [])
    log += resumed.records
    own = [bits(r) for r in log if of_controller(r)]
    state = resumed.trainer.adaptive.state_dict()["early_stop"]
    assert len(own) == 1 and [item[0] for item in state["evals"]] == list(range(10, end + 1, 2))
    assert decided_again(log, first.config) == (own, state)
    assert replay([rec.decode(rec.encode(r)) for r in log], resumed.config).differences == []


@pytest.mark.parametrize(
    ("changed", "end"),
    [({"learning_rate": 1e-4}, 42), pytest.param({"eval_batches": 3}, 42, marks=pytest.mark.slow), ({}, 24)],
)
def test_c100_a_resume_on_another_course_counts_only_what_is_evaluated_on_it(
    tmp_path: Path, changed: dict[str, Any], end: int
) -> None:
    """12 evaluations over a factor of 4 in tokens are there at step 24, from step 10 on at step 42."""
    first = planted(tmp_path, lr_schedule="linear", early_stopping_gain=0.0)
    first.train()
    resumed = planted(tmp_path, lr_schedule="linear", early_stopping_gain=100.0, **changed)
    proof = resumed.resume(8)
    assert resumed.train()["step"] == end
    head = [r for r in first.records if not isinstance(r, rec.Run) or r.state == "running"]
    assert differences(resumed, [*head, rec.Rewind(to_step=8), proof]) == []


def test_c100_a_rollback_takes_out_the_evaluations_of_the_branch_that_it_leaves(tmp_path: Path) -> None:
    """There the loss stands still from step 20 on."""
    keys = {"spike_policy": "rollback", "spike_sigma": 20.0, "max_nonfinite_in_row": 2}

    def loss(step: int) -> float:
        return curve(step if rewinds(tiny) else min(step, 20))

    def broken(step: int) -> float:
        return math.nan if step in (26, 27) and not rewinds(tiny) else 1.0

    tiny = planted(tmp_path, loss=loss, **keys)
    assert lifted(tiny, broken).train()["step"] == END and rewinds(tiny) == [(20, 27)]
    assert [r.step for r in tiny.records if isinstance(r, rec.Eval)] == [*range(2, 28, 2), *range(20, END + 1, 2)]
    evals = tiny.trainer.adaptive.state_dict()["early_stop"]["evals"]
    assert [(step, value) for step, _, value in evals] == [(step, curve(step)) for step in range(2, END + 1, 2)]
    assert [r.step for r in decisions(tiny)] == [END] and differences(tiny) == []


def test_c100_rank_0_decides_for_all(tmp_path: Path) -> None:
    """The second rank's own figures say that the loss rises."""
    done = launch(PROGRAM, 2, str(write_data(tmp_path)), str(tmp_path), XDG_STATE_HOME=str(tmp_path / "state"))
    found = last_line(done, "EARLY ")
    assert found["step"] == [14, 14] and found["state"] == ["finished", "finished"]
    assert found["actions"] == [1, 1] and found["saved"] == [14]
