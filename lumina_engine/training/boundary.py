"""What happens between steps: commands of the user, changes that were decided, routing records, saves, evaluations.

Order: decisions, records, commands, save, evaluate. Saving comes before evaluating, so that a fault in evaluation costs
nothing but what is still being written: a save in flight is driven on between its batches.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from ..checkpoint.verify import step_name
from ..monitoring import record as rec
from ..monitoring.growth_watch import failure
from ..run.policy import AGAIN, NO_PROGRESS
from .control import Request
from .evaluation import eval_record
from .progress import Stop

if TYPE_CHECKING:
    from .trainer import EnhancedConversationTrainer


class Boundary:
    """The boundary of one trainer: all ranks pass it together, with the same requests."""

    def __init__(self, trainer: EnhancedConversationTrainer) -> None:
        self.trainer = trainer
        self.pending: deque[Request] = deque()  # agreed by all ranks, not yet obeyed
        self.rates: dict[int, float] = {}  # step -> learning rate that the user set there
        self.replay: dict[int, float] = {}  # those of them that were set before a restart and are still to come

    def begin(self) -> None:
        """Before the first step of this start, which may be that of a resumed run."""
        self.trainer.saves.settle()
        self.pending.extend(self.trainer.control.agree())
        self.obey_all()
        progress = self.trainer.progress
        if progress.step and self.due(self.trainer.config.eval_interval) and progress.last_eval.get("step") != progress.step:
            # a checkpoint of an interval is taken before its step is evaluated, so a resumed run still has that to do
            self.evaluate_and_judge()

    def after_step(self) -> None:
        """What was decided, then commands, then what the intervals say.

        After a step that the run is to go back from, commands wait until it has: none of them may save that step.
        """
        self.pending.extend(self.trainer.control.agree())
        self.trainer.saves.settle()
        self.trainer.adaptive.end_of_ladder()
        if self.trainer.trouble is None:
            self.go_on()

    def go_on(self) -> None:
        """The step just done stands: records, commands, a change of precision, then what else the intervals say.

        A checkpoint that a command asks for has the records of its step behind it, as one of `save_interval` has.
        """
        self.record_routing()
        self.obey_all()
        self.trainer.make_switch()
        self.tasks(final=False)

    def due(self, interval: int, final: bool = False) -> bool:
        """Whether something with this interval (0 = only at the end) falls on the present step."""
        step = self.trainer.progress.step
        return final or (interval > 0 and step % interval == 0 and step < self.trainer.total_steps)

    def record_routing(self) -> None:
        """The record of experts, if it is due (behind the last step it always is), and what it decides."""
        trainer = self.trainer
        final = trainer.progress.step >= trainer.total_steps
        if trainer.window is not None and self.due(trainer.config.expert_log_interval, final):
            record = trainer.window.record(trainer.progress.step, getattr(trainer.model, "router_bias_LE", None))
            trainer.emit(record)
            trainer.adaptive.observe_experts(record)

    def tasks(self, final: bool) -> None:
        """Save, then evaluate, as the intervals say; both at the end."""
        trainer, cfg = self.trainer, self.trainer.config
        step = trainer.progress.step
        if self.due(cfg.save_interval, final) and trainer.saves.newest != step:
            change = None if final or trainer.growth is None else self._change_of_experts(trainer.growth())
            if change is None:
                trainer.save(blocking=final)
            else:
                self._save_for(change)
        if self.due(cfg.eval_interval, final):
            self.evaluate_and_judge()

    def _change_of_experts(self, wanted: rec.Change | None) -> rec.Change | None:
        """What rank 0 wants, on every rank. A collective."""
        found = self.trainer.comm.broadcast(None if wanted is None else msgspec.to_builtins(wanted))
        return None if found is None else msgspec.convert(found, rec.Change)

    def _save_for(self, change: rec.Change) -> None:
        """Checkpoint this step with a change of the number of experts in its log: the next start rewrites what is saved here.

        A checkpoint that fails costs the change, which an alert tells, and no restart.

        Raises:
            Stop: it is there, and the run is to be started again from it.
        """
        trainer, step = self.trainer, self.trainer.progress.step
        trainer.settle()  # one that is on its way may fail, which says nothing of this one
        trainer.adaptive.observe(change)
        trainer.emit(change)
        trainer.save(blocking=True)
        if trainer.saves.newest == step:
            raise Stop("restarting", AGAIN, f"{change.before} experts in each layer -> {change.after}: {change.reason}")
        trainer.emit(failure(change, f"its checkpoint failed: {trainer.saves.failure}"))

    def evaluate_and_judge(self) -> None:
        """Evaluate, and take note of whether it is the best yet; a loss that is not finite says nothing about that.

        Raises:
            Stop: no better evaluation in `early_stopping_patience` of them, or less to gain than `early_stopping_gain`.
        """
        trainer = self.trainer
        if trainer.eval_data is None:
            return
        progress, begin = trainer.progress, time.monotonic()
        trainer.section("eval", progress.step)
        figures = trainer.evaluate(trainer.eval_data, trainer.config.eval_batches)
        progress.last_eval = {"step": progress.step, **figures}
        record = eval_record(progress.step, figures, begin)
        trainer.emit(record)
        if not math.isfinite(figures["loss"]):
            return
        self.mark_best()
        if progress.best is None or figures["loss"] < progress.best:
            progress.best = figures["loss"]
            progress.evals_since_best = 0
        else:
            progress.evals_since_best += 1
        if (stop := trainer.adaptive.evaluated(record)) is not None:
            raise stop
        patience = trainer.config.early_stopping_patience
        if patience and progress.evals_since_best >= patience:
            raise Stop("finished", 0, f"no better eval_loss in {patience} evaluations (early_stopping_patience)")

    def mark_best(self) -> None:
        """Let `best` name this step if it is saved and was evaluated with the lowest loss of all that are.

        Not the lowest of all evaluations, which patience goes by: most of them are of steps that no checkpoint has.
        """
        trainer, progress = self.trainer, self.trainer.progress
        loss = progress.last_eval.get("loss", math.nan)
        if (
            progress.last_eval.get("step") == progress.step
            and math.isfinite(loss)
            and trainer.config.best_metric == "eval_loss"
        ):
            trainer.saves.mark_best(progress.step, loss)

    # ---- commands -------------------------------------------------------------------------------------------------------

    def obey_all(self) -> None:
        """Do what was asked for since the last boundary, and what the user had set for the next step before a restart."""
        while self.pending:  # a pause takes what stands behind it
            self._obey(self.pending.popleft())
        replayed = self.replay.pop(self.trainer.progress.step + 1, None)
        if replayed is not None:
            self.set_lr(replayed, by="recovery")

    def _obey(self, request: Request) -> None:
        """Do what a command or signal asks for; the record that carries its id is the answer."""
        trainer, step = self.trainer, self.trainer.progress.step
        if request.cmd == "checkpoint":
            self._checkpoint(request.id)
        elif request.cmd == "set_lr":
            self.set_lr(float(request.args["lr"]), by="user", id=request.id)
        elif request.cmd == "pause":
            self._pause(request)
        elif request.cmd == "resume":
            trainer.emit(rec.Note(message="already running", step=step, id=request.id))
        elif request.cmd == "stop":
            stops = [request, *(other for other in self.pending if other.cmd == "stop")]
            save = all(other.args.get("save", True) for other in stops)  # a later one may want the checkpoint left out
            raise Stop("finished", 0, f"stopped by the user at step {step}", save=save, id=request.id)
        elif request.cmd == "preempt":
            self._preempt(float(request.args.get("grace", trainer.config.preempt_grace_s)), request.id)
        elif request.cmd == "alert":  # of the supervisor; the log has one writer
            trainer.emit(rec.Alert(**request.args))
        else:
            trainer.emit(rec.Note(message=f"unknown command {request.cmd!r}", step=step, id=request.id))

    def _checkpoint(self, id: str | None) -> None:
        """Save, unless this step is that of a checkpoint already: the run may have gone back to it just now."""
        trainer, step = self.trainer, self.trainer.progress.step
        if trainer.manager is not None and trainer.saves.newest == step > 0 and not trainer.manager.busy:
            trainer.emit(rec.Checkpoint(step=step, path=step_name(step), verified=True, id=id))
        else:
            trainer.save(blocking=False, id=id)

    def _preempt(self, grace: float, id: str | None) -> None:
        """Leave within `grace` seconds, with a checkpoint if one fits, on all ranks alike.

        Raises:
            Stop: always.
        """
        trainer, step = self.trainer, self.trainer.progress.step
        fits = bool(trainer.comm.broadcast(trainer.saves.fits(grace)))
        reason = f"preempted at step {step}"
        if not fits:
            reason += (
                f" without a checkpoint: the last took {trainer.saves.seconds:.0f} s, {grace:g} s are given; the newest counts"
            )
        raise Stop("preempted", 75, reason, save=fits, id=id)

    def _pause(self, request: Request) -> None:
        """Stand still until `resume` (or an end). Ranks meet many times a second, so no collective times out."""
        trainer, step = self.trainer, self.trainer.progress.step
        trainer.emit(rec.Run(state="paused", reason=f"paused at step {step}", id=request.id))
        trainer.section("paused", step)
        while True:
            trainer.saves.settle()
            while self.pending:
                other = self.pending.popleft()
                if other.cmd == "resume":
                    world, total = trainer.comm.world_size, trainer.total_steps
                    trainer.emit(rec.Run(state="running", total_steps=total, world=world, id=other.id))
                    return
                if other.cmd == "pause":
                    trainer.emit(rec.Note(message="already paused", step=step, id=other.id))
                else:
                    self._obey(other)
                    trainer.section("paused", step)  # a save is over, or goes on beside: the watchdog must not time it
            time.sleep(0.05)
            self.pending.extend(trainer.control.agree())

    def set_lr(self, lr: float, by: str, id: str | None = None) -> None:
        """Give the next step the rate `lr`; later steps keep the schedule's shape.

        Raises:
            ValueError: the rate is not a positive number. RuntimeError: training has not been prepared.
        """
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"learning rate {lr!r}: it must be a positive number")
        trainer, schedule = self.trainer, self.trainer.schedule
        if schedule is None:
            raise RuntimeError("adjust_learning_rate works while training; set learning_rate before")
        step = trainer.progress.step + 1
        if step > trainer.total_steps or schedule.shape(step) < 1e-6:
            message = f"learning rate not changed: step {step} is behind the end, or its rate in the schedule is 0"
            trainer.emit(rec.Note(message=message, step=trainer.progress.step, id=id))
            return
        if by == "user":  # a newer choice: what was set in an abandoned branch does not come back
            self.replay = {}
        self.rates[step] = lr
        change = rec.Change(what="learning_rate", step=step, before=schedule.lr(step), after=lr, by=by, id=id)
        schedule.set_lr(step, lr)
        trainer.adaptive.observe(change)
        trainer.emit(change)

    def forget_rates(self, after: int) -> dict[int, float]:
        """Take back what the user set for later steps than this, now that the run goes back there. Returns it."""
        dropped = {step: rate for step, rate in self.rates.items() if step > after}
        self.replay = {}
        self.rates = {step: rate for step, rate in self.rates.items() if step <= after}
        return dropped

    def kept(self, ending: Stop) -> Stop:
        """How the run ends once its last save is over: finished only with its last step saved, by a second try if need be."""
        trainer, saves, step = self.trainer, self.trainer.saves, self.trainer.progress.step
        if ending.state != "finished" or not ending.save or saves.newest == step:
            return ending
        trainer.save(blocking=True)
        self.mark_best()
        if saves.newest == step:
            return ending
        newest = f"the newest checkpoint is {step_name(saves.safe)}" if saves.safe else "there is no checkpoint"
        why = f"{ending.reason}, but it could not be saved: {saves.failure}; {newest}"
        return Stop("failed", NO_PROGRESS, f"{why}; if the disk is full, free space, then --resume", id=ending.id)

    def end(self, stop: Stop) -> None:
        """Save what a stop wants saved."""
        trainer, step = self.trainer, self.trainer.progress.step
        if stop.state != "failed":
            trainer.emit(rec.Run(state="stopping", reason=stop.reason))
        if stop.state == "preempted" and trainer.manager is not None:
            trainer.manager.hold_backups()
        if stop.save and step:
            trainer.settle()  # one that is on its way may fail, and then this step has none
            if trainer.saves.newest != step:
                trainer.save(blocking=True)
                self.mark_best()  # where the evaluation came first, as in a stop by patience
