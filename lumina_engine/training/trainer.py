"""The training loop: one for every mode.

A step takes all micro batches of the global batch that fall to this rank, adds up their share of the objective, and updates
once.
Between steps lies the *boundary* (`boundary.py`), the only place where anything else happens.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..data.batch import Batch, EvalLoader, Position, TrainLoader
from ..data.mixed import AnyRows, Mixture, row_plan
from ..data.rows import RowOptions
from ..monitoring import record as rec
from ..run.policy import AGAIN
from ..run.sections import WAITED, WINDOW
from . import memory
from .adaptive import Adaptive
from .boundary import Boundary
from .comm import Comm
from .compiling import compile_blocks, explained
from .control import Control
from .engine import Engine, build_engine
from .evaluation import evaluate, evaluate_tasks, token_bytes_V
from .expert_parallel import spread_experts
from .guard import StepGuard
from .ladder import PrecisionLadder, Switch, by_autocast, native_bf16
from .memory import restore_torch_rng, torch_rng
from .objective import GlobalBatch, Objective
from .plain_engine import PlainEngine
from .precision import Precision
from .progress import Progress, Stop, Trouble
from .rollback import Recovery, roll_back
from .routing import RoutingWindow
from .saves import Saves
from .schedule import Schedule
from .setup import deepspeed_config, emitter, placed, resolved_for_training, splits_weights, warn_unsupervised
from .signs import Movement, Repeats
from .step_clock import StepClock, Utilisation
from .step_record import StepFigures, count, figures, hopeless, note_scale, step_record, tell_not_finite, tell_spike


class EnhancedConversationTrainer:
    """Trains a `DeepSeekTransformer` on conversations.

    The shape comes from `model.config`; `config` says how to train. `logger` takes records: an object with `.emit(record)`, or
    a `logging.Logger`, or None. In a plain script that is all; a supervised run adds a command channel and a checkpoint manager
    (see `worker.py`).

    Args:
        model: the model, on any device, in fp32; on `meta` it gets its first weights here, at ZeRO stage 3 never all at once.
        tokenizer: the tokenizer of the data.
        config: a `Config`; values left on `auto` are resolved for this machine.
        logger: where records go.
        comm: the process group; made from the environment when absent.
        manager: a `CheckpointManager`; without one nothing is saved.
        channel: a `RankChannel` for commands and heartbeats.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: Any,
        logger: Any = None,
        *,
        comm: Comm | None = None,
        manager: Any = None,
        channel: Any = None,
    ) -> None:
        self.comm = comm or Comm.start(config.communication_backend)
        self.config = resolved_for_training(config, model, tokenizer, self.comm)
        self.tokenizer = tokenizer
        self.manager = manager
        self.channel = channel
        self.control = Control(self.comm, channel)
        if channel is None:
            warn_unsupervised(self.config)
        self.emit = emitter(logger, self.comm)
        self.precision = Precision.from_name(self.config.precision)
        spread_experts(model, self.comm)
        self.ds_config = deepspeed_config(self.config, self.comm)
        self.model = placed(model, self.config, self.comm, self.ds_config)
        self.model.train()
        if self.config.compile:
            blocks = compile_blocks(self.model)
            self.emit(rec.Run(state="compiling", reason=f"{blocks} blocks, in a dry run"))
        if channel is not None:
            channel.report(0, "compile" if self.config.compile else "dry run")
        with explained():
            self.engine = self._rehearsed_engine()
        self.model = self.engine.module
        shape = self.model.config
        self.top_k = shape.moe_top_k
        layers = list(range(shape.num_dense_layers, shape.num_layers)) if shape.use_moe else []
        self.window = RoutingWindow(layers, shape.num_experts, self.top_k, self.comm) if layers else None
        self.clock = StepClock(self.comm.device)
        self.utilisation = Utilisation(shape, self.config.precision, self.comm.device, self.comm.world_size)
        self.progress = Progress()
        self.ladder = self._make_ladder()
        self.switch: Switch | None = None  # of precision, to be made at the next boundary
        self.guard = StepGuard(self.config)
        self.adaptive = Adaptive(self)
        self.recovery = Recovery()
        self.repeats = Repeats()
        self.movement: Movement | None = None  # of the weights, while there is a loop
        self.trouble: Trouble | None = None  # that makes the run go back at the next boundary
        self.overrides: list[dict[str, Any]] = []  # refusals that the user overrode; every later manifest names them
        self.sync_log: Callable[[], object] = lambda: None  # the caller's: what was emitted is on the disk afterwards
        self.train_data: Any = None
        self.plan: AnyRows | None = None  # of the training data
        self.eval_data: Any = None
        self.schedule: Schedule | None = None
        self.configured_warmup = self.config.warmup_steps  # may be `auto`, which depends on the data
        self.total_steps = 0
        self.last_loss = math.nan
        self.at_boundary = True  # weights, progress and random state belong to the same step
        self.step_rng: dict[str, torch.Tensor] | None = None  # random state before a step that has changed no weight yet
        self.step_routing: dict[str, torch.Tensor] = {}  # and the routing statistics then
        self.bytes_V: torch.Tensor | None = None
        self.saves = Saves(manager, self.emit, self._payload)
        self.boundary = Boundary(self)
        self.extra_state: Callable[[], dict[str, Any]] = dict  # what the caller adds to the state of every checkpoint
        # the caller's, on every rank or on none: rank 0's says which change of the number of experts the next save is for
        self.growth: Callable[[], rec.Change | None] | None = None

    def _make_ladder(self) -> PrecisionLadder | None:
        """`dynamic_precision`, where this trainer can change precision: in place by autocast, or by being started again.

        A collective: rank 0 knows of a supervisor, the ranks of a machine that was started by hand do not.
        """
        if not self.config.dynamic_precision:
            return None
        if not self.switches_in_place and not self.comm.broadcast(getattr(self.channel, "supervised", False)):
            message = "dynamic_precision: precision %s needs restarts, which only `lumina-engine train` can make; it stays"
            logging.getLogger("lumina").warning(message, self.config.precision)
            return None
        return PrecisionLadder(self.config.precision, native_bf16(self.comm.device))

    @property
    def switches_in_place(self) -> bool:
        """Whether another precision by autocast needs no other weights: then the configuration keeps the one asked for."""
        return isinstance(self.engine, PlainEngine) and by_autocast(self.precision.name)

    def _rehearsed_engine(self) -> Engine:
        """The engine, after the dry run: with weights that are split over ranks it runs through the engine, else before it."""
        split = splits_weights(self.ds_config)
        shape = (self.config, self.comm.device, self.precision.context)
        if not split:
            memory.dry_run(self.model, *shape)
        engine = build_engine(self.model, self.config, self.comm, self.ds_config)
        if split:
            memory.dry_run(engine.module, *shape, partial(engine.backward, last=True), engine.discard)
        return engine

    # ---- training -------------------------------------------------------------------------------------------------------

    def train(self, train_dataset: Any, eval_dataset: Any = None) -> dict[str, Any]:
        """Train to the end of `num_epochs` or `max_steps`, whichever comes first, or to a stop.

        Args:
            train_dataset: a `ConversationDataset` or a `TokenStore`.
            eval_dataset: the same for evaluation, or None.

        Returns:
            A summary: `state`, `exit_code`, `reason`, `step`, `total_steps`, `tokens`, `loss`, `eval` (figures of the last
            evaluation), `seconds`.

        Raises:
            ValueError: steps have been done on other data already.
        """
        started = time.monotonic()
        self.prepare(train_dataset, eval_dataset)
        self.adaptive.plan()
        mode = self.config.adaptive
        self.emit(rec.Run(state="running", total_steps=self.total_steps, world=self.comm.world_size, adaptive=mode))
        try:
            with explained():  # what is compiled for a new shape
                self._loop(self._loader())
                while self.progress.step < self.total_steps:  # after a rollback
                    self._loop(self._loader())
            self.boundary.tasks(final=True)
            ending = Stop("finished", 0, f"all {self.total_steps} steps done")
        except Stop as stop:
            self.boundary.end(stop)
            ending = stop
        self.settle()
        if self.manager is not None:
            ending = self.boundary.kept(ending)
        return {
            "state": ending.state,
            "exit_code": ending.exit_code,
            "reason": ending.reason,
            "id": ending.id,
            "step": self.progress.step,
            "total_steps": self.total_steps,
            "tokens": self.progress.tokens,
            "loss": self.last_loss,
            "eval": {name: value for name, value in self.progress.last_eval.items() if name != "step"},
            "seconds": time.monotonic() - started,
        }

    def prepare(self, train_dataset: Any, eval_dataset: Any = None) -> None:
        """Take the data and fix what depends on it: steps, schedule, `warmup_steps`. `train` calls it.

        Raises:
            ValueError: steps have been done on other data already.
        """
        train_data = getattr(train_dataset, "store", train_dataset)
        self.eval_data = getattr(eval_dataset, "store", eval_dataset)
        if self.schedule is not None and train_data.fingerprint == self.train_data.fingerprint:
            return
        if self.progress.step:
            done = f"{self.progress.step} steps of {self.total_steps}"
            raise ValueError(f"{done} are done on other data, and schedule and order belong to it: make a new trainer")
        self.train_data, self.plan = train_data, row_plan(train_data, RowOptions.from_config(self.config))
        self.total_steps = self._total_steps(self._loader())
        self.schedule = Schedule.from_config(
            self.config.model_copy(update={"warmup_steps": self.configured_warmup}), self.total_steps
        )
        self.config = self.config.model_copy(update={"warmup_steps": self.schedule.warmup_steps})
        self.progress.eval_batch = self.progress.eval_batch or self.config.batch_size

    def _loader(self) -> TrainLoader:
        return TrainLoader(
            self.train_data,
            self.config,
            rank=self.comm.rank,
            world=self.comm.world_size,
            micro_batch=self.config.batch_size,
            accumulation=self.config.gradient_accumulation_steps,
            start=Position(self.progress.epoch, self.progress.index),
            steps_done=self.progress.step,
            skip=self.recovery.skip,
            plan=self.plan,
        )

    def _total_steps(self, loader: TrainLoader) -> int:
        steps = loader.total_steps(self.config.num_epochs)
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def _loop(self, loader: TrainLoader) -> None:
        """Train from here to the last step, or to a rollback."""
        self.boundary.begin()
        self.repeats = Repeats()
        self.movement = Movement(self.model, self.progress.step)
        steps = iter(loader)
        while self.progress.step < self.total_steps:
            begin = time.perf_counter()
            self.section(WINDOW if loader.waits() else "data", self.progress.step + 1)
            self.at_boundary = False
            self.step_rng = torch_rng()
            self.step_routing = self.window.copy() if self.window is not None else {}
            batches = next(steps)
            self.repeats.take(batches, self.progress.epoch, self.progress.step + 1)
            micro_batches = [batch.to(self.comm.device) for batch in batches]
            data_time = time.perf_counter() - begin
            self._step(micro_batches, begin, data_time)
            self.progress.epoch, self.progress.index = loader.position.epoch, loader.position.index
            self.at_boundary = True
            self.boundary.after_step()
            if self.trouble is not None:
                trouble, self.trouble = self.trouble, None
                if roll_back(self, trouble):
                    return
                self.boundary.go_on()

    def _step(self, micro_batches: list[Batch], begin: float, data_time: float) -> None:
        """One optimizer step over `micro_batches`, and its records."""
        assert self.schedule is not None
        step = self.progress.step + 1
        lr = self.schedule.lr(step)
        totals = GlobalBatch.of(micro_batches, self.comm)
        cfg = self.config
        weight = self.adaptive.load_balancing_weight
        objective = Objective(totals, self.comm, weight, cfg.router_z_loss_weight, self.top_k)
        for number, batch in enumerate(micro_batches, start=1):
            self.clock.start("forward")
            self.section("forward", step)
            output = self.engine.forward(
                batch.input_ids_BS,
                labels=batch.labels_BS,
                document_ids=batch.document_ids_BS,
                position_ids=batch.position_ids_BS,
                weights=batch.weights_BS,
                layout=batch.layout,
                return_aux=True,
            )
            self.clock.start("backward")
            self.section("backward", step)  # before the objective: it sums over the ranks, and forward is what each does alone
            loss = objective.add(output, batch.num_tokens)
            if self.window is not None:
                self.window.add(output.router)
            self.engine.backward(loss, last=number == len(micro_batches))
        self.clock.start("optimizer")
        self.section("step", step)
        loss_value, balance, z = objective.reduce()  # the one read of a step, at its end: whether to apply it depends on it
        self.step_rng = None
        scale = self.engine.scale.value if self.engine.scale is not None else None
        rows, length = sum(b.input_ids_BS.shape[0] for b in micro_batches), micro_batches[0].input_ids_BS.shape[1]
        self.guard.meet(rows * self.comm.world_size, length)
        result = self.engine.step(lr, partial(self.guard.allows, loss_value))
        if result.applied and self.window is not None and cfg.router_bias_rate > 0:
            self.model.update_router_bias(objective.counts_LE, cfg.router_bias_rate)
        losses = (loss_value, balance, z) if self.window is not None else (loss_value, None, None)
        done = figures(
            step, lr, losses, micro_batches, totals, result, scale, begin, data_time, self.clock.times(), self.repeats.found
        )
        self._note(done)

    def _note(self, done: StepFigures) -> None:
        """Count and record a step; decide what its result asks for."""
        step, result = done.step, done.result
        note_scale(self.emit, done)
        count(self.progress, done, self.comm.world_size)
        self.last_loss = done.loss
        record: rec.Step | None = None
        if step % self.config.log_interval == 0 or not result.applied:
            frozen = self.movement.look(step) if self.movement is not None else []
            record = step_record(done, self.progress, self.utilisation, self.comm.world_size, frozen)
            self.emit(record)
        tell_not_finite(self.emit, done)
        self.trouble = tell_spike(self.emit, self.guard, done)
        if record is not None:  # what the log does not have cannot be decided by
            self.trouble = self.adaptive.observe(record) or self.trouble
        in_row = self.progress.nonfinite_in_row
        is_hopeless = in_row >= self.config.max_nonfinite_in_row
        if self.ladder is not None:
            self.switch = self.ladder.observe(step, done.finite, result.scale, is_hopeless)
        if is_hopeless and self.switch is None:
            self.trouble = hopeless(in_row, step)

    def make_switch(self) -> None:
        """Make the change of precision that the last step asked for, if it did."""
        if self.switch is not None:
            switch, self.switch = self.switch, None
            self._switch_precision(switch)

    def _switch_precision(self, switch: Switch) -> None:
        """Go on in another precision: in place where only autocast differs, else by being started again from here."""
        before, after, step = self.precision.name, switch.precision, self.progress.step
        self.emit(rec.Change(what="precision", step=step, before=before, after=after, by="adaptive", reason=switch.reason))
        self.progress.nonfinite_in_row = 0
        self.use_precision(after)
        if self.precision.name != after:
            raise Stop("restarting", AGAIN, f"precision {before} -> {after}: {switch.reason}")

    def use_precision(self, name: str) -> None:
        """Compute in `name` from here on; where that needs other weights, put it into the configuration of the next start."""
        if isinstance(self.engine, PlainEngine) and self.switches_in_place and by_autocast(name):
            self.precision = Precision.from_name(name)
            self.engine.use(self.precision)
        else:
            self.config = self.config.model_copy(update={"precision": name})

    # ---- between steps ---------------------------------------------------------------------------------------------------

    def adjust_learning_rate(self, new_lr: float) -> None:
        """Give the next step the rate `new_lr`; later steps keep the schedule's shape. Recorded and saved.

        Raises:
            ValueError: the rate is not a positive number. RuntimeError: training has not been prepared.
        """
        self.boundary.set_lr(new_lr, by="user")

    def back_to_boundary(self) -> bool:
        """After an error inside a step: undo what it did, if it has not changed weights yet. Then the boundary may be saved."""
        if self.at_boundary or self.step_rng is None:
            return self.at_boundary
        for parameter in self.model.parameters():
            parameter.grad = None
        restore_torch_rng(self.step_rng)
        if self.window is not None:
            self.window.load_state_tensors(self.step_routing)
        self.at_boundary = True
        return True

    def settle(self) -> None:
        """Wait for the save in flight, and record what came of it."""
        if self.manager is not None and self.manager.busy:
            self.section(WAITED, self.progress.step)
        self.saves.settle(wait=True)

    def save(self, *, blocking: bool = False, id: str | None = None) -> None:
        """Checkpoint the state at this boundary. A failure is recorded and alarms; training goes on."""
        if self.manager is not None:
            blocking = blocking or not self.config.async_save
            # the name that a section has decides by which others its time is judged
            waits = self.manager.busy or (blocking and self.config.async_save)
            self.section(WAITED if waits else "save", self.progress.step)
            self.saves.save(self.progress.step, blocking=blocking, id=id)

    def _payload(self) -> Any:
        from .state import payload

        return payload(self)

    # ---- figures --------------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any, max_batches: int = 100) -> dict[str, float]:
        """`loss`, `perplexity`, `bits_per_byte`, `accuracy`, `tokens` over at most `max_batches` global batches (0 = all).

        A `Mixture` is evaluated task by task, each with an equal part of the batches (at least one); `loss/NAME` is its loss.
        """
        data = getattr(eval_dataset, "store", eval_dataset)
        if self.bytes_V is None:
            self.bytes_V = token_bytes_V(self.tokenizer, self.model.config.vocab_size)
        config = self.config.model_copy(update={"batch_size": self.progress.eval_batch or self.config.batch_size})
        place = (self.comm.rank, self.comm.world_size, self.config.batch_size)
        to_model = (self.comm, self.bytes_V, self.precision.context)
        if not isinstance(data, Mixture):
            return evaluate(self.model, self.saves.between(EvalLoader(data, config, *place, max_batches)), *to_model)
        each = -(-max_batches // len(data.stores))
        loaders = {name: self.saves.between(EvalLoader(store, config, *place, each)) for name, store in data.stores.items()}
        return evaluate_tasks(self.model, loaders, *to_model)

    def get_memory_stats(self) -> dict[str, Any]:
        """Bytes in use: `device` (allocated, reserved, peak, total), `host` (rss, available, total), `components`."""
        return memory.memory_stats(self.model, self.engine.state_bytes(), self.comm.device)

    def debug_training_setup(self) -> dict[str, Any]:
        """How this rank is set up, as a dictionary that is also printed: device, ranks, batch, precision, versions."""
        from .state import setup_report

        report = setup_report(self)
        for name, value in report.items():
            print(f"{name:<28} {value}")
        return report

    def section(self, name: str, step: int) -> None:
        """Tell the supervisor what this rank does now."""
        if self.channel is not None:
            self.channel.report(step, name)
