"""One rank of a run: `python -m lumina_engine.training.worker RUN_DIR`, started by the supervisor or a launcher.

Order: data (tokenised before the process group exists, so that no rank waits in a collective for it), group, experts (of a run
that has changed them), model, checkpoint, loop, and at the end of a run on the built-in corpus its examination. Rank 0 is the
only writer of the metric log.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config.loading import to_yaml
from ..config.micro_batch import smaller
from ..config.schema import Config
from ..data.facts import facts_of, rows_of_run
from ..data.skip_list import SkipList
from ..monitoring import record as rec
from ..monitoring.adaptive import Back
from ..monitoring.decisions import backs_after
from ..monitoring.growth_watch import GrowthWatch
from ..monitoring.hardware import HardwareThread
from ..monitoring.log import MetricLog, read_records, surviving
from ..monitoring.say import print_error
from ..run.directory import RunDirectory
from ..run.policy import AGAIN, NO_PROGRESS, OUT_OF_MEMORY, PREEMPTED, REFUSED, USAGE
from ..run.rank import NullChannel, RankChannel
from ..run.sections import BACKUP, TOKENISE
from ..secrets import ScrubbedStream, Scrubber
from .comm import Comm
from .cuda import optimize_cuda_settings
from .memory import DoesNotFit, is_out_of_memory
from .setup import seed_all

if TYPE_CHECKING:
    from ..checkpoint.keep import Found

_NAMED_FILES = 10_000  # of the training data, whose digests a checkpoint holds to name the one that changed


class Worker:
    """The life of one rank."""

    def __init__(self, directory: RunDirectory, channel: NullChannel) -> None:
        self.directory = directory
        self.channel = channel
        self.rank = int(os.environ.get("RANK", "0"))
        self.config = Config.load(directory.config_path)
        self.log = MetricLog(directory.metrics_path, int(os.environ.get("LUMINA_INC", "1"))) if self.rank == 0 else None
        self.growth = GrowthWatch(self.config, directory.name, by_itself=channel.supervised)
        self.resume = os.environ.get("LUMINA_RESUME") == "1"
        self.accept_data_change = os.environ.get("LUMINA_ACCEPT_DATA_CHANGE") == "1"
        self.out_of_memory = os.environ.get("LUMINA_AFTER") == "out_of_memory"  # that is how the incarnation before ended
        self.trainer: Any = None
        self.manager: Any = None
        self.found: Found | None = None  # the checkpoint to go on from, where it had to be known before a model was made
        self.other_experts = False  # than config.yaml says: the run's own choice, not the user's

    def emit(self, record: Any) -> None:
        if self.log is not None:
            self.log.emit(record)
            if (advice := self.growth.observe(record)) is not None:
                self.log.emit(advice)

    def run(self) -> int:
        """Train; return the exit code. The last record says how it ended."""
        try:
            summary = self._train()
        except Exception as error:
            return self._failed(error)
        if summary["exit_code"] == AGAIN:
            return self._again(summary["reason"])
        complete = summary["state"] == "finished" and summary["step"] == summary["total_steps"]
        if complete and self.rank == 0 and self.is_sample:
            self._examine_safely()
        return self._leave(summary["state"], summary["exit_code"], summary["reason"], summary["id"])

    def _leave(self, state: str, code: int, reason: str, id: str | None = None) -> int:
        """The last record, and the last word to the supervisor."""
        self.emit(rec.Run(state=state, reason=reason, exit_code=code, id=id))
        if self.log is not None:
            self.log.close()
        self.channel.leave(code, reason)
        return code

    def _again(self, reason: str) -> int:
        """Leave, to be started again from the checkpoint with the configuration that is in force now."""
        if self.rank == 0:
            self.trainer.config.save(self.directory.config_path)
        if self.log is not None:
            self.log.close()
        self.channel.leave(AGAIN, reason)
        return AGAIN

    def _train(self) -> dict[str, Any]:
        from ..checkpoint.manager import CheckpointManager
        from ..data.store import open_data
        from ..data.tasks import data_rules
        from ..data.tokenizer import ConversationTokenizer
        from .expert_parallel import build_model
        from .trainer import EnhancedConversationTrainer

        config = self.config
        self.channel.report(0, "data")
        tokenizer = ConversationTokenizer(config.tokenizer)
        data = open_data(config, tokenizer, lambda documents, tokens: self.channel.report(documents, TOKENISE))
        self.channel.report(0, "data")  # they are there: what takes its time from here on is no tokenising
        for note in data.notes if self.rank == 0 else []:
            self.emit(rec.Note(message=note))
        settings = optimize_cuda_settings(config.deterministic)
        if settings and self.rank == 0:
            self.emit(rec.Note(message="CUDA settings: " + ", ".join(f"{name} {value}" for name, value in settings.items())))
        comm = Comm.start(config.communication_backend)
        self._obey_rank_0(comm)
        config = self._with_experts(config, comm)
        configured = config.batch_size
        config = self.config = self._settled(config, comm)
        model = build_model(config, comm)
        seed_all(config, comm)
        sync = self.log.sync if self.log is not None else None
        self.manager = CheckpointManager(config, run_dir=self.directory, comm=comm, sync_log=sync, rewinds=self._rewinds)
        self.tokenizer, self.is_sample = tokenizer, data.is_sample
        trainer = EnhancedConversationTrainer(
            model, tokenizer, config, self, comm=comm, manager=self.manager, channel=self.channel
        )
        self.trainer = trainer
        self._fits()
        trainer.progress.eval_batch = configured
        trainer.adaptive.name_run(self.directory.name)
        sources = data.sources if len(data.sources) <= _NAMED_FILES else {}
        made_of = {"data_sources": sources, "data_rules": data_rules()}
        trainer.extra_state = lambda: {**self._log_position(), **made_of}
        trainer.sync_log = sync or trainer.sync_log
        acts = config.use_moe and config.adaptive == config.expert_growth == "act"
        if acts and comm.broadcast(self.channel.supervised):  # ranks of a machine started by hand have no channel of their own
            trainer.growth = self._wanted_experts
        trainer.control.install_signals()
        trainer.prepare(data.train, data.eval)
        self._tell_data()
        if self.resume:
            self._restore(data)
        self._write_resolved()
        hardware = HardwareThread(self.emit, config.hardware_interval_s, self.directory.path) if self.rank == 0 else None
        if hardware is not None:
            hardware.start()
        try:
            summary = trainer.train(data.train, data.eval)
        except BaseException:
            self.manager.abandon()  # the other ranks may be elsewhere: no collective from here on
            raise
        finally:
            if hardware is not None:
                hardware.stop()
        self._close(preempted=summary["exit_code"] == PREEMPTED)
        return summary

    def _close(self, preempted: bool = False) -> None:
        """Wait for the save and the backup in flight; a backup in a section of its own: no other tells how long it takes.

        A rank that is preempted has no time for a slow disk: it leaves a copy half-done, and the next start removes it.
        """
        if preempted:
            self.manager.wait()
            if self.manager.backing_up:
                self.emit(rec.Note(message="a backup was being copied: it is given up, since the run is preempted"))
        else:
            if self.manager.backing_up:
                self.channel.report(self.trainer.progress.step, BACKUP)
            self.manager.close()
        for note in self.manager.take_notes():  # of a backup that failed after the last step
            self.emit(rec.Alert(severity="warning", code="checkpoint_note", message=note))

    def _tell_data(self) -> None:
        """What becomes of the data in rows."""
        if self.rank == 0:
            plan = self.trainer.plan
            for line in facts_of(plan, rows_of_run(plan, self.trainer.config, self.trainer.comm.world_size)).lines():
                self.emit(rec.Note(message=f"data: {line}"))

    def _obey_rank_0(self, comm: Comm) -> None:
        """Start as rank 0 was told to: a machine that was started by hand has no supervisor to tell its ranks. A collective."""
        told = [self.resume, self.accept_data_change, self.out_of_memory]
        self.resume, self.accept_data_change, self.out_of_memory = comm.broadcast(told)

    def _with_experts(self, config: Config, comm: Comm) -> Config:
        """The configuration of this start with as many experts as the checkpoint has that it goes on from."""
        if self.resume and config.use_moe:
            from .experts import experts_in_force

            sync = self.log.sync if self.log is not None else lambda: None
            settled, self.found = experts_in_force(config, comm, self.directory, self.emit, sync, self.channel.report)
            self.channel.report(0, "data")  # what ends this rank from here on is no matter of the rewriting
            self.other_experts = settled.num_experts != config.num_experts
            config = self.config = settled
            self.growth.use(config)
        return config

    def _fits(self) -> None:
        """The model has passed its dry run: what its experts were before is not needed any more."""
        if self.found is not None:
            from .experts import drop_former

            drop_former(self.found, self.directory, self.emit)

    def _way_back(self) -> str:
        """What to add where memory ran out, if the run has grown at the checkpoint that it went on from."""
        if self.found is None:
            return ""
        from .experts import way_back

        return way_back(self.found, self.directory)

    def _wanted_experts(self) -> rec.Change | None:
        """The change of the number of experts that this boundary's checkpoint is to be rewritten for; rank 0 knows.

        None while a spike is open: that checkpoint would be a suspect one, and the only one that the run could go back to.
        """
        trainer = self.trainer
        if self.rank != 0 or trainer.guard.open_since is not None:
            return None
        return self.growth.wanted(trainer.progress.step, trainer.adaptive.spent)

    def _settled(self, config: Config, comm: Comm) -> Config:
        """The micro batch of this start; what recovery chose is written down before anything can go wrong with it."""
        from .settle import Settler

        settler = Settler(config, comm, self.emit, self.channel.report)
        if not self.out_of_memory:
            return settler.settle(tune=not self.resume)
        config = settler.after_out_of_memory(self.directory.newest_step() or 0)
        if self.rank == 0:
            config.save(self.directory.config_path)
        return config

    def _log_position(self) -> dict[str, int]:
        """What a manifest says of the log: the incarnation and the last record before the checkpoint."""
        return {} if self.log is None else {"inc": self.log.inc, "log_seq": self.log.seq}

    def _restore(self, data: Any) -> None:
        """Go on from the newest checkpoint that passes its digests; a run that never committed one starts at step 0."""
        from ..checkpoint.resume import check_tokenizer
        from ..data.tasks import why_other_rows
        from .adaptive import rewind_to
        from .proof import resume_proof
        from .state import restore

        path = self.manager.recover(known=self.found)
        for note in self.manager.notes:
            self.emit(rec.Alert(severity="critical", code="checkpoint_damaged", message=note))
        if path is None:
            self.manager.require_new(self._logged_checkpoints())
            self._catch_up(0, None)
            if self.log is not None and self._logged_step() > 0:
                self.emit(rec.Rewind(to_step=0, reason="no checkpoint yet: starting again at step 0"))
            return
        loaded = self.manager.load(path)
        for note in loaded.notes:
            self.emit(rec.Alert(severity="warning", code="checkpoint_note", message=note))
        check_tokenizer(loaded.tokenizer, self.tokenizer, path)
        saved = loaded.global_state.get("data_fingerprint")
        changed = saved != data.train.fingerprint
        if changed and not self.accept_data_change:
            why, fix = why_other_rows(loaded.global_state, data.sources)
            raise Refused(
                f"{path.name} cannot be resumed: {why}; data fingerprint {str(saved)[:16]} then, "
                f"{data.train.fingerprint[:16]} now; {fix}, start a new run, or go on with other rows in another order by "
                "--accept-data-change, which every later checkpoint will say"
            )
        self.manager.rewind(loaded.step)
        self.manager.know_best(self._logged_losses())
        restore(self.trainer, loaded)
        self._catch_up(loaded.step, loaded.global_state.get("log_seq"))
        if changed:
            self._override_data(loaded.step, str(saved), data.train.fingerprint)
        self.emit(rewind_to(loaded, f"resumed from {path.name}"))
        self.emit(resume_proof(self.trainer, loaded))

    def _override_data(self, step: int, before: str, after: str) -> None:
        """Other data under the same position: told now and in every later manifest. Old row numbers mean nothing there."""
        self.trainer.overrides.append({"what": "data", "step": step, "before": before, "after": after})
        self.trainer.recovery.skip = SkipList()
        message = f"the training data is not that of step {step}: {before[:16]} then, {after[:16]} now (--accept-data-change)"
        advice = "the run is no exact resume; its position stays, its rows and their order are those of the new data"
        self.emit(rec.Alert(severity="warning", code="data_changed", message=message, recommendation=advice, step=step))

    def _logged_step(self) -> int:
        """The last step of which the log has anything."""
        kinds = rec.Step | rec.Eval | rec.Experts | rec.Checkpoint
        records = read_records(self.directory.metrics_path, ("step", "eval", "experts", "checkpoint"))
        return max((r.step for r in records if isinstance(r, kinds)), default=0)

    def _logged_checkpoints(self) -> list[int]:
        """Steps of the verified checkpoints in the log; rank 0 alone has it."""
        records = read_records(self.directory.metrics_path, ("checkpoint",)) if self.log is not None else ()
        return [r.step for r in records if isinstance(r, rec.Checkpoint) and r.verified]

    def _logged_losses(self) -> dict[int, float]:
        """What `best` follows where no manifest may tell it, of each step in the log; rank 0 alone has it."""
        if self.log is None or self.config.best_metric != "eval_loss":
            return {}
        records = surviving(read_records(self.directory.metrics_path, ("eval", "rewind")))
        return {r.step: r.loss for r in records if isinstance(r, rec.Eval) and r.loss is not None and math.isfinite(r.loss)}

    def _rewinds(self) -> list[tuple[int, int]]:
        """(seq, to_step) of each rewind in the log."""
        records = read_records(self.directory.metrics_path, ("rewind",))
        return [(r.seq, r.to_step) for r in records if isinstance(r, rec.Rewind)]

    def _catch_up(self, step: int, seq: int | None) -> None:
        """What the log knows beyond the checkpoint of `step`: the user's rates after it, rollbacks since, and what they cost.

        `seq` is the last record before that checkpoint. None: there are no rollbacks since.
        """
        from .history import rates_after, rollbacks_after

        records: list[rec.Record] = []
        if self.log is not None:
            records = list(read_records(self.directory.metrics_path, ("alert", "change", "rewind")))
            kinds = ("experts", "eval", "rewind", "change", "alert")
            self.growth.replay(read_records(self.directory.metrics_path, kinds))
        rollbacks = rollbacks_after(records, seq)
        mine = {
            "rates": list(rates_after(records, 0).items()),
            "rollbacks": [[item.to_step, item.failed_step, item.skip] for item in rollbacks],
            "backs": [[back.to_step, back.decision, back.dropped] for back in backs_after(records, seq)],
        }
        shared = self.trainer.comm.broadcast(mine)
        trainer = self.trainer
        trainer.boundary.rates = {int(at): float(rate) for at, rate in shared["rates"]}
        trainer.boundary.replay = {at: rate for at, rate in trainer.boundary.rates.items() if at > step}
        trainer.adaptive.catch_up((Back(*back) for back in shared["backs"]), step)
        trainer.recovery = trainer.recovery.after(
            rec.Rewind(to_step=to_step, failed_step=failed, skip=skip) for to_step, failed, skip in shared["rollbacks"]
        )

    def _write_resolved(self) -> None:
        """The run's config.yaml and deepspeed.json say what is in force, also what only the data could decide.

        A full disk costs them, not the run: a later start decides the same again.
        """
        if self.rank != 0:
            return
        trainer = self.trainer
        texts = {self.directory.config_path: to_yaml(trainer.config)}
        if trainer.ds_config is not None:
            texts[self.directory.deepspeed_path] = json.dumps(trainer.ds_config, indent=2) + "\n"
        for path, text in texts.items():
            try:
                if not path.exists() or path.read_text(encoding="utf-8") != text:
                    write_private(path, text)
            except OSError as error:
                message = f"{path.name} cannot be written: {error.strerror}; it does not say all that is in force"
                self.emit(rec.Alert(severity="warning", code="config_not_written", message=message))

    def _examine_safely(self) -> None:
        """The run is finished and saved, whatever happens in its examination."""
        try:
            self._examine()
        except Exception as error:
            print_error(error)  # engine.log
            message = f"the held-out questions could not be asked: {type(error).__name__}: {error}"
            self.emit(rec.Alert(severity="warning", code="examination_failed", message=message))

    def _examine(self) -> None:
        """Ask the finished model the held-out questions of the built-in corpus, through the chat path.

        The last checkpoint, not the best one: `best` was chosen by the loss on these very questions.
        """
        from ..chat.grade import grade_sample
        from ..checkpoint.manager import load_model, resolve_checkpoint

        begin = time.monotonic()
        self.channel.report(self.trainer.progress.step, "examination")
        path = resolve_checkpoint(f"{self.directory.path.name}@latest", self.directory.path.parent)
        model, tokenizer, _ = load_model(path)
        result = grade_sample(model, tokenizer)
        target = self.directory.reports / "sample_eval.json"
        target.parent.mkdir(mode=0o700, exist_ok=True)
        write_private(target, json.dumps(result, indent=2) + "\n")
        skills = ", ".join(f"{name} {s['correct']}/{s['asked']}" for name, s in result["skills"].items())
        seconds = time.monotonic() - begin
        self.emit(
            rec.Note(
                step=self.trainer.progress.step,
                message=f"held-out exact match {100 * result['overall']:.1f} % ({path.name}, {seconds:.0f} s): {skills}",
            )
        )

    def _failed(self, error: Exception) -> int:
        """Say why. Errors that a restart would meet again end the run; the others leave it to the supervisor to restart."""
        code = expected_exit_code(error)
        if is_out_of_memory(error) and code in (None, USAGE):
            return self._ran_out(error)
        if code is None:
            print_error(error)  # engine.log
            sys.stderr.flush()
            self._emergency_save()
        reason = str(error) if code is not None else f"{type(error).__name__}: {error}"
        if code is None:  # the supervisor records the crash, and decides about a restart
            if self.log is not None:
                self.log.close()
            self.channel.leave(1, reason)
            return 1
        return self._leave("failed", code, " ".join(reason.split()) + (self._way_back() if is_out_of_memory(error) else ""))

    def _ran_out(self, error: Exception) -> int:
        """Out of memory: leave the supervisor to start again with a smaller micro batch, or say that there is none.

        A first dry run that does not fit is the user's to mend, unless the batch or the experts were Lumina's own choice.
        """
        config = self.config
        chosen = self.out_of_memory or config.dynamic_batching or self.other_experts
        if isinstance(error, DoesNotFit) and (error.final or not chosen):
            return self._leave("failed", USAGE, str(error) + self._way_back())
        print_error(error)  # engine.log
        sys.stderr.flush()
        words = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        reason = f"out of memory with micro batches of {config.batch_size} rows: {words}"
        traceback.clear_frames(error.__traceback__)  # they hold the activations of the step
        gc.collect()
        self._emergency_save()
        if smaller(config) is None:
            from .settle import no_room

            return self._leave("failed", NO_PROGRESS, no_room(config) + self._way_back())
        if self.log is not None:
            self.log.close()
        self.channel.leave(OUT_OF_MEMORY, reason)
        return OUT_OF_MEMORY

    def _emergency_save(self) -> None:
        """Save the last boundary beside the checkpoints, never in place of one; a step that has changed no weight is undone.

        Of one rank only: the others may be gone, or at another step.
        """
        trainer = self.trainer
        usable = trainer is not None and trainer.schedule is not None and trainer.progress.step > 0
        if not (usable and self.config.enable_emergency_save and trainer.comm.world_size == 1 and trainer.back_to_boundary()):
            return
        from .state import payload

        try:
            path = self.manager.emergency(payload(trainer))
        except Exception as second:
            self.emit(rec.Alert(severity="critical", code="emergency_save_failed", message=str(second)))
            return
        self.emit(rec.Note(step=trainer.progress.step, message=f"emergency save: {path}"))


class Refused(Exception):
    """Foreign or changed data: the run is not started."""

    exit_code = REFUSED


def expected_exit_code(error: BaseException) -> int | None:
    """The exit code of an error that is the user's to mend; None for a defect or a fault of the machine."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    named = {"ConfigError": 2, "DataError": REFUSED, "CheckpointError": REFUSED, "TokenizerError": 2}
    return next((named[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in named), None)


def write_private(path: Path, text: str) -> None:
    """Replace a small file in one step, readable by its owner only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def main() -> int:
    scrubber = Scrubber()
    sys.stdout = ScrubbedStream(sys.stdout, scrubber)
    sys.stderr = ScrubbedStream(sys.stderr, scrubber)
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    channel = RankChannel.from_environment()
    try:
        worker = Worker(RunDirectory(Path(sys.argv[-1])), channel)
    except Exception as error:
        print_error(error)
        return expected_exit_code(error) or 1
    code = worker.run()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
