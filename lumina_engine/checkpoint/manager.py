"""CheckpointManager: the checkpoints of one run, saved, found, loaded.

All ranks call every method at the same step boundary; collectives happen only inside these calls, on the caller's thread. An
asynchronous save copies to host memory in `save` and writes in one thread; a later `poll` collects the votes of the ranks, and
rank 0 commits. A save that fails is a result, never an exception: training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .backup import Rewinds, backup_folder
from .files import CheckpointError, require_unlinked
from .keep import (
    Found,
    clean_stale,
    leased,
    list_steps,
    newest_valid,
    quarantine,
    rewind,
)
from .loading import load_model
from .payload import Loaded, Payload, belongs_to, read_loaded, shape_of
from .plain import LoadedEpoch, apply, payload_of, tokenizer_of
from .resolve import resolve_checkpoint
from .resume import check_config, check_ledger, check_nothing_lost, run_id_of, run_identity
from .saving import Comm, LocalComm, Saver, SaveResult, first_error, why
from .tensors import capture_rng, pack, restore_rng, unpack
from .verify import read_manifest, require, step_name, step_of, verify

__all__ = [
    "CheckpointError", "CheckpointManager", "Comm", "Loaded", "LoadedEpoch", "LocalComm", "Payload", "SaveResult",
    "capture_rng", "load_model", "pack", "resolve_checkpoint", "restore_rng", "unpack",
]  # fmt: skip


class CheckpointManager:
    """Owns `checkpoints/`, `backups/` and `emergency/` of one run directory. Constructing it touches no file.

    Args:
        config: a Config (reads keep_checkpoints, async_save, best_metric, backup_every_n_hours, max_backup_count, backup_path,
            enable_emergency_save, experiment_name).
        run_dir: path of the run directory, or an object with `.path`. None: `<runs root>/<experiment_name>`.
        comm: the process group; one process if left out.
        run_id: what manifests and the ledger call this run; by default `id` of run.json, else the run directory's path.
        sync_log: called on rank 0 before each commit, so that a checkpoint is never ahead of its log.
        clock: unix seconds; decides when a backup is due.
        rewinds: (seq, to_step) of each rewind in the run's log; asked where a backup may be of an abandoned branch.
    """

    def __init__(
        self,
        config: Any,
        run_dir: Any = None,
        comm: Comm | None = None,
        *,
        run_id: str | None = None,
        sync_log: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.time,
        rewinds: Rewinds = tuple,
    ) -> None:
        self.config = config
        self.comm: Comm = comm if comm is not None else LocalComm()
        self.run_dir = _run_path(run_dir, config)
        self.checkpoints, self.backups, self.emergency_dir = (
            self.run_dir / name for name in ("checkpoints", "backups", "emergency")
        )
        self.notes: list[str] = []  # what `recover` met: checkpoints set aside, a pointer mended
        self._run_id, self._made = run_id, clock()
        self._tokenizer: dict[str, str] | None = None
        if config.backup_path is not None:
            self.backups = backup_folder(config.backup_path, self.run_dir, self.run_id)
        self._saver = Saver(
            config, self.checkpoints, self.backups, self.comm, lambda: self.run_id, sync_log, clock, self._run_started, rewinds
        )

    @property
    def run_id(self) -> str:
        """Name of this run in manifests and in the ledger."""
        if self._run_id is None:
            # a plain script has no run.json; its path is what tells its checkpoints from others
            self._run_id = run_id_of(self.run_dir)
        return self._run_id

    def _run_started(self) -> float:
        """When the run was made, so that restarts do not put its first backup off for ever."""
        created = run_identity(self.run_dir).get("created")
        return float(created) if isinstance(created, int | float) else self._made

    # ---- save ----------------------------------------------------------------------------------------------------------------

    def save(
        self, payload: Payload, blocking: bool = True, *, best: bool | None = None, id: str | None = None
    ) -> list[SaveResult]:
        """Save this step boundary.

        Args:
            blocking: True writes and commits before returning; False copies to host memory and returns
                (`async_save: false` makes every save blocking). One save is in flight at a time: a second one waits for it.
            best: True moves `best` here, False does not; None moves it for a lower loss when `best_metric` is loss (for
                eval_loss `mark_best` decides, after the evaluation).
            id: of the command that asked for it; stands in the result.

        Returns:
            results that no call has returned yet: each save is told exactly once, by `save`, `poll`, `wait` or `close`.
        """
        self._saver.start(self.checkpoints, payload, blocking or not self.config.async_save, best, id)
        return self._saver.take()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._saver.in_flight

    def poll(self) -> list[SaveResult]:
        """Call at every step boundary: drives a save in flight; returns the results since the last call."""
        return self._saver.poll()

    def wait(self) -> list[SaveResult]:
        """As `poll`, after waiting for the save in flight."""
        self._saver.drain()
        return self._saver.poll()

    @property
    def backing_up(self) -> bool:
        """Whether a copy to the backups is under way in this process, for which `close` waits."""
        return self._saver.backups.copying is not None

    def hold_backups(self) -> None:
        """Start no copy to the backups from here on: the process is about to leave. One under way goes on until it does."""
        self._saver.backups.held = True

    def close(self) -> list[SaveResult]:
        """Finish the save and the backup in flight and return what `poll` has not. The manager holds nothing else open."""
        results = self.wait()
        self._saver.backups.wait()
        return results

    def take_notes(self) -> list[str]:
        """What should be shown and belongs to no save's result: a pointer or a backup that could not be written. Told once."""
        notes = list(self._saver.notes)
        del self._saver.notes[: len(notes)]
        return notes

    def abandon(self) -> None:
        """After an error that the other ranks may not share: wait for this rank's writer, without any collective.

        A save that the ranks have not agreed on stays uncommitted; the next start removes its staging.
        """
        self._saver.abandon()

    def mark_best(self, step: int, value: float | None = None) -> bool:
        """Let `best` point to the committed checkpoint of that step (waits for its save).

        Args:
            value: of `best_metric` there; then only if it is lower than that of the checkpoint which `best` names. Later
                manifests tell it.

        Returns:
            False: there is no such checkpoint, or a better one.
        """
        return self._saver.mark_best(step, value)

    def know_best(self, values: Mapping[int, float]) -> None:
        """Take the value of the checkpoint that `best` names from `values` (step -> `best_metric`), if no manifest told it.

        A step is saved before it is evaluated, so the manifest of the newest checkpoint does not have its own eval_loss.
        """
        name = self._saver.best_name if self.comm.rank == 0 else None
        if name is not None and self._saver.best_value is None:
            self._saver.best_value = values.get(step_of(name) or 0)

    def emergency(self, payload: Payload) -> Path:
        """Save to `emergency/` in the same format; touches no other checkpoint. A step that is safe already is not saved twice.

        Raises:
            CheckpointError: it could not be saved.
        """
        name = step_name(payload.step)
        self._saver.drain()
        if name in self._saver.verified and (self.checkpoints / name).is_dir():
            return self.checkpoints / name
        path = self.emergency_dir / name
        if path.is_dir():
            if verify(path).ok:
                return path
            quarantine(path)
        return self._save_now(self.emergency_dir, payload, best=False)

    def emergency_save(
        self,
        *,
        model: nn.Module,
        optimizer: Any = None,
        scheduler: Any = None,
        global_step: int = 0,
        current_epoch: int = 0,
        metrics: Mapping[str, Any] | None = None,
    ) -> Path | None:
        """`emergency` for plain torch objects.

        Returns:
            the path; None when `enable_emergency_save` is off.

        Raises:
            CheckpointError: it could not be saved.
        """
        if not self.config.enable_emergency_save:
            return None
        return self.emergency(self._plain(model, optimizer, scheduler, global_step, current_epoch, metrics))

    def _save_now(self, folder: Path, payload: Payload, best: bool) -> Path:
        """Save, and raise instead of returning a failed result. Results of earlier saves stay for `poll`."""
        self._saver.drain()
        earlier = self._saver.take()
        self._saver.start(folder, payload, True, best, None)
        *_, result = self._saver.take()
        self._saver.put_back(earlier)
        if result.failed is not None or result.path is None:
            raise CheckpointError(f"step {payload.step} was not saved: {result.failed}")
        return result.path

    # ---- plain torch ---------------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        *,
        model: nn.Module,
        optimizer: Any = None,
        scheduler: Any = None,
        global_step: int,
        current_epoch: int = 0,
        metrics: Mapping[str, Any] | None = None,
        is_best: bool = False,
    ) -> Path:
        """Commit plain torch objects and the random state; returns the path. `is_best` moves the pointer `best`.

        Raises:
            CheckpointError: nothing was committed, and why.
        """
        payload = self._plain(model, optimizer, scheduler, global_step, current_epoch, metrics)
        path = self._save_now(self.checkpoints, payload, best=is_best)
        self._saver.backups.wait()  # a script may end right after this, and the copy's thread with it
        return path

    def _plain(self, model: nn.Module, optimizer: Any, scheduler: Any, step: int, epoch: int, metrics: Any) -> Payload:
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.config, model)
        return payload_of(model, optimizer, scheduler, step, epoch, dict(metrics or {}), self._tokenizer)

    def load_checkpoint(
        self,
        *,
        checkpoint_path: str | Path | None = None,
        model: nn.Module,
        optimizer: Any = None,
        scheduler: Any = None,
        strict: bool = False,
    ) -> LoadedEpoch:
        """Load into plain torch objects and restore the random state; None takes the newest valid checkpoint of this run.

        Nothing is changed unless every weight fits. `strict=False` may leave out optimizer and scheduler state that the
        checkpoint does not have; `.report` says what was restored and what was not.

        Returns:
            the epoch, an int with `.step .tokens .metrics .report`.

        Raises:
            CheckpointError: no such checkpoint (the run's best one is named), damaged, or of another architecture (the
                differences are named).
        """
        if checkpoint_path is None:
            path = self.recover(clean=False)
            if path is None:
                raise CheckpointError(f"no checkpoint in {self.checkpoints} yet")
        else:
            path = resolve_checkpoint(str(checkpoint_path), self.run_dir.parent)
        loaded = self.load(path, same_config=False)
        return apply(loaded, model, optimizer, scheduler, strict)

    # ---- start-up ------------------------------------------------------------------------------------------------------------

    def recover(self, clean: bool = True, known: Found | None = None) -> Path | None:
        """Find the checkpoint to go on from: the newest one whose every digest is right, in checkpoints/ or emergency/.

        Damaged ones on the way are renamed `*.corrupt` and told in `notes`. None: this run never committed one.

        Args:
            clean: also delete stale staging and trash; only for the holder of the run's lock.
            known: what the same start has found before (rank 0's counts).

        Raises:
            CheckpointError: there is something like a checkpoint, but none is valid, or a folder of them is a link (nothing was
                changed), or a newer format.
        """
        self._saver.drain()
        return self._on_rank_0(lambda: self._recover(clean, known))

    def _recover(self, clean: bool, known: Found | None) -> Path | None:
        require_unlinked(self.checkpoints, self.emergency_dir, self.backups)
        found = newest_valid(self.checkpoints, self.emergency_dir) if known is None else known
        self.notes = [f"{name} is damaged and was set aside as {name}.corrupt: {reason}" for name, reason in found.rejected]
        if clean:
            for folder in (self.checkpoints, self.emergency_dir, self.backups):
                clean_stale(folder)
        if found.path is not None and found.path.parent == self.checkpoints:
            self._saver.verified.add(found.path.name)
        if found.report is not None:
            note = self._saver.restore_best(found.report)
            self.notes += [note] if note else []
        return found.path

    def require_new(self, logged: Iterable[int]) -> None:
        """After `recover` found nothing: refuse to start a run from scratch that has committed checkpoints before.

        Args:
            logged: steps of the verified checkpoints that the run's log tells of (rank 0's count).

        Raises:
            CheckpointError: there are, or were, checkpoints of it; nothing was changed.
        """
        self._on_rank_0(lambda: check_nothing_lost(self.checkpoints, self.backups, self.run_id, logged))

    def rewind(self, step: int) -> None:
        """Give up every checkpoint after `step`, before training goes on from it. `best` names the best of those that are left.

        Raises:
            CheckpointError: a folder could not be renamed.
        """
        self._saver.drain()
        self._saver.backups.wait()  # it may be copying what is given up

        def give_up() -> Path | None:
            self._saver.verified.difference_update(rewind(self.checkpoints, step))
            if self.emergency_dir.is_dir():  # `recover` would find a newer step of the abandoned branch there
                rewind(self.emergency_dir, step)
            self._saver.best_rewound()
            return None

        self._on_rank_0(give_up)

    def committed(self) -> list[tuple[int, bool]]:
        """(step, suspect) of each committed checkpoint of this run whose manifest is sound, newest first. No collective.

        One from before the run changed the number of its experts is none of them: this model cannot take its weights.
        """
        found = []
        for name in list_steps(self.checkpoints):
            report = read_manifest(self.checkpoints / name)
            if report.ok and self._fits(self.checkpoints / name):
                flags = report.manifest.get("flags")
                found.append((int(report.manifest["step"]), bool(isinstance(flags, dict) and flags.get("suspect"))))
        return found

    def _fits(self, path: Path) -> bool:
        """Whether a checkpoint has as many experts as the configuration, as far as can be told."""
        mine = getattr(self.config, "num_experts", None)
        try:
            return mine is None or shape_of(path).get("num_experts", mine) == mine
        except CheckpointError:
            return True  # damaged: whoever loads it says so

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / step_name(step)

    def _on_rank_0(self, action: Callable[[], Path | None]) -> Path | None:
        """Run on rank 0; every rank gets its result or its error."""
        answer: dict[str, Any] = {}
        if self.comm.rank == 0:
            try:
                answer = {"path": str(action() or ""), "notes": self.notes}
            except (CheckpointError, OSError) as problem:
                answer = {"error": why(problem)}
        answer = self.comm.all_gather(answer)[0]
        if "error" in answer:
            raise CheckpointError(answer["error"])
        self.notes = list(answer["notes"])
        return Path(answer["path"]) if answer["path"] else None

    # ---- load ----------------------------------------------------------------------------------------------------------------

    def load_latest(self) -> Loaded | None:
        """The newest valid checkpoint, or None if there never was one. Raises as `recover` and `load`."""
        path = self.recover(clean=False)
        return None if path is None else self.load(path)

    def load(self, path: str | Path, *, same_config: bool = True) -> Loaded:
        """Read a checkpoint for this rank, after comparing every digest of what this rank reads.

        The run that saved it may have had another number of ranks; `Loaded.saved_state` puts their parts together.

        Args:
            same_config: refuse a checkpoint whose shapes, data or tokenizer settings differ from this configuration's.

        Raises:
            CheckpointError: damaged, replaced, or of another configuration; on every rank alike.
        """
        loaded, error = None, None
        try:
            loaded = self._load(Path(path).resolve(), same_config)
        except (CheckpointError, OSError) as problem:
            error = why(problem)
        error = first_error(self.comm.all_gather({"error": error}))
        if error is not None or loaded is None:
            raise CheckpointError(error or f"{path} could not be read")
        return loaded

    def _load(self, path: Path, same_config: bool) -> Loaded:
        with leased(path) as folder:
            report = require(verify(path, select=belongs_to(self.comm.rank)))
            notes = check_ledger(report, self.run_id if path.parent in (self.checkpoints, self.emergency_dir) else None)
            loaded = read_loaded(folder, report, self.comm.rank)
        if same_config:
            check_config(loaded.config, self.config, path)
        loaded.notes.extend(notes)
        return loaded


def _run_path(run_dir: Any, config: Any) -> Path:
    """The run directory with links on the way resolved; nothing below it is followed."""
    if run_dir is None:
        name = getattr(config, "experiment_name", "auto")
        from ..run.directory import runs_root

        run_dir = runs_root() / (time.strftime("script-%Y%m%d-%H%M%S") if name == "auto" else name)
    return Path(getattr(run_dir, "path", run_dir)).resolve()
