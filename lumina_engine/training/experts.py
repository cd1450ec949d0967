"""The experts of a run that changes their number by itself (`expert_growth=act`): what a start does before it makes a model.

1. A save finds that an expert should be added or removed (`monitoring/growth_watch.py`). The decision is a record in the log,
   the checkpoint of its step stands behind it, and the ranks leave to be started again (`boundary.py`).
2. The next start finds both, and rank 0 rewrites the checkpoint while no model is in memory (`checkpoint/growth.py`).
3. From then on the checkpoint that a start goes on from decides how many experts there are, also where it must take one from
   before.

A run that is killed at any instant of this finds the step of the decision again, and does what is left. What cannot be done is
told once, and the run goes on with the experts that it has. The checkpoint as it was stays in emergency/ until a model with the
other experts has passed its dry run: a person can go back to it where that does not fit.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..checkpoint.backup import Tick
from ..checkpoint.files import CheckpointError
from ..checkpoint.growth import Plan, Source, drop_copy, growing, in_place, read_source, room, shrinking
from ..checkpoint.keep import Found, clean_stale, committed_paths, newest_valid, told
from ..checkpoint.payload import shape_of
from ..checkpoint.probe import probe_loss, probe_rows
from ..checkpoint.saving import why
from ..checkpoint.verify import Report
from ..config.checks import check
from ..config.resolve import left_to_auto
from ..config.schema import Config
from ..monitoring import record as rec
from ..monitoring.balance import CAPACITY, EXPERTS
from ..monitoring.growth_watch import FAILED, GrowthWatch, failure, is_decision
from ..monitoring.hardware import detect
from ..monitoring.log import read_records
from ..monitoring.say import print_error
from ..run.directory import RunDirectory
from ..run.sections import EXPERTS as SECTION
from .comm import Comm

TRY = "expert_growth"  # code of the alert that tells that a try begins
TRIES = 2  # a try that ends the process is no reason to try for ever
_TOLD = (CheckpointError, OSError)  # say themselves what is wrong; anything else is a defect


def experts_in_force(
    config: Config,
    comm: Comm,
    run: RunDirectory,
    emit: Callable[[Any], None],
    sync_log: Callable[[], object],
    report: Callable[[int, str], None],
) -> tuple[Config, Found | None]:
    """The configuration with the experts of the checkpoint that the run goes on from, the same on every rank; and on rank 0
    that checkpoint, if it was looked for. A collective, before a model is made.

    Args:
        config: that of config.yaml.
        emit: takes records (of rank 0). sync_log: what was emitted is on the disk afterwards.
        report: tells the supervisor where this rank is: (step, section).
    """
    found, keys = None, {}
    if comm.rank == 0:
        changes = _Changes(config, run, emit, sync_log, report)
        found = changes.rewritten()
        keys = changes.keys(found)
    keys = comm.broadcast(keys)
    return config.model_copy(update=keys) if keys else config, found


def pending(records: Iterable[rec.Record], step: int, seq: int, experts: int) -> tuple[rec.Change, int] | None:
    """The decision that the checkpoint of `step` was saved for and that nothing has come of yet, and how often it was tried.

    Args:
        records: the log's changes, rewinds and alerts, in order.
        seq: the last record before that checkpoint. experts: that it has in each layer.
    """
    found: rec.Change | None = None
    tries = 0
    for record in records:
        if is_decision(record):
            found, tries = record, 0
        elif isinstance(record, rec.Rewind) and found is not None and record.to_step < (found.step or 0):
            found = None  # of an abandoned branch
        elif isinstance(record, rec.Alert) and record.code == TRY:
            tries += 1
        elif isinstance(record, rec.Alert) and record.code == FAILED:
            found = None
    due = found is not None and found.step == step and found.before == experts and found.seq <= seq
    return (found, tries) if found is not None and due else None


class _Changes:
    """The changes of the number of experts in the log of a run, as rank 0 obeys them."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        emit: Callable[[Any], None],
        sync_log: Callable[[], object],
        report: Callable[[int, str], None],
    ) -> None:
        self.config, self.run, self.emit, self.sync_log, self.report = config, run, emit, sync_log, report
        root = run.path.resolve()  # as `CheckpointManager` has it
        self.checkpoints, self.emergency = root / run.checkpoints.name, root / run.emergency.name
        self.records = list(read_records(run.metrics_path, ("change", "rewind", "alert")))
        self.counts = {count for change in filter(is_decision, self.records) for count in (change.before, change.after)}

    def rewritten(self) -> Found | None:
        """The checkpoint that the run goes on from, rewritten if that is due. None: nothing was ever decided, or whoever looks
        for it next will say what is wrong."""
        if not self.counts:
            return None
        found = self._newest(lambda *_: self.report(0, "data"))  # nothing is rewritten yet
        if found is None or found.report is None:
            return None
        due = self._due(found.report)
        if due is not None:
            return self._try(found, found.report, *due)
        return found

    def _due(self, report: Report) -> tuple[rec.Change, int] | None:
        """The decision that this checkpoint is to be rewritten for, and how often it was tried."""
        if not self.config.adaptive == self.config.expert_growth == "act":
            return None
        manifest, experts = report.manifest, shape_of(report.path).get(EXPERTS)
        return pending(self.records, manifest["step"], int(manifest.get("log_seq") or 0), int(experts or 0))

    def keys(self, found: Found | None) -> dict[str, Any]:
        """What the configuration must have for this checkpoint, where the run itself has changed that; recorded."""
        if found is None or found.path is None:
            return {}
        keys = keys_for(self.config, shape_of(found.path), self.counts)
        for name, value in keys.items():
            reason = f"{found.path.name}, from which the run goes on, has {keys[EXPERTS]} experts"
            step = None if found.report is None else found.report.step
            before = getattr(self.config, name)
            self.emit(rec.Change(what=name, step=step, before=before, after=value, by="recovery", reason=reason))
        if keys:
            self._bring_log()  # before config.yaml says it
        return keys

    def _bring_log(self) -> None:
        """Bring the log onto the disk. A power cut behind a failure costs the run nothing: the checkpoint says the same."""
        try:
            self.sync_log()
        except OSError as error:
            message = f"{self.run.metrics_path.name}: {why(error)}: the last records may be lost at a power cut"
            self.emit(rec.Alert(severity="warning", code="log_not_synced", message=message))

    def _newest(self, tick: Tick) -> Found | None:
        """The checkpoint to go on from, if there is a sound one; `tick` is called for each chunk that is read."""
        try:
            return newest_valid(self.checkpoints, self.emergency, progress=tick)
        except (CheckpointError, OSError):
            return None  # nothing was changed: `CheckpointManager.recover` meets the same and says it on every rank

    def _try(self, found: Found, report: Report, change: rec.Change, tries: int) -> Found | None:
        """Rewrite the checkpoint; on a refusal, or after too many tries, what there is now."""
        if tries >= TRIES:
            self.emit(failure(change, f"each of {tries} tries to rewrite its checkpoint ended with the process"))
            return found
        what = f"{report.path.name} is rewritten with {change.after} experts instead of {change.before}"
        self.emit(rec.Alert(severity="info", code=TRY, message=f"step {change.step}: {what}", step=change.step))

        def tick(*_: object) -> None:
            self.report(change.step or 0, SECTION)

        try:
            tick()
            self.sync_log()  # a try that nobody hears of would be made for ever
            made = self._rewrite(report, change, tick)
        except Exception as error:
            if not isinstance(error, _TOLD):
                print_error(error)  # engine.log
            self.emit(failure(change, why(error)))
            after = self._newest(tick)
            return after if after is None else Found(after.path, after.report, found.rejected + after.rejected)
        return Found(made.path, made, found.rejected)

    def _rewrite(self, report: Report, change: rec.Change, tick: Tick) -> Report:
        """The checkpoint with other experts; `tick` is called all the while, for a large one takes its time."""
        for folder in (self.checkpoints, self.emergency):
            clean_stale(folder)  # what a try that was killed has left needs no room any more
        source = read_source(report.path, report, tick)
        tick()
        plan = self._plan(source, change, tick)
        config = left_to_auto(self.config.model_copy(update=dict(plan.keys)))
        machine = replace(detect(), disk_free_bytes=None)  # the checkpoints are there already; for this one room is asked below
        errors = [finding.line() for finding in check(config, machine) if finding.severity == "error"]
        if errors:
            raise CheckpointError("; ".join(errors))
        return in_place(source, plan, self.checkpoints, self.emergency, tick)

    def _plan(self, source: Source, change: rec.Change, tick: Tick) -> Plan:
        experts = {int(layer): int(expert) for layer, expert in (change.evidence or {})["layers"].items()}
        if change.after > change.before:
            most = self.config.max_num_experts  # which may be lower than when it was decided, as the checkpoint has it
            if change.after > most:
                raise CheckpointError(
                    f"{source.experts} experts in each layer, and max_num_experts = {most}: set it higher to grow"
                )
            return growing(source, experts)
        rows = probe_rows(Config(**(source.loaded.config or {})))
        return shrinking(source, experts, self._loads(change), lambda shape, weights: probe_loss(shape, weights, rows, tick))

    def _loads(self, change: rec.Change) -> Mapping[int, list[float]]:
        """The load per expert by layer that the decision was made by."""
        watch = GrowthWatch(self.config, self.run.name)
        for record in read_records(self.run.metrics_path, ("experts", "change", "rewind")):
            if record.seq >= change.seq:
                break
            watch.take(record)
        return watch.loads()


