"""One save at a time: preflight, host copy, writing, vote, commit, read back, pointers, retention.

Collectives happen only on the caller's thread (`start`, `poll`, `drain`, `mark_best`), in the same order on every rank. The
writer thread only writes files, and on rank 0 commits. A save that fails is a result, never an exception: training goes on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import __version__
from . import ledger
from .backup import Backups, Rewinds
from .best import best_values, finite
from .commit import Staging, commit
from .compress import plain_names
from .files import CheckpointError, FileEntry, dump_json
from .keep import drop_overtaken, drop_pointer, drop_rewound, good_names, pointer, quarantine, retain, set_pointer
from .payload import Payload, PlannedFile, plan_files, required_files, write_files
from .tensors import pack
from .verify import Report, read_manifest, step_name, step_of, verify

KEEP_EMERGENCY = 2


class Comm(Protocol):
    """What checkpoints ask of the process group. Objects are JSON values; every rank gets the list in rank order."""

    rank: int
    world_size: int

    def all_gather(self, value: Any) -> list[Any]: ...

    def barrier(self) -> None: ...


class LocalComm:
    """One process."""

    rank = 0
    world_size = 1

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How a save ended, the same on every rank. `failed` says why there is no checkpoint; all else stays as it was.

    seconds: of preparing, writing (the slowest rank) and committing; a save whose end waited for the next boundary is no slower
    for that. span_seconds: from the call until its end was noticed, such waits included. blocking_seconds: for which training
    stood still. `notes` tell of trouble after the commit (retention, pointers), which costs nothing but should be shown. `id`
    is the command's, as given to `save`. `again`: the step was safe before, so its seconds are none of a save.
    """

    step: int
    path: Path | None = None
    bytes: int = 0
    seconds: float = 0.0
    span_seconds: float = 0.0
    blocking_seconds: float = 0.0
    verified: bool = False
    failed: str | None = None
    best: bool = False
    again: bool = False
    id: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Save:
    """A save in flight. The writer thread fills `entries`, `error`, `outcome`, `work`; the others read them after its end."""

    payload: Payload  # without its tensors
    folder: Path
    plan: list[PlannedFile]
    manifest: dict[str, Any]
    staging: Staging
    best: bool | None
    inline: bool
    id: str | None
    started: float
    work: float = 0.0  # seconds of preparing, writing and committing so far
    blocking: float = 0.0
    committing: bool = False
    writing: Future[None] | None = None
    entries: list[FileEntry] | None = None
    error: str | None = None
    outcome: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        return self.payload.step

    @property
    def busy(self) -> bool:
        return self.writing is not None and not self.writing.done()


