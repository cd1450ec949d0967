"""The injector injects: each fault strikes where the plan says, in the real worker under the real supervisor."""

from __future__ import annotations

import signal

import pytest

from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.launch import wait

from .conftest import TinyRuns
from .injector import Fault, fired
from .tiny_run import ends, steps


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(Fault("raise", 5, "forward"), "InjectedError", id="raise"),
        pytest.param(Fault("exit", 5, "step", value=7), "7", marks=pytest.mark.slow, id="exit"),
        pytest.param(Fault("segfault", 5, "backward"), "SIGSEGV", marks=pytest.mark.slow, id="segfault"),
    ],
)
def test_a_fault_strikes_once_and_the_restart_finishes(tiny_runs: TinyRuns, fault: Fault, words: str) -> None:
    run = tiny_runs.running(faults=[fault], max_steps=8)
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    (struck,) = fired(run.path)
    assert (struck["how"], struck["step"], struck["section"], struck["inc"]) == (fault.how, 5, fault.section, 1)
    reasons = " ".join(
        r.reason or "" for r in read_records(run.metrics_path) if isinstance(r, rec.Run) and r.state == "crashed"
    )
    assert words in reasons
    assert sorted(steps(run)) == list(range(1, 9)) and ends(run)[-1] == (2, "finished", 0)


def test_poison_is_seen_by_the_guard_and_costs_its_step(tiny_runs: TinyRuns) -> None:
    faults = [Fault("nan_loss", 3, "forward"), Fault("nan_gradient", 5, "forward", only="ffn.w13")]
    run = tiny_runs.running(faults=faults, max_steps=8)
    assert wait(run, 120) == 0, run.log_path.read_text()[-2000:]
    assert [step for step, record in sorted(steps(run).items()) if record.skipped] == [3, 5]
    assert {end[0] for end in ends(run)} == {1}, "no restart"


@pytest.mark.slow
def test_a_signal_goes_to_the_rank_itself(tiny_runs: TinyRuns) -> None:
    run = tiny_runs.running(faults=[Fault("signal", 6, "backward", value=signal.SIGTERM)], max_steps=40)
    assert wait(run, 120) == 75, run.log_path.read_text()[-2000:]
    assert max(steps(run)) == 6
