"""One rank of the ZeRO tests: runs named checks in one process group and prints their results (rank 0).

    python zero_ranks.py DATA.jsonl FOLDER '{"name": ["check", {config overrides}], …}'

Prints `CHECKS {"name": result, …}`; what a check gives is said at its function.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lumina_engine.checkpoint.consolidate import KINDS
from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.checkpoint.universal import SavedState, Shard
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.monitoring.record import Step
from lumina_engine.training.comm import Comm
from lumina_engine.training.engine import MOMENTS
from lumina_engine.training.state import restore
from lumina_engine.training.trainer import EnhancedConversationTrainer
from tests.parity.rows import Records, config_of, store_of

STEPS = 6


class Run:
    """A trainer on the shared data, with or without a checkpoint folder."""

    def __init__(self, data: str, overrides: dict[str, Any], comm: Comm, folder: Path | None = None) -> None:
        keys = {"batch_size": 4, "max_steps": STEPS, "save_interval": 0, "async_save": False, **overrides}
        self.config, self.comm = config_of(data, keys), comm
        self.records = Records()
        manager = None if folder is None else CheckpointManager(self.config, run_dir=folder, comm=comm, run_id=folder.name)
        self.trainer = EnhancedConversationTrainer(
            DeepSeekTransformer(self.config),
            ConversationTokenizer(self.config.tokenizer),
            self.config,
            self.records,
            comm=comm,
            manager=manager,
        )
        self.store = store_of(self.config)
        torch.manual_seed(1 + comm.rank)  # for dropout, as the worker does

    def train(self) -> Run:
        self.trainer.train(self.store, self.store)
        return self

    def resume(self, step: int) -> None:
        """Go on from the newest checkpoint, which must be that of `step`."""
        loaded = self.trainer.manager.load(self.trainer.manager.recover())
        assert loaded.step == step
        restore(self.trainer, loaded)

    def digest(self) -> list[str]:
        """A digest of all state of each rank: whole weights (rank 0) and this rank's optimizer state."""
        tensors = self.trainer.engine.model_tensors() | self.trainer.engine.state_tensors()
        total = hashlib.sha256()
        for name in sorted(tensors):
            raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(name.encode() + bytes(raw.numpy()))
        return self.comm.all_gather(total.hexdigest())

    def steps(self) -> list[list[Any]]:
        return [[r.step, r.loss, r.aux_loss, r.grad_norm, r.skipped] for r in self.records if isinstance(r, Step)]


def skip(data: str, folder: Path, overrides: dict[str, Any], comm: Comm) -> dict[str, Any]:
    """A gradient that is not finite at step 2, on the last rank only. `same`: no rank's state changed in that step."""
    run = Run(data, overrides, comm)
    engine = run.trainer.engine
    inner_backward, inner_step = engine.backward, engine.step
    digests: list[list[str]] = []

    def backward(loss: torch.Tensor, last: bool) -> None:
        broken = run.trainer.progress.step == 1 and comm.rank == comm.world_size - 1
        inner_backward(loss * (math.nan if broken else 1.0), last)

    def step(lr: float, allows: Any) -> Any:
        digests.append(run.digest())
        result = inner_step(lr, allows)
        digests.append(run.digest())
        return result

    engine.backward, engine.step = backward, step
    run.train()
    moved = [before != after for before, after in zip(digests[::2], digests[1::2], strict=True)]
    skipped = [row[0] for row in run.steps() if row[4]]
    finite = [math.isfinite(row[1]) for row in run.steps()]
    return {"moved": moved, "skipped": skipped, "finite": finite, "counted": comm.all_gather(run.trainer.progress.skipped)}


def idle(data: str, folder: Path, overrides: dict[str, Any], comm: Comm) -> dict[str, Any]:
    """The last rank never chooses the first half of the experts. `chosen`: choices of each expert, for each rank."""
    run = Run(data, overrides, comm)
    half = run.config.num_experts // 2
    if comm.rank == comm.world_size - 1:
        for layer in run.trainer.model.expert_layers:
            layer.router.bias[:half] = -1e9
    window = run.trainer.window
    assert window is not None
    inner, chosen = window.add, torch.zeros(run.config.num_experts)

    def add(router: Any) -> None:
        chosen.add_(router.counts_LE.sum(0))
        inner(router)

    window.add = add  # type: ignore[method-assign]
    run.train()
    return {"steps": run.steps(), "chosen": comm.all_gather(chosen.tolist())}


