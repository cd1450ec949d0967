"""A program for tests: the peak memory of real training steps, as the kernel sees it.

    MALLOC_MMAP_THRESHOLD_=65536 python peak.py FOLDER '{"name": {config overrides}, …}'      also under torch.distributed.run

With that threshold every tensor is a mapping of its own, given back the moment it is freed, so the resident set is what is in
use: temporaries inside an operator, buffers of other threads and all that belongs to no tensor included, pages that were never
touched not. The kernel keeps its largest value; it is reset at the beginning of each section of a step and of the dry run.
What was resident before the model was built, after a first run of the same kind that loaded every library, is taken off.

With `short` among the overrides the data are conversations that leave attention the most filler, else some that fill rows.

With `save_interval: 1` the first step is saved beside the second, and its copy kept until that one has ended.

Prints `PEAK {...}` for each case (rank 0): `name`, `peak` in bytes, the largest value in each section, the budget's `Memory`
and what it says of `saving`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lumina_engine.checkpoint.manager import CheckpointManager
from lumina_engine.config.activations import WORST_DOCUMENT
from lumina_engine.config.machine import Machine
from lumina_engine.config.memory import checkpoint_bytes, training_memory
from lumina_engine.config.resolve import host_memory, layout_of, model_config
from lumina_engine.config.schema import Config
from lumina_engine.data.store import open_data
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from lumina_engine.run.rank import NullChannel
from lumina_engine.run.sections import WAITED
from lumina_engine.training.comm import Comm
from lumina_engine.training.trainer import EnhancedConversationTrainer

STEPS = 2
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 512,
    "seq_length": 256,
    "num_experts": 8,
    "moe_top_k": 2,
    "batch_size": 4,
    "tokenizer": "lumina-1k",
    "rope_theta": 10000.0,
    "max_steps": STEPS,
    "precision": "fp32",
    "num_workers": 0,
    "eval_interval": 0,
    "eval_split": 0.0,
    "packing": "concat",
    "train_on": "all",
    "expert_log_interval": 100,
}


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the largest since the last reset) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not tell {field}")


def reset_largest() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Sections(NullChannel):
    """A channel that keeps the largest resident set of the dry run and of each section of a step; `done` when the last ends."""

    def __init__(self) -> None:
        self.highest: dict[str, int] = {}
        self.name = ""
        self.done = threading.Event()

    def report(self, step: int, section: str) -> None:
        if step == STEPS and section in (WAITED, "save"):
            self.done.set()
        if self.name:
            self.highest[self.name] = max(self.highest.get(self.name, 0), resident("VmHWM"))
        self.name = section if step or section == "dry run" else ""
        reset_largest()


def settle() -> None:
    """Give back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def saving_late(config: Config, folder: Path, channel: Sections) -> CheckpointManager:
    """A manager that begins to write a checkpoint when the last step has ended."""
    manager = CheckpointManager(config, run_dir=folder)
    write = manager._saver._write

    def late(job: Any) -> None:
        channel.done.wait()
        write(job)

    manager._saver._write = late  # type: ignore[method-assign]
    return manager


def measured(config: Config, comm: Comm) -> dict[str, Any]:
    """Train `STEPS` steps; the peak over what was resident before, in bytes, in all and by section."""
    tokenizer = ConversationTokenizer(config.tokenizer)
    data = open_data(config, tokenizer).train
    settle()
    before = resident("VmRSS")
    channel = Sections()
    with tempfile.TemporaryDirectory() as folder:
        manager = saving_late(config, Path(folder), channel) if config.save_interval == 1 else None
        model = DeepSeekTransformer(config)
        trainer = EnhancedConversationTrainer(model, tokenizer, config, None, comm=comm, channel=channel, manager=manager)
        trainer.train(data)
        channel.report(0, "")
    sections = {name: value - before for name, value in channel.highest.items()}
    return {"peak": max(sections.values()), "sections": sections, "resolved": trainer.config}


WORDS = ["the", "river", "runs", "past", "the", "old", "stone", "house", "and", "a", "small", "bird", "sings"]


def corpus(folder: Path) -> Path:
    """Conversations that fill whole rows, in `train.jsonl`; beside it in `short.jsonl` some of `WORST_DOCUMENT` tokens each."""
    tales = [(f"tale {n}", " ".join(WORDS[(n * 7 + i * i) % len(WORDS)] for i in range(600))) for n in range(400)]
    sums = [(f"{n:03}", f"{n * 7:04}") for n in range(1000)]  # a digit is a token
    tokenizer = ConversationTokenizer(str(SHAPE["tokenizer"]))
    assert len(tokenizer.encode_conversation(_turns(*sums[1]))) == WORST_DOCUMENT
    for name, texts in (("train", tales), ("short", sums)):
        with (folder / f"{name}.jsonl").open("w") as stream:
            stream.writelines(json.dumps({"messages": _turns(*pair)}) + "\n" for pair in texts)
    return folder / "train.jsonl"


def _turns(asked: str, told: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    comm = Comm.start("gloo")
    for name, overrides in cases.items():
        data = folder / ("short.jsonl" if overrides.pop("short", False) else "train.jsonl")
        own = {"train_data_path": str(data), "data_cache_dir": str(folder / "cache")}
        measured(Config(**(SHAPE | own | overrides)), comm)
        found = measured(Config(**(SHAPE | own | overrides)), comm)
        config = found.pop("resolved")
        layout = layout_of(config, Machine(), config.zero_stage, comm.world_size)
        memory, saved = training_memory(model_config(config), layout), checkpoint_bytes(model_config(config), layout)
        saving = host_memory(config, Machine(), memory, saved)["saving"] if config.save_interval == 1 else 0
        if comm.rank == 0:
            told = {"memory": asdict(memory) | {"total": memory.total}, "saving": saving}
            print("PEAK " + json.dumps({"name": name, **found, **told}), flush=True)


if __name__ == "__main__":
    main()
