"""The model of a committed checkpoint with one expert more, or less: as a new run, or in the place of the checkpoint.

A configuration has one `num_experts` for all layers, so every expert layer changes by one: each gets a twin of an expert of its
own, or loses one. `checkpoint grow` and `shrink` make a new run and never touch the old one; the new one begins with the same
step, optimizer state and place in the data. What `adaptive` had decided of rate and balance stays behind: the new run's log
alone must give its decisions again. A run that changes its experts by itself (`expert_growth=act`) goes on from what `in_place`
makes of its newest checkpoint: everything stays that is not the experts'.

Growing keeps the function (after Net2Net, arXiv:1511.05641, as routing demands it): the twin has weights and router row of its
parent. With one expert per token and sigmoid scores that is all. With softmax each of the two gets half of the parent's
probability and counts it twice (`Router.log2_multiplicity`), so choice, gate and every other score stay as they were. With two
experts or more per token the twin would take a slot from another expert, so growing refuses. Moments are copied too. Training
drops no more than it did: every expert keeps its room, and the twin brings its own.

Shrinking cannot keep the function: the expert is merged into the one whose router row is most similar, which its tokens will
choose next. Both are weighted by their load (arXiv:2310.01334). A probe measures the loss on both sides of it.

Shapes: L expert layers, E experts, D hidden size. The first dimension of every tensor that is rewritten counts experts, but in
the routing window, (L, E).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..monitoring.balance import CAPACITY, carried
from . import ledger
from .backup import Tick, copied, ticking
from .commit import Staging, commit
from .consolidate import KINDS, WholeState, own_tensors
from .files import CheckpointError, FileEntry, require_space
from .keep import discard, leased, quarantine, rewind, set_pointer
from .payload import Loaded, PlannedFile, packed, plan_files, rank_files, read_loaded, write_files
from .resolve import resolve_checkpoint
from .resume import check_ledger
from .saving import config_digest, versions
from .tensors import tensor_file
from .verify import Report, read_manifest, require, verify

if TYPE_CHECKING:
    from ..config.schema import Config

PART = re.compile(r"blocks\.(\d+)\.ffn\.(router\.weight|router\.bias|router\.log2_multiplicity|w13|w2)")
COUNTS = "routing.counts"
MAX_LOSS_RISE = 0.01  # of the probe's loss, beyond which a removal is undone
MAX_CAPACITY = 64.0  # of the key capacity_factor
# of the saved state, since the new run's log begins behind it: controllers that have seen nothing, and no record before it
_AT_A_START: Mapping[str, Any] = {"adaptive": {}, "inc": 0, "log_seq": 0}

Probe = Callable[[Mapping[str, Any], Mapping[str, Tensor]], float]


@dataclass(frozen=True)
class Split:
    """An expert gets a twin, which is the last expert of its layer."""

    expert: int

    def __call__(self, part: str, tensor: Tensor) -> Tensor:
        grown = torch.cat((tensor, tensor[self.expert : self.expert + 1]))
        if part == "router.log2_multiplicity":
            grown[self.expert] += 1
            grown[-1] += 1
        return grown

    def counts(self, load_E: Tensor) -> Tensor:
        """The twin has served nobody yet."""
        return torch.cat((load_E, load_E.new_zeros(1)))


@dataclass(frozen=True)
class Merge:
    """An expert is taken out; `into` becomes the mean of both, `share` of it the one that goes."""

    expert: int
    into: int
    share: float

    def __call__(self, part: str, tensor: Tensor) -> Tensor:
        merged = tensor.clone()
        here, gone = tensor[self.into].float(), tensor[self.expert].float()
        if part == "router.log2_multiplicity":  # twins that come together again are what they were
            merged[self.into] = -(here.neg().exp2() + gone.neg().exp2()).clamp(max=1).log2()
        elif part != "router.bias":
            merged[self.into] = torch.lerp(here, gone, self.share).to(tensor.dtype)
        return torch.cat((merged[: self.expert], merged[self.expert + 1 :]))

    def counts(self, load_E: Tensor) -> Tensor:
        """Who stays has served both."""
        merged = load_E.clone()
        merged[self.into] += load_E[self.expert]
        return torch.cat((merged[: self.expert], merged[self.expert + 1 :]))


Edit = Split | Merge


@dataclass(frozen=True)
class Plan:
    """What becomes of each expert layer, and the keys of the configuration that go with it.

    loss_before, loss_after: of a probe, where the function is not kept.
    """

    edits: Mapping[int, Edit]
    keys: Mapping[str, Any]
    loss_before: float | None = None
    loss_after: float | None = None


class _Rewritten(Mapping[str, Tensor]):
    """Weights or optimizer state after the edits, each tensor made when it is asked for, with a `tick`."""

    def __init__(self, before: Mapping[str, Tensor], edits: Mapping[int, Edit], tick: Tick = lambda *_: None) -> None:
        self._before, self._edits, self._tick = before, edits, tick

    def __getitem__(self, key: str) -> Tensor:
        self._tick()
        tensor = self._before[key]
        if key == COUNTS:
            rows = zip(self._edits.values(), tensor, strict=True)
            return torch.stack([edit.counts(load_E) for edit, load_E in rows])
        kind = next((kind for kind in KINDS if key.startswith(kind + ".")), None)
        found = PART.fullmatch(key if kind is None else key[len(kind) + 1 :])
        return tensor if found is None else self._edits[int(found[1])](found[2], tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)


@dataclass(frozen=True)
class Source:
    """A checkpoint that may be rewritten: what was read of it, and where from."""

    path: Path
    report: Report
    loaded: Loaded

    @property
    def layers(self) -> list[int]:
        """Its expert layers."""
        return sorted({int(found[1]) for name in self.loaded.model if (found := PART.fullmatch(name))})

    @property
    def experts(self) -> int:
        return int(self.loaded.model_config["num_experts"])

    def window(self) -> dict[int, list[float]] | None:
        """Choices per expert since the last record of the log, by layer, if there were any."""
        counts_LE = self.loaded.rank_tensors.get(COUNTS)
        if counts_LE is None or not bool((counts_LE.sum(-1) > 0).all()):
            return None
        return dict(zip(self.layers, counts_LE.tolist(), strict=True))


def open_source(reference: str) -> Source:
    """The checkpoint that `reference` means, verified.

    Raises:
        CheckpointError: damaged or replaced, not of a run, a model without experts, or experts that are spread over ranks.
    """
    path = resolve_checkpoint(reference)
    return read_source(path, require(verify(path)))


def read_source(path: Path, report: Report, tick: Tick = lambda *_: None) -> Source:
    """A checkpoint that was verified.

    Args:
        tick: as of `read_loaded`.

    Raises:
        CheckpointError: as `open_source`.
    """
    with leased(path) as folder:
        check_ledger(report)
        loaded = read_loaded(folder, report, 0, tick)
    source = Source(path, report, loaded)
    if loaded.config is None:
        raise CheckpointError(f"{path} has no configuration of a run, so no run can go on from what would be made of it")
    if not source.layers:
        raise CheckpointError(f"{path} has no experts (use_moe = false)")
    spread = loaded.rank_state.get("expert_parallel_size", 1)
    if spread != 1 or loaded.config.get("expert_parallel_size", 1) != 1:
        raise CheckpointError(
            f"{path}: the experts are spread over ranks (expert_parallel_size = {loaded.config['expert_parallel_size']}), and "
            "another number of them is not proved there; go on for one checkpoint with expert_parallel_size=1 first"
        )
    return source


def hottest(loads: Mapping[int, Sequence[float]], given: Mapping[int, int]) -> dict[int, int]:
    """The expert with most tokens of each layer, but those that were given."""
    return {layer: max(range(len(load)), key=lambda e: load[e]) for layer, load in loads.items()} | dict(given)


def coldest(loads: Mapping[int, Sequence[float]], given: Mapping[int, int]) -> dict[int, int]:
    """The expert with fewest tokens of each layer, but those that were given."""
    return {layer: min(range(len(load)), key=lambda e: load[e]) for layer, load in loads.items()} | dict(given)


def grow(source: Source, experts: Mapping[int, int], root: Path, run: str) -> dict[str, Any]:
    """Commit the checkpoint with a twin of one expert in each expert layer as the first one of a new run.

    Args:
        experts: the expert to split by layer; every expert layer must be named.

    Returns:
        path, run, step, experts (before, after), layers (layer and expert), parameters_added, bytes.

    Raises:
        CheckpointError: more than one expert per token, more than `max_num_experts`, no such layer or expert.
        RunError: the name is no name, or there is such a run.
    """
    return _commit(source, growing(source, experts), root, run)


def growing(source: Source, experts: Mapping[int, int]) -> Plan:
    """How each expert layer gets a twin of the expert that `experts` names.

    Raises:
        CheckpointError: as `grow`.
    """
    shape, config = source.loaded.model_config, source.loaded.config or {}
    if shape["moe_top_k"] != 1:
        raise CheckpointError(
            f"{source.path}: moe_top_k = {shape['moe_top_k']}: a twin would take the slot of another expert and change what "
            "the model says; growing is exact with moe_top_k=1 only"
        )
    most = int(config.get("max_num_experts", 64))
    if source.experts + 1 > most:
        raise CheckpointError(f"{source.path}: {source.experts} experts, and max_num_experts = {most}: set it higher to grow")
    _require_experts(source, experts)
    keys: dict[str, Any] = {"num_experts": source.experts + 1}
    if not shape["moe_dropless"]:
        keys[CAPACITY] = room(shape[CAPACITY], source.experts, source.experts + 1)
    return Plan({layer: Split(experts[layer]) for layer in source.layers}, keys)


def room(capacity: float, before: int, after: int) -> float:
    """The `capacity_factor` that gives each of `after` experts the room that it had among `before`: nothing more is dropped."""
    return min(MAX_CAPACITY, capacity * after / before)


def shrink(
    source: Source,
    experts: Mapping[int, int],
    loads: Mapping[int, Sequence[float]] | None,
    root: Path,
    run: str,
    probe: Probe,
) -> dict[str, Any]:
    """Commit the checkpoint with one expert of each expert layer merged into its most similar one as a new run's first one.

    Args:
        experts: the expert to take out by layer; every expert layer must be named.
        loads: tokens per expert by layer, which weigh the two; None: both count the same.
        probe: the loss of a model (its shape and weights) on rows of the run.

    Returns:
        as `grow`, and loss_before, loss_after; `layers` names `into` too.

    Raises:
        CheckpointError: the probe's loss rises by more than 1 % (nothing is kept), none or fewer than moe_top_k would be left,
            no such layer or expert. RunError: the name is no name, or there is such a run.
    """
    plan = shrinking(source, experts, loads, probe)
    return {**_commit(source, plan, root, run), "loss_before": plan.loss_before, "loss_after": plan.loss_after}


def shrinking(source: Source, experts: Mapping[int, int], loads: Mapping[int, Sequence[float]] | None, probe: Probe) -> Plan:
    """How each expert layer loses the expert that `experts` names; arguments as of `shrink`.

    Raises:
        CheckpointError: as `shrink`.
    """
    shape = source.loaded.model_config
    if source.experts - 1 < max(1, shape["moe_top_k"]):
        raise CheckpointError(f"{source.path}: {source.experts} experts with moe_top_k = {shape['moe_top_k']}: none can go")
    _require_experts(source, experts)
    edits = {layer: _merge(source, layer, experts[layer], loads) for layer in source.layers}
    keys = {"num_experts": source.experts - 1}
    before = probe(shape, source.loaded.model)
    after = probe({**shape, **keys}, _Rewritten(source.loaded.model, edits))
    if not after <= before * (1 + MAX_LOSS_RISE):
        rise = 100 * (after / before - 1)
        raise CheckpointError(
            f"{source.path}: without these experts the loss goes from {before:.4f} to {after:.4f} ({rise:+.1f} %, more than "
            f"{100 * MAX_LOSS_RISE:g} %): undone, nothing was kept"
        )
    return Plan(edits, keys, before, after)


def _merge(source: Source, layer: int, expert: int, loads: Mapping[int, Sequence[float]] | None) -> Merge:
    rows_ED = torch.nn.functional.normalize(source.loaded.model[f"blocks.{layer}.ffn.router.weight"].float(), dim=-1)
    alike_E = rows_ED @ rows_ED[expert]
    alike_E[expert] = -torch.inf
    into = int(alike_E.argmax())
    load = None if loads is None else loads.get(layer)
    both = 0.0 if load is None else load[expert] + load[into]
    return Merge(expert, into, load[expert] / both if load is not None and both > 0 else 0.5)


def _require_experts(source: Source, experts: Mapping[int, int]) -> None:
    for layer, expert in experts.items():
        if layer not in source.layers:
            known = ", ".join(map(str, source.layers))
            raise CheckpointError(f"{source.path}: layer {layer} has no experts; those with experts: {known}")
        if not 0 <= expert < source.experts:
            raise CheckpointError(f"{source.path}: no expert {expert}: the experts of a layer are 0 to {source.experts - 1}")
    if missing := [layer for layer in source.layers if layer not in experts]:
        raise CheckpointError(
            f"{source.path}: the run's log does not tell which expert of layer {missing[0]} is meant: name one of each layer"
        )


def _commit(source: Source, plan: Plan, root: Path, run: str) -> dict[str, Any]:
    """The new run with its one checkpoint, or nothing."""
    from ..config.schema import Config
    from ..run.directory import RunDirectory

    loaded = source.loaded
    config = Config(**{**(loaded.config or {}), **plan.keys, "experiment_name": run})
    made = RunDirectory.create(root, run)
    try:
        path, size = _write_first(source, plan, config, made.checkpoints, made.identity()["id"])
        config.save(made.config_path).chmod(0o600)
        name, before = source.path.name, source.experts
        reason = f"{before} experts of {source.path.parent.parent.name}@{name} made {config.num_experts}"
        made.update_identity(state="finished", reason=reason, exit_code=0)
    except BaseException:
        shutil.rmtree(made.path, ignore_errors=True)
        raise
    return {
        "path": str(path),
        "run": run,
        "step": loaded.step,
        "experts": {"before": before, "after": config.num_experts},
        "layers": [{"layer": layer, **_told(edit)} for layer, edit in plan.edits.items()],
        "parameters_added": _count(_Rewritten(loaded.model, plan.edits)) - _count(loaded.model),
        "bytes": size,
    }


def _told(edit: Edit) -> dict[str, Any]:
    return {"expert": edit.expert} | ({"into": edit.into, "share": edit.share} if isinstance(edit, Merge) else {})


def _count(model: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for name, tensor in model.items() if not name.endswith((".bias", ".log2_multiplicity")))


def _write_first(source: Source, plan: Plan, config: Config, folder: Path, run: str) -> tuple[Path, int]:
    """The first checkpoint of a new run, of a single rank, and its size in bytes."""
    loaded, report = source.loaded, source.report
    flat = config.to_dict(sectioned=False)
    one = replace(loaded, global_state={**loaded.global_state, **_AT_A_START}, rank_state={**loaded.rank_state, "world": 1})
    files = _files_of_rank_0(source, plan, one, flat, 1)
    manifest = {
        **_manifest(source, plan, flat),
        "run": run,
        "inc": 0,
        "log_seq": 0,
        "world": 1,
        "layout": {**(report.manifest.get("layout") or {}), "data_parallel": 1, "expert_parallel": 1},
        "best": None,
    }
    staging = Staging(folder, loaded.step, sum(file.size for file in files))
    path = _committed(staging, files, manifest, lambda digest: ledger.record(run, loaded.step, digest))
    size = require(verify(path)).bytes
    for name in ("best", "latest"):
        set_pointer(folder, name, path.name)
    return path, size


def in_place(source: Source, plan: Plan, checkpoints: Path, emergency: Path, tick: Tick = lambda *_: None) -> Report:
    """Commit the rewritten checkpoint in the place of `source`, the newest one of its run; what was read back.

    Random state, log position, controllers and pointers stay as they are, of each rank. Whatever instant the process dies at,
    the newest valid checkpoint is one of this step: a copy of `source` lies in `emergency` before its name is given up, and the
    commit is the one rename that gives the name to what was made of it.

    Args:
        source: in `checkpoints`, or the copy in `emergency` that an earlier try has left.
        tick: called for each chunk that was read or written, and each tensor that was made.

    Raises:
        CheckpointError: no room, or what was written cannot be read back.
        OSError: a write failed. In both cases the newest valid checkpoint is what it was.
    """
    loaded, name = source.loaded, source.path.name
    flat = {**(loaded.config or {}), **plan.keys}
    world = int(source.report.manifest["world"])
    files = _files_of_rank_0(source, plan, replace(loaded, global_state=_state(loaded, plan)), flat, world, tick)
    files += [file for rank in range(1, world) for file in _own_files(source, plan, rank, world, tick)]
    size = sum(file.size for file in files)
    if source.path.parent == checkpoints:
        require_space(checkpoints, source.report.bytes + size)
        copied(source.path, emergency, tick)

    def make_way(digest: str) -> None:
        ledger.record(str(source.report.manifest["run"]), loaded.step, digest)
        rewind(checkpoints, loaded.step - 1)

    try:
        staging = Staging(checkpoints, loaded.step, size, replaces=True)
        path = _committed(staging, files, _manifest(source, plan, flat), make_way, tick)
    except BaseException:
        if (checkpoints / name).is_dir():
            discard(emergency, name)
        raise
    report = verify(path, progress=tick)
    if not report.ok:
        quarantine(path)
        require(report)
    return report


def _state(loaded: Loaded, plan: Plan) -> dict[str, Any]:
    """The global state, with the room of the experts as it is in `plan`: nobody has chosen another."""
    state = loaded.global_state
    adaptive = state.get("adaptive", {})
    if CAPACITY not in plan.keys or "balance" not in adaptive:
        return state
    balance = carried(adaptive["balance"], loaded.model_config[CAPACITY], plan.keys[CAPACITY])
    return {**state, "adaptive": {**adaptive, "balance": balance}}


def drop_copy(report: Report, emergency: Path) -> None:
    """Delete the copy that `in_place` left of what it has rewritten, if it is there."""
    name, changed = report.path.name, report.manifest.get("experts_changed")
    if changed and report.path.parent != emergency and read_manifest(emergency / name).digest == changed["from"]:
        discard(emergency, name)


def _files_of_rank_0(
    source: Source, plan: Plan, loaded: Loaded, config: dict[str, Any], world: int, tick: Tick = lambda *_: None
) -> list[PlannedFile]:
    """Its files, with the state of whole parameters in them: the other ranks need hold none. `loaded`: what else is in them."""
    state = WholeState(source.loaded.saved_state(), source.loaded.model, own_tensors(source.loaded))
    new = replace(
        loaded,
        model=dict(_Rewritten(loaded.model, plan.edits, tick)),
        model_config=loaded.model_config | {key: config[key] for key in ("num_experts", CAPACITY)},
        rank_state={**loaded.rank_state, "begins": {}},
        rank_tensors={},
    )
    _, tensors = rank_files(0)
    files = [file for file in plan_files(new, 0, world, config, copy=False) if file.path != tensors]
    own = PlannedFile(tensors, *tensor_file(_Rewritten(state, plan.edits, tick)))
    return [*files, packed(own) if _compression(config) == "zstd" else own]


def _own_files(source: Source, plan: Plan, rank: int, world: int, tick: Tick) -> list[PlannedFile]:
    """The files of another rank, with what belongs to no parameter: its random state and routing statistics."""
    with leased(source.path) as folder:
        loaded = read_loaded(folder, source.report, rank, tick)
    new = replace(
        loaded,
        rank_state={**loaded.rank_state, "begins": {}},
        rank_tensors=dict(_Rewritten(own_tensors(loaded), plan.edits)),
    )
    return plan_files(new, rank, world, None, copy=False, compression=_compression(loaded.config))


def _compression(config: Mapping[str, Any] | None) -> str:
    """How the state of a rank is written."""
    return str((config or {}).get("checkpoint_compression", "none"))


def _manifest(source: Source, plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    """That of the source, but for what was rewritten."""
    told = {str(layer): _told(edit) for layer, edit in plan.edits.items()}
    counts = {"before": source.experts, "after": plan.keys["num_experts"]}
    return {
        **source.report.manifest,
        "config_digest": config_digest(config),
        "versions": versions(),
        "experts_changed": {**counts, "layers": told, "from": source.report.digest},
    }


def _committed(
    staging: Staging,
    files: Sequence[PlannedFile],
    manifest: dict[str, Any],
    before_rename: Callable[[str], None],
    tick: Tick = lambda *_: None,
) -> Path:
    def write(path: str, pieces: Iterable[Any], size: int | None) -> FileEntry:
        return staging.write(path, ticking(pieces, tick), size)

    try:
        return commit(staging, write_files(files, write), manifest, before_rename)
    except BaseException:
        staging.drop()
        raise
