"""The controllers of rate and balance in a trainer: they take the records that the log gets, and what they decide is in force
from the next step on. So does early stop, which ends the run.

Every rank has them and decides alike, since loss, gradient norm and expert load are the same on all of them; only early stop is
decided by rank 0 for all, for a fit need not give the same last bit on every processor. The rules and the statistics are in
`monitoring/adaptive.py`, `monitoring/balance.py` and `monitoring/early_stop.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..monitoring import record as rec
from ..monitoring.adaptive import Back, RateController, Rules
from ..monitoring.balance import BalanceController, BalanceRules
from ..monitoring.decisions import back_of
from ..monitoring.early_stop import EARLY_STOP, EarlyStop, EarlyStopRules, has_evaluation
from ..run.policy import NO_PROGRESS
from .progress import Stop, Trouble

if TYPE_CHECKING:
    from ..checkpoint.manager import Loaded
    from .trainer import EnhancedConversationTrainer


def rewind_to(loaded: Loaded, reason: str, **rollback: Any) -> rec.Rewind:
    """The record of a return to a checkpoint, with what its state decides by; `rollback` are the fields that only one has."""
    state = loaded.global_state.get("adaptive", {}).get("early_stop")
    evaluated = has_evaluation(state or {}, loaded.step)
    return rec.Rewind(to_step=loaded.step, reason=reason, early_stop=state is not None, evaluated=evaluated, **rollback)


class Adaptive:
    """The controllers of one trainer.

    Args:
        trainer: its config (section `adaptive`, spike_window, spike_policy, load_balancing_weight, capacity_factor), the
            schedule that gets the factor on the rate, and the expert layers that get the capacity.
    """

    def __init__(self, trainer: EnhancedConversationTrainer) -> None:
        self.trainer = trainer
        self._controller = RateController(Rules.from_config(trainer.config, trainer.config.experiment_name))
        self._balance = BalanceController(BalanceRules.from_config(trainer.config, trainer.config.experiment_name))
        self._early_stop = EarlyStop(EarlyStopRules.from_config(trainer.config, run=trainer.config.experiment_name))
        self._stop: Stop | None = None

    def plan(self) -> None:
        """Take note of the planned steps and the schedule, which the data decided, from the present step on."""
        schedule, run = self.trainer.schedule, self._early_stop.rules.run
        total = 0 if schedule is None else schedule.total_steps
        self._early_stop.begin(EarlyStopRules.from_config(self.trainer.config, total, run), self.trainer.progress.step)

    def name_run(self, name: str) -> None:
        """The name by which commands know the run, for advice."""
        self._early_stop.use(replace(self._early_stop.rules, run=name))
        self._controller.use(replace(self._controller.rules, run=name))
        self._balance.use(replace(self._balance.rules, run=name))

    @property
    def load_balancing_weight(self) -> float:
        """The weight of the balance loss in force."""
        return self._balance.weight

    @property
    def spent(self) -> int:
        """Actions of the run so far, those of abandoned branches with them."""
        return self._controller.spent

    def observe_experts(self, record: rec.Experts) -> None:
        """Take what was recorded of the experts; emit what that decides."""
        for decision in self._balance.observe(record, self._controller.spent):
            self._controller.observe(decision)
            self.trainer.emit(decision)
        self._apply()

    def observe(self, record: rec.Step | rec.Change) -> Trouble | None:
        """Take what was recorded; emit what that decides. Returns why the run must go back, if it must."""
        back: Trouble | None = None
        if isinstance(record, rec.Step):
            self._early_stop.note(record)
        for decision in self._controller.observe(record):
            self.trainer.emit(decision.record)
            step = record.step or 0
            if decision.kind == "rollback":
                back = Trouble(decision.first, step, f"step {step}: {decision.reason}", fatal=False)
            elif decision.kind == "stop":
                self._stop = Stop(
                    "failed", NO_PROGRESS, f"{decision.reason}: start again with a lower learning_rate", save=False
                )
        self._apply()
        return back

    def evaluated(self, record: rec.Eval) -> Stop | None:
        """Take an evaluation; emit what that decides. Returns the end of the run, if it is one. A collective."""
        judged = self._early_stop.note(record)
        if not (judged and self._early_stop.rules.on):
            return None
        comm = self.trainer.comm
        own = self._early_stop.judge(self._controller.spent) if comm.rank == 0 else None
        line = comm.broadcast(None if own is None else rec.encode(own).decode())
        if line is None:
            return None
        decision = rec.decode(line)
        assert isinstance(decision, rec.Change | rec.Alert)
        self._early_stop.adopt(decision)
        self._controller.observe(decision)
        self.trainer.emit(decision)
        return Stop("finished", 0, decision.reason or EARLY_STOP) if isinstance(decision, rec.Change) else None

    def end_of_ladder(self) -> None:
        """At a boundary.

        Raises:
            Stop: everything that the controller may do has been done, and did not help.
        """
        if self._stop is not None:
            raise self._stop

    def rolled_back(self, rewind: rec.Rewind, before: Mapping[str, Any]) -> None:
        """The trainer has been put back by `rewind`; `before` is the state that this had until then."""
        known = len(self._controller.backs)
        since = [Back(*item) for item in before["backs"][known:]]
        self.catch_up([*since, back_of(rewind, before["actions"])], rewind.to_step)

    def catch_up(self, backs: Iterable[Back], step: int) -> None:
        """Take note of rollbacks that the restored checkpoint of `step` does not know of."""
        known = list(backs)
        self._controller.rolled_back(known, step)
        if known and self.trainer.schedule is not None:
            self.trainer.schedule.take_back(after=step)
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        others = {"balance": self._balance.state_dict(), "early_stop": self._early_stop.state_dict()}
        return {**self._controller.state_dict(), **others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what the checkpoint of the trainer's present step has."""
        self._controller.load_state_dict(state)
        self._balance.load_state_dict(state.get("balance", {}))
        self._early_stop.load_state_dict(state.get("early_stop", {}))
        self.plan()
        self._apply()

    def _apply(self) -> None:
        if self.trainer.schedule is not None:
            self.trainer.schedule.factor = self._controller.factor
        if self._balance.rules.mode == "act":
            for layer in self.trainer.model.expert_layers:
                layer.capacity_factor = self._balance.capacity
