"""Going back by itself: to an earlier checkpoint, past the batches in which training went wrong.

PaLM's practice (Chowdhery et al., arXiv:2204.02311, section 5.1) is the model: restart about 100 steps before the trouble and
leave out the batches around it. Spikes come from data and state of the model together, so a few hundred are enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import CheckpointError
from ..data.skip_list import SkipList
from ..monitoring import record as rec
from ..run.policy import NO_PROGRESS
from ..run.sections import ROLLBACK
from .adaptive import rewind_to
from .progress import Stop, Trouble

if TYPE_CHECKING:
    from ..checkpoint.manager import Loaded
    from .trainer import EnhancedConversationTrainer

FAR_BACK = 100  # steps before the first bad one
LIMIT_WINDOW = 1000  # steps in which there may be `max_rollbacks`


@dataclass
class Recovery:
    """What was left out, and the last bad step of each rollback. Part of the saved state."""

    skip: SkipList = field(default_factory=SkipList)
    failures: list[int] = field(default_factory=list)

    def after(self, rollbacks: Iterable[rec.Rewind]) -> Recovery:
        """The same with rollbacks that only the log knows."""
        known = Recovery(self.skip, list(self.failures))
        for item in rollbacks:
            known.skip |= SkipList.of(item.skip or [])
            known.failures.append(item.failed_step or 0)
        return known

    def exhausted(self, step: int, limit: int) -> bool:
        """Whether one more rollback at `step` would be more than `limit` within `LIMIT_WINDOW` steps."""
        return sum(step - LIMIT_WINDOW < failed <= step + LIMIT_WINDOW for failed in self.failures) >= limit

    def state_dict(self) -> dict[str, Any]:
        return {"skip": [list(part) for part in self.skip.ranges], "failures": list(self.failures)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Recovery:
        return cls(SkipList.of(state["skip"]), [int(step) for step in state["failures"]])


def targets(checkpoints: Iterable[tuple[int, bool]], trouble: Trouble, interval: int) -> list[int]:
    """Steps to go back to, best first.

    Args:
        checkpoints: (step, suspect) of each committed one.
        interval: steps between saves.

    The newest one at least `FAR_BACK` steps before the last bad step; else the newest at least one save interval before it;
    else the newest from before the trouble. A suspect one, or one from within the trouble, never.
    """
    good = sorted((step for step, suspect in checkpoints if not suspect and step < trouble.first), reverse=True)
    return sorted(good, key=lambda step: (step > trouble.last - FAR_BACK, step > trouble.last - interval))


def roll_back(trainer: EnhancedConversationTrainer, trouble: Trouble) -> bool:
    """Put a trainer at a step boundary back to the best of `targets`, with the rows from there to here on its skip list.

    All ranks call it at the same boundary. False: there is nothing to go back to, and the trouble is not fatal.

    Raises:
        Stop: too many rollbacks, or nothing to go back to: the run ends with exit code 93.
    """
    trainer.section(ROLLBACK, trainer.progress.step)
    trainer.saves.settle(wait=True)
    config = trainer.config
    if trainer.recovery.exhausted(trouble.last, config.max_rollbacks):
        limit = f"and {config.max_rollbacks} rollbacks in {LIMIT_WINDOW:,} steps did not help (max_rollbacks)"
        raise _hopeless(trouble, limit)
    loaded = _load_best(trainer, trouble)
    if loaded is None:
        return False
    loader, progress = trainer._loader(), loaded.global_state["progress"]
    begin, end = progress["epoch"] * loader.rows_per_epoch + progress["index"], loader.row_number
    # from here on an error saves nothing: the state at hand is given up, and until it is all replaced it is of two steps
    trainer.at_boundary, trainer.step_rng = False, None
    trainer.manager.rewind(loaded.step)  # before its record: killed in between, the run meets the trouble and decides again
    reason = f"{trouble.reason}: back to {loaded.path.name}, {end - begin:,} rows left out"
    went_back = rewind_to(loaded, reason, failed_step=trouble.last, skip=[(begin, end)])
    trainer.emit(went_back)
    trainer.sync_log()
    from .state import restore

    # of these the checkpoint does not know
    recovery, adaptive = trainer.recovery.after([went_back]), trainer.adaptive.state_dict()
    restore(trainer, loaded)
    trainer.switch = None  # decided by steps that are left out
    trainer.recovery = recovery
    trainer.adaptive.rolled_back(went_back, adaptive)
    dropped = trainer.boundary.forget_rates(after=loaded.step)
    trainer.at_boundary = True
    _tell(trainer, trouble, loaded, recovery, dropped)
    return True


def _load_best(trainer: EnhancedConversationTrainer, trouble: Trouble) -> Loaded | None:
    """The first of `targets` whose digests are right. Those that are not are told, and stay where they are."""
    mine = trainer.manager.committed() if trainer.manager is not None and trainer.comm.rank == 0 else []
    found = trainer.comm.broadcast(mine)
    for step in targets([(int(step), bool(suspect)) for step, suspect in found], trouble, max(1, trainer.config.save_interval)):
        try:
            return trainer.manager.load(trainer.manager.path_of(step))
        except CheckpointError as error:
            message = f"the checkpoint of step {step} cannot be gone back to: {error}"
            trainer.emit(rec.Alert(severity="critical", code="checkpoint_damaged", message=message, step=trouble.last))
    if trouble.fatal:
        raise _hopeless(trouble, "and there is no checkpoint from before it to go back to")
    message = f"{trouble.reason}: there is no checkpoint from before it to go back to, so the step was skipped"
    trainer.emit(rec.Alert(severity="warning", code="no_rollback", message=message, step=trouble.last))
    return None


def _hopeless(trouble: Trouble, why: str) -> Stop:
    return Stop("failed", NO_PROGRESS, f"{trouble.reason}, {why}: lower learning_rate", save=False)


def _tell(
    trainer: EnhancedConversationTrainer, trouble: Trouble, loaded: Loaded, recovery: Recovery, dropped: dict[int, float]
) -> None:
    number, step = len(recovery.failures), loaded.step
    message = f"{trouble.reason}: gone back to step {step}, rollback {number}; {len(recovery.skip):,} rows are left out in all"
    advice = "if it comes back: lower learning_rate, or look at the data of the rows that were left out"
    trainer.emit(rec.Alert(severity="critical", code="rollback", message=message, recommendation=advice, step=trouble.last))
    if dropped:
        rates = ", ".join(f"{rate:.6g} at step {at}" for at, rate in sorted(dropped.items()))
        message = f"the learning rate is that of step {step} again; what was set since is not in force any more: {rates}"
        advice = "set it again with set_lr if it was not the cause"
        trainer.emit(rec.Alert(severity="warning", code="rate_dropped", message=message, recommendation=advice, step=step))