class Saver:
    """Saves into `checkpoints` (and other folders) for all ranks; see `manager.CheckpointManager` for the arguments."""

    def __init__(
        self,
        config: Any,
        checkpoints: Path,
        backups: Path,
        comm: Comm,
        run_id: Callable[[], str],
        sync_log: Callable[[], None] | None,
        clock: Callable[[], float],
        run_started: Callable[[], float],
        rewinds: Rewinds = tuple,
    ) -> None:
        self.config, self.checkpoints, self.comm = config, checkpoints, comm
        self._clock = clock
        self.notes: list[str] = []  # rank 0: trouble that belongs to no save, or came after its result
        self.backups = Backups(config, checkpoints, backups, clock, run_started, self.notes.append, rewinds)
        self.verified: set[str] = set()  # names whose digests this process has compared
        self.best_value: float | None = None
        self._owed_best: str | None = None  # `best` should name this step, and could not be written yet
        self._run_id, self._sync_log = run_id, sync_log
        self._writer = writer_thread()
        self._job: _Save | None = None
        self._results: list[SaveResult] = []

    # ---- from the call to the writer -----------------------------------------------------------------------------------------

    def start(self, folder: Path, payload: Payload, inline: bool, best: bool | None, id: str | None) -> None:
        """Begin a save; with `inline` also finish it. All ranks."""
        started = time.monotonic()
        self.drain()
        job = self._begin(folder, payload, inline, best, id, started, time.monotonic())
        if job is None:
            return
        self._job = job
        if inline:
            self._write(job)
            self.drain()
            return
        self._start(job, self._write)
        job.blocking = time.monotonic() - started

    def _begin(
        self, folder: Path, payload: Payload, inline: bool, best: bool | None, id: str | None, started: float, begun: float
    ) -> _Save | None:
        """Preflight of all ranks and the staging folder; None: it ended here, with a result.

        Before `begun` the call waited for the save in flight.
        """
        rank, step = self.comm.rank, payload.step
        plan: list[PlannedFile] = []
        manifest: dict[str, Any] = {}
        error = None
        try:
            config = config_dict(self.config)
            packing = getattr(self.config, "checkpoint_compression", "none")
            plan = plan_files(payload, rank, self.comm.world_size, config, copy=not inline, compression=packing)
            manifest = self._manifest(payload, config) if rank == 0 else {}
        except Exception as problem:  # any failure of one rank must reach the vote, or the others wait for ever
            error = why(problem)
        votes = self.comm.all_gather({"error": error, "step": step, "bytes": sum(file.size for file in plan)})
        error = first_error(votes)
        if error is None and any(vote["step"] != step for vote in votes):
            error = f"the ranks are at different steps: {[vote['step'] for vote in votes]}"
        staging = known = None
        if rank == 0 and error is None:
            try:
                known = self._known(folder, payload, best)
                staging = Staging(folder, step, sum(vote["bytes"] for vote in votes)) if known is None else None
            except (CheckpointError, OSError) as problem:
                error = why(problem)
        answer = self.comm.all_gather({"error": error, "staging": staging and staging.name, "known": known})[0]
        if answer["staging"] is None:
            ended = time.monotonic()
            outcome = {**(answer["known"] or {"failed": answer["error"]}), "seconds": ended - begun}
            self._report(step, id, outcome, ended - started, ended - started)
            return None
        staging = staging or Staging.join(folder, step, answer["staging"])
        head = Payload(
            step, payload.epoch, payload.tokens, {}, {}, {}, metrics=dict(payload.metrics), flags=dict(payload.flags)
        )
        return _Save(head, folder, plan, manifest, staging, best, inline, id, started, time.monotonic() - begun)

    def _known(self, folder: Path, payload: Payload, best: bool | None) -> dict[str, Any] | None:
        """The outcome for a step that this process has committed or verified already: saving it twice is no fault."""
        name = step_name(payload.step)
        if folder != self.checkpoints or name not in self.verified or not (folder / name).is_dir():
            return None
        if best:
            self.point_best(payload.step, self.metric(payload.metrics), always=True)
        size = read_manifest(folder / name).bytes
        best = pointer(folder, "best") == name
        return {"path": str(folder / name), "bytes": size, "verified": True, "best": best, "again": True}

    # ---- writer thread (or the caller, inline) -------------------------------------------------------------------------------

    def _write(self, job: _Save) -> None:
        """This rank's files; alone in the world, the commit too."""
        begin = time.monotonic()
        try:
            job.entries = write_files(job.plan, job.staging.write)
        except BaseException as problem:  # a thread that dies silently would leave the save in flight for ever
            job.error = why(problem)
        job.plan = []  # the host copies are not needed any more
        job.work += time.monotonic() - begin
        if self.comm.world_size == 1 and job.error is None:
            self._commit(job, job.entries or [])

    def _commit(self, job: _Save, entries: list[FileEntry]) -> None:
        """Rank 0: commit and what follows it, timed. Never raises: the outcome says what happened."""
        begin = time.monotonic()
        try:
            self._commit_now(job, entries)
        finally:
            job.work += time.monotonic() - begin

    def _start(self, job: _Save, work: Callable[[_Save], None]) -> None:
        """Begin in the writer's thread, beside training."""
        try:
            job.writing = self._writer.submit(work, job)
        except RuntimeError as problem:  # the system has no thread more
            job.error = why(problem)
            self._writer.shutdown(wait=False, cancel_futures=True)  # or its first thread would begin with this work
            self._writer = writer_thread()

    def _commit_now(self, job: _Save, entries: list[FileEntry]) -> None:
        """Commit, read back, pointers, retention."""
        notes: list[str] = []
        try:
            missing = sorted(required_files(self.comm.world_size) - plain_names(entry.path for entry in entries))
            if missing:
                raise CheckpointError(f"the ranks did not write {', '.join(missing)}")
            if self._sync_log is not None:
                self._sync_log()
            path = commit(job.staging, entries, job.manifest, lambda digest: self._record(job.step, digest, notes))
            report = verify(path, past_cache=True)
            if not report.ok:
                moved = quarantine(path)
                raise CheckpointError(f"read back and found damaged ({report.line()}); kept as {moved.name}")
        except BaseException as problem:
            job.outcome = {"failed": why(problem)}
            return
        job.outcome = {"path": str(path), "bytes": report.bytes, "verified": True, "notes": notes}
        self._record(job.step, report.digest, notes, committed=True)
        if job.folder == self.checkpoints:
            self.verified.add(path.name)
            self._after(notes, lambda: self._point(job))
        self._after(notes, lambda: self._keep(job, notes))
        if job.folder == self.checkpoints:
            self._after(notes, lambda: self.backups.copy_if_due(path))

    def _after(self, notes: list[str], action: Callable[[], object]) -> None:
        """What follows a commit: each part of it may fail without the others, and costs no checkpoint."""
        try:
            action()
        except Exception as problem:  # the checkpoint is there all the same, and this is the one place that tells
            notes.append(f"after the commit: {why(problem)}")

    def _record(self, step: int, digest: str, notes: list[str], committed: bool = False) -> None:
        run = self._run_id()
        try:
            ledger.record(run, step, digest, committed)
        except OSError as problem:
            told = f"the commit could not be recorded in {ledger.ledger_path()}: {problem.strerror}"
            if not committed and ledger.recorded(run, step) - {digest}:
                raise CheckpointError(f"{told}; it has this step with other content, so a resume would refuse it") from problem
            notes.append(told)

    def _point(self, job: _Save) -> None:
        """Pointers first, then retention: a checkpoint that `best` has just moved to must not be the one deleted."""
        # an eval_loss among the metrics is an earlier step's, since a step is saved before it is evaluated: `mark_best` decides
        value = self.metric(job.payload.metrics) if self.config.best_metric == "loss" else None
        try:
            if job.best is not False and not job.payload.flags.get("suspect"):
                moved = self.point_best(job.step, value, always=bool(job.best))
                job.outcome = {**(job.outcome or {}), "best": moved}
            if self._owed_best is not None and (self.checkpoints / self._owed_best).is_dir():
                set_pointer(self.checkpoints, "best", self._owed_best)
                self._owed_best = None
        finally:
            set_pointer(self.checkpoints, "latest", step_name(job.step))

    def _keep(self, job: _Save, notes: list[str]) -> None:
        if job.folder != self.checkpoints:
            drop_rewound(job.folder)
            retain(job.folder, KEEP_EMERGENCY, good_names(job.folder, KEEP_EMERGENCY))
            return
        drop_rewound(self.checkpoints)
        needed = (pointer(self.checkpoints, "best"), self._owed_best, self.backups.copying)
        _, busy = retain(self.checkpoints, self.config.keep_checkpoints, self.verified, [name for name in needed if name])
        notes.extend(f"{name} is being read and stays for now" for name in busy)
        drop_overtaken(self.checkpoints, self.verified)

    # ---- from the writer to the result ---------------------------------------------------------------------------------------

    def poll(self) -> list[SaveResult]:
        """Drive the save in flight and return the results since the last call. All ranks, at the same boundaries."""
        job = self._job
        if job is not None:
            started = time.monotonic()
            outcome = self._advance(job)
            job.blocking += time.monotonic() - started
            if outcome is not None:
                self._job = None
                span = time.monotonic() - job.started
                self._report(job.step, job.id, outcome, span, span if job.inline else job.blocking)
        return self.take()

    def take(self) -> list[SaveResult]:
        """Results that are there already, without looking at the save in flight. No collective."""
        results, self._results = self._results, []
        return results

    def _report(self, step: int, id: str | None, outcome: dict[str, Any], span: float, blocking: float) -> None:
        path, notes = outcome.get("path"), tuple(outcome.get("notes", ()))
        rest = {name: value for name, value in outcome.items() if name not in ("path", "notes")}
        self._results.append(
            SaveResult(
                step, Path(path) if path else None, **rest, notes=notes, span_seconds=span, blocking_seconds=blocking, id=id
            )
        )

    def put_back(self, results: list[SaveResult]) -> None:
        """Let the next `poll` return these first."""
        self._results[:0] = results

    @property
    def in_flight(self) -> bool:
        """Whether there is a save that has not ended; the same on all ranks."""
        return self._job is not None

    def drain(self) -> None:
        """Wait for the save in flight; its result stays for `poll`. All ranks."""
        while self._job is not None:
            if self._job.writing is not None:
                wait([self._job.writing])
            self._results = self.poll()

    def abandon(self) -> None:
        """Wait for this rank's writer only, and forget the save. No collective."""
        job, self._job = self._job, None
        if job is not None and job.writing is not None:
            wait([job.writing])

    def _advance(self, job: _Save) -> dict[str, Any] | None:
        """One look at the save in flight; all ranks take the same branch, since each decision follows a gathered vote."""
        if any(self.comm.all_gather(job.busy)):
            return None
        if job.writing is not None and (problem := job.writing.exception()) is not None:
            job.error = job.error or why(problem)
        if self.comm.world_size > 1 and not job.committing:
            mine = {"error": job.error, "work": job.work, "entries": [entry.to_json() for entry in job.entries or []]}
            votes = self.comm.all_gather(mine)
            job.error, job.work = first_error(votes), max(vote["work"] for vote in votes)
            if job.error is None:
                self._begin_commit(job, [FileEntry.from_json(entry) for vote in votes for entry in vote["entries"]])
                return None
        if job.error is not None:
            job.outcome = {"failed": job.error}
        if self.comm.rank == 0:
            job.outcome = self._settle(job, job.outcome or {"failed": "the writer ended without a result"})
        return self.comm.all_gather(job.outcome)[0]

    def _begin_commit(self, job: _Save, entries: list[FileEntry]) -> None:
        job.committing, job.writing = True, None
        if self.comm.rank != 0:
            return
        if job.inline:
            self._commit(job, entries)
            return
        self._start(job, lambda job: self._commit(job, entries))

    def _settle(self, job: _Save, outcome: dict[str, Any]) -> dict[str, Any]:
        """Rank 0, once the writer has ended: drop what failed."""
        left = job.staging.drop() if outcome.get("failed") else None
        outcome = {**outcome, "seconds": job.work}
        return {**outcome, "notes": [*outcome.get("notes", ()), left]} if left else outcome

    # ---- best ----------------------------------------------------------------------------------------------------------------

    def mark_best(self, step: int, value: float | None = None) -> bool:
        """See `manager.CheckpointManager.mark_best`."""
        if not self.comm.all_gather(self._is_lower(step, value))[0]:
            return False
        if self._job is not None and self._job.step == step:
            self.drain()
        known = self.comm.rank == 0 and (self.checkpoints / step_name(step)).is_dir()
        try:
            moved = known and self.point_best(step, value, always=True)
        except (OSError, CheckpointError) as problem:  # a pointer is a hint: no reason to stop training
            moved = False
            self.notes.append(f"best could not be moved to {step_name(step)}: {why(problem)}; the next commit tries again")
        return bool(self.comm.all_gather(moved)[0])

    def _is_lower(self, step: int, value: float | None) -> bool:
        """Rank 0 knows. A step that `best` names already was measured again, by a run that went back to it."""
        if value is None or self.best_value is None or value < self.best_value:
            return True
        return self.comm.rank == 0 and self.best_name == step_name(step)

    def restore_best(self, newest: Report) -> str | None:
        """Rank 0, at a start: what a new best has to be lower than, as the manifests tell; a note if the pointer is mended."""
        if self.best_name is not None:
            self.best_value = best_values(self.checkpoints, self.config.best_metric, newest).get(self.best_name)
            return None
        return self._mend_best("names no checkpoint", newest) if os.path.lexists(self.checkpoints / "best") else None

    def best_rewound(self) -> None:
        """Rank 0, after a rewind: where the best one is given up, the best of those that are left takes its place."""
        if self._owed_best is not None and not (self.checkpoints / self._owed_best).is_dir():
            self._owed_best = None
        elif self.best_name is not None or not os.path.lexists(self.checkpoints / "best"):
            return
        self.notes.append(self._mend_best("names a step that the run has gone back from"))

    def _mend_best(self, state: str, *more: Report) -> str:
        """Let `best` name the lowest value that is known of a checkpoint, else what it named before; what to tell of it."""
        values = best_values(self.checkpoints, self.config.best_metric, *more)
        name = min(values, key=lambda name: (values[name], name), default=pointer(self.checkpoints, "best"))
        try:
            if name is None:
                self.best_value = None
                drop_pointer(self.checkpoints, "best")
            else:
                self.point_best(step_of(name) or 0, values.get(name), always=True)
        except OSError as problem:  # a pointer is a hint: a full or read-only disk is no reason not to start
            return f"the pointer best {state} and could not be mended: {why(problem)}"
        return f"the pointer best {state}: {name or 'nothing'} takes its place"

    @property
    def best_name(self) -> str | None:
        """What `best` names, or will as soon as it can be written."""
        return self._owed_best or pointer(self.checkpoints, "best")

    def metric(self, metrics: dict[str, Any]) -> float | None:
        """The value of `best_metric`, if it was measured and is finite."""
        return finite(metrics.get(self.config.best_metric))

    def point_best(self, step: int, value: float | None, always: bool) -> bool:
        """Rank 0: move `best` here if the value is lower than the best one so far, or always."""
        better = value is not None and (self.best_value is None or value < self.best_value)
        if not (always or better):
            return False
        self.best_value, self._owed_best = value, step_name(step)
        set_pointer(self.checkpoints, "best", step_name(step))
        self._owed_best = None
        return True

    def _manifest(self, payload: Payload, config: dict[str, Any] | None) -> dict[str, Any]:
        name, state = self.best_name, payload.global_state
        return {
            "run": self._run_id(),
            "epoch": payload.epoch,
            "tokens": payload.tokens,
            "created": self._clock(),
            "inc": state.get("inc"),
            "log_seq": state.get("log_seq"),
            "data_fingerprint": state.get("data_fingerprint"),
            "world": self.comm.world_size,
            "layout": {
                "zero_stage": (config or {}).get("zero_stage"),
                "data_parallel": self.comm.world_size,
                "expert_parallel": (config or {}).get("expert_parallel_size"),
            },
            "config_digest": config_digest(config),
            "tokenizer": pack(payload.tokenizer, "tokenizer"),
            "versions": versions(),
            "metrics": pack(payload.metrics, "metrics"),
            "flags": pack(payload.flags, "flags"),
            "best": {"name": name, "metric": self.config.best_metric, "value": self.best_value} if name else None,
        }


