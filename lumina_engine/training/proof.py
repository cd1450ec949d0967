"""The proof of a resume: where the run stands before its first step, and how that differs from the checkpoint.

Everything is read from the live objects after the checkpoint was put back, not from the checkpoint: two runs whose proofs are
equal take the same next step.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.files import dump_json
from ..checkpoint.manager import Loaded, capture_rng, pack
from ..checkpoint.saving import config_dict, config_digest
from ..config.schema import Config
from ..monitoring import record as rec

if TYPE_CHECKING:
    from .trainer import EnhancedConversationTrainer

DIGITS = 16  # of a digest
SAMPLES = 8  # named of the next step
# what a start sets anew, so that it tells nothing of the run
_NOT_COMPARED = frozenset({"experiment_name"})


def rng_digest() -> str:
    """A digest of the state of all generators of this process: python, numpy, torch and CUDA."""
    state, tensors = capture_rng()
    digest = hashlib.sha256(dump_json(pack(state, "rng"), sort=True))
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(bytes(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:DIGITS]


def resume_proof(trainer: EnhancedConversationTrainer, loaded: Loaded) -> rec.Resume:
    """What a restored trainer is about to do. A collective: every rank's generators are in it."""
    assert trainer.schedule is not None
    progress, loader = trainer.progress, trainer._loader()
    rows = loader.next_rows()
    samples = [sample for row in rows[:SAMPLES] if row >= 0 for sample in loader.plan.members(row)]
    values = config_dict(trainer.config)
    return rec.Resume(
        step=progress.step,
        path=loaded.path.name,
        tokens=progress.tokens,
        epoch=progress.epoch,
        index=progress.index,
        lr=trainer.schedule.lr(progress.step + 1),
        samples=samples[:SAMPLES],
        rows_digest=hashlib.sha256(dump_json(rows)).hexdigest()[:DIGITS],
        rng=trainer.comm.all_gather(rng_digest()),
        data=trainer.train_data.fingerprint[:DIGITS],
        config=(config_digest(values) or "")[:DIGITS],
        skipped_rows=len(trainer.recovery.skip),
        changed=_changed(trainer, loaded, values),
    )


def _changed(trainer: EnhancedConversationTrainer, loaded: Loaded, values: dict[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    """Configuration keys, versions, data and ranks that are another than those of the checkpoint: (then, now).

    What was left on `auto` then is no other value now, it has been settled. A key that the checkpoint does not know had its
    default.
    """
    from .state import versions

    now: dict[str, Any] = {f"version of {name}": version for name, version in versions().items()}
    then = {f"version of {name}": version for name, version in (loaded.global_state.get("versions") or {}).items()}
    if values is not None and loaded.config is not None:
        now |= values
        then |= Config().to_dict(sectioned=False) | loaded.config
    now |= {"data": trainer.train_data.fingerprint[:DIGITS], "ranks": trainer.comm.world_size}
    then |= {"data": str(loaded.global_state.get("data_fingerprint"))[:DIGITS], "ranks": loaded.manifest.get("world")}
    names = sorted((now.keys() & then.keys()) - _NOT_COMPARED)
    pairs = {name: (_plain(then[name]), _plain(now[name])) for name in names}
    return {name: (before, after) for name, (before, after) in pairs.items() if before not in (after, "auto")}


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that a tuple is no difference from a list."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str | dict) else str(value)
