"""What a step leaves behind: its record, the notes and alerts that go with it, and the counts of the run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from ..data.batch import Batch
from ..monitoring import record as rec
from .engine import StepResult
from .guard import StepGuard
from .objective import GlobalBatch
from .progress import Progress, Trouble
from .setup import Emit
from .step_clock import Utilisation


@dataclass(frozen=True)
class StepFigures:
    """The numbers of one step. Times are seconds; `rows` and `samples` are this rank's, `totals` those of the global batch.

    `samples` counts whole rows of the data, of which a curriculum makes several shorter `rows`. `scale` is the loss scale that
    the step had. `repeats` is the step of this epoch whose tokens this rank had once more.
    """

    step: int
    lr: float
    loss: float
    balance: float | None
    z: float | None
    totals: GlobalBatch
    rows: int
    samples: int
    length: int
    result: StepResult
    scale: float | None
    seconds: float
    data_time: float
    times: dict[str, float | None]
    repeats: int | None

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are."""
        return math.isfinite(self.loss) and math.isfinite(self.result.grad_norm)


def figures(
    step: int,
    lr: float,
    losses: tuple[float, float | None, float | None],
    batches: list[Batch],
    totals: GlobalBatch,
    result: StepResult,
    scale: float | None,
    begin: float,
    data_time: float,
    times: dict[str, float | None],
    repeats: int | None,
) -> StepFigures:
    """The figures of a step that began at `begin` (`time.perf_counter`) and ends now."""
    rows, length = sum(b.input_ids_BS.shape[0] for b in batches), batches[0].input_ids_BS.shape[1]
    samples, seconds = sum(len(b.rows) for b in batches), time.perf_counter() - begin
    return StepFigures(step, lr, *losses, totals, rows, samples, length, result, scale, seconds, data_time, times, repeats)


def count(progress: Progress, done: StepFigures, world: int) -> None:
    """Add a step to the counts of the run."""
    progress.step = done.step
    progress.tokens += done.totals.tokens
    progress.samples += done.samples * world
    progress.wall_seconds += done.seconds
    progress.skipped += 0 if done.result.applied else 1
    if not done.result.overflow:  # a loss scale that is still sinking is no sign of broken values
        progress.nonfinite_in_row = 0 if done.finite else progress.nonfinite_in_row + 1


def step_record(done: StepFigures, progress: Progress, utilisation: Utilisation, world: int, frozen: list[str]) -> rec.Step:
    """The record of a step that has been counted; `frozen` are the parts of the model that stood still."""
    tokens_per_s = done.totals.tokens / done.seconds
    return rec.Step(
        step=done.step,
        epoch=progress.epoch,
        tokens=progress.tokens,
        loss=done.loss,
        aux_loss=done.balance,
        z_loss=done.z,
        lr=done.lr,
        grad_norm=done.result.grad_norm,
        step_time=done.seconds,
        tokens_per_s=tokens_per_s,
        mfu=utilisation.of(tokens_per_s, done.length),
        seq_length=done.length,
        batch=done.rows * world,
        skipped=not done.result.applied,
        data_time=done.data_time,
        forward_time=done.times["forward"],
        backward_time=done.times["backward"],
        optimizer_time=done.times["optimizer"],
        repeats=done.repeats,
        frozen=frozen,
    )


def note_scale(emit: Emit, done: StepFigures) -> None:
    """Record a change of the loss scale; the next step has the new one."""
    before, after = done.scale, done.result.scale
    if before is not None and after is not None and before != after:
        reason = "a gradient overflowed" if after < before else "no overflow for long"
        emit(rec.Change(what="loss_scale", step=done.step, before=before, after=after, by="recovery", reason=reason))


def tell_not_finite(emit: Emit, done: StepFigures) -> None:
    """An update that was skipped on all ranks, for another reason than a loss scale that was too high."""
    if done.finite or done.result.overflow:
        return
    emit(
        rec.Alert(
            severity="warning",
            code="nonfinite_step",
            message=f"loss or gradient of step {done.step} is not finite; no parameter was changed",
            recommendation="one such step is harmless; if it repeats lower learning_rate or set precision=fp32",
            step=done.step,
        )
    )


def hopeless(row: int, step: int) -> Trouble:
    """What `row` steps in a row that were not finite are: the next ones would be no better."""
    return Trouble(step - row + 1, step, f"{row} steps in a row were not finite, the last is {step}")


def tell_spike(emit: Emit, guard: StepGuard, done: StepFigures) -> Trouble | None:
    """Tell the first spike of an episode, and when the episode is over.

    Returns:
        the spike as a reason to go back, where the policy says so.
    """
    before = guard.open_since
    spike = guard.observe(done.step, done.loss, done.result.grad_norm, done.result.applied)
    if before is not None and guard.open_since is None:
        message = f"the spike of step {before} is over: {guard.recover} steps in a row were normal"
        emit(rec.Note(step=done.step, message=message))
    if spike is None or not spike.first:
        return None
    back = guard.policy == "rollback"
    what = "the run goes back" if back else "the step counts" if done.result.applied else "step skipped"
    emit(
        rec.Alert(
            severity="warning",
            code="loss_spike" if spike.quantity == "loss" else "gradient_spike",
            message=f"step {done.step}: {spike.words} (spike_sigma {guard.sigma:g}), {what}",
            recommendation="one spike is harmless; if they repeat lower learning_rate or warm up for longer",
            step=done.step,
        )
    )
    return Trouble(done.step, done.step, f"step {done.step}: {spike.words}", fatal=False) if back else None