def drop_former(found: Found, run: RunDirectory, emit: Callable[[Any], None]) -> None:
    """Delete what was kept of a checkpoint in case its other experts do not fit, now that they do.

    Args:
        found: the checkpoint that the run goes on from, as `experts_in_force` gives it. emit: takes records.
    """
    if found.report is None:
        return
    emergency = run.path.resolve() / run.emergency.name
    try:
        drop_copy(found.report, emergency)
    except OSError as error:
        message = f"the copy of {found.report.path.name} from before it was rewritten stays in {emergency}: {why(error)}"
        emit(rec.Alert(severity="warning", code="checkpoint_note", message=message))


def way_back(found: Found, run: RunDirectory) -> str:
    """What to add to the words of a start that ran out of memory with a checkpoint that was given more experts; else nothing.

    Args:
        found: as of `drop_former`.
    """
    changed = None if found.report is None else found.report.manifest.get("experts_changed")
    if found.path is None or not changed or changed["after"] < changed["before"]:
        return ""
    path = found.path
    former = next((other for other in committed_paths(path.parent) if other != path), None)
    back = "lumina-engine " + shlex.join(["checkpoint", "shrink", f"{run.name}@latest", "--run", f"{run.name[:50]}-shrink"])
    if former is not None:
        move = shlex.join(["mv", str(path), f"{path}.grown"])
        again = shlex.join(["train", "--run", run.name, "--resume", "expert_growth=advise"])
        back = f"{move} && lumina-engine {again} (which goes on from {told(former)})"
    return (
        f"; {path.name} was given {changed['after']} experts in each layer instead of {changed['before']} by "
        f"expert_growth=act, which needs more memory: to go back, {back}"
    )


def keys_for(config: Config, shape: Mapping[str, Any], counts: Iterable[int]) -> dict[str, Any]:
    """The keys of `config` that go with the experts of a checkpoint; none where they do already, or where the run has never had
    such a number of them by its own doing.

    Their room is that of the checkpoint, unless somebody has chosen another `capacity_factor` since: then theirs, carried over.
    """
    known, before, after = set(counts), config.num_experts, int(shape[EXPERTS])
    if before == after or not {before, after} <= known:
        return {}
    if config.moe_dropless:
        return {EXPERTS: after}
    own, mine = float(shape[CAPACITY]), config.capacity_factor
    chosen = not any(math.isclose(mine, value) for value in (own, room(own, after, before)))
    return {EXPERTS: after, CAPACITY: room(mine, before, after) if chosen else own}
