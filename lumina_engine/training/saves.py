"""Checkpoints as the training loop takes them: when one is under way, what came of it, which step is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..data.batch import Batch
from ..monitoring import record as rec
from .setup import Emit


class Saves:
    """The checkpoints of one trainer; without a manager all of this does nothing.

    Args:
        manager: a `CheckpointManager`, or None.
        emit: takes the records of what was saved.
        payload: gives the whole state at the present boundary, a collective.
    """

    def __init__(self, manager: Any, emit: Emit, payload: Callable[[], Any]) -> None:
        self.manager, self.emit, self._payload = manager, emit, payload
        self.newest = 0  # step of the newest checkpoint that was taken or restored; 0 once one failed
        self.safe = 0  # step of the newest that is committed
        self.failure: str | None = None  # why the last one failed, None if it did not
        self.seconds = 0.0  # of the last one's work, without its waits for a boundary; 0 before the first

    def fits(self, grace: float) -> bool:
        """Whether a checkpoint is likely to be done within `grace` seconds: the last one took at most two thirds of that."""
        return 1.5 * self.seconds < grace or self.seconds == 0.0

    def restored(self, step: int) -> None:
        """The run goes on from the checkpoint of this step."""
        self.newest = self.safe = step

    def save(self, step: int, *, blocking: bool, id: str | None = None) -> None:
        """Checkpoint the state at this boundary. A failure is recorded and alarms; training goes on."""
        if self.manager is not None:
            self.newest = step
            self._report(self.manager.save(self._payload(), blocking=blocking, id=id))

    def settle(self, wait: bool = False) -> None:
        """Record the saves that have ended; with `wait` all of them."""
        if self.manager is not None:
            self._report(self.manager.wait() if wait else self.manager.poll())
            for note in self.manager.take_notes():
                self.emit(rec.Alert(severity="warning", code="checkpoint_note", message=note))

    def between(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an evaluation, with a save in flight driven on at each: several ranks commit it only where they meet.

        All ranks take equally many.
        """
        for batch in batches:
            if self.manager is not None and self.manager.busy:
                self.settle()
            yield batch

    def mark_best(self, step: int, loss: float) -> None:
        """Let `best` name the checkpoint of this step, if there is one and no other was evaluated with a lower loss."""
        if self.manager is not None and self.newest == step:
            self.manager.mark_best(step, loss)
            self.settle()

    def _report(self, results: Any) -> None:
        for result in results or []:
            self.emit(
                rec.Checkpoint(
                    step=result.step,
                    path=result.path.name if result.path else None,
                    bytes=result.bytes,
                    seconds=result.seconds,
                    span=result.span_seconds,
                    blocking=result.blocking_seconds,
                    verified=result.verified,
                    best=result.best,
                    failed=result.failed,
                    id=result.id,
                )
            )
            for note in result.notes:
                self.emit(rec.Note(step=result.step, message=note))
            self.failure = result.failed
            if not result.failed:
                self.safe = result.step
                self.seconds = self.seconds if result.again else result.seconds
            else:
                self.newest = 0 if self.newest == result.step else self.newest  # a later one may be in flight
                message = f"checkpoint of step {result.step} failed: {result.failed}"
                self.emit(rec.Alert(severity="critical", code="checkpoint_failed", message=message, step=result.step))
