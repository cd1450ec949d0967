"""Supervised runs that change the number of their experts by themselves (C99, `expert_growth=act`), undisturbed and killed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lumina_engine import cli
from lumina_engine.checkpoint.keep import list_steps, pointer
from lumina_engine.checkpoint.manager import load_model
from lumina_engine.checkpoint.verify import step_name
from lumina_engine.config.schema import Config
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records
from lumina_engine.run.directory import RunDirectory
from lumina_engine.run.launch import wait

from .conftest import TinyRuns
from .growing_worker import DEAD, GROWS, KILLS, KNOWN_IN, SHRINKS
from .injector import Fault
from .tiny_run import ends, start, steps

WORKER = Path(__file__).with_name("growing_worker.py")
KEYS: dict[str, Any] = {
    "num_layers": 2,
    "moe_top_k": 1,
    "capacity_factor": 1.25,
    "router_bias_rate": 0.001,
    "adaptive": "act",
    "expert_growth": "act",
    "max_num_experts": 5,
    "save_interval": 4,
    "eval_interval": 4,
    "expert_log_interval": 2,
    "num_epochs": 50,
    "max_steps": 30,
}


def grown(
    runs: TinyRuns,
    name: str = "r",
    faults: Sequence[Fault] = (),
    world: int = 1,
    kills: Mapping[int, int] | None = None,
    **keys: Any,
) -> RunDirectory:
    """A run that has ended, with no restart that counts as a failure but those of faults and `kills` (see `KILLS`)."""
    dead = keys.pop("dead", False)
    run = runs.make(name, faults, world, **KEYS | keys)
    if kills is not None:
        (run.path / KILLS).write_text(json.dumps(kills))
    if dead:
        (run.path / DEAD).touch()
    most = len(faults) + len(kills or {})
    start(run, world=world, worker=WORKER, restart_pause_s=0.01, max_restarts=most)
    assert wait(run, 280) == 0, run.log_path.read_text()[-3000:]
    return run


def of(run: RunDirectory, kind: type, **values: Any) -> list[Any]:
    """The records of a kind that have these values."""
    found = [r for r in read_records(run.metrics_path) if isinstance(r, kind)]
    return [r for r in found if all(getattr(r, name) == value for name, value in values.items())]


def decided_again(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """The decisions of a run, which its log alone must give again."""
    for name, value in (SHRINKS if (run.path / DEAD).exists() else GROWS).items():
        for module in KNOWN_IN:
            monkeypatch.setattr(module, name, value)
    capsys.readouterr()
    assert cli.main(["runs", "decisions", str(run.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["agrees"] is True and shown["differences"] == []
    return list(shown["decisions"])


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_c099_a_run_grows_by_itself_and_finishes(
    tiny_runs: TinyRuns, world: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two ranks under DeepSpeed at stage 1."""
    deep = {"use_deepspeed": True, "zero_stage": 1} if world > 1 else {}
    run = grown(tiny_runs, world=world, **deep)
    [change] = of(run, rec.Change, what="num_experts", by="adaptive")
    at = change.step
    assert (change.before, change.after, at % 4) == (4, 5, 0) and set(change.evidence["layers"]) == {"0", "1"}
    assert [state for _, state, _ in ends(run)].count("crashed") == 0 and ends(run)[-1] == (2, "finished", 0)
    saved = next(r for r in of(run, rec.Checkpoint, step=at) if r.verified)
    assert saved.seq > change.seq and not of(run, rec.Alert, code="expert_growth_failed")
    [effect] = of(run, rec.Change, what="num_experts", by="recovery")
    [rewind] = of(run, rec.Rewind)
    [proof] = of(run, rec.Resume)
    assert (effect.before, effect.after, rewind.to_step, proof.step) == (4, 5, at, at) and proof.changed == {}
    assert sorted(steps(run)) == list(range(1, 31))
    assert {len(r.load[0]) for r in of(run, rec.Experts) if r.step > at} == {5}
    evals = {r.step: r.loss for r in of(run, rec.Eval)}
    assert set(evals) == set(range(4, 29, 4)) | {30}, "that of the step was made after the restart"
    best = step_name(min(evals, key=evals.__getitem__))
    assert pointer(run.checkpoints, "best") == best
    assert set(list_steps(run.checkpoints)) == {
        *map(step_name, sorted(evals)[-Config.load(run.config_path).keep_checkpoints :]),
        best,
    }
    config = Config.load(run.config_path)
    assert (config.num_experts, config.capacity_factor) == (5, 1.25 * 5 / 4)
    model, _, facts = load_model(f"{run.name}@latest")
    assert model.config.num_experts == 5 and facts["step"] == 30
    assert list(run.emergency.iterdir()) == [] and not list(run.checkpoints.glob("*.rewound-*"))
    decisions = decided_again(run, monkeypatch, capsys)
    assert [item["what"] for item in decisions if "grow" in item["what"] or "experts" in item["what"]] == [
        "num_experts",
        "expert_growth_outcome",
    ]
    assert cli.main(["runs", "decisions", str(run.path)]) == 0
    assert f"step {at}  add_expert: num_experts 4 to 5: an expert of layer" in capsys.readouterr().out
    assert cli.main(["report", str(run.path), "--moe", "--rows", "8"]) == 0
    assert cli.main(["runs", "plot", str(run.path), "--metrics", "loss,imbalance"]) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)  # nine starts
