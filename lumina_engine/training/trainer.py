"""The training loop: one for every mode.

A step takes all micro batches of the global batch that fall to this rank, adds up their share of the objective, and updates
once.
Between steps lies the *boundary*, the only place where anything else happens, always in this order: record, commands, save,
evaluate. Saving comes before evaluating, so that a fault in evaluation costs nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from ..data.batch import Batch, EvalLoader, Position, TrainLoader
from ..monitoring import record as rec
from ..run.policy import AGAIN
from . import memory
from .comm import Comm
from .compiling import compile_blocks, explained
from .control import Control, Request
from .engine import Engine, StepResult, build_engine
from .evaluation import eval_record, evaluate, token_bytes_V
from .expert_parallel import spread_experts
from .ladder import PrecisionLadder, Switch, by_autocast, native_bf16
from .memory import restore_torch_rng, torch_rng
from .objective import GlobalBatch, Objective
from .plain_engine import PlainEngine
from .precision import Precision
from .routing import RoutingWindow
from .schedule import Schedule
from .setup import deepspeed_config, emitter, resolved_for_training, warn_unsupervised
from .step_clock import StepClock, Utilisation


class Stop(Exception):
    """The run ends at this boundary. `state` and `exit_code` as in the table of exit codes."""

    def __init__(self, state: str, exit_code: int, reason: str, *, save: bool = True, id: str | None = None) -> None:
        super().__init__(reason)
        self.state, self.exit_code, self.reason, self.save, self.id = state, exit_code, reason, save, id


@dataclass
class Progress:
    """Where training is: everything global that a resumed run needs besides tensors."""

    step: int = 0
    epoch: int = 0
    index: int = 0  # next row of the epoch's row order
    tokens: int = 0
    samples: int = 0  # full rows processed
    skipped: int = 0
    nonfinite_in_row: int = 0
    eval_batch: int = 0  # rows that count as one batch of evaluation, so that figures compare whatever the micro batch
    best: float | None = None  # best evaluation (or training) loss
    evals_since_best: int = 0
    wall_seconds: float = 0.0
    last_eval: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Progress:
        return cls(**{name: state[name] for name in cls.__dataclass_fields__ if name in state})


class EnhancedConversationTrainer:
    """Trains a `DeepSeekTransformer` on conversations.

    The shape comes from `model.config`; `config` says how to train. `logger` takes records: an object with `.emit(record)`, or
    a `logging.Logger`, or None. In a plain script that is all; a supervised run adds a command channel and a checkpoint manager
    (see `worker.py`).

    Args:
        model: the model, on any device, in fp32.
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
        self.model = model.to(device=self.comm.device, dtype=self.precision.weights)
        self.model.train()
        self.ds_config = deepspeed_config(self.config, self.comm)
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
        self.schedule: Schedule | None = None
        self.total_steps = 0
        self.last_loss = math.nan
        self.pending: deque[Request] = deque()  # agreed by all ranks, not yet obeyed
        self.at_boundary = True  # weights, progress and random state belong to the same step
        self.step_rng: dict[str, torch.Tensor] | None = None  # random state before a step that has changed no weight yet
        self.saved_step = 0  # of the newest checkpoint that was taken or restored
        self.bytes_V: torch.Tensor | None = None
        self.replay: dict[int, float] = {}  # step -> learning rate that the user set there before a restart
        self.extra_state: Callable[[], dict[str, Any]] = dict  # what the caller adds to the state of every checkpoint

    def _make_ladder(self) -> PrecisionLadder | None:
        """`dynamic_precision`, where this trainer can change precision: in place by autocast, or by being started again."""
        if not self.config.dynamic_precision:
            return None
        in_place = isinstance(self.engine, PlainEngine) and by_autocast(self.config.precision)
        if not in_place and not getattr(self.channel, "supervised", False):
            message = "dynamic_precision: precision %s needs restarts, which only `lumina-engine train` can make; it stays"
            logging.getLogger("lumina").warning(message, self.config.precision)
            return None
        return PrecisionLadder(self.config.precision, native_bf16(self.comm.device))

    def _rehearsed_engine(self) -> Engine:
        """The engine, after the dry run: with weights that are split over ranks it runs through the engine, else before it."""
        split = self.ds_config is not None and self.ds_config["zero_optimization"]["stage"] == 3
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
        """
        started = time.monotonic()
        if self.schedule is None:
            self.prepare(train_dataset, eval_dataset)
        self.emit(rec.Run(state="running", total_steps=self.total_steps, world=self.comm.world_size))
        try:
            with explained():  # what is compiled for a new shape
                self._loop(self._loader())
            self._boundary_tasks(final=True)
            ending = Stop("finished", 0, f"all {self.total_steps} steps done")
        except Stop as stop:
            self._end(stop)
            ending = stop
        self._settle_saves(wait=True)
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
        """Take the data and fix what depends on it: steps, schedule, `warmup_steps`. `train` calls it if need be."""
        self.train_data = getattr(train_dataset, "store", train_dataset)
        self.eval_data = getattr(eval_dataset, "store", eval_dataset)
        self.total_steps = self._total_steps(self._loader())
        self.schedule = Schedule.from_config(self.config, self.total_steps)
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
        )

    def _total_steps(self, loader: TrainLoader) -> int:
        steps = loader.total_steps(self.config.num_epochs)
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def _loop(self, loader: TrainLoader) -> None:
        self._settle_saves()
        self._obey_all(self.control.agree())
        if self.progress.step and self._due(self.config.eval_interval):
            # a checkpoint is taken before its step is evaluated, so a resumed run still has that to do
            self._evaluate_and_judge()
        steps = iter(loader)
        while self.progress.step < self.total_steps:
            begin = time.perf_counter()
            self._section("data", self.progress.step + 1)
            self.at_boundary = False
            self.step_rng = torch_rng()
            micro_batches = [batch.to(self.comm.device) for batch in next(steps)]
            data_time = time.perf_counter() - begin
            self._step(micro_batches, begin, data_time)
            self.progress.epoch, self.progress.index = loader.position.epoch, loader.position.index
            self.at_boundary = True
            self._boundary(self.control.agree())

    def _step(self, micro_batches: list[Batch], begin: float, data_time: float) -> None:
        """One optimizer step over `micro_batches`, and its records."""
        assert self.schedule is not None
        step = self.progress.step + 1
        lr = self.schedule.lr(step)
        totals = GlobalBatch.of(micro_batches, self.comm)
        cfg = self.config
        objective = Objective(totals, self.comm, cfg.load_balancing_weight, cfg.router_z_loss_weight, self.top_k)
        for number, batch in enumerate(micro_batches, start=1):
            self.clock.start("forward")
            self._section("forward", step)
            output = self.engine.forward(
                batch.input_ids_BS,
                labels=batch.labels_BS,
                document_ids=batch.document_ids_BS,
                position_ids=batch.position_ids_BS,
                weights=batch.weights_BS,
                return_aux=True,
            )
            loss = objective.add(output, batch.num_tokens)
            if self.window is not None:
                self.window.add(output.router)
            self.clock.start("backward")
            self._section("backward", step)
            self.engine.backward(loss, last=number == len(micro_batches))
        self.clock.start("optimizer")
        self._section("step", step)
        loss_value, balance, z = objective.reduce()
        self.step_rng = None
        scale = self.engine.scale.value if self.engine.scale is not None else None
        result = self.engine.step(lr)
        self._note_scale(step, scale, result.scale)
        if result.applied and self.window is not None and cfg.router_bias_rate > 0:
            self.model.update_router_bias(objective.counts_LE, cfg.router_bias_rate)
        times = self.clock.times()
        now = time.perf_counter()
        rows, length = sum(b.input_ids_BS.shape[0] for b in micro_batches), micro_batches[0].input_ids_BS.shape[1]
        self._count(step, totals, sum(len(b.rows) for b in micro_batches), result, now - begin)
        self.last_loss = loss_value
        if step % cfg.log_interval == 0 or not result.applied:
            tokens_per_s = totals.tokens / (now - begin)
            self.emit(
                rec.Step(
                    step=step,
                    epoch=self.progress.epoch,
                    tokens=self.progress.tokens,
                    loss=loss_value,
                    aux_loss=balance if self.window is not None else None,
                    z_loss=z if self.window is not None else None,
                    lr=lr,
                    grad_norm=result.grad_norm,
                    step_time=now - begin,
                    tokens_per_s=tokens_per_s,
                    mfu=self.utilisation.of(tokens_per_s, length),
                    seq_length=length,
                    batch=rows * self.comm.world_size,
                    skipped=not result.applied,
                    data_time=data_time,
                    forward_time=times["forward"],
                    backward_time=times["backward"],
                    optimizer_time=times["optimizer"],
                )
            )
        if not result.applied and not result.overflow:
            self._tell_not_finite(step)
        hopeless = self.progress.nonfinite_in_row >= cfg.max_nonfinite_in_row
        if self.ladder is not None:
            self.switch = self.ladder.observe(step, result.applied, result.scale, hopeless)
        if hopeless and self.switch is None:
            self._give_up(step)

    def _note_scale(self, step: int, before: float | None, after: float | None) -> None:
        """Record a change of the loss scale; the next step has the new one."""
        if before is not None and after is not None and before != after:
            reason = "a gradient overflowed" if after < before else "no overflow for long"
            self.emit(rec.Change(what="loss_scale", step=step, before=before, after=after, by="recovery", reason=reason))

    def _count(self, step: int, totals: GlobalBatch, rows: int, result: StepResult, seconds: float) -> None:
        p = self.progress
        p.step = step
        p.tokens += totals.tokens
        p.samples += rows * self.comm.world_size
        p.wall_seconds += seconds
        p.skipped += 0 if result.applied else 1
        if not result.overflow:  # a loss scale that is still sinking is no sign of broken values
            p.nonfinite_in_row = 0 if result.applied else p.nonfinite_in_row + 1

    def _tell_not_finite(self, step: int) -> None:
        """The update was skipped on all ranks."""
        self.emit(
            rec.Alert(
                severity="warning",
                code="nonfinite_step",
                message=f"loss or gradient of step {step} is not finite; no parameter was changed",
                recommendation="one such step is harmless; if it repeats lower learning_rate or set precision=fp32",
                step=step,
            )
        )

    def _give_up(self, step: int) -> None:
        """Too many skipped steps in a row end the run: a restart would meet the same."""
        limit = self.config.max_nonfinite_in_row
        reason = f"{limit} steps in a row were not finite, the last is {step}: lower learning_rate"
        raise Stop("failed", 93, reason, save=False)

    def _switch_precision(self, switch: Switch) -> None:
        """Go on in another precision: in place where only autocast differs, else by being started again from here."""
        before, after, step = self.config.precision, switch.precision, self.progress.step
        self.emit(rec.Change(what="precision", step=step, before=before, after=after, by="adaptive", reason=switch.reason))
        self.progress.nonfinite_in_row = 0
        self.use_precision(after)
        if self.precision.name != after:
            raise Stop("restarting", AGAIN, f"precision {before} -> {after}: {switch.reason}")

    def use_precision(self, name: str) -> None:
        """Put `name` into the configuration, and in force where that needs no other weights."""
        self.config = self.config.model_copy(update={"precision": name})
        if isinstance(self.engine, PlainEngine) and by_autocast(name) and by_autocast(self.precision.name):
            self.precision = Precision.from_name(name)
            self.engine.use(self.precision)

    # ---- the boundary ---------------------------------------------------------------------------------------------------

    def _boundary(self, requests: list[Request]) -> None:
        self._settle_saves()
        self._obey_all(requests)
        if self.switch is not None:
            switch, self.switch = self.switch, None
            self._switch_precision(switch)
        self._boundary_tasks(final=False)

    def _obey_all(self, requests: list[Request]) -> None:
        self.pending.extend(requests)
        while self.pending:  # a pause takes what stands behind it
            self._obey(self.pending.popleft())
        replayed = self.replay.pop(self.progress.step + 1, None)
        if replayed is not None:
            self._set_lr(replayed, by="recovery")

    def _due(self, interval: int, final: bool = False) -> bool:
        """Whether something with this interval (0 = only at the end) falls on the present step."""
        step = self.progress.step
        return final or (interval > 0 and step % interval == 0 and step < self.total_steps)

    def _boundary_tasks(self, final: bool) -> None:
        """Records of routing, then save, then evaluate, as the intervals say; all of them at the end."""
        step, cfg = self.progress.step, self.config
        if self.window is not None and self._due(cfg.expert_log_interval, final):
            self.emit(self.window.record(step, getattr(self.model, "router_bias_LE", None)))
        if self._due(cfg.save_interval, final) and self.saved_step != step:
            self.save(blocking=final)
        if self._due(cfg.eval_interval, final):
            self._evaluate_and_judge()

    def _evaluate_and_judge(self) -> None:
        if self.eval_data is None:
            return
        begin = time.monotonic()
        self._section("eval", self.progress.step)
        figures = self.evaluate(self.eval_data, self.config.eval_batches)
        self.progress.last_eval = {"step": self.progress.step, **figures}
        self.emit(eval_record(self.progress.step, figures, begin))
        better = self.progress.best is None or figures["loss"] < self.progress.best
        if better:
            self.progress.best = figures["loss"]
            self.progress.evals_since_best = 0
            if self.manager is not None and self.config.best_metric == "eval_loss":
                self.manager.mark_best(self.progress.step)
                self._settle_saves()
        else:
            self.progress.evals_since_best += 1
        patience = self.config.early_stopping_patience
        if patience and self.progress.evals_since_best >= patience:
            raise Stop("finished", 0, f"no better eval_loss in {patience} evaluations (early_stopping_patience)")

    def _obey(self, request: Request) -> None:
        """Do what a command or signal asks for; the record that carries its id is the answer."""
        step = self.progress.step
        if request.cmd == "checkpoint":
            self.save(blocking=False, id=request.id)
        elif request.cmd == "set_lr":
            self._set_lr(float(request.args["lr"]), by="user", id=request.id)
        elif request.cmd == "pause":
            self._pause(request)
        elif request.cmd == "resume":
            self.emit(rec.Note(message="already running", step=step, id=request.id))
        elif request.cmd == "stop":
            save = bool(request.args.get("save", True))
            raise Stop("finished", 0, f"stopped by the user at step {step}", save=save, id=request.id)
        elif request.cmd == "preempt":
            raise Stop("preempted", 75, f"preempted at step {step}", id=request.id)
        else:
            self.emit(rec.Note(message=f"unknown command {request.cmd!r}", step=step, id=request.id))

    def _pause(self, request: Request) -> None:
        """Stand still until `resume` (or an end). Ranks meet many times a second, so no collective times out."""
        self.emit(rec.Run(state="paused", reason=f"paused at step {self.progress.step}", id=request.id))
        self._section("paused", self.progress.step)
        while True:
            self._settle_saves()
            while self.pending:
                other = self.pending.popleft()
                if other.cmd == "resume":
                    world, total = self.comm.world_size, self.total_steps
                    self.emit(rec.Run(state="running", total_steps=total, world=world, id=other.id))
                    return
                if other.cmd == "pause":
                    self.emit(rec.Note(message="already paused", step=self.progress.step, id=other.id))
                else:
                    self._obey(other)
            time.sleep(0.05)
            self.pending.extend(self.control.agree())

    def _end(self, stop: Stop) -> None:
        """Save what a stop wants saved."""
        if stop.state != "failed":
            self.emit(rec.Run(state="stopping", reason=stop.reason))
        if stop.save and self.progress.step and self.saved_step != self.progress.step:
            self._settle_saves(wait=True)
            self.save(blocking=True)

    def adjust_learning_rate(self, new_lr: float) -> None:
        """Give the next step the rate `new_lr`; later steps keep the schedule's shape. Recorded and saved."""
        self._set_lr(new_lr, by="user")

    def _set_lr(self, lr: float, by: str, id: str | None = None) -> None:
        if self.schedule is None:
            raise RuntimeError("adjust_learning_rate works while training; set learning_rate before")
        step = self.progress.step + 1
        if step > self.total_steps or self.schedule.shape(step) < 1e-6:
            message = f"learning rate not changed: step {step} is behind the end, or its rate in the schedule is 0"
            self.emit(rec.Note(message=message, step=self.progress.step, id=id))
            return
        if by == "user":  # a newer choice: what was set in an abandoned branch does not come back
            self.replay = {}
        before = self.schedule.lr(step)
        self.schedule.set_lr(step, lr)
        self.emit(rec.Change(what="learning_rate", step=step, before=before, after=lr, by=by, id=id))

    def back_to_boundary(self) -> bool:
        """After an error inside a step: undo what it did, if it has not changed weights yet. Then the boundary may be saved."""
        if self.at_boundary or self.step_rng is None:
            return self.at_boundary
        for parameter in self.model.parameters():
            parameter.grad = None
        restore_torch_rng(self.step_rng)
        self.at_boundary = True
        return True

    # ---- checkpoints ----------------------------------------------------------------------------------------------------

    def save(self, *, blocking: bool = False, id: str | None = None) -> None:
        """Checkpoint the state at this boundary. A failure is recorded and alarms; training goes on."""
        if self.manager is None:
            return
        from .state import payload

        self._section("save", self.progress.step)
        self.saved_step = self.progress.step
        self._report(self.manager.save(payload(self), blocking=blocking or not self.config.async_save, id=id))

    def _settle_saves(self, wait: bool = False) -> None:
        if self.manager is not None:
            self._report(self.manager.wait() if wait else self.manager.poll())

    def _report(self, results: Any) -> None:
        for result in results or []:
            self.emit(
                rec.Checkpoint(
                    step=result.step,
                    path=result.path.name if result.path else None,
                    bytes=result.bytes,
                    seconds=result.seconds,
                    blocking=result.blocking_seconds,
                    verified=result.verified,
                    best=result.best,
                    failed=result.failed,
                    id=result.id,
                )
            )
            for note in result.notes:
                self.emit(rec.Note(step=result.step, message=note))
            if result.failed:
                self.saved_step = 0
                message = f"checkpoint of step {result.step} failed: {result.failed}"
                self.emit(rec.Alert(severity="critical", code="checkpoint_failed", message=message, step=result.step))

    # ---- figures --------------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any, max_batches: int = 100) -> dict[str, float]:
        """`loss`, `perplexity`, `bits_per_byte`, `accuracy`, `tokens` over at most `max_batches` global batches (0 = all)."""
        store = getattr(eval_dataset, "store", eval_dataset)
        if self.bytes_V is None:
            self.bytes_V = token_bytes_V(self.tokenizer, self.model.config.vocab_size)
        config = self.config.model_copy(update={"batch_size": self.progress.eval_batch or self.config.batch_size})
        loader = EvalLoader(store, config, self.comm.rank, self.comm.world_size, self.config.batch_size, max_batches)
        return evaluate(self.model, loader, self.comm, self.bytes_V, self.precision.context)

    def get_memory_stats(self) -> dict[str, Any]:
        """Bytes in use: `device` (allocated, reserved, peak, total), `host` (rss, available, total), `components`."""
        return memory.memory_stats(self.model, self.engine.state_tensors(), self.comm.device)

    def debug_training_setup(self) -> dict[str, Any]:
        """How this rank is set up, as a dictionary that is also printed: device, ranks, batch, precision, versions."""
        from .state import setup_report

        report = setup_report(self)
        for name, value in report.items():
            print(f"{name:<28} {value}")
        return report

    def _section(self, name: str, step: int) -> None:
        if self.channel is not None:
            self.channel.report(step, name)