def resume(data: str, folder: Path, overrides: dict[str, Any], comm: Comm) -> dict[str, Any]:
    """An unbroken run against one that is given up twice: after steps 2 and 4, each time going on from its checkpoint."""
    keys = {"save_interval": 2, "eval_interval": 3, "router_bias_rate": 0.01, "dropout": 0.1, **overrides}
    whole = Run(data, keys, comm, folder / "whole").train()
    broken: list[Run] = []
    for stop in (2, 4, STEPS):
        run = Run(data, keys, comm, folder / "broken")
        run.trainer.prepare(run.store, run.store)
        if broken:
            run.resume(stop - 2)
        run.trainer.total_steps = stop  # the schedule keeps the full length
        broken.append(run.train())
    return {
        "whole": whole.steps(),
        "broken": [row for run in broken for row in run.steps()],
        "digests": [whole.digest(), broken[-1].digest()],
        "evals": [run.trainer.progress.last_eval for run in (whole, broken[-1])],
    }


def weights(data: str, folder: Path, overrides: dict[str, Any], comm: Comm) -> dict[str, Any]:
    """Trains and saves to FOLDER/<world>-<stage>; gives the path of the checkpoint."""
    run = Run(data, overrides, comm, folder / f"{comm.world_size}-{overrides.get('zero_stage', 'plain')}").train()
    return {"path": str(run.trainer.manager.recover()), "steps": run.steps()}


def reordered(data: str, folder: Path, overrides: dict[str, Any], comm: Comm) -> dict[str, Any]:
    """State of the default layout put into an engine with the `other` overrides, and saved by it: what differs, of how many."""
    other = overrides.pop("other")
    first = Run(data, overrides, comm, folder / "first").train()
    moved = Run(data, {**overrides, **other}, comm, folder / "moved")
    moved.trainer.prepare(moved.store, moved.store)
    restore(moved.trainer, first.trainer.manager.load(first.trainer.manager.recover()))
    moved.trainer.saves.save(STEPS, blocking=True)
    saved, again = (run.trainer.manager.load(run.trainer.manager.recover()).saved_state() for run in (first, moved))
    compared, differ = 0, []
    for kind in KINDS:
        for name, weight in saved.weights.items():
            was, now = (state.part(kind, name, 0, weight.numel()) for state in (saved, again))
            if was is not None and now is not None:
                compared += 1
                differ += [] if torch.equal(was, now) else [f"{kind}.{name}"]
    return {"differ": comm.all_gather(differ), "compared": compared}


def masters(data: str, folder: Path, overrides: dict[str, Any], comm: Comm) -> dict[str, Any]:
    """fp32 state put back over another one, from a file that holds masters beside it.

    `saved`: whether the engine itself saves masters; `digests`: of the state at first, put back, and before it was.
    """
    first = Run(data, overrides, comm).train()
    engine, weights = first.trainer.engine, first.trainer.engine.model_tensors()
    state, begins = {name: t.clone() for name, t in engine.state_tensors().items()}, engine.state_begins()
    kind = f"optimizer.{MOMENTS[0]}."
    runs = {name.removeprefix(kind): t.numel() for name, t in state.items() if name.startswith(kind)}
    old = {f"master.{n}": weights[n].reshape(-1)[begins.get(n, 0) :][:count].clone() for n, count in runs.items()}
    other = Run(data, {**overrides, "seed": 7}, comm).train()
    before = other.digest()
    masters_alone = SavedState(Shard({**state, **old}, begins))
    other.trainer.engine.load_model_tensors(weights)
    other.trainer.engine.load_state(masters_alone)
    saved = any(name.startswith("master.") for name in state)
    return {"saved": comm.all_gather(saved), "digests": [first.digest(), other.digest(), before]}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "skip": skip,
    "idle": idle,
    "resume": resume,
    "weights": weights,
    "reordered": reordered,
    "masters": masters,
}


def main() -> None:
    data, folder, wanted = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    comm = Comm.start("gloo")
    out = {}
    for name, (check, overrides) in wanted.items():
        out[name] = CHECKS[check](data, folder / name, overrides, comm)
    if comm.rank == 0:
        print("CHECKS " + json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
