"""What checkpoints cost: asynchronous saves beside the real training loop, the commit, the digests, the way back after a stop.

Steps with a save under way and steps without take turns in one run, so that both see the same machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.commit import Staging, commit, verify
from ..checkpoint.manager import CheckpointManager, Payload
from ..checkpoint.payload import plan_files, write_files
from ..monitoring import record as rec
from ..monitoring.log import MetricLog, read_records
from ..run.directory import RunDirectory
from .benchmark import RandomStore
from .comm import Comm
from .expert_parallel import build_model
from .setup import seed_all
from .trainer import EnhancedConversationTrainer

INTERVAL = 20  # steps between two saves
GOALS = {"save_share": 0.035, "commit_beyond_write_s": 0.15, "resume_s": 12.0, "start_s": 10.0}
Tell = Callable[[dict[str, Any]], None]


class _Watch:
    """A logger that writes every record and keeps when each step's came, and what saves cost."""

    def __init__(self, log: MetricLog) -> None:
        self.log = log
        self.times: dict[int, float] = {}
        self.saves: list[rec.Checkpoint] = []

    def emit(self, record: Any) -> None:
        self.log.emit(record)
        if isinstance(record, rec.Step):
            self.times[record.step] = time.perf_counter()
        elif isinstance(record, rec.Checkpoint):
            self.saves.append(record)


def measure_saves(config: Any, rounds: int) -> dict[str, Any]:
    """Train `rounds` times 20 steps with one asynchronous save at their beginning, and 20 without.

    Returns:
        save_share: what a save each 20 steps adds to wall time, as a share of the steps without (from the sums of all rounds);
        save_share_min, _max: of single rounds. save_blocking_s: median time for which a save holds training up.
        step_p99_ratio: p99 of steps while a save may be under way, by p99 of the others. save_s: median from the call to the
        boundary behind the commit; save_work_s: without its wait for that boundary.

    Raises:
        RuntimeError: a save failed.
    """
    from ..data.tokenizer import ConversationTokenizer

    steps = INTERVAL * (2 * rounds + 2)
    own = {"max_steps": steps, "num_epochs": 1, "eval_interval": 0, "log_interval": 1, "save_interval": 2 * INTERVAL}
    config = config.model_copy(update={**own, "async_save": True, "backup_every_n_hours": 0.0, "use_deepspeed": False})
    tokenizer = ConversationTokenizer(config.tokenizer)
    if config.vocab_size == "auto":
        config = config.model_copy(update={"vocab_size": tokenizer.padded_vocab_size})
    comm = Comm()
    seed_all(config, comm)
    model = build_model(config, comm)
    store = RandomStore(
        config.batch_size * config.gradient_accumulation_steps * steps, config.seq_length, model.config.vocab_rows, config.seed
    )
    with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
        log = MetricLog(Path(folder) / "metrics.jsonl", 1)
        watch = _Watch(log)
        manager = CheckpointManager(config, run_dir=folder, comm=comm, run_id="bench", sync_log=log.sync)
        EnhancedConversationTrainer(model, tokenizer, config, watch, comm=comm, manager=manager).train(store)
        manager.close()
        log.close()
    if failed := [save.failed for save in watch.saves if save.failed]:
        raise RuntimeError(f"a save failed: {failed[0]}")
    return _shares(watch, rounds)


