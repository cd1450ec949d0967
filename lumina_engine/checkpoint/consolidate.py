"""`checkpoint consolidate`: a checkpoint of any number of ranks and any stage as one of a single process.

Nobody needs that to go on (any rank reads what all saved); it is for looking into, and for other programs.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import ledger
from .commit import Staging, commit
from .files import CheckpointError
from .keep import leased
from .payload import Loaded, PlannedFile, plan_files, rank_files, read_loaded, write_files
from .resolve import resolve_checkpoint
from .resume import check_ledger
from .tensors import tensor_file
from .universal import SavedState
from .verify import require, verify

KINDS = ("master", "optimizer.exp_avg", "optimizer.exp_avg_sq")
_OWN = ("rng.", "routing.")  # of a rank, not of a parameter


class WholeState(Mapping[str, Tensor]):
    """The state of whole parameters by name, each put together when it is asked for and never kept; and `own` of a rank."""

    def __init__(self, saved: SavedState, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        self._saved, self._weights, self._own = saved, weights, own
        names = {name for shard in saved.shards() for name in shard.tensors}
        self._parts = {
            f"{kind}.{name}": (kind, name)
            for kind in (*KINDS, "optimizer.step")
            for name in weights
            if f"{kind}.{name}" in names
        }
        known = {*self._parts, *(name for name in names if name.startswith(_OWN))}
        if strange := sorted(names - known):
            raise CheckpointError(f"the state {strange[0]} belongs to no parameter, so it cannot be put together")

    def __getitem__(self, key: str) -> Tensor:
        if key in self._own:
            return self._own[key]
        kind, name = self._parts[key]
        if kind == "optimizer.step":
            found = self._saved.scalar(kind, name)
        else:
            found = self._saved.part(kind, name, 0, math.prod(self._weights[name].shape))
        if found is None:
            raise KeyError(key)
        return found if kind == "optimizer.step" else found.reshape(self._weights[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._own, *self._parts))

    def __len__(self) -> int:
        return len(self._own) + len(self._parts)


def own_tensors(loaded: Loaded) -> dict[str, Tensor]:
    """What belongs to the rank that read it: random state and routing statistics."""
    return {name: tensor for name, tensor in loaded.rank_tensors.items() if name.startswith(_OWN)}


def consolidate(reference: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, Any]:
    """Commit the checkpoint as one of one rank in the new folder `out`: `out/step-N`.

    Random state and routing statistics are those of rank 0. Only one parameter at a time is in memory. The manifest has an id
    of its own in the place of the run's, under which the ledger knows it wherever it is moved, and names what it was made of.

    Returns:
        path, step, ranks (that had saved), bytes.

    Raises:
        CheckpointError: damaged, replaced, or not whole; or `out` exists.
    """
    source, target = resolve_checkpoint(reference), Path(out).expanduser().resolve()
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists: name a folder that does not")
    with leased(source) as folder:
        report = require(verify(source))
        check_ledger(report)
        loaded = read_loaded(folder, report, 0)
    state = WholeState(loaded.saved_state(), loaded.model, own_tensors(loaded))
    loaded.rank_tensors = {}
    loaded.rank_state = {**loaded.rank_state, "world": 1, "expert_parallel_size": 1, "begins": {}}
    _, tensors = rank_files(0)
    plan = [file for file in plan_files(loaded, 0, 1, loaded.config, copy=False) if file.path != tensors]
    plan.append(PlannedFile(tensors, *tensor_file(state)))
    layout = {**(report.manifest.get("layout") or {}), "data_parallel": 1, "expert_parallel": 1}
    own = secrets.token_hex(6)
    staging = Staging(target, loaded.step, sum(file.size for file in plan))
    try:
        entries = write_files(plan, staging.write)
        made_of = {"run": report.manifest.get("run"), "digest": report.digest}
        manifest = {**report.manifest, "run": own, "consolidated_from": made_of, "world": 1, "layout": layout}
        path = commit(staging, entries, manifest, lambda digest: ledger.record(own, loaded.step, digest))
        done = require(verify(path))
    except BaseException:
        staging.drop()
        raise
    return {"path": str(path), "step": loaded.step, "ranks": report.manifest["world"], "bytes": done.bytes}
