"""A preemption takes a checkpoint only if one fits into the grace; all ranks decide as rank 0 does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina_engine.checkpoint.keep import list_steps
from lumina_engine.run.rank import Command
from lumina_engine.training.boundary import Boundary
from lumina_engine.training.control import Request
from lumina_engine.training.progress import Stop
from lumina_engine.training.saves import Saves
from tests.faults.tiny import Tiny


def preempted(seconds: float, args: dict[str, Any], rank_0: bool | None = None) -> Stop:
    """How a rank leaves whose last save took `seconds`; `rank_0` is what rank 0 thinks, if it is another one."""
    saves = Saves(None, lambda record: None, lambda: None)
    saves.seconds = seconds
    comm = SimpleNamespace(broadcast=lambda mine: mine if rank_0 is None else rank_0)
    config = SimpleNamespace(preempt_grace_s=30.0)
    boundary = Boundary(SimpleNamespace(saves=saves, comm=comm, config=config, progress=SimpleNamespace(step=7)))  # type: ignore[arg-type]
    boundary.pending.append(Request("preempt", args))
    with pytest.raises(Stop) as caught:
        boundary.obey_all()
    assert (caught.value.state, caught.value.exit_code) == ("preempted", 75)
    return caught.value


@pytest.mark.parametrize(("seconds", "save"), [(0.0, True), (19.9, True), (20.0, False), (100.0, False)])
def test_ft01_a_checkpoint_that_does_not_fit_the_grace_is_not_begun(seconds: float, save: bool) -> None:
    for args in ({"grace": 30.0}, {}):  # the supervisor's word, or a signal to the rank itself
        stop = preempted(seconds, args)
        assert stop.save is save
        assert ("the newest counts" in stop.reason) is not save


def test_ft03_the_other_ranks_do_as_rank_0_says() -> None:
    assert preempted(0.0, {}, rank_0=False).save is False
    assert preempted(100.0, {}, rank_0=True).save is True


@pytest.mark.parametrize(("cmd", "code", "copied"), [("preempt", 75, []), ("stop", 0, ["step-000003"])])
def test_ft01_the_save_of_a_preemption_starts_no_backup(tmp_path: Path, cmd: str, code: int, copied: list[str]) -> None:
    """The rank is about to leave, and a copy to a slow disk would be left half-done; the one of a stop is waited for."""
    tiny = Tiny(tmp_path, backup_every_n_hours=1e-9)
    tiny.channel.commands[3] = [Command("id", cmd, {})]
    assert tiny.train()["exit_code"] == code
    assert list_steps(tiny.manager.checkpoints) == ["step-000003"]
    assert list_steps(tiny.manager.backups) == copied