def test_c099_killed_anywhere_it_grows_to_the_same(
    tiny_runs: TinyRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the checkpoint of a growth is there, while that is rewritten, and in the second growth while it is replaced."""
    keys = {"max_num_experts": 6, "max_steps": 40}
    whole = grown(tiny_runs, "whole", **keys)
    changes = of(whole, rec.Change, what="num_experts", by="adaptive")
    assert [(c.before, c.after) for c in changes] == [(4, 5), (5, 6)]
    at = changes[0].step
    run = grown(tiny_runs, faults=[Fault("kill", at, "save", inc=1)], kills={3: 30, 5: 75}, **keys)
    assert [state for _, state, _ in ends(run)].count("crashed") == 3 and ends(run)[-1] == (6, "finished", 0)
    made = of(run, rec.Change, what="num_experts", by="adaptive")
    assert [(c.before, c.after, c.step) for c in made] == [(4, 5, at), (4, 5, at), (5, 6, changes[1].step)]
    assert {3, 4, 5} <= {r.inc for r in of(run, rec.Alert, code="expert_growth")}, "each was killed in a try"
    want, got = steps(whole), steps(run)
    assert sorted(got) == list(range(1, 41))
    assert all((got[n].loss, got[n].grad_norm, got[n].lr) == (want[n].loss, want[n].grad_norm, want[n].lr) for n in want)
    assert load_model(f"{run.name}@latest")[0].config.num_experts == 6
    decided_again(run, monkeypatch, capsys)


@pytest.mark.slow
def test_c099_a_run_takes_an_expert_out_that_serves_nobody(
    tiny_runs: TinyRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = grown(tiny_runs, dead=True, moe_top_k=2, save_interval=10, max_steps=34)
    [change] = of(run, rec.Change, what="num_experts", by="adaptive")
    assert (change.step, change.before, change.after, change.evidence["rule"]) == (20, 4, 3, "dead_expert")
    assert change.evidence["layers"] == {"0": 3, "1": 3} and ends(run)[-1] == (2, "finished", 0)
    assert not of(run, rec.Alert, code="expert_growth_failed")
    assert {len(r.load[0]) for r in of(run, rec.Experts) if r.step > 20} == {3}
    config = Config.load(run.config_path)
    assert (config.num_experts, config.capacity_factor) == (3, 1.25)
    assert load_model(f"{run.name}@latest")[0].config.num_experts == 3
    outcome = decided_again(run, monkeypatch, capsys)[-1]
    assert outcome["what"] == "expert_growth_outcome" and outcome["reason"].startswith("recovered: the coldest expert of layer")


@pytest.mark.slow
def test_c099_a_growth_changes_no_loss_of_its_step_and_advice_changes_nothing(tiny_runs: TinyRuns) -> None:
    """The evaluation of the step that a run grows at is made after the restart: by the model with another expert."""
    run = grown(tiny_runs, "act", max_steps=16)
    advised = grown(tiny_runs, "advise", adaptive="advise", max_steps=16)
    assert ends(advised)[-1] == (1, "finished", 0) and not of(advised, rec.Change, what="num_experts")
    [alert] = of(advised, rec.Alert, code="add_expert")
    assert "lumina-engine checkpoint grow" in alert.recommendation
    [change] = of(run, rec.Change, what="num_experts", by="adaptive")
    [mine], [other] = (of(each, rec.Eval, step=change.step) for each in (run, advised))
    assert (mine.inc, other.inc) == (2, 1) and mine.loss == pytest.approx(other.loss, abs=1e-6)
