"""What `lumina-engine bench adaptive` measures, and real runs at ten times their rate with the controller on and off (C98)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lumina_engine.cli import main
from lumina_engine.monitoring import record as rec
from lumina_engine.training.adaptive_benchmark import FAULTS, NEAR, Run, hottest, lost, one, table

RATE = ("rate x 10", "one bad batch", "broken weights")


@pytest.fixture
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_c098_steps_lost_end_when_the_loss_is_back() -> None:
    losses = [2.0] * 50 + [4.0] * 30 + [1.9] * 60
    found = lost(losses, 50, 2.0)
    assert found is not None and abs(found - (30 - NEAR // 2)) <= 1
    assert lost(losses[:90], 50, 2.0) is None and lost([2.0] * 200, 50, 2.0) == 0


def test_c098_the_table_counts_arms_apart() -> None:
    runs = [Run("f", seed, mode, 2.0 + seed, 1.0, lost=seed or None) for seed in range(3) for mode in ("off", "act")]
    runs += [Run("healthy", seed, "act", 1.0, actions=["cut"] * (seed == 0)) for seed in range(4)]
    off, act, healthy = table(runs)
    assert (off["adaptive"], act["adaptive"]) == ("off", "act") and off["runs"] == 3 and off["recovered"] == 2
    assert (healthy["runs"], healthy["without_action"]) == (4, 3) and "recovered" not in healthy


def test_c098_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "adaptive", "--policies", "skp"]) == 2 and "skip" in capsys.readouterr().err
    assert main(["bench", "adaptive", "--seeds", "0", "--healthy", "0"]) == 2 and "--seeds" in capsys.readouterr().err


def test_c098_each_fault_comes_into_its_run_and_is_judged(tmp_path: Path, one_thread: object) -> None:
    """Those that the rate cannot mend: what is recorded is the fault, and the log gives the decisions again."""
    found = {fault: one(tmp_path, fault, 0, "act", {"max_steps": 140}) for fault in FAULTS if fault not in RATE}
    assert all(run.agrees for run in found.values())
    assert found["bad data"].loss > 2 * (found["bad data"].before or 0) and not found["bad data"].recovered
    assert found["not finite"].actions == found["frozen layer"].actions == found["data come again"].actions == []
    assert 2 * found["data come again"].loss < found["frozen layer"].loss
    routed = found["router collapse"]
    assert "rebalance" in routed.actions and (routed.hottest or 0) > 1 and found["bad data"].hottest is None


def test_c098_the_hottest_expert_is_that_of_the_worst_layer() -> None:
    assert hottest([]) is None
    assert hottest([rec.Experts(step=n, load=[[1.0, 1.0], [1.0, 3.0]]) for n in range(9)]) == 1.5


def test_c098_ten_times_the_rate_is_cut_and_recovers_and_without_does_not(tmp_path: Path, one_thread: object) -> None:
    off, act = (one(tmp_path, "rate x 10", 0, mode, {"spike_policy": "skip"}) for mode in ("off", "act"))
    assert off.actions == [] and not off.recovered
    assert "cut" in act.actions and act.recovered and act.loss < off.loss and act.agrees


def test_ft05_a_bad_batch_is_left_out_by_a_rollback_and_comes_no_more(tmp_path: Path, one_thread: object) -> None:
    run = one(tmp_path, "one bad batch", 0, "act", {"spike_policy": "rollback", "save_interval": 20, "max_steps": 140})
    assert run.state == "finished" and run.recovered and run.actions == []