def _shares(watch: _Watch, rounds: int) -> dict[str, Any]:
    shares, long_with, long_without, sums = [], [], [], [0.0, 0.0]
    for number in range(1, rounds + 1):
        begin, middle, end = (2 * INTERVAL * number + part for part in (0, INTERVAL, 2 * INTERVAL))
        with_save, without = watch.times[middle] - watch.times[begin], watch.times[end] - watch.times[middle]
        shares.append(with_save / without - 1)
        sums = [sums[0] + with_save, sums[1] + without]
        long_with += [watch.times[b] - watch.times[a] for a, b in pairwise(range(begin + 1, middle + 1))]
        long_without += [watch.times[b] - watch.times[a] for a, b in pairwise(range(middle + 1, end + 1))]
    return {
        "save_share": sums[0] / sums[1] - 1,
        "save_share_min": min(shares),
        "save_share_max": max(shares),
        "save_blocking_s": statistics.median(save.blocking or 0.0 for save in watch.saves[:-1]),
        "save_s": statistics.median(save.span or 0.0 for save in watch.saves[:-1]),
        "save_work_s": statistics.median(save.seconds or 0.0 for save in watch.saves[:-1]),
        "step_s": statistics.median(long_without),
        "step_p99_ratio": _p99(long_with) / _p99(long_without),
        "checkpoint_bytes": watch.saves[-1].bytes,
    }


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def measure_commit(size: int, times: int) -> dict[str, Any]:
    """Write a checkpoint of `size` bytes `times` times: the write (of a copy made before), the commit beyond it, the digests
    (from the page cache)."""
    tensors = {"w": torch.randn(size // 8)}, {"moment": torch.randn(size // 8)}
    spent: dict[str, list[float]] = {"write_s": [], "commit_beyond_write_s": [], "verify_s": []}
    total = 0
    with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
        for step in range(1, times + 1):
            payload = Payload(step, 0, 0, tensors[0], {}, {}, rank_tensors=tensors[1])
            plan = plan_files(payload, 0, 1, None, copy=True)
            marks = [time.perf_counter()]
            staging = Staging(Path(folder), step, size)
            entries = write_files(plan, staging.write)
            marks.append(time.perf_counter())
            path = commit(staging, entries, {"run": "bench", "world": 1})
            marks.append(time.perf_counter())
            verify(path)  # fills the page cache
            warm = time.perf_counter()
            report = verify(path)
            marks.append(marks[-1] + time.perf_counter() - warm)
            if not report.ok:
                raise RuntimeError(f"a checkpoint just written is damaged: {report.line()}")
            total = report.bytes
            for name, (begin, end) in zip(spent, pairwise(marks), strict=True):
                spent[name].append(end - begin)
    middle = {name: statistics.median(values) for name, values in spent.items()}
    return {
        **middle,
        "commit_beyond_write_max_s": max(spent["commit_beyond_write_s"]),
        "write_gb_per_s": total / middle["write_s"] / 1e9,
        "verify_gb_per_s": total / middle["verify_s"] / 1e9,
        "written_bytes": total,
    }


def measure_return(words: list[str]) -> dict[str, Any]:
    """A real run of the command line: from its start to its first step, and from `train --resume` to the first resumed step.

    Args:
        words: preset and keys for `lumina-engine train`.

    Raises:
        RuntimeError: the run did not start, or ended.
    """
    with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
        root = Path(folder)
        own = ["--runs", folder, "--run", "bench", "--detach"]
        run = RunDirectory(root / "bench")
        first = _until_step(run, 1, [*own, *words, "max_steps=100000", f"save_interval={INTERVAL}", "eval_interval=0"])
        try:
            _wait(lambda: run.newest_step() is not None, run, "a first checkpoint")
        finally:
            _stop(run, folder)
        again = _until_step(run, 2, [*own, "--resume"])
        _stop(run, folder)
    return {"start_s": first, "resume_s": again}


def _engine(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "lumina_engine.cli", *words], capture_output=True, text=True, env=os.environ)
    if done.returncode != 0:
        raise RuntimeError(f"lumina-engine {words[0]} failed: {done.stderr.strip()[-500:]}")


def _stop(run: RunDirectory, root: str) -> None:
    if run.alive:
        _engine("runs", "stop", run.name, "--runs", root)
        _wait(lambda: not run.alive, None, "the end of the run")


def _until_step(run: RunDirectory, inc: int, words: list[str]) -> float:
    """Seconds from the start of the command to the record of the first step of that incarnation."""
    begin = time.monotonic()
    _engine("train", *words)
    _wait(lambda: _stepped(run, inc), run, "a step")
    return time.monotonic() - begin


def _stepped(run: RunDirectory, inc: int) -> bool:
    return any(isinstance(record, rec.Step) and record.inc == inc for record in read_records(run.metrics_path))


def _wait(done: Callable[[], bool], run: RunDirectory | None, what: str) -> None:
    end = time.monotonic() + 120
    while not done():
        if time.monotonic() > end or (run is not None and not run.alive):
            reason = json.dumps(run.info().reason) if run is not None else ""
            raise RuntimeError(f"no {what}: {reason}")
        time.sleep(0.02)


def measure(config: Any, words: list[str], rounds: int, tell: Tell) -> dict[str, Any]:
    """All figures; `tell` gets those of each part as it ends."""
    figures: dict[str, Any] = {}
    parts: list[Callable[[], dict[str, Any]]] = [
        lambda: measure_commit(50_000_000, 4 * rounds),
        lambda: measure_saves(config, rounds),
        lambda: measure_return(words),
    ]
    for part in parts:
        found = part()
        tell(found)
        figures |= found
    return {**figures, "threads": torch.get_num_threads(), "rounds": rounds}