def writer_thread() -> ThreadPoolExecutor:
    """One thread that lives on between saves: to start one waits until it runs, for which training would stand still."""
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")


def versions() -> dict[str, str]:
    """Versions that decide what a resumed run computes."""
    found = {"lumina": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    if "deepspeed" in sys.modules:
        found["deepspeed"] = str(sys.modules["deepspeed"].__version__)
    return found


def config_dict(config: Any) -> dict[str, Any] | None:
    """Every field of a Config with the value in force, flat; None for an object that is no Config."""
    return config.to_dict(sectioned=False) if hasattr(config, "to_dict") else None


def config_digest(config: dict[str, Any] | None) -> str | None:
    """SHA-256 of what `config_dict` gave, whatever the order of its keys."""
    return None if config is None else hashlib.sha256(dump_json(pack(config, "config"), sort=True)).hexdigest()


def why(problem: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(problem, CheckpointError):
        return str(problem)
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return f"{type(problem).__name__}: {problem}"


def first_error(votes: list[dict[str, Any]]) -> str | None:
    """The first rank's error among gathered votes, with its rank where there are several."""
    for rank, vote in enumerate(votes):
        if vote["error"] is not None:
            return vote["error"] if len(votes) == 1 else f"rank {rank}: {vote['error']}"
    return None
