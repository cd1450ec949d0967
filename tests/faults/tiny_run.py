"""Real runs of a tiny model with faults put in: prepared as `lumina-engine train` does, started through `launch.start`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumina_engine.config.deepspeed import to_deepspeed
from lumina_engine.config.machine import GB, Machine
from lumina_engine.config.resolve import resolve
from lumina_engine.config.schema import Config
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.log import read_records, surviving
from lumina_engine.run import launch
from lumina_engine.run.directory import RunDirectory, write_json
from tests.training.observed import BASE, conversations

from .injector import Fault, write_plan

WORKER = Path(__file__).with_name("faulty_worker.py")
MACHINE = Machine([], 16 * GB, 2, None)
KEYS: dict[str, Any] = {
    **BASE,
    "num_layers": 1,
    "seq_length": 32,
    "dropout": 0.1,
    "max_steps": 24,
    "save_interval": 4,
    "eval_interval": 8,
    "log_interval": 1,
}


def prepare(root: Path, name: str, faults: Sequence[Fault] = (), world: int = 1, **keys: Any) -> RunDirectory:
    """A run's folder with its configuration and plan; nothing is started. Runs below one `root` share their data."""
    data = root / "train.jsonl"
    if not data.exists():
        conversations(data, 80)
    own: dict[str, Any] = {"data_cache_dir": str(root / "cache"), "train_data_path": str(data), "experiment_name": name}
    vocabulary = ConversationTokenizer(KEYS["tokenizer"]).get_vocab_size()
    config = resolve(Config(**(KEYS | own | keys)), MACHINE, tokenizer_vocab=vocabulary, world=world)
    run = RunDirectory.create(root, name)
    config.save(run.config_path).chmod(0o600)
    if config.use_deepspeed:
        write_json(run.deepspeed_path, to_deepspeed(config, world))
    write_plan(run.path, faults)
    return run


def start(run: RunDirectory, *, world: int = 1, resume: bool = False, worker: Path = WORKER, **settings: Any) -> RunDirectory:
    """Start it under the real supervisor with the faulty worker in the worker's place. `settings` as of `launch.start`."""
    argv = launch.rank_argv(Config.load(run.config_path), run.path, world)
    place = argv.index(launch.WORKER)  # python -m WORKER RUN, also below hosts or torchrun
    argv[place - 1 : place + 1] = [str(worker)]
    if world == 1:
        argv[0] = sys.executable
    launch.start(run, argv, world=world, resume=resume, settings=settings)
    return run


def steps(run: RunDirectory) -> dict[int, rec.Step]:
    """The surviving value of each step."""
    return {r.step: r for r in surviving(read_records(run.metrics_path)) if isinstance(r, rec.Step)}


def ends(run: RunDirectory) -> list[tuple[int, str, int | None]]:
    """(incarnation, state, exit code) of every `run` record."""
    return [(r.inc, r.state, r.exit_code) for r in read_records(run.metrics_path) if isinstance(r, rec.Run)]


def final_manifest(run: RunDirectory) -> dict[str, Any]:
    """The manifest of the newest checkpoint."""
    newest = max(run.checkpoints.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    return dict(json.loads((newest / "MANIFEST.json").read_text()))
